//! `sarai plan`: what files take, and what a configuration takes, before anything is loaded.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use sarai_core::frame::LoadSpec;
use sarai_core::{Bytes, EngineMemory, FORM_BYTES, Part, Purpose, form_bytes};
use sarai_plan::estimate::{Companions, DRAFT_TOKENS, PARTS, Plan, Repack, Settings, idle_pieces, largest_context};
use sarai_plan::layers::purpose;
use sarai_plan::ledger::Limits;
use sarai_plan::system::{Answers, Component, Place, Route, Scenario, System};
use sarai_plan::{EngineId, Header};
use sarai_server::config::resolve::{machine_repack, machine_threads};
use sarai_server::config::{self, Config, Deployment, Environment};
use sarai_server::machine;
use sarai_server::model_file::{FileError, ModelFile};
use sarai_server::planner::{Planner, correct};
use sarai_server::source::Source;
use sarai_server::state::State;
use sarai_server::supervise::probe::probe;
use serde_json::{Value, json};

use crate::args::PlanArgs;
use crate::{Failure, command, log};

/// What the server itself takes, as measured without a model (`tests/end_to_end/cli.rs` holds it to that).
const SERVER: Bytes = Bytes::mib(24);

/// Plans files, or the configuration.
pub fn run(args: &PlanArgs) -> Result<ExitCode, Failure> {
    if args.files.is_empty() {
        return configuration(args);
    }
    let mut bodies = Vec::new();
    let mut text = String::new();
    for path in &args.files {
        let planned = FilePlan::of(path, args)?;
        text.push_str(&planned.table());
        bodies.push(planned.body());
    }
    log::print(&if args.json { format!("{}\n", Value::from(bodies)) } else { text });
    Ok(ExitCode::SUCCESS)
}

/// What is free for models: of this machine, or of the one that was named.
fn free(args: &PlanArgs) -> Bytes {
    args.ram.map_or_else(machine::free, of_machine)
}

/// A machine's memory less what its kernel keeps.
fn of_machine(ram: Bytes) -> Bytes {
    ram.less(Bytes::mib(8).max(Bytes(ram.0 / 50)))
}

struct FilePlan {
    file: ModelFile,
    settings: Settings,
    /// Before the dry run.
    formula: Plan,
    plan: Plan,
    probe: Option<Result<EngineMemory, String>>,
    free: Bytes,
    largest: Option<u32>,
}

impl FilePlan {
    fn of(path: &Path, args: &PlanArgs) -> Result<Self, Failure> {
        let with = Companions { projector: args.mmproj.as_deref(), draft: args.draft.as_deref() };
        let file = ModelFile::read_with(path, with).map_err(Failure::failed)?;
        let with = file.with();
        let settings = Settings {
            context_tokens: args.ctx,
            parallel: args.parallel,
            shared_context: args.shared_context,
            ubatch_tokens: args.ubatch,
            draft_tokens: if args.draft.is_some() { DRAFT_TOKENS } else { 0 },
            kv: args.kv,
            flash_attention: args.flash_attn,
            repack: if args.repack && !args.deterministic { machine_repack() } else { Repack::Off },
            deterministic: args.deterministic,
            threads: machine_threads(),
        };
        let mut plan = Plan::of(&file.header, settings, with);
        let formula = plan.clone();
        let probe = (args.probe || !plan.notes.is_empty()).then(|| dry_run(path, &file.header, settings));
        if let Some(Ok(memory)) = &probe {
            correct(&mut plan, *memory);
            plan.notes.clear();
        }
        let free = free(args);
        let largest = largest_context(&file.header, settings, with, free);
        Ok(Self { file, settings, formula, plan, probe, free, largest })
    }

