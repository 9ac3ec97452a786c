//! Races as unit tests, and properties over random histories.

use proptest::prelude::*;
use proptest::strategy::Strategy as _;
use sarai_core::{KeepAlive, Lane, Part};

use super::{Strategy, *};
use crate::Plan;

const A: EngineId = EngineId(0);
const B: EngineId = EngineId(1);
const C: EngineId = EngineId(2);

fn size(context_tokens: u32, mib: u64) -> Size {
    let parts = vec![Part { name: "kv".into(), bytes: Bytes::mib(mib) }];
    Size { context_tokens, plan: Plan { parts, notes: Vec::new() } }
}

/// A want of the usual context.
fn want(mib: u64) -> Want {
    Want { needed: size(1024, mib), usual: size(1024, mib), keep_alive: None, lane: Lane::Interactive }
}

/// A want of a longer context than usual: a MiB more per 1024 tokens.
fn longer(tokens: u32, mib: u64) -> Want {
    Want { needed: size(tokens, mib + u64::from(tokens / 1024) - 1), ..want(mib) }
}

fn spec(index: usize) -> EngineSpec {
    let label = format!("m{index}");
    EngineSpec { label, is_llm: true, evictable: true, keep_alive: KeepAlive::Forever, reload: 1000 }
}

fn ledger(budget_mib: u64, max_concurrent_llms: usize, strategy: Strategy, engines: usize) -> Ledger {
    let limits = Limits { budget: Bytes::mib(budget_mib), max_concurrent_llms, strategy };
    Ledger::new(limits, (0..engines).map(spec).collect())
}

fn exited(engine: EngineId) -> PoolEvent {
    PoolEvent::Exited { engine, raise: Bytes::ZERO, available: None }
}

fn own(mib: u64) -> Measured {
    Measured { anonymous: Bytes::mib(mib), file: Bytes::ZERO }
}

impl Ledger {
    /// Everything measured: MiB of the server, MiB left of the machine, and MiB of workers.
    fn observed(&self, server: u64, available: u64, workers: &[(EngineId, u64)]) -> PoolEvent {
        PoolEvent::Observed(Observation {
            server: Bytes::mib(server),
            available: Bytes::mib(available),
            budget: self.limits.budget,
            workers: workers.iter().map(|(id, mib)| (*id, own(*mib))).collect(),
        })
    }

    fn at_once(&mut self, event: PoolEvent) -> Vec<Effect> {
        let now = self.now;
        self.decide(event, now)
    }

    fn loaded(&mut self, id: EngineId, ticket: u64, mib: u64) {
        self.at_once(PoolEvent::Wanted(id, Ticket(ticket), want(mib)));
        self.at_once(PoolEvent::Loaded(id));
    }
}

#[test]
fn ten_requests_for_a_cold_engine_load_it_once_and_are_all_granted() {
    let mut ledger = ledger(100, 2, Strategy::HybridHttpGguf, 1);
    let loads: Vec<_> = (0..10).flat_map(|n| ledger.at_once(PoolEvent::Wanted(A, Ticket(n), want(50)))).collect();
    assert_eq!(loads, [Effect::Load(A, 1024)]);
    let granted = ledger.at_once(PoolEvent::Loaded(A));
    assert_eq!(granted, (0..10).map(|n| Effect::Grant(A, Ticket(n))).collect::<Vec<_>>());
}

#[test]
fn a_load_that_does_not_fit_is_refused_with_who_holds_what_and_what_would_help() {
    let mut ledger = ledger(100, 2, Strategy::HybridHttpGguf, 2);
    ledger.loaded(A, 1, 70);
    let effects = ledger.at_once(PoolEvent::Wanted(B, Ticket(2), want(40)));
    let [Effect::Refuse(Ticket(2), refusal)] = effects.as_slice() else { unreachable!("{effects:?}") };
    assert_eq!((refusal.free, refusal.needed()), (Bytes::mib(30), Bytes::mib(40)));
    assert_eq!((refusal.held[0].model.as_str(), refusal.held[0].bytes), ("m0", Bytes::mib(70)));
    assert!(refusal.to_string().contains("unload `m0`, or set memory.strategy to evict_lru, or raise max_ram_gb"));
}

