//! Everything that can go wrong with a request, by cause.
//!
//! Which HTTP status a cause becomes is decided in one place, the server's `http/error.rs`.

use serde::{Deserialize, Serialize};
use thiserror::Error as ThisError;

use crate::memory::Refusal;

/// A phase of a request that has a deadline of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Waiting for a permit or a slot.
    Queue,
    /// Loading the model.
    Load,
    /// Waiting for the first token.
    FirstToken,
    /// Waiting for the next token.
    Gap,
    /// All of it, in the time that the client or the configuration gives a request.
    Request,
}

impl Phase {
    /// The key under `deadlines:` that sets it.
    #[must_use]
    pub const fn config_key(self) -> &'static str {
        match self {
            Self::Queue => "queue_seconds",
            Self::Load => "load_seconds",
            Self::FirstToken => "first_token_seconds",
            Self::Gap => "gap_seconds",
            Self::Request => "request_seconds",
        }
    }
}

/// What a remote host did instead of answering.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ThisError)]
#[serde(rename_all = "snake_case")]
pub enum RemoteCause {
    /// Nothing listens there, or the name does not resolve.
    #[error("cannot be reached ({0})")]
    Unreachable(String),
    /// It does not have the model.
    #[error("does not have the model `{0}`")]
    ModelMissing(String),
    /// It answered with an HTTP error.
    #[error("answered with status {status}: {message}")]
    Status {
        /// The HTTP status.
        status: u16,
        /// What it said, shortened.
        message: String,
        /// When it wants to be asked again, in seconds.
        #[serde(default)]
        retry_after: Option<u64>,
    },
    /// The prompt is longer than its context.
    #[error(
        "says that the prompt is too long for it ({0}): shorten the prompt, or give the model a longer context there"
    )]
    TooLong(String),
    /// Its model, or what stands before it, does not do what was asked for; another one may.
    #[error("does not do what was asked for: {0}")]
    Unable(String),
    /// It reported an error inside a stream.
    #[error("reported an error: {0}")]
    Reported(String),
    /// What it sent is not its API.
    #[error("sent what is not an answer: {0}")]
    Garbled(String),
    /// It took the request, and closed the connection without a word: a connection that was kept alive may have ended
    /// just then.
    #[error("closed the connection without an answer")]
    Unanswered,
    /// The stream ended before its end mark.
    #[error("cut the stream before its end")]
    Cut,
    /// It gave no token within twice its usual time, and another place was faster.
    #[error("gave no token within {seconds} s, and another place was faster")]
    Late {
        /// How long it was waited for.
        seconds: u64,
    },
    /// It sent nothing before the deadline.
    #[error("sent nothing for {seconds} s (deadline `{key}`)", key = phase.config_key())]
    Silent {
        /// The phase whose deadline passed.
        phase: Phase,
        /// The deadline.
        seconds: u64,
    },
}

impl RemoteCause {
    /// Whether it is about this request, and no fault of the host.
    #[must_use]
    pub const fn is_of_the_request(&self) -> bool {
        matches!(self, Self::TooLong(_) | Self::Unable(_))
    }

    /// A short fixed word for headers, logs and metrics.
    #[must_use]
    pub const fn slug(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "unreachable",
            Self::ModelMissing(_) => "model_missing",
            Self::Status { .. } => "bad_status",
            Self::TooLong(_) => "context_length_exceeded",
            Self::Unable(_) => "unsupported",
            Self::Reported(_) => "reported_error",
            Self::Garbled(_) => "garbled",
            Self::Unanswered | Self::Cut => "cut",
            Self::Late { .. } => "late",
            Self::Silent { .. } => "silent",
        }
    }
}

/// One deployment that was tried in vain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// `model@place`.
    pub deployment: String,
    /// Why it did not answer.
    pub error: Box<Error>,
}

