//! Both APIs over HTTP: URL to handler, body to core, events to bytes.

mod access;
mod admin;
mod body;
pub mod connections;
mod embed;
mod error;
mod ollama;
mod openai;
mod pool;
mod show;
mod stream;
mod waiting;

use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use sarai_api::Served;
use sarai_core::{Error, Lane};
use tokio::sync::Semaphore;

use crate::config::Access;
use crate::dispatch::Terms;
use crate::gateway::Gateway;
pub use access::Door;
use error::Failure;

/// What every handler needs; each request has it several times.
#[derive(Clone, Debug)]
pub struct App(Arc<Shared>);

impl App {
    /// Of all of it.
    pub fn new(shared: Shared) -> Self {
        Self(Arc::new(shared))
    }
}

impl Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

/// What all handlers share.
#[derive(Debug)]
pub struct Shared {
    /// The entrance.
    pub gateway: Gateway,
    /// The largest body in bytes.
    pub max_body_bytes: usize,
    /// KiB that all bodies may have together while they come.
    pub bodies: Arc<Semaphore>,
    /// How long a client may leave its answer unread.
    pub stall: Duration,
    /// How often a client is told of a load that its stream waits for.
    pub heartbeat: Duration,
    /// Since when the server is there.
    pub started: SystemTime,
}

/// Every URL, for those who may ask.
pub fn door(app: App, access: &Access) -> Door {
    Door::new(urls(app), access)
}

/// Clients ask for these words, to see whether Ollama's API is there.
const IS_RUNNING: &str = "Ollama is running";

fn urls(app: App) -> Router {
    let wrong_method = |api: fn(Error) -> Failure| {
        any(move |request: Request| async move { Failure::wrong_method(api, request.method(), request.uri()) })
    };
    let of = |method: axum::routing::MethodRouter<App>, api| method.fallback_service(wrong_method(api).with_state(()));
    Router::new()
        .route("/v1/chat/completions", of(post(openai::chat), Failure::OpenAi))
        .route("/chat/completions", of(post(openai::chat), Failure::OpenAi))
        .route("/v1/completions", of(post(openai::completion), Failure::OpenAi))
        .route("/completions", of(post(openai::completion), Failure::OpenAi))
        .route("/v1/embeddings", of(post(embed::openai), Failure::OpenAi))
        .route("/embeddings", of(post(embed::openai), Failure::OpenAi))
        .route("/v1/rerank", of(post(embed::rerank), Failure::OpenAi))
        .route("/v1/reranking", of(post(embed::rerank), Failure::OpenAi))
        .route("/rerank", of(post(embed::rerank), Failure::OpenAi))
        .route("/reranking", of(post(embed::rerank), Failure::OpenAi))
        .route("/v1/models", of(get(openai::models), Failure::OpenAi))
        .route("/models", of(get(openai::models), Failure::OpenAi))
        .route("/v1/models/{*id}", of(get(openai::model), Failure::OpenAi))
        .route("/api/chat", of(post(ollama::chat), Failure::Ollama))
        .route("/api/generate", of(post(ollama::generate), Failure::Ollama))
        .route("/api/embed", of(post(embed::ollama), Failure::Ollama))
        .route("/api/embeddings", of(post(embed::ollama_old), Failure::Ollama))
        .route("/api/show", of(post(show::show), Failure::Ollama))
        .route("/api/tags", of(get(ollama::tags), Failure::Ollama))
        .route("/api/version", of(get(ollama::version), Failure::Ollama))
        .route("/api/ps", of(get(admin::ps), Failure::Ollama))
        .route("/api/pool/ledger", of(get(pool::ledger), Failure::Ollama))
        .route("/api/pool/plan", of(post(pool::plan), Failure::Ollama))
        .route("/models/load", of(post(pool::load), Failure::OpenAi))
        .route("/models/unload", of(post(pool::unload), Failure::OpenAi))
        .route("/metrics", get(pool::metrics))
        .route("/health", get(admin::health))
        .route("/v1/health", get(admin::health))
        .route("/ready", get(admin::ready))
        .route("/", get(|| async { IS_RUNNING }))
        .fallback(|request: Request| async move { Failure::unknown_path(request.uri()) })
        .with_state(app)
}

/// How the client wants to be served.
///
/// # Errors
/// A header says what it cannot.
fn terms(headers: &HeaderMap) -> Result<Terms, Error> {
    Ok(Terms { strict: is_strict(headers)?, within: within(headers)? })
}

/// How long the client waits: `x-sarai-timeout`, in seconds.
///
/// # Errors
/// The header says something else.
fn within(headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    let Some(text) = headers.get("x-sarai-timeout").map(|value| value.to_str().unwrap_or_default()) else {
        return Ok(None);
    };
    let seconds = text.trim().parse::<f64>().ok().filter(|seconds| *seconds > 0.0);
    let within = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let message = || format!("x-sarai-timeout is `{text}`: use a number of seconds, such as 90");
    within.ok_or_else(|| Error::invalid("x-sarai-timeout", message())).map(Some)
}

/// Whether the client wants no degraded answer: `x-sarai-strict: true`.
///
/// # Errors
/// The header says something else.
fn is_strict(headers: &HeaderMap) -> Result<bool, Error> {
    match headers.get("x-sarai-strict").map(|value| value.to_str().unwrap_or_default().to_ascii_lowercase()) {
        None => Ok(false),
        Some(text) if text == "true" || text == "1" => Ok(true),
        Some(text) if text == "false" || text == "0" => Ok(false),
        Some(text) => Err(Error::invalid("x-sarai-strict", format!("x-sarai-strict is `{text}`: use true or false"))),
    }
}

/// The lane that the client names: `x-sarai-lane: bulk`, or `interactive`.
///
/// # Errors
/// The header says something else.
fn lane(headers: &HeaderMap) -> Result<Option<Lane>, Error> {
    match headers.get("x-sarai-lane").map(|value| value.to_str().unwrap_or_default().to_ascii_lowercase()) {
        None => Ok(None),
        Some(text) if text == "bulk" => Ok(Some(Lane::Bulk)),
        Some(text) if text == "interactive" => Ok(Some(Lane::Interactive)),
        Some(text) => Err(Error::invalid("x-sarai-lane", format!("x-sarai-lane is `{text}`: use bulk or interactive"))),
    }
}

/// The headers that say who served an answer.
fn served_headers(served: &Served) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let mut set = |name: &'static str, value: &str| {
        // A header holds visible ASCII only; a reason may quote anything.
        let ascii: String = value.chars().map(|c| if (' '..='~').contains(&c) { c } else { '?' }).take(512).collect();
        if let Ok(value) = HeaderValue::from_str(&ascii) {
            headers.insert(HeaderName::from_static(name), value);
        }
    };
    set("x-sarai-served-by", &served.by);
    if let Some(reason) = &served.fallback_reason {
        set("x-sarai-fallback-reason", reason);
    }
    if !served.degraded.is_empty() {
        set("x-sarai-degraded", &served.degraded.join(","));
    }
    headers
}

fn json_response(headers: HeaderMap, body: &serde_json::Value) -> Response {
    let json = [(axum::http::header::CONTENT_TYPE, "application/json")];
    (headers, json, body.to_string()).into_response()
}
