//! The ledger and `decide`: who is resident, what is claimed, and what an event leads to.
//!
//! Pure: the same events give the same effects. One task of the server owns the ledger and performs the
//! effects. The sum of the claims stays within the budget whatever the order of events, unless a worker was
//! measured above its plan; then nothing more is admitted until there is room again.

use sarai_core::{Bytes, Held, Part, Refusal};

use crate::estimate::Plan;

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

/// Limits of the whole.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes that all claims together may reach.
    pub budget: Bytes,
    /// LLMs that may be resident at the same time.
    pub max_concurrent_llms: usize,
    /// When idle models are unloaded.
    pub strategy: Strategy,
}

/// What the ledger knows of an engine beforehand.
#[derive(Clone, Debug)]
pub struct EngineSpec {
    /// Name for people: the models that share it.
    pub label: String,
    /// Whether it counts against `max_concurrent_llms`.
    pub is_llm: bool,
    /// Pinned and resident engines are never evicted.
    pub evictable: bool,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum PoolEvent {
    /// A request wants the engine; `plan` is what a load would take.
    Wanted(EngineId, Ticket, Plan),
    /// Somebody asked for it to be unloaded: at once if it is idle, else when it is; a new request revokes it.
    UnloadAsked(EngineId),
    /// The worker reported its model loaded.
    Loaded(EngineId),
    /// A lease of it was given back.
    Released(EngineId),
    /// Its worker was measured.
    Measured(EngineId, Bytes),
    /// Its worker has ended, for whatever reason, and its memory is back.
    Exited(EngineId),
}

/// What to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Start a worker and load.
    Load(EngineId),
    /// Stop the worker.
    Stop(EngineId),
    /// Hand out a lease; the engine counts as busy from now on.
    Grant(EngineId, Ticket),
    /// Answer that it does not fit.
    Refuse(Ticket, Box<Refusal>),
    /// Answer that the load failed or the worker died before it was loaded.
    Fail(EngineId, Ticket),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Absent,
    /// Waits until the evicted have ended.
    WaitsForRoom,
    Loading,
    Resident,
    Stopping,
}

#[derive(Clone, Debug)]
struct Engine {
    spec: EngineSpec,
    state: State,
    waiting: Vec<Ticket>,
    planned: Vec<Part>,
    measured: Bytes,
    busy: usize,
    last_used: u64,
    /// Unload it when it is idle.
    unload_asked: bool,
}

impl Engine {
    fn planned_total(&self) -> Bytes {
        self.planned.iter().map(|part| part.bytes).sum()
    }

    fn claim(&self) -> Bytes {
        match self.state {
            State::Absent | State::WaitsForRoom => Bytes::ZERO,
            State::Loading | State::Resident | State::Stopping => self.planned_total().max(self.measured),
        }
    }

    fn holds_a_place(&self) -> bool {
        !matches!(self.state, State::Absent | State::WaitsForRoom)
    }

    fn unload_if_idle(&mut self, id: EngineId, effects: &mut Vec<Effect>) {
        if self.unload_asked && self.state == State::Resident && self.busy == 0 {
            self.unload_asked = false;
            self.state = State::Stopping;
            effects.push(Effect::Stop(id));
        }
    }

    fn may_be_evicted(&self) -> bool {
        self.state == State::Resident && self.spec.evictable && self.busy == 0 && self.waiting.is_empty()
    }
}

/// One row of the ledger, for people.
#[derive(Clone, Debug)]
pub struct Row {
    /// The engine.
    pub engine: EngineId,
    /// `absent`, `waiting`, `loading`, `resident` or `stopping`.
    pub state: &'static str,
    /// What was planned for it.
    pub planned: Bytes,
    /// What it was last measured at.
    pub measured: Bytes,
    /// What is booked for it.
    pub claimed: Bytes,
    /// Leases that are out.
    pub busy: usize,
}

/// All claims against the budget.
#[derive(Clone, Debug)]
pub struct Ledger {
    limits: Limits,
    engines: Vec<Engine>,
    uses: u64,
}

impl Ledger {
    /// An empty ledger; the place of a spec is its [`EngineId`].
    #[must_use]
    pub fn new(limits: Limits, specs: Vec<EngineSpec>) -> Self {
        let engine = |spec| Engine {
            spec,
            state: State::Absent,
            waiting: Vec::new(),
            planned: Vec::new(),
            measured: Bytes::ZERO,
            busy: 0,
            last_used: 0,
            unload_asked: false,
        };
        Self { limits, engines: specs.into_iter().map(engine).collect(), uses: 0 }
    }