    fn table(&self) -> String {
        let header = &self.file.header;
        let Settings { context_tokens, parallel, kv, .. } = self.settings;
        let mut text = format!(
            "{}\n{} {}, context {context_tokens} x {parallel}, KV {}\n",
            self.file.path.display(),
            header.architecture(),
            header.quantisation(),
            kv.name()
        );
        text.push_str(&rows(&self.plan.parts));
        text.push_str(&format!("  {:<20} {:>10.1} MiB\n", "total", self.plan.total().as_mib()));
        if let Some(lent) = lent(header) {
            text.push_str(&format!("  {LENT:<20} {:>10.1} MiB\n", lent.as_mib()));
        }
        match self.largest {
            Some(tokens) => {
                text.push_str(&format!("  the longest context that fits in {} free: {tokens}\n", self.free))
            }
            None => text.push_str(&format!("  it does not fit in {} free with any context\n", self.free)),
        }
        match &self.probe {
            Some(Ok(_)) => {
                text.push_str("  llama.cpp's dry run was made, and its figures are above where they differ\n")
            }
            Some(Err(reason)) => text.push_str(&format!("  llama.cpp's dry run failed: {reason}\n")),
            None => {}
        }
        for note in &self.plan.notes {
            text.push_str(&format!("  note: {note}\n"));
        }
        text.push('\n');
        text
    }

    fn body(&self) -> Value {
        json!({
            "file": self.file.path, "architecture": self.file.header.architecture(),
            "parts": self.plan.parts, "formula": self.formula.parts,
            "idle_pieces": idle_pieces(&self.file.header, self.settings.repack), "total_bytes": self.plan.total(), "free_bytes": self.free,
            "lent_bytes": lent(&self.file.header),
            "largest_context_tokens": self.largest, "notes": self.plan.notes,
            "probe": self.probe.as_ref().map(|probe| match probe {
                Ok(memory) => json!(memory),
                Err(reason) => json!({ "failed": reason }),
            }),
        })
    }
}

/// How a row is called that is in no total: it is lent, of what is free, while an answer follows a form.
const LENT: &str = "lent for a form";

/// What a model is lent while an answer follows a form.
fn lent(header: &Header) -> Option<Bytes> {
    (purpose(header) == Purpose::Answers).then(|| form_bytes(header.vocabulary()))
}

fn rows(parts: &[Part]) -> String {
    parts.iter().map(|part| format!("  {:<20} {:>10.1} MiB\n", part.name, part.bytes.as_mib())).collect()
}

fn dry_run(path: &Path, header: &Header, settings: Settings) -> Result<EngineMemory, String> {
    let settings = settings.fitted(header);
    let spec = LoadSpec {
        model: "plan".into(),
        path: path.to_owned(),
        projector: None,
        draft: None,
        context_tokens: settings.context_tokens,
        parallel: settings.parallel,
        shared_context: settings.shared_context,
        ubatch_tokens: settings.ubatch_tokens,
        draft_tokens: settings.draft_tokens,
        threads: 1,
        kv: settings.kv,
        flash_attention: settings.flash_attention,
        repack: settings.repack != Repack::Off,
        deterministic: settings.deterministic,
        idle: Vec::new(),
        whole_layers: 0,
        purpose: purpose(header),
        park: None,
    };
    let runtime = command::runtime().map_err(|failure| failure.to_string())?;
    runtime.block_on(probe(Path::new(super::serve::THIS_BINARY), spec)).map(|info| info.memory)
}

/// Plans the configuration.
fn configuration(args: &PlanArgs) -> Result<ExitCode, Failure> {
    let config = config::load(&args.config.config, &Environment::of_process()).map_err(Failure::misused)?;
    let files: Vec<_> = config.engines.iter().map(source_of).collect();
    let planner = Planner::new(Arc::new(State::open(&config.server.state_dir)));
    let present: Vec<_> = files.iter().map(|files| files.as_ref().ok()).collect();
    let machine = args.ram.unwrap_or_else(|| machine::limit().unwrap_or(Bytes(u64::MAX)));
    let budget = config.memory.max_ram.min(of_machine(machine));
    let limits =
        Limits { budget, max_concurrent_llms: config.memory.max_concurrent_llms, strategy: config.memory.strategy };
    let system = system(&config, &present, &planner, limits);
    let missing: Vec<_> = files.iter().filter_map(|file| file.as_ref().err().map(ToString::to_string)).collect();
    let report = Report { system: &system, machine, max_ram: config.memory.max_ram, missing };
    log::print(&if args.json { format!("{}\n", report.body()) } else { report.text() });
    Ok(ExitCode::SUCCESS)
}

