//! The pool: one task that owns the ledger and the workers.
//!
//! Events in, `decide`, effects out. It never waits for a load: a supervisor task does, and reports back as
//! an event. Everybody else holds a [`Pool`], which sends messages, and leases, which are guards.

mod lease;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sarai_core::frame::{LoadSpec, ToWorker};
use sarai_core::{Bytes, Error};
use sarai_plan::ledger::{EngineSpec, Limits, Row};
use sarai_plan::{Effect, EngineId, Ledger, Plan, PoolEvent, Ticket};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::config::{Engine, MemoryConfig};
use crate::supervise::child::{Report, Start, Worker, supervise};
use crate::supervise::measure;

pub use lease::{Busy, Lease};

/// How often busy workers are measured; idle ones every tenth time.
const MEASURE_EVERY: Duration = Duration::from_secs(1);
/// So many deaths within [`QUARANTINE_WINDOW`] close an engine for the rest of it.
const QUARANTINE_DEATHS: usize = 5;
const QUARANTINE_WINDOW: Duration = Duration::from_secs(30);

/// What everybody else knows of the pool.
#[derive(Clone, Debug)]
pub struct Pool {
    // Unbounded in type, bounded in fact: a request has at most two messages under way, and requests are
    // bounded by admission. A guard that is dropped must be able to send without waiting.
    messages: mpsc::UnboundedSender<Message>,
}

type Reply = oneshot::Sender<Result<(Worker, Busy), Error>>;

enum Message {
    Wanted(EngineId, Plan, Reply),
    Released(EngineId),
    Report(EngineId, Report),
    Measured(EngineId, Bytes),
    Unload(EngineId),
    Snapshot(oneshot::Sender<Snapshot>),
    Stop(oneshot::Sender<()>),
}

/// The pool at one moment.
#[derive(Debug)]
pub struct Snapshot {
    /// The ledger, row by row.
    pub rows: Vec<Row>,
    /// All claims.
    pub claimed: Bytes,
    /// The limits.
    pub limits: Limits,
    /// Workers whose model is loaded.
    pub workers: HashMap<EngineId, Worker>,
    /// Why the last worker of an engine ended, if it was not asked to.
    pub failures: HashMap<EngineId, String>,
}

impl Pool {
    /// Starts the owner task.
    pub fn start(engines: Arc<[Engine]>, memory: MemoryConfig, executable: PathBuf) -> (Self, JoinHandle<()>) {
        let spec = |engine: &Engine| EngineSpec {
            label: engine.label.clone(),
            is_llm: engine.is_llm,
            evictable: engine.evictable,
        };
        let limits = Limits {
            budget: measure::machine_limit().map_or(memory.max_ram, |most| memory.max_ram.min(most)),
            max_concurrent_llms: memory.max_concurrent_llms,
            strategy: memory.strategy,
        };
        let (messages, inbox) = mpsc::unbounded_channel();
        let pool = Self { messages };
        let owner = Owner {
            ledger: Ledger::new(limits, engines.iter().map(spec).collect()),
            workers: engines.iter().map(|_| Slot::default()).collect(),
            engines,
            executable,
            replies: HashMap::new(),
            next_ticket: 0,
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            stopping: None,
            pool: pool.clone(),
        };
        (pool, tokio::spawn(owner.run(inbox)))
    }

    /// Asks for a worker; waits for its load if need be.
    ///
    /// # Errors
    /// The load was refused or failed.
    ///
    /// # Cancel safety
    /// A worker that is granted to nobody is given back by its guard.
    pub async fn acquire(&self, engine: EngineId, plan: Plan) -> Result<(Worker, Busy), Error> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Wanted(engine, plan, reply));
        answer.await.unwrap_or(Err(Error::ShuttingDown))
    }

    /// Unloads an engine, once it is idle.
    pub fn unload(&self, engine: EngineId) {
        self.send(Message::Unload(engine));
    }

    /// The pool as it stands.
    pub async fn snapshot(&self) -> Option<Snapshot> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Snapshot(reply));
        answer.await.ok()
    }

    /// Ends every worker; returns when none is left.
    pub async fn stop(&self) {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Stop(reply));
        let _ = answer.await;
    }

    fn send(&self, message: Message) {
        // The owner lives as long as the server; after it, there is nobody to tell.
        let _ = self.messages.send(message);
    }
}

