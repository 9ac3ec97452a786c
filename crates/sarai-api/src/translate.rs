//! Between the two APIs: what a client of the one asks for, written for a host of the other, and what that host says beyond text.

use std::collections::VecDeque;

use sarai_core::{
    Api, Event, Extra, FinishReason, Format, GenerateRequest, Media, MediaKind, MediaSource, Message, Prompt, Sampling,
    ToolCall, ToolCallPart, ToolChoice,
};
use serde_json::{Map, Value, json};

use crate::{samplers, tools};

/// Whether a host of this API can be asked all that the request needs, in its own words.
#[must_use]
pub fn can_be_asked(api: Api, request: &GenerateRequest) -> bool {
    let is_understood = request.needs().iter().all(|need| need.at_worker);
    let has_words = match api {
        // It has no field for tokens, for a call that must be made, for sound, and for pictures that are only named.
        Api::Ollama => {
            !matches!(request.prompt, Prompt::Tokens(_))
                && request.tools.as_ref().is_none_or(|tools| tools.choice == ToolChoice::Auto)
                && request.media().all(|media| media.kind == MediaKind::Image)
                && request.media().all(|media| matches!(media.source, MediaSource::Base64(_)))
        }
        Api::OpenAi => true,
    };
    is_understood
        && has_words
        && request.prefill.is_empty()
        && request.context.is_empty()
        && request.logprobs.is_none()
        && !matches!(request.format, Format::Gbnf(_))
}

/// What a host of the other API is not asked for, since it may refuse what it does not know.
#[must_use]
pub fn not_asked_across(sampling: &Sampling) -> Vec<String> {
    let mut lost = samplers::names(&sampling.further);
    if sampling.ignore_eos {
        lost.push("ignore_eos".to_owned());
    }
    lost
}

/// Messages as Ollama has them: pictures beside the text, calls with arguments that are an object, results by the tool's name.
pub(crate) fn ollama_messages(messages: &[Message]) -> Value {
    let known: Vec<&ToolCall> = messages.iter().flat_map(|message| &message.tool_calls).collect();
    let write = |message: &Message| {
        let mut written = json!({ "role": message.role.as_str(), "content": message.content });
        if !message.reasoning.is_empty() {
            written["thinking"] = message.reasoning.as_str().into();
        }
        let images: Vec<_> = message.media.iter().filter_map(base64).collect();
        if !images.is_empty() {
            written["images"] = images.into();
        }
        if !message.tool_calls.is_empty() {
            written["tool_calls"] = tools::to_ollama(&message.tool_calls);
        }
        if let Some(of) = &message.result_of {
            let called = known.iter().find(|call| of.id.as_ref() == Some(&call.id)).map(|call| &call.name);
            for (key, value) in [("tool_name", of.name.as_ref().or(called)), ("tool_call_id", of.id.as_ref())] {
                if let Some(value) = value {
                    written[key] = value.as_str().into();
                }
            }
        }
        written
    };
    messages.iter().map(write).collect()
}

fn base64(media: &Media) -> Option<&str> {
    match &media.source {
        MediaSource::Base64(text) => Some(text),
        MediaSource::Url(_) => None,
    }
}

/// Messages as OpenAI has them: parts where there is more than text, calls with arguments that are text, results by the call's id.
pub(crate) fn openai_messages(messages: &[Message]) -> Value {
    // Ollama's clients name no calls, so results are those of the calls before them, by name and else in their order.
    let mut open: VecDeque<&ToolCall> = VecDeque::new();
    let mut all = Vec::new();
    for message in messages {
        let mut written = json!({ "role": message.role.as_str(), "content": content(message) });
        if !message.reasoning.is_empty() {
            written["reasoning_content"] = message.reasoning.as_str().into();
        }
        if !message.tool_calls.is_empty() {
            written["tool_calls"] = message.tool_calls.iter().map(tools::to_openai).collect();
            open = message.tool_calls.iter().collect();
        }
        if let Some(of) = &message.result_of {
            let is_of = |call: &&ToolCall| match (&of.id, &of.name) {
                (Some(id), _) => call.id == *id,
                (None, Some(name)) => call.name == *name,
                (None, None) => true,
            };
            let found = open.iter().position(is_of).or((!open.is_empty()).then_some(0)).and_then(|at| open.remove(at));
            let id = of.id.as_deref().or(found.map(|call| call.id.as_str()));
            written["tool_call_id"] = id.unwrap_or("call_0").into();
        }
        all.push(written);
    }
    all.into()
}