/// What an engine is loaded from.
fn source_of(engine: &config::Engine) -> Result<Source, FileError> {
    match &engine.process {
        Some(process) => Ok(Source::Process(Arc::clone(process))),
        None => ModelFile::read_with(&engine.path, engine.with()).map(|file| Source::File(Arc::new(file))),
    }
}

fn system<'a>(config: &Config, sources: &[Option<&'a Source>], planner: &Planner, limits: Limits) -> System<'a> {
    let component = |(engine, source): (&config::Engine, &Option<&'a Source>)| Component {
        label: engine.label.clone(),
        header: source.and_then(Source::header),
        with: source.map(Source::with).unwrap_or_default(),
        settings: engine.settings,
        plan: source.map_or_else(Plan::default, |source| planner.plan(source, engine.settings)),
        is_llm: engine.is_llm,
        evictable: engine.evictable,
        resident: engine.resident,
    };
    let place = |deployment: &Deployment| match deployment {
        Deployment::Remote(remote) => Place::Remote(remote.url.clone()),
        Deployment::Local { engine, .. } | Deployment::Process { engine, .. } => Place::Local(*engine),
    };
    let route = |model: &config::Model| Route {
        name: model.name.clone(),
        places: model.deployments.iter().map(place).collect(),
    };
    System {
        limits,
        server: SERVER,
        components: config.engines.iter().zip(sources).map(component).collect(),
        routes: config.models.iter().filter(|model| !model.deployments.is_empty()).map(route).collect(),
    }
}

struct Report<'a> {
    system: &'a System<'a>,
    machine: Bytes,
    max_ram: Bytes,
    missing: Vec<String>,
}

impl Report<'_> {
    fn text(&self) -> String {
        let limits = self.system.limits;
        let mut text = format!(
            "budget {} (max_ram_gb {}, machine or control group {}), strategy {}, at most {} local LLMs\n\n",
            limits.budget,
            self.max_ram,
            self.machine,
            limits.strategy.name(),
            limits.max_concurrent_llms
        );
        text.push_str(&self.components());
        text.push_str(&self.verdict());
        for missing in &self.missing {
            text.push_str(&format!("not counted: {missing}\n"));
        }
        for scenario in self.system.scenarios() {
            text.push_str(&scenario_text(&scenario));
        }
        text.push_str(&self.suggestions());
        text
    }

    /// One column per engine, one row per part.
    fn components(&self) -> String {
        let present: Vec<_> = self.system.components.iter().filter(|component| component.header.is_some()).collect();
        let has = |name: &&str| present.iter().any(|component| component.plan.part(name) > Bytes::ZERO);
        let names = PARTS.into_iter().filter(has);
        let line = |name: &str, cell: &dyn Fn(&Component<'_>) -> String| {
            let cells: String = present.iter().map(|component| format!(" {:>14}", cell(component))).collect();
            format!("{name:<20}{cells}\n")
        };
        let mib = |bytes: Bytes| if bytes == Bytes::ZERO { "-".to_owned() } else { format!("{:.1}", bytes.as_mib()) };
        let mut text = line("MiB", &|component| component.label.clone());
        for name in names {
            text.push_str(&line(name, &|component| mib(component.plan.part(name))));
        }
        text.push_str(&line("total", &|component| mib(component.plan.total())));
        text.push_str(&line(LENT, &|component| mib(component.header.and_then(lent).unwrap_or_default())));
        text.push_str(&line("context x parallel", &|component| {
            format!("{} x {}", component.settings.context_tokens, component.settings.parallel)
        }));
        for component in &present {
            for note in &component.plan.notes {
                text.push_str(&format!("note: {}: {note}\n", component.label));
            }
        }
        text.push('\n');
        text
    }

    fn verdict(&self) -> String {
        let (hybrid, local) = self.system.totals();
        let budget = self.system.limits.budget;
        let verdict = |total: Bytes| match total <= budget {
            true => format!("{:>10} all at once, {} are left", total.to_string(), budget.less(total)),
            false => format!(
                "{:>10} all at once, {} too much: not all at the same time",
                total.to_string(),
                total.less(budget)
            ),
        };
        format!("hybrid     {}\nall local  {}\n\n", verdict(hybrid), verdict(local))
    }

    fn suggestions(&self) -> String {
        let scenarios = self.system.scenarios();
        let (_, local) = self.system.totals();
        if scenarios.iter().all(Scenario::fits) && local <= self.system.limits.budget {
            return String::new();
        }
        let mut all: Vec<_> =
            (0..self.system.components.len()).flat_map(|index| self.system.suggestions(EngineId(index))).collect();
        all.sort_by_key(|suggestion| std::cmp::Reverse(suggestion.saves));
        let mut text = String::from("what would save memory\n");
        for suggestion in all.iter().take(12) {
            let saves = suggestion.saves.to_string();
            text.push_str(&format!("  {saves:>9}  {}: {}\n", suggestion.label, suggestion.change));
        }
        if self.system.limits.strategy != sarai_plan::Strategy::EvictLru {
            text.push_str("  or memory.strategy: evict_lru, which unloads idle models to make room\n");
        }
        text
    }

    fn body(&self) -> Value {
        let (hybrid, local) = self.system.totals();
        let component = |(index, component): (usize, &Component<'_>)| {
            let suggestions = self.system.suggestions(EngineId(index));
            let suggestion = |s: &sarai_plan::system::Suggestion| json!({ "change": s.change, "saves_bytes": s.saves });
            json!({
                "models": component.label, "present": component.header.is_some(), "parts": component.plan.parts,
                "total_bytes": component.plan.total(), "lent_bytes": component.header.and_then(lent), "context_tokens": component.settings.context_tokens,
                "parallel": component.settings.parallel, "notes": component.plan.notes,
                "suggestions": suggestions.iter().map(suggestion).collect::<Vec<_>>(),
            })
        };
        json!({
            "budget_bytes": self.system.limits.budget, "max_ram_bytes": self.max_ram, "machine_bytes": self.machine,
            "strategy": self.system.limits.strategy.name(), "server_bytes": self.system.server, "validator_bytes": FORM_BYTES,
            "components": self.system.components.iter().enumerate().map(component).collect::<Vec<_>>(),
            "hybrid_bytes": hybrid, "all_local_bytes": local, "missing": self.missing,
            "scenarios": self.system.scenarios().iter().map(scenario_body).collect::<Vec<_>>(),
        })
    }
}

