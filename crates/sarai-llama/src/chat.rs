//! An answer of a model that calls tools or reasons, taken apart by llama.cpp's own parser as it grows.
//!
//! All that there is of it is parsed anew with each piece of text, as llama.cpp's server does; what has become known by it is
//! passed on. Some models write their calls without the marks of their own template, as bare JSON: where tools may be called, text that
//! can still become that is held back.

use std::collections::HashSet;

use llama_cpp_4::chat::ChatParams;
use llama_cpp_4::token::LlamaToken;
use sarai_core::{Event, FinishReason, ToolCall, ToolCallPart, ToolChoice, Tools};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

/// A text is read again when it has grown by one in so many of its bytes.
const READ_AGAIN: usize = 256;

/// What llama.cpp's parser has read.
#[derive(Clone, Debug, Default, Deserialize)]
struct Read {
    #[serde(default)]
    content: String,
    #[serde(default)]
    reasoning_content: String,
    #[serde(default)]
    tool_calls: Vec<ReadCall>,
}

impl Read {
    fn is_empty(&self) -> bool {
        self.content.is_empty() && self.reasoning_content.is_empty() && self.tool_calls.is_empty()
    }
}

#[derive(Clone, Debug, Deserialize)]
struct ReadCall {
    function: ReadFunction,
}

#[derive(Clone, Debug, Deserialize)]
struct ReadFunction {
    #[serde(default)]
    name: String,
    #[serde(default)]
    arguments: String,
}

/// The parts of one answer.
pub struct Parts {
    params: ChatParams,
    /// Tokens that the parser has to see, although they are special ones.
    pub preserved: HashSet<LlamaToken>,
    /// Tools that may be called.
    tools: Vec<String>,
    /// Whether one call is all that is wanted.
    is_single: bool,
    text: String,
    /// How much of the text was there when it was last read.
    parsed: usize,
    /// What was passed on.
    reasoned: String,
    said: String,
    /// For each call that was begun, how much of its arguments.
    called: Vec<usize>,
    /// Whether the first one's arguments are all there.
    is_whole: bool,
}

impl Parts {
    /// Of an answer to what a template has made of the messages and these tools.
    pub fn new(params: ChatParams, preserved: HashSet<LlamaToken>, tools: Option<Tools>) -> Self {
        let is_named = |tools: &Tools| matches!(tools.choice, ToolChoice::Named(_));
        let is_single = tools.as_ref().is_some_and(|tools| is_named(tools) || tools.parallel == Some(false));
        let tools = tools.map(|tools| tools.names).unwrap_or_default();
        Self {
            params,
            preserved,
            tools,
            is_single,
            text: String::new(),
            parsed: 0,
            reasoned: String::new(),
            said: String::new(),
            called: Vec::new(),
            is_whole: false,
        }
    }

    /// What is known by more text.
    pub fn push(&mut self, text: &str) -> Vec<Event> {
        self.text.push_str(text);
        // All of it is read each time: of a long text, not for every token.
        if (self.text.len() - self.parsed) * READ_AGAIN < self.text.len() {
            return Vec::new();
        }
        self.parsed = self.text.len();
        // What cannot be read yet may be with the next piece.
        let Some(read) = self.read(true) else { return Vec::new() };
        let may_be_call =
            read.tool_calls.is_empty() && !self.tools.is_empty() && may_be_bare(&read.content, &self.tools);
        self.news(&read, may_be_call, false)
    }

    /// What is known at the end, and why it ended.
    pub fn finish(&mut self, finish: FinishReason) -> (Vec<Event>, FinishReason) {
        let mut read = self.last_reading(finish == FinishReason::Length);
        // A text that ends the answer may stand within a call: then that is none. llama.cpp reads it all the same.
        let is_cut = finish == FinishReason::Stop && !read.tool_calls.iter().all(is_whole);
        if is_cut {
            let begun = self.called.len();
            let whole = read.tool_calls.iter().take_while(|call| is_whole(call)).count();
            read.tool_calls.truncate(whole.max(begun));
        }
        if read.tool_calls.is_empty() && self.said.is_empty() {
            let text = if read.content.is_empty() { &self.text } else { &read.content };
            if let Some(mut calls) = bare_calls(text, &self.tools) {
                if self.is_single {
                    calls.truncate(1);
                }
                read.tool_calls = calls;
                read.content.clear();
            }
        }
        let events = self.news(&read, false, true);
        let calls = !self.called.is_empty() && !is_cut && finish == FinishReason::Stop;
        (events, if calls { FinishReason::ToolCalls } else { finish })
    }