fn content(message: &Message) -> Value {
    if message.media.is_empty() {
        return message.content.as_str().into();
    }
    let mut parts = Vec::new();
    let mut from = 0;
    let text = |text: &str| (!text.is_empty()).then(|| json!({ "type": "text", "text": text }));
    for media in &message.media {
        let at = media.at.clamp(from, message.content.len());
        parts.extend(text(&message.content[from..at]));
        parts.push(part(media));
        from = at;
    }
    parts.extend(text(&message.content[from..]));
    parts.into()
}

fn part(media: &Media) -> Value {
    match (media.kind, &media.source) {
        (MediaKind::Image, MediaSource::Url(url)) => json!({ "type": "image_url", "image_url": { "url": url } }),
        (MediaKind::Image, MediaSource::Base64(data)) => {
            // Its first letters say what kind of file it is.
            let kind = match data.as_bytes() {
                [b'/', b'9', b'j', ..] => "jpeg",
                [b'R', b'0', b'l', b'G', ..] => "gif",
                [b'U', b'k', b'l', b'G', ..] => "webp",
                [b'Q', b'k', ..] => "bmp",
                _ => "png",
            };
            json!({ "type": "image_url", "image_url": { "url": format!("data:image/{kind};base64,{data}") } })
        }
        (MediaKind::Audio, MediaSource::Base64(data) | MediaSource::Url(data)) => {
            let format = match data.as_bytes() {
                [b'U', b'k', b'l', b'G', ..] => "wav",
                [b'Z', b'k', b'x', b'h', ..] => "flac",
                _ => "mp3",
            };
            json!({ "type": "input_audio", "input_audio": { "data": data, "format": format } })
        }
    }
}

/// The fields for tools, as both APIs define them; only OpenAI's has the choice.
pub(crate) fn tool_fields(api: Api, request: &GenerateRequest) -> Map<String, Value> {
    let mut fields = Map::new();
    let Some(tools) = &request.tools else { return fields };
    fields.insert("tools".into(), serde_json::from_str(&tools.definitions).unwrap_or_default());
    if api == Api::OpenAi {
        match &tools.choice {
            ToolChoice::Auto => {}
            ToolChoice::Required => drop(fields.insert("tool_choice".into(), "required".into())),
            ToolChoice::Named(name) => {
                let choice = json!({ "type": "function", "function": { "name": name } });
                fields.insert("tool_choice".into(), choice);
            }
        }
        if let Some(parallel) = tools.parallel {
            fields.insert("parallel_tool_calls".into(), parallel.into());
        }
    }
    fields
}

/// Reads what a host says in the words of its API, for a client of the other one.
#[derive(Debug, Default)]
pub struct Translator {
    /// Calls that were begun.
    calls: usize,
    /// What an OpenAI host calls them: their numbers and ids.
    numbers: Vec<(Option<u64>, String)>,
}

impl Translator {
    /// The same in words of no API; what is not understood is left out.
    pub fn translate(&mut self, event: Event) -> Vec<Event> {
        match event {
            Event::Extra(extra) => self.extra(*extra),
            // Ollama's last line does not say that there were calls.
            Event::Done { finish: FinishReason::Stop, usage, timings } if self.calls > 0 => {
                vec![Event::Done { finish: FinishReason::ToolCalls, usage, timings }]
            }
            other => vec![other],
        }
    }

    fn extra(&mut self, extra: Extra) -> Vec<Event> {
        let Extra { api, text, message, top, .. } = extra;
        let keys: &[&str] = match api {
            Api::Ollama => &["thinking"],
            Api::OpenAi => &["reasoning_content", "reasoning"],
        };
        let mut events = Vec::new();
        let reasoning = keys.iter().find_map(|key| message.get(*key).or_else(|| top.get(*key))?.as_str());
        events.extend(reasoning.filter(|text| !text.is_empty()).map(|text| Event::Reasoning(text.to_owned())));
        if !text.is_empty() {
            events.push(Event::Text(text));
        }
        let written = message.get("tool_calls").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        for call in written {
            let part = match api {
                Api::Ollama => self.whole_call(call),
                Api::OpenAi => self.piece_of_call(call),
            };
            events.extend(part.map(Event::ToolCall));
        }
        if events.is_empty() {
            events.push(Event::Alive);
        }
        events
    }