    /// The sum of all claims.
    #[must_use]
    pub fn claimed(&self) -> Bytes {
        self.engines.iter().map(Engine::claim).sum()
    }

    /// The limits.
    #[must_use]
    pub const fn limits(&self) -> Limits {
        self.limits
    }

    /// Every engine, in order.
    #[must_use]
    pub fn rows(&self) -> Vec<Row> {
        let name = |state| match state {
            State::Absent => "absent",
            State::WaitsForRoom => "waiting",
            State::Loading => "loading",
            State::Resident => "resident",
            State::Stopping => "stopping",
        };
        let row = |(index, engine): (usize, &Engine)| Row {
            engine: EngineId(index),
            state: name(engine.state),
            planned: engine.planned_total(),
            measured: engine.measured,
            claimed: engine.claim(),
            busy: engine.busy,
        };
        self.engines.iter().enumerate().map(row).collect()
    }

    /// What an event leads to. Events about unknown engines lead to nothing.
    pub fn decide(&mut self, event: PoolEvent) -> Vec<Effect> {
        let mut effects = Vec::new();
        match event {
            PoolEvent::Wanted(id, ticket, plan) => self.wanted(id, ticket, plan, &mut effects),
            PoolEvent::UnloadAsked(id) => {
                if let Some(engine) = self.engines.get_mut(id.0) {
                    engine.unload_asked = true;
                    engine.unload_if_idle(id, &mut effects);
                }
            }
            PoolEvent::Loaded(id) => self.loaded(id, &mut effects),
            PoolEvent::Released(id) => {
                if let Some(engine) = self.engines.get_mut(id.0) {
                    engine.busy = engine.busy.saturating_sub(1);
                    engine.unload_if_idle(id, &mut effects);
                }
            }
            PoolEvent::Measured(id, bytes) => {
                if let Some(engine) = self.engines.get_mut(id.0).filter(|engine| engine.holds_a_place()) {
                    engine.measured = bytes;
                }
            }
            PoolEvent::Exited(id) => self.exited(id, &mut effects),
        }
        effects
    }

    fn wanted(&mut self, id: EngineId, ticket: Ticket, plan: Plan, effects: &mut Vec<Effect>) {
        self.uses += 1;
        let now = self.uses;
        let Some(engine) = self.engines.get_mut(id.0) else { return };
        engine.last_used = now;
        engine.unload_asked = false;
        match engine.state {
            State::Resident => {
                engine.busy += 1;
                effects.push(Effect::Grant(id, ticket));
            }
            State::Loading | State::Stopping | State::WaitsForRoom => engine.waiting.push(ticket),
            State::Absent => {
                engine.planned = plan.parts;
                engine.waiting.push(ticket);
                self.admit(id, effects);
            }
        }
    }

    /// Loads an absent engine that is waited for, evicts for it, or refuses it.
    fn admit(&mut self, id: EngineId, effects: &mut Vec<Effect>) {
        let victims = match self.limits.strategy {
            _ if self.lacks(id, &[]).is_none() => Some(Vec::new()),
            Strategy::HybridHttpGguf => None,
            Strategy::EvictLru => self.victims_for(id),
        };
        match victims {
            None => self.refuse(id, effects),
            Some(victims) if victims.is_empty() => {
                self.engines[id.0].state = State::Loading;
                self.engines[id.0].measured = Bytes::ZERO;
                effects.push(Effect::Load(id));
            }
            Some(victims) => {
                self.engines[id.0].state = State::WaitsForRoom;
                for victim in victims {
                    self.engines[victim.0].state = State::Stopping;
                    effects.push(Effect::Stop(victim));
                }
            }
        }
    }

    fn refuse(&mut self, id: EngineId, effects: &mut Vec<Effect>) {
        let refusal = self.refusal(id);
        let engine = &mut self.engines[id.0];
        engine.state = State::Absent;
        for ticket in std::mem::take(&mut engine.waiting) {
            effects.push(Effect::Refuse(ticket, Box::new(refusal.clone())));
        }
    }

