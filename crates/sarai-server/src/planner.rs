//! The plan of a load: the formula, corrected by llama.cpp's own dry run and by what workers really took.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use sarai_core::{Bytes, EngineMemory};
use sarai_plan::Size;
use sarai_plan::estimate::{BINARY_PAGES, Plan, Settings, WEIGHTS};
use sarai_plan::ledger::{Measured, Millis};

use crate::source::Source;
use crate::state::{Learned, State};

/// What a worker may hold beyond its plan before that is worth remembering.
const TOLERATED: Bytes = Bytes::mib(1);
/// A dry run that differs by less does not matter.
const TOLERANCE: f64 = 0.01;

/// Plans with what was learned.
#[derive(Clone, Debug)]
pub struct Planner {
    state: Arc<State>,
    /// Dry runs of another binary do not count.
    engine: String,
    /// Plans that were made since something was learned last.
    plans: Arc<Mutex<HashMap<(String, Settings), Plan>>>,
}

/// Plans that are kept at most.
const KEPT: usize = 1024;

impl Planner {
    /// A planner over this state.
    pub fn new(state: Arc<State>) -> Self {
        let binary = std::fs::metadata("/proc/self/exe");
        let changed = binary.and_then(|meta| meta.modified()).ok();
        let changed = changed.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok()).unwrap_or_default();
        Self { state, engine: format!("{} {}", env!("CARGO_PKG_VERSION"), changed.as_millis()), plans: Arc::default() }
    }

    /// What a load with these settings takes.
    pub fn plan(&self, source: &Source, settings: Settings) -> Plan {
        let key = (source.identity(), settings);
        // Made under the lock: what is learned meanwhile clears it afterwards.
        let mut kept = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = kept.get(&key) {
            return plan.clone();
        }
        if kept.len() >= KEPT {
            kept.clear();
        }
        let plan = self.make(source, settings);
        kept.insert(key, plan.clone());
        plan
    }

    fn learn(&self, key: &str, change: impl FnOnce(&mut Learned)) {
        self.state.learn(key, change);
        self.plans.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Writes what was learned. Blocks.
    pub fn flush(&self) {
        self.state.flush();
    }

    fn make(&self, source: &Source, settings: Settings) -> Plan {
        let mut plan = source.plan(settings);
        let formula = plan.clone();
        let seen = self.state.get(&usage_key(source, settings)).anonymous;
        if let Source::Process(_) = source {
            // What it was measured at takes the place of what was declared, with a tenth to spare.
            return if seen > Bytes::ZERO { Plan::declared(seen + Bytes(seen.0 / 10)) } else { plan };
        }
        if let Some(probe) = self.state.get(&self.probe_key(source, settings)).probe {
            correct(&mut plan, probe);
            if plan != formula {
                plan.notes.clear();
            }
        }
        // What was seen is compared with the plan as it is now: a dry run that explains it is not counted twice.
        let excess = seen.less(own(&plan));
        if excess > TOLERATED {
            plan.raise(excess);
        }
        plan
    }

    /// A context and its plan; no longer than the model was trained for.
    pub fn size(&self, source: &Source, settings: Settings, context_tokens: u32) -> Size {
        let context_tokens = match source {
            Source::File(_) => source.longest_context(settings).map_or(context_tokens, |most| context_tokens.min(most)),
            // It has the context that it has.
            Source::Process(_) => settings.context_tokens,
        };
        Size { context_tokens, plan: self.plan(source, Settings { context_tokens, ..settings }) }
    }

    /// Whether a dry run of these settings is known.
    pub fn is_probed(&self, source: &Source, settings: Settings) -> bool {
        self.state.get(&self.probe_key(source, settings)).probe.is_some()
    }

    /// Keeps a dry run; what differs from the formula is logged, and wins from now on.
    pub fn probed(&self, source: &Source, settings: Settings, probe: EngineMemory) {
        let formula = source.plan(settings);
        for (part, planned, probed) in differences(&formula, probe) {
            tracing::info!(file = %source.name(), part, %planned, %probed, "the dry run differs from the formula");
        }
        self.learn(&self.probe_key(source, settings), |learned| learned.probe = Some(probe));
    }

    /// Keeps what a worker was seen to hold, if that is more than its plan says and than was known.
    pub fn measured(&self, source: &Source, settings: Settings, measured: Measured) {
        let key = usage_key(source, settings);
        let known = self.state.get(&key).anonymous;
        let counted = source.counted(measured);
        if counted > known.max(own(&self.plan(source, settings))) + TOLERATED {
            self.learn(&key, |learned| learned.anonymous = counted);
        }
    }

    /// A worker ended well: what it held at the most replaces what was known, so that one that grew once is not held
    /// against its file for ever. What the kernel killed for is kept: a worker may end well and have touched little.
    pub fn ended(&self, source: &Source, settings: Settings, most: Bytes) {
        let key = usage_key(source, settings);
        let known = self.state.get(&key);
        let is_first = matches!(source, Source::Process(_)) && known.anonymous == Bytes::ZERO;
        if known.oom_kills == 0 && (known.anonymous > most || is_first) {
            self.learn(&key, |learned| learned.anonymous = most);
        }
    }

    /// The kernel killed a worker for want of memory: its next plan is a tenth higher. Returns by how much.
    pub fn killed(&self, source: &Source, settings: Settings) -> Bytes {
        let plan = self.plan(source, settings);
        let tenth = Bytes(plan.total().0 / 10);
        self.learn(&usage_key(source, settings), |learned| {
            learned.oom_kills += 1;
            learned.anonymous = own(&plan) + tenth;
        });
        tenth
    }

    /// What a load takes, learned or guessed from the size of the file.
    pub fn reload(&self, source: &Source) -> Millis {
        match self.state.get(&source.identity()).load_ms {
            0 => source.reload(),
            learned => learned,
        }
    }

    /// Keeps what a load took.
    pub fn loaded(&self, source: &Source, took: Millis) {
        self.state.learn(&source.identity(), |learned| learned.load_ms = took.max(1));
    }

    fn probe_key(&self, source: &Source, settings: Settings) -> String {
        format!("{} {settings:?} {}", source.identity(), self.engine)
    }
}

