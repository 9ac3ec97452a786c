//! The task that owns the ledger and the workers: events in, `decide`, effects out.
//!
//! It never waits for a load or a measure: other tasks do, and report back as messages.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use sarai_core::frame::{LoadSpec, Projector, ToWorker};
use sarai_core::{Bytes, Error, Lane};
use sarai_plan::estimate::{Repack, Settings, idle_pieces};
use sarai_plan::layers::{Layers, purpose};
use sarai_plan::ledger::{EngineSpec, Limits, Millis, State};
use sarai_plan::{Effect, EngineId, Ledger, PoolEvent, Size, Ticket, Want, projector};
use tokio::sync::{mpsc, oneshot};

use super::loan::{Borrower, Loans};
use super::{Busy, Message, Parts, Pool, Reply, Snapshot, WhatIf};
use crate::catalog::Catalog;
use crate::config::MemoryConfig;
use crate::machine;
use crate::machine::cgroup::Groups;
use crate::machine::cores::{Cores, Does, Share};
use crate::machine::pressure::Reading;
use crate::model_file::ModelFile;
use crate::planner::Planner;
use crate::source::Source;
use crate::supervise::child::{Ended, Load, Report, Start, Stop, Worker, supervise};

/// How often memory is measured while anything is busy; else every tenth time.
const MEASURE_EVERY: Duration = Duration::from_secs(1);
/// How often time alone may change something while somebody waits.
const TICK: Duration = Duration::from_millis(20);
/// So many deaths within [`QUARANTINE_WINDOW`] close an engine for the rest of it.
const QUARANTINE_DEATHS: usize = 5;
const QUARANTINE_WINDOW: Duration = Duration::from_secs(30);

#[derive(Default)]
pub(super) struct Slot {
    stop: Option<oneshot::Sender<Stop>>,
    /// From the start of the process.
    pub pid: Option<u32>,
    worker: Option<Worker>,
    /// What it was loaded from.
    pub source: Option<Source>,
    /// What it was last loaded with, or resized to.
    pub size: Size,
    /// Memory of its own at the most, while it had this size.
    pub most: Bytes,
    /// Leases that are out for requests that somebody waits for.
    interactive: usize,
    share: Option<Share>,
    load_began: Option<Instant>,
    /// How far the load has come, in parts of a hundred.
    progress: Arc<AtomicU8>,
    resize_began: Option<Instant>,
    deaths: Vec<Instant>,
    failure: Option<String>,
}

impl Slot {
    /// Asks the worker to end. A sender is kept until the exit is reported: it marks that the worker still lives.
    fn stop(&mut self, why: Stop) {
        if let Some(stop) = self.stop.take() {
            let (kept, _) = oneshot::channel();
            let _ = stop.send(why);
            self.stop = Some(kept);
        }
    }
}

pub(super) struct Owner {
    pub ledger: Ledger,
    pub catalog: Arc<Catalog>,
    pub planner: Planner,
    pub memory: MemoryConfig,
    pub groups: Groups,
    pub workers: Vec<Slot>,
    pub executable: PathBuf,
    replies: HashMap<Ticket, (Reply, Lane)>,
    cores: Cores,
    began: Instant,
    pub last_asked: Instant,
    /// What the server was last measured at.
    pub server: Bytes,
    pub pressure: Reading,
    /// A measure is under way.
    pub observing: bool,
    pub probing: Option<EngineId>,
    pub loans: Loans,
    pub unprobable: HashSet<EngineId>,
    oom_kills: u64,
    pub stopping: Option<oneshot::Sender<()>>,
    pub pool: Pool,
}

