//! A model as meant: its name, the places that serve it, and what happens when one does not.

use percent_encoding::percent_decode_str;
use sarai_core::{Api, Deadlines, Sampling};
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
#[derive(Clone, Debug, PartialEq)]
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
    /// Whether the file says how long the first token may take; else it is learned.
    pub first_token_is_set: bool,
    /// Models that answer when no deployment of this one does.
    pub fallback_models: Vec<String>,
    /// Who may go on with an answer that broke off.
    pub resume: Resume,
}

impl Model {
    /// Whether all its answers are of one file on this machine.
    pub fn is_of_one_file(&self) -> bool {
        self.fallback_models.is_empty() && matches!(self.deployments[..], [Deployment::Local { .. }])
    }
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
#[derive(Clone, Debug, PartialEq)]
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
    /// A command of this server, which speaks OpenAI's API.
    Process {
        /// Which one.
        engine: EngineId,
        /// Tokens that prompt and answer may have together.
        context_tokens: u32,
        /// What it is asked for; its URL is known once it runs.
        remote: Remote,
    },
}

impl Deployment {
    /// What serves it here, and the tokens that this model may use of a sequence.
    pub const fn engine(&self) -> Option<(EngineId, u32)> {
        match self {
            Self::Local { engine, context_tokens } | Self::Process { engine, context_tokens, .. } => {
                Some((*engine, *context_tokens))
            }
            Self::Remote(_) => None,
        }
    }
}

/// The backend's name of commands of this server.
pub const PROCESS: &str = "process";

/// The backend's name in the configuration of hosts that speak an API.
pub const fn backend_name(api: Api) -> &'static str {
    match api {
        Api::Ollama => "ollama_http",
        Api::OpenAi => "openai_http",
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
    /// Name and password that stood in the URL: what is shown of it must not have them.
    pub user: Option<(String, Option<String>)>,
    /// Requests that the host answers for us at the same time; further ones wait here. `None` is without limit.
    pub max_outstanding: Option<usize>,
    /// Its share of the load beside other hosts; 1 is usual.
    pub weight: u32,
    /// Hosts of a higher number are asked when those of lower ones cannot.
    pub priority: u32,
    /// Used even if it is beyond the local network.
    pub wan: bool,
    /// A cluster with a balancer of its own: it is neither queued for nor asked twice.
    pub managed_lb: bool,
    /// Its name stands for all the addresses that it has.
    pub dns: bool,
    /// Whether it is there for vectors (`role: embedding`), and is judged by them.
    pub makes_vectors: bool,
}

impl Remote {
    /// A model on a host, with nothing else said of it.
    pub fn new(api: Api, url: &str, model_name: String) -> Self {
        let (url, user) = without_user(url);
        Self {
            api,
            url,
            model_name,
            context_tokens: None,
            api_key: None,
            user,
            max_outstanding: None,
            weight: 1,
            priority: 0,
            wan: false,
            managed_lb: false,
            dns: false,
            makes_vectors: false,
        }
    }
}

/// A URL without the name and password that may stand in it, and these.
fn without_user(url: &str) -> (String, Option<(String, Option<String>)>) {
    let plain = || (url.to_owned(), None);
    let Ok(parsed) = reqwest::Url::parse(url) else { return plain() };
    let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    if parsed.username().is_empty() && parsed.password().is_none() {
        return plain();
    }
    let user = (decoded(parsed.username()), parsed.password().map(decoded));
    let mut bare = parsed;
    let _ = bare.set_username("").and_then(|()| bare.set_password(None));
    (bare.as_str().trim_end_matches('/').to_owned(), Some(user))
}

impl std::fmt::Debug for Remote {
    /// Without the key: it must not come into a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} on {} ({})", self.model_name, self.url, backend_name(self.api))
    }
}
