//! Making room: for a demand, and when more is held than there is.

use sarai_core::Bytes;

use super::engine::{Engine, Size, State};
use super::{Effect, EngineId, JITTER, Ledger, Served, Strategy, WAITS_UNDER_PRESSURE};

/// What is missing for a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lack {
    /// A place among the LLMs.
    Place,
    /// Bytes of the budget.
    Budget,
    /// Bytes of the machine, or of the control group: others hold them.
    Machine,
}

/// What an idle engine can do to make room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Yield {
    /// Go back to its usual context.
    Shrink(EngineId),
    /// Go.
    Evict(EngineId),
}

impl Yield {
    const fn id(self) -> EngineId {
        match self {
            Self::Shrink(id) | Self::Evict(id) => id,
        }
    }
}

impl Ledger {
    /// Serves a demand: loads or grows it, makes room for it, lets it wait, or refuses it.
    pub(super) fn serve(&mut self, id: EngineId, effects: &mut Vec<Effect>) -> Served {
        let least = self.engines[id.0].wanted_size(false);
        if self.engines[id.0].state == State::Resident && self.engines[id.0].busy > 0 {
            if !self.may_ever_fit(id, &least) {
                return self.refuse(id, &least, effects);
            }
            // A context that is in use cannot grow.
            self.note(id, "queue", "a longer context is made when its running answers are done");
            self.engines[id.0].must_drain = true;
            // What else it needs is made free meanwhile, and nobody else takes that.
            return match self.lack(id, &least, &[]) {
                None => Served::WaitsForItself,
                Some(_) => Served::WaitsForRoom,
            };
        }
        let served = self.serve_idle(id, &least, effects);
        if matches!(served, Served::WaitsForRoom) && !self.pressure {
            // While others make room for it, it does not begin anew what it would have to drain again.
            self.engines[id.0].must_drain = self.engines[id.0].state == State::Resident;
        }
        served
    }

    /// Of one that nobody uses now.
    fn serve_idle(&mut self, id: EngineId, least: &Size, effects: &mut Vec<Effect>) -> Served {
        if self.pressure {
            let since = self.engines[id.0].waiting.iter().map(|waiter| waiter.since).min().unwrap_or(self.now);
            if since + WAITS_UNDER_PRESSURE <= self.now {
                return self.refuse(id, least, effects);
            }
            self.note(id, "queue", "the kernel reports that memory is short");
            return Served::WaitsForRoom;
        }
        let usual = self.engines[id.0].wanted_size(self.now >= self.pressed_until);
        for size in [&usual, least] {
            if self.lack(id, size, &[]).is_none() {
                self.start(id, size.clone(), effects);
                return Served::Done;
            }
        }
        if self.engines.iter().any(|other| matches!(other.state, State::Stopping | State::Resizing)) {
            return Served::WaitsForRoom;
        }
        for size in [&usual, least] {
            if let Some(yields) = self.yields_for(id, size) {
                self.make_room(id, size, &yields, effects);
                return Served::WaitsForRoom;
            }
        }
        if self.may_fit_soon(id, least) {
            self.note(id, "queue", "models that are busy hold its room");
            return Served::WaitsForRoom;
        }
        self.refuse(id, least, effects)
    }

    fn may_ever_fit(&self, id: EngineId, size: &Size) -> bool {
        self.lack(id, size, &[]).is_none() || self.yields_for(id, size).is_some() || self.may_fit_soon(id, size)
    }

    fn start(&mut self, id: EngineId, size: Size, effects: &mut Vec<Effect>) {
        let (tokens, total) = (size.context_tokens, size.plan.total());
        let free = self.free();
        let engine = &mut self.engines[id.0];
        let before = std::mem::replace(&mut engine.size, size);
        if engine.state == State::Resident {
            engine.previous = Some(before);
            engine.state = State::Resizing;
            effects.push(Effect::Resize(id, tokens));
            self.note(id, "grow", format!("a request needs a context of {tokens} tokens, {total} in all"));
        } else {
            engine.state = State::Loading;
            engine.loaded_at = self.now;
            effects.push(Effect::Load(id, tokens));
            self.note(id, "load", format!("{total} planned, {free} free"));
        }
    }

