//! One engine in the ledger: its state, its size, its claim, and who waits for it.

use sarai_core::{Bytes, KeepAlive, Lane, Part};

use super::{EngineId, Millis, Ticket};
use crate::estimate::{DECLARED, Plan, WEIGHTS};

/// What the ledger knows of an engine beforehand.
#[derive(Clone, Debug)]
pub struct EngineSpec {
    /// Name for people: the models that share it.
    pub label: String,
    /// Whether it counts against `max_concurrent_llms`.
    pub is_llm: bool,
    /// Pinned and resident engines are never evicted, nor unloaded when their time is over.
    pub evictable: bool,
    /// Unless a request says otherwise.
    pub keep_alive: KeepAlive,
    /// What a load of it takes, as far as is known.
    pub reload: Millis,
}

/// A context and what the engine takes with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Tokens that one sequence can hold.
    pub context_tokens: u32,
    /// What a load takes.
    pub plan: Plan,
}

/// What a request needs of an engine.
#[derive(Clone, Debug, Default)]
pub struct Want {
    /// The least that serves it.
    pub needed: Size,
    /// What the configuration says; loaded if it fits, since the next request will need it.
    pub usual: Size,
    /// How long the engine stays after it.
    pub keep_alive: Option<KeepAlive>,
    /// Whether it may take its time once it has the engine.
    pub lane: Lane,
}

impl Want {
    /// The same for a request of this lane.
    #[must_use]
    pub fn in_lane(self, lane: Lane) -> Self {
        Self { lane, ..self }
    }
}

/// What a worker was measured at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// Memory that no file backs.
    pub anonymous: Bytes,
    /// Its share of file pages.
    pub file: Bytes,
}

impl Measured {
    /// Both.
    #[must_use]
    pub fn total(self) -> Bytes {
        self.anonymous + self.file
    }
}

/// Where an engine is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// No worker.
    #[default]
    Absent,
    /// Its worker loads.
    Loading,
    /// Its worker serves.
    Resident,
    /// Its worker makes a context of another size.
    Resizing,
    /// Its worker ends.
    Stopping,
}

impl State {
    /// For people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Loading => "loading",
            Self::Resident => "resident",
            Self::Resizing => "resizing",
            Self::Stopping => "stopping",
        }
    }
}

/// Somebody who waits.
#[derive(Clone, Debug)]
pub(super) struct Waiter {
    pub ticket: Ticket,
    pub needed: Size,
    pub since: Millis,
}

#[derive(Clone, Debug)]
pub(super) struct Engine {
    pub spec: EngineSpec,
    pub state: State,
    pub waiting: Vec<Waiter>,
    /// What it is loaded with, or is being loaded or resized to.
    pub size: Size,
    /// What it had before a resize.
    pub previous: Option<Size>,
    /// What the configuration says.
    pub usual: Size,
    pub measured: Measured,
    /// What it may take beyond its plan for as long as its answers follow forms.
    pub loan: Bytes,
    pub busy: usize,
    pub last_used: Millis,
    pub loaded_at: Millis,
    pub keep_alive: KeepAlive,
    /// Unload it when it is idle.
    pub unload_asked: bool,
    /// Its pages were given back since it was last used.
    pub trimmed: bool,
    /// What it held when they were, until it is measured again.
    pub trimmed_from: Option<Measured>,
    /// It gives no leases until its context has grown.
    pub must_drain: bool,
}

impl Engine {
    pub fn new(spec: EngineSpec) -> Self {
        Self {
            keep_alive: spec.keep_alive,
            spec,
            state: State::Absent,
            waiting: Vec::new(),
            size: Size::default(),
            previous: None,
            usual: Size::default(),
            measured: Measured::default(),
            loan: Bytes::ZERO,
            busy: 0,
            last_used: 0,
            loaded_at: 0,
            unload_asked: false,
            trimmed: false,
            trimmed_from: None,
            must_drain: false,
        }
    }

    /// Another configuration says how it is to be kept; how long it takes to load stays known.
    pub fn respecify(&mut self, spec: EngineSpec) {
        if spec.keep_alive != self.spec.keep_alive {
            self.keep_alive = spec.keep_alive;
        }
        self.spec = EngineSpec { reload: self.spec.reload, ..spec };
    }

    pub fn holds_a_place(&self) -> bool {
        self.state != State::Absent
    }

    /// What is booked for it: of memory that only it has and of file pages, the larger of plan and measure each. What
    /// is planned and not touched yet is thus counted, and so is what was touched beyond the plan.
    pub fn claim(&self) -> Bytes {
        if !self.holds_a_place() {
            return Bytes::ZERO;
        }
        let previous = self.previous.as_ref().map_or(Bytes::ZERO, |size| self.claim_of(size));
        self.claim_of(&self.size).max(previous)
    }