/// What is lent for a moment is booked, and nobody is refused for it: it comes back.
#[test]
fn a_load_that_lacks_only_what_is_lent_waits_for_it() {
    for to in [Some(A), None] {
        let mut ledger = ledger(100, 2, Strategy::HybridHttpGguf, 2);
        ledger.loaded(A, 1, 50);
        ledger.at_once(PoolEvent::Lent(to, Bytes::mib(20)));
        assert_eq!(ledger.claimed(), Bytes::mib(70));
        assert_eq!(ledger.at_once(PoolEvent::Wanted(B, Ticket(2), want(40))), []);
        assert_eq!(ledger.at_once(PoolEvent::Lent(to, Bytes::ZERO)), [Effect::Load(B, 1024)]);
        let effects = ledger.at_once(PoolEvent::Wanted(C, Ticket(3), want(60)));
        assert_eq!(effects, [], "there is no third engine");
    }
    // What is taken of it is not beyond the plan.
    let mut ledger = ledger(100, 2, Strategy::HybridHttpGguf, 1);
    ledger.loaded(A, 1, 80);
    ledger.at_once(PoolEvent::Lent(Some(A), Bytes::mib(20)));
    let o = ledger.observed(0, 1000, &[(A, 99)]);
    assert_eq!(ledger.at_once(o), []);
    assert_eq!(ledger.claimed(), Bytes::mib(100));
}

#[test]
fn the_number_of_resident_llms_is_limited_apart_from_their_bytes() {
    let mut ledger = ledger(1000, 1, Strategy::HybridHttpGguf, 2);
    ledger.at_once(PoolEvent::Wanted(A, Ticket(1), want(1)));
    let effects = ledger.at_once(PoolEvent::Wanted(B, Ticket(2), want(1)));
    assert!(matches!(&effects[..], [Effect::Refuse(_, refusal)] if refusal.max_concurrent_llms == Some(1)));
}

#[test]
fn what_was_measured_above_the_plan_counts_and_what_the_server_holds_too() {
    let mut ledger = ledger(100, 2, Strategy::HybridHttpGguf, 2);
    ledger.loaded(A, 1, 40);
    let o = ledger.observed(0, 1000, &[(A, 80)]);
    ledger.at_once(o);
    let refused = |effects: &[Effect]| matches!(effects, [Effect::Refuse(..)]);
    assert!(refused(&ledger.at_once(PoolEvent::Wanted(B, Ticket(2), want(30)))));
    let o = ledger.observed(15, 1000, &[(A, 80)]);
    ledger.at_once(o);
    assert!(refused(&ledger.at_once(PoolEvent::Wanted(B, Ticket(3), want(10)))));
}

#[test]
fn what_others_hold_of_the_machine_is_a_veto() {
    let mut ledger = ledger(1000, 2, Strategy::HybridHttpGguf, 1);
    let o = ledger.observed(0, 30, &[]);
    ledger.at_once(o);
    let effects = ledger.at_once(PoolEvent::Wanted(A, Ticket(1), want(40)));
    assert!(matches!(&effects[..], [Effect::Refuse(_, refusal)] if refusal.available == Some(Bytes::mib(30))));
}

#[test]
fn evict_lru_stops_an_idle_engine_waits_for_its_end_and_then_loads() {
    let mut ledger = ledger(100, 2, Strategy::EvictLru, 2);
    ledger.loaded(A, 1, 70);
    assert_eq!(ledger.at_once(PoolEvent::Wanted(B, Ticket(2), want(70))), [], "A is busy: it may fit soon");
    assert_eq!(ledger.at_once(PoolEvent::Released(A)), [], "who used it may come back at once");
    assert_eq!(ledger.decide(PoolEvent::Tick, 40), [Effect::Stop(A)]);
    assert_eq!(ledger.at_once(exited(A)), [Effect::Load(B, 1024)]);
}

#[test]
fn whoever_comes_back_at_once_is_served_before_a_model_is_swapped_for_another() {
    let mut ledger = ledger(100, 2, Strategy::EvictLru, 2);
    ledger.loaded(A, 1, 70);
    ledger.at_once(PoolEvent::Wanted(B, Ticket(2), want(70)));
    ledger.at_once(PoolEvent::Released(A));
    assert_eq!(ledger.decide(PoolEvent::Wanted(A, Ticket(3), want(70)), 20), [Effect::Grant(A, Ticket(3))]);
}

#[test]
fn whoever_stops_waiting_evicts_nobody() {
    let mut ledger = ledger(100, 2, Strategy::EvictLru, 2);
    ledger.loaded(A, 1, 70);
    ledger.at_once(PoolEvent::Wanted(B, Ticket(2), want(70)));
    ledger.at_once(PoolEvent::Abandoned(Ticket(2)));
    assert_eq!(ledger.at_once(PoolEvent::Released(A)), []);
}

