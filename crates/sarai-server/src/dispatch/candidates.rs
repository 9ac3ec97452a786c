//! Who may answer a request, in which order: filtered by what the request needs, grouped where hosts share the load.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use sarai_api::ollama::ignored_by_ollama;
use sarai_api::openai::remote::unknown_to_openai;
use sarai_core::{GenerateRequest, Prompt};

use crate::catalog::Catalog;
use crate::config::{Api, Deployment, Model, Remote};
use crate::health::Health;

/// How much of a prompt decides which host is preferred: conversations that begin alike go to the same one, whose
/// cache then has the beginning.
const PREFIX_BYTES: usize = 2048;

/// One deployment that may answer.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The model, which is another than the one asked for where that falls back to it.
    pub model: Arc<Model>,
    index: usize,
    /// What an answer from here would lack.
    pub degraded: Vec<String>,
}

impl Candidate {
    /// The place.
    pub fn deployment(&self) -> &Deployment {
        &self.model.deployments[self.index]
    }

    /// The host, if it is on one.
    pub fn remote(&self) -> Option<&Remote> {
        match self.deployment() {
            Deployment::Remote(remote) => Some(remote),
            Deployment::Local { .. } => None,
        }
    }

    /// Whether it is on a host whose breaker is open.
    pub fn is_left_alone(&self, health: &Health) -> bool {
        self.remote().is_some_and(|remote| health.is_open(remote))
    }

    /// `model@place`, as it stands in headers and errors.
    pub fn label(&self) -> String {
        label(&self.model, self.deployment())
    }

    fn is(&self, other: &Self) -> bool {
        self.model.name == other.model.name && self.index == other.index
    }
}

/// `model@place`, as it stands in headers and errors.
pub fn label(model: &Model, deployment: &Deployment) -> String {
    match deployment {
        Deployment::Local { .. } => format!("{}@gguf_native", model.name),
        Deployment::Remote(Remote { api, url, .. }) => {
            let host = url.split_once("://").map_or(url.as_str(), |(_, host)| host);
            format!("{}@{}({host})", model.name, api.backend())
        }
    }
}

/// Deployments that share the load: the hosts of one model, or one worker.
pub type Tier = Vec<Candidate>;

/// Everybody who may answer, in order: the model's own deployments, then those of the models that it falls back to.
pub fn tiers(catalog: &Catalog, model: &Arc<Model>, request: &GenerateRequest) -> Vec<Tier> {
    let mut tiers = of_model(model, model, request);
    for name in &model.fallback_models {
        if let Ok(other) = catalog.find(name) {
            tiers.extend(of_model(model, other, request));
        }
    }
    tiers
}

fn of_model(asked: &Arc<Model>, model: &Arc<Model>, request: &GenerateRequest) -> Vec<Tier> {
    let mut tiers: Vec<Tier> = Vec::new();
    for (index, deployment) in model.deployments.iter().enumerate() {
        let candidate =
            Candidate { model: Arc::clone(model), index, degraded: degraded(asked, model, deployment, request) };
        let same = |tier: &&mut Tier| match (tier[0].remote(), candidate.remote()) {
            (Some(a), Some(b)) => a.api == b.api && a.model_name == b.model_name,
            _ => false,
        };
        match tiers.last_mut().filter(same) {
            Some(tier) => tier.push(candidate),
            None => tiers.push(vec![candidate]),
        }
    }
    tiers
}

/// What an answer from there would lack.
fn degraded(asked: &Model, model: &Model, deployment: &Deployment, request: &GenerateRequest) -> Vec<String> {
    let mut lost = match deployment {
        Deployment::Remote(remote) => match remote.api {
            Api::Ollama => ignored_by_ollama(&request.sampling),
            Api::OpenAi => unknown_to_openai(&request.sampling),
        },
        Deployment::Local { .. } => Vec::new(),
    };
    if asked.name != model.name {
        lost.push(format!("model:{}", model.name));
    }
    lost
}

/// Orders hosts that share the load: the least outstanding work first; among equals, each beginning of a conversation
/// prefers its own host (rendezvous hashing), so that few move when one comes or goes.
pub fn spread(tier: &mut Tier, request: &GenerateRequest, outstanding: impl Fn(&Remote) -> usize) {
    let prefix = prefix(request);
    tier.sort_by_cached_key(|candidate| {
        let Some(remote) = candidate.remote() else { return (0, 0) };
        let mut hasher = DefaultHasher::new();
        (&remote.url, &prefix).hash(&mut hasher);
        (outstanding(remote), u64::MAX - hasher.finish())
    });
}

fn prefix(request: &GenerateRequest) -> Vec<u8> {
    let text: String = match &request.prompt {
        Prompt::Raw(text) => text.clone(),
        Prompt::Chat(messages) => messages.iter().take(2).map(|message| message.content.as_str()).collect(),
    };
    text.bytes().take(PREFIX_BYTES).collect()
}

/// Who may go on with an answer that broke off at `current`: all others first, then itself.
pub fn to_resume(tiers: Vec<Tier>, current: &Candidate) -> Vec<Candidate> {
    let (itself, mut others): (Vec<_>, Vec<_>) = tiers.into_iter().flatten().partition(|one| one.is(current));
    others.extend(itself);
    others
}
