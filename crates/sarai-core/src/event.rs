//! What streams from a backend to the client.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// One step of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// More text: whole characters, never empty.
    Text(String),
    /// The answer broke off, and goes on from the same character elsewhere.
    Resumed {
        /// Who goes on: `model@place`.
        by: String,
        /// Why the former one did not.
        reason: String,
        /// What its part of the answer lacks.
        degraded: Vec<String>,
    },
    /// The clean end; nothing follows.
    Done {
        /// Why the answer ended.
        finish: FinishReason,
        /// What it took in tokens.
        usage: Usage,
        /// What it took in time.
        timings: Timings,
    },
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended it, or a stop text came up.
    Stop,
    /// `max_tokens` or the context was used up.
    Length,
}

impl FinishReason {
    /// The word that both APIs use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// Tokens in and out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the rendered prompt.
    pub prompt_tokens: u32,
    /// Of these, tokens that were still in the KV cache and were not computed again.
    pub cached_tokens: u32,
    /// Tokens generated, the one that ended the answer included.
    pub completion_tokens: u32,
}

/// Where the time of a request went.
///
/// # Units
/// Serialised as whole microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// Waiting for a permit and a slot.
    #[serde(with = "micros")]
    pub queue: Duration,
    /// Waiting for the model to be loaded; zero when it was resident.
    #[serde(with = "micros")]
    pub load: Duration,
    /// Computing the prompt.
    #[serde(with = "micros")]
    pub prefill: Duration,
    /// Generating the answer.
    #[serde(with = "micros")]
    pub decode: Duration,
}

mod micros {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(u64::try_from(value.as_micros()).unwrap_or(u64::MAX))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_micros)
    }
}
