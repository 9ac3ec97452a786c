//! The one table from a cause to an HTTP status, and both APIs' error bodies.

use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use sarai_api::{ollama, openai};
use sarai_core::{Error, Refusal, RemoteCause};
use serde_json::{Value, json};

use super::json_response;

/// An error in the shape of the API that was called.
pub enum Failure {
    /// `{"error": {"message", "type", "param", "code"}}`.
    OpenAi(Error),
    /// `{"error": "message"}`.
    Ollama(Error),
}

/// What an error is called on the wire.
struct Row {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
}

/// The table.
fn row(error: &Error) -> Row {
    let row = |status, kind, code| Row { status, kind, code: Some(code) };
    match error {
        Error::InvalidRequest { .. } => {
            Row { status: StatusCode::BAD_REQUEST, kind: "invalid_request_error", code: None }
        }
        // The kind is that of llama.cpp's server, the code OpenAI's.
        Error::ContextOverflow { .. } => {
            row(StatusCode::BAD_REQUEST, "exceed_context_size_error", "context_length_exceeded")
        }
        Error::TextTooLong { .. } => row(StatusCode::BAD_REQUEST, "invalid_request_error", "context_length_exceeded"),
        Error::UnknownModel { .. } => row(StatusCode::NOT_FOUND, "invalid_request_error", "model_not_found"),
        Error::Unsupported { .. } => row(StatusCode::BAD_REQUEST, "invalid_request_error", "unsupported"),
        Error::ForeignOrigin { .. } => row(StatusCode::FORBIDDEN, "permission_error", "foreign_origin"),
        Error::WrongKey => row(StatusCode::UNAUTHORIZED, "authentication_error", "invalid_api_key"),
        Error::BodyTooLarge { .. } => row(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", "body_too_large"),
        Error::Overloaded { .. } => row(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "overloaded"),
        Error::Deadline { .. } => row(StatusCode::GATEWAY_TIMEOUT, "server_error", "deadline_exceeded"),
        Error::DoesNotFit(_) => row(StatusCode::SERVICE_UNAVAILABLE, "server_error", "insufficient_memory"),
        Error::Unavailable { .. } => row(StatusCode::SERVICE_UNAVAILABLE, "server_error", "model_unavailable"),
        Error::WorkerDied { .. } => row(StatusCode::BAD_GATEWAY, "server_error", "worker_died"),
        Error::SchemaBroken { .. } => row(StatusCode::BAD_REQUEST, "invalid_request_error", "json_validate_failed"),
        Error::Remote { cause: RemoteCause::Silent { .. }, .. } => {
            row(StatusCode::GATEWAY_TIMEOUT, "server_error", "remote_silent")
        }
        Error::Remote { cause, .. } if cause.is_of_the_request() => {
            row(StatusCode::BAD_REQUEST, "invalid_request_error", cause.slug())
        }
        Error::Remote { cause, .. } => row(StatusCode::BAD_GATEWAY, "server_error", cause.slug()),
        Error::AllFailed { .. } => row(StatusCode::SERVICE_UNAVAILABLE, "server_error", "all_deployments_failed"),
        Error::ShuttingDown => row(StatusCode::SERVICE_UNAVAILABLE, "server_error", "shutting_down"),
        Error::Internal(_) => row(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "internal"),
    }
}

/// The itemised reasons of refusals, as JSON.
fn details(error: &Error) -> Option<Value> {
    match error {
        Error::DoesNotFit(refusal) => Some(refusal_body(refusal)),
        Error::AllFailed { attempts, .. } => {
            let attempt = |a: &sarai_core::Attempt| json!({ "deployment": a.deployment, "error": a.error.to_string(), "details": details(&a.error) });
            Some(json!({ "attempts": attempts.iter().map(attempt).collect::<Vec<_>>() }))
        }
        _ => None,
    }
}

/// Why something does not fit, item by item, and what would help.
pub fn refusal_body(refusal: &Refusal) -> Value {
    json!({
        "needs_bytes": refusal.needed(), "needs": refusal.needs, "context_tokens": refusal.context_tokens,
        "budget_bytes": refusal.budget, "server_bytes": refusal.server, "free_bytes": refusal.free,
        "available_bytes": refusal.available, "held": refusal.held, "strategy": refusal.strategy,
        "max_concurrent_llms": refusal.max_concurrent_llms, "remedies": refusal.remedies(),
    })
}

/// The body of an error in OpenAI's shape; also the error event of a stream.
pub fn openai_body(error: &Error) -> Value {
    let Row { kind, code, .. } = row(error);
    let param = match error {
        Error::InvalidRequest { param, .. } => param.as_deref(),
        Error::UnknownModel { .. } => Some("model"),
        _ => None,
    };
    let mut body =
        openai::error_with_details(openai::error_body(&error.to_string(), kind, param, code), details(error));
    if let Error::ContextOverflow { prompt_tokens, context_tokens, .. } = error {
        // As llama.cpp's server has it.
        body["error"]["n_prompt_tokens"] = (*prompt_tokens).into();
        body["error"]["n_ctx"] = (*context_tokens).into();
    }
    body
}

/// The body of an error in Ollama's shape; also the error line of a stream.
pub fn ollama_body(error: &Error) -> Value {
    ollama::error_body(&error.to_string(), details(error))
}

impl Failure {
    /// The method does not belong to this path.
    pub fn wrong_method(api: fn(Error) -> Self, method: &Method, uri: &Uri) -> Response {
        let message = format!("`{method}` is not allowed on {}: see the method in the documentation", uri.path());
        let mut response = api(Error::InvalidRequest { message, param: None }).into_response();
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        response
    }

    /// There is nothing at this path.
    pub fn unknown_path(uri: &Uri) -> Response {
        let message = format!("there is nothing at {}: the APIs are below /v1 and /api", uri.path());
        let error = Error::InvalidRequest { message, param: None };
        let api = if uri.path().starts_with("/api") { Self::Ollama } else { Self::OpenAi };
        let mut response = api(error).into_response();
        *response.status_mut() = StatusCode::NOT_FOUND;
        response
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let (body, error) = match self {
            Self::OpenAi(error) => (openai_body(&error), error),
            Self::Ollama(error) => (ollama_body(&error), error),
        };
        let mut headers = HeaderMap::new();
        if matches!(error, Error::Overloaded { .. }) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if matches!(error, Error::Deadline { .. } | Error::DoesNotFit(_)) {
            // OpenAI's clients would ask for the same once more, and wait as long for the same.
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        let mut response = json_response(headers, &body);
        *response.status_mut() = row(&error).status;
        response
    }
}
