//! Who may answer a request: filtered by what the request needs, grouped where hosts share the load.

use std::cell::OnceCell;
use std::collections::HashSet;
use std::sync::Arc;

use sarai_api::embed;
use sarai_api::ollama::ignored_by_ollama;
use sarai_api::openai::remote::unknown_to_openai;
use sarai_api::schema::{not_followed, not_followed_by_calls};
use sarai_api::translate::{can_be_asked, not_asked_across};
use sarai_core::{
    Api, Error, Extras, Format, GenerateRequest, MediaSource, Need, Prompt, Purpose, REASONING_EFFORT, ToolChoice,
};
use serde_json::Value;

use crate::catalog::Catalog;
use crate::config::{Deployment, Model, PROCESS, Remote, backend_name};
use crate::health::Health;

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
            Deployment::Local { .. } | Deployment::Process { .. } => None,
        }
    }

    /// Whether it is a worker of ours.
    pub fn is_worker(&self) -> bool {
        matches!(self.deployment(), Deployment::Local { .. })
    }

    /// Whether its breaker is open.
    pub fn is_left_alone(&self, health: &Health) -> bool {
        match self.deployment() {
            Deployment::Remote(remote) => health.is_open(remote),
            Deployment::Process { .. } => health.commands.is_open(&self.label()),
            Deployment::Local { .. } => false,
        }
    }

    /// Why its breaker was opened.
    pub fn last_failure(&self, health: &Health) -> Option<Error> {
        match self.deployment() {
            Deployment::Remote(remote) => health.of(remote).last,
            Deployment::Process { .. } => health.commands.last(&self.label()),
            Deployment::Local { .. } => None,
        }
    }

    /// `model@place`, as it stands in headers and errors.
    pub fn label(&self) -> String {
        label(&self.model, self.deployment())
    }

    /// Why it is not asked although it could be: it is beyond the local network, and the configuration does not want that.
    pub fn is_too_far(&self, health: &Health) -> Option<Error> {
        self.remote().and_then(|remote| too_far(&self.model, remote, health))
    }

    /// Whether both are the same place.
    pub fn is(&self, other: &Self) -> bool {
        self.model.name == other.model.name && self.index == other.index
    }
}

/// Why a host is not asked although it could be: it is beyond the local network, and the configuration does not want that.
pub fn too_far(model: &Model, remote: &Remote, health: &Health) -> Option<Error> {
    if remote.wan {
        return None;
    }
    // It may have come nearer.
    health.look(remote);
    let known = health.of(remote);
    let ms = known.round_trip.filter(|_| known.is_far)?.as_millis();
    let reason = format!("{} is {ms} ms away, beyond the local network: set `wan: true` to use it", remote.url);
    Some(Error::Unavailable { model: model.name.clone(), reason })
}

/// `model@place`, as it stands in headers and errors.
pub fn label(model: &Model, deployment: &Deployment) -> String {
    match deployment {
        Deployment::Local { .. } => format!("{}@gguf_native", model.name),
        Deployment::Process { .. } => format!("{}@{PROCESS}", model.name),
        Deployment::Remote(Remote { api, url, .. }) => {
            let host = url.split_once("://").map_or(url.as_str(), |(_, host)| host);
            format!("{}@{}({host})", model.name, backend_name(*api))
        }
    }
}

/// Deployments that share the load: the hosts of one model, or one worker.
pub type Tier = Vec<Candidate>;

/// Everybody who may answer, in order: the model's own deployments, then those of the models that it falls back to.
///
/// # Errors
/// The request needs what none of them can do.
pub fn tiers(
    catalog: &Catalog,
    health: &Health,
    model: &Arc<Model>,
    request: &GenerateRequest,
) -> Result<Vec<Tier>, Error> {
    refuse_other_purposes(catalog, model)?;
    let seeking = Seeking { catalog, health, asked: model, request, lost_here: OnceCell::new() };
    let mut tiers = seeking.of_model(model);
    for name in &model.fallback_models {
        if let Ok(other) = catalog.find(name) {
            tiers.extend(seeking.of_model(other));
        }
    }
    // What no worker can do is the likelier reason.
    let needs = request.needs();
    match needs.iter().find(|need| !need.at_worker).or(needs.first()) {
        Some(need) if tiers.is_empty() => Err(lacking(model, need)),
        _ => Ok(tiers),
    }
}

/// Whether an answer without a call would be none.
fn must_call(request: &GenerateRequest) -> bool {
    request.tools.as_ref().is_some_and(|tools| tools.choice != ToolChoice::Auto)
}