fn scenario_text(scenario: &Scenario) -> String {
    let verdict = if scenario.fits() { "every model is answered" } else { "NOT every model is answered" };
    let mut text = format!("{}: {verdict}; {} at the most\n", scenario.name, scenario.peak);
    for outcome in &scenario.outcomes {
        let who = match &outcome.answers {
            Answers::Remote(host) => format!("answered by {host}"),
            Answers::Local(label) => format!("answered here, by the worker of {label}"),
            Answers::Nobody(reason) => format!("error 503: {reason}"),
        };
        let evicted = match outcome.evicted.is_empty() {
            true => String::new(),
            false => format!(", after {} went", outcome.evicted.join(" and ")),
        };
        text.push_str(&format!("  {:<12} {who}{evicted}\n", outcome.model));
    }
    let resident: Vec<_> = scenario.resident.iter().map(|(label, bytes)| format!("{label} {bytes}")).collect();
    let resident = if resident.is_empty() { "nothing".to_owned() } else { resident.join(", ") };
    text.push_str(&format!("  resident then: {resident}\n\n"));
    text
}

fn scenario_body(scenario: &Scenario) -> Value {
    let outcome = |outcome: &sarai_plan::system::Outcome| {
        let (by, error) = match &outcome.answers {
            Answers::Remote(by) | Answers::Local(by) => (Some(by), None),
            Answers::Nobody(reason) => (None, Some(reason)),
        };
        json!({ "model": outcome.model, "answered_by": by, "error": error, "evicted": outcome.evicted })
    };
    let resident = |(label, bytes): &(String, Bytes)| json!({ "models": label, "claimed_bytes": bytes });
    json!({
        "name": scenario.name, "fits": scenario.fits(), "peak_bytes": scenario.peak,
        "outcomes": scenario.outcomes.iter().map(outcome).collect::<Vec<_>>(),
        "resident": scenario.resident.iter().map(resident).collect::<Vec<_>>(),
    })
}
