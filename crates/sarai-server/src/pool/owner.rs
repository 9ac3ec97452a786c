//! The task that owns the ledger and the workers: events in, `decide`, effects out.
//!
//! It never waits for a load or a measure: other tasks do, and report back as messages.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sarai_core::frame::{LoadSpec, ToWorker};
use sarai_core::{Bytes, EngineMemory, Error};
use sarai_plan::estimate::{Repack, Settings};
use sarai_plan::ledger::{EngineSpec, Limits, Measured, Millis, State};
use sarai_plan::{Effect, EngineId, Ledger, PoolEvent, Size, Ticket, Want};
use tokio::sync::{mpsc, oneshot};

use super::{Busy, Message, Observation, Parts, Pool, Reply, Snapshot, WhatIf};
use crate::catalog::Catalog;
use crate::config::MemoryConfig;
use crate::machine::cgroup::Groups;
use crate::machine::pressure::Reading;
use crate::machine::{self, process};
use crate::planner::Planner;
use crate::supervise::child::{Ended, Report, Start, Worker, supervise};
use crate::supervise::probe::probe;

/// How often memory is measured while anything is busy; else every tenth time.
const MEASURE_EVERY: Duration = Duration::from_secs(1);
/// How often time alone may change something while somebody waits.
const TICK: Duration = Duration::from_millis(100);
/// What the server holds at least, so that its first seconds do not look like room.
const SERVER_AT_LEAST: Bytes = Bytes::mib(24);
/// A dry run is made once nobody asked for anything for so long.
const PROBE_AFTER: Duration = Duration::from_secs(5);
/// So many deaths within [`QUARANTINE_WINDOW`] close an engine for the rest of it.
const QUARANTINE_DEATHS: usize = 5;
const QUARANTINE_WINDOW: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Slot {
    stop: Option<oneshot::Sender<()>>,
    worker: Option<Worker>,
    /// What it was last loaded with, or resized to.
    size: Size,
    threads: Option<u32>,
    load_began: Option<Instant>,
    deaths: Vec<Instant>,
    failure: Option<String>,
}

impl Slot {
    /// Asks the worker to end. A sender is kept until the exit is reported: it marks that the worker still lives.
    fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let (kept, _) = oneshot::channel();
            let _ = stop.send(());
            self.stop = Some(kept);
        }
    }
}

pub(super) struct Owner {
    ledger: Ledger,
    catalog: Arc<Catalog>,
    planner: Planner,
    groups: Groups,
    workers: Vec<Slot>,
    executable: PathBuf,
    replies: HashMap<Ticket, Reply>,
    cores: usize,
    began: Instant,
    last_asked: Instant,
    pressure: Reading,
    probing: Option<EngineId>,
    unprobable: HashSet<EngineId>,
    stopping: Option<oneshot::Sender<()>>,
    pool: Pool,
}

