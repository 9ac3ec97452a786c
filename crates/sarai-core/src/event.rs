//! What streams from a backend to the client.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::request::Api;
use crate::tool::ToolCallPart;

/// One step of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// More text: whole characters, never empty.
    Text(String),
    /// Reasoning that is no part of the answer: whole characters, never empty.
    Reasoning(String),
    /// How likely the tokens of the text that follows were; only where that was asked for.
    Logprobs(Vec<TokenLogprob>),
    /// A piece of a call of a tool.
    ToolCall(ToolCallPart),
    /// The vector of one of the inputs, or its score.
    Vector {
        /// Which.
        index: usize,
        /// Its numbers; as text in a frame.
        #[serde(with = "numbers")]
        values: Vec<f32>,
    },
    /// A step of a host that has more to say than text.
    Extra(Box<Extra>),
    /// The tokens of all that was said, before the end; only where that was asked for.
    Context(Vec<i32>),
    /// Bytes came that say nothing: a sign of life, and no token. Ends in dispatch.
    Alive,
    /// The answer broke off, and goes on from the same character elsewhere.
    Resumed {
        /// Who goes on: `model@place`.
        by: String,
        /// Why the former one did not.
        reason: String,
        /// What its part of the answer lacks.
        degraded: Vec<String>,
    },
    /// The clean end; nothing follows.
    Done {
        /// Why the answer ended.
        finish: FinishReason,
        /// What it took in tokens.
        usage: Usage,
        /// What it took in time.
        timings: Timings,
    },
}

/// How likely one token was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// Its text, which may end within a character.
    pub bytes: Vec<u8>,
    /// The logarithm of its probability.
    pub logprob: f32,
    /// The likeliest ones in its place, the likeliest first.
    pub top: Vec<Self>,
}

/// What a host says beyond text, opaque, for clients that speak the same API: reasoning, tool calls, probabilities, and
/// whatever a newer server has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Extra {
    /// Whose fields they are.
    pub api: Api,
    /// Text of the same step; may be empty.
    pub text: String,
    /// Fields of the chunk or line.
    pub top: Map<String, Value>,
    /// Fields of OpenAI's `choices[0]`.
    pub choice: Map<String, Value>,
    /// Fields of OpenAI's `delta`, or of Ollama's `message`.
    pub message: Map<String, Value>,
}

impl Extra {
    /// Whether it has nothing of the answer itself.
    #[must_use]
    pub fn only_describes(&self) -> bool {
        self.text.is_empty() && self.is_plain()
    }

    /// Whether it has nothing of the answer itself but text.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        let is_nothing = |value: &Value| match value {
            Value::Null => true,
            Value::String(text) => text.is_empty(),
            Value::Array(all) => all.is_empty(),
            _ => false,
        };
        self.choice.values().chain(self.message.values()).all(is_nothing)
    }

    /// Puts a later step's fields to these, for an answer that is wanted whole: texts and lists grow, what has an `index` is
    /// found by it, anything else is replaced.
    pub fn absorb(&mut self, later: Self) {
        self.text.push_str(&later.text);
        for (fields, later) in
            [(&mut self.top, later.top), (&mut self.choice, later.choice), (&mut self.message, later.message)]
        {
            merge_fields(fields, later, 0);
        }
    }
}

/// What a step says whole, however often.
const WHOLE: [&str; 7] = ["index", "id", "type", "name", "role", "format", "usage"];
/// Deeper than any answer nests what grows.
const DEEPEST: usize = 16;

fn merge_fields(into: &mut Map<String, Value>, later: Map<String, Value>, depth: usize) {
    for (key, value) in later {
        match into.get_mut(&key) {
            // Steps that have nothing more to say of it.
            Some(_) if value.is_null() || value == "" => {}
            Some(known) if depth < DEEPEST && !WHOLE.contains(&key.as_str()) => merge(known, value, depth + 1),
            _ => drop(into.insert(key, value)),
        }
    }
}

fn merge(into: &mut Value, later: Value, depth: usize) {
    match (into, later) {
        (Value::String(text), Value::String(more)) => text.push_str(&more),
        (Value::Object(fields), Value::Object(more)) => merge_fields(fields, more, depth),
        (Value::Array(items), Value::Array(more)) => {
            for item in more {
                let index = item.get("index").filter(|index| index.is_u64());
                let id = |item: &Value| item.get("id").and_then(Value::as_str).unwrap_or_default().to_owned();
                let new_id = id(&item);
                // Some servers number all calls alike, and tell them apart by their ids.
                let is_named = item["function"]["name"].as_str().is_some_and(|name| !name.is_empty());
                let is_new =
                    |known: &Value| is_named && !new_id.is_empty() && !id(known).is_empty() && id(known) != new_id;
                let is_same = |known: &&mut Value| known.get("index") == index && !is_new(known);
                match index.and_then(|_| items.iter_mut().rev().find(is_same)) {
                    Some(known) => merge(known, item, depth + 1),
                    None => items.push(item),
                }
            }
        }
        (into, later) => *into = later,
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended it, or a stop text came up.
    Stop,
    /// `max_tokens` or the context was used up.
    Length,
    /// The model calls tools, and waits for their results.
    ToolCalls,
    /// The same in OpenAI's older form.
    FunctionCall,
    /// The host held the rest back.
    ContentFilter,
}

impl FinishReason {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Stop, Self::Length, Self::ToolCalls, Self::FunctionCall, Self::ContentFilter];

    /// OpenAI's word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
            Self::FunctionCall => "function_call",
            Self::ContentFilter => "content_filter",
        }
    }
}