#[derive(Default)]
struct Slot {
    stop: Option<oneshot::Sender<()>>,
    worker: Option<Worker>,
    threads: Option<u32>,
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

struct Owner {
    ledger: Ledger,
    engines: Arc<[Engine]>,
    workers: Vec<Slot>,
    executable: PathBuf,
    replies: HashMap<Ticket, Reply>,
    next_ticket: u64,
    cores: usize,
    stopping: Option<oneshot::Sender<()>>,
    pool: Pool,
}

impl Owner {
    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Message>) {
        let mut measure = tokio::time::interval(MEASURE_EVERY);
        measure.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let mut tick = 0_u64;
        loop {
            tokio::select! {
                message = inbox.recv() => match message {
                    Some(message) => self.handle(message),
                    None => return,
                },
                _ = measure.tick() => {
                    tick += 1;
                    self.measure(tick.is_multiple_of(10));
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
            Message::Wanted(_, _, reply) if self.stopping.is_some() => drop(reply.send(Err(Error::ShuttingDown))),
            Message::Wanted(engine, plan, reply) => self.wanted(engine, plan, reply),
            Message::Released(engine) => self.apply(PoolEvent::Released(engine)),
            Message::Report(engine, Report::Loaded(worker)) => {
                tracing::info!(model = self.engines[engine.0].label, pid = worker.pid, "loaded");
                self.workers[engine.0].worker = Some(worker);
                self.workers[engine.0].failure = None;
                self.apply(PoolEvent::Loaded(engine));
                self.measure(true);
            }
            Message::Report(engine, Report::Exited { failure }) => self.exited(engine, failure),
            Message::Measured(engine, bytes) => self.apply(PoolEvent::Measured(engine, bytes)),
            Message::Unload(engine) => self.apply(PoolEvent::UnloadAsked(engine)),
            Message::Snapshot(reply) => drop(reply.send(self.snapshot())),
            Message::Stop(reply) => {
                self.stopping = Some(reply);
                self.workers.iter_mut().for_each(Slot::stop);
            }
        }
        self.share_cores();
    }

    fn wanted(&mut self, engine: EngineId, plan: Plan, reply: Reply) {
        let slot = &mut self.workers[engine.0];
        slot.deaths.retain(|death| death.elapsed() < QUARANTINE_WINDOW);
        if slot.deaths.len() >= QUARANTINE_DEATHS {
            let reason = format!(
                "its worker died {} times within {} s and rests for as long; the last time: {}",
                slot.deaths.len(),
                QUARANTINE_WINDOW.as_secs(),
                slot.failure.as_deref().unwrap_or("unknown")
            );
            let _ = reply.send(Err(Error::Unavailable { model: self.engines[engine.0].label.clone(), reason }));
            return;
        }
        self.next_ticket += 1;
        let ticket = Ticket(self.next_ticket);
        self.replies.insert(ticket, reply);
        self.apply(PoolEvent::Wanted(engine, ticket, plan));
    }

    fn exited(&mut self, engine: EngineId, failure: Option<String>) {
        let slot = &mut self.workers[engine.0];
        slot.stop = None;
        slot.worker = None;
        slot.threads = None;
        if failure.is_some() {
            slot.deaths.push(Instant::now());
        }
        slot.failure = failure;
        self.apply(PoolEvent::Exited(engine));
    }

    fn apply(&mut self, event: PoolEvent) {
        for effect in self.ledger.decide(event) {
            self.perform(effect);
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Load(engine) => self.load(engine),
            Effect::Stop(engine) => {
                tracing::info!(model = self.engines[engine.0].label, "unloading");
                self.workers[engine.0].stop();
            }
            Effect::Grant(engine, ticket) => self.grant(engine, ticket),
            Effect::Refuse(ticket, refusal) => self.answer(ticket, Err(Error::DoesNotFit(refusal))),
            Effect::Fail(engine, ticket) => {
                let reason = self.workers[engine.0].failure.clone();
                let reason = reason.unwrap_or_else(|| "its worker ended before it was loaded".into());
                let model = self.engines[engine.0].label.clone();
                self.answer(ticket, Err(Error::Unavailable { model, reason }));
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

    fn load(&mut self, engine: EngineId) {
        if self.stopping.is_some() {
            // Nothing is started any more: those who wait for it are told so.
            self.apply(PoolEvent::Exited(engine));
            return;
        }
        let config = &self.engines[engine.0];
        let start = Start {
            executable: self.executable.clone(),
            spec: LoadSpec {
                model: config.label.clone(),
                path: config.path.clone(),
                context_tokens: config.settings.context_tokens,
                parallel: config.settings.parallel,
                ubatch_tokens: config.settings.ubatch_tokens,
                threads: self.threads_of(engine, 1),
            },
            load_deadline: config.load_deadline,
        };
        tracing::info!(model = config.label, path = %config.path.display(), "loading");
        let (stop, on_stop) = oneshot::channel();
        self.workers[engine.0].stop = Some(stop);
        let pool = self.pool.clone();
        tokio::spawn(supervise(start, on_stop, move |report| pool.send(Message::Report(engine, report))));
    }

    fn threads_of(&self, engine: EngineId, computing: usize) -> u32 {
        let share = (self.cores / computing.max(1)).max(1);
        let share = u32::try_from(share).unwrap_or(u32::MAX);
        self.engines[engine.0].threads.map_or(share, |most| share.min(most))
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

    fn measure(&self, idle_too: bool) {
        for row in self.ledger.rows() {
            let Some(worker) = &self.workers[row.engine.0].worker else { continue };
            if row.busy == 0 && !idle_too {
                continue;
            }
            let (pid, pool) = (worker.pid, self.pool.clone());
            tokio::task::spawn_blocking(move || {
                if let Some(memory) = measure::measure(pid) {
                    pool.send(Message::Measured(row.engine, memory.total()));
                }
            });
        }
    }

    fn snapshot(&self) -> Snapshot {
        let slots = || self.workers.iter().enumerate().map(|(index, slot)| (EngineId(index), slot));
        Snapshot {
            rows: self.ledger.rows(),
            claimed: self.ledger.claimed(),
            limits: self.ledger.limits(),
            workers: slots().filter_map(|(id, slot)| Some((id, slot.worker.clone()?))).collect(),
            failures: slots().filter_map(|(id, slot)| Some((id, slot.failure.clone()?))).collect(),
        }
    }
}
