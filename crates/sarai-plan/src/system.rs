//! A whole configuration beforehand: what is resident when all is well, and what happens when hosts fail.
//!
//! Nothing is modelled twice: each scenario is a history of events that the ledger itself decides about.

use sarai_core::{Bytes, KeepAlive, KvType, Lane, Refusal};

use crate::estimate::{Companions, Plan, Settings};
use crate::gguf::Header;
use crate::ledger::{EngineId, EngineSpec, Ledger, Limits, Observation, PoolEvent, Row, Size, State, Ticket, Want};
use crate::{Effect, largest_context};

/// An engine of the configuration.
#[derive(Debug)]
pub struct Component<'a> {
    /// The models that share it.
    pub label: String,
    /// Its header, if its file is there.
    pub header: Option<&'a Header>,
    /// Those of what it is loaded with.
    pub with: Companions<&'a Header>,
    /// How it is loaded.
    pub settings: Settings,
    /// What that takes.
    pub plan: Plan,
    /// Whether it counts against `max_concurrent_llms`.
    pub is_llm: bool,
    /// Whether it may go to make room.
    pub evictable: bool,
    /// Whether it is loaded at the start.
    pub resident: bool,
}

/// Where a model is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A remote host.
    Remote(String),
    /// A local engine.
    Local(EngineId),
}

/// A public model.
#[derive(Clone, Debug)]
pub struct Route {
    /// Its name.
    pub name: String,
    /// In the order in which they are tried.
    pub places: Vec<Place>,
}

/// A configuration on a machine.
#[derive(Debug)]
pub struct System<'a> {
    /// Budget, places and strategy.
    pub limits: Limits,
    /// What the server itself takes.
    pub server: Bytes,
    /// Engines, by their id.
    pub components: Vec<Component<'a>>,
    /// Models, in the order of the file.
    pub routes: Vec<Route>,
}

/// What becomes of one model in a scenario.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The model.
    pub model: String,
    /// Who answers.
    pub answers: Answers,
    /// Engines that went to make room for it.
    pub evicted: Vec<String>,
}

/// Who answers a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answers {
    /// A remote host.
    Remote(String),
    /// A local engine, by its label.
    Local(String),
    /// Nobody: the client gets an error with this text.
    Nobody(String),
}

/// What happens in one situation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// Which hosts are down.
    pub name: String,
    /// Each model, asked once, in the order of the file.
    pub outcomes: Vec<Outcome>,
    /// What is resident at the end, with its claim.
    pub resident: Vec<(String, Bytes)>,
    /// The most that was claimed at any moment.
    pub peak: Bytes,
}

impl Scenario {
    /// Whether every model is answered.
    #[must_use]
    pub fn fits(&self) -> bool {
        self.outcomes.iter().all(|outcome| !matches!(outcome.answers, Answers::Nobody(_)))
    }
}

/// A change that saves memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suggestion {
    /// The engine.
    pub label: String,
    /// What to change.
    pub change: String,
    /// What it saves.
    pub saves: Bytes,
}

impl System<'_> {
    /// All is well; each remote host down, then all of them; and the same system without remotes.
    #[must_use]
    pub fn scenarios(&self) -> Vec<Scenario> {
        let mut hosts: Vec<&str> = Vec::new();
        for place in self.routes.iter().flat_map(|route| &route.places) {
            if let Place::Remote(host) = place
                && !hosts.contains(&host.as_str())
            {
                hosts.push(host);
            }
        }
        let mut scenarios = vec![self.play("all hosts up", &[])];
        scenarios.extend(hosts.iter().map(|host| self.play(&format!("{host} down"), &[host])));
        if hosts.len() > 1 {
            scenarios.push(self.play("all hosts down", &hosts));
        }
        scenarios
    }

    /// Every component at once, whatever the budget: the hybrid system, and the same without remotes.
    #[must_use]
    pub fn totals(&self) -> (Bytes, Bytes) {
        let needed_hybrid = |id: EngineId| {
            self.routes.iter().any(|route| route.places.first() == Some(&Place::Local(id)))
                || self.components[id.0].resident
        };
        let ids = || (0..self.components.len()).map(EngineId);
        let total = |id: EngineId| self.components[id.0].plan.total();
        let hybrid: Bytes = ids().filter(|id| needed_hybrid(*id)).map(total).sum();
        (hybrid + self.server, ids().map(total).sum::<Bytes>() + self.server)
    }

    fn play(&self, name: &str, down: &[&str]) -> Scenario {
        let mut player = Player::new(self);
        for (index, component) in self.components.iter().enumerate() {
            if component.resident {
                let _ = player.want(EngineId(index));
            }
        }
        // First as every day, then with the hosts down: that is when it must fit.
        let mut outcomes = player.ask_all(&[]);
        if !down.is_empty() {
            outcomes = player.ask_all(down);
        }
        let resident = player.ledger.rows().into_iter().filter(|row| row.state != State::Absent);
        let label = |row: Row| (self.components[row.engine.0].label.clone(), row.claimed);
        Scenario { name: name.to_owned(), outcomes, resident: resident.map(label).collect(), peak: player.peak }
    }

    /// What would make an engine smaller, the largest saving first, one of each kind.
    #[must_use]
    pub fn suggestions(&self, id: EngineId) -> Vec<Suggestion> {
        let component = &self.components[id.0];
        let Some(header) = component.header else { return Vec::new() };
        let total = component.plan.total();
        let saves = |settings: Settings| total.less(Plan::of(header, settings, component.with).total());
        let mut found = Vec::new();
        let mut suggest = |change: String, saves: Bytes| {
            if saves > Bytes::mib(1) {
                found.push(Suggestion { label: component.label.clone(), change, saves });
            }
        };
        let settings = component.settings;
        if settings.context_tokens > 1024 {
            let context_tokens = settings.context_tokens / 2;
            suggest(format!("context_length: {context_tokens}"), saves(Settings { context_tokens, ..settings }));
        }
        let free = self.limits.budget.less(self.server);
        if total > free
            && let Some(context_tokens) = largest_context(header, settings, component.with, free)
        {
            suggest(
                format!("context_length: {context_tokens}, the longest that fits alone"),
                saves(Settings { context_tokens, ..settings }),
            );
        }
        if settings.parallel > 1 {
            suggest("parallel: 1".into(), saves(Settings { parallel: 1, ..settings }));
        }
        for kv in [KvType::Q8_0, KvType::Q4_0] {
            if kv > settings.kv {
                suggest(format!("kv_type: {}", kv.name()), saves(Settings { kv, flash_attention: true, ..settings }));
            }
        }
        for (quantisation, bits) in [("Q4_K_M", 4.89), ("Q3_K_M", 3.98), ("Q2_K", 3.18)] {
            let smaller = file_of(header, bits);
            if smaller < Bytes(header.weights().0 / 100 * 95) {
                suggest(format!("a {quantisation} file"), header.weights().less(smaller));
            }
        }
        found.sort_by_key(|suggestion| std::cmp::Reverse(suggestion.saves));
        found
    }
}