/// Tokens in and out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the rendered prompt.
    pub prompt_tokens: u32,
    /// Of these, tokens that were still in the KV cache and were not computed again.
    pub cached_tokens: u32,
    /// Tokens generated, the one that ended the answer included.
    pub completion_tokens: u32,
}

/// Where the time of a request went.
///
/// # Units
/// Serialised as whole microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// Waiting for a permit and a slot.
    #[serde(with = "micros")]
    pub queue: Duration,
    /// Waiting for the model to be loaded; zero when it was resident.
    #[serde(with = "micros")]
    pub load: Duration,
    /// Encoding pictures and sound; zero where that was known already.
    #[serde(default, with = "micros")]
    pub encode: Duration,
    /// Computing the prompt.
    #[serde(with = "micros")]
    pub prefill: Duration,
    /// Generating the answer.
    #[serde(with = "micros")]
    pub decode: Duration,
    /// Tokens that were drafted for it.
    #[serde(default)]
    pub drafted: u32,
    /// Of which so many were accepted.
    #[serde(default)]
    pub accepted: u32,
}

/// Base64 of little-endian bytes: a tenth of the time that decimal digits take.
mod numbers {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(values: &[f32], to: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        to.serialize_str(&STANDARD.encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<f32>, D::Error> {
        let bytes = STANDARD.decode(String::deserialize(from)?).map_err(D::Error::custom)?;
        let value = |four: &[u8]| four.try_into().map(f32::from_le_bytes).unwrap_or_default();
        Ok(bytes.chunks_exact(4).map(value).collect())
    }
}

mod micros {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(u64::try_from(value.as_micros()).unwrap_or(u64::MAX))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_micros)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use serde_json::json;

    fn step(message: Value) -> Extra {
        let Value::Object(message) = message else { unreachable!() };
        Extra { api: Api::OpenAi, text: String::new(), top: Map::new(), choice: Map::new(), message }
    }

    #[test]
    fn calls_that_a_server_numbers_alike_are_told_apart_by_their_ids() {
        let begun = |id: &str| json!({ "index": 0, "id": id, "function": { "name": "f", "arguments": "{" } });
        let further = json!({ "index": 0, "function": { "arguments": "}" } });
        let mut whole = step(json!({ "tool_calls": [begun("a")] }));
        for call in [&further, &begun("b"), &further] {
            whole.absorb(step(json!({ "tool_calls": [call] })));
        }
        let calls = whole.message["tool_calls"].as_array().unwrap();
        let calls: Vec<_> = calls.iter().map(|call| (&call["id"], &call["function"]["arguments"])).collect();
        assert_eq!(calls, [(&json!("a"), &json!("{}")), (&json!("b"), &json!("{}"))]);
    }

    #[test]
    fn steps_of_tool_calls_and_reasoning_grow_into_a_whole() {
        let call = |index: u32, part: &str| json!({ "index": index, "function": { "arguments": part } });
        let mut whole = step(json!({ "reasoning_content": "first ", "tool_calls": [call(0, "{\"a\""), call(1, "[")] }));
        whole.absorb(step(json!({ "reasoning_content": "second", "tool_calls": [call(1, "]"), call(0, ":1}")] })));
        let text = whole.message["reasoning_content"].as_str().unwrap();
        assert_eq!(text, "first second");
        assert_eq!(whole.message["tool_calls"], json!([call(0, "{\"a\":1}"), call(1, "[]")]));
    }

    #[test]
    fn a_vector_comes_back_from_its_frame_to_the_last_bit() {
        let sent = Event::Vector { index: 3, values: vec![0.1, -1e-30, f32::MAX, 0.0] };
        let back: Event = serde_json::from_str(&serde_json::to_string(&sent).unwrap()).unwrap();
        assert_eq!(back, sent);
    }

    #[test]
    fn a_step_that_nests_without_end_is_taken_as_it_is() {
        let deep = |leaf: &str| (0..100).fold(json!(leaf), |inner, _| json!({ "a": inner }));
        let mut whole = step(deep("x"));
        whole.absorb(step(deep("y")));
        assert!(Value::from(whole.message).to_string().contains('y'));
    }
}
