//! Lines, lists and errors, from the core to Ollama's wire.

use std::borrow::Cow;
use std::time::{Duration, SystemTime};

use sarai_core::{Api, Extra, FinishReason, MediaKind, Purpose, Sampling, Timings, TokenLogprob, ToolCall, Usage};
use serde_json::{Value, json};

use crate::openai::extension;
use crate::{Served, Whole, check, logprobs, sampling, tools};

/// Which of the two endpoints answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `/api/chat`.
    Chat,
    /// `/api/generate`.
    Generate,
}

/// Writes the lines of one answer.
#[derive(Clone, Debug)]
pub struct LineWriter {
    /// The endpoint.
    pub kind: Kind,
    /// The model as the client wrote it.
    pub model: String,
}

impl LineWriter {
    /// A line that says only how far the load has come that is waited for.
    #[must_use]
    pub fn loading(&self, now: SystemTime, percent: Option<u8>) -> Value {
        let mut line = self.text(now, "");
        line["sarai"] = json!({ "loading_percent": percent });
        line
    }

    /// A line of text.
    #[must_use]
    pub fn text(&self, now: SystemTime, text: &str) -> Value {
        let mut line = self.line(now, text);
        line["done"] = false.into();
        line
    }

    /// A line of text, and how likely its tokens were.
    #[must_use]
    pub fn text_with(&self, now: SystemTime, text: &str, logprobs: &[TokenLogprob]) -> Value {
        let mut line = self.text(now, text);
        line["logprobs"] = logprobs::of_chat(logprobs);
        line
    }

    /// A line of reasoning.
    #[must_use]
    pub fn reasoning(&self, now: SystemTime, text: &str) -> Value {
        let mut line = self.text(now, "");
        put_reasoning(&mut line, self.kind, text);
        line
    }

    /// A line of whole calls; `/api/generate` has none.
    #[must_use]
    pub fn tool_calls(&self, now: SystemTime, calls: &[ToolCall]) -> Value {
        let mut line = self.text(now, "");
        put_calls(&mut line, self.kind, calls);
        line
    }

    /// A line of what a host says beyond text; of a host that speaks another API, its text.
    #[must_use]
    pub fn extra(&self, now: SystemTime, extra: Extra) -> Option<Value> {
        if extra.api != Api::Ollama {
            return (!extra.text.is_empty()).then(|| self.text(now, &extra.text));
        }
        let mut line = self.text(now, &extra.text);
        put(&mut line, self.kind, extra);
        Some(line)
    }

    /// The only line of an answer that does not stream.
    #[must_use]
    pub fn whole(&self, now: SystemTime, whole: Whole, served: &Served) -> Value {
        let Whole { text, reasoning, tool_calls, logprobs, finish, usage, timings, extra, context } = whole;
        let end = End { finish, usage: &usage, timings: &timings, served, context: context.into() };
        let mut line = self.done(now, &text, end);
        put_reasoning(&mut line, self.kind, &reasoning);
        put_calls(&mut line, self.kind, &tool_calls);
        if !logprobs.is_empty() {
            line["logprobs"] = logprobs::of_chat(&logprobs);
        }
        if let Some(mut extra) = extra.filter(|extra| extra.api == Api::Ollama) {
            if served.is_of_another_model() {
                extra.top.remove("context");
            }
            put(&mut line, self.kind, *extra);
        }
        line
    }

    /// The last line; of an answer that does not stream, the only one, with the whole text.
    #[must_use]
    pub fn done(&self, now: SystemTime, text: &str, end: End<'_>) -> Value {
        let ns = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let timings = end.timings;
        // Ollama counts the encoding of pictures among the prompt's.
        let prompt = timings.encode + timings.prefill;
        let total = timings.queue + timings.load + prompt + timings.decode;
        let mut line = self.line(now, text);
        line["done"] = true.into();
        line["done_reason"] = match end.finish {
            FinishReason::Length => "length",
            _ => "stop",
        }
        .into();
        line["total_duration"] = ns(total).into();
        line["load_duration"] = ns(timings.load).into();
        line["prompt_eval_count"] = end.usage.prompt_tokens.into();
        line["prompt_eval_duration"] = ns(prompt).into();
        line["eval_count"] = end.usage.completion_tokens.into();
        line["eval_duration"] = ns(timings.decode).into();
        if !check::is_default(&end.context) && !end.served.is_of_another_model() {
            line["context"] = end.context;
        }
        line["sarai"] = extension(end.served, timings);
        line
    }

    /// The only line of a request that loads or unloads: `reason` is `load` or `unload`.
    #[must_use]
    pub fn without_text(&self, now: SystemTime, reason: &str) -> Value {
        let mut line = self.line(now, "");
        line["done"] = true.into();
        line["done_reason"] = reason.into();
        line
    }

    fn line(&self, now: SystemTime, text: &str) -> Value {
        let created_at = timestamp(now);
        match self.kind {
            Kind::Chat => json!({
                "model": self.model, "created_at": created_at, "message": { "role": "assistant", "content": text },
            }),
            Kind::Generate => json!({ "model": self.model, "created_at": created_at, "response": text }),
        }
    }
}

fn put_reasoning(line: &mut Value, kind: Kind, text: &str) {
    match kind {
        _ if text.is_empty() => {}
        Kind::Chat => line["message"]["thinking"] = text.into(),
        Kind::Generate => line["thinking"] = text.into(),
    }
}

