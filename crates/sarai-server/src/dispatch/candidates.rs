//! Who may answer a request, in which order: filtered by what the request needs, grouped where hosts share the load.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use sarai_api::embed;
use sarai_api::ollama::ignored_by_ollama;
use sarai_api::openai::remote::unknown_to_openai;
use sarai_api::schema::{not_followed, not_followed_by_calls};
use sarai_api::translate::can_be_asked;
use sarai_core::{
    Api, Error, Extras, Format, GenerateRequest, Input, Lane, MediaSource, Need, Prompt, Purpose, Residence, ToolChoice,
};
use serde_json::Value;

use crate::catalog::Catalog;
use crate::config::{Deployment, Model, PROCESS, Remote, backend_name};
use crate::health::{Expected, Health, Known};

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

    /// How much a beginning of a conversation likes this host.
    fn affinity(&self, work: &Work<'_>) -> f64 {
        let Some(remote) = self.remote() else { return 0.0 };
        let mut hasher = DefaultHasher::new();
        remote.url.hash(&mut hasher);
        work.hash_beginning(&mut hasher);
        #[expect(clippy::cast_precision_loss, reason = "the upper bits are random enough")]
        let uniform = ((hasher.finish() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
        f64::from(remote.weight) / -uniform.ln()
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
    let mut tiers = of_model(catalog, health, model, model, request);
    for name in &model.fallback_models {
        if let Ok(other) = catalog.find(name) {
            tiers.extend(of_model(catalog, health, model, other, request));
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

fn of_model(
    catalog: &Catalog,
    health: &Health,
    asked: &Arc<Model>,
    model: &Arc<Model>,
    request: &GenerateRequest,
) -> Vec<Tier> {
    let mut tiers: Vec<Tier> = Vec::new();
    for (index, deployment) in model.deployments.iter().enumerate() {
        if !is_able(catalog, health, deployment, request) {
            continue;
        }
        let degraded = degraded(asked, model, deployment, request);
        add(&mut tiers, Candidate { model: Arc::clone(model), index, degraded });
    }
    tiers
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

/// What an answer from there would lack.
fn degraded(asked: &Model, model: &Model, deployment: &Deployment, request: &GenerateRequest) -> Vec<String> {
    let mut lost = match deployment {
        Deployment::Remote(remote) | Deployment::Process { remote, .. } => match remote.api {
            Api::Ollama => ignored_by_ollama(&request.sampling),
            Api::OpenAi => unknown_to_openai(&request.sampling),
        },
        Deployment::Local { .. } => match &request.format {
            Format::Schema(schema) => not_followed(schema),
            _ => Vec::new(),
        },
    };
    if matches!(deployment, Deployment::Local { .. }) && request.think == Some(true) && request.format.is_constrained()
    {
        // What must have a form of its own does not begin with reasoning.
        lost.push("think".to_owned());
    }
    if let (Deployment::Local { .. }, Some(tools)) = (deployment, &request.tools) {
        lost.extend(not_followed_by_calls(&tools.definitions));
        if request.format.is_constrained() {
            // One grammar is for both, and a call has not that form.
            lost.push("tools".to_owned());
        }
    }
    if let Some(extras) = request.extras.as_deref()
        && !matches!(deployment, Deployment::Remote(remote) | Deployment::Process { remote, .. } if remote.api == extras.api)
    {
        lost.extend(extras.degrades.iter().cloned());
    }
    if request.truncate {
        lost.push(TRUNCATED.to_owned());
    }
    if asked.name != model.name {
        lost.push(format!("model:{}", model.name));
    }
    lost
}

/// Costs that differ by less are equal: a host is not changed for them.
const ABOUT_EQUAL: f64 = 1.3;
/// And those that differ by so many seconds: nobody notices.
const UNNOTICED: f64 = 0.05;
/// What an answer takes where nothing is known, in seconds; and a load.
const UNKNOWN_SERVICE: f64 = 1.0;
const UNKNOWN_LOAD: f64 = 5.0;

/// Orders hosts that share the load by what an answer would cost there: the work they have, how fast they are, whether the
/// model is loaded, and their weight. Among equals, each beginning of a conversation prefers its own host (weighted
/// rendezvous hashing), so that few move when one comes or goes.
pub fn spread(tier: &mut Tier, work: &Work<'_>, health: &Health) {
    if tier.len() < 2 {
        return;
    }
    let mut costs: Vec<(f64, f64)> = tier.iter().map(|one| (0.0, one.affinity(work))).collect();
    let expected: Vec<_> = tier.iter().map(|one| one.remote().map(|remote| work.expected(health, remote))).collect();
    // Of a host that was never asked nothing is known: it counts as the fastest, until it was.
    let service = |expected: &Option<(Expected, Known)>| {
        let (expected, known) = expected.as_ref()?;
        known.pace.service(Expected { is_resident: true, ..*expected }).map(|time| time.as_secs_f64())
    };
    let fastest = expected.iter().filter_map(service).fold(f64::INFINITY, f64::min);
    let fastest = if fastest.is_finite() { fastest } else { UNKNOWN_SERVICE };
    for ((cost, _), (one, outlook)) in costs.iter_mut().zip(tier.iter().zip(&expected)) {
        let (Some(remote), Some((expected, known))) = (one.remote(), outlook) else { continue };
        let each = service(outlook).unwrap_or(fastest).max(0.001);
        let load = match known.is_loaded {
            Some(false) => {
                let absent = known.pace.service(Expected { is_resident: false, ..*expected });
                absent.map_or(UNKNOWN_LOAD, |absent| (absent.as_secs_f64() - each).max(UNKNOWN_LOAD.min(each)))
            }
            _ => 0.0,
        };
        #[expect(clippy::cast_precision_loss, reason = "requests at one host are few")]
        let before = known.outstanding as f64 / f64::from(remote.weight);
        *cost = each * (1.0 + before) + load;
    }
    let least = costs.iter().map(|(cost, _)| *cost).fold(f64::INFINITY, f64::min);
    let mut order: Vec<_> = std::mem::take(tier).into_iter().zip(costs).collect();
    order.sort_by(|(_, (a, a_likes)), (_, (b, b_likes))| {
        let is_equal = |cost: f64| cost <= (least * ABOUT_EQUAL).max(least + UNNOTICED);
        match (is_equal(*a), is_equal(*b)) {
            (true, true) => b_likes.total_cmp(a_likes),
            (true, false) => std::cmp::Ordering::Less,
            (false, true) => std::cmp::Ordering::Greater,
            (false, false) => a.total_cmp(b),
        }
    });
    tier.extend(order.into_iter().map(|(one, _)| one));
}

/// What a request asks for, as far as it can be told before it is asked.
#[derive(Clone, Debug)]
pub struct Work<'a> {
    prompt_tokens: u32,
    answer_tokens: u32,
    /// What is at the beginning.
    begins: Vec<&'a str>,
    /// How the model is to be there.
    pub residence: Residence,
    /// Whether it may take its time.
    pub lane: Lane,
}

impl<'a> Work<'a> {
    /// That of an answer.
    pub fn of(request: &'a GenerateRequest) -> Self {
        let begins = match &request.prompt {
            Prompt::Raw(text) => vec![text.as_str()],
            Prompt::Chat(messages) => messages.iter().take(2).map(|message| message.content.as_str()).collect(),
        };
        let answer_tokens = request.max_tokens.map_or(USUAL_ANSWER, |most| most.min(USUAL_ANSWER));
        Self {
            prompt_tokens: prompt_tokens(request),
            answer_tokens,
            begins,
            residence: request.residence,
            lane: request.lane,
        }
    }

    /// That of vectors.
    pub fn of_vectors(parsed: &'a embed::Parsed) -> Self {
        let tokens = |input: &Input| match input {
            Input::Text(text) => text.len() / BYTES_PER_TOKEN,
            Input::Tokens(tokens) => tokens.len(),
        };
        let prompt_tokens = parsed.request.inputs.iter().map(tokens).sum::<usize>();
        let begins = parsed.request.inputs.iter().take(1).filter_map(|input| match input {
            Input::Text(text) => Some(text.as_str()),
            Input::Tokens(_) => None,
        });
        Self {
            prompt_tokens: u32::try_from(prompt_tokens).unwrap_or(u32::MAX),
            answer_tokens: 0,
            begins: begins.collect(),
            residence: Residence { context_tokens: None, keep_alive: parsed.keep_alive },
            lane: parsed.request.lane,
        }
    }

    /// What this would meet at a host, and what is known of it.
    pub fn expected(&self, health: &Health, remote: &Remote) -> (Expected, Known) {
        health.expected(remote, self.prompt_tokens, self.answer_tokens)
    }

    /// The same, after a look at a host of which it is not known whether it has the model loaded. One that does not even answer that
    /// has no load to excuse it.
    pub async fn expected_now(&self, health: &Health, remote: &Remote) -> (Expected, Known) {
        let is_there = health.look_now(remote).await;
        let (mut expected, known) = self.expected(health, remote);
        expected.is_resident |= !is_there;
        (expected, known)
    }

    fn hash_beginning(&self, hasher: &mut impl Hasher) {
        let mut left = PREFIX_BYTES;
        for text in &self.begins {
            let bytes = &text.as_bytes()[..text.len().min(left)];
            hasher.write(bytes);
            left -= bytes.len();
        }
    }
}

/// How long a prompt is, as far as can be told without its model: pictures and tools are read too.
pub fn prompt_tokens(request: &GenerateRequest) -> u32 {
    let bytes = match &request.prompt {
        Prompt::Raw(text) => text.len(),
        Prompt::Chat(messages) => messages.iter().map(|message| message.content.len()).sum(),
    };
    let tools = request.tools.as_ref().map_or(0, |tools| tools.definitions.len());
    let media = request.media().count().saturating_mul(MEDIA_TOKENS);
    let tokens = ((bytes + tools) / BYTES_PER_TOKEN).saturating_add(media).saturating_add(16);
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

/// A low guess of what a token is, so that a deadline is not too short.
const BYTES_PER_TOKEN: usize = 3;
/// What a picture or a piece of sound is, in tokens of text: a high guess, with its encoding.
const MEDIA_TOKENS: usize = 1024;
/// Tokens of an answer whose end is not known.
const USUAL_ANSWER: u32 = 256;

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
