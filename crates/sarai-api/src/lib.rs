//! The wire formats: OpenAI's and Ollama's JSON, to and from the core types.
//!
//! Pure conversions: no I/O, no clock (the caller hands in ids and times), no HTTP status. What a field may
//! hold is checked here, and an error names the field, the value and what would be right.

mod check;
mod json;
pub mod ollama;
pub mod openai;
mod sampling;

use sarai_core::GenerateRequest;

/// How the client wants its answer delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Step by step, or whole.
    pub stream: bool,
    /// OpenAI's `stream_options.include_usage`.
    pub include_usage: bool,
}

/// A parsed request: which model, what to generate, and how to deliver it.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed {
    /// The name as the client wrote it.
    pub model: String,
    /// What to generate.
    pub request: GenerateRequest,
    /// How to deliver it.
    pub delivery: Delivery,
    /// Options that are not followed; the answer says so.
    pub ignored: Vec<String>,
}

/// Who answered, and what was lost on the way; part of every answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// `model@place`.
    pub by: String,
    /// Why the first choice did not answer, if it did not.
    pub fallback_reason: Option<String>,
    /// Request options that the deployment cannot follow.
    pub degraded: Vec<String>,
}