#[test]
fn an_engine_that_is_used_all_the_time_makes_room_once_it_was_worth_its_load() {
    let mut ledger = ledger(100, 2, Strategy::EvictLru, 2);
    ledger.decide(PoolEvent::Wanted(A, Ticket(1), want(70)), 0);
    ledger.decide(PoolEvent::Loaded(A), 1_000);
    ledger.at_once(PoolEvent::Wanted(B, Ticket(2), want(70)));
    assert_eq!(ledger.decide(PoolEvent::Wanted(A, Ticket(3), want(70)), 4_999), [Effect::Grant(A, Ticket(3))]);
    ledger.decide(PoolEvent::Released(A), 5_000);
    assert_eq!(ledger.decide(PoolEvent::Wanted(A, Ticket(4), want(70)), 5_001), [], "it drains now");
    assert_eq!(ledger.decide(PoolEvent::Released(A), 5_100), [Effect::Stop(A)]);
    assert_eq!(ledger.decide(exited(A), 5_200), [Effect::Load(B, 1024)]);
    assert_eq!(ledger.decide(PoolEvent::Loaded(B), 6_200), [Effect::Grant(B, Ticket(2))]);
    ledger.decide(PoolEvent::Released(B), 6_300);
    assert_eq!(ledger.decide(PoolEvent::Tick, 6_340), [Effect::Stop(B)], "and A is waited for again");
}

#[test]
fn of_two_idle_engines_the_one_goes_that_is_idle_for_longer_per_second_of_reload() {
    let mut ledger = ledger(100, 3, Strategy::EvictLru, 3);
    for (id, ticket, at, loads) in [(A, 1, 0, 60_000), (B, 2, 70_000, 1_000)] {
        ledger.decide(PoolEvent::Wanted(id, Ticket(ticket), want(40)), at);
        ledger.decide(PoolEvent::Loaded(id), at + loads);
        ledger.decide(PoolEvent::Released(id), at + loads);
    }
    assert_eq!(ledger.decide(PoolEvent::Wanted(C, Ticket(3), want(40)), 80_000), [Effect::Stop(B)]);
}

#[test]
fn pinned_engines_stay() {
    let limits = Limits { budget: Bytes::mib(100), max_concurrent_llms: 2, strategy: Strategy::EvictLru };
    let pinned = EngineSpec { evictable: false, keep_alive: KeepAlive::For(0), ..spec(0) };
    let mut ledger = Ledger::new(limits, vec![pinned, spec(1)]);
    ledger.loaded(A, 1, 70);
    assert_eq!(ledger.decide(PoolEvent::Released(A), 10), []);
    let effects = ledger.at_once(PoolEvent::Wanted(B, Ticket(2), want(70)));
    assert!(matches!(effects[..], [Effect::Refuse(..)]), "{effects:?}");
}

#[test]
fn keep_alive_is_a_time_after_the_last_use_and_a_request_may_set_it() {
    let mut ledger = ledger(100, 2, Strategy::HybridHttpGguf, 1);
    let keep = |time| Want { keep_alive: Some(KeepAlive::For(time)), ..want(10) };
    ledger.decide(PoolEvent::Wanted(A, Ticket(1), keep(500)), 0);
    ledger.decide(PoolEvent::Loaded(A), 100);
    assert_eq!(ledger.decide(PoolEvent::Tick, 5_000), [], "it is busy");
    ledger.decide(PoolEvent::Released(A), 6_000);
    assert_eq!(ledger.decide(PoolEvent::Tick, 6_499), []);
    assert_eq!(ledger.decide(PoolEvent::Tick, 6_500), [Effect::Stop(A)]);
    ledger.decide(exited(A), 6_600);
    ledger.decide(PoolEvent::Wanted(A, Ticket(2), keep(0)), 7_000);
    ledger.decide(PoolEvent::Loaded(A), 7_100);
    assert_eq!(ledger.decide(PoolEvent::Released(A), 7_200), [Effect::Stop(A)]);
}

