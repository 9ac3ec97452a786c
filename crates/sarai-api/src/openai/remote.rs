//! Towards an OpenAI-compatible server: a core request as its JSON, and its SSE lines as core events.

use std::borrow::Cow;

use sarai_core::{
    Api, Event, Extra, FinishReason, Format, GenerateRequest, Prompt, RemoteCause, Sampling, Timings, Usage,
};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};

use crate::{RemoteLine, sampling, translate};

/// The path below the base URL, and the body that asks for this. What is not set is left to the server.
#[must_use]
pub fn request(model: &str, request: &GenerateRequest) -> (&'static str, Value) {
    let mut body = json!({ "model": model, "stream": true, "stream_options": { "include_usage": true } });
    let path = match &request.prompt {
        Prompt::Chat(messages) => {
            body["messages"] = translate::openai_messages(messages);
            if request.think == Some(false) {
                // As llama.cpp's server, vLLM and others have it.
                body["chat_template_kwargs"] = json!({ "enable_thinking": false });
            }
            translate::tool_fields(Api::OpenAi, request).into_iter().for_each(|(name, value)| body[name] = value);
            "/chat/completions"
        }
        Prompt::Tokens(tokens) => {
            body["prompt"] = json!(tokens);
            "/completions"
        }
        Prompt::Raw(text) => {
            body["prompt"] = text.as_str().into();
            if let Some(suffix) = &request.suffix {
                body["suffix"] = suffix.as_str().into();
            }
            "/completions"
        }
    };
    // Beyond OpenAI's own keys: llama.cpp's server, vLLM and others know these, and they are sent only if they are set.
    for (key, value) in sampling::to_wire(&request.sampling, &request.stop) {
        body[key] = value;
    }
    if let Some(most) = request.max_tokens {
        body["max_tokens"] = most.into();
    }
    if !request.sampling.logit_bias.is_empty() {
        let bias = request.sampling.logit_bias.iter().map(|(token, bias)| (token.to_string(), sampling::float(*bias)));
        body["logit_bias"] = Value::Object(bias.collect());
    }
    match &request.format {
        // A grammar stands among the client's own fields.
        Format::Text | Format::Gbnf(_) => {}
        Format::Json => body["response_format"] = json!({ "type": "json_object" }),
        Format::Schema(schema) => {
            let schema: Value = serde_json::from_str(schema).unwrap_or_default();
            let named = json!({ "name": "answer", "schema": schema, "strict": true });
            body["response_format"] = json!({ "type": "json_schema", "json_schema": named });
        }
    }
    if let Some(extras) = request.extras.as_deref().filter(|extras| extras.api == Api::OpenAi) {
        for (name, value) in &extras.fields {
            match name.as_str() {
                // What it says of other things counts; usage is wanted here in any case.
                "stream_options" => {
                    let options = value.as_object().into_iter().flatten().filter(|(key, _)| *key != "include_usage");
                    options.for_each(|(key, value)| body["stream_options"][key] = value.clone());
                }
                "max_completion_tokens" => {
                    // By the name that the client has for it.
                    if let Some(most) = body.as_object_mut().and_then(|body| body.remove("max_tokens")) {
                        body[name] = most;
                    }
                }
                _ => body[name] = value.clone(),
            }
        }
    }
    if body["stream"] == false {
        body.as_object_mut().and_then(|body| body.remove("stream_options"));
    }
    (path, body)
}

/// Request options that OpenAI's API does not have, so that a server may ignore them.
#[must_use]
pub fn unknown_to_openai(sampling: &Sampling) -> Vec<String> {
    let options = [
        ("top_k", sampling.top_k.is_some()),
        ("min_p", sampling.min_p.is_some()),
        ("typical_p", sampling.typical_p.is_some()),
        ("repeat_penalty", sampling.repeat_penalty.is_some()),
        ("repeat_last_n", sampling.repeat_last_n.is_some()),
    ];
    options.into_iter().filter(|(_, is_set)| *is_set).map(|(name, _)| name.to_owned()).collect()
}

/// Reads the lines of one stream; the end is put together from several.
#[derive(Debug, Default)]
pub struct SseReader {
    finish: Option<FinishReason>,
    usage: Option<Usage>,
    texts: u32,
    /// Fields of chunks as they were passed on last: most say the same in each.
    said: Map<String, Value>,
    /// Whether an error was reported that is of the client's making.
    pub is_the_clients: bool,
}

#[derive(Deserialize)]
struct Chunk {
    error: Option<Value>,
    choices: Option<Vec<Choice>>,
    usage: Option<WireUsage>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Deserialize)]