    fn make_room(&mut self, id: EngineId, size: &Size, yields: &[Yield], effects: &mut Vec<Effect>) {
        let label = self.engines[id.0].spec.label.clone();
        for &step in yields {
            let why = format!("`{label}` needs {}, {} are free", size.plan.total(), self.free());
            match step {
                Yield::Shrink(victim) => self.shrink(victim, &why, effects),
                Yield::Evict(victim) => {
                    self.note(victim, "evict", why);
                    self.stop(victim, effects);
                }
            }
        }
    }

    fn shrink(&mut self, id: EngineId, why: &str, effects: &mut Vec<Effect>) {
        let engine = &mut self.engines[id.0];
        let tokens = engine.usual.context_tokens;
        engine.previous = Some(std::mem::replace(&mut engine.size, engine.usual.clone()));
        engine.state = State::Resizing;
        effects.push(Effect::Resize(id, tokens));
        self.note(id, "shrink", why);
    }

    /// Refuses whoever needs so much; the others are served if they can be.
    fn refuse(&mut self, id: EngineId, size: &Size, effects: &mut Vec<Effect>) -> Served {
        let refusal = self.refusal(id, size);
        self.note(id, "refuse", refusal.to_string());
        let engine = &mut self.engines[id.0];
        let (refused, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut engine.waiting)
            .into_iter()
            .partition(|waiter| waiter.needed.context_tokens >= size.context_tokens);
        engine.waiting = rest;
        effects.extend(refused.into_iter().map(|waiter| Effect::Refuse(waiter.ticket, Box::new(refusal.clone()))));
        let engine = &self.engines[id.0];
        let more = if engine.state == State::Absent { !engine.waiting.is_empty() } else { engine.must_grow() };
        if more { self.serve(id, effects) } else { Served::Done }
    }

    /// What an engine lacks for this size if these made room.
    pub(super) fn lack(&self, id: EngineId, size: &Size, yields: &[EngineId]) -> Option<Lack> {
        let yields: Vec<_> = yields.iter().map(|&id| Yield::Evict(id)).collect();
        self.lack_after(id, size, &yields)
    }

    fn lack_after(&self, id: EngineId, size: &Size, yields: &[Yield]) -> Option<Lack> {
        let goes = |index: usize| yields.contains(&Yield::Evict(EngineId(index)));
        let stays = |index: &usize| !goes(*index) && *index != id.0;
        let others = || (0..self.engines.len()).filter(stays);
        let llms = others().filter(|&index| self.engines[index].spec.is_llm && self.engines[index].holds_a_place());
        if self.engines[id.0].spec.is_llm && llms.count() >= self.limits.max_concurrent_llms {
            return Some(Lack::Place);
        }
        let claim = |index: usize| self.claim_after(index, yields);
        let claimed: Bytes = others().map(claim).sum();
        let mine = self.engines[id.0].claim_of(size).max(size.plan.total());
        if claimed + mine + self.server + self.server_loan > self.limits.budget {
            return Some(Lack::Budget);
        }
        let available = self.available?;
        let gives = |step: &Yield| match step {
            Yield::Evict(id) => self.engines[id.0].measured.anonymous,
            Yield::Shrink(id) => self.engines[id.0].shrink_gives(),
        };
        let given_back: Bytes = yields.iter().map(gives).sum();
        let others_take: Bytes = others().map(|index| self.engines[index].still_takes()).sum();
        let more = mine.less(self.engines[id.0].measured.anonymous);
        (more + others_take > available + given_back).then_some(Lack::Machine)
    }