#[test]
fn a_smaller_context_never_reloads_and_a_longer_one_waits_for_running_answers_and_grows() {
    let mut ledger = ledger(100, 2, Strategy::HybridHttpGguf, 1);
    ledger.loaded(A, 1, 50);
    let smaller = Want { needed: size(256, 49), ..want(50) };
    assert_eq!(ledger.at_once(PoolEvent::Wanted(A, Ticket(2), smaller)), [Effect::Grant(A, Ticket(2))]);
    assert_eq!(ledger.at_once(PoolEvent::Wanted(A, Ticket(3), longer(4096, 50))), []);
    assert_eq!(ledger.at_once(PoolEvent::Wanted(A, Ticket(4), want(50))), [], "it drains");
    ledger.at_once(PoolEvent::Released(A));
    assert_eq!(ledger.at_once(PoolEvent::Released(A)), [Effect::Resize(A, 4096)]);
    let granted = ledger.at_once(PoolEvent::Resized(A, Ok(())));
    assert_eq!(granted, [Effect::Grant(A, Ticket(3)), Effect::Grant(A, Ticket(4))]);
    assert_eq!(ledger.claimed(), Bytes::mib(53));
}

/// Both are used without a pause, and neither would be idle when the other is.
#[test]
fn growth_that_needs_the_room_of_a_busy_one_comes_about_however_busy_both_are() {
    let mut ledger = ledger(100, 2, Strategy::EvictLru, 2);
    let (mut busy, mut now, mut ticket) = ([1_i32, 1], 0, 10);
    ledger.loaded(A, 1, 50);
    ledger.loaded(B, 2, 45);
    let apply = |ledger: &mut Ledger, event, now, busy: &mut [i32; 2]| {
        let effects = ledger.decide(event, now);
        for effect in &effects {
            if let Effect::Grant(engine, _) = effect {
                busy[engine.0] += 1;
            }
        }
        effects
    };
    let wanted = Ticket(3);
    let mut all = apply(&mut ledger, PoolEvent::Wanted(A, wanted, longer(30 * 1024, 50)), now, &mut busy);
    loop {
        now += 100;
        // Answers overlap: the next one is asked for before the last one has ended.
        for (engine, mib) in [(A, 50), (B, 45)] {
            ticket += 1;
            all.extend(apply(&mut ledger, PoolEvent::Wanted(engine, Ticket(ticket), want(mib)), now, &mut busy));
            if busy[engine.0] > 0 {
                busy[engine.0] -= 1;
                all.extend(apply(&mut ledger, PoolEvent::Released(engine), now, &mut busy));
            }
        }
        let next = std::mem::take(&mut all);
        if next.contains(&Effect::Grant(A, wanted)) {
            break;
        }
        assert!(now < 40_000, "it still waits after 40 s: {:?}", ledger.rows());
        for effect in next {
            all.extend(match effect {
                Effect::Stop(engine) => apply(&mut ledger, exited(engine), now, &mut busy),
                Effect::Resize(engine, _) => apply(&mut ledger, PoolEvent::Resized(engine, Ok(())), now, &mut busy),
                Effect::Load(engine, _) => apply(&mut ledger, PoolEvent::Loaded(engine), now, &mut busy),
                _ => Vec::new(),
            });
        }
    }
}

#[test]
fn growth_that_does_not_fit_is_refused_and_the_others_are_served() {
    let mut ledger = ledger(52, 2, Strategy::HybridHttpGguf, 1);
    ledger.loaded(A, 1, 50);
    ledger.at_once(PoolEvent::Released(A));
    let effects = ledger.at_once(PoolEvent::Wanted(A, Ticket(2), longer(8192, 50)));
    assert!(matches!(&effects[..], [Effect::Refuse(Ticket(2), refusal)] if refusal.context_tokens == 8192));
    assert_eq!(ledger.at_once(PoolEvent::Wanted(A, Ticket(3), want(50))), [Effect::Grant(A, Ticket(3))]);
}

#[test]
fn an_idle_engine_goes_back_to_its_usual_context_before_a_model_is_evicted() {
    let mut ledger = ledger(100, 3, Strategy::EvictLru, 3);
    ledger.at_once(PoolEvent::Wanted(A, Ticket(1), longer(20 * 1024, 30)));
    ledger.at_once(PoolEvent::Loaded(A));
    ledger.at_once(PoolEvent::Released(A));
    ledger.loaded(B, 2, 40);
    ledger.at_once(PoolEvent::Released(B));
    assert_eq!(ledger.claimed(), Bytes::mib(49 + 40));
    assert_eq!(ledger.at_once(PoolEvent::Wanted(C, Ticket(3), want(30))), [Effect::Resize(A, 1024)]);
    assert_eq!(ledger.at_once(PoolEvent::Resized(A, Ok(()))), [Effect::Load(C, 1024)]);
}