struct Choice {
    delta: Option<Delta>,
    /// Of an answer that comes whole; some say it in each step, too.
    message: Option<Delta>,
    text: Option<String>,
    finish_reason: Option<String>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Default, Deserialize)]
struct Delta {
    content: Option<String>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// A chunk that says no more than text, as most do: read without copying what is not passed on. Anything else it might say
/// fails here, and is read as a [`Chunk`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a plain chunk")]
#[expect(dead_code, reason = "fields that may stand there, and say nothing")]
struct PlainChunk<'a> {
    id: Option<IgnoredAny>,
    object: Option<IgnoredAny>,
    created: Option<IgnoredAny>,
    model: Option<IgnoredAny>,
    usage: Option<Nothing>,
    system_fingerprint: Option<&'a str>,
    #[serde(borrow)]
    choices: [PlainChoice<'a>; 1],
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "fields that may stand there, and say nothing")]
struct PlainChoice<'a> {
    index: Option<IgnoredAny>,
    finish_reason: Option<Nothing>,
    logprobs: Option<Nothing>,
    #[serde(borrow)]
    delta: PlainDelta<'a>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "fields that may stand there, and say nothing")]
struct PlainDelta<'a> {
    role: Option<IgnoredAny>,
    #[serde(borrow)]
    content: Cow<'a, str>,
}

/// What may only be null.
#[derive(Deserialize)]
enum Nothing {}

/// What the writer of the answer writes anew.
const WRITTEN_ANEW: [&str; 7] = ["id", "object", "created", "model", "index", "role", "sarai"];

fn beyond(mut fields: Map<String, Value>) -> Map<String, Value> {
    fields.retain(|name, value| !value.is_null() && !WRITTEN_ANEW.contains(&name.as_str()));
    fields
}

#[derive(Deserialize)]
struct WireUsage {
    #[serde(default)]
    prompt_tokens: u32,
    #[serde(default)]
    completion_tokens: u32,
    prompt_tokens_details: Option<Value>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

impl WireUsage {
    fn counts(&self) -> Usage {
        let cached = self.prompt_tokens_details.as_ref().and_then(|details| details["cached_tokens"].as_u64());
        Usage {
            prompt_tokens: self.prompt_tokens,
            cached_tokens: cached.and_then(|cached| u32::try_from(cached).ok()).unwrap_or(0),
            completion_tokens: self.completion_tokens,
        }
    }

    /// What it says beyond counts.
    fn details(self) -> Option<Value> {
        let mut details = self.rest;
        details.remove("total_tokens");
        if let Some(Value::Object(mut of_prompt)) = self.prompt_tokens_details {
            of_prompt.remove("cached_tokens");
            if !of_prompt.is_empty() {
                details.insert("prompt_tokens_details".into(), of_prompt.into());
            }
        }
        details.retain(|_, value| !value.is_null());
        (!details.is_empty()).then(|| details.into())
    }
}

/// What some servers write before the first line.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Whether an error says that the request is wrong.
fn is_the_clients(error: &Value) -> bool {
    // Some call by this kind what another host may well do, or what is wrong with their own keys.
    let elsewhere = ["invalid_api_key", "model_not_found", "unsupported", "json_validate_failed"];
    let may_do = elsewhere.iter().any(|code| error["code"] == *code);
    let is_kind = !may_do && ["invalid_request_error", "BadRequestError"].iter().any(|kind| error["type"] == *kind);
    is_kind || [400, 422].iter().any(|code| error["code"] == *code)
}

impl SseReader {
    /// Reads one line. Comments and other fields of an event are nothing to pass on.
    ///
    /// # Errors
    /// The line is not of a stream of chunks, or it reports an error.
    pub fn line(&mut self, line: &[u8]) -> Result<RemoteLine, RemoteCause> {
        let line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line).trim_ascii();
        let garbled = || RemoteCause::Garbled(String::from_utf8_lossy(&line[..line.len().min(80)]).into_owned());
        let Some(data) = line.strip_prefix(b"data:") else {
            let is_sse =
                line.is_empty() || [&b":"[..], b"event:", b"id:", b"retry:"].iter().any(|p| line.starts_with(p));
            return if is_sse { Ok(RemoteLine::default()) } else { Err(garbled()) };
        };
        let data = data.trim_ascii();
        if data == b"[DONE]" {
            let end = self.end().ok_or(RemoteCause::Cut)?;
            return Ok(RemoteLine { step: None, end: Some(end) });
        }
        self.chunk(data)
    }

