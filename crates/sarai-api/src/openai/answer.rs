//! Answers, chunks, model lists and errors, from the core to the wire.

use sarai_core::{Api, Extra, FinishReason, MediaKind, Timings, TokenLogprob, ToolCallPart, Usage};
use serde_json::{Map, Value, json};

use crate::{Served, Whole, logprobs, tools};

/// Which of the two endpoints answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `chat.completion`.
    Chat,
    /// `text_completion`.
    Completion,
}

/// Writes the chunks of one streamed answer; all carry the same id, time and model.
#[derive(Clone, Debug)]
pub struct ChunkWriter {
    /// The endpoint.
    pub kind: Kind,
    /// `chatcmpl-…` or `cmpl-…`.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The model as the client wrote it.
    pub model: String,
    /// Whether the client asked for usage.
    pub include_usage: bool,
    /// Which of the answers it writes.
    pub index: usize,
    /// Whether it is answered here, and not by a host.
    pub is_local: bool,
}

impl ChunkWriter {
    /// Of an answer by this one.
    #[must_use]
    pub fn by(self, served: &Served) -> Self {
        Self { is_local: served.is_local, ..self }
    }

    /// The first chunk of a chat, which names the role; completions have none. Its content is none, as llama.cpp has it: a call may follow.
    #[must_use]
    pub fn role(&self) -> Option<Value> {
        let choice =
            json!({ "index": self.index, "delta": { "role": "assistant", "content": null }, "finish_reason": null });
        (self.kind == Kind::Chat).then(|| self.chunk(vec![choice]))
    }

    /// What stands around the text in each chunk of text: only the text is written anew for each token.
    #[must_use]
    pub fn around_text(&self) -> AroundText {
        let chunk = self.text("\u{1}").to_string();
        // The last one: the model's name is the client's choice, and stands before it.
        let (head, tail) = chunk.rsplit_once(r#""\u0001""#).unwrap_or_default();
        AroundText { head: head.to_owned(), tail: tail.to_owned() }
    }

    /// A chunk of text.
    #[must_use]
    pub fn text(&self, text: &str) -> Value {
        self.chunk(vec![match self.kind {
            Kind::Chat => json!({ "index": self.index, "delta": { "content": text }, "finish_reason": null }),
            Kind::Completion => json!({ "index": self.index, "text": text, "logprobs": null, "finish_reason": null }),
        }])
    }

    /// A chunk of text, and how likely its tokens were; `offset` is where it begins in the answer, in characters.
    #[must_use]
    pub fn text_with(&self, text: &str, logprobs: &[TokenLogprob], offset: usize) -> Value {
        let mut chunk = self.text(text);
        chunk["choices"][0]["logprobs"] = self.logprobs(logprobs, offset);
        chunk
    }

    fn logprobs(&self, logprobs: &[TokenLogprob], offset: usize) -> Value {
        match self.kind {
            Kind::Chat => json!({ "content": logprobs::of_chat(logprobs), "refusal": null }),
            Kind::Completion => logprobs::of_completion(logprobs, offset),
        }
    }

    /// A chunk of reasoning, as llama.cpp's server and as Ollama call it.
    #[must_use]
    pub fn reasoning(&self, text: &str) -> Option<Value> {
        let delta = json!({ "reasoning_content": text, "reasoning": text });
        let choice = json!({ "index": self.index, "delta": delta, "finish_reason": null });
        (self.kind == Kind::Chat).then(|| self.chunk(vec![choice]))
    }

    /// A chunk of a call.
    #[must_use]
    pub fn tool_call(&self, part: &ToolCallPart) -> Value {
        let ToolCallPart { index, call } = part;
        let mut piece = match call.name.is_empty() {
            true => json!({ "function": { "arguments": call.arguments } }),
            false => tools::to_openai(call),
        };
        piece["index"] = (*index).into();
        self.chunk(vec![json!({ "index": self.index, "delta": { "tool_calls": [piece] }, "finish_reason": null })])
    }

    /// A chunk of what a host says beyond text; of a host that speaks another API, its text.
    #[must_use]
    pub fn extra(&self, extra: Extra) -> Option<Value> {
        if extra.api != Api::OpenAi {
            return (!extra.text.is_empty()).then(|| self.text(&extra.text));
        }
        let mut chunk = self.text(&extra.text);
        let choice = &mut chunk["choices"][0];
        if self.kind == Kind::Chat {
            put(&mut choice["delta"], extra.message);
        }
        put(choice, extra.choice);
        put(&mut chunk, extra.top);
        Some(chunk)
    }

    /// The chunk that ends the text, with the extension field `sarai`.
    #[must_use]
    pub fn finish(&self, finish: FinishReason, usage: &Usage, timings: &Timings, served: &Served) -> Value {
        let finish = finish.as_str();
        let mut chunk = self.chunk(vec![match self.kind {
            Kind::Chat => json!({ "index": self.index, "delta": {}, "finish_reason": finish }),
            Kind::Completion => json!({ "index": self.index, "text": "", "logprobs": null, "finish_reason": finish }),
        }]);
        chunk["sarai"] = extension(served, timings);
        // llama.cpp's server has them in its last chunk.
        if !self.include_usage {
            add_timings(&mut chunk, usage, timings);
        }
        chunk
    }

    /// The chunk that carries the usage, and what a host said of it beyond the counts; if the client asked for it. With the times of an
    /// only answer.
    #[must_use]
    pub fn usage(&self, usage: &Usage, timings: Option<&Timings>, details: &Value) -> Option<Value> {
        self.include_usage.then(|| {
            let mut chunk = self.chunk(vec![]);
            chunk["usage"] = usage_of(usage);
            add_details(&mut chunk["usage"], details);
            if let Some(timings) = timings {
                add_timings(&mut chunk, usage, timings);
            }
            chunk
        })
    }

    fn chunk(&self, choices: Vec<Value>) -> Value {
        let object = match self.kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Completion => "text_completion",
        };
        let mut chunk = json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices,
        });
        if self.is_local {
            chunk["system_fingerprint"] = FINGERPRINT.into();
        }
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    /// The whole answer of a request that does not stream.
    #[must_use]
    pub fn whole(&self, whole: Whole, served: &Served) -> Value {
        let Whole { text, reasoning, tool_calls, logprobs, finish, usage, timings, extra, .. } = whole;
        let finish = finish.as_str();
        let (object, choice) = match self.kind {
            Kind::Chat => (
                "chat.completion",
                json!({ "index": self.index, "message": { "role": "assistant", "content": text, "refusal": null }, "logprobs": null, "finish_reason": finish }),
            ),
            Kind::Completion => (
                "text_completion",
                json!({ "index": self.index, "text": text, "logprobs": null, "finish_reason": finish }),
            ),
        };
        let mut answer = json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": [choice],
            "usage": usage_of(&usage), "sarai": extension(served, &timings),
        });
        if self.is_local {
            answer["system_fingerprint"] = FINGERPRINT.into();
        }
        add_timings(&mut answer, &usage, &timings);
        if !logprobs.is_empty() {
            answer["choices"][0]["logprobs"] = self.logprobs(&logprobs, 0);
        }
        if self.kind == Kind::Chat {
            let message = &mut answer["choices"][0]["message"];
            if !reasoning.is_empty() {
                message["reasoning"] = reasoning.as_str().into();
                message["reasoning_content"] = reasoning.into();
            }
            if !tool_calls.is_empty() {
                message["tool_calls"] = tool_calls.iter().map(tools::to_openai).collect();
                if text.is_empty() {
                    message["content"] = Value::Null;
                }
            }
        }
        if let Some(mut extra) = extra.filter(|extra| extra.api == Api::OpenAi) {
            for calls in extra.message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
                // Only steps number them.
                calls.as_object_mut().and_then(|call| call.remove("index"));
            }
            let choice = &mut answer["choices"][0];
            if self.kind == Kind::Chat {
                if text.is_empty() && !extra.message.is_empty() {
                    choice["message"]["content"] = Value::Null;
                }
                put(&mut choice["message"], extra.message);
            }
            put(choice, extra.choice);
            if let Some(details) = extra.top.remove("usage") {
                add_details(&mut answer["usage"], &details);
            }
            put(&mut answer, extra.top);
        }
        answer
    }
}