impl Owner {
    pub(super) fn new(parts: Parts, pool: Pool) -> Self {
        let Parts { catalog, planner, memory, executable } = parts;
        let spec = |(index, engine): (usize, &crate::config::Engine)| EngineSpec {
            label: engine.label.clone(),
            is_llm: engine.is_llm,
            evictable: engine.evictable,
            keep_alive: engine.keep_alive,
            reload: catalog.file(EngineId(index)).map_or(1000, |file| planner.reload(&file)),
        };
        let limits = limits(memory);
        let specs = catalog.engines.iter().enumerate().map(spec).collect();
        Self {
            ledger: Ledger::new(limits, specs),
            workers: catalog.engines.iter().map(|_| Slot::default()).collect(),
            catalog,
            planner,
            groups: Groups::of_this_process(),
            executable,
            replies: HashMap::new(),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            began: Instant::now(),
            last_asked: Instant::now(),
            pressure: Reading::default(),
            probing: None,
            unprobable: HashSet::new(),
            stopping: None,
            pool,
        }
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Message>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let mut ticks = 0_u64;
        let per_measure = u64::try_from(MEASURE_EVERY.as_millis() / TICK.as_millis()).unwrap_or(1);
        loop {
            tokio::select! {
                message = inbox.recv() => match message {
                    Some(message) => self.handle(message),
                    None => return,
                },
                _ = tick.tick() => {
                    if ticks.is_multiple_of(if self.is_busy() { per_measure } else { 10 * per_measure }) {
                        self.observe();
                        self.probe_if_idle();
                    }
                    if self.ledger.is_waiting() || ticks.is_multiple_of(per_measure) {
                        self.apply(PoolEvent::Tick);
                    }
                    ticks += 1;
                }
            }
            if self.workers.iter().all(|slot| slot.stop.is_none())
                && let Some(reply) = self.stopping.take()
            {
                let _ = reply.send(());
                return;
            }
        }
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Wanted(_, _, _, reply) if self.stopping.is_some() => drop(reply.send(Err(Error::ShuttingDown))),
            Message::Wanted(engine, ticket, want, reply) => self.wanted(engine, ticket, *want, reply),
            Message::Abandoned(ticket) => {
                // Most are answered by then.
                if self.replies.remove(&ticket).is_some() {
                    self.apply(PoolEvent::Abandoned(ticket));
                }
            }
            Message::Released(engine) => self.apply(PoolEvent::Released(engine)),
            Message::Report(engine, report) => self.reported(engine, report),
            Message::Observed(observation) => self.observed(&observation),
            Message::Probed(engine, outcome) => self.probed(engine, outcome),
            Message::Unload(engine) => self.apply(PoolEvent::UnloadAsked(engine)),
            Message::Snapshot(reply) => drop(reply.send(self.snapshot())),
            Message::WhatIf(engine, want, reply) => drop(reply.send(self.what_if(engine, *want))),
            Message::Stop(reply) => {
                self.stopping = Some(reply);
                self.workers.iter_mut().for_each(Slot::stop);
            }
        }
        self.share_cores();
    }

    fn wanted(&mut self, engine: EngineId, ticket: Ticket, want: Want, reply: Reply) {
        self.last_asked = Instant::now();
        let slot = &mut self.workers[engine.0];
        slot.deaths.retain(|death| death.elapsed() < QUARANTINE_WINDOW);
        if slot.deaths.len() >= QUARANTINE_DEATHS {
            let reason = format!(
                "its worker died {} times within {} s and rests for as long; the last time: {}",
                slot.deaths.len(),
                QUARANTINE_WINDOW.as_secs(),
                slot.failure.as_deref().unwrap_or("unknown")
            );
            let _ = reply.send(Err(Error::Unavailable { model: self.label(engine), reason }));
            return;
        }
        if self.workers[engine.0].worker.is_none() {
            self.look_again();
        }
        self.replies.insert(ticket, reply);
        self.apply(PoolEvent::Wanted(engine, ticket, want));
    }

    /// Nothing is loaded, or refused, on figures of a second ago.
    fn look_again(&mut self) {
        let available = machine::free();
        self.apply(PoolEvent::Observed { server: self.ledger.server().max(SERVER_AT_LEAST), available });
    }

    fn reported(&mut self, engine: EngineId, report: Report) {
        match report {
            Report::Loaded(worker) => {
                let slot = &mut self.workers[engine.0];
                let took = slot.load_began.take().map_or(Duration::ZERO, |began| began.elapsed());
                tracing::info!(model = self.catalog.engines[engine.0].label, pid = worker.pid, ?took, "loaded");
                slot.worker = Some(worker);
                slot.failure = None;
                if let Ok(file) = self.catalog.file(engine) {
                    let planner = self.planner.clone();
                    let took = Millis::try_from(took.as_millis()).unwrap_or(Millis::MAX);
                    tokio::task::spawn_blocking(move || planner.loaded(&file, took));
                }
                self.apply(PoolEvent::Loaded(engine));
                self.observe();
            }
            Report::Resized(info, failure) => {
                if let Some(reason) = &failure {
                    tracing::warn!(model = self.catalog.engines[engine.0].label, reason, "the context keeps its size");
                }
                if let Some(worker) = &mut self.workers[engine.0].worker {
                    worker.info = info;
                }
                self.apply(PoolEvent::Resized(engine, failure.map_or(Ok(()), Err)));
                self.observe();
            }
            Report::Exited(ended) => self.exited(engine, ended),
        }
    }

    fn exited(&mut self, engine: EngineId, ended: Ended) {
        let slot = &mut self.workers[engine.0];
        slot.stop = None;
        slot.worker = None;
        slot.threads = None;
        slot.load_began = None;
        if ended.failure.is_some() {
            slot.deaths.push(Instant::now());
        }
        slot.failure = ended.failure;
        if ended.out_of_memory
            && let Ok(file) = self.catalog.file(engine)
        {
            let (planner, settings, size) =
                (self.planner.clone(), self.catalog.engines[engine.0].settings, self.workers[engine.0].size.clone());
            tracing::warn!(model = self.label(engine), "its next load is planned a tenth higher");
            // At once: a load that waits must already see it.
            planner.killed(&file, &size, settings);
        }
        self.look_again();
        self.apply(PoolEvent::Exited(engine));
    }

    fn apply(&mut self, event: PoolEvent) {
        let now = self.now();
        let seen = self.ledger.decisions().next().cloned();
        for effect in self.ledger.decide(event, now) {
            self.perform(effect);
        }
        let new: Vec<_> =
            self.ledger.decisions().take_while(|decision| Some(*decision) != seen.as_ref()).cloned().collect();
        for decision in new.iter().rev() {
            tracing::info!(model = self.label(decision.engine), why = decision.why, "{}", decision.what);
        }
    }

    fn now(&self) -> Millis {
        Millis::try_from(self.began.elapsed().as_millis()).unwrap_or(Millis::MAX)
    }

    fn label(&self, engine: EngineId) -> String {
        self.catalog.engines[engine.0].label.clone()
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Load(engine, context_tokens) => self.load(engine, context_tokens),
            Effect::Resize(engine, context_tokens) => {
                let slot = &mut self.workers[engine.0];
                slot.size = self.ledger.size(engine);
                match &slot.worker {
                    Some(worker) => worker.send(ToWorker::Resize { context_tokens }),
                    None => tracing::error!("an engine without a worker was to be resized"),
                }
            }
            Effect::Trim(engine) => {
                if let Some(worker) = &self.workers[engine.0].worker {
                    worker.send(ToWorker::Trim);
                }
            }
            Effect::Stop(engine) => self.workers[engine.0].stop(),
            Effect::Grant(engine, ticket) => self.grant(engine, ticket),
            Effect::Refuse(ticket, refusal) => self.answer(ticket, Err(Error::DoesNotFit(refusal))),
            Effect::Fail(engine, ticket, reason) => {
                let reason = reason.or_else(|| self.workers[engine.0].failure.clone());
                let reason = reason.unwrap_or_else(|| "its worker ended before it was loaded".into());
                self.answer(ticket, Err(Error::Unavailable { model: self.label(engine), reason }));
            }
        }
    }

    fn grant(&mut self, engine: EngineId, ticket: Ticket) {
        // The guard is made first: if nobody waits any more, dropping it gives the engine back.
        let busy = Busy::new(engine, self.pool.clone());
        let granted = match &self.workers[engine.0].worker {
            Some(worker) => Ok((worker.clone(), busy)),
            None => Err(Error::Internal("an engine without a worker was granted".into())),
        };
        self.answer(ticket, granted);
    }

    fn answer(&mut self, ticket: Ticket, answer: Result<(Worker, Busy), Error>) {
        if let Some(reply) = self.replies.remove(&ticket) {
            let _ = reply.send(answer);
        }
    }

    fn load(&mut self, engine: EngineId, context_tokens: u32) {
        if self.stopping.is_some() {
            // Nothing is started any more: those who wait for it are told so.
            self.apply(PoolEvent::Exited(engine));
            return;
        }
        let config = &self.catalog.engines[engine.0];
        let settings = Settings { context_tokens, ..config.settings };
        let start = Start {
            executable: self.executable.clone(),
            spec: load_spec(config, settings, self.threads_of(engine, 1)),
            load_deadline: config.load_deadline,
        };
        let (stop, on_stop) = oneshot::channel();
        let slot = &mut self.workers[engine.0];
        slot.stop = Some(stop);
        slot.load_began = Some(Instant::now());
        slot.size = self.ledger.size(engine);
        let pool = self.pool.clone();
        tokio::spawn(supervise(start, on_stop, move |report| pool.send(Message::Report(engine, report))));
    }

    fn threads_of(&self, engine: EngineId, computing: usize) -> u32 {
        let share = (self.cores / computing.max(1)).max(1);
        let share = u32::try_from(share).unwrap_or(u32::MAX);
        self.catalog.engines[engine.0].threads.map_or(share, |most| share.min(most))
    }

    /// Workers that compute at the same time share the cores: two that use them all collapse together.
    fn share_cores(&mut self) {
        let computing = self.ledger.rows().iter().filter(|row| row.busy > 0).count();
        for index in 0..self.workers.len() {
            let threads = self.threads_of(EngineId(index), computing);
            let slot = &mut self.workers[index];
            if let Some(worker) = slot.worker.as_ref().filter(|_| slot.threads != Some(threads)) {
                worker.send(ToWorker::Threads(threads));
                slot.threads = Some(threads);
            }
        }
    }

    fn is_busy(&self) -> bool {
        self.ledger.is_waiting() || self.ledger.rows().iter().any(|row| row.busy > 0 || row.state == State::Loading)
    }

    /// Has everything measured, aside.
    fn observe(&self) {
        let workers: Vec<_> = (self.workers.iter().enumerate())
            .filter_map(|(index, slot)| Some((EngineId(index), slot.worker.as_ref()?.pid)))
            .collect();
        let (groups, pool) = (self.groups.clone(), self.pool.clone());
        tokio::task::spawn_blocking(move || {
            let measured = |(engine, pid)| Some((engine, pid, process::measure(pid)?));
            pool.send(Message::Observed(Box::new(Observation {
                server: process::measure(std::process::id()).unwrap_or_default().total(),
                available: machine::free(),
                pressure: Reading::now(&groups),
                workers: workers.into_iter().filter_map(measured).collect(),
            })));
        });
    }

    fn observed(&mut self, observation: &Observation) {
        let probing = self.probing.map_or(Bytes::ZERO, |engine| self.probe_takes(engine));
        let server = observation.server.max(SERVER_AT_LEAST) + probing;
        self.apply(PoolEvent::Observed { server, available: observation.available });
        self.pressure = observation.pressure;
        let short = observation.pressure.is_short(self.ledger.is_pressed());
        if short != self.ledger.is_pressed() {
            tracing::warn!(short, full_avg10 = self.pressure.full_avg10, available = %self.pressure.available, "memory pressure");
        }
        self.apply(PoolEvent::Pressure(short));
        for &(engine, pid, memory) in &observation.workers {
            // A worker that came since was not measured.
            if self.workers[engine.0].worker.as_ref().is_none_or(|worker| worker.pid != pid) {
                continue;
            }
            let measured = Measured { anonymous: memory.anonymous, file: memory.file };
            self.apply(PoolEvent::Measured(engine, measured));
            if let Ok(file) = self.catalog.file(engine)
                && self.ledger.rows()[engine.0].state == State::Resident
            {
                let (planner, settings) = (self.planner.clone(), self.catalog.engines[engine.0].settings);
                let size = self.workers[engine.0].size.clone();
                tokio::task::spawn_blocking(move || planner.measured(&file, &size, settings, measured));
            }
        }
    }

    /// What a dry run takes: the tables of the vocabulary and a process.
    fn probe_takes(&self, engine: EngineId) -> Bytes {
        let Ok(file) = self.catalog.file(engine) else { return Bytes::ZERO };
        let plan = self.planner.plan(&file, self.catalog.engines[engine.0].settings);
        // While it reads, the tokenizer is there twice.
        plan.part("vocabulary") * 2 + plan.part("process") + plan.part("binary")
    }

    /// Makes the dry run of one engine that has none yet, while nobody asks for anything and there is room.
    fn probe_if_idle(&mut self) {
        if self.probing.is_some()
            || self.is_busy()
            || self.stopping.is_some()
            || self.last_asked.elapsed() < PROBE_AFTER
        {
            return;
        }
        for index in 0..self.catalog.engines.len() {
            let engine = EngineId(index);
            let config = &self.catalog.engines[index];
            let Ok(file) = self.catalog.file(engine) else { continue };
            let known = self.planner.is_probed(&file, config.settings) || self.unprobable.contains(&engine);
            if known || self.probe_takes(engine) > self.ledger.free() {
                continue;
            }
            self.probing = Some(engine);
            let spec = load_spec(config, config.settings, 1);
            let (executable, pool) = (self.executable.clone(), self.pool.clone());
            tokio::spawn(async move {
                let outcome = probe(&executable, spec).await.map(|info| info.memory);
                pool.send(Message::Probed(engine, outcome));
            });
            return;
        }
    }

    fn probed(&mut self, engine: EngineId, outcome: Result<EngineMemory, String>) {
        self.probing = None;
        match (outcome, self.catalog.file(engine)) {
            (Ok(memory), Ok(file)) => {
                let (planner, settings) = (self.planner.clone(), self.catalog.engines[engine.0].settings);
                tokio::task::spawn_blocking(move || planner.probed(&file, settings, memory));
            }
            (Err(reason), _) => {
                tracing::warn!(model = self.label(engine), reason, "the dry run failed");
                self.unprobable.insert(engine);
            }
            (Ok(_), Err(_)) => {}
        }
    }

    fn snapshot(&self) -> Snapshot {
        let slots = || self.workers.iter().enumerate().map(|(index, slot)| (EngineId(index), slot));
        Snapshot {
            rows: self.ledger.rows(),
            claimed: self.ledger.claimed(),
            server: self.ledger.server(),
            limits: self.ledger.limits(),
            decisions: self.ledger.decisions().cloned().collect(),
            pressure: self.pressure,
            is_pressed: self.ledger.is_pressed(),
            now: self.now(),
            workers: slots().filter_map(|(id, slot)| Some((id, slot.worker.clone()?))).collect(),
            failures: slots().filter_map(|(id, slot)| Some((id, slot.failure.clone()?))).collect(),
        }
    }

    fn what_if(&self, engine: EngineId, want: Want) -> WhatIf {
        let mut ledger = self.ledger.clone();
        let before = ledger.decisions().next().cloned();
        let ticket = Ticket(u64::MAX);
        let mut effects = ledger.decide(PoolEvent::Wanted(engine, ticket, want), self.now());
        let mut next = 0;
        while next < effects.len() && next < 64 {
            let event = match effects[next] {
                Effect::Stop(id) => Some(PoolEvent::Exited(id)),
                Effect::Load(id, _) => Some(PoolEvent::Loaded(id)),
                Effect::Resize(id, _) => Some(PoolEvent::Resized(id, Ok(()))),
                _ => None,
            };
            next += 1;
            effects.extend(event.into_iter().flat_map(|event| ledger.decide(event, self.now())));
        }
        let decisions = ledger.decisions().take_while(|decision| Some(*decision) != before.as_ref()).cloned();
        let mut decisions: Vec<_> = decisions.collect();
        decisions.reverse();
        WhatIf { effects, decisions, free: ledger.free() }
    }
}

/// The budget is the least of what was configured, what the machine has and what the control group allows; of the
/// latter two the kernel's own share is taken off.
fn limits(memory: MemoryConfig) -> Limits {
    let of_machine = machine::limit().map(|most| most.less(Bytes::mib(8).max(Bytes(most.0 / 50))));
    Limits {
        budget: of_machine.map_or(memory.max_ram, |most| memory.max_ram.min(most)),
        max_concurrent_llms: memory.max_concurrent_llms,
        strategy: memory.strategy,
    }
}

/// The frame that has a worker load an engine.
fn load_spec(config: &crate::config::Engine, settings: Settings, threads: u32) -> LoadSpec {
    LoadSpec {
        model: config.label.clone(),
        path: config.path.clone(),
        context_tokens: settings.context_tokens,
        parallel: settings.parallel,
        ubatch_tokens: settings.ubatch_tokens,
        threads,
        kv: settings.kv,
        flash_attention: settings.flash_attention,
        repack: settings.repack != Repack::Off,
    }
}
