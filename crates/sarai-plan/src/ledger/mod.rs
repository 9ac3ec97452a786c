//! The ledger and `decide`: who is resident, what is claimed, and what an event leads to.
//!
//! Pure: the same events at the same times give the same effects. One task of the server owns the ledger and performs
//! the effects. What counts: for every worker the memory that only it has and the weight bytes in use, measured or
//! planned, whichever is larger; and what the server itself holds. The sum of what is admitted stays within the
//! budget whatever the order of events; when a measure shows more than was planned, nothing is admitted, and room is
//! made until it fits again.

mod engine;
mod room;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use sarai_core::{Bytes, Held, Refusal};

use engine::{Engine, Waiter};
pub use engine::{EngineSpec, Measured, Row, Size, State, Want};

/// Milliseconds on the clock of whoever owns the ledger.
pub type Millis = u64;

/// An engine that is used serves at least so long before it is asked to make room for another.
const MIN_DWELL: Millis = 1_000;
/// And at most so long.
const MAX_DWELL: Millis = 20_000;
/// Who asked a model once often asks it again at once: it is not evicted in between.
const GRACE: Millis = 40;
/// What made room shows in measures of so much later.
const RELIEF_SHOWS_AFTER: Millis = 900;
/// After pressure, loads have the shortest context that serves their request for so long.
const SMALL_AFTER_PRESSURE: Millis = 60_000;
/// Under pressure a load waits so long, and is then refused, so that another place may serve the request.
const WAITS_UNDER_PRESSURE: Millis = 5_000;
/// What the claims may be above the budget before room is made: the server's own size is never quite the same.
const JITTER: Bytes = Bytes::mib(4);
/// Decisions that are kept for people.
const DECISIONS: usize = 64;

/// An engine (one GGUF file with its settings), by its place in the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EngineId(pub usize);

/// Somebody who waits for an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// When idle models are unloaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Strategy {
    /// Never within the budget: a load that does not fit is refused, and the remote answers if there is one.
    #[default]
    HybridHttpGguf,
    /// The engine that is idle for longest goes, to make room.
    EvictLru,
}

impl Strategy {
    /// Its name in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::HybridHttpGguf => "hybrid_http_gguf",
            Self::EvictLru => "evict_lru",
        }
    }
}

/// Limits of the whole.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes that everything together may reach.
    pub budget: Bytes,
    /// LLMs that may be resident at the same time.
    pub max_concurrent_llms: usize,
    /// When idle models are unloaded.
    pub strategy: Strategy,
}

/// What was measured at one moment, all of it together: figures of different moments would count pages twice.
#[derive(Clone, Debug, Default)]
pub struct Observation {
    /// What the server process holds, and dry runs that it has made.
    pub server: Bytes,
    /// What machine and control groups can still give.
    pub available: Bytes,
    /// The budget, which a control group may have changed.
    pub budget: Bytes,
    /// Every worker that lives, the loading ones too.
    pub workers: Vec<(EngineId, Measured)>,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum PoolEvent {
    /// A request wants the engine.
    Wanted(EngineId, Ticket, Want),
    /// Whoever held the ticket does not wait any more.
    Abandoned(Ticket),
    /// Somebody asked for it to be unloaded: at once if it is idle, else when it is; a new request revokes it.
    UnloadAsked(EngineId),
    /// The worker reported its model loaded.
    Loaded(EngineId),
    /// Its context has the size that was asked for, or could not get it and has the old one.
    Resized(EngineId, Result<(), String>),
    /// A lease of it was given back.
    Released(EngineId),
    /// Its worker has ended, for whatever reason, and its memory is back.
    Exited {
        /// The engine.
        engine: EngineId,
        /// What its next plans are to be higher by, because the kernel killed it for want of memory.
        raise: Bytes,
        /// What machine and control groups can give now, if that was looked at.
        available: Option<Bytes>,
    },
    /// An engine may take so much beyond its plan from now on, or, without one, the server; nothing means that it was given back.
    Lent(Option<EngineId>, Bytes),
    /// Everything was measured.
    Observed(Observation),
    /// The kernel reports that memory is short, or no more.
    Pressure(bool),
    /// Time has passed.
    Tick,
}

/// What to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Start a worker and load with this context.
    Load(EngineId, u32),
    /// Have the worker make a context of so many tokens.
    Resize(EngineId, u32),
    /// Have the worker give pages back.
    Trim(EngineId),
    /// Stop the worker, which is idle.
    Stop(EngineId),
    /// Stop the worker although it is busy: its requests are told why.
    Kill(EngineId, String),
    /// Hand out a lease; the engine counts as busy from now on.
    Grant(EngineId, Ticket),
    /// Answer that it does not fit.
    Refuse(Ticket, Box<Refusal>),
    /// Answer that the load failed or the worker died before it was loaded.
    Fail(EngineId, Ticket, Option<String>),
}