    /// The idle engines to evict, longest idle first, or none if that would not be enough.
    fn victims_for(&self, id: EngineId) -> Option<Vec<EngineId>> {
        let mut idle: Vec<_> = (0..self.engines.len()).filter(|&i| self.engines[i].may_be_evicted()).collect();
        idle.sort_by_key(|&i| self.engines[i].last_used);
        let mut victims = Vec::new();
        for candidate in idle {
            victims.push(EngineId(candidate));
            if self.lacks(id, &victims).is_none() {
                return Some(victims);
            }
        }
        None
    }

    /// What the engine lacks if these went: bytes, or a place among the LLMs.
    fn lacks(&self, id: EngineId, without: &[EngineId]) -> Option<Lack> {
        let stays = |index: &usize| !without.contains(&EngineId(*index)) && *index != id.0;
        let others = || (0..self.engines.len()).filter(stays).map(|index| &self.engines[index]);
        let llms = others().filter(|engine| engine.spec.is_llm && engine.holds_a_place()).count();
        if self.engines[id.0].spec.is_llm && llms >= self.limits.max_concurrent_llms {
            return Some(Lack::Place);
        }
        let claimed: Bytes = others().map(Engine::claim).sum();
        let fits = claimed + self.engines[id.0].planned_total() <= self.limits.budget;
        (!fits).then_some(Lack::Memory)
    }

    fn refusal(&self, id: EngineId) -> Refusal {
        let lack = self.lacks(id, &[]);
        let holders = self.engines.iter().filter(|engine| engine.holds_a_place());
        let held =
            holders.map(|engine| Held { model: engine.spec.label.clone(), bytes: engine.claim(), busy: engine.busy });
        Refusal {
            model: self.engines[id.0].spec.label.clone(),
            needs: self.engines[id.0].planned.clone(),
            budget: self.limits.budget,
            free: self.limits.budget.less(self.claimed()),
            held: held.collect(),
            max_concurrent_llms: (lack == Some(Lack::Place)).then_some(self.limits.max_concurrent_llms),
        }
    }

    fn loaded(&mut self, id: EngineId, effects: &mut Vec<Effect>) {
        let Some(engine) = self.engines.get_mut(id.0).filter(|engine| engine.state == State::Loading) else { return };
        engine.state = State::Resident;
        for ticket in std::mem::take(&mut engine.waiting) {
            engine.busy += 1;
            effects.push(Effect::Grant(id, ticket));
        }
    }