    /// Reads the body of a server that was asked to stream and answers whole.
    ///
    /// # Errors
    /// It is no answer, or has not come to its end.
    pub fn whole(&mut self, body: &[u8]) -> Result<RemoteLine, RemoteCause> {
        if body.trim_ascii().is_empty() {
            return Err(RemoteCause::Cut);
        }
        let RemoteLine { step, .. } = self.chunk(body)?;
        Ok(RemoteLine { step, end: Some(self.end().ok_or(RemoteCause::Cut)?) })
    }

    fn chunk(&mut self, data: &[u8]) -> Result<RemoteLine, RemoteCause> {
        let garbled = || RemoteCause::Garbled(String::from_utf8_lossy(&data[..data.len().min(80)]).into_owned());
        if let Some(text) = self.plain(data) {
            return Ok(RemoteLine { step: Some(Event::Text(text)), end: None });
        }
        let chunk: Chunk = serde_json::from_slice(data).map_err(|_| garbled())?;
        if let Some(error) = chunk.error.filter(|error| !error.is_null()) {
            self.is_the_clients = is_the_clients(&error);
            let message = error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned);
            return Err(RemoteCause::Reported(message));
        }
        let mut rest = chunk.rest;
        if let Some(usage) = chunk.usage {
            self.usage = Some(usage.counts());
            if let Some(details) = usage.details() {
                rest.insert("usage".into(), details);
            }
        }
        let choice = chunk.choices.ok_or_else(garbled)?.into_iter().next();
        let top = self.news(beyond(rest));
        self.step(top, choice).map(|step| RemoteLine { step, end: None })
    }

    /// The text of a chunk that says nothing else.
    fn plain(&mut self, data: &[u8]) -> Option<String> {
        let chunk: PlainChunk<'_> = serde_json::from_slice(data).ok()?;
        let said = self.said.get("system_fingerprint").and_then(Value::as_str);
        let is_news = chunk.system_fingerprint.is_some() && chunk.system_fingerprint != said;
        let [PlainChoice { delta: PlainDelta { content, .. }, .. }] = chunk.choices;
        if is_news || content.is_empty() {
            return None;
        }
        self.texts += 1;
        Some(content.into_owned())
    }

    /// Those fields that say something new.
    fn news(&mut self, mut top: Map<String, Value>) -> Map<String, Value> {
        top.retain(|name, value| self.said.get(name) != Some(value));
        top.iter().for_each(|(name, value)| drop(self.said.insert(name.clone(), value.clone())));
        top
    }

    fn step(&mut self, top: Map<String, Value>, choice: Option<Choice>) -> Result<Option<Event>, RemoteCause> {
        let (mut text, mut fields, mut message) = (None, Map::new(), Map::new());
        if let Some(choice) = choice {
            // Some servers write an empty one until the end.
            if let Some(word) = choice.finish_reason.filter(|word| !word.is_empty()) {
                let known = FinishReason::ALL.into_iter().find(|finish| finish.as_str() == word);
                let finish = if word == "eos" { Some(FinishReason::Stop) } else { known };
                self.finish = Some(finish.ok_or_else(|| RemoteCause::Reported(format!("finish_reason `{word}`")))?);
            }
            let delta = choice.delta.or(choice.message).unwrap_or_default();
            text = delta.content.or(choice.text).filter(|text| !text.is_empty());
            (fields, message) = (beyond(choice.rest), beyond(delta.rest));
        }
        self.texts += u32::from(text.is_some() || !message.is_empty());
        if top.is_empty() && fields.is_empty() && message.is_empty() {
            return Ok(text.map(Event::Text));
        }
        let text = text.unwrap_or_default();
        Ok(Some(Event::Extra(Box::new(Extra { api: Api::OpenAi, text, top, choice: fields, message }))))
    }

    /// The end, if the stream has said its finish reason; without usage, pieces of text count as tokens.
    #[must_use]
    pub fn end(&self) -> Option<Event> {
        let usage = self.usage.unwrap_or(Usage { completion_tokens: self.texts, ..Usage::default() });
        self.finish.map(|finish| Event::Done { finish, usage, timings: Timings::default() })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> (Vec<Event>, Option<RemoteCause>, SseReader) {
        let mut reader = SseReader::default();
        let mut seen = Vec::new();
        for line in lines {
            match reader.line(line.as_bytes()) {
                Ok(line) => seen.extend(line.step.into_iter().chain(line.end)),
                Err(cause) => return (seen, Some(cause), reader),
            }
        }
        (seen, None, reader)
    }

    const HI: &str = r#"data: {"choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":null}]}"#;
    const STOP: &str = r#"data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#;
    const USAGE: &str = r#"data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":1}}"#;

    #[test]
    fn a_stream_ends_with_its_finish_reason_and_usage() {
        let (seen, failure, _) = read(&[": keep-alive", "", HI, "", STOP, USAGE, "data: [DONE]"]);
        assert_eq!(failure, None);
        assert_eq!(seen[0], Event::Text("Hi".into()));
        let usage = Usage { prompt_tokens: 5, cached_tokens: 0, completion_tokens: 1 };
        let end = Event::Done { finish: FinishReason::Stop, usage, timings: Timings::default() };
        assert_eq!(seen[1], end);
    }

    /// Both ways of reading a chunk must say the same.
    #[test]
    fn a_chunk_that_says_more_than_text_is_read_whole() {
        let chunk = |more: &str, choice: &str, delta: &str| {
            format!(
                r#"data: {{"id":"c","choices":[{{"index":0,"delta":{{"content":"H\u00e9"{delta}}},"finish_reason":null{choice}}}]{more}}}"#
            )
        };
        let read_one = |line: String| read(&[&line]).0.remove(0);
        assert_eq!(read_one(chunk("", r#","logprobs":null"#, r#","role":"assistant""#)), Event::Text("H\u{e9}".into()));
        for line in [
            chunk(r#","timings":{"n":1}"#, "", ""),
            chunk(r#","system_fingerprint":"f""#, "", ""),
            chunk("", r#","logprobs":{"content":[]}"#, ""),
            chunk("", "", r#","reasoning_content":"so""#),
        ] {
            let Event::Extra(extra) = read_one(line.clone()) else { panic!("{line} is more than text") };
            assert_eq!(extra.text, "H\u{e9}", "{line}");
        }
        let print = chunk(r#","system_fingerprint":"f""#, "", "");
        assert_eq!(read(&[&print, &print]).0[1], Event::Text("H\u{e9}".into()), "it is passed on once");
        assert!(matches!(read(&[&chunk(r#","error":{"message":"no"}"#, "", "")]).1, Some(RemoteCause::Reported(_))));
    }

    #[test]
    fn done_without_a_finish_reason_is_a_cut_stream() {
        assert_eq!(read(&[HI, "data: [DONE]"]).1, Some(RemoteCause::Cut));
        assert_eq!(read(&[HI]).2.end(), None);
        assert!(read(&[HI, STOP]).2.end().is_some(), "some servers send no [DONE]");
        let empty = HI.replace("null", r#""""#);
        assert_eq!(read(&[&empty]).0, [Event::Text("Hi".into())], "and some an empty reason with each piece");
        assert_eq!(read(&[&empty]).2.end(), None);
    }

    #[test]
    fn what_is_no_chunk_is_garbled_and_an_error_is_reported() {
        assert!(matches!(read(&["<html>"]).1, Some(RemoteCause::Garbled(_))));
        assert!(matches!(read(&["data: {\"half\":"]).1, Some(RemoteCause::Garbled(_))));
        let error = r#"data: {"error":{"message":"out of memory","code":500}}"#;
        assert_eq!(read(&[HI, error]).1, Some(RemoteCause::Reported("out of memory".into())));
    }

    #[test]
    fn speech_that_is_wanted_whole_is_asked_for_whole() {
        let asked = |more: Value| {
            let mut body = json!({ "model": "m", "messages": [{ "role": "user", "content": "Hi" }] });
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let request = crate::openai::parse_chat(body.to_string().as_bytes()).unwrap().request;
            let (_, body) = super::request("m", &request);
            (body["stream"].clone(), body.get("stream_options").is_some(), body["audio"]["format"].clone())
        };
        let audio = json!({ "voice": "a", "format": "wav" });
        assert_eq!(asked(json!({ "audio": audio })), (json!(false), false, json!("wav")));
        assert_eq!(asked(json!({ "audio": audio, "stream": true })), (json!(true), true, json!("wav")));
        assert_eq!(asked(json!({})), (json!(true), true, Value::Null));
    }

    #[test]
    fn only_what_is_set_is_sent() {
        let request = GenerateRequest {
            sampling: Sampling { temperature: Some(0.7), ..Sampling::default() },
            max_tokens: Some(4),
            format: Format::Json,
            ..GenerateRequest::new(Prompt::Raw("Once".into()))
        };
        let (path, body) = super::request("m", &request);
        assert_eq!(path, "/completions");
        let keys: Vec<_> = body.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            keys,
            ["model", "stream", "stream_options", "prompt", "temperature", "max_tokens", "response_format"]
        );
        assert_eq!(body["temperature"], 0.7);
    }
}
