//! Towards an Ollama host: a core request as its JSON, and its NDJSON lines as core events.

use std::time::Duration;

use sarai_core::{
    Api, Event, Extra, FinishReason, Format, GenerateRequest, Prompt, RemoteCause, Sampling, Timings, Usage,
};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::keep_alive;
use crate::{RemoteLine, sampling, translate};

/// The path and the body that ask an Ollama host for this. Options that are not set are left to the host; a prompt
/// that does not fit its context is to be refused, and cut only where that is asked for.
#[must_use]
pub fn chat_request(model: &str, context_tokens: Option<u32>, request: &GenerateRequest) -> (&'static str, Value) {
    let truncate = request.truncate;
    let mut body =
        json!({ "model": model, "stream": true, "truncate": truncate, "options": options(request, context_tokens) });
    if let Some(time) = request.residence.keep_alive {
        body["keep_alive"] = keep_alive::to_wire(time);
    }
    match &request.format {
        Format::Text => {}
        Format::Json => body["format"] = "json".into(),
        // Only a host that speaks the client's API has it, in a field of its own.
        Format::Gbnf(_) => {}
        Format::Schema(schema) => body["format"] = serde_json::from_str(schema).unwrap_or_default(),
    }
    let extras = request.extras.as_deref().filter(|extras| extras.api == Api::Ollama);
    let path = match &request.prompt {
        _ if extras.is_some_and(|extras| extras.is_generate) => "/api/generate",
        Prompt::Chat(messages) => {
            body["messages"] = translate::ollama_messages(messages);
            if let Some(think) = request.think {
                body["think"] = think.into();
            }
            translate::tool_fields(Api::Ollama, request).into_iter().for_each(|(name, value)| body[name] = value);
            "/api/chat"
        }
        // It has no field for them, and is not asked.
        Prompt::Tokens(_) => "/api/generate",
        Prompt::Raw(text) => {
            body["prompt"] = text.as_str().into();
            match &request.suffix {
                // The template knows where it belongs.
                Some(suffix) => body["suffix"] = suffix.as_str().into(),
                None => body["raw"] = true.into(),
            }
            "/api/generate"
        }
    };
    if let Some(extras) = extras {
        extras.fields.iter().for_each(|(name, value)| body[name] = value.clone());
        extras.options.iter().for_each(|(name, value)| body["options"][name] = value.clone());
    }
    (path, body)
}

/// Request options that Ollama does not know and would ignore.
#[must_use]
pub fn ignored_by_ollama(sampling: &Sampling) -> Vec<String> {
    let options = [("logit_bias", !sampling.logit_bias.is_empty()), ("ignore_eos", sampling.ignore_eos)];
    options.into_iter().filter(|(_, is_set)| *is_set).map(|(name, _)| name.to_owned()).collect()
}

fn options(request: &GenerateRequest, context_tokens: Option<u32>) -> Value {
    let mut options = sampling::to_wire(&request.sampling, &request.stop);
    let context_tokens = request.residence.context_tokens.or(context_tokens);
    for (key, value) in [("num_predict", request.max_tokens), ("num_ctx", context_tokens)] {
        if let Some(value) = value {
            options.insert(key.to_owned(), value.into());
        }
    }
    Value::Object(options)
}

#[derive(Deserialize)]
struct Line {
    error: Option<String>,
    message: Option<LineMessage>,
    response: Option<String>,
    done: Option<bool>,
    done_reason: Option<String>,
    load_duration: Option<u64>,
    prompt_eval_count: Option<u32>,
    prompt_eval_duration: Option<u64>,
    eval_count: Option<u32>,
    eval_duration: Option<u64>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Deserialize)]
struct LineMessage {
    #[serde(default)]
    content: String,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// What every line has, and the writer of the answer writes anew.
const WRITTEN_ANEW: [&str; 6] = ["model", "created_at", "role", "total_duration", "remote_model", "sarai"];

fn beyond(mut fields: Map<String, Value>) -> Map<String, Value> {
    fields.retain(|name, value| !value.is_null() && !WRITTEN_ANEW.contains(&name.as_str()));
    fields
}

/// Reads one line of a host's stream.
///
/// # Errors
/// The line is not Ollama's, or it reports an error.
pub fn parse_line(line: &[u8]) -> Result<RemoteLine, RemoteCause> {
    let trimmed = line.trim_ascii();
    if trimmed.is_empty() {
        return Ok(RemoteLine::default());
    }
    let start = || String::from_utf8_lossy(&trimmed[..trimmed.len().min(80)]).into_owned();
    let mut line: Line = serde_json::from_slice(trimmed).map_err(|_| RemoteCause::Garbled(start()))?;
    if let Some(error) = line.error {
        return Err(RemoteCause::Reported(error));
    }
    let done = line.done.ok_or_else(|| RemoteCause::Garbled(start()))?;
    let mut top = beyond(std::mem::take(&mut line.rest));
    let (text, message) = match line.message {
        Some(message) => (message.content, beyond(message.rest)),
        // Hidden reasoning stands beside the text there, and is no less of the answer.
        None => (line.response.unwrap_or_default(), top.remove_entry("thinking").into_iter().collect()),
    };
    let calls = message.contains_key("tool_calls");
    let step = match (top.is_empty() && message.is_empty(), text.is_empty()) {
        (true, true) => None,
        (true, false) => Some(Event::Text(text)),
        (false, _) => Some(Event::Extra(Box::new(Extra { api: Api::Ollama, text, top, choice: Map::new(), message }))),
    };
    if !done {
        return Ok(RemoteLine { step, end: None });
    }
    let ns = |value: Option<u64>| Duration::from_nanos(value.unwrap_or(0));
    let end = Event::Done {
        finish: match line.done_reason.as_deref() {
            Some("length") => FinishReason::Length,
            Some(other) if !["stop", "load", "unload"].contains(&other) => {
                return Err(RemoteCause::Reported(format!("it ended for a reason that is not known: `{other}`")));
            }
            _ if calls => FinishReason::ToolCalls,
            _ => FinishReason::Stop,
        },
        usage: Usage {
            prompt_tokens: line.prompt_eval_count.unwrap_or(0),
            cached_tokens: 0,
            completion_tokens: line.eval_count.unwrap_or(0),
        },
        timings: Timings {
            queue: Duration::ZERO,
            load: ns(line.load_duration),
            encode: Duration::ZERO,
            prefill: ns(line.prompt_eval_duration),
            decode: ns(line.eval_duration),
            ..Timings::default()
        },
    };
    Ok(RemoteLine { step, end: Some(end) })
}