    /// All that can be read. llama.cpp reads nothing at all of a text that does not end as its form wants: that is passed on as it
    /// stands, for no word of an answer may be lost.
    fn last_reading(&self, is_cut: bool) -> Read {
        let goes_on = |read: &Read| read.content.starts_with(&self.said) && !read.is_empty();
        let (whole, partial) = (self.read(false).filter(goes_on), self.read(true).filter(goes_on));
        let has_calls = |read: &Option<Read>| read.as_ref().is_some_and(|read| !read.tool_calls.is_empty());
        if is_cut && has_calls(&partial) {
            return partial.unwrap_or_default();
        }
        // It may read a call that is none, and forget it.
        let forgets = |whole: &Read| {
            let rest = self.text.trim_start().strip_prefix(whole.content.trim_start()).map(str::trim);
            let is_text = whole.tool_calls.is_empty() && whole.reasoning_content.is_empty();
            is_text && rest.is_some_and(|rest| !rest.is_empty() && !rest.starts_with("</"))
        };
        if let Some(whole) = whole.filter(|whole| !forgets(whole)) {
            return whole;
        }
        if has_calls(&partial) || !self.called.is_empty() {
            return partial.unwrap_or_default();
        }
        if self.reasoned.is_empty() {
            let trimmed = self.text.trim_start();
            let text = if self.text.starts_with(&self.said) { &self.text } else { trimmed };
            return Read { content: text.to_owned(), ..Read::default() };
        }
        partial.unwrap_or_default()
    }

    /// Whether nothing more is wanted: the only call is whole.
    pub fn is_complete(&self) -> bool {
        self.is_single && !self.called.is_empty() && self.is_whole
    }

    fn read(&self, is_partial: bool) -> Option<Read> {
        serde_json::from_str(&self.params.parse(&self.text, is_partial).ok()?).ok()
    }

    /// The difference to what was passed on.
    fn news(&mut self, read: &Read, holds_content: bool, is_end: bool) -> Vec<Event> {
        let mut events = Vec::new();
        if let Some(more) = read.reasoning_content.strip_prefix(&self.reasoned).filter(|more| !more.is_empty()) {
            events.push(Event::Reasoning(more.to_owned()));
            self.reasoned.clone_from(&read.reasoning_content);
        }
        if let Some(more) = read.content.strip_prefix(&self.said).filter(|more| !more.is_empty() && !holds_content) {
            events.push(Event::Text(more.to_owned()));
            self.said.clone_from(&read.content);
        }
        for (index, ReadCall { function }) in read.tool_calls.iter().enumerate() {
            if index == 0 && !self.is_whole {
                self.is_whole = !function.arguments.is_empty() && is_whole(&read.tool_calls[0]);
            }
            let is_last = index + 1 == read.tool_calls.len();
            if index == self.called.len() {
                // A name may grow until the arguments begin.
                if is_last && !is_end && function.arguments.is_empty() {
                    continue;
                }
                self.called.push(function.arguments.len());
                let call = ToolCall {
                    id: format!("call_{:024x}", rand::random::<u128>() >> 32),
                    name: function.name.clone(),
                    arguments: function.arguments.clone(),
                };
                events.push(Event::ToolCall(ToolCallPart { index, call }));
            } else if let Some(more) = function.arguments.get(self.called[index]..).filter(|more| !more.is_empty()) {
                self.called[index] = function.arguments.len();
                let call = ToolCall { arguments: more.to_owned(), ..ToolCall::default() };
                events.push(Event::ToolCall(ToolCallPart { index, call }));
            }
        }
        events
    }
}

