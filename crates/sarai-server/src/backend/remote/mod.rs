//! A host that speaks Ollama's or OpenAI's API, over HTTP with kept-alive connections.
//!
//! It is asked to stream, always: bytes are its proof of life. Nothing here is retried.

mod lines;
mod refusal;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use futures_util::{StreamExt, stream};
use reqwest::header::{CONTENT_TYPE, HeaderMap};
use reqwest::{Client, RequestBuilder, Response};
use sarai_api::embed::Embedded;
use sarai_api::openai::remote::SseReader;
use sarai_api::translate::Translator;
use sarai_api::{embed, listed, ollama, openai};
use sarai_core::{Api, Error, GenerateRequest, KeepAlive, MediaKind, RemoteCause};

use super::EventStream;
use crate::config::Remote;
use crate::health::Look;
use lines::{Reader, events};
use refusal::{refusal, refused, unreachable};

/// Answers to a look that take longer tell of the host's work, and not of its distance.
const SLOW: Duration = Duration::from_millis(400);
/// How much of an answer of vectors, or of a list, is read, in bytes.
const MAX_WHOLE_BYTES: usize = 256 << 20;
/// The longest list of models that is read.
const MAX_LIST_BYTES: usize = 4 << 20;

/// The HTTP clients, one per connect deadline, each with its pool of connections.
#[derive(Clone, Debug, Default)]
pub struct Hosts {
    clients: Arc<Mutex<HashMap<Duration, Client>>>,
    /// Answers in the place of the network, for tests on paused time.
    #[cfg(test)]
    script: Option<Script>,
}

/// What a host does about a request.
#[cfg(test)]
#[derive(Clone)]
pub struct Script(pub Arc<ByScript>);

#[cfg(test)]
type ByScript = dyn Fn(&Remote, &GenerateRequest) -> Scripted + Send + Sync;

#[cfg(test)]
impl std::fmt::Debug for Script {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Script")
    }
}

/// How long its headers take, and its events or why there are none.
#[cfg(test)]
pub type Scripted = (Duration, Result<EventStream, Error>);

impl Hosts {
    /// Hosts that do what a script says.
    #[cfg(test)]
    pub fn scripted(script: Script) -> Self {
        Self { script: Some(script), ..Self::default() }
    }

    /// Clients for these connect deadlines; those for others are made when they are needed.
    ///
    /// # Errors
    /// The TLS set-up of the machine is unusable.
    pub fn new(deadlines: impl IntoIterator<Item = Duration>) -> Result<Self, reqwest::Error> {
        let made = deadlines.into_iter().map(|connect| Ok((connect, make_client(connect)?)));
        let hosts = Self::default();
        *hosts.clients.lock().unwrap_or_else(PoisonError::into_inner) = made.collect::<Result<_, reqwest::Error>>()?;
        Ok(hosts)
    }

    fn client(&self, connect: Duration) -> Client {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        // The first one could be made, so this one can.
        clients.entry(connect).or_insert_with(|| make_client(connect).unwrap_or_default()).clone()
    }

    /// Asks a host for its models; used to show its state.
    ///
    /// # Errors
    /// Why it cannot be used now.
    pub async fn models(&self, remote: &Remote, connect: Duration) -> Result<Vec<String>, RemoteCause> {
        let path = match remote.api {
            Api::Ollama => "/api/tags",
            Api::OpenAi => "/models",
        };
        let request = with_key(self.client(connect).get(format!("{}{path}", remote.url)), remote);
        let response = request.timeout(connect + Duration::from_secs(3)).send().await;
        let response = response.map_err(|error| unreachable(&error))?;
        if !response.status().is_success() {
            return Err(refused(response, "").await);
        }
        let body = up_to(response, MAX_LIST_BYTES).await;
        let listed: serde_json::Value =
            serde_json::from_slice(&body).map_err(|_| RemoteCause::Garbled(format!("{path} is not JSON")))?;
        Ok(listed::names(remote.api, &listed))
    }

