//! What the pool sees: memory of its workers and of the machine, and dry runs while nobody asks for anything.

use std::sync::Arc;
use std::time::Duration;

use sarai_core::{Bytes, EngineMemory};
use sarai_plan::estimate::Settings;
use sarai_plan::ledger::{Measured, Observation};
use sarai_plan::{EngineId, PoolEvent};

use super::Message;
use super::loan::Borrower;
use super::owner::{Owner, budget, load_spec};
use crate::machine;
use crate::machine::pressure::Reading;
use crate::machine::process::{self, Memory};
use crate::source::Source;
use crate::supervise::probe::probe;
use crate::supervise::spare;

/// What the server holds at least, so that its first seconds do not look like room.
const SERVER_AT_LEAST: Bytes = Bytes::mib(24);
/// A dry run is made once nobody asked for anything for so long.
const PROBE_AFTER: Duration = Duration::from_secs(5);

/// What was measured at one moment.
#[derive(Debug)]
pub(super) struct Seen {
    server: Bytes,
    available: Bytes,
    budget: Bytes,
    pressure: Reading,
    /// Workers, and the context that they had when they were to be measured.
    workers: Vec<(EngineId, u32, u32, Memory)>,
}

impl Owner {
    /// Has everything measured, aside; one measure at a time.
    pub(super) fn observe(&mut self) {
        if std::mem::replace(&mut self.observing, true) {
            return;
        }
        let workers: Vec<_> = self.live().collect();
        let catalog = Arc::clone(&self.catalog);
        let (groups, pool, memory) = (self.groups.clone(), self.pool.clone(), self.memory);
        let planner = self.planner.clone();
        tokio::task::spawn_blocking(move || {
            let measured = |(id, pid, context)| Some((id, pid, context, catalog.measure(id, pid, process::measure)?));
            pool.send(Message::Observed(Box::new(Seen {
                server: process::measure(std::process::id()).unwrap_or_default().total() + spare::TAKES,
                available: machine::free(),
                budget: budget(memory),
                pressure: Reading::now(&groups),
                workers: workers.into_iter().filter_map(measured).collect(),
            })));
            planner.flush();
        });
    }

    /// Processes that live, with the context they have; those that load too.
    fn live(&self) -> impl Iterator<Item = (EngineId, u32, u32)> + '_ {
        let slots = self.workers.iter().enumerate();
        slots.filter_map(|(index, slot)| Some((EngineId(index), slot.pid?, slot.size.context_tokens)))
    }

    pub(super) fn observed(&mut self, seen: &Seen) {
        self.observing = false;
        self.server = seen.server;
        // A worker that came since, or whose context has another size now, was not measured.
        let current: Vec<_> = self.live().collect();
        let workers = seen.workers.iter().filter(|(id, pid, context, _)| current.contains(&(*id, *pid, *context)));
        let workers: Vec<_> = workers.map(|&(id, _, _, memory)| (id, measured(memory))).collect();
        for &(engine, measured) in &workers {
            self.remember(engine, measured);
        }
        self.pressure = seen.pressure;
        let short = seen.pressure.is_short(self.ledger.is_pressed());
        if short != self.ledger.is_pressed() {
            tracing::warn!(short, pressure = ?self.pressure, "memory pressure");
        }
        self.apply(PoolEvent::Observed(Observation {
            server: self.server_takes(),
            available: seen.available,
            budget: seen.budget,
            workers,
        }));
        self.apply(PoolEvent::Pressure(short));
        self.end_what_hangs();
    }

    /// Nothing is loaded, or refused, on figures of a second ago; and all figures are of one moment.
    pub(super) fn look_again(&mut self) {
        let glance = |(id, pid, _)| Some((id, measured(self.catalog.measure(id, pid, process::glance)?)));
        let workers = self.live().filter_map(glance).collect();
        let (server, available) = (self.server_takes(), machine::free());
        self.apply(PoolEvent::Observed(Observation {
            server,
            available,
            budget: self.ledger.limits().budget,
            workers,
        }));
    }

    fn server_takes(&self) -> Bytes {
        let probe = self.probing.map_or(Bytes::ZERO, |engine| self.probe_takes(engine));
        self.server.max(SERVER_AT_LEAST) + probe
    }

    fn remember(&mut self, engine: EngineId, measured: Measured) {
        // What was lent, a moment ago too, is no part of what is learned.
        let loan = self.loans.lately(Borrower::Forms(engine));
        let measured = Measured { anonymous: measured.anonymous.less(loan), ..measured };
        let slot = &mut self.workers[engine.0];
        let Some(source) = slot.source.clone() else { return };
        slot.most = slot.most.max(source.counted(measured));
        let settings = self.settings_of(engine);
        self.planner.measured(&source, settings, measured);
    }

    /// The settings that an engine's worker has now.
    pub(super) fn settings_of(&self, engine: EngineId) -> Settings {
        let context_tokens = self.workers[engine.0].size.context_tokens;
        Settings { context_tokens, ..self.catalog.engines[engine.0].settings }
    }

    /// What a dry run takes: the tables of the vocabulary and a process.
    fn probe_takes(&self, engine: EngineId) -> Bytes {
        let Ok(file) = self.catalog.file(engine).map(Source::File) else { return Bytes::ZERO };
        let plan = self.planner.plan(&file, self.catalog.engines[engine.0].settings);
        // While it reads, the tokenizer is there twice.
        plan.part("vocabulary") * 2 + plan.part("process") + plan.part("binary")
    }

    /// Makes the dry run of one engine that has none yet, while nobody asks for anything and there is room.
    pub(super) fn probe_if_idle(&mut self) {
        let idle = self.last_asked.elapsed() >= PROBE_AFTER && !self.is_busy();
        if self.probing.is_some() || !idle || self.stopping.is_some() {
            return;
        }
        for index in 0..self.catalog.engines.len() {
            let engine = EngineId(index);
            let config = &self.catalog.engines[index];
            let Ok(file @ Source::File(_)) = self.catalog.source(engine) else { continue };
            let known = self.planner.is_probed(&file, config.settings) || self.unprobable.contains(&engine);
            if known || self.probe_takes(engine) > self.ledger.free() {
                continue;
            }
            let spec = load_spec(config, config.settings, 1, file.file());
            let (executable, pool) = (self.executable.clone(), self.pool.clone());
            // Booked before it begins, like any load.
            self.probing = Some(engine);
            self.look_again();
            tokio::spawn(async move {
                let outcome = probe(&executable, spec).await.map(|info| info.memory);
                pool.send(Message::Probed(engine, outcome));
            });
            return;
        }
    }

    pub(super) fn probed(&mut self, engine: EngineId, outcome: Result<EngineMemory, String>) {
        self.probing = None;
        match (outcome, self.catalog.source(engine)) {
            (Ok(memory), Ok(file)) => self.planner.probed(&file, self.catalog.engines[engine.0].settings, memory),
            (Err(reason), _) => {
                tracing::warn!(model = self.label(engine), reason, "the dry run failed");
                self.unprobable.insert(engine);
            }
            (Ok(_), Err(_)) => {}
        }
        self.look_again();
    }
}

fn measured(memory: Memory) -> Measured {
    Measured { anonymous: memory.anonymous, file: memory.file }
}