/// What a worker takes depends on its file, context, cache and all other settings.
fn usage_key(source: &Source, settings: Settings) -> String {
    format!("{} {settings:?}", source.identity())
}

/// The parts of which the dry run tells, where it differs by more than a hundredth of the whole.
fn differences(plan: &Plan, probe: EngineMemory) -> Vec<(&'static str, Bytes, Bytes)> {
    let state = plan.part("state");
    // What lies between used tensors stays mapped with them, which a dry run does not see.
    let mapped = plan.part(WEIGHTS).max(probe.weights).min(probe.weights + probe.repacked);
    let parts = [
        (WEIGHTS, plan.part(WEIGHTS), mapped),
        ("weights repacked", plan.part("weights repacked"), probe.repacked),
        ("kv", plan.part("kv"), probe.context.less(state)),
        ("compute", plan.part("compute"), probe.compute),
    ];
    let differs = |(_, planned, probed): &(&str, Bytes, Bytes)| {
        let difference = planned.less(*probed).max(probed.less(*planned));
        difference.as_mib() > TOLERANCE * plan.total().as_mib()
    };
    parts.into_iter().filter(differs).collect()
}

/// Memory that only the worker has.
fn own(plan: &Plan) -> Bytes {
    plan.total().less(plan.part(WEIGHTS) + plan.part(BINARY_PAGES))
}

/// Puts the dry run's figures in the place of the formula's.
pub fn correct(plan: &mut Plan, probe: EngineMemory) {
    for (part, _, probed) in differences(plan, probe) {
        plan.correct(part, probed);
    }
}
