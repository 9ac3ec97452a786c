//! The configuration: as written (`file`), the environment over it (`env`), and as meant (`resolve`, `model`, `engine`).
//!
//! All mistakes are reported at once, each with its line, its key and what would fix it. A file that does
//! not exist or a host that does not answer is no mistake: that is a state of the running server.

mod access;
mod engine;
pub mod env;
mod file;
mod hosts;
mod model;
mod process;
pub mod resolve;
mod tree;

use std::fmt;
use std::path::{Path, PathBuf};

pub use access::Access;
pub use engine::Engine;
pub use env::Environment;
pub use model::{Deployment, Model, ModelRole, PROCESS, Remote, Resume, backend_name};
pub use process::{PORT, Process};
pub use resolve::{Config, MediaConfig, MemoryConfig, ServerConfig};

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Line in the file, from 1; none for the environment.
    pub line: Option<usize>,
    /// The key, such as `models.solar.backend`, or the variable.
    pub key: String,
    /// What is wrong, and the fix.
    pub message: String,
}

/// All mistakes of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistakes {
    /// The file that was read.
    pub file: PathBuf,
    /// In the order of the file; never empty.
    pub all: Vec<Mistake>,
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for mistake in &self.all {
            match mistake.line {
                Some(line) => writeln!(f, "{}:{line}: {}: {}", self.file.display(), mistake.key, mistake.message)?,
                None => writeln!(f, "{}: {}", mistake.key, mistake.message)?,
            }
        }
        let s = if self.all.len() == 1 { "" } else { "s" };
        write!(f, "{} mistake{s} in the configuration", self.all.len())
    }
}

impl std::error::Error for Mistakes {}

/// Reads, checks and resolves a configuration file.
///
/// # Errors
/// Every mistake in it, and in the variables that override it.
pub fn load(path: &Path, environment: &Environment) -> Result<Config, Mistakes> {
    let text = std::fs::read_to_string(path).map_err(|error| Mistakes {
        file: path.to_owned(),
        all: vec![Mistake {
            line: None,
            key: path.display().to_string(),
            message: format!("cannot be read ({error}): name a configuration with --config FILE"),
        }],
    })?;
    parse(&text, path, environment)
}

/// As [`load`], of text; relative GGUF paths start at the folder of `path`.
///
/// # Errors
/// Every mistake.
pub fn parse(text: &str, path: &Path, environment: &Environment) -> Result<Config, Mistakes> {
    let mut mistakes = Vec::new();
    let written = file::read(text, environment, &mut mistakes);
    let folder = path.parent().unwrap_or(Path::new("."));
    let config = written.map(|written| resolve::resolve(written, folder, environment, &mut mistakes));
    match config {
        Some(config) if mistakes.is_empty() => Ok(config),
        _ => {
            mistakes.sort_by_key(|mistake| mistake.line.unwrap_or(usize::MAX));
            Err(Mistakes { file: path.to_owned(), all: mistakes })
        }
    }
}