    /// Ollama's calls come whole, and older versions give them no ids.
    fn whole_call(&mut self, written: &Value) -> Option<ToolCallPart> {
        let index = self.calls;
        let mut call = tools::calls(&json!([written]))?.pop()?;
        if written["id"].as_str().is_none() {
            call.id = format!("call_{index}");
        }
        self.calls += 1;
        Some(ToolCallPart { index, call })
    }

    /// OpenAI's grow: the first piece has the id and the name. Some servers give every call the same number, and some none.
    fn piece_of_call(&mut self, written: &Value) -> Option<ToolCallPart> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let call = ToolCall {
            id: text(&written["id"]),
            name: text(&written["function"]["name"]),
            arguments: text(&written["function"]["arguments"]),
        };
        let number = written["index"].as_u64();
        let known = self.numbers.iter().rposition(|(of, _)| number.is_none() || *of == number);
        let is_new =
            known.is_none_or(|at| !call.id.is_empty() && !call.name.is_empty() && self.numbers[at].1 != call.id);
        if !is_new {
            return known.map(|index| ToolCallPart { index, call });
        }
        if call.name.is_empty() || self.numbers.len() >= MOST_CALLS {
            return None;
        }
        self.numbers.push((number, call.id.clone()));
        self.calls = self.numbers.len();
        Some(ToolCallPart { index: self.calls - 1, call })
    }
}

