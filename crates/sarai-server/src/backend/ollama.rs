//! An Ollama host, over HTTP with kept-alive connections.
//!
//! It is asked to stream, always: bytes are its proof of life. Nothing here is retried.

use std::collections::HashMap;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt, stream};
use reqwest::{Client, Response, StatusCode};
use sarai_api::ollama::{RemoteLine, chat_request, parse_line};
use sarai_core::{Error, Event, GenerateRequest, KeepAlive, RemoteCause};

use super::EventStream;

/// The longest line that a host may send, in bytes.
const MAX_LINE_BYTES: usize = 1 << 20;
/// How long the end of a body may follow its end mark.
const END_OF_BODY: Duration = Duration::from_secs(1);
/// How much of an error body is read, in bytes.
const MAX_ERROR_BYTES: usize = 4 << 10;

/// The HTTP clients, one per connect deadline, each with its pool of connections.
#[derive(Clone, Debug, Default)]
pub struct Hosts {
    clients: HashMap<Duration, Client>,
}

impl Hosts {
    /// Clients for these connect deadlines.
    ///
    /// # Errors
    /// The TLS set-up of the machine is unusable.
    pub fn new(deadlines: impl IntoIterator<Item = Duration>) -> Result<Self, reqwest::Error> {
        let mut clients = HashMap::new();
        for connect in deadlines {
            let client = Client::builder().no_proxy().tcp_nodelay(true).connect_timeout(connect).build()?;
            clients.insert(connect, client);
        }
        Ok(Self { clients })
    }

    fn client(&self, connect: Duration) -> Client {
        self.clients.get(&connect).cloned().unwrap_or_default()
    }

    /// Asks a host for its models; used to show its state.
    ///
    /// # Errors
    /// Why it cannot be used now.
    pub async fn models(&self, url: &str, connect: Duration) -> Result<Vec<String>, RemoteCause> {
        let request = self.client(connect).get(format!("{url}/api/tags")).timeout(connect + Duration::from_secs(3));
        let response = request.send().await.map_err(|error| unreachable(&error))?;
        if !response.status().is_success() {
            return Err(refused(response, "").await);
        }
        let body = response.bytes().await.map_err(|_| RemoteCause::Cut)?;
        let tags: serde_json::Value =
            serde_json::from_slice(&body).map_err(|_| RemoteCause::Garbled("/api/tags is not JSON".into()))?;
        let models = tags["models"].as_array().into_iter().flatten();
        Ok(models.filter_map(|model| model["name"].as_str()).map(str::to_owned).collect())
    }

    /// Has a host load a model.
    ///
    /// # Errors
    /// [`Error::Remote`].
    pub async fn load(&self, place: &Place<'_>, keep_alive: Option<KeepAlive>) -> Result<(), Error> {
        let remote = |cause| Error::Remote { host: place.url.to_owned(), cause };
        let mut body = serde_json::json!({ "model": place.model_name, "stream": false });
        if let Some(context_tokens) = place.context_tokens {
            body["options"] = serde_json::json!({ "num_ctx": context_tokens });
        }
        if let Some(time) = keep_alive {
            body["keep_alive"] = sarai_api::ollama::keep_alive::to_wire(time);
        }
        let post = self.client(place.connect).post(format!("{}/api/generate", place.url)).body(body.to_string());
        let response = post.send().await.map_err(|error| remote(unreachable(&error)))?;
        if response.status().is_success() { Ok(()) } else { Err(remote(refused(response, place.model_name).await)) }
    }

    /// Starts a generation on a host.
    ///
    /// # Errors
    /// [`Error::Remote`], or [`Error::InvalidRequest`] where the host says the request is wrong.
    pub async fn open(&self, place: &Place<'_>, request: &GenerateRequest) -> Result<EventStream, Error> {
        let remote = |cause| Error::Remote { host: place.url.to_owned(), cause };
        let (path, body) = chat_request(place.model_name, place.context_tokens, request);
        let post = self.client(place.connect).post(format!("{}{path}", place.url));
        let post = post.header("content-type", "application/json").body(body.to_string());
        let response = post.send().await.map_err(|error| remote(unreachable(&error)))?;
        match response.status() {
            status if status.is_success() => Ok(events(place.url.to_owned(), response.bytes_stream())),
            StatusCode::BAD_REQUEST => match refused(response, place.model_name).await {
                RemoteCause::Status { message, .. } => Err(Error::InvalidRequest {
                    message: format!("host {} refuses the request: {message}", place.url),
                    param: None,
                }),
                other => Err(remote(other)),
            },
            _ => Err(remote(refused(response, place.model_name).await)),
        }
    }
}