/// The weights at so many bits each on average.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "an estimate")]
fn file_of(header: &Header, bits: f64) -> Bytes {
    Bytes((header.parameters() as f64 * bits / 8.0) as u64)
}

/// Lives through a scenario.
struct Player<'a> {
    system: &'a System<'a>,
    ledger: Ledger,
    tickets: u64,
    now: u64,
    peak: Bytes,
}

impl<'a> Player<'a> {
    fn new(system: &'a System<'a>) -> Self {
        let spec = |component: &Component<'_>| EngineSpec {
            label: component.label.clone(),
            is_llm: component.is_llm,
            evictable: component.evictable,
            keep_alive: KeepAlive::Forever,
            reload: 1000,
        };
        let mut ledger = Ledger::new(system.limits, system.components.iter().map(spec).collect());
        let available = Bytes(u64::MAX);
        let (server, budget) = (system.server, system.limits.budget);
        ledger.decide(PoolEvent::Observed(Observation { server, available, budget, workers: Vec::new() }), 0);
        Self { system, ledger, tickets: 0, now: 0, peak: Bytes::ZERO }
    }

    fn ask_all(&mut self, down: &[&str]) -> Vec<Outcome> {
        self.system.routes.iter().map(|route| self.ask(route, down)).collect()
    }

    fn ask(&mut self, route: &Route, down: &[&str]) -> Outcome {
        let mut reasons = Vec::new();
        let mut evicted = Vec::new();
        for place in &route.places {
            match place {
                Place::Remote(host) if down.contains(&host.as_str()) => reasons.push(format!("{host} is down")),
                Place::Remote(host) => {
                    let answers = Answers::Remote(host.clone());
                    return Outcome { model: route.name.clone(), answers, evicted };
                }
                Place::Local(id) => {
                    let component = &self.system.components[id.0];
                    if component.plan.parts.is_empty() {
                        reasons.push(format!("the file of `{}` is not there", component.label));
                        continue;
                    }
                    let (gone, refusal) = self.want(*id);
                    evicted.extend(gone);
                    match refusal {
                        None => {
                            let answers = Answers::Local(component.label.clone());
                            return Outcome { model: route.name.clone(), answers, evicted };
                        }
                        Some(refusal) => reasons.push(refusal.to_string()),
                    }
                }
            }
        }
        let nothing = || "nothing serves it in this version".to_owned();
        let reason = if reasons.is_empty() { nothing() } else { reasons.join("; ") };
        Outcome { model: route.name.clone(), answers: Answers::Nobody(reason), evicted }
    }

    /// One request: wants the engine, has its load happen, and gives it back. Returns who went, and why it was refused.
    fn want(&mut self, id: EngineId) -> (Vec<String>, Option<Box<Refusal>>) {
        let component = &self.system.components[id.0];
        let size = Size { context_tokens: component.settings.context_tokens, plan: component.plan.clone() };
        self.tickets += 1;
        self.now += 60_000;
        let want = Want { needed: size.clone(), usual: size, keep_alive: None, lane: Lane::Interactive };
        let mut effects = self.ledger.decide(PoolEvent::Wanted(id, Ticket(self.tickets), want), self.now);
        let (mut evicted, mut refusal, mut next) = (Vec::new(), None, 0);
        while next < effects.len() {
            self.peak = self.peak.max(self.ledger.claimed());
            let event = match &effects[next] {
                Effect::Stop(gone) => {
                    evicted.push(self.system.components[gone.0].label.clone());
                    Some(PoolEvent::Exited { engine: *gone, raise: Bytes::ZERO, available: None })
                }
                Effect::Load(loaded, _) => Some(PoolEvent::Loaded(*loaded)),
                Effect::Grant(granted, _) => Some(PoolEvent::Released(*granted)),
                Effect::Refuse(_, why) => {
                    refusal = Some(why.clone());
                    None
                }
                Effect::Resize(..) | Effect::Trim(_) | Effect::Kill(..) | Effect::Fail(..) => None,
            };
            next += 1;
            effects.extend(event.into_iter().flat_map(|event| self.ledger.decide(event, self.now)));
        }
        (evicted, refusal)
    }
}
