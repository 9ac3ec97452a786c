//! Why a host does not do what it was asked for: by the client's fault, for what it cannot, or for now. There are few codes for it, and many
//! words.

use std::time::Duration;

use reqwest::header::RETRY_AFTER;
use reqwest::{Response, StatusCode};
use sarai_core::{Error, RemoteCause};

use super::{kind, up_to};

/// How much of an error body is read, in bytes, and how long it is waited for.
const MAX_ERROR_BYTES: usize = 4 << 10;
const ERROR_WITHIN: Duration = Duration::from_secs(2);

/// Why a host does not do what it was asked for: by the client's fault, or its own.
pub(super) async fn refusal(response: Response, url: &str, model_name: &str) -> Error {
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

pub(super) fn unreachable(error: &reqwest::Error) -> RemoteCause {
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

pub(super) async fn refused(response: Response, model_name: &str) -> RemoteCause {
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
pub(super) fn is_about_length(message: &str) -> bool {
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
pub(super) fn is_about_ability(message: &str) -> bool {
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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn a_host_says_in_seconds_or_by_a_date_when_it_is_there_again() {
        assert_eq!(retry_after(" 7 "), Some(7));
        let date = |time| httpdate::fmt_http_date(time);
        let soon = retry_after(&date(SystemTime::now() + Duration::from_secs(90))).unwrap();
        assert!((88..=91).contains(&soon), "{soon}");
        assert_eq!(retry_after(&date(SystemTime::now() - Duration::from_secs(90))), Some(1), "it is over");
        assert_eq!(retry_after("soon"), None);
    }
}