    /// What an Ollama host says of a model, as its `/api/show` has it; `None` where it does not answer.
    pub async fn shown(
        &self,
        remote: &Remote,
        connect: Duration,
    ) -> Option<serde_json::Map<String, serde_json::Value>> {
        if remote.api != Api::Ollama {
            return None;
        }
        let body = serde_json::json!({ "model": remote.model_name }).to_string();
        let show = self.client(connect).post(format!("{}/api/show", remote.url)).header(CONTENT_TYPE, JSON).body(body);
        let response = with_key(show, remote).timeout(SHOWN_WITHIN).send().await.ok()?;
        match response.status().is_success() {
            true => serde_json::from_slice(&up_to(response, MAX_LIST_BYTES).await).ok(),
            false => None,
        }
    }

    /// What a model can do on a host, as Ollama's `/api/show` or the list of OpenAI's API says it, in Ollama's words; `None` where the host
    /// does not answer.
    pub async fn capabilities(&self, remote: &Remote, connect: Duration) -> Option<Vec<String>> {
        if remote.api == Api::Ollama {
            let shown = self.shown(remote, connect).await?;
            let listed = shown.get("capabilities")?.as_array()?;
            return Some(listed.iter().filter_map(|capability| capability.as_str()).map(str::to_owned).collect());
        }
        let request = self.client(connect).get(format!("{}/models", remote.url));
        let response = with_key(request, remote).timeout(SHOWN_WITHIN).send().await.ok();
        let response = response.filter(|response| response.status().is_success())?;
        let shown: serde_json::Value = serde_json::from_slice(&up_to(response, MAX_LIST_BYTES).await).ok()?;
        // One that does not say what it senses is believed.
        Some(listed::senses(&shown, &remote.model_name).unwrap_or_else(all_senses))
    }