/// Refuses a model whose file does not answer in words.
fn refuse_other_purposes(catalog: &Catalog, model: &Model) -> Result<(), Error> {
    for deployment in &model.deployments {
        let Deployment::Local { engine, .. } = deployment else { continue };
        let fix = match catalog.known_file(*engine).map(|file| file.purpose()) {
            Some(Purpose::Vectors) => "makes vectors: use /v1/embeddings or /api/embed",
            Some(Purpose::Scores) => "scores texts: use /v1/rerank",
            Some(Purpose::Answers) | None => continue,
        };
        let name = &model.name;
        let message = format!(
            "\"{name}\" does not support chat: it does not answer in words, it {fix}, or ask a model of role chat"
        );
        return Err(Error::invalid("model", message));
    }
    Ok(())
}

fn lacking(model: &Model, Need { param, lack, .. }: &Need) -> Error {
    let name = &model.name;
    // Clients of Ollama look for these words.
    let ability = match param.as_str() {
        "tools" => Some("tools"),
        "think" => Some("thinking"),
        "suffix" => Some("insert"),
        _ => None,
    };
    let words = ability.map(|ability| format!("\"{name}\" does not support {ability}: ")).unwrap_or_default();
    let message =
        format!("{words}{lack} by any deployment of `{name}`: leave it out, or ask a model on a host that has it");
    Error::invalid(param, message)
}

/// Whether a part of a message that has no word here, such as a video, is only named.
fn names_elsewhere(extras: &Extras) -> bool {
    fn all(value: Option<&Value>) -> impl Iterator<Item = &Value> {
        value.and_then(Value::as_array).into_iter().flatten()
    }
    let is_address = |text: &str| text.contains("://") && !text.starts_with("data:");
    let is_named = |value: &Value| value.get("url").unwrap_or(value).as_str().is_some_and(is_address);
    let mut parts = all(extras.fields.get("messages")).flat_map(|message| all(message.get("content")));
    parts.any(|part| part["type"] != "text" && part.as_object().is_some_and(|part| part.values().any(is_named)))
}

/// Whether a deployment can do what the request needs: what only the client's own API says, only a host that speaks it
/// understands; tools and pictures have words in both.
fn is_able(catalog: &Catalog, health: &Health, deployment: &Deployment, request: &GenerateRequest) -> bool {
    let is_named = || request.media().any(|media| matches!(media.source, MediaSource::Url(_)));
    match (&request.extras, deployment) {
        (Some(extras), Deployment::Remote(remote) | Deployment::Process { remote, .. }) => {
            // A command of this machine is not told where to look: what is named to it would be read by its own rules.
            let is_told = matches!(deployment, Deployment::Remote(_)) || !(is_named() || names_elsewhere(extras));
            (extras.needs.is_empty() || remote.api == extras.api || can_be_asked(remote.api, request))
                && is_told
                && !request.media().any(|media| health.lacks(remote, media.kind))
        }
        (Some(extras), Deployment::Local { engine, .. }) => {
            extras.needs.iter().all(|need| need.at_worker)
                && !(request.format.is_constrained() && must_call(request))
                && !is_named()
                // A file that cannot be read says so when it is asked.
                && catalog.known_file(*engine).is_none_or(|file| {
                    (request.tools.is_none() || file.knows_tools())
                        && (!request.needs().iter().any(|need| need.param == "think") || file.reasons())
                        && request.media().all(|media| file.senses(media.kind))
                })
        }
        (None, _) => true,
    }
}

/// What candidates are sought for.
struct Seeking<'a> {
    catalog: &'a Catalog,
    health: &'a Health,
    asked: &'a Arc<Model>,
    request: &'a GenerateRequest,
    /// What any worker would not follow: looked for once, in schemas that may be long.
    lost_here: OnceCell<Vec<String>>,
}