/// Every kind of decision.
pub const DECISIONS_MADE: [&str; 10] =
    ["load", "grow", "shrink", "evict", "unload", "trim", "trimmed", "kill", "queue", "refuse"];

/// One thing that was decided, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// On the ledger's clock.
    pub at: Millis,
    /// About which engine.
    pub engine: EngineId,
    /// One of [`DECISIONS_MADE`].
    pub what: &'static str,
    /// Why.
    pub why: String,
}

/// All claims against the budget.
#[derive(Clone, Debug)]
pub struct Ledger {
    limits: Limits,
    engines: Vec<Engine>,
    /// Engines with somebody who waits for a load or for growth, longest first.
    demands: VecDeque<EngineId>,
    /// The demand that room is being made for.
    waits_for_room: Option<EngineId>,
    server: Bytes,
    /// What the server may take beyond that for a moment.
    server_loan: Bytes,
    available: Option<Bytes>,
    pressure: bool,
    /// Short of memory not long ago: loads are as small as they can be.
    pressed_until: Millis,
    /// When room was last made for want of memory, until the effect of it was measured.
    relieved_at: Option<Millis>,
    now: Millis,
    decisions: VecDeque<Decision>,
    counts: [u64; DECISIONS_MADE.len()],
}

impl Ledger {
    /// An empty ledger; the place of a spec is its [`EngineId`].
    #[must_use]
    pub fn new(limits: Limits, specs: Vec<EngineSpec>) -> Self {
        Self {
            limits,
            engines: specs.into_iter().map(Engine::new).collect(),
            demands: VecDeque::new(),
            waits_for_room: None,
            server: Bytes::ZERO,
            server_loan: Bytes::ZERO,
            available: None,
            pressure: false,
            pressed_until: 0,
            relieved_at: None,
            now: 0,
            decisions: VecDeque::new(),
            counts: [0; DECISIONS_MADE.len()],
        }
    }

    /// Takes other limits and specs; engines keep their places, and new ones come after them.
    pub fn reconfigure(&mut self, limits: Limits, specs: Vec<EngineSpec>) {
        self.limits = limits;
        for (index, spec) in specs.into_iter().enumerate() {
            match self.engines.get_mut(index) {
                Some(engine) => engine.respecify(spec),
                None => self.engines.push(Engine::new(spec)),
            }
        }
    }

    /// The sum of all claims, the server's included.
    #[must_use]
    pub fn claimed(&self) -> Bytes {
        self.engines.iter().map(Engine::claim).sum::<Bytes>() + self.server + self.server_loan
    }

    /// What no claim holds.
    #[must_use]
    pub fn free(&self) -> Bytes {
        self.limits.budget.less(self.claimed())
    }

    /// What the server itself holds.
    #[must_use]
    pub const fn server(&self) -> Bytes {
        self.server
    }

    /// The limits.
    #[must_use]
    pub const fn limits(&self) -> Limits {
        self.limits
    }

    /// Whether the kernel says that memory is short.
    #[must_use]
    pub const fn is_pressed(&self) -> bool {
        self.pressure
    }

