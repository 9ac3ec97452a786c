//! A model as meant: its name, the places that serve it, and what happens when one does not.

use sarai_core::{Deadlines, Sampling};
use sarai_plan::ledger::EngineId;

/// What a model is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelRole {
    /// Answers.
    Chat,
    /// Makes vectors.
    Embedding,
    /// Chooses the model for `auto`.
    Router,
}

/// A public model.
#[derive(Clone, Debug)]
pub struct Model {
    /// Public name.
    pub name: String,
    /// Other names for it.
    pub aliases: Vec<String>,
    /// What it is for.
    pub role: ModelRole,
    /// Places that serve it, in the order in which they are tried.
    pub deployments: Vec<Deployment>,
    /// What a request leaves open.
    pub sampling: Sampling,
    /// Per phase.
    pub deadlines: Deadlines,
    /// Whether the file says how long a gap may be; else it is learned.
    pub gap_is_set: bool,
    /// Models that answer when no deployment of this one does.
    pub fallback_models: Vec<String>,
    /// Who may go on with an answer that broke off.
    pub resume: Resume,
}

/// Who may go on with an answer that broke off after its first token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// Deployments of the same model.
    #[default]
    SameModel,
    /// `fallback_models` too.
    Any,
    /// Nobody: it ends with an error.
    Never,
}

impl Resume {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::SameModel, Self::Any, Self::Never];

    /// The word in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SameModel => "same_model",
            Self::Any => "any",
            Self::Never => "never",
        }
    }
}

/// One place that serves a model.
#[derive(Clone, Debug)]
pub enum Deployment {
    /// A model on another machine.
    Remote(Remote),
    /// A worker of this server.
    Local {
        /// Which one.
        engine: EngineId,
        /// Tokens that this model may use of its sequence; the engine's may be longer for another model.
        context_tokens: u32,
    },
}

/// Which API a host speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Api {
    /// Ollama's.
    Ollama,
    /// OpenAI's.
    OpenAi,
}

impl Api {
    /// The backend's name in the configuration.
    pub const fn backend(self) -> &'static str {
        match self {
            Self::Ollama => "ollama_http",
            Self::OpenAi => "openai_http",
        }
    }
}

/// A model on a host.
#[derive(Clone, PartialEq, Eq)]
pub struct Remote {
    /// Which API the host speaks.
    pub api: Api,
    /// Base URL without a trailing slash; of OpenAI's API with its `/v1`.
    pub url: String,
    /// The model's name there.
    pub model_name: String,
    /// `num_ctx`, if the configuration sets it.
    pub context_tokens: Option<u32>,
    /// Sent as a bearer token.
    pub api_key: Option<String>,
    /// Requests that the host answers for us at the same time; further ones wait here.
    pub max_outstanding: usize,
}

impl std::fmt::Debug for Remote {
    /// Without the key: it must not come into a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} on {} ({})", self.model_name, self.url, self.api.backend())
    }
}