#[test]
fn a_request_for_less_than_usual_is_served_with_less_where_the_usual_does_not_fit() {
    let mut ledger = ledger(50, 1, Strategy::HybridHttpGguf, 1);
    let less = Want { needed: size(512, 40), usual: size(8192, 90), keep_alive: None, lane: Lane::Interactive };
    assert_eq!(ledger.at_once(PoolEvent::Wanted(A, Ticket(1), less)), [Effect::Load(A, 512)]);
}

#[test]
fn a_worker_that_dies_while_it_loads_fails_all_who_wait() {
    let mut ledger = ledger(100, 2, Strategy::HybridHttpGguf, 1);
    ledger.at_once(PoolEvent::Wanted(A, Ticket(1), want(70)));
    ledger.at_once(PoolEvent::Wanted(A, Ticket(2), want(70)));
    let failed = [Effect::Fail(A, Ticket(1), None), Effect::Fail(A, Ticket(2), None)];
    assert_eq!(ledger.at_once(exited(A)), failed);
    assert_eq!(ledger.claimed(), Bytes::ZERO);
}

#[test]
fn a_busy_engine_is_unloaded_when_it_is_idle_unless_it_is_wanted_again() {
    let mut ledger = ledger(100, 2, Strategy::HybridHttpGguf, 1);
    ledger.loaded(A, 1, 70);
    assert_eq!(ledger.at_once(PoolEvent::UnloadAsked(A)), []);
    assert_eq!(ledger.at_once(PoolEvent::Released(A)), [Effect::Stop(A)]);
    ledger.at_once(exited(A));
    ledger.loaded(A, 2, 70);
    ledger.at_once(PoolEvent::UnloadAsked(A));
    ledger.at_once(PoolEvent::Wanted(A, Ticket(3), want(70)));
    ledger.at_once(PoolEvent::Released(A));
    assert_eq!(ledger.at_once(PoolEvent::Released(A)), []);
}

#[test]
fn a_lease_on_a_dead_worker_does_not_free_the_engine_under_its_next_lease() {
    let mut ledger = ledger(100, 2, Strategy::EvictLru, 2);
    ledger.loaded(A, 1, 70);
    ledger.at_once(exited(A));
    ledger.loaded(A, 2, 70);
    ledger.at_once(PoolEvent::Released(A));
    assert_eq!(ledger.at_once(PoolEvent::Wanted(B, Ticket(3), want(70))), [], "the second lease is still out");
}

#[test]
fn more_than_the_budget_is_relieved_step_by_step_and_each_is_measured_before_the_next() {
    let mut ledger = ledger(100, 3, Strategy::HybridHttpGguf, 2);
    ledger.loaded(A, 1, 40);
    ledger.loaded(B, 2, 40);
    ledger.at_once(PoolEvent::Released(B));
    let grown = |ledger: &Ledger, mib| ledger.observed(0, 1000, &[(A, mib), (B, 40)]);
    assert_eq!(
        {
            let o = grown(&ledger, 70);
            ledger.decide(o, 1_000)
        },
        [Effect::Trim(B)]
    );
    assert_eq!(ledger.decide(PoolEvent::Tick, 1_500), [], "what came back is not measured yet");
    assert_eq!(
        {
            let o = grown(&ledger, 70);
            ledger.decide(o, 2_000)
        },
        [Effect::Stop(B)]
    );
    assert!(ledger.decisions().any(|decision| decision.what == "trimmed"));
    assert_eq!(ledger.decide(exited(B), 2_500), []);
    assert_eq!(
        {
            let o = grown(&ledger, 99);
            ledger.decide(o, 3_500)
        },
        [],
        "within the budget, however much it grew"
    );
    let effects = {
        let o = grown(&ledger, 120);
        ledger.decide(o, 4_500)
    };
    assert!(
        matches!(&effects[..], [Effect::Kill(A, why)] if why.contains("80 MiB more than was planned")),
        "{effects:?}"
    );
}

#[test]
fn a_shrink_counts_before_it_is_measured() {
    let mut ledger = ledger(100, 3, Strategy::HybridHttpGguf, 2);
    ledger.at_once(PoolEvent::Wanted(A, Ticket(1), longer(40 * 1024, 30)));
    ledger.at_once(PoolEvent::Loaded(A));
    ledger.at_once(PoolEvent::Released(A));
    let o = ledger.observed(0, 1000, &[(A, 69)]);
    ledger.at_once(o);
    assert_eq!(ledger.at_once(PoolEvent::Wanted(B, Ticket(2), want(60))), [Effect::Resize(A, 1024)]);
    assert_eq!(ledger.at_once(PoolEvent::Resized(A, Ok(()))), [Effect::Load(B, 1024)]);
}

