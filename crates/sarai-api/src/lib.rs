//! The wire formats: OpenAI's and Ollama's JSON, to and from the core types.
//!
//! Pure conversions: no I/O, no clock (the caller hands in ids and times), no HTTP status. What a field may
//! hold is checked here, and an error names the field, the value and what would be right.

mod check;
pub mod embed;
mod extras;
mod json;
pub mod listed;
mod logprobs;
mod media;
pub mod ollama;
pub mod openai;
mod samplers;
mod sampling;
pub mod schema;
pub mod tools;
pub mod translate;
pub mod validate;
mod whole;

use sarai_core::{Event, Extra, FinishReason, GenerateRequest, Lane, Timings, TokenLogprob, ToolCall, Usage};

/// How the client wants its answer delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Step by step, or whole.
    pub stream: bool,
    /// OpenAI's `stream_options.include_usage`.
    pub include_usage: bool,
}

/// One time that an answer broke off and went on elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resumed {
    /// Who went on: `model@place`.
    pub by: String,
    /// Why the former one did not.
    pub reason: String,
}

/// A parsed request: which model, what to generate, and how to deliver it.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed {
    /// The name as the client wrote it.
    pub model: String,
    /// What to generate.
    pub request: GenerateRequest,
    /// Further answers that are wanted beside it.
    pub others: Vec<GenerateRequest>,
    /// How to deliver it.
    pub delivery: Delivery,
}

impl Parsed {
    /// In the lane that stands beside the body, if one does.
    #[must_use]
    pub fn in_lane(mut self, lane: Option<Lane>) -> Self {
        if let Some(lane) = lane {
            [&mut self.request].into_iter().chain(&mut self.others).for_each(|request| request.lane = lane);
        }
        self
    }
}

/// What one line of a remote host's stream says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RemoteLine {
    /// A step of the answer: [`Event::Text`] or [`Event::Extra`].
    pub step: Option<Event>,
    /// The end, after that step.
    pub end: Option<Event>,
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Whole {
    /// The text.
    pub text: String,
    /// Reasoning that is no part of it.
    pub reasoning: String,
    /// Tools that are called.
    pub tool_calls: Vec<ToolCall>,
    /// How likely its tokens were, where that was asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// Why it ended.
    pub finish: FinishReason,
    /// Tokens.
    pub usage: Usage,
    /// Time.
    pub timings: Timings,
    /// What a host said beyond text.
    pub extra: Option<Box<Extra>>,
    /// Tokens of all that was said, where that was asked for.
    pub context: Vec<i32>,
}

/// Who answered, and what was lost on the way; part of every answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// `model@place`.
    pub by: String,
    /// Whether that is a worker of this server.
    pub is_local: bool,
    /// Why the first choice did not answer, if it did not.
    pub fallback_reason: Option<String>,
    /// What the answer lacks: request options that the deployment cannot follow, or `model:NAME` where another model
    /// answers.
    pub degraded: Vec<String>,
    /// Where it broke off and went on, in order.
    pub resumed: Vec<Resumed>,
}

impl Served {
    /// Whether some of it is another model's than the one that was asked: its tokens mean nothing to that.
    #[must_use]
    pub fn is_of_another_model(&self) -> bool {
        self.degraded.iter().any(|lost| lost.starts_with("model:"))
    }

    /// Notes that somebody else went on.
    pub fn resume(&mut self, by: String, reason: String, degraded: Vec<String>) {
        for lost in degraded {
            if !self.degraded.contains(&lost) {
                self.degraded.push(lost);
            }
        }
        self.resumed.push(Resumed { by, reason });
    }
}