    /// Looks at a host: how far away it is, and what it has loaded.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn look(&self, remote: &Remote, connect: Duration) -> Result<Look, RemoteCause> {
        #[cfg(test)]
        if self.script.is_some() {
            return Ok(Look { round_trip: Duration::from_millis(1), loaded: None });
        }
        let path = match remote.api {
            Api::Ollama => "/api/ps",
            Api::OpenAi => "/models",
        };
        let get = || with_key(self.client(connect).get(format!("{}{path}", remote.url)), remote).send();
        // The first one may have to connect.
        let mut response = get().await.map_err(|error| unreachable(&error))?;
        let mut round_trip = Duration::MAX;
        for _ in 0..2 {
            let _ = up_to(response, MAX_LIST_BYTES).await;
            let began = tokio::time::Instant::now();
            response = get().await.map_err(|error| unreachable(&error))?;
            round_trip = round_trip.min(began.elapsed());
        }
        if round_trip > SLOW {
            // It takes its time to answer, near or far: its kernel does not.
            let began = tokio::time::Instant::now();
            reach(&remote.url).await.ok_or_else(|| RemoteCause::Unreachable("no connection".into()))?;
            round_trip = round_trip.min(began.elapsed());
        }
        if !response.status().is_success() {
            return Ok(Look { round_trip, loaded: None });
        }
        let body = up_to(response, MAX_LIST_BYTES).await;
        let listed: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
        Ok(Look { round_trip, loaded: listed::loaded(remote.api, &listed) })
    }

    /// Has a host load a model. OpenAI's API has no word for it: there, it is loaded by its first request.
    ///
    /// # Errors
    /// [`Error::Remote`].
    pub async fn load(&self, place: &Place<'_>, keep_alive: Option<KeepAlive>) -> Result<(), Error> {
        let Remote { api: Api::Ollama, url, model_name, .. } = place.remote else { return Ok(()) };
        let remote = |cause| Error::Remote { host: url.clone(), cause };
        let mut body = serde_json::json!({ "model": model_name, "stream": false });
        if let Some(context_tokens) = place.context_tokens {
            body["options"] = serde_json::json!({ "num_ctx": context_tokens });
        }
        if let Some(time) = keep_alive {
            body["keep_alive"] = sarai_api::ollama::keep_alive::to_wire(time);
        }
        // Without a text, both load and no more.
        let path = if place.remote.makes_vectors { "/api/embed" } else { "/api/generate" };
        let post = with_key(self.client(place.connect).post(format!("{url}{path}")), place.remote);
        let post = post.body(body.to_string());
        let response = post.send().await.map_err(|error| remote(unreachable(&error)))?;
        if response.status().is_success() { Ok(()) } else { Err(remote(refused(response, model_name).await)) }
    }

    /// Has a host make vectors.
    ///
    /// # Errors
    /// [`Error::Remote`], or [`Error::InvalidRequest`] where the host says the request is wrong.
    pub async fn embed(&self, place: &Place<'_>, parsed: &embed::Parsed) -> Result<Embedded, Error> {
        let Remote { api, url, model_name, .. } = place.remote;
        let remote = |cause| Error::Remote { host: url.clone(), cause };
        let (path, body) = embed::remote_request(*api, model_name, parsed);
        let post = with_key(self.client(place.connect).post(format!("{url}{path}")), place.remote);
        let post = post.header(CONTENT_TYPE, JSON).body(body.to_string());
        let response = post.send().await.map_err(|error| remote(unreachable(&error)))?;
        if !response.status().is_success() {
            return Err(refusal(response, url, model_name).await);
        }
        let body = up_to(response, MAX_WHOLE_BYTES).await;
        let garbled = || RemoteCause::Garbled(String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned());
        let value: serde_json::Value = serde_json::from_slice(&body).map_err(|_| remote(garbled()))?;
        embed::read_remote(*api, &value, parsed.request.inputs.len()).ok_or_else(|| remote(garbled()))
    }

    /// Starts a generation on a host.
    ///
    /// # Errors
    /// [`Error::Remote`], or [`Error::InvalidRequest`] where the host says the request is wrong.
    pub async fn open(&self, place: &Place<'_>, request: &GenerateRequest) -> Result<EventStream, Error> {
        let Remote { api, url, model_name, .. } = place.remote;
        #[cfg(test)]
        if let Some(Script(script)) = &self.script {
            let (headers, outcome) = script(place.remote, request);
            tokio::time::sleep(headers).await;
            return outcome;
        }
        let remote = |cause| Error::Remote { host: url.clone(), cause };
        let (path, body) = match api {
            Api::Ollama => ollama::chat_request(model_name, place.context_tokens, request),
            Api::OpenAi => openai::remote::request(model_name, request),
        };
        let post = |body: &serde_json::Value| {
            let post = with_key(self.client(place.connect).post(format!("{url}{path}")), place.remote);
            post.header(CONTENT_TYPE, "application/json").body(body.to_string()).send()
        };
        let response = post(&body).await.map_err(|error| remote(unreachable(&error)))?;
        let translated = |events| in_words_of_the_client(*api, request, events);
        if response.status().is_success() {
            return answered(*api, url, response).map(translated);
        }
        match refusal(response, url, model_name).await {
            // That was not the client's wish, and there are servers that know nothing of it.
            Error::InvalidRequest { message, .. } if message.contains(OURS) && !is_the_clients(request) => {
                let mut body = body;
                body.as_object_mut().and_then(|body| body.remove(OURS));
                let response = post(&body).await.map_err(|error| remote(unreachable(&error)))?;
                match response.status().is_success() {
                    true => answered(*api, url, response).map(translated),
                    false => Err(refusal(response, url, model_name).await),
                }
            }
            error => Err(error),
        }
    }
}

/// Within so long an Ollama host says what a model can do.
const SHOWN_WITHIN: Duration = Duration::from_secs(3);