#[test]
fn growth_that_can_never_fit_is_refused_at_once_and_drains_nobody() {
    let mut ledger = ledger(52, 2, Strategy::EvictLru, 1);
    ledger.loaded(A, 1, 50);
    let effects = ledger.at_once(PoolEvent::Wanted(A, Ticket(2), longer(8192, 50)));
    assert!(matches!(effects[..], [Effect::Refuse(Ticket(2), _)]), "A is busy: {effects:?}");
}

#[test]
fn whoever_waits_for_a_worker_that_the_kernel_killed_is_planned_for_anew() {
    let mut ledger = ledger(60, 2, Strategy::HybridHttpGguf, 1);
    ledger.loaded(A, 1, 50);
    ledger.at_once(PoolEvent::Wanted(A, Ticket(2), longer(2048, 50)));
    let killed = PoolEvent::Exited { engine: A, raise: Bytes::mib(5), available: None };
    assert_eq!(ledger.at_once(killed), [Effect::Load(A, 2048)]);
    assert_eq!(ledger.claimed(), Bytes::mib(51 + 5));
    let mut again = ledger;
    again.at_once(PoolEvent::Loaded(A));
    again.at_once(PoolEvent::Wanted(A, Ticket(3), longer(4096, 50)));
    let killed = PoolEvent::Exited { engine: A, raise: Bytes::mib(10), available: None };
    assert!(matches!(again.at_once(killed)[..], [Effect::Refuse(Ticket(3), _)]), "it would be the same again");
}

#[test]
fn a_demand_that_others_of_the_machine_keep_out_holds_nobody() {
    let mut ledger = ledger(1000, 3, Strategy::EvictLru, 2);
    ledger.loaded(A, 1, 40);
    {
        let o = ledger.observed(0, 10, &[(A, 40)]);
        ledger.decide(o, 60_000)
    };
    let effects = ledger.at_once(PoolEvent::Wanted(B, Ticket(2), want(400)));
    assert!(matches!(effects[..], [Effect::Refuse(Ticket(2), _)]), "{effects:?}");
    assert_eq!(ledger.at_once(PoolEvent::Wanted(A, Ticket(3), want(40))), [Effect::Grant(A, Ticket(3))]);
}

#[test]
fn under_pressure_nothing_is_admitted_idle_workers_give_back_and_loads_are_refused_in_time_for_another_place() {
    let mut ledger = ledger(100, 3, Strategy::HybridHttpGguf, 2);
    ledger.loaded(A, 1, 40);
    ledger.at_once(PoolEvent::Released(A));
    assert_eq!(ledger.decide(PoolEvent::Pressure(true), 1_000), [Effect::Trim(A)]);
    assert_eq!(ledger.decide(PoolEvent::Wanted(B, Ticket(2), want(10)), 1_100), []);
    assert_eq!(
        {
            let o = ledger.observed(0, 1000, &[(A, 40)]);
            ledger.decide(o, 2_000)
        },
        [Effect::Stop(A)]
    );
    ledger.decide(exited(A), 2_500);
    let mut relieved = ledger.clone();
    assert_eq!(relieved.decide(PoolEvent::Pressure(false), 3_000), [Effect::Load(B, 1024)]);
    assert!(matches!(ledger.decide(PoolEvent::Tick, 6_100)[..], [Effect::Refuse(Ticket(2), _)]));
}

#[derive(Clone, Debug)]
enum Step {
    Want(usize, u32, Option<u64>),
    Abandon(usize),
    Progress(usize),
    Release(usize),
    Die(usize),
    Unload(usize),
    Wait(u64),
    FailToResize(usize),
    Pressure(bool),
    /// Everything is measured; so many percent of each plan are touched.
    Measure([u64; 4]),
    /// To an engine, or, beyond them, to the server: MiB.
    Lend(usize, u64),
}

fn steps() -> impl proptest::strategy::Strategy<Value = Vec<Step>> {
    let engine = || 0_usize..4;
    let keep = prop_oneof![4 => Just(None), 1 => (0_u64..5_000).prop_map(Some)];
    let step = prop_oneof![
        2 => (0..5_usize, prop_oneof![Just(0_u64), 1_u64..30]).prop_map(|(i, mib)| Step::Lend(i, mib)),
        5 => (engine(), 0_u32..40, keep).prop_map(|(engine, context, keep)| Step::Want(engine, context, keep)),
        1 => (0_usize..64).prop_map(Step::Abandon),
        6 => engine().prop_map(Step::Progress),
        5 => engine().prop_map(Step::Release),
        1 => engine().prop_map(Step::Die),
        1 => engine().prop_map(Step::Unload),
        1 => engine().prop_map(Step::FailToResize),
        2 => (0_u64..10_000).prop_map(Step::Wait),
        1 => any::<bool>().prop_map(Step::Pressure),
        3 => proptest::array::uniform4(0_u64..=100).prop_map(Step::Measure),
    ];
    proptest::collection::vec(step, 0..60)
}