/// Of one answer; further ones are no sense.
const MOST_CALLS: usize = 256;

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::{ollama, openai};

    fn openai_body() -> Value {
        json!({
            "model": "m",
            "messages": [
                { "role": "user", "content": [
                    { "type": "text", "text": "Look:" },
                    { "type": "image_url", "image_url": { "url": "data:image/png;base64,aGk=" } },
                    { "type": "text", "text": "what is it?" },
                ] },
                { "role": "assistant", "content": null, "reasoning_content": "who knows", "tool_calls": [
                    { "id": "a1", "type": "function", "function": { "name": "look_up", "arguments": "{\"q\":\"cat\"}" } },
                ] },
                { "role": "tool", "tool_call_id": "a1", "content": "a cat" },
            ],
            "tools": [{ "type": "function", "function": { "name": "look_up", "parameters": { "type": "object" } } }],
        })
    }

    #[test]
    fn openais_words_become_ollamas_and_come_back() {
        let request = openai::parse_chat(openai_body().to_string().as_bytes()).unwrap().request;
        assert!(can_be_asked(Api::Ollama, &request) && can_be_asked(Api::OpenAi, &request));
        let (path, asked) = ollama::chat_request("m", None, &request);
        assert_eq!(path, "/api/chat");
        let [user, called, result] = asked["messages"].as_array().unwrap().as_slice() else { unreachable!() };
        assert_eq!((&user["content"], &user["images"]), (&json!("Look:what is it?"), &json!(["aGk="])));
        assert_eq!(called["tool_calls"][0]["function"]["arguments"], json!({ "q": "cat" }));
        assert_eq!(called["thinking"], "who knows");
        assert_eq!((&result["tool_name"], &result["content"]), (&json!("look_up"), &json!("a cat")));
        assert_eq!(asked["tools"][0]["function"]["name"], "look_up");

        let ollama::OllamaRequest::Generate(parsed) = ollama::parse_chat(asked.to_string().as_bytes()).unwrap() else {
            unreachable!()
        };
        let (_, back) = openai::remote::request("m", &parsed.request);
        let [user, called, result] = back["messages"].as_array().unwrap().as_slice() else { unreachable!() };
        // Ollama's pictures have no place within the text.
        assert_eq!(user["content"][0]["image_url"]["url"], "data:image/png;base64,aGk=");
        assert_eq!(user["content"][1]["text"], "Look:what is it?");
        assert_eq!(called["tool_calls"], openai_body()["messages"][1]["tool_calls"]);
        assert_eq!(called["reasoning_content"], "who knows");
        assert_eq!(result["tool_call_id"], "a1");
        assert_eq!(back["tools"], asked["tools"]);
    }

    #[test]
    fn results_without_ids_are_those_of_the_calls_before_them() {
        let call = |name: &str| json!({ "function": { "name": name, "arguments": {} } });
        let result = |name: &str| json!({ "role": "tool", "tool_name": name, "content": name });
        let body = json!({ "model": "m", "messages": [
            { "role": "assistant", "content": "", "tool_calls": [call("f"), call("g"), call("f")] },
            result("g"), result("f"), result("f"),
        ] });
        let ollama::OllamaRequest::Generate(parsed) = ollama::parse_chat(body.to_string().as_bytes()).unwrap() else {
            unreachable!()
        };
        let (_, asked) = openai::remote::request("m", &parsed.request);
        let ids: Vec<_> = (1..4).map(|n| asked["messages"][n]["tool_call_id"].as_str().unwrap()).collect();
        assert_eq!(ids, ["call_1", "call_0", "call_2"]);
    }

    #[test]
    fn what_the_other_api_has_no_words_for_is_not_asked() {
        let with = |more: Value| {
            let mut body = openai_body();
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            can_be_asked(Api::Ollama, &openai::parse_chat(body.to_string().as_bytes()).unwrap().request)
        };
        assert!(with(json!({})));
        assert!(!with(json!({ "tool_choice": "required" })));
        assert!(!with(json!({ "logprobs": true })));
        assert!(!with(json!({ "audio": { "voice": "a" } })));
        let image = json!({ "type": "image_url", "image_url": { "url": "https://example.org/a.png" } });
        assert!(!with(json!({ "messages": [{ "role": "user", "content": [image] }] })));
    }

    fn extra(api: Api, message: Value) -> Event {
        let Value::Object(message) = message else { unreachable!() };
        Event::Extra(Box::new(Extra { api, text: String::new(), top: Map::new(), choice: Map::new(), message }))
    }

    #[test]
    fn calls_and_reasoning_of_both_are_read() {
        let mut translator = Translator::default();
        let called =
            |arguments: Value| json!({ "tool_calls": [{ "function": { "name": "f", "arguments": arguments } }] });
        assert_eq!(
            translator.translate(extra(Api::Ollama, json!({ "thinking": "hm" }))),
            [Event::Reasoning("hm".into())]
        );
        let calls: Vec<_> = [json!({ "x": 1 }), json!({})]
            .into_iter()
            .flat_map(|arguments| translator.translate(extra(Api::Ollama, called(arguments))))
            .collect();
        let call = |index, arguments: &str| {
            let call = ToolCall { id: format!("call_{index}"), name: "f".into(), arguments: arguments.into() };
            Event::ToolCall(ToolCallPart { index, call })
        };
        assert_eq!(calls, [call(0, "{\"x\":1}"), call(1, "{}")]);
        let end = |finish| Event::Done {
            finish,
            usage: sarai_core::Usage::default(),
            timings: sarai_core::Timings::default(),
        };
        assert_eq!(translator.translate(end(FinishReason::Stop)), [end(FinishReason::ToolCalls)]);
        assert_eq!(translator.translate(end(FinishReason::Length)), [end(FinishReason::Length)]);

        let mut translator = Translator::default();
        let mut grown = Vec::new();
        for piece in [
            json!({ "tool_calls": [{ "index": 0, "id": "a", "function": { "name": "f", "arguments": "" } }] }),
            json!({ "tool_calls": [{ "index": 0, "function": { "arguments": "{}" } }] }),
            json!({ "tool_calls": [{ "id": "b", "function": { "name": "g", "arguments": "{}" } }] }),
            json!({ "reasoning_content": "so" }),
            json!({ "tool_calls": [{ "index": 0, "id": "c", "function": { "name": "h", "arguments": "[]" } }] }),
            json!({ "tool_calls": [{ "index": u64::MAX, "id": "d", "function": { "name": "i", "arguments": "{}" } }] }),
        ] {
            for event in translator.translate(extra(Api::OpenAi, piece)) {
                match event {
                    Event::ToolCall(part) => part.add_to(&mut grown),
                    other => assert_eq!(other, Event::Reasoning("so".into())),
                }
            }
        }
        let names: Vec<_> = grown.iter().map(|call| (call.name.as_str(), call.arguments.as_str())).collect();
        assert_eq!(names, [("f", "{}"), ("g", "{}"), ("h", "[]"), ("i", "{}")], "whatever their numbers are");
    }
}