/// Whether the arguments of a call came to their end; of some tools there are none.
fn is_whole(call: &ReadCall) -> bool {
    call.function.arguments.is_empty() || serde_json::from_str::<IgnoredAny>(&call.function.arguments).is_ok()
}

/// What may stand around a bare call.
const FENCES: [&str; 3] = ["```json", "```", "<tools>"];

/// The text behind a fence.
fn within_fence(text: &str) -> &str {
    let text = text.trim_start();
    FENCES.iter().find_map(|fence| text.strip_prefix(fence)).unwrap_or(text).trim_start()
}

/// Whether this may become a bare call: `{"name": …, "arguments": …` of a tool, alone or in a list, perhaps in a fence.
fn may_be_bare(text: &str, tools: &[String]) -> bool {
    let trimmed = text.trim_start();
    if FENCES.iter().any(|fence| fence.starts_with(trimmed)) {
        return true;
    }
    let inner = within_fence(text);
    let compact: String = inner.strip_prefix('[').unwrap_or(inner).split_whitespace().collect();
    let begins = |wanted: &str| compact.starts_with(wanted) || wanted.starts_with(&*compact);
    let keys = ["arguments", "parameters"];
    tools.iter().any(|tool| keys.iter().any(|key| begins(&format!("{{\"name\":\"{tool}\",\"{key}\":"))))
        || keys.iter().any(|key| begins(&format!("{{\"{key}\":")))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BareCall {
    name: String,
    #[serde(alias = "parameters")]
    arguments: serde_json::Map<String, Value>,
}

/// Text that is nothing but calls of these tools.
fn bare_calls(text: &str, tools: &[String]) -> Option<Vec<ReadCall>> {
    let inner = within_fence(text).trim_end();
    let inner = ["```", "</tools>"].iter().find_map(|fence| inner.strip_suffix(fence)).unwrap_or(inner);
    let mut calls = Vec::new();
    for value in serde_json::Deserializer::from_str(inner).into_iter::<Value>() {
        match value.ok()? {
            Value::Array(values) => calls.extend(values),
            value => calls.push(value),
        }
    }
    let calls = calls.into_iter().map(|value| {
        let BareCall { name, arguments } =
            serde_json::from_value(value).ok().filter(|call: &BareCall| tools.contains(&call.name))?;
        Some(ReadCall { function: ReadFunction { name, arguments: Value::Object(arguments).to_string() } })
    });
    calls.collect::<Option<Vec<_>>>().filter(|calls| !calls.is_empty())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
mod tests {
    use llama_cpp_4::chat::{ChatApplyParams, ChatTemplates, ReasoningFormat};
    use llama_cpp_4::llama_backend::LlamaBackend;
    use llama_cpp_4::model::LlamaModel;
    use llama_cpp_4::model::params::LlamaModelParams;
    use proptest::prelude::*;

    use super::*;

    fn tools() -> Vec<String> {
        vec!["weather".into(), "time".into()]
    }

    #[test]
    fn calls_without_marks_are_read_alone_in_a_list_one_after_the_other_and_in_a_fence() {
        let one = r#"{"name": "weather", "arguments": {"city": "Oslo"}}"#;
        let two = r#"{"name": "time", "arguments": {}}"#;
        for (text, count) in [
            (one.to_owned(), 1),
            (format!("[{one}, {two}]"), 2),
            (format!("{one}\n{two}\n"), 2),
            (format!("```json\n{one}\n```"), 1),
            (format!("<tools>\n{one}\n</tools>"), 1),
        ] {
            let calls = bare_calls(&text, &tools()).unwrap();
            assert_eq!((calls.len(), calls[0].function.name.as_str()), (count, "weather"), "{text}");
            assert_eq!(calls[0].function.arguments, r#"{"city":"Oslo"}"#);
            assert!(
                (0..=text.len()).all(|at| may_be_bare(&text[..at], &tools())),
                "{text} is held back from its first letter on"
            );
        }
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for text in [
            r#"{"name": "nobody", "arguments": {}}"#,
            r#"{"name": "weather", "arguments": {}} is how."#,
            r#"{"name": "weather", "arguments": "Oslo"}"#,
            r#"{"city": "Oslo"}"#,
            "",
            "[]",
        ] {
            assert!(bare_calls(text, &tools()).is_none(), "{text}");
        }
        for text in [r#"{"city""#, "The", "```rust\nfn", r#"{"name": "Bob"#, r#"{"name": "weather", "size""#] {
            assert!(!may_be_bare(text, &tools()), "{text} is passed on at once");
        }
    }

    /// The forms of an answer with these tools, as the template of a real model has them.
    fn form(templates: &ChatTemplates) -> ChatParams {
        let tool = |name: &str| serde_json::json!({ "type": "function", "function": { "name": name, "parameters": { "type": "object" } } });
        let params = ChatApplyParams::new(serde_json::json!([{ "role": "user", "content": "Hi" }]).to_string())
            .with_reasoning_format(ReasoningFormat::Auto)
            .with_tools(serde_json::json!([tool("weather"), tool("time")]).to_string());
        templates.apply(&params).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

        /// Whatever a model writes, whole or cut, in whatever pieces: nothing fails, and text that is no call is passed on to its last
        /// letter.
        #[test]
        fn no_word_of_an_answer_is_lost(
            pieces in prop::collection::vec(0_usize..WORDS.len(), 0..14),
            letters in ".{0,12}",
            at in 0_usize..14,
            is_cut: bool,
        ) {
            let form = FORM.with(Clone::clone);
            let tools = Tools { definitions: "[]".into(), names: tools(), choice: ToolChoice::Auto, parallel: None };
            let mut parts = Parts::new(form, HashSet::new(), Some(tools));
            let (mut text, mut said, mut calls) = (String::new(), String::new(), Vec::new());
            let mut take = |events: Vec<Event>| {
                for event in events {
                    match event {
                        Event::Text(text) => said.push_str(&text),
                        Event::ToolCall(part) => part.add_to(&mut calls),
                        Event::Reasoning(text) => said.push_str(&text),
                        other => panic!("{other:?}"),
                    }
                }
            };
            for (index, piece) in pieces.iter().enumerate() {
                let piece = if index == at { format!("{letters}{}", WORDS[*piece]) } else { WORDS[*piece].to_owned() };
                text.push_str(&piece);
                take(parts.push(&piece));
            }
            let (events, _) = parts.finish(if is_cut { FinishReason::Length } else { FinishReason::Stop });
            take(events);
            if calls.is_empty() {
                // A mark of a call that is none may be lost with it.
                let words = |text: &str| text.replace("<tool_call>", "").replace("</tool_call>", "").split_whitespace().collect::<String>();
                prop_assert_eq!(words(&said), words(&text));
            }
            for call in &calls {
                prop_assert!(!call.name.is_empty() || is_cut, "{:?} of {:?}", calls, text);
            }
        }
    }

    /// What calls are made of, and what they are not.
    const WORDS: [&str; 24] = [
        "<tool_call>",
        "</tool_call>",
        "{\"name\": \"weather\", ",
        "\"arguments\": ",
        "{}",
        "{\"city\": \"Oslo\"}",
        "}",
        "{",
        "[",
        "]",
        ",",
        "\n",
        "```json\n",
        "```",
        "<tools>",
        "</tools>",
        "The weather ",
        "\"",
        "\\",
        "null",
        "{\"name\":\"time\",\"arguments\":{}}",
        "<",
        "</",
        "é🦙",
    ];

    thread_local! {
        /// Read once: the file is large.
        static FORM: ChatParams = {
            let home = std::env::var("HOME").unwrap_or_default();
            let folder = std::env::var("SARAI_MODELS").unwrap_or(format!("{home}/.cache/sarai/models"));
            let path = std::path::Path::new(&folder).join("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf");
            assert!(path.exists(), "{} is missing: run `make models`, or `make test` which does", path.display());
            let backend = LlamaBackend::init().unwrap();
            let only_words = LlamaModelParams::default().with_vocab_only(true);
            let model = LlamaModel::load_from_file(&backend, path, &only_words).unwrap();
            let templates = ChatTemplates::from_model(&model, None).unwrap();
            form(&templates)
        };
    }
}