/// The chunks of text of one answer, but for the text.
#[derive(Clone, Debug)]
pub struct AroundText {
    head: String,
    tail: String,
}

impl AroundText {
    /// A chunk of this text, as JSON.
    #[must_use]
    pub fn with(&self, text: String) -> String {
        format!("{}{}{}", self.head, Value::String(text), self.tail)
    }
}

fn put(into: &mut Value, fields: Map<String, Value>) {
    fields.into_iter().for_each(|(name, value)| into[name] = value);
}

/// Puts one of several answers to the others, with what all of them took. Who served it stands in its own choice, where that was not
/// who served the first.
pub fn join(all: &mut Value, mut other: Value, usage: &Usage) {
    let by = |sarai: &Value| [&sarai["served_by"], &sarai["fallback_reason"], &sarai["degraded"]].map(Clone::clone);
    if by(&all["sarai"]) != by(&other["sarai"]) {
        other["choices"][0]["sarai"] = other["sarai"].take();
    }
    if let (Some(choices), Value::Array(more)) = (all["choices"].as_array_mut(), other["choices"].take()) {
        choices.extend(more);
    }
    if let Some(all) = all.as_object_mut() {
        // Each has its own.
        all.remove("timings");
    }
    let Value::Object(counts) = usage_of(usage) else { return };
    add_details(&mut all["usage"], &counts.into());
}

/// Adds what a host says of its usage beyond the counts.
fn add_details(usage: &mut Value, details: &Value) {
    for (name, value) in details.as_object().into_iter().flatten() {
        match (&mut usage[name], value) {
            (Value::Object(known), Value::Object(more)) => known.extend(more.clone()),
            (known, value) => *known = value.clone(),
        }
    }
}