/// A history as the server would live it: tickets that are open, leases that are out.
struct History {
    ledger: Ledger,
    open: Vec<Ticket>,
    asked: u64,
    answered: u64,
    leases: [usize; 4],
    now: Millis,
}

/// Engine 3 is pinned.
const PINNED: usize = 3;

impl History {
    fn new(strategy: Strategy) -> Self {
        let limits = Limits { budget: Bytes::mib(100), max_concurrent_llms: 3, strategy };
        let spec = |index| EngineSpec { evictable: index != PINNED, ..spec(index) };
        let ledger = Ledger::new(limits, (0..4).map(spec).collect());
        Self { ledger, open: Vec::new(), asked: 0, answered: 0, leases: [0; 4], now: 0 }
    }

    fn event(&mut self, step: &Step) -> Option<PoolEvent> {
        let state = |i: usize| self.ledger.rows()[i].state;
        Some(match *step {
            Step::Want(i, context, keep) => {
                self.asked += 1;
                self.open.push(Ticket(self.asked));
                let keep_alive = keep.map(KeepAlive::For);
                // Of 11 to 50 MiB; the pinned one is small.
                let mib = if i == PINNED { 10 } else { 11 + 8 * i as u64 };
                let want = Want { keep_alive, ..longer((context + 1) * 1024, mib) };
                PoolEvent::Wanted(EngineId(i), Ticket(self.asked), want)
            }
            Step::Abandon(n) if !self.open.is_empty() => {
                let ticket = self.open.remove(n % self.open.len());
                self.answered += 1;
                PoolEvent::Abandoned(ticket)
            }
            Step::Progress(i) => match state(i) {
                State::Loading => PoolEvent::Loaded(EngineId(i)),
                State::Stopping => exited(EngineId(i)),
                State::Resizing => PoolEvent::Resized(EngineId(i), Ok(())),
                State::Absent | State::Resident => return None,
            },
            Step::FailToResize(i) if state(i) == State::Resizing => {
                PoolEvent::Resized(EngineId(i), Err("no memory".into()))
            }
            Step::Release(i) if self.leases[i] > 0 => {
                self.leases[i] -= 1;
                PoolEvent::Released(EngineId(i))
            }
            Step::Die(i) if !matches!(state(i), State::Absent | State::Stopping) => exited(EngineId(i)),
            Step::Unload(i) => PoolEvent::UnloadAsked(EngineId(i)),
            Step::Wait(time) => {
                self.now += time;
                PoolEvent::Tick
            }
            Step::Pressure(pressure) => PoolEvent::Pressure(pressure),
            // No more than is free, as the pool lends it.
            Step::Lend(4, mib) => {
                let own = self.ledger.server_loan;
                PoolEvent::Lent(None, Bytes::mib(mib).min(own + self.ledger.free()))
            }
            Step::Lend(i, mib) => {
                let own = self.ledger.engines[i].loan;
                // Only to whoever answers something.
                let is_there = state(i) == State::Resident && self.leases[i] > 0;
                PoolEvent::Lent(
                    Some(EngineId(i)),
                    if is_there { Bytes::mib(mib).min(own + self.ledger.free()) } else { Bytes::ZERO },
                )
            }
            Step::Measure(percents) => self.measured(percents),
            _ => return None,
        })
    }

    /// A machine that has just the budget: what workers touched is not available any more.
    fn measured(&self, percents: [u64; 4]) -> PoolEvent {
        let rows = self.ledger.rows();
        let touched = |row: &Row| Bytes(row.planned.0 / 100 * percents[row.engine.0]);
        let workers = rows.iter().filter(|row| row.state != State::Absent);
        let workers: Vec<_> =
            workers.map(|row| (row.engine, Measured { anonymous: touched(row), file: Bytes::ZERO })).collect();
        let held: Bytes = workers.iter().map(|(_, measured)| measured.anonymous).sum();
        let available = Bytes::mib(100).less(held);
        PoolEvent::Observed(Observation { server: Bytes::ZERO, available, budget: Bytes::mib(100), workers })
    }