    fn claim_after(&self, index: usize, yields: &[Yield]) -> Bytes {
        let engine = &self.engines[index];
        match yields.iter().find(|step| step.id() == EngineId(index)) {
            Some(Yield::Evict(_)) => Bytes::ZERO,
            Some(Yield::Shrink(_)) => engine.claim_of(&engine.usual),
            None => engine.claim(),
        }
    }

    /// The idle engines that make room, the stalest first, and no more of them than needed; none if that would not be
    /// enough. A longer context than usual goes before a model does.
    fn yields_for(&self, id: EngineId, size: &Size) -> Option<Vec<Yield>> {
        let mut all: Vec<_> = self.shrinkable(id).map(Yield::Shrink).collect();
        if self.limits.strategy == Strategy::EvictLru {
            all.extend(self.stalest_first(id).into_iter().map(Yield::Evict));
        }
        let mut chosen: Vec<Yield> = Vec::new();
        for step in all {
            if self.lack_after(id, size, &chosen).is_none() {
                break;
            }
            // Who goes need not shrink.
            chosen.retain(|other| other.id() != step.id());
            chosen.push(step);
        }
        if self.lack_after(id, size, &chosen).is_some() {
            return None;
        }
        // An early one may have become needless through a larger later one.
        for step in chosen.clone() {
            let without: Vec<_> = chosen.iter().copied().filter(|other| *other != step).collect();
            if self.lack_after(id, size, &without).is_none() {
                chosen = without;
            }
        }
        Some(chosen)
    }