/// Which host, and which of its models.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Base URL.
    pub url: &'a str,
    /// The model's name there.
    pub model_name: &'a str,
    /// `num_ctx`, if set.
    pub context_tokens: Option<u32>,
    /// Deadline of the connection.
    pub connect: Duration,
}

fn unreachable(error: &reqwest::Error) -> RemoteCause {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    RemoteCause::Unreachable(if error.is_timeout() { "connection timed out".into() } else { cause.to_string() })
}

async fn refused(response: Response, model_name: &str) -> RemoteCause {
    let status = response.status();
    let mut body = BytesMut::new();
    let mut chunks = response.bytes_stream();
    while let Some(Ok(chunk)) = chunks.next().await {
        body.extend_from_slice(&chunk);
        if body.len() >= MAX_ERROR_BYTES {
            break;
        }
    }
    if status == StatusCode::NOT_FOUND && !model_name.is_empty() {
        return RemoteCause::ModelMissing(model_name.to_owned());
    }
    let json: Option<serde_json::Value> = serde_json::from_slice(&body).ok();
    let message = json.and_then(|json| json["error"].as_str().map(str::to_owned));
    let message = message.unwrap_or_else(|| String::from_utf8_lossy(&body).chars().take(200).collect());
    RemoteCause::Status { status: status.as_u16(), message }
}

type Chunks = std::pin::Pin<Box<dyn Stream<Item = Result<Bytes, reqwest::Error>> + Send>>;

struct Lines {
    host: String,
    chunks: Chunks,
    buffer: BytesMut,
    end: Option<Event>,
    finished: bool,
}

/// The events of a host's NDJSON stream. One that ends before its end mark ends with an error.
fn events(host: String, chunks: impl Stream<Item = Result<Bytes, reqwest::Error>> + Send + 'static) -> EventStream {
    let lines = Lines { host, chunks: Box::pin(chunks), buffer: BytesMut::new(), end: None, finished: false };
    Box::pin(stream::unfold(lines, |mut lines| async move {
        let event = lines.next().await?;
        lines.finished |= event.is_err() || matches!(event, Ok(Event::Done { .. }));
        if matches!(event, Ok(Event::Done { .. })) {
            lines.read_to_the_end();
        }
        Some((event, lines))
    }))
}

impl Lines {
    /// Reads what follows the end mark, which is nothing: only then can the connection serve the next request.
    fn read_to_the_end(&mut self) {
        let mut chunks = std::mem::replace(&mut self.chunks, Box::pin(stream::empty()));
        tokio::spawn(tokio::time::timeout(END_OF_BODY, async move { while chunks.next().await.is_some() {} }));
    }

    async fn next(&mut self) -> Option<Result<Event, Error>> {
        if self.finished {
            return None;
        }
        if let Some(end) = self.end.take() {
            return Some(Ok(end));
        }
        Some(self.step().await.map_err(|cause| Error::Remote { host: self.host.clone(), cause }))
    }

    async fn step(&mut self) -> Result<Event, RemoteCause> {
        loop {
            while let Some(at) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line = self.buffer.split_to(at + 1);
                match parse_line(&line)? {
                    RemoteLine::Empty => {}
                    RemoteLine::Text(text) => return Ok(Event::Text(text)),
                    RemoteLine::Done(None, end) => return Ok(end),
                    RemoteLine::Done(Some(text), end) => {
                        self.end = Some(end);
                        return Ok(Event::Text(text));
                    }
                }
            }
            if self.buffer.len() > MAX_LINE_BYTES {
                return Err(RemoteCause::Garbled(format!("a line of more than {MAX_LINE_BYTES} bytes")));
            }
            match self.chunks.next().await {
                Some(Ok(chunk)) => self.buffer.extend_from_slice(&chunk),
                Some(Err(_)) | None if self.buffer.trim_ascii().is_empty() => return Err(RemoteCause::Cut),
                // What is left without a line end may be garbage, such as an HTML page: say which it is.
                Some(Err(_)) | None => return Err(parse_line(&self.buffer).err().unwrap_or(RemoteCause::Cut)),
            }
        }
    }
}
