//! OpenAI's endpoints.

mod several;

use std::fmt::{Display, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use sarai_api::openai::{self, ChunkWriter, Kind};
use sarai_api::{Parsed, Served};
use sarai_core::{Api, Error, Event, MediaKind, Timings, TokenLogprob, Usage};
use serde_json::Value;

use super::error::{Failure, openai_body};
use super::waiting::{self, Begun, Step, Waiting};
use super::{App, body, json_response, lane, served_headers, stream, terms};
use crate::catalog::Catalog;
use crate::config::{Deployment, Model, ModelRole};
use crate::pool::Snapshot;

/// `POST /v1/chat/completions`.
pub async fn chat(State(app): State<App>, request: Request) -> Result<Response, Failure> {
    answer(app, request, Kind::Chat, openai::parse_chat).await.map_err(Failure::OpenAi)
}

/// `POST /v1/completions`.
pub async fn completion(State(app): State<App>, request: Request) -> Result<Response, Failure> {
    answer(app, request, Kind::Completion, openai::parse_completion).await.map_err(Failure::OpenAi)
}

/// `GET /v1/models`.
pub async fn models(State(app): State<App>) -> Response {
    let (catalog, snapshot) = (app.gateway.catalog(), app.gateway.dispatch.pool.snapshot().await);
    let models = catalog.models.iter().map(|model| listed(&app, &catalog, model, snapshot.as_ref()));
    json_response(HeaderMap::new(), &openai::models(models.collect()))
}

/// `GET /v1/models/{id}`.
pub async fn model(State(app): State<App>, Path(id): Path<String>) -> Result<Response, Failure> {
    let (catalog, snapshot) = (app.gateway.catalog(), app.gateway.dispatch.pool.snapshot().await);
    let model = catalog.find(&id).map_err(Failure::OpenAi)?;
    Ok(json_response(HeaderMap::new(), &listed(&app, &catalog, model, snapshot.as_ref())))
}

/// A model of the list; of one that is answered here first, also whether it is loaded, and what it senses, as llama.cpp's router has it.
fn listed(app: &App, catalog: &Catalog, model: &Model, snapshot: Option<&Snapshot>) -> Value {
    let created = app.started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let engine = model.deployments.first().and_then(Deployment::engine);
    let Some((engine, snapshot)) = engine.and_then(|(engine, _)| Some((engine, snapshot?))) else {
        return openai::model(&model.name, created);
    };
    let status = match (snapshot.workers.contains_key(&engine), snapshot.loading.contains_key(&engine)) {
        (true, _) => "loaded",
        (false, true) => "loading",
        (false, false) => "unloaded",
    };
    let context_tokens = model.deployments.iter().find_map(|deployment| match deployment {
        Deployment::Local { context_tokens, .. } => Some(*context_tokens),
        Deployment::Remote(_) | Deployment::Process { .. } => None,
    });
    let file = catalog.known_file(engine).map(|file| {
        let of_model = |key: &str| file.header.arch_size(key).unwrap_or_default();
        [of_model("context_length"), of_model("embedding_length"), file.header.parameters(), file.size]
    });
    let known = openai::LocalModel { status, senses: senses(catalog, model), context_tokens, file };
    openai::local_model(&model.name, created, &model.aliases, known)
}

/// What a model senses, or one that it falls back to; nothing is known where a host may answer, or a file that was not read yet.
fn senses(catalog: &Catalog, model: &Model) -> Option<Vec<MediaKind>> {
    let deployments = catalog.with_fallbacks(model).flat_map(|model| &model.deployments);
    let files = deployments.map(|deployment| match deployment {
        Deployment::Local { engine, .. } => catalog.known_file(*engine),
        Deployment::Remote(_) | Deployment::Process { .. } => None,
    });
    let files: Vec<_> = files.collect::<Option<_>>()?;
    let is_sensed = |kind: &MediaKind| files.iter().any(|file| file.senses(*kind));
    Some([MediaKind::Image, MediaKind::Audio].into_iter().filter(is_sensed).collect())
}

async fn answer(
    app: App,
    request: Request,
    kind: Kind,
    parse: fn(&[u8]) -> Result<Parsed, Error>,
) -> Result<Response, Error> {
    let (terms, lane) = (terms(request.headers())?, lane(request.headers())?);
    let mut parsed = parse(&body::read(request, &app).await?)?.in_lane(lane);
    if parsed.model.is_empty() {
        parsed.model = app.gateway.only_model(ModelRole::Chat)?;
    }
    let delivery = parsed.delivery;
    let writer = ChunkWriter {
        kind,
        id: new_id(kind),
        created: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        model: parsed.model.clone(),
        include_usage: delivery.include_usage,
        index: 0,
        is_local: false,
    };
    if !parsed.others.is_empty() {
        return several::answer(app, parsed, writer, terms).await;
    }
    if !delivery.stream {
        let answer = app.gateway.answer(parsed, terms).await?;
        let headers = served_headers(&answer.served);
        let whole = stream::collect(answer.events).await?;
        let body = writer.by(&answer.served).whole(whole, &answer.served);
        return Ok(json_response(headers, &body));
    }
    let stall = app.stall;
    let answer = match waiting::begin(app, parsed, terms).await? {
        Begun::Answer(answer) => answer,
        Begun::Waiting(waiting) => return Ok(told_meanwhile(waiting, writer, stall)),
    };
    let headers = served_headers(&answer.served);
    let writer = writer.by(&answer.served);
    let first = writer.role().map(|chunk| Bytes::from(sse(&chunk)));
    let around = writer.around_text();
    let mut end = End::of(answer.served);
    let encode = move |event| match event {
        Ok(Event::Text(text)) if end.logprobs.is_empty() => sse(&around.with(text)).into(),
        event => encode(&writer, &mut end, event).into(),
    };
    Ok(event_stream(headers, stream::body(answer.events, stall, first, encode)))
}

/// A stream whose first words are comments about what it waits for.
fn told_meanwhile(waiting: Waiting, mut writer: ChunkWriter, stall: Duration) -> Response {
    let mut end = None;
    let encode = move |what| -> Bytes {
        let done = match &what {
            Step::Says(Ok(Event::Done { usage, timings, .. })) => Some((*usage, *timings)),
            _ => None,
        };
        let mut text = write_step(&mut writer, &mut end, what);
        if let (Some((usage, timings)), Some(end)) = (done, &end) {
            text.push_str(&last(&writer, &usage, Some(&timings), &end.usage_details));
        }
        text.into()
    };
    event_stream(HeaderMap::new(), stream::body(waiting.steps(), stall, None, encode))
}

fn event_stream(mut headers: HeaderMap, body: Body) -> Response {
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(AS_IT_COMES.0, AS_IT_COMES.1);
    (headers, body).into_response()
}

/// Proxies such as nginx would keep a stream until it is whole.
pub const AS_IT_COMES: (HeaderName, HeaderValue) =
    (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));