fn put_calls(line: &mut Value, kind: Kind, calls: &[ToolCall]) {
    if kind == Kind::Chat && !calls.is_empty() {
        line["message"]["tool_calls"] = tools::to_ollama(calls);
    }
}

/// The fields of a host, where they belong.
fn put(line: &mut Value, kind: Kind, extra: Extra) {
    match kind {
        Kind::Chat => extra.message.into_iter().for_each(|(name, value)| line["message"][name] = value),
        // Hidden reasoning of a host that was asked for a chat stands beside the text here.
        Kind::Generate => {
            extra
                .message
                .into_iter()
                .filter(|(name, _)| name == "thinking")
                .for_each(|(name, value)| line[name] = value);
        }
    }
    extra.top.into_iter().for_each(|(name, value)| line[name] = value);
}

/// How an answer ended.
#[derive(Clone, Debug)]
pub struct End<'a> {
    /// Why.
    pub finish: FinishReason,
    /// Tokens.
    pub usage: &'a Usage,
    /// Time.
    pub timings: &'a Timings,
    /// By whom.
    pub served: &'a Served,
    /// Tokens of all that was said, where that was asked for.
    pub context: Value,
}

/// RFC 3339 in UTC with nanoseconds.
fn timestamp(time: SystemTime) -> String {
    humantime::format_rfc3339_nanos(time).to_string()
}

/// An error in Ollama's shape; details of a refusal stand beside it.
#[must_use]
pub fn error_body(message: &str, details: Option<Value>) -> Value {
    match details {
        None => json!({ "error": message }),
        Some(details) => json!({ "error": message, "sarai": details }),
    }
}

/// What the lists say of a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelFacts {
    /// Public name.
    pub name: String,
    /// Size of the file in bytes; 0 if unknown.
    pub size: u64,
    /// Identity of the file, hexadecimal.
    pub digest: String,
    /// Architecture, such as `llama`.
    pub family: String,
    /// Such as `135M`.
    pub parameter_size: String,
    /// Such as `Q4_K_M`.
    pub quantization: String,
    /// When the file was last changed.
    pub modified: Option<SystemTime>,
}

impl ModelFacts {
    fn details(&self) -> Value {
        json!({
            "parent_model": "", "format": "gguf", "family": self.family, "families": [self.family],
            "parameter_size": self.parameter_size, "quantization_level": self.quantization,
        })
    }
}

/// A name as Ollama lists it: with a tag, which some clients look for.
fn tagged(name: &str) -> Cow<'_, str> {
    if name.contains(':') { name.into() } else { format!("{name}:latest").into() }
}

/// One entry of `GET /api/tags`.
#[must_use]
pub fn list_entry(facts: &ModelFacts) -> Value {
    json!({
        "name": tagged(&facts.name), "model": tagged(&facts.name), "modified_at": timestamp(facts.modified.unwrap_or(SystemTime::UNIX_EPOCH)),
        "size": facts.size, "digest": facts.digest, "details": facts.details(),
    })
}

/// One entry of `GET /api/ps`: a model that is resident, with what it holds.
#[must_use]
pub fn process_entry(
    facts: &ModelFacts,
    resident_bytes: u64,
    context_tokens: u32,
    expires: Option<SystemTime>,
    sarai: Value,
) -> Value {
    // Ollama's clients want a time, so never is far away.
    let expires = expires.unwrap_or(SystemTime::UNIX_EPOCH + Duration::from_secs(4_102_444_800));
    json!({
        "name": tagged(&facts.name), "model": tagged(&facts.name), "size": resident_bytes, "digest": facts.digest,
        "details": facts.details(), "expires_at": timestamp(expires), "size_vram": 0,
        "context_length": context_tokens, "sarai": sarai,
    })
}

/// What a model is asked with where a request says nothing, as a Modelfile has it: a name and a value in each line.
#[must_use]
pub fn parameters(context_tokens: u32, sampling: &Sampling) -> String {
    let set = sampling::to_wire(sampling, &[]);
    let set = set.into_iter().map(|(name, value)| format!("\n{name:<30} {value}"));
    format!("{:<30} {context_tokens}{}", "num_ctx", set.collect::<String>())
}

/// What a model's file says that it can do.
pub struct Abilities<'a> {
    /// What it is made for.
    pub purpose: Purpose,
    /// What it senses beside text.
    pub senses: &'a [MediaKind],
    /// Its chat template.
    pub template: &'a str,
    /// Whether it fills in what is missing in a text.
    pub fills_in: bool,
}

/// `POST /api/show`.
#[must_use]
pub fn show(facts: &ModelFacts, abilities: &Abilities<'_>, model_info: Value) -> Value {
    let Abilities { purpose, senses, template, fills_in } = *abilities;
    let mut capabilities = match purpose {
        Purpose::Vectors => vec!["embedding"],
        Purpose::Scores => vec!["rerank"],
        Purpose::Answers if tools::are_shown_by(template) => vec!["completion", "tools"],
        Purpose::Answers => vec!["completion"],
    };
    if purpose == Purpose::Answers && tools::reasons(template) {
        capabilities.push("thinking");
    }
    if fills_in {
        capabilities.push("insert");
    }
    capabilities.extend(senses.iter().map(|kind| kind.capability()));
    json!({
        "modelfile": format!("# served by sarai\nFROM {}\n", facts.name), "parameters": "", "template": template,
        "details": facts.details(), "model_info": model_info, "capabilities": capabilities,
        "modified_at": timestamp(facts.modified.unwrap_or(SystemTime::UNIX_EPOCH)),
    })
}