    /// Whether time alone can lead to something soon.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        !self.demands.is_empty()
    }

    /// Engines that answer something now.
    #[must_use]
    pub fn computing(&self) -> usize {
        self.engines.iter().filter(|engine| engine.busy > 0).count()
    }

    /// Whether an engine answers something now.
    #[must_use]
    pub fn is_computing(&self, engine: EngineId) -> bool {
        self.engines.get(engine.0).is_some_and(|engine| engine.busy > 0)
    }

    /// Whether anything is being loaded.
    #[must_use]
    pub fn is_loading(&self) -> bool {
        self.engines.iter().any(|engine| engine.state == State::Loading)
    }

    /// When the next keep_alive is over.
    #[must_use]
    pub fn next_expiry(&self) -> Option<Millis> {
        self.engines.iter().filter_map(Engine::expires_at).min()
    }

    /// What machine and control groups could give when they were last looked at.
    #[must_use]
    pub const fn available(&self) -> Option<Bytes> {
        self.available
    }

    /// The last decisions, newest first.
    pub fn decisions(&self) -> impl Iterator<Item = &Decision> {
        self.decisions.iter().rev()
    }

    /// How often each of [`DECISIONS_MADE`] was made.
    #[must_use]
    pub const fn counts(&self) -> [u64; DECISIONS_MADE.len()] {
        self.counts
    }

    /// What an engine is loaded with, or is being loaded with or resized to.
    #[must_use]
    pub fn size(&self, id: EngineId) -> Size {
        self.engines.get(id.0).map(|engine| engine.size.clone()).unwrap_or_default()
    }

    /// Every engine, in order.
    #[must_use]
    pub fn rows(&self) -> Vec<Row> {
        let row = |(index, engine): (usize, &Engine)| Row {
            engine: EngineId(index),
            state: engine.state,
            waiting: engine.waiting.len(),
            parts: if engine.holds_a_place() { engine.size.plan.parts.clone() } else { Vec::new() },
            planned: if engine.holds_a_place() { engine.size.plan.total() } else { Bytes::ZERO },
            measured: engine.measured,
            claimed: engine.claim(),
            busy: engine.busy,
            context_tokens: if engine.holds_a_place() { engine.size.context_tokens } else { 0 },
            expires_at: engine.expires_at(),
        };
        self.engines.iter().enumerate().map(row).collect()
    }

    /// What an event leads to. Events about unknown engines lead to nothing; time never goes back.
    pub fn decide(&mut self, event: PoolEvent, now: Millis) -> Vec<Effect> {
        self.now = self.now.max(now);
        let mut effects = Vec::new();
        self.take(event, &mut effects);
        self.settle(&mut effects);
        effects
    }

    /// Books what an event says.
    fn take(&mut self, event: PoolEvent, effects: &mut Vec<Effect>) {
        match event {
            PoolEvent::Wanted(id, ticket, want) => self.wanted(id, ticket, want),
            PoolEvent::Abandoned(ticket) => {
                for engine in &mut self.engines {
                    engine.waiting.retain(|waiter| waiter.ticket != ticket);
                }
            }
            PoolEvent::UnloadAsked(id) => {
                if let Some(engine) = self.engines.get_mut(id.0).filter(|engine| engine.holds_a_place()) {
                    engine.unload_asked = true;
                }
            }
            PoolEvent::Loaded(id) => {
                let now = self.now;
                if let Some(engine) = self.engine_in(id, State::Loading) {
                    engine.state = State::Resident;
                    engine.spec.reload = now.saturating_sub(engine.loaded_at).max(1);
                    engine.loaded_at = now;
                }
            }
            PoolEvent::Resized(id, outcome) => self.resized(id, outcome, effects),
            PoolEvent::Released(id) => {
                let now = self.now;
                if let Some(engine) = self.engines.get_mut(id.0) {
                    engine.busy = engine.busy.saturating_sub(1);
                    engine.last_used = now;
                }
            }
            PoolEvent::Exited { engine, raise, available } => {
                self.available = available.or(self.available);
                self.exited(engine, raise, effects);
            }
            PoolEvent::Lent(None, bytes) => self.server_loan = bytes,
            PoolEvent::Lent(Some(id), bytes) => {
                if let Some(engine) = self.engines.get_mut(id.0) {
                    engine.loan = bytes;
                }
            }
            PoolEvent::Observed(observation) => self.book(observation),
            PoolEvent::Pressure(pressure) => {
                self.pressure = pressure;
                self.pressed_until = if pressure { self.now + SMALL_AFTER_PRESSURE } else { self.pressed_until };
            }
            PoolEvent::Tick => {}
        }
    }

    fn engine_in(&mut self, id: EngineId, state: State) -> Option<&mut Engine> {
        self.engines.get_mut(id.0).filter(|engine| engine.state == state)
    }

    fn wanted(&mut self, id: EngineId, ticket: Ticket, want: Want) {
        let now = self.now;
        let Some(engine) = self.engines.get_mut(id.0) else { return };
        engine.last_used = now;
        engine.unload_asked = false;
        engine.trimmed = false;
        engine.keep_alive = want.keep_alive.unwrap_or(engine.spec.keep_alive);
        engine.usual = want.usual;
        engine.waiting.push(Waiter { ticket, needed: want.needed, since: now });
    }

    fn book(&mut self, observation: Observation) {
        self.server = observation.server;
        self.available = Some(observation.available);
        self.limits.budget = observation.budget;
        // Only what was measured after a step shows its effect.
        self.relieved_at = self.relieved_at.filter(|&at| self.now < at + RELIEF_SHOWS_AFTER);
        for (id, measured) in observation.workers {
            let Some(engine) = self.engines.get_mut(id.0).filter(|engine| engine.holds_a_place()) else { continue };
            engine.measured = measured;
            if let Some(before) = engine.trimmed_from.take_if(|_| self.relieved_at.is_none()) {
                let back = before.total().less(measured.total());
                self.note(id, "trimmed", format!("{back} came back, it holds {}", measured.total()));
            }
        }
    }

    fn resized(&mut self, id: EngineId, outcome: Result<(), String>, effects: &mut Vec<Effect>) {
        let Some(engine) = self.engine_in(id, State::Resizing) else { return };
        engine.state = State::Resident;
        let previous = engine.previous.take();
        if let (Ok(()), Some(previous)) = (&outcome, &previous) {
            // What a shrink gave back is not measured yet.
            let given = engine::own(&previous.plan).less(engine::own(&engine.size.plan));
            engine.measured.anonymous = engine.measured.anonymous.less(given);
        }
        if let (Err(reason), Some(previous)) = (outcome, previous) {
            engine.size = previous;
            let size = engine.size.context_tokens;
            let (too_long, rest): (Vec<_>, Vec<_>) =
                std::mem::take(&mut engine.waiting).into_iter().partition(|w| w.needed.context_tokens > size);
            engine.waiting = rest;
            effects.extend(too_long.into_iter().map(|w| Effect::Fail(id, w.ticket, Some(reason.clone()))));
        }
    }

    fn exited(&mut self, id: EngineId, raise: Bytes, effects: &mut Vec<Effect>) {
        let Some(engine) = self.engines.get_mut(id.0) else { return };
        engine.unload_asked = false;
        engine.trimmed_from = None;
        // Whoever still waits was planned for before: the same load is not tried again as it was.
        let waiting = engine.waiting.iter_mut().map(|waiter| &mut waiter.needed);
        for size in waiting.chain([&mut engine.usual]) {
            size.plan.raise(raise);
        }
        let was = std::mem::replace(&mut engine.state, State::Absent);
        // Leases on the dead worker are still out; each is given back once, by its guard. What was lent to it is gone with it.
        engine.loan = Bytes::ZERO;
        engine.measured = Measured::default();
        engine.previous = None;
        if was == State::Loading {
            let waiting = std::mem::take(&mut engine.waiting);
            effects.extend(waiting.into_iter().map(|waiter| Effect::Fail(id, waiter.ticket, None)));
        }
    }

    fn note(&mut self, engine: EngineId, what: &'static str, why: impl Into<String>) {
        let why = why.into();
        debug_assert!(DECISIONS_MADE.contains(&what), "{what}");
        // What is tried again and again is one decision.
        if self.decisions.iter().rev().find(|d| d.engine == engine).is_some_and(|d| d.what == what && d.why == why) {
            return;
        }
        if let Some(index) = DECISIONS_MADE.iter().position(|made| *made == what) {
            self.counts[index] += 1;
        }
        if self.decisions.len() == DECISIONS {
            self.decisions.pop_front();
        }
        self.decisions.push_back(Decision { at: self.now, engine, what, why });
    }

    /// Does everything that can be done now.
    fn settle(&mut self, effects: &mut Vec<Effect>) {
        self.grant(effects);
        self.unload_the_unwanted(effects);
        self.relieve(effects);
        self.queue_demands();
        self.waits_for_room = None;
        for engine in &mut self.engines {
            engine.must_drain = false;
        }
        for id in self.demands.clone() {
            match self.serve(id, effects) {
                Served::Done => self.demands.retain(|other| *other != id),
                Served::WaitsForItself => {}
                // In the order of arrival: nobody else takes the room that is being made.
                Served::WaitsForRoom => {
                    self.waits_for_room = Some(id);
                    break;
                }
            }
        }
        self.grant(effects);
    }

    /// Engines that somebody waits for stand in the queue, once each; the others do not.
    fn queue_demands(&mut self) {
        let demands = |engine: &Engine| match engine.state {
            State::Absent => !engine.waiting.is_empty(),
            State::Resident => engine.must_grow(),
            State::Loading | State::Resizing | State::Stopping => false,
        };
        self.demands.retain(|id| demands(&self.engines[id.0]));
        for index in 0..self.engines.len() {
            if demands(&self.engines[index]) && !self.demands.contains(&EngineId(index)) {
                self.demands.push_back(EngineId(index));
            }
        }
    }

    /// Hands out leases of what is resident, unless it is asked to make room.
    fn grant(&mut self, effects: &mut Vec<Effect>) {
        for index in 0..self.engines.len() {
            let id = EngineId(index);
            if self.engines[index].state != State::Resident || self.is_held(id) {
                continue;
            }
            let engine = &mut self.engines[index];
            let size = engine.size.context_tokens;
            let (now, later): (Vec<_>, Vec<_>) =
                std::mem::take(&mut engine.waiting).into_iter().partition(|w| w.needed.context_tokens <= size);
            engine.waiting = later;
            engine.busy += now.len();
            effects.extend(now.into_iter().map(|waiter| Effect::Grant(id, waiter.ticket)));
        }
    }

    /// Stops what was asked to go, and what nobody used for as long as it was to stay.
    fn unload_the_unwanted(&mut self, effects: &mut Vec<Effect>) {
        for index in 0..self.engines.len() {
            let engine = &self.engines[index];
            // Whoever waits for more than it holds is served by its next worker.
            let why = if engine.unload_asked && engine.state == State::Resident && engine.busy == 0 {
                "it was asked to unload"
            } else if engine.expires_at().is_some_and(|at| at <= self.now) {
                "its keep_alive is over"
            } else {
                continue;
            };
            self.note(EngineId(index), "unload", why);
            self.stop(EngineId(index), effects);
        }
    }

    fn stop(&mut self, id: EngineId, effects: &mut Vec<Effect>) {
        let engine = &mut self.engines[id.0];
        engine.state = State::Stopping;
        engine.unload_asked = false;
        effects.push(Effect::Stop(id));
    }

    fn refusal(&self, id: EngineId, size: &Size) -> Refusal {
        let lack = self.lack(id, size, &[]);
        // Where places are missing, only those who hold one matter.
        let matters = |engine: &Engine| lack != Some(room::Lack::Place) || engine.spec.is_llm;
        let holds = |(index, engine): &(usize, &Engine)| engine.holds_a_place() && matters(engine) && *index != id.0;
        let holders = self.engines.iter().enumerate().filter(holds);
        let held = holders.map(|(_, engine)| Held {
            model: engine.spec.label.clone(),
            bytes: engine.claim(),
            busy: engine.busy,
            evictable: engine.spec.evictable,
        });
        Refusal {
            model: self.engines[id.0].spec.label.clone(),
            context_tokens: size.context_tokens,
            needs: size.plan.parts.clone(),
            budget: self.limits.budget,
            server: self.server,
            free: self.free() + self.engines[id.0].claim(),
            held: held.collect(),
            strategy: self.limits.strategy.name().to_owned(),
            max_concurrent_llms: (lack == Some(room::Lack::Place)).then_some(self.limits.max_concurrent_llms),
            available: self.available.filter(|_| lack == Some(room::Lack::Machine)),
        }
    }
}

/// What became of a demand.
enum Served {
    /// It is off the queue.
    Done,
    /// Its own leases must come back first.
    WaitsForItself,
    /// Others must go first.
    WaitsForRoom,
}