/// The events of an answer that has begun.
fn answered(api: Api, url: &str, response: Response) -> Result<EventStream, Error> {
    speaks(api, response.headers()).map_err(|cause| Error::Remote { host: url.to_owned(), cause })?;
    let is_json = kind(response.headers()).is_some_and(|kind| kind.eq_ignore_ascii_case(JSON));
    let reader = match api {
        Api::Ollama => Reader::Ndjson,
        Api::OpenAi if is_json => Reader::Whole(SseReader::default()),
        Api::OpenAi => Reader::Sse(SseReader::default()),
    };
    Ok(events(reader, url.to_owned(), response.bytes_stream()))
}

/// A client of the other API gets calls and reasoning in its own words.
fn in_words_of_the_client(api: Api, request: &GenerateRequest, events: EventStream) -> EventStream {
    if request.extras.as_ref().is_none_or(|extras| extras.api == api) {
        return events;
    }
    let mut translator = Translator::default();
    Box::pin(events.flat_map(move |event| {
        let translated = match event {
            Ok(event) => translator.translate(event).into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error)],
        };
        stream::iter(translated)
    }))
}

/// What OpenAI's servers are asked for in addition, so that they tell their usage.
const OURS: &str = "stream_options";

fn is_the_clients(request: &GenerateRequest) -> bool {
    request.extras.as_ref().is_some_and(|extras| extras.fields.contains_key(OURS))
}

/// Connects once more, and leaves.
async fn reach(url: &str) -> Option<()> {
    let url = reqwest::Url::parse(url).ok()?;
    let place = (url.host_str()?.trim_matches(['[', ']']), url.port_or_known_default()?);
    tokio::net::TcpStream::connect(place).await.ok().map(drop)
}

/// An idle connection is kept for less than the 5 s after which uvicorn and Node close theirs: a request that crosses such
/// a close on its way has to be asked again.
const IDLE: Duration = Duration::from_secs(4);

fn make_client(connect: Duration) -> Result<Client, reqwest::Error> {
    // A request goes to the host that the configuration names, and to no other.
    let redirects = reqwest::redirect::Policy::none();
    Client::builder()
        .no_proxy()
        .redirect(redirects)
        .tcp_nodelay(true)
        .pool_idle_timeout(IDLE)
        .connect_timeout(connect)
        .build()
}

/// Which model of which host.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The host and its model.
    pub remote: &'a Remote,
    /// `num_ctx`, if set.
    pub context_tokens: Option<u32>,
    /// Deadline of the connection.
    pub connect: Duration,
}

fn with_key(request: RequestBuilder, remote: &Remote) -> RequestBuilder {
    match (&remote.api_key, &remote.user) {
        (Some(key), _) => request.bearer_auth(key),
        (None, Some((name, password))) => request.basic_auth(name, password.as_ref()),
        (None, None) => request,
    }
}

const JSON: &str = "application/json";

/// What the body is said to be.
fn kind(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next().unwrap_or_default().trim())
}

/// Whether a 200 is a stream at all: a page of a proxy is not.
fn speaks(api: Api, headers: &HeaderMap) -> Result<(), RemoteCause> {
    let wanted: &[&str] = match api {
        Api::Ollama => &["application/x-ndjson", JSON],
        Api::OpenAi => &["text/event-stream", JSON],
    };
    let Some(kind) = kind(headers) else { return Ok(()) };
    if wanted.iter().any(|wanted| kind.eq_ignore_ascii_case(wanted)) {
        return Ok(());
    }
    Err(RemoteCause::Garbled(format!("content of type `{kind}`")))
}

/// As much of a body as there is, and no more than this.
async fn up_to(response: Response, most: usize) -> BytesMut {
    let mut body = BytesMut::new();
    let mut chunks = response.bytes_stream();
    while let Some(Ok(chunk)) = chunks.next().await {
        body.extend_from_slice(&chunk);
        if body.len() >= most {
            break;
        }
    }
    body
}

fn all_senses() -> Vec<String> {
    [MediaKind::Image, MediaKind::Audio].map(|kind| kind.capability().to_owned()).to_vec()
}
