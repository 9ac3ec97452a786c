//! What an engine is loaded from, and what is known of it before anything was measured.

use std::sync::Arc;

use sarai_core::{Bytes, Purpose};
use sarai_plan::Header;
use sarai_plan::estimate::{Companions, Plan, Settings};
use sarai_plan::ledger::{Measured, Millis};
use sha2::{Digest, Sha256};

use crate::config::Process;
use crate::model_file::{ModelFile, hex};

/// What an engine is loaded from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A file, by a worker.
    File(Arc<ModelFile>),
    /// A command.
    Process(Arc<Process>),
}

/// What a command takes to start, until that was measured.
const START: Millis = 5_000;

impl Source {
    /// Under which what was learned is kept.
    pub fn identity(&self) -> String {
        match self {
            Self::File(file) => file.identity.clone(),
            Self::Process(process) => hex(&Sha256::digest(process.command.join("\0"))),
        }
    }

    /// The formula's plan, or what was declared.
    pub fn plan(&self, settings: Settings) -> Plan {
        match self {
            Self::File(file) => Plan::of(&file.header, settings, file.with()),
            Self::Process(process) => Plan::declared(process.memory),
        }
    }

    /// The longest context that it was trained for, or is configured with.
    pub fn longest_context(&self, settings: Settings) -> Option<u32> {
        let Self::File(file) = self else { return Some(settings.context_tokens) };
        let trained = file.header.arch_size("context_length").and_then(|n| u32::try_from(n).ok()).filter(|&n| n > 0);
        match file.purpose() {
            Purpose::Answers => trained.map(|most| most.max(settings.context_tokens)),
            // Positions beyond have no meaning to it.
            Purpose::Vectors | Purpose::Scores => trained,
        }
    }

    /// Whether it goes on with text.
    pub fn is_for_answers(&self) -> bool {
        match self {
            Self::File(file) => file.purpose() == Purpose::Answers,
            Self::Process(_) => true,
        }
    }

    /// What of a measure counts against the plan: of a file, the pages that only the worker has.
    pub fn counted(&self, measured: Measured) -> Bytes {
        match self {
            Self::File(_) => measured.anonymous,
            Self::Process(_) => measured.total(),
        }
    }

    /// The file, if it is one.
    pub fn file(&self) -> Option<&ModelFile> {
        match self {
            Self::File(file) => Some(file),
            Self::Process(_) => None,
        }
    }

    /// A file's header.
    pub fn header(&self) -> Option<&Header> {
        match self {
            Self::File(file) => Some(&file.header),
            Self::Process(_) => None,
        }
    }

    /// The headers of what a file is loaded with.
    pub fn with(&self) -> Companions<&Header> {
        match self {
            Self::File(file) => file.with(),
            Self::Process(_) => Companions::default(),
        }
    }

    /// For people.
    pub fn name(&self) -> String {
        match self {
            Self::File(file) => file.path.display().to_string(),
            Self::Process(process) => process.command.join(" "),
        }
    }

    /// A guess of what a load takes.
    pub fn reload(&self) -> Millis {
        match self {
            Self::File(file) => {
                let with = file.companions.projector.iter().chain(&file.companions.draft);
                300 + (file.size + with.map(|file| file.size).sum::<u64>()) / 500_000
            }
            Self::Process(_) => START,
        }
    }
}