    fn shrinkable(&self, except: EngineId) -> impl Iterator<Item = EngineId> + '_ {
        let can = move |index: &usize| {
            let engine = &self.engines[*index];
            *index != except.0 && engine.is_idle() && engine.size.context_tokens > engine.usual.context_tokens
        };
        (0..self.engines.len()).filter(can).map(EngineId)
    }

    fn stalest_first(&self, except: EngineId) -> Vec<EngineId> {
        let mut idle: Vec<_> =
            (0..self.engines.len()).filter(|&i| i != except.0 && self.engines[i].may_be_evicted(self.now)).collect();
        idle.sort_by_key(|&index| std::cmp::Reverse(self.engines[index].staleness(self.now)));
        idle.into_iter().map(EngineId).collect()
    }

    /// The same, once all that is lent was given back; nothing if nothing is.
    fn without_loans(&self) -> Option<Self> {
        let is_lent = self.server_loan > Bytes::ZERO || self.engines.iter().any(|engine| engine.loan > Bytes::ZERO);
        is_lent.then(|| {
            let mut ledger = self.clone();
            ledger.server_loan = Bytes::ZERO;
            ledger.engines.iter_mut().for_each(|engine| engine.loan = Bytes::ZERO);
            ledger
        })
    }

    /// Whether the engine would fit once those that are busy now, or on their way, had gone, and what is lent was given back.
    fn may_fit_soon(&self, id: EngineId, size: &Size) -> bool {
        let goes = |engine: &Engine| match self.limits.strategy {
            _ if engine.state == State::Stopping => true,
            Strategy::EvictLru => engine.holds_a_place() && engine.spec.evictable,
            Strategy::HybridHttpGguf => engine.unload_asked,
        };
        let gone: Vec<_> =
            (0..self.engines.len()).filter(|&i| i != id.0 && goes(&self.engines[i])).map(EngineId).collect();
        let without_loans = self.without_loans();
        let may_change = !gone.is_empty() || without_loans.is_some();
        may_change && without_loans.as_ref().unwrap_or(self).lack(id, size, &gone).is_none()
    }

    /// Whether an engine gives no new leases: it drains to grow, or the demand that waits for room needs its place, and
    /// it was worth its load.
    pub(super) fn is_held(&self, id: EngineId) -> bool {
        let engine = &self.engines[id.0];
        if engine.must_drain {
            return true;
        }
        let Some(head) = self.waits_for_room.filter(|head| *head != id && !self.pressure) else { return false };
        self.limits.strategy == Strategy::EvictLru
            && engine.spec.evictable
            && engine.dwells_until() <= self.now
            && self.lack(head, &self.engines[head.0].wanted_size(false), &[]).is_some()
            && self.is_needed_by(head, id)
    }

    /// Whether the head of the queue needs the room of this engine, beyond what idle and staler ones have.
    fn is_needed_by(&self, head: EngineId, id: EngineId) -> bool {
        let size = self.engines[head.0].wanted_size(false);
        let mut others: Vec<_> = (0..self.engines.len())
            .filter(|&i| i != head.0 && i != id.0)
            .filter(|&i| self.engines[i].holds_a_place() && self.engines[i].spec.evictable)
            .filter(|&i| self.engines[i].busy == 0 || self.engines[i].loaded_at < self.engines[id.0].loaded_at)
            .map(EngineId)
            .collect();
        others.sort();
        self.lack(head, &size, &others).is_some()
    }

    /// Gives back what is held beyond the budget, or what the kernel is short of, one step at a time, each measured before
    /// the next: longer contexts than usual, pages of idle workers, idle workers; and if only busy ones are left and
    /// more is really held than the budget allows, the worker that grew most beyond its plan.
    pub(super) fn relieve(&mut self, effects: &mut Vec<Effect>) {
        let over = self.claimed() > self.limits.budget + JITTER;
        if !(over || self.pressure) || self.relieved_at.is_some() {
            return;
        }
        if self.engines.iter().any(|engine| matches!(engine.state, State::Stopping | State::Resizing)) {
            return;
        }
        let why = if over {
            format!("{} are held, the budget is {}", self.claimed(), self.limits.budget)
        } else {
            "the kernel reports that memory is short".to_owned()
        };
        if self.give_back(&why, effects) {
            self.relieved_at = Some(self.now);
        }
    }

    /// Takes the first step that can be taken.
    fn give_back(&mut self, why: &str, effects: &mut Vec<Effect>) -> bool {
        let nobody = EngineId(usize::MAX);
        let grown = self.shrinkable(nobody).next();
        if let Some(id) = grown {
            self.shrink(id, why, effects);
            return true;
        }
        let untrimmed = self.engines.iter().position(|engine| engine.is_idle() && !engine.trimmed);
        if let Some(index) = untrimmed {
            let engine = &mut self.engines[index];
            engine.trimmed = true;
            engine.trimmed_from = Some(engine.measured);
            self.note(EngineId(index), "trim", why);
            effects.push(Effect::Trim(EngineId(index)));
            return true;
        }
        let idle = (0..self.engines.len()).filter(|&i| self.engines[i].is_idle() && self.engines[i].spec.evictable);
        if let Some(index) = idle.max_by_key(|&index| self.engines[index].staleness(self.now)) {
            self.note(EngineId(index), "evict", why);
            self.stop(EngineId(index), effects);
            return true;
        }
        self.kill_the_outgrown(why, effects)
    }

    /// Nobody is idle: only what is really held counts against those who are busy.
    fn kill_the_outgrown(&mut self, why: &str, effects: &mut Vec<Effect>) -> bool {
        let held = self.engines.iter().map(|engine| engine.measured.total()).sum::<Bytes>() + self.server;
        let outgrown = |&index: &usize| {
            let engine = &self.engines[index];
            let tolerated = JITTER.max(Bytes(engine.size.plan.total().0 / 20));
            matches!(engine.state, State::Resident | State::Loading) && engine.excess() > tolerated
        };
        let worst = (0..self.engines.len()).filter(outgrown).max_by_key(|&index| self.engines[index].excess());
        let Some(index) = worst.filter(|_| held > self.limits.budget) else { return false };
        let why = format!("it holds {} more than was planned, and {why}", self.engines[index].excess());
        self.note(EngineId(index), "kill", why.clone());
        self.engines[index].state = State::Stopping;
        effects.push(Effect::Kill(EngineId(index), why));
        true
    }
}