impl Owner {
    pub(super) fn new(parts: Parts, pool: Pool) -> Self {
        let Parts { catalog, planner, memory, executable } = parts;
        let (limits, specs) = (limits(memory), specs(&catalog, &planner));
        Self {
            ledger: Ledger::new(limits, specs),
            workers: catalog.engines.iter().map(|_| Slot::default()).collect(),
            catalog,
            planner,
            memory,
            groups: Groups::of_this_process(),
            executable,
            replies: HashMap::new(),
            cores: Cores::now(),
            began: Instant::now(),
            last_asked: Instant::now(),
            server: Bytes::ZERO,
            pressure: Reading::default(),
            observing: false,
            oom_kills: 0,
            probing: None,
            loans: Loans::default(),
            unprobable: HashSet::new(),
            stopping: None,
            pool,
        }
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Message>) {
        let mut measure = tokio::time::interval(MEASURE_EVERY);
        measure.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let mut measures = 0_u64;
        loop {
            let look = self.next_look();
            tokio::select! {
                message = inbox.recv() => match message {
                    Some(message) => self.handle(message),
                    None => return,
                },
                () = async { tokio::time::sleep(look.unwrap_or_default()).await }, if look.is_some() => {
                    self.apply(PoolEvent::Tick);
                    self.share_cores();
                }
                _ = measure.tick() => {
                    if self.is_busy() || measures.is_multiple_of(10) {
                        self.observe();
                        self.probe_if_idle();
                        // A quota or a set of cores may be changed while it runs.
                        self.cores = Cores::now();
                        self.share_cores();
                    }
                    measures += 1;
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

    /// When time alone may change something: soon while somebody waits, else when the next keep_alive is over.
    fn next_look(&self) -> Option<Duration> {
        if self.ledger.is_waiting() {
            return Some(TICK);
        }
        let next = self.ledger.next_expiry()?;
        Some(Duration::from_millis(next.saturating_sub(self.now())).max(Duration::from_millis(1)))
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
            Message::Released(engine, lane) => {
                self.workers[engine.0].interactive -= usize::from(lane == Lane::Interactive);
                self.apply(PoolEvent::Released(engine));
                if self.catalog.engines[engine.0].process.is_some() {
                    // Of a command nothing else says what an answer makes it take.
                    self.observe();
                }
            }
            Message::Lend(borrower, reply) => {
                self.look_again();
                let tokens = match borrower {
                    Borrower::Forms(engine) => self.workers[engine.0].source.as_ref().and_then(Source::header),
                    Borrower::Validator => None,
                };
                let tokens = tokens.map_or(0, |header| header.vocabulary());
                let bytes = self.loans.lend(borrower, tokens, self.ledger.free());
                // If nobody waits any more, dropping it gives it back.
                let _ = reply.send(self.pool.loan(borrower, bytes));
                self.book_loan(borrower);
            }
            Message::GivenBack(borrower) => {
                self.loans.give_back(borrower);
                self.book_loan(borrower);
            }
            Message::Report(engine, report) => self.reported(engine, report),
            Message::Observed(observation) => self.observed(&observation),
            Message::Probed(engine, outcome) => self.probed(engine, outcome),
            Message::Reconfigure(catalog, memory) => self.reconfigure(catalog, memory),
            Message::Unload(engine) => self.apply(PoolEvent::UnloadAsked(engine)),
            Message::Snapshot(reply) => drop(reply.send(self.snapshot())),
            Message::WhatIf(engine, want, reply) => {
                self.look_again();
                let _ = reply.send(self.what_if(engine, *want));
            }
            Message::Stop(reply) => {
                self.stopping = Some(reply);
                self.workers.iter_mut().for_each(|slot| slot.stop(Stop::Idle));
            }
        }
        self.share_cores();
    }

    fn book_loan(&mut self, borrower: Borrower) {
        let engine = match borrower {
            Borrower::Forms(engine) => Some(engine),
            Borrower::Validator => None,
        };
        self.apply(PoolEvent::Lent(engine, self.loans.booked(borrower)));
    }

    fn reconfigure(&mut self, catalog: Arc<Catalog>, memory: MemoryConfig) {
        let old = std::mem::replace(&mut self.catalog, catalog);
        self.memory = memory;
        self.workers.resize_with(self.catalog.engines.len(), Slot::default);
        self.ledger.reconfigure(limits(memory), specs(&self.catalog, &self.planner));
        for (index, engine) in old.engines.iter().enumerate() {
            if !engine.loads_like(&self.catalog.engines[index]) {
                self.apply(PoolEvent::UnloadAsked(EngineId(index)));
            }
        }
        self.look_again();
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
        self.replies.insert(ticket, (reply, want.lane));
        self.apply(PoolEvent::Wanted(engine, ticket, want));
    }

    fn reported(&mut self, engine: EngineId, report: Report) {
        match report {
            Report::Started(pid) => self.workers[engine.0].pid = Some(pid),
            Report::Loaded(worker) => {
                let slot = &mut self.workers[engine.0];
                let took = slot.load_began.take().map_or(Duration::ZERO, |began| began.elapsed());
                tracing::info!(model = self.catalog.engines[engine.0].label, pid = worker.pid, ?took, "loaded");
                slot.worker = Some(worker);
                slot.failure = None;
                if let Some(source) = &slot.source {
                    self.planner.loaded(source, Millis::try_from(took.as_millis()).unwrap_or(Millis::MAX));
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
                let slot = &mut self.workers[engine.0];
                slot.resize_began = None;
                // Its new context has the threads of a worker that is alone.
                slot.share = None;
                slot.size = self.ledger.size(engine);
                slot.most = Bytes::ZERO;
                self.observe();
            }
            Report::Exited(ended) => self.exited(engine, ended),
        }
    }

    fn exited(&mut self, engine: EngineId, ended: Ended) {
        let settings = self.settings_of(engine);
        let slot = &mut self.workers[engine.0];
        let (source, most, was_loaded) = (slot.source.take(), std::mem::take(&mut slot.most), slot.worker.is_some());
        slot.stop = None;
        slot.pid = None;
        slot.worker = None;
        slot.share = None;
        slot.load_began = None;
        slot.resize_began = None;
        let failed = ended.failure.is_some();
        if failed {
            slot.deaths.push(Instant::now());
        }
        slot.failure = ended.failure;
        let mut raise = Bytes::ZERO;
        if let Some(source) = source {
            if ended.out_of_memory {
                self.oom_kills += 1;
                raise = self.planner.killed(&source, settings);
                tracing::warn!(model = self.label(engine), by = %raise, "its next load is planned higher");
            } else if !failed && was_loaded {
                self.planner.ended(&source, settings, most);
            }
        }
        self.apply(PoolEvent::Exited { engine, raise, available: Some(machine::free()) });
        // What lasts is written aside, and not at the next measure only.
        let planner = self.planner.clone();
        tokio::task::spawn_blocking(move || planner.flush());
    }

    /// Ends a worker that does not come back from a resize.
    pub(super) fn end_what_hangs(&mut self) {
        for index in 0..self.workers.len() {
            let limit = self.catalog.engines[index].load_deadline;
            let slot = &mut self.workers[index];
            if slot.resize_began.take_if(|began| began.elapsed() > limit).is_some() {
                let reason =
                    format!("its context was not resized within {} s (deadline `load_seconds`)", limit.as_secs());
                slot.stop(Stop::Because(reason));
            }
        }
    }

    pub(super) fn apply(&mut self, event: PoolEvent) {
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

    pub(super) fn label(&self, engine: EngineId) -> String {
        self.catalog.engines[engine.0].label.clone()
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Load(engine, context_tokens) => self.load(engine, context_tokens),
            Effect::Resize(engine, context_tokens) => {
                let slot = &mut self.workers[engine.0];
                slot.size = self.ledger.size(engine);
                slot.resize_began = Some(Instant::now());
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
            Effect::Stop(engine) => self.workers[engine.0].stop(Stop::Idle),
            Effect::Kill(engine, why) => self.workers[engine.0].stop(Stop::Because(why)),
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
        let lane = self.replies.get(&ticket).map_or(Lane::Bulk, |(_, lane)| *lane);
        self.workers[engine.0].interactive += usize::from(lane == Lane::Interactive);
        let busy = Busy::new(engine, lane, self.pool.clone());
        let granted = match &self.workers[engine.0].worker {
            Some(worker) => Ok((worker.clone(), busy)),
            None => Err(Error::Internal("an engine without a worker was granted".into())),
        };
        self.answer(ticket, granted);
    }

    fn answer(&mut self, ticket: Ticket, answer: Result<(Worker, Busy), Error>) {
        if let Some((reply, _)) = self.replies.remove(&ticket) {
            let _ = reply.send(answer);
        }
    }

    fn load(&mut self, engine: EngineId, context_tokens: u32) {
        if self.stopping.is_some() {
            // Nothing is started any more: those who wait for it are told so.
            self.apply(PoolEvent::Exited { engine, raise: Bytes::ZERO, available: None });
            return;
        }
        let config = &self.catalog.engines[engine.0];
        let settings = Settings { context_tokens, ..config.settings };
        let source = self.catalog.source(engine).ok();
        let load = match &source {
            Some(Source::Process(process)) => Load::Process(Arc::clone(process)),
            // Of a file that cannot be read, the worker says what is wrong with it.
            file => {
                let file = file.as_ref().and_then(Source::file);
                Load::File(load_spec(
                    config,
                    settings,
                    self.cores.deal(&[(Does::Awaited, config.threads)])[0].threads,
                    file,
                ))
            }
        };
        let (executable, label) = (self.executable.clone(), config.label.clone());
        let progress = Arc::default();
        let slot = &mut self.workers[engine.0];
        slot.progress = Arc::clone(&progress);
        let start = Start { executable, label, load, load_deadline: config.load_deadline, progress };
        let (stop, on_stop) = oneshot::channel();
        slot.stop = Some(stop);
        slot.load_began = Some(Instant::now());
        slot.source = source;
        slot.most = Bytes::ZERO;
        slot.size = self.ledger.size(engine);
        let pool = self.pool.clone();
        tokio::spawn(supervise(start, on_stop, move |report| pool.send(Message::Report(engine, report))));
    }

    /// What each worker has of the cores.
    fn shares(&self) -> Vec<Share> {
        let does = |index: usize| match (self.ledger.is_computing(EngineId(index)), self.workers[index].interactive) {
            (false, _) => Does::Nothing,
            (true, 0) => Does::Bulk,
            (true, _) => Does::Awaited,
        };
        let workers: Vec<_> =
            (0..self.workers.len()).map(|index| (does(index), self.catalog.engines[index].threads)).collect();
        self.cores.deal(&workers)
    }

    fn share_cores(&mut self) {
        let shares = self.shares();
        for (slot, share) in self.workers.iter_mut().zip(shares) {
            if let Some(worker) = slot.worker.as_ref().filter(|_| slot.share != Some(share)) {
                worker.send(ToWorker::Share { threads: share.threads, rests: share.rests });
                slot.share = Some(share);
            }
        }
    }

    pub(super) fn is_busy(&self) -> bool {
        self.ledger.is_waiting() || self.ledger.computing() > 0 || self.ledger.is_loading()
    }

    fn snapshot(&self) -> Snapshot {
        let slots = || self.workers.iter().enumerate().map(|(index, slot)| (EngineId(index), slot));
        Snapshot {
            rows: self.ledger.rows(),
            claimed: self.ledger.claimed(),
            server: self.ledger.server(),
            limits: self.ledger.limits(),
            decisions: self.ledger.decisions().cloned().collect(),
            counts: self.ledger.counts(),
            oom_kills: self.oom_kills,
            pressure: self.pressure,
            is_pressed: self.ledger.is_pressed(),
            now: self.now(),
            workers: slots().filter_map(|(id, slot)| Some((id, slot.worker.clone()?))).collect(),
            loading: slots()
                .filter(|(_, slot)| slot.load_began.is_some())
                .map(|(id, slot)| (id, slot.progress.load(Ordering::Relaxed)))
                .collect(),
            failures: slots().filter_map(|(id, slot)| Some((id, slot.failure.clone()?))).collect(),
        }
    }

    fn what_if(&self, engine: EngineId, want: Want) -> WhatIf {
        let mut ledger = self.ledger.clone();
        let before = ledger.decisions().next().cloned();
        let ticket = Ticket(u64::MAX);
        let mut available = ledger.available().unwrap_or(Bytes(u64::MAX));
        let mut effects = ledger.decide(PoolEvent::Wanted(engine, ticket, want), self.now());
        // What only a moment's rest keeps from making room does so now.
        effects.extend(ledger.decide(PoolEvent::Tick, self.now() + 1_000));
        let (now, mut next) = (self.now() + 1_000, 0);
        // What is on its way arrives.
        for row in self.ledger.rows() {
            let event = match row.state {
                State::Loading => PoolEvent::Loaded(row.engine),
                State::Resizing => PoolEvent::Resized(row.engine, Ok(())),
                _ => continue,
            };
            effects.extend(ledger.decide(event, now));
        }
        while next < effects.len() && next < 64 {
            let event = match effects[next] {
                Effect::Stop(id) => {
                    available += ledger.rows()[id.0].measured.anonymous;
                    Some(PoolEvent::Exited { engine: id, raise: Bytes::ZERO, available: Some(available) })
                }
                Effect::Load(id, _) => Some(PoolEvent::Loaded(id)),
                Effect::Resize(id, _) => Some(PoolEvent::Resized(id, Ok(()))),
                _ => None,
            };
            next += 1;
            effects.extend(event.into_iter().flat_map(|event| ledger.decide(event, now)));
        }
        let decisions = ledger.decisions().take_while(|decision| Some(*decision) != before.as_ref()).cloned();
        let mut decisions: Vec<_> = decisions.collect();
        decisions.reverse();
        let is_granted = effects.contains(&Effect::Grant(engine, ticket));
        WhatIf { effects, decisions, is_granted, free: ledger.free() }
    }
}

fn limits(memory: MemoryConfig) -> Limits {
    Limits { budget: budget(memory), max_concurrent_llms: memory.max_concurrent_llms, strategy: memory.strategy }
}

fn specs(catalog: &Catalog, planner: &Planner) -> Vec<EngineSpec> {
    let spec = |(index, engine): (usize, &crate::config::Engine)| EngineSpec {
        label: engine.label.clone(),
        is_llm: engine.is_llm,
        evictable: engine.evictable,
        keep_alive: engine.keep_alive,
        reload: catalog.source(EngineId(index)).map_or(1000, |source| planner.reload(&source)),
    };
    catalog.engines.iter().enumerate().map(spec).collect()
}

/// The least of what was configured, what the machine has and what the control group allows; of the latter two the
/// kernel's own share is taken off.
pub(super) fn budget(memory: MemoryConfig) -> Bytes {
    let of_machine = machine::limit().map(|most| most.less(Bytes::mib(8).max(Bytes(most.0 / 50))));
    of_machine.map_or(memory.max_ram, |most| memory.max_ram.min(most))
}

/// Of one that cannot be read, the worker says what is wrong with it.
fn projector_of(path: &Path, file: Option<&ModelFile>) -> Projector {
    Projector {
        path: path.to_owned(),
        most_tokens: file.and_then(ModelFile::projector_header).and_then(projector::most_tokens),
        kept: file.map_or(Bytes::ZERO, |file| projector::kept(&file.header)),
    }
}

/// The frame that has a worker load an engine.
pub(super) fn load_spec(
    config: &crate::config::Engine,
    settings: Settings,
    threads: u32,
    file: Option<&ModelFile>,
) -> LoadSpec {
    let header = file.map(|file| &file.header);
    let settings = header.map_or(settings, |header| settings.fitted(header));
    LoadSpec {
        model: config.label.clone(),
        path: config.path.clone(),
        projector: config.projector.as_deref().map(|path| projector_of(path, file)),
        draft: config.draft.clone(),
        context_tokens: settings.context_tokens,
        parallel: settings.parallel,
        shared_context: settings.shared_context,
        ubatch_tokens: settings.ubatch_tokens,
        draft_tokens: settings.draft_tokens,
        threads,
        kv: settings.kv,
        flash_attention: settings.flash_attention,
        repack: settings.repack != Repack::Off,
        deterministic: settings.deterministic,
        idle: header.map(|header| idle_pieces(header, settings.repack)).unwrap_or_default(),
        whole_layers: header.map(|header| Layers::of(header).whole()).unwrap_or_default(),
        purpose: header.map(purpose).unwrap_or_default(),
        park: config.park.clone(),
    }
}