    fn live(&mut self, step: &Step) -> Result<(), TestCaseError> {
        if let Step::Release(i) = *step
            && self.leases[i] == 1
        {
            // What was lent is given back first.
            self.live(&Step::Lend(i, 0))?;
        }
        let Some(event) = self.event(step) else { return Ok(()) };
        let dies = matches!(step, Step::Die(_));
        let asked_to_go = matches!(event, PoolEvent::UnloadAsked(_));
        let mut again = self.ledger.clone();
        let effects = self.ledger.decide(event.clone(), self.now);
        prop_assert_eq!(&again.decide(event, self.now), &effects, "the same event had other effects");
        for effect in effects {
            match effect {
                Effect::Grant(id, ticket) => {
                    self.leases[id.0] += 1;
                    self.answer(ticket)?;
                }
                Effect::Refuse(ticket, refusal) => {
                    prop_assert!(!refusal.remedies().is_empty());
                    prop_assert!(refusal.to_string().contains(&refusal.remedies()[0]));
                    self.answer(ticket)?;
                }
                Effect::Fail(_, ticket, _) => self.answer(ticket)?,
                Effect::Stop(id) => {
                    prop_assert!(dies || self.leases[id.0] == 0, "a busy engine was stopped");
                    let pinned = id.0 == PINNED && !asked_to_go && !self.ledger.engines[PINNED].unload_asked;
                    prop_assert!(!pinned || self.pinned_was_asked_to_go(), "a pinned engine was evicted");
                }
                Effect::Resize(id, _) => prop_assert_eq!(self.leases[id.0], 0, "a context in use was resized"),
                Effect::Kill(id, why) => prop_assert!(false, "{id:?} was killed within the budget: {why}"),
                Effect::Load(..) | Effect::Trim(_) => {}
            }
        }
        prop_assert!(self.ledger.claimed() <= Bytes::mib(100), "{} are claimed", self.ledger.claimed());
        let resident = self.ledger.rows().iter().filter(|row| row.state != State::Absent).count();
        prop_assert!(resident <= 3);
        Ok(())
    }

    fn pinned_was_asked_to_go(&self) -> bool {
        self.ledger.decisions().any(|decision| decision.engine.0 == PINNED && decision.what == "unload")
    }

    fn answer(&mut self, ticket: Ticket) -> Result<(), TestCaseError> {
        let at = self.open.iter().position(|open| *open == ticket);
        prop_assert!(at.is_some(), "{ticket:?} was answered twice");
        self.open.remove(at.unwrap_or_default());
        self.answered += 1;
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    // 2,000 histories of 30 events on average, and the 240 that end each: more than 10^5 events.
    #[test]
    fn claims_stay_within_the_budget_and_every_ticket_is_answered_once(steps in steps(), evict: bool) {
        let mut history = History::new(if evict { Strategy::EvictLru } else { Strategy::HybridHttpGguf });
        for step in &steps {
            history.live(step)?;
        }
        // Answers end, loads end, time passes: whoever still waits must then be answered.
        history.live(&Step::Pressure(false))?;
        for lent in 0..5 {
            history.live(&Step::Lend(lent, 0))?;
        }
        for _ in 0..20 {
            for engine in 0..4 {
                history.live(&Step::Progress(engine))?;
                while history.leases[engine] > 0 {
                    history.live(&Step::Release(engine))?;
                }
                history.live(&Step::Wait(1_000))?;
            }
        }
        prop_assert!(history.open.is_empty(), "{:?} wait for ever", history.open);
        prop_assert_eq!(history.answered, history.asked);
    }
}

proptest! {
    // There are six cases.
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn nobody_starves_however_busy_the_others_are(others in 1_usize..3, rounds in 1_usize..4) {
        let mut history = History::new(Strategy::EvictLru);
        // Two engines of 50 MiB are used without a pause; a third one is wanted.
        for _ in 0..rounds {
            for engine in 0..others {
                history.live(&Step::Want(engine, 30, None))?;
                history.live(&Step::Progress(engine))?;
            }
        }
        history.live(&Step::Want(2, 39, None))?;
        let ticket = Ticket(history.asked);
        for _ in 0..200 {
            for engine in 0..others {
                history.live(&Step::Want(engine, 30, None))?;
                history.live(&Step::Progress(engine))?;
                if history.leases[engine] > 0 {
                    history.live(&Step::Release(engine))?;
                }
            }
            history.live(&Step::Progress(2))?;
            history.live(&Step::Wait(200))?;
        }
        prop_assert!(!history.open.contains(&ticket), "it still waits after 40 s");
    }
}
