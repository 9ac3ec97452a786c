//! Ollama's endpoints.

use std::time::{Duration, SystemTime};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use sarai_api::ollama::{self, End, Kind, LineWriter, OllamaRequest};
use sarai_api::{Parsed, Served};
use sarai_core::{Error, Event, FinishReason, TokenLogprob, ToolCall};
use serde_json::{Value, json};

use super::error::{Failure, ollama_body};
use super::openai::AS_IT_COMES;
use super::waiting::{self, Begun, Step, Waiting};
use super::{App, body, json_response, lane, served_headers, stream, terms};
use crate::dispatch::Terms;

/// `POST /api/chat`.
pub async fn chat(State(app): State<App>, request: Request) -> Result<Response, Failure> {
    answer(app, request, Kind::Chat, ollama::parse_chat).await.map_err(Failure::Ollama)
}

/// `POST /api/generate`.
pub async fn generate(State(app): State<App>, request: Request) -> Result<Response, Failure> {
    answer(app, request, Kind::Generate, ollama::parse_generate).await.map_err(Failure::Ollama)
}

/// The version of Ollama whose API is followed: clients look whether it is new enough for what they use.
const OLLAMA: &str = "0.24.0";

/// `GET /api/version`.
pub async fn version() -> Response {
    json_response(HeaderMap::new(), &json!({ "version": OLLAMA, "sarai": env!("CARGO_PKG_VERSION") }))
}

/// `GET /api/tags`.
pub async fn tags(State(app): State<App>) -> Response {
    let catalog = &app.gateway.catalog();
    let models: Vec<_> = catalog.models.iter().map(|model| ollama::list_entry(&catalog.facts(model))).collect();
    json_response(HeaderMap::new(), &json!({ "models": models }))
}

async fn answer(
    app: App,
    request: Request,
    kind: Kind,
    parse: fn(&[u8]) -> Result<OllamaRequest, Error>,
) -> Result<Response, Error> {
    let without_text = |model: String, reason| {
        let line = LineWriter { kind, model }.without_text(SystemTime::now(), reason);
        Ok(json_response(HeaderMap::new(), &line))
    };
    let (terms, lane) = (terms(request.headers())?, lane(request.headers())?);
    match parse(&body::read(request, &app).await?)? {
        OllamaRequest::Generate(parsed) => generated(app, kind, parsed.in_lane(lane), terms).await,
        OllamaRequest::Load { model, residence } => {
            app.gateway.load(&model, residence).await?;
            without_text(model, "load")
        }
        OllamaRequest::Unload { model } => {
            app.gateway.unload(&model).await?;
            without_text(model, "unload")
        }
    }
}

async fn generated(app: App, kind: Kind, parsed: Parsed, terms: Terms) -> Result<Response, Error> {
    let delivery = parsed.delivery;
    let writer = LineWriter { kind, model: parsed.model.clone() };
    if !delivery.stream {
        let answer = app.gateway.answer(parsed, terms).await?;
        let headers = served_headers(&answer.served);
        let whole = stream::collect(answer.events).await?;
        return Ok(json_response(headers, &writer.whole(SystemTime::now(), whole, &answer.served)));
    }
    let stall = app.stall;
    let answer = match waiting::begin(app, parsed, terms).await? {
        Begun::Answer(answer) => answer,
        Begun::Waiting(waiting) => return Ok(told_meanwhile(waiting, writer, stall)),
    };
    let headers = served_headers(&answer.served);
    let mut under_way = UnderWay::of(answer.served);
    let encode = move |event| encode(&writer, &mut under_way, event).into();
    Ok(lines(headers, stream::body(answer.events, stall, None, encode)))
}

/// A stream whose first lines have no text, and tell of what it waits for.
fn told_meanwhile(waiting: Waiting, writer: LineWriter, stall: Duration) -> Response {
    let mut under_way = None;
    let encode = move |what| -> Bytes {
        match (what, &mut under_way) {
            (Step::Waits(percent), _) => format!("{}\n", writer.loading(SystemTime::now(), percent)).into(),
            (Step::Begins(served), under_way) => {
                *under_way = Some(UnderWay::of(*served));
                Bytes::new()
            }
            (Step::Says(event), Some(under_way)) => encode(&writer, under_way, event).into(),
            (Step::Says(event), None) => {
                event.err().map(|error| format!("{}\n", ollama_body(&error))).unwrap_or_default().into()
            }
        }
    };
    lines(HeaderMap::new(), stream::body(waiting.steps(), stall, None, encode))
}

fn lines(mut headers: HeaderMap, body: Body) -> Response {
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/x-ndjson"));
    headers.insert(AS_IT_COMES.0, AS_IT_COMES.1);
    (headers, body).into_response()
}

/// What later lines say.
struct UnderWay {
    served: Served,
    /// They are passed on whole, before the end.
    calls: Vec<ToolCall>,
    /// Of the text that comes next.
    logprobs: Vec<TokenLogprob>,
    /// Tokens of all that was said.
    context: Value,
}

impl UnderWay {
    fn of(served: Served) -> Self {
        Self { served, calls: Vec::new(), logprobs: Vec::new(), context: Value::Null }
    }
}

fn encode(writer: &LineWriter, under_way: &mut UnderWay, event: Result<Event, Error>) -> String {
    let UnderWay { served, calls, logprobs, context } = under_way;
    let now = SystemTime::now();
    let line = match event {
        Ok(Event::Resumed { by, reason, degraded }) => {
            served.resume(by, reason, degraded);
            return String::new();
        }
        Ok(Event::Text(text)) if logprobs.is_empty() => writer.text(now, &text),
        Ok(Event::Text(text)) => writer.text_with(now, &text, &std::mem::take(logprobs)),
        Ok(Event::Logprobs(tokens)) => {
            logprobs.extend(tokens);
            return String::new();
        }
        Ok(Event::Reasoning(text)) => writer.reasoning(now, &text),
        Ok(Event::ToolCall(part)) => {
            part.add_to(calls);
            return String::new();
        }
        Ok(Event::Context(tokens)) => {
            *context = tokens.into();
            return String::new();
        }
        Ok(Event::Extra(mut extra)) => {
            if let Some(tokens) = extra.top.remove("context") {
                *context = tokens;
                if extra.only_describes() && extra.top.is_empty() {
                    return String::new();
                }
            }
            match writer.extra(now, *extra) {
                Some(line) => line,
                None => return String::new(),
            }
        }
        Ok(Event::Alive | Event::Vector { .. }) => return String::new(),
        Ok(Event::Done { finish, usage, timings }) => {
            if finish == FinishReason::Stop {
                // A text that ends the answer stood within one.
                calls.retain(ToolCall::is_whole);
            }
            let context = std::mem::take(context);
            let done = writer.done(now, "", End { finish, usage: &usage, timings: &timings, served, context });
            if calls.is_empty() {
                done
            } else {
                return format!("{}\n{done}\n", writer.tool_calls(now, calls));
            }
        }
        Err(error) => ollama_body(&error),
    };
    format!("{line}\n")
}