/// What the end of a stream says.
struct End {
    served: Served,
    /// Of a host's usage, what is no count.
    usage_details: Value,
    /// Of the text that comes next.
    logprobs: Vec<TokenLogprob>,
    /// Characters that were said with such.
    said: usize,
}

impl End {
    fn of(served: Served) -> Self {
        Self { served, usage_details: Value::Null, logprobs: Vec::new(), said: 0 }
    }
}

/// A step of an answer, which may not have begun.
fn write_step(writer: &mut ChunkWriter, end: &mut Option<End>, what: Step) -> String {
    match (what, end) {
        (Step::Waits(Some(percent)), _) => format!(": loading, {percent} %\n\n"),
        (Step::Waits(None), _) => ": waiting\n\n".into(),
        (Step::Begins(served), end) => {
            writer.is_local = served.is_local;
            *end = Some(End::of(*served));
            writer.role().map(|chunk| sse(&chunk)).unwrap_or_default()
        }
        (Step::Says(event), Some(end)) => step(writer, end, event),
        (Step::Says(event), None) => event.err().map(|error| sse(&openai_body(&error))).unwrap_or_default(),
    }
}

/// A step of the only answer, and behind its end that of the stream.
fn encode(writer: &ChunkWriter, end: &mut End, event: Result<Event, Error>) -> String {
    let done = match &event {
        Ok(Event::Done { usage, timings, .. }) => Some((*usage, *timings)),
        _ => None,
    };
    let mut text = step(writer, end, event);
    if let Some((usage, timings)) = done {
        text.push_str(&last(writer, &usage, Some(&timings), &end.usage_details));
    }
    text
}

/// What follows the ends of all answers.
fn last(writer: &ChunkWriter, usage: &Usage, timings: Option<&Timings>, details: &Value) -> String {
    let mut last = writer.usage(usage, timings, details).map(|chunk| sse(&chunk)).unwrap_or_default();
    last.push_str("data: [DONE]\n\n");
    last
}

fn step(writer: &ChunkWriter, end: &mut End, event: Result<Event, Error>) -> String {
    match event {
        Ok(Event::Resumed { by, reason, degraded }) => {
            end.served.resume(by, reason, degraded);
            // That was the one's who broke off.
            end.usage_details = Value::Null;
            String::new()
        }
        Ok(Event::Text(text)) if end.logprobs.is_empty() => sse(&writer.text(&text)),
        Ok(Event::Text(text)) => {
            let chunk = writer.text_with(&text, &std::mem::take(&mut end.logprobs), end.said);
            end.said += text.chars().count();
            sse(&chunk)
        }
        Ok(Event::Logprobs(tokens)) => {
            end.logprobs.extend(tokens);
            String::new()
        }
        Ok(Event::Reasoning(text)) => writer.reasoning(&text).map(|chunk| sse(&chunk)).unwrap_or_default(),
        Ok(Event::ToolCall(part)) => sse(&writer.tool_call(&part)),
        Ok(Event::Extra(mut extra)) => {
            if let Some(details) = extra.top.remove("usage").filter(|_| extra.api == Api::OpenAi) {
                end.usage_details = details;
                if extra.only_describes() && extra.top.is_empty() {
                    return String::new();
                }
            }
            writer.extra(*extra).map(|chunk| sse(&chunk)).unwrap_or_default()
        }
        Ok(Event::Alive | Event::Vector { .. } | Event::Context(_)) => String::new(),
        Ok(Event::Done { finish, usage, timings }) => sse(&writer.finish(finish, &usage, &timings, &end.served)),
        Err(error) => sse(&openai_body(&error)),
    }
}

fn sse(chunk: &impl Display) -> String {
    format!("data: {chunk}\n\n")
}

fn new_id(kind: Kind) -> String {
    let prefix = match kind {
        Kind::Chat => "chatcmpl-",
        Kind::Completion => "cmpl-",
    };
    let mut id = prefix.to_owned();
    let _ = write!(id, "{:032x}", rand::random::<u128>());
    id
}
