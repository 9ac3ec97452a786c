//! What a worker runs: a file or a command, its sizes, and how long it stays.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sarai_core::KeepAlive;
use sarai_core::frame::Park;
use sarai_plan::{Companions, Settings};

use super::process::Process;

/// A GGUF file and how it is loaded; models that name the same file share it.
#[derive(Clone, Debug, PartialEq)]
pub struct Engine {
    /// The models that share it.
    pub label: String,
    /// The GGUF file, or the program.
    pub path: PathBuf,
    /// What runs, if it is a command and not a worker of ours.
    pub process: Option<Arc<Process>>,
    /// The projector that the model sees or hears through.
    pub projector: Option<PathBuf>,
    /// A smaller model that drafts for it.
    pub draft: Option<PathBuf>,
    /// Sizes; sequences of sharing models add up, the longest context counts.
    pub settings: Settings,
    /// Threads at most; all cores if not set.
    pub threads: Option<u32>,
    /// Whether it counts against `max_concurrent_llms`.
    pub is_llm: bool,
    /// Whether it may go to make room.
    pub evictable: bool,
    /// Loaded at start.
    pub resident: bool,
    /// How long it stays while nobody uses it; the longest of the sharing models.
    pub keep_alive: KeepAlive,
    /// The longest of the sharing models.
    pub load_deadline: Duration,
    /// Where its worker keeps what it computed when it goes, if it does.
    pub park: Option<Park>,
}

impl Engine {
    /// Whether both load the same.
    #[must_use]
    pub fn is_same_place(&self, other: &Self) -> bool {
        match (&self.process, &other.process) {
            (None, None) => is_same_file(&self.path, &other.path),
            (Some(_), Some(_)) => self.label == other.label,
            _ => false,
        }
    }

    /// What its file is loaded with.
    #[must_use]
    pub fn with(&self) -> Companions<&Path> {
        Companions { projector: self.projector.as_deref(), draft: self.draft.as_deref() }
    }

    /// Whether a model of this file can be served by it: one without a projector, or a draft model, can by any, the others need their
    /// own.
    #[must_use]
    pub fn may_share(&self, path: &Path, with: Companions<&Path>, deterministic: bool) -> bool {
        let is_same = |own: &Option<PathBuf>, other: Option<&Path>| match (own, other) {
            (Some(own), Some(other)) => is_same_file(own, other),
            _ => true,
        };
        let is_same_with = is_same(&self.projector, with.projector) && is_same(&self.draft, with.draft);
        let is_same_way = self.settings.deterministic == deterministic;
        self.process.is_none() && is_same_file(&self.path, path) && is_same_with && is_same_way
    }

    /// Whether a worker that was loaded by the one serves the other as well.
    #[must_use]
    pub fn loads_like(&self, other: &Self) -> bool {
        (&self.path, self.with(), self.settings, self.threads, &self.process)
            == (&other.path, other.with(), other.settings, other.threads, &other.process)
            && self.evictable >= other.evictable
    }

    /// No model uses it any more: it goes as soon as it is idle, and does not come back.
    pub fn retire(&mut self) {
        self.resident = false;
        self.evictable = true;
        self.keep_alive = KeepAlive::For(0);
    }
}

/// A name for what belongs to a file as it is computed there, told from files of the same name elsewhere.
pub(super) fn folder_name(path: &Path, with: Companions<&Path>, deterministic: bool) -> String {
    let mut hasher = DefaultHasher::new();
    path.hash(&mut hasher);
    if deterministic {
        deterministic.hash(&mut hasher);
    }
    if let Some(projector) = with.projector {
        projector.hash(&mut hasher);
    }
    if let Some(draft) = with.draft {
        ("draft", draft).hash(&mut hasher);
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    format!("{stem}-{:08x}", hasher.finish() & 0xffff_ffff)
}

/// Whether two paths name one file, through links too.
pub(super) fn is_same_file(a: &Path, b: &Path) -> bool {
    a == b || a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}
