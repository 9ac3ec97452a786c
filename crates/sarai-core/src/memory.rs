//! The words of memory that cross crates: parts of a plan, and why a load was refused.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

/// Type of the elements of a KV cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvType {
    /// Two bytes per element.
    #[default]
    F16,
    /// 34 bytes per 32 elements.
    Q8_0,
    /// 18 bytes per 32 elements.
    Q4_0,
}

impl KvType {
    /// All types, the largest first.
    pub const ALL: [Self; 3] = [Self::F16, Self::Q8_0, Self::Q4_0];

    /// Its name, as ggml spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
        }
    }

    /// Bytes of a row of so many elements.
    #[must_use]
    pub const fn row(self, elements: u64) -> Bytes {
        match self {
            Self::F16 => Bytes(elements * 2),
            Self::Q8_0 => Bytes(elements.div_ceil(32) * 34),
            Self::Q4_0 => Bytes(elements.div_ceil(32) * 18),
        }
    }
}

/// How long a model stays resident while nobody uses it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeepAlive {
    /// Until its place is needed.
    #[default]
    Forever,
    /// So many milliseconds after its last use; zero unloads it at once.
    For(u64),
}

/// What llama.cpp allocated for a model and its context, by its own account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineMemory {
    /// Tensors that are computed with where the file has them.
    pub weights: Bytes,
    /// Tensors that were copied into another layout.
    pub repacked: Bytes,
    /// KV cache and recurrent state.
    pub context: Bytes,
    /// Scratch of one step.
    pub compute: Bytes,
}

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
    /// Whether it may go to make room.
    pub evictable: bool,
}

/// A load that the ledger did not admit, with all that a person needs to change that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The model that was wanted.
    pub model: String,
    /// The context that it was wanted with.
    pub context_tokens: u32,
    /// What it needs, part by part.
    pub needs: Vec<Part>,
    /// The budget as it stands.
    pub budget: Bytes,
    /// What the server itself holds of it.
    pub server: Bytes,
    /// What no claim holds.
    pub free: Bytes,
    /// Who holds the rest.
    pub held: Vec<Held>,
    /// The strategy, which says whether anybody may go.
    pub strategy: String,
    /// Set when it was the number of models that was exceeded, not the bytes.
    pub max_concurrent_llms: Option<usize>,
    /// Set when the budget has room and the machine has not: what it has left.
    pub available: Option<Bytes>,
}

impl Refusal {
    /// The sum of what the model needs.
    #[must_use]
    pub fn needed(&self) -> Bytes {
        self.needs.iter().map(|part| part.bytes).sum()
    }

    /// What would help, each a thing that somebody can do.
    #[must_use]
    pub fn remedies(&self) -> Vec<String> {
        let mut remedies = Vec::new();
        if let Some(limit) = self.max_concurrent_llms {
            remedies.push(format!("raise max_concurrent_llms above {limit}"));
        }
        let names: Vec<_> = self.held.iter().map(|held| format!("`{}`", held.model)).collect();
        if !names.is_empty() {
            remedies.push(format!("unload {}", names.join(" or ")));
        }
        if self.held.iter().any(|held| held.evictable) && self.strategy != "evict_lru" {
            remedies.push("set memory.strategy to evict_lru".to_owned());
        }
        if self.max_concurrent_llms.is_some() {
            return remedies;
        }
        if self.available.is_some() {
            remedies.push("end other programs on this machine".to_owned());
        } else {
            let missing = self.needed().less(self.free);
            remedies.push(format!("raise max_ram_gb, if the machine has {missing} more"));
        }
        remedies.push(format!("lower context_length below {} or parallel", self.context_tokens));
        remedies.push("set kv_type: q8_0".to_owned());
        remedies.push("use a smaller file".to_owned());
        remedies
    }

    fn holders(&self) -> String {
        let busy = |held: &Held| if held.busy > 0 { format!(", busy with {}", held.busy) } else { String::new() };
        let names = self.held.iter().map(|held| format!("`{}` ({}{})", held.model, held.bytes, busy(held)));
        names.collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(limit) = self.max_concurrent_llms {
            write!(
                f,
                "`{}` would be one local LLM more than max_concurrent_llms {limit} allows; resident are {}",
                self.model,
                self.holders()
            )?;
        } else {
            let parts: Vec<_> = self.needs.iter().map(|part| format!("{} {}", part.name, part.bytes)).collect();
            write!(f, "`{}` needs {} ({}), ", self.model, self.needed(), parts.join(" + "))?;
            match self.available {
                Some(available) => write!(f, "the machine has {available} left for all")?,
                None => write!(f, "{} are free under the budget of {}", self.free, self.budget)?,
            }
            if !self.held.is_empty() {
                write!(f, "; held by {}", self.holders())?;
            }
        }
        write!(f, ": {}", self.remedies().join(", or "))
    }
}