/// A request that cannot be answered, by cause.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ThisError)]
#[serde(rename_all = "snake_case")]
pub enum Error {
    /// The request itself is wrong.
    #[error("{message}")]
    InvalidRequest {
        /// What is wrong and what would be right.
        message: String,
        /// The field, as the client wrote it.
        param: Option<String>,
    },
    /// The prompt does not fit the model's context.
    #[error(
        "the prompt has {prompt_tokens} tokens, which exceeds the available context size: the context of `{model}` holds \
         {context_tokens}, and an answer needs at least one: shorten the prompt or raise context_length"
    )]
    ContextOverflow {
        /// The model's name.
        model: String,
        /// Tokens of the rendered prompt.
        prompt_tokens: u32,
        /// Tokens that one sequence can hold.
        context_tokens: u32,
    },
    /// A text of which a vector is wanted does not fit the model's context.
    #[error(
        "the input length exceeds the context length: a text of {tokens} tokens is too large, the maximum input length of \
         `{model}` is {most} tokens: shorten it, or have it truncated"
    )]
    TextTooLong {
        /// The model's name.
        model: String,
        /// Tokens of the text.
        tokens: u32,
        /// Tokens that it may have.
        most: u32,
    },
    /// No model has this name.
    #[error("model '{name}' not found{}", suggestion(known))]
    UnknownModel {
        /// The name that was asked for.
        name: String,
        /// The names that exist.
        known: Vec<String>,
    },
    /// The client has none of the keys that the server asks for.
    #[error("no valid API key was sent: send one of server.api_keys as `Authorization: Bearer KEY`")]
    WrongKey,
    /// A web page of somewhere else asks.
    #[error("pages of `{origin}` may not ask: add it to server.cors_origins")]
    ForeignOrigin {
        /// Where the page is from.
        origin: String,
    },
    /// The body is larger than the server takes.
    #[error("the request body is larger than {limit_bytes} bytes: send less, or raise server.max_body_mb")]
    BodyTooLarge {
        /// The limit in bytes.
        limit_bytes: usize,
    },
    /// So much is under way that this request was shed.
    #[error("{in_flight} requests are in flight and {queued} wait: try again later, or raise server.max_queued")]
    Overloaded {
        /// Requests being answered.
        in_flight: usize,
        /// Requests waiting.
        queued: usize,
    },
    /// A phase took longer than its deadline.
    #[error("`{model}` took longer than {seconds} s (deadline `{key}`)", key = phase.config_key())]
    Deadline {
        /// The model's name.
        model: String,
        /// The phase.
        phase: Phase,
        /// The deadline.
        seconds: u64,
    },
    /// The ledger does not admit the load.
    #[error("{0}")]
    DoesNotFit(Box<Refusal>),
    /// The model cannot be served as it stands: no file, a broken file, too many crashes.
    #[error("`{model}` cannot be served: {reason}")]
    Unavailable {
        /// The model's name.
        model: String,
        /// Why, and what would fix it.
        reason: String,
    },
    /// The model cannot do what is asked, which only it could tell; another one may.
    #[error("\"{model}\" does not support {ability}: ask a model that does, or leave it out")]
    Unsupported {
        /// The model's name.
        model: String,
        /// In Ollama's word, and what of the request wants it.
        ability: String,
    },
    /// The worker process ended while it was needed.
    #[error("the worker of `{model}` ended unexpectedly ({detail}); it is started again for the next request")]
    WorkerDied {
        /// The model's name.
        model: String,
        /// Exit status and last words.
        detail: String,
    },
    /// No answer kept the schema.
    #[error(
        "`{model}` gave {answers} answers, and each broke its schema; the last one: {why}: ask for it in the prompt as well, or \
         simplify the schema"
    )]
    SchemaBroken {
        /// The model's name.
        model: String,
        /// How many answers.
        answers: u32,
        /// Where and how.
        why: String,
    },
    /// A remote host failed.
    #[error("host {host} {cause}")]
    Remote {
        /// The host's URL.
        host: String,
        /// What it did.
        cause: RemoteCause,
    },
    /// Every deployment of the model failed.
    #[error("no deployment of `{model}` could answer: {}", list(attempts))]
    AllFailed {
        /// The model's name.
        model: String,
        /// What was tried, in order.
        attempts: Vec<Attempt>,
    },
    /// The server is stopping.
    #[error("the server is shutting down: ask again when it is back")]
    ShuttingDown,
    /// A defect of ours.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    /// A request that names its field.
    #[must_use]
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self::InvalidRequest { message: message.into(), param: Some(param.to_owned()) }
    }

    /// The same error, under the name that the client knows the model by.
    #[must_use]
    pub fn of_model(mut self, name: &str) -> Self {
        match &mut self {
            Self::ContextOverflow { model, .. }
            | Self::TextTooLong { model, .. }
            | Self::Deadline { model, .. }
            | Self::Unavailable { model, .. }
            | Self::Unsupported { model, .. }
            | Self::SchemaBroken { model, .. }
            | Self::WorkerDied { model, .. } => name.clone_into(model),
            Self::DoesNotFit(refusal) => name.clone_into(&mut refusal.model),
            _ => {}
        }
        self
    }

    /// Whether another deployment may succeed where this one failed.
    #[must_use]
    pub const fn may_succeed_elsewhere(&self) -> bool {
        match self {
            Self::InvalidRequest { .. }
            | Self::UnknownModel { .. }
            | Self::WrongKey
            | Self::ForeignOrigin { .. }
            | Self::BodyTooLarge { .. }
            | Self::Overloaded { .. }
            | Self::AllFailed { .. }
            | Self::ShuttingDown => false,
            // The next deployment may have a longer context.
            Self::ContextOverflow { .. }
            | Self::TextTooLong { .. }
            | Self::Deadline { .. }
            | Self::DoesNotFit(_)
            | Self::Unavailable { .. }
            | Self::Unsupported { .. }
            | Self::WorkerDied { .. }
            | Self::SchemaBroken { .. }
            | Self::Remote { .. }
            | Self::Internal(_) => true,
        }
    }
}

fn suggestion(known: &[String]) -> String {
    if known.is_empty() {
        return ": add it under `models:`".to_owned();
    }
    let names: Vec<_> = known.iter().map(|name| format!("`{name}`")).collect();
    format!(": use one of {}", names.join(", "))
}

fn list(attempts: &[Attempt]) -> String {
    let lines: Vec<_> = attempts.iter().map(|attempt| format!("{}: {}", attempt.deployment, attempt.error)).collect();
    lines.join("; ")
}
