//! The words of memory that cross crates: parts of a plan, and why a load was refused.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

/// One row of a memory plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// What it is for: `weights`, `kv`, `compute`, …
    pub name: String,
    /// How much of it.
    pub bytes: Bytes,
}

/// Memory or a place that a resident model holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The models that share it.
    pub model: String,
    /// What is claimed for them.
    pub bytes: Bytes,
    /// Requests that it is answering now.
    pub busy: usize,
}

/// A load that the ledger did not admit, with all that a person needs to change that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The model that was wanted.
    pub model: String,
    /// What it needs, part by part.
    pub needs: Vec<Part>,
    /// The budget as it stands.
    pub budget: Bytes,
    /// What no claim holds.
    pub free: Bytes,
    /// Who holds the rest.
    pub held: Vec<Held>,
    /// Set when it was the number of models that was exceeded, not the bytes.
    pub max_concurrent_llms: Option<usize>,
}

impl Refusal {
    /// The sum of what the model needs.
    #[must_use]
    pub fn needed(&self) -> Bytes {
        self.needs.iter().map(|part| part.bytes).sum()
    }

    fn holders(&self) -> String {
        let names: Vec<_> = self.held.iter().map(|held| format!("`{}` ({})", held.model, held.bytes)).collect();
        names.join(", ")
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(limit) = self.max_concurrent_llms {
            return write!(
                f,
                "`{}` would be one local LLM more than max_concurrent_llms {limit} allows; resident are {}: raise \
                 max_concurrent_llms or unload one",
                self.model,
                self.holders()
            );
        }
        let parts: Vec<_> = self.needs.iter().map(|part| format!("{} {}", part.name, part.bytes)).collect();
        write!(
            f,
            "`{}` needs {} ({}), {} are free under the budget of {}",
            self.model,
            self.needed(),
            parts.join(" + "),
            self.free,
            self.budget
        )?;
        if self.held.is_empty() {
            write!(f, ": raise max_ram_gb, lower its context_length or parallel, or use a smaller file")
        } else {
            write!(f, "; held by {}: unload one of these, raise max_ram_gb, or lower context_length", self.holders())
        }
    }
}