impl Seeking<'_> {
    fn of_model(&self, model: &Arc<Model>) -> Vec<Tier> {
        let has_tokens = matches!(self.request.prompt, Prompt::Tokens(_)) || !self.request.context.is_empty();
        if has_tokens && model.name != self.asked.name {
            // They mean something else to another model.
            return Vec::new();
        }
        let mut tiers: Vec<Tier> = Vec::new();
        for (index, deployment) in model.deployments.iter().enumerate() {
            if !is_able(self.catalog, self.health, deployment, self.request) {
                continue;
            }
            // It may be of a host, whose tokens mean something else here.
            let may_be_a_hosts = deployment.engine().is_some() && !model.is_of_one_file();
            if may_be_a_hosts && !self.request.context.is_empty() {
                continue;
            }
            let degraded = self.degraded(model, deployment);
            add(&mut tiers, Candidate { model: Arc::clone(model), index, degraded });
        }
        tiers
    }

    /// What an answer from there would lack.
    fn degraded(&self, model: &Model, deployment: &Deployment) -> Vec<String> {
        let request = self.request;
        let mut lost = match deployment {
            Deployment::Remote(remote) | Deployment::Process { remote, .. } => match remote.api {
                Api::Ollama => ignored_by_ollama(&request.sampling),
                Api::OpenAi => unknown_to_openai(&request.sampling),
            },
            Deployment::Local { .. } => self.lost_here.get_or_init(|| lost_at_workers(request)).clone(),
        };
        if let Some(extras) = request.extras.as_deref()
            && !matches!(deployment, Deployment::Remote(remote) | Deployment::Process { remote, .. } if remote.api == extras.api)
        {
            lost.extend(extras.degrades.iter().cloned());
        }
        let is_other_api = |host: &Remote| request.extras.as_ref().is_some_and(|extras| extras.api != host.api);
        if let Deployment::Remote(host) | Deployment::Process { remote: host, .. } = deployment
            && is_other_api(host)
        {
            lost.extend(not_asked_across(&request.sampling));
        }
        let knows_effort = || match deployment {
            Deployment::Local { engine, .. } => self.catalog.known_file(*engine).is_none_or(|file| file.knows_effort()),
            Deployment::Remote(host) | Deployment::Process { remote: host, .. } => !is_other_api(host),
        };
        if request.says_effort() && !knows_effort() {
            lost.push(REASONING_EFFORT.to_owned());
        }
        if request.truncate {
            lost.push(TRUNCATED.to_owned());
        }
        if self.asked.name != model.name {
            lost.push(format!("model:{}", model.name));
        }
        // There may be two reasons for one.
        let mut named = HashSet::new();
        lost.retain(|one| named.insert(one.clone()));
        lost
    }
}

/// What a worker does not follow of a request.
fn lost_at_workers(request: &GenerateRequest) -> Vec<String> {
    let mut lost = match &request.format {
        Format::Schema(schema) => not_followed(schema),
        _ => Vec::new(),
    };
    if request.sampling.ignore_eos && request.has_form() {
        lost.push("ignore_eos".to_owned());
    }
    if request.think == Some(true) && request.format.is_constrained() {
        // What must have a form of its own does not begin with reasoning.
        lost.push("think".to_owned());
    }
    if let Some(tools) = &request.tools {
        lost.extend(not_followed_by_calls(&tools.definitions));
        if request.format.is_constrained() {
            // One grammar is for both, and a call has not that form.
            lost.push("tools".to_owned());
        }
    }
    lost
}

/// Puts a candidate with those that it shares the load with.
fn add(tiers: &mut Vec<Tier>, candidate: Candidate) {
    let same = |tier: &&mut Tier| match (tier[0].remote(), candidate.remote()) {
        (Some(a), Some(b)) => (a.api, &a.model_name, a.priority) == (b.api, &b.model_name, b.priority),
        _ => false,
    };
    match tiers.last_mut().filter(same) {
        Some(tier) => tier.push(candidate),
        None => tiers.push(vec![candidate]),
    }
}

/// Everybody who may make a model's vectors, in order. Those of another model mean nothing to whoever asked for these.
pub fn embedders(model: &Arc<Model>, parsed: &embed::Parsed) -> Vec<Tier> {
    let mut tiers = Vec::new();
    for (index, deployment) in model.deployments.iter().enumerate() {
        let understands = |api: Api| match deployment {
            Deployment::Remote(host) | Deployment::Process { remote: host, .. } => host.api == api,
            Deployment::Local { .. } => false,
        };
        let lost = parsed.extras.as_ref().filter(|extras| !understands(extras.api));
        let degraded = lost.map(|extras| extras.degrades.clone()).unwrap_or_default();
        add(&mut tiers, Candidate { model: Arc::clone(model), index, degraded });
    }
    tiers
}

/// What an answer lacks of a prompt that is too long for everybody.
const TRUNCATED: &str = "prompt:truncated";

/// Hosts that are far away come after those that are near; between them those of which that is not known: who hangs delays nobody who
/// could be answered by another one.
pub fn near_first(tiers: Vec<Tier>, health: &Health) -> Vec<Tier> {
    let distance = |one: &Candidate| match one.remote() {
        Some(remote) if health.of(remote).is_far => 2,
        Some(remote) if health.is_measured_soon(remote) => 1,
        _ => 0,
    };
    let split = |tier: Tier| {
        let mut split = [Tier::new(), Tier::new(), Tier::new()];
        tier.into_iter().for_each(|one| split[distance(&one)].push(one));
        split
    };
    tiers.into_iter().flat_map(split).filter(|tier| !tier.is_empty()).collect()
}

/// Who may go on with an answer that broke off at `current`: all others first, then itself.
pub fn to_resume(tiers: Vec<Tier>, current: &Candidate) -> Vec<Candidate> {
    let (itself, mut others): (Vec<_>, Vec<_>) = tiers.into_iter().flatten().partition(|one| one.is(current));
    others.extend(itself);
    others
}