fn usage_of(usage: &Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens.saturating_add(usage.completion_tokens),
        "prompt_tokens_details": { "cached_tokens": usage.cached_tokens },
    })
}

/// Adds times and speeds in the words of llama.cpp's server, where they are known.
fn add_timings(answer: &mut Value, usage: &Usage, timings: &Timings) {
    if timings.prefill.is_zero() && timings.decode.is_zero() {
        return;
    }
    let computed = usage.prompt_tokens.saturating_sub(usage.cached_tokens);
    let mut fields = json!({ "cache_n": usage.cached_tokens });
    for (what, count, took) in
        [("prompt", computed, timings.prefill), ("predicted", usage.completion_tokens, timings.decode)]
    {
        let (ms, tokens) = (took.as_secs_f64() * 1e3, f64::from(count));
        let per = |a: f64, b: f64| if b > 0.0 { (a / b * 1e3).round() / 1e3 } else { 0.0 };
        fields[format!("{what}_n")] = count.into();
        fields[format!("{what}_ms")] = per(ms, 1.0).into();
        fields[format!("{what}_per_token_ms")] = per(ms, tokens).into();
        fields[format!("{what}_per_second")] = per(tokens * 1e3, ms).into();
    }
    if timings.drafted > 0 {
        fields["draft_n"] = timings.drafted.into();
        fields["draft_n_accepted"] = timings.accepted.into();
    }
    answer["timings"] = fields;
}

/// The field `sarai` of an answer: who served it, and where the time went in milliseconds.
pub(crate) fn extension(served: &Served, timings: &Timings) -> Value {
    let ms = |duration: std::time::Duration| (duration.as_secs_f64() * 1e6).round() / 1e3;
    let mut extension = json!({
        "served_by": served.by,
        "fallback_reason": served.fallback_reason,
        "degraded": served.degraded,
        "timings_ms": {
            "queue": ms(timings.queue), "load": ms(timings.load),
            "prefill": ms(timings.prefill), "decode": ms(timings.decode),
        },
    });
    if !timings.encode.is_zero() {
        extension["timings_ms"]["encode"] = ms(timings.encode).into();
    }
    if !served.resumed.is_empty() {
        let resumed = served.resumed.iter().map(|resumed| json!({ "by": resumed.by, "reason": resumed.reason }));
        extension["resumed"] = resumed.collect();
    }
    extension
}

/// Which program answers here; of a host, what it says of itself is passed on.
const FINGERPRINT: &str = concat!("build-sarai-", env!("CARGO_PKG_VERSION"));

/// One entry of `GET /v1/models`.
#[must_use]
pub fn model(id: &str, created: u64) -> Value {
    json!({ "id": id, "object": "model", "created": created, "owned_by": "sarai" })
}

/// What is known of a model that runs here.
pub struct LocalModel<'a> {
    /// Whether it is loaded.
    pub status: &'a str,
    /// What it senses beside text, where that is known.
    pub senses: Option<Vec<MediaKind>>,
    /// Tokens that a prompt and its answer may have.
    pub context_tokens: Option<u32>,
    /// Of its file, where that was read: the context that it was trained for, the length of its vectors, its parameters and bytes.
    pub file: Option<[u64; 4]>,
}

/// One of the models that run here, with what llama.cpp's server and vLLM say of theirs.
#[must_use]
pub fn local_model(id: &str, created: u64, aliases: &[String], known: LocalModel<'_>) -> Value {
    let mut listed = model(id, created);
    let LocalModel { status, senses, context_tokens, file } = known;
    listed["status"] = json!({ "value": status });
    listed["aliases"] = json!(aliases);
    if let Some(tokens) = context_tokens {
        listed["max_model_len"] = tokens.into();
        listed["meta"]["n_ctx"] = tokens.into();
    }
    if let Some([trained, width, parameters, size]) = file {
        for (name, value) in [("n_ctx_train", trained), ("n_embd", width), ("n_params", parameters), ("size", size)] {
            listed["meta"][name] = value.into();
        }
    }
    if let Some(senses) = senses {
        let word = |kind: &MediaKind| match kind {
            MediaKind::Image => "image",
            MediaKind::Audio => "audio",
        };
        let modalities: Vec<_> = ["text"].into_iter().chain(senses.iter().map(word)).collect();
        listed["architecture"] = json!({ "input_modalities": modalities });
    }
    listed
}

/// `GET /v1/models`.
#[must_use]
pub fn models(models: Vec<Value>) -> Value {
    json!({ "object": "list", "data": models })
}

/// An error in OpenAI's shape.
#[must_use]
pub fn error_body(message: &str, kind: &str, param: Option<&str>, code: Option<&str>) -> Value {
    json!({ "error": { "message": message, "type": kind, "param": param, "code": code } })
}

/// The same, with the itemised reason of a refusal under `sarai`.
#[must_use]
pub fn error_with_details(mut body: Value, details: Option<Value>) -> Value {
    if let Some(details) = details {
        body["error"]["sarai"] = details;
    }
    body
}
