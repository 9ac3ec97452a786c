//! Vectors and scores.

use axum::extract::{Request, State};
use axum::response::Response;
use sarai_api::Served;
use sarai_api::embed::{self, Embedded, Parsed};
use sarai_core::Error;
use serde_json::Value;

use super::error::Failure;
use super::{App, body, json_response, lane, served_headers, terms};
use crate::config::ModelRole;

/// `POST /v1/embeddings`.
pub async fn openai(State(app): State<App>, request: Request) -> Result<Response, Failure> {
    let write = |parsed: &Parsed, embedded: &Embedded, served: &Served| {
        embed::openai(&parsed.model, parsed.is_base64, embedded, served)
    };
    answer(app, request, embed::parse_openai, write).await.map_err(Failure::OpenAi)
}

/// `POST /v1/rerank`.
pub async fn rerank(State(app): State<App>, request: Request) -> Result<Response, Failure> {
    answer(app, request, embed::parse_rerank, embed::rerank).await.map_err(Failure::OpenAi)
}

/// `POST /api/embed`.
pub async fn ollama(State(app): State<App>, request: Request) -> Result<Response, Failure> {
    let write = |parsed: &Parsed, embedded: &Embedded, served: &Served| embed::ollama(&parsed.model, embedded, served);
    answer(app, request, embed::parse_ollama, write).await.map_err(Failure::Ollama)
}

/// `POST /api/embeddings`, the older one.
pub async fn ollama_old(State(app): State<App>, request: Request) -> Result<Response, Failure> {
    let write = |_: &Parsed, embedded: &Embedded, _: &Served| embed::ollama_old(embedded);
    answer(app, request, embed::parse_ollama_old, write).await.map_err(Failure::Ollama)
}

async fn answer(
    app: App,
    request: Request,
    parse: fn(&[u8]) -> Result<Parsed, Error>,
    write: fn(&Parsed, &Embedded, &Served) -> Value,
) -> Result<Response, Error> {
    let (terms, lane) = (terms(request.headers())?, lane(request.headers())?);
    let mut parsed = parse(&body::read(request, &app).await?)?;
    if parsed.model.is_empty() {
        parsed.model = app.gateway.only_model(ModelRole::Embedding)?;
    }
    parsed.request.lane = lane.unwrap_or_default();
    let (served, mut embedded) = app.gateway.embed(&parsed, terms).await?;
    embedded.shorten(&parsed)?;
    Ok(json_response(served_headers(&served), &write(&parsed, &embedded, &served)))
}
