//! A host that speaks Ollama's or OpenAI's API, over HTTP with kept-alive connections.
//!
//! It is asked to stream, always: bytes are its proof of life. Nothing here is retried.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt, Stream, StreamExt, stream};
use reqwest::header::{CONTENT_TYPE, HeaderMap, RETRY_AFTER};
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use sarai_api::embed::Embedded;
use sarai_api::openai::remote::SseReader;
use sarai_api::translate::Translator;
use sarai_api::{RemoteLine, embed, listed, ollama, openai};
use sarai_core::{Api, Error, Event, GenerateRequest, KeepAlive, MediaKind, RemoteCause};

use super::EventStream;
use crate::config::Remote;
use crate::health::Look;

/// The longest line that a host may send, in bytes.
const MAX_LINE_BYTES: usize = 1 << 20;
/// Answers to a look that take longer tell of the host's work, and not of its distance.
const SLOW: Duration = Duration::from_millis(400);
/// More than any model says: an answer that is wanted whole is kept, and what is out of a stream is remembered.
const MAX_ANSWER_BYTES: usize = 128 << 20;
/// How long the end of a body may follow its end mark.
const END_OF_BODY: Duration = Duration::from_secs(1);
/// How long it is waited for before the end mark is passed on.
const END_IS_THERE: Duration = Duration::from_millis(2);
/// How much of an answer of vectors, or of a list, is read, in bytes.
const MAX_WHOLE_BYTES: usize = 256 << 20;
/// The longest list of models that is read.
const MAX_LIST_BYTES: usize = 4 << 20;
/// How much of an error body is read, in bytes, and how long it is waited for.
const MAX_ERROR_BYTES: usize = 4 << 10;
const ERROR_WITHIN: Duration = Duration::from_secs(2);

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