    fn exited(&mut self, id: EngineId, effects: &mut Vec<Effect>) {
        let Some(engine) = self.engines.get_mut(id.0) else { return };
        let was = std::mem::replace(&mut engine.state, State::Absent);
        // Leases on the dead worker are still out; each is given back once, by its guard.
        engine.measured = Bytes::ZERO;
        if was == State::Loading {
            for ticket in std::mem::take(&mut engine.waiting) {
                effects.push(Effect::Fail(id, ticket));
            }
        }
        // Room has come back: first for those who waited for it, then for this engine if it is wanted again.
        let waiting = |engine: &Engine| match engine.state {
            State::WaitsForRoom => true,
            State::Absent => !engine.waiting.is_empty(),
            _ => false,
        };
        for index in 0..self.engines.len() {
            let stopping = self.engines.iter().any(|engine| engine.state == State::Stopping);
            if waiting(&self.engines[index]) && (self.lacks(EngineId(index), &[]).is_none() || !stopping) {
                self.engines[index].state = State::Absent;
                if self.engines[index].waiting.is_empty() {
                    continue;
                }
                self.admit(EngineId(index), effects);
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lack {
    Place,
    Memory,
}

#[cfg(test)]
mod tests {
    use super::{Strategy, *};
    use proptest::prelude::*;
    use proptest::strategy::Strategy as _;

    fn plan(mib: u64) -> Plan {
        Plan { parts: vec![Part { name: "weights".into(), bytes: Bytes::mib(mib) }] }
    }

    fn ledger(budget_mib: u64, max_concurrent_llms: usize, strategy: Strategy, engines: usize) -> Ledger {
        let spec = |i| EngineSpec { label: format!("m{i}"), is_llm: true, evictable: true };
        let limits = Limits { budget: Bytes::mib(budget_mib), max_concurrent_llms, strategy };
        Ledger::new(limits, (0..engines).map(spec).collect())
    }

    const A: EngineId = EngineId(0);
    const B: EngineId = EngineId(1);

    #[test]
    fn ten_requests_for_a_cold_engine_load_it_once_and_are_all_granted() {
        let mut ledger = ledger(100, 2, Strategy::HybridHttpGguf, 1);
        let loads: Vec<_> = (0..10).flat_map(|n| ledger.decide(PoolEvent::Wanted(A, Ticket(n), plan(50)))).collect();
        assert_eq!(loads, [Effect::Load(A)]);
        let granted = ledger.decide(PoolEvent::Loaded(A));
        assert_eq!(granted, (0..10).map(|n| Effect::Grant(A, Ticket(n))).collect::<Vec<_>>());
    }

    #[test]
    fn a_load_that_does_not_fit_is_refused_with_who_holds_what() {
        let mut ledger = ledger(100, 2, Strategy::HybridHttpGguf, 2);
        ledger.decide(PoolEvent::Wanted(A, Ticket(1), plan(70)));
        ledger.decide(PoolEvent::Loaded(A));
        let effects = ledger.decide(PoolEvent::Wanted(B, Ticket(2), plan(40)));
        let [Effect::Refuse(Ticket(2), refusal)] = effects.as_slice() else { unreachable!("{effects:?}") };
        assert_eq!((refusal.free, refusal.needed()), (Bytes::mib(30), Bytes::mib(40)));
        assert_eq!((refusal.held[0].model.as_str(), refusal.held[0].bytes), ("m0", Bytes::mib(70)));
    }

    #[test]
    fn the_number_of_resident_llms_is_limited_apart_from_their_bytes() {
        let mut ledger = ledger(1000, 1, Strategy::HybridHttpGguf, 2);
        ledger.decide(PoolEvent::Wanted(A, Ticket(1), plan(1)));
        let effects = ledger.decide(PoolEvent::Wanted(B, Ticket(2), plan(1)));
        assert!(matches!(&effects[..], [Effect::Refuse(_, refusal)] if refusal.max_concurrent_llms == Some(1)));
    }

    #[test]
    fn what_was_measured_above_the_plan_counts() {
        let mut ledger = ledger(100, 2, Strategy::HybridHttpGguf, 2);
        ledger.decide(PoolEvent::Wanted(A, Ticket(1), plan(40)));
        ledger.decide(PoolEvent::Loaded(A));
        ledger.decide(PoolEvent::Measured(A, Bytes::mib(80)));
        let effects = ledger.decide(PoolEvent::Wanted(B, Ticket(2), plan(40)));
        assert!(matches!(&effects[..], [Effect::Refuse(..)]));
    }

    #[test]
    fn evict_lru_stops_an_idle_engine_waits_for_its_end_and_then_loads() {
        let mut ledger = ledger(100, 2, Strategy::EvictLru, 2);
        ledger.decide(PoolEvent::Wanted(A, Ticket(1), plan(70)));
        ledger.decide(PoolEvent::Loaded(A));
        assert!(
            matches!(ledger.decide(PoolEvent::Wanted(B, Ticket(2), plan(70)))[..], [Effect::Refuse(..)]),
            "A is busy"
        );
        ledger.decide(PoolEvent::Released(A));
        assert_eq!(ledger.decide(PoolEvent::Wanted(B, Ticket(3), plan(70))), [Effect::Stop(A)]);
        assert_eq!(ledger.decide(PoolEvent::Exited(A)), [Effect::Load(B)]);
    }

    #[test]
    fn a_worker_that_dies_while_it_loads_fails_all_who_wait() {
        let mut ledger = ledger(100, 2, Strategy::HybridHttpGguf, 1);
        ledger.decide(PoolEvent::Wanted(A, Ticket(1), plan(70)));
        ledger.decide(PoolEvent::Wanted(A, Ticket(2), plan(70)));
        assert_eq!(ledger.decide(PoolEvent::Exited(A)), [Effect::Fail(A, Ticket(1)), Effect::Fail(A, Ticket(2))]);
        assert_eq!(ledger.claimed(), Bytes::ZERO);
    }

    #[test]
    fn a_busy_engine_is_unloaded_when_it_is_idle_unless_it_is_wanted_again() {
        let mut ledger = ledger(100, 2, Strategy::HybridHttpGguf, 1);
        ledger.decide(PoolEvent::Wanted(A, Ticket(1), plan(70)));
        ledger.decide(PoolEvent::Loaded(A));
        assert_eq!(ledger.decide(PoolEvent::UnloadAsked(A)), []);
        assert_eq!(ledger.decide(PoolEvent::Released(A)), [Effect::Stop(A)]);
        ledger.decide(PoolEvent::Exited(A));
        ledger.decide(PoolEvent::Wanted(A, Ticket(2), plan(70)));
        ledger.decide(PoolEvent::Loaded(A));
        ledger.decide(PoolEvent::UnloadAsked(A));
        ledger.decide(PoolEvent::Wanted(A, Ticket(3), plan(70)));
        ledger.decide(PoolEvent::Released(A));
        assert_eq!(ledger.decide(PoolEvent::Released(A)), []);
    }

    #[test]
    fn a_lease_on_a_dead_worker_does_not_free_the_engine_under_its_next_lease() {
        let mut ledger = ledger(100, 2, Strategy::EvictLru, 2);
        ledger.decide(PoolEvent::Wanted(A, Ticket(1), plan(70)));
        ledger.decide(PoolEvent::Loaded(A));
        ledger.decide(PoolEvent::Exited(A));
        ledger.decide(PoolEvent::Wanted(A, Ticket(2), plan(70)));
        ledger.decide(PoolEvent::Loaded(A));
        ledger.decide(PoolEvent::Released(A));
        let effects = ledger.decide(PoolEvent::Wanted(B, Ticket(3), plan(70)));
        assert!(matches!(effects[..], [Effect::Refuse(..)]), "the second lease is still out: {effects:?}");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Want(usize, u64),
        Progress(usize),
        Release(usize),
        Die(usize),
    }

    fn steps() -> impl proptest::strategy::Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0_usize..4, 1_u64..60).prop_map(|(engine, mib)| Step::Want(engine, mib)),
            (0_usize..4).prop_map(Step::Progress),
            (0_usize..4).prop_map(Step::Release),
            (0_usize..4).prop_map(Step::Die),
        ];
        proptest::collection::vec(step, 0..60)
    }

    proptest! {
        #[test]
        fn claims_stay_within_the_budget_and_every_ticket_is_answered_once(steps in steps(), evict: bool) {
            let strategy = if evict { Strategy::EvictLru } else { Strategy::HybridHttpGguf };
            let mut ledger = ledger(100, 2, strategy, 4);
            let (mut asked, mut answered, mut leases) = (0_u64, Vec::new(), [0_usize; 4]);
            let finish = [0, 1, 2, 3].map(Step::Progress);
            for step in steps.into_iter().chain(finish.clone()).chain(finish.clone()).chain(finish) {
                let state = |i: usize, ledger: &Ledger| ledger.rows()[i].state;
                let event = match step {
                    Step::Want(i, mib) => { asked += 1; PoolEvent::Wanted(EngineId(i), Ticket(asked), plan(mib)) }
                    Step::Progress(i) if state(i, &ledger) == "loading" => PoolEvent::Loaded(EngineId(i)),
                    Step::Progress(i) if state(i, &ledger) == "stopping" => PoolEvent::Exited(EngineId(i)),
                    Step::Release(i) if leases[i] > 0 => { leases[i] -= 1; PoolEvent::Released(EngineId(i)) }
                    Step::Die(i) if ["loading", "resident"].contains(&state(i, &ledger)) => {  PoolEvent::Exited(EngineId(i)) }
                    _ => continue,
                };
                for effect in ledger.decide(event) {
                    match effect {
                        Effect::Grant(id, ticket) => { leases[id.0] += 1; answered.push(ticket); }
                        Effect::Refuse(ticket, _) | Effect::Fail(_, ticket) => answered.push(ticket),
                        Effect::Stop(id) => prop_assert_eq!(leases[id.0], 0, "a busy engine was stopped"),
                        Effect::Load(_) => {}
                    }
                }
                prop_assert!(ledger.claimed() <= Bytes::mib(100));
                prop_assert!(ledger.rows().iter().filter(|row| !["absent", "waiting"].contains(&row.state)).count() <= 2);
            }
            let mut unique = answered.clone();
            unique.sort_by_key(|ticket| ticket.0);
            unique.dedup();
            prop_assert_eq!(unique.len(), answered.len(), "a ticket was answered twice");
            prop_assert_eq!(answered.len() as u64, asked, "a ticket was never answered");
        }
    }
}