    /// What would be booked with this size.
    pub fn claim_of(&self, size: &Size) -> Bytes {
        let (anonymous, file) = self.split(&size.plan);
        // What was measured belongs to the size it was measured at.
        let smaller = size.context_tokens < self.size.context_tokens;
        let measured = if smaller || !self.holds_a_place() { Measured::default() } else { self.measured };
        (anonymous + self.lent()).max(measured.anonymous) + file.max(measured.file)
    }

    /// What it may take beyond its plan now: only what serves answers.
    fn lent(&self) -> Bytes {
        if self.state == State::Resident { self.loan } else { Bytes::ZERO }
    }

    /// Memory that only it has, beyond what was planned and lent.
    pub fn excess(&self) -> Bytes {
        self.measured.anonymous.less(self.split(&self.size.plan).0 + self.lent())
    }

    /// What it may still take of what the system counts as available: memory that it has not touched yet, and the
    /// file pages that it uses, since the system would give those away.
    pub fn still_takes(&self) -> Bytes {
        if !self.holds_a_place() {
            return Bytes::ZERO;
        }
        let (anonymous, file) = self.split(&self.size.plan);
        (anonymous + self.lent()).less(self.measured.anonymous) + file.max(self.measured.file)
    }

    /// Memory of its own that a shrink to the usual size gives back.
    pub fn shrink_gives(&self) -> Bytes {
        split(&self.size.plan.parts).0.less(split(&self.usual.plan.parts).0)
    }

    /// What a plan says: memory of its own, and file pages. What was declared in one sum is of the kind that it was
    /// measured to be.
    fn split(&self, plan: &Plan) -> (Bytes, Bytes) {
        let (anonymous, file) = split(&plan.parts);
        let pages = self.measured.file.less(file).min(plan.part(DECLARED));
        (anonymous.less(pages), file + pages)
    }

    pub fn is_idle(&self) -> bool {
        self.state == State::Resident && self.busy == 0 && self.waiting.is_empty()
    }

    /// Whether it may make room now. Once it was worth its load, that is when nothing runs on it; before, when nobody
    /// waits for it, and whoever used it last does not come back at once.
    pub fn may_be_evicted(&self, now: Millis) -> bool {
        let rests = self.waiting.is_empty() && self.last_used + super::GRACE <= now;
        self.spec.evictable && self.state == State::Resident && self.busy == 0 && (rests || self.dwells_until() <= now)
    }

    /// The least size that serves all who wait, the usual one at least if that is wished for.
    pub fn wanted_size(&self, at_least_usual: bool) -> Size {
        let needed = self.waiting.iter().map(|waiter| &waiter.needed).max_by_key(|size| size.context_tokens);
        let needed = needed.unwrap_or(&self.usual);
        if at_least_usual && self.usual.context_tokens > needed.context_tokens {
            self.usual.clone()
        } else {
            needed.clone()
        }
    }

    /// Whether somebody waits for more than it holds.
    pub fn must_grow(&self) -> bool {
        self.waiting.iter().any(|waiter| waiter.needed.context_tokens > self.size.context_tokens)
    }

    /// The order of eviction: idle time in units of what a reload takes.
    pub fn staleness(&self, now: Millis) -> u64 {
        (now.saturating_sub(self.last_used) + 1).saturating_mul(1000) / self.spec.reload.max(1)
    }

    /// When it may be asked to make room although it is used: not before it was worth its load.
    pub fn dwells_until(&self) -> Millis {
        self.loaded_at + (4 * self.spec.reload).clamp(super::MIN_DWELL, super::MAX_DWELL)
    }

    /// When its time is over, if it is idle and may go.
    pub fn expires_at(&self) -> Option<Millis> {
        match self.keep_alive {
            KeepAlive::For(time) if self.is_idle() && self.spec.evictable => Some(self.last_used.saturating_add(time)),
            _ => None,
        }
    }
}

/// Memory of its own.
pub(super) fn own(plan: &Plan) -> Bytes {
    split(&plan.parts).0
}

/// Memory of its own, and file pages.
pub(super) fn split(parts: &[Part]) -> (Bytes, Bytes) {
    let file = parts.iter().filter(|part| part.name == WEIGHTS || part.name == crate::estimate::BINARY_PAGES);
    let file: Bytes = file.map(|part| part.bytes).sum();
    let total: Bytes = parts.iter().map(|part| part.bytes).sum();
    (total.less(file), file)
}

/// One row of the ledger, for people.
#[derive(Clone, Debug)]
pub struct Row {
    /// The engine.
    pub engine: EngineId,
    /// Where it is in its life.
    pub state: State,
    /// Somebody waits for it.
    pub waiting: usize,
    /// What was planned for it, part by part.
    pub parts: Vec<Part>,
    /// Their sum.
    pub planned: Bytes,
    /// What it was last measured at.
    pub measured: Measured,
    /// What is booked for it.
    pub claimed: Bytes,
    /// Leases that are out.
    pub busy: usize,
    /// Tokens that one sequence holds.
    pub context_tokens: u32,
    /// When its time is over, if ever, on the ledger's clock.
    pub expires_at: Option<Millis>,
}