/// Why a host does not do what it was asked for: by the client's fault, or its own.
async fn refusal(response: Response, url: &str, model_name: &str) -> Error {
    let status = response.status();
    // A page of what stands before it is no word of the host's.
    let is_page = kind(response.headers()).is_some_and(|kind| kind.to_ascii_lowercase().contains("html"));
    let is_refused = !is_page && [StatusCode::BAD_REQUEST, StatusCode::UNPROCESSABLE_ENTITY].contains(&status);
    let is_large = status == StatusCode::PAYLOAD_TOO_LARGE;
    let cause = match refused(response, model_name).await {
        RemoteCause::Status { message, .. } if (is_refused || is_large) && is_about_length(&message) => {
            RemoteCause::TooLong(message)
        }
        RemoteCause::Status { message, .. } if is_mistaken_for_its_own(&message) => RemoteCause::Unable(message),
        RemoteCause::Status { message, .. } if is_large || (is_refused && is_about_ability(&message)) => {
            RemoteCause::Unable(message)
        }
        RemoteCause::Status { message, .. } if is_refused => {
            let message = format!("host {url} refuses the request: {message}");
            return Error::InvalidRequest { message, param: None };
        }
        cause => cause,
    };
    Error::Remote { host: url.to_owned(), cause }
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

fn unreachable(error: &reqwest::Error) -> RemoteCause {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    match error.is_connect() {
        true if error.is_timeout() => RemoteCause::Unreachable("connection timed out".into()),
        true => RemoteCause::Unreachable(cause.to_string()),
        false => RemoteCause::Unanswered,
    }
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

async fn refused(response: Response, model_name: &str) -> RemoteCause {
    let status = response.status();
    let retry_after = response.headers().get(RETRY_AFTER).and_then(|value| retry_after(value.to_str().ok()?));
    let body = tokio::time::timeout(ERROR_WITHIN, up_to(response, MAX_ERROR_BYTES)).await.unwrap_or_default();
    if status == StatusCode::NOT_FOUND && !model_name.is_empty() {
        return RemoteCause::ModelMissing(model_name.to_owned());
    }
    let json: Option<serde_json::Value> = serde_json::from_slice(&body).ok();
    let message = json.and_then(|json| {
        let error = &json["error"];
        error["message"].as_str().or(error.as_str()).map(str::to_owned)
    });
    let message = message.unwrap_or_else(|| String::from_utf8_lossy(&body).chars().take(200).collect());
    RemoteCause::Status { status: status.as_u16(), message, retry_after }
}

/// Whether a host refuses a request for its prompt's length. There is no common code for it: these are the words of OpenAI and
/// vLLM, of llama.cpp's server, and of Ollama.
fn is_about_length(message: &str) -> bool {
    let message = message.to_lowercase();
    [
        "maximum context length",
        "context size",
        "context length",
        "context window",
        "prompt too long",
        "prompt is too long",
    ]
    .iter()
    .any(|words| message.contains(words))
}

/// Whether a host takes what it cannot read of a request for a failure of its own: Ollama, of schemas and of pictures.
fn is_mistaken_for_its_own(message: &str) -> bool {
    ["invalid JSON schema in format", "Failed to create new sequence"].iter().any(|words| message.contains(words))
}

/// Whether a host refuses a request for what its model cannot do, or was not started for: these are the words of Ollama, and of
/// vLLM and llama.cpp's server.
fn is_about_ability(message: &str) -> bool {
    let message = message.to_lowercase();
    ["does not support", "is not supported by this model", "is not currently supported", "requires --", "requires `--"]
        .iter()
        .any(|words| message.contains(words))
}

/// Seconds, or a date.
fn retry_after(text: &str) -> Option<u64> {
    let text = text.trim();
    let until = |date: std::time::SystemTime| date.duration_since(std::time::SystemTime::now()).unwrap_or_default();
    text.parse().ok().or_else(|| httpdate::parse_http_date(text).ok().map(|date| until(date).as_secs() + 1))
}

type Chunks = std::pin::Pin<Box<dyn Stream<Item = Result<Bytes, reqwest::Error>> + Send>>;

/// Reads one kind of line.
enum Reader {
    Ndjson,
    Sse(SseReader),
    /// It was asked to stream and answers whole: the body is one line, whatever line ends it has.
    Whole(SseReader),
}

impl Reader {
    fn line(&mut self, line: &[u8]) -> Result<RemoteLine, RemoteCause> {
        match self {
            Self::Ndjson => ollama::parse_line(line),
            Self::Sse(reader) => reader.line(line),
            Self::Whole(reader) => reader.whole(line),
        }
    }

    /// Whether it has reported that the request is wrong.
    fn says_that_the_request_is_wrong(&self) -> bool {
        match self {
            Self::Ndjson => false,
            Self::Sse(reader) | Self::Whole(reader) => reader.is_the_clients,
        }
    }

    /// The end of a body that came without a further mark.
    fn end(&self) -> Option<Event> {
        match self {
            Self::Ndjson => None,
            Self::Sse(reader) | Self::Whole(reader) => reader.end(),
        }
    }
}

struct Lines {
    host: String,
    reader: Reader,
    chunks: Chunks,
    buffer: BytesMut,
    /// Bytes that have come.
    read: usize,
    waiting: VecDeque<Event>,
    /// Whether any of the answer is out.
    has_begun: bool,
    finished: bool,
}

/// The events of a host's stream. One that ends before its end mark ends with an error.
fn events(
    reader: Reader,
    host: String,
    chunks: impl Stream<Item = Result<Bytes, reqwest::Error>> + Send + 'static,
) -> EventStream {
    let lines = Lines {
        host,
        reader,
        chunks: Box::pin(chunks),
        buffer: BytesMut::new(),
        read: 0,
        waiting: VecDeque::new(),
        has_begun: false,
        finished: false,
    };
    Box::pin(stream::unfold(lines, |mut lines| async move {
        let event = lines.next().await?;
        lines.finished |= event.is_err() || matches!(event, Ok(Event::Done { .. }));
        if matches!(event, Ok(Event::Done { .. })) {
            lines.read_to_the_end().await;
        }
        Some((event, lines))
    }))
}

impl Lines {
    /// Reads what follows the end mark, which is nothing: only then can the connection serve the next request.
    async fn read_to_the_end(&mut self) {
        let mut chunks = std::mem::replace(&mut self.chunks, Box::pin(stream::empty()));
        let mut rest =
            Box::pin(tokio::time::timeout(END_OF_BODY, async move { while chunks.next().await.is_some() {} }));
        // It is there as a rule, and who asks next finds the connection free; else nobody waits for it. The connection's
        // task has it once it had its turn, mostly.
        for _ in 0..2 {
            if (&mut rest).now_or_never().is_some() {
                return;
            }
            tokio::task::yield_now().await;
        }
        if tokio::time::timeout(END_IS_THERE, &mut rest).await.is_err() {
            tokio::spawn(rest);
        }
    }

    async fn next(&mut self) -> Option<Result<Event, Error>> {
        if self.finished {
            return None;
        }
        let step = self.step().await;
        self.has_begun |= matches!(step, Ok(Event::Text(_) | Event::Extra(_)));
        Some(step.map_err(|cause| {
            let cause = match cause {
                RemoteCause::Reported(message) if !self.has_begun && is_about_ability(&message) => {
                    RemoteCause::Unable(message)
                }
                RemoteCause::Reported(message)
                    if !self.has_begun
                        && self.reader.says_that_the_request_is_wrong()
                        && !is_about_length(&message) =>
                {
                    let message = format!("host {} refuses the request: {message}", self.host);
                    return Error::InvalidRequest { message, param: None };
                }
                // Some refuse a prompt in a stream of their own, with status 200.
                RemoteCause::Reported(message) if !self.has_begun && is_about_length(&message) => {
                    RemoteCause::TooLong(message)
                }
                cause => cause,
            };
            Error::Remote { host: self.host.clone(), cause }
        }))
    }

    async fn step(&mut self) -> Result<Event, RemoteCause> {
        if let Some(event) = self.waiting.pop_front() {
            return Ok(event);
        }
        if let Some(event) = self.buffered()? {
            return Ok(event);
        }
        let next = match self.reader.end() {
            None => self.chunks.next().await,
            // Only its usage may follow.
            Some(_) => tokio::time::timeout(END_OF_BODY, self.chunks.next()).await.unwrap_or(None),
        };
        match next {
            Some(Ok(chunk)) => {
                self.buffer.extend_from_slice(&chunk);
                self.read += chunk.len();
                if self.read > MAX_ANSWER_BYTES && matches!(self.reader, Reader::Ndjson | Reader::Sse(_)) {
                    return Err(RemoteCause::Garbled(format!("an answer of more than {MAX_ANSWER_BYTES} bytes")));
                }
                // Heartbeats, or half a line: it lives.
                Ok(self.buffered()?.unwrap_or(Event::Alive))
            }
            // What is left without a line end may be garbage, such as an HTML page: say which it is. Or it is all there was.
            Some(Err(_)) => {
                let is_half_a_line = [&b"{"[..], b"data:"].iter().any(|begins| self.buffer.starts_with(begins));
                match self.rest() {
                    Ok(rest) => rest.ok_or(RemoteCause::Cut),
                    Err(RemoteCause::Garbled(_)) if is_half_a_line => self.reader.end().ok_or(RemoteCause::Cut),
                    Err(cause) => self.reader.end().ok_or(cause),
                }
            }
            None => self.rest().and_then(|end| end.ok_or(RemoteCause::Cut)),
        }
    }

    /// The next event of what has come.
    fn buffered(&mut self) -> Result<Option<Event>, RemoteCause> {
        let line_end = |buffer: &BytesMut| buffer.iter().position(|&byte| byte == b'\n');
        while let Some(at) = line_end(&self.buffer).filter(|_| !matches!(self.reader, Reader::Whole(_))) {
            let line = self.buffer.split_to(at + 1);
            let RemoteLine { step, end } = match self.reader.line(&line) {
                // It has ended: what follows is of no account.
                Err(cause) => return self.reader.end().map(Some).ok_or(cause),
                Ok(read) => read,
            };
            self.waiting.extend(step.into_iter().chain(end));
            if let Some(event) = self.waiting.pop_front() {
                return Ok(Some(event));
            }
        }
        let (most, what) = match self.reader {
            Reader::Whole(_) => (MAX_WHOLE_BYTES, "an answer"),
            _ => (MAX_LINE_BYTES, "a line"),
        };
        match self.buffer.len() > most {
            true => Err(RemoteCause::Garbled(format!("{what} of more than {most} bytes"))),
            false => Ok(None),
        }
    }

    /// The end, if what came without a further line makes one.
    fn rest(&mut self) -> Result<Option<Event>, RemoteCause> {
        let rest = self.buffer.split();
        let RemoteLine { step, end } = self.reader.line(&rest)?;
        let Some(end) = end.or_else(|| self.reader.end()) else { return Ok(None) };
        self.waiting.extend(step.into_iter().chain([end]));
        Ok(self.waiting.pop_front())
    }
}

fn all_senses() -> Vec<String> {
    [MediaKind::Image, MediaKind::Audio].map(|kind| kind.capability().to_owned()).to_vec()
}
