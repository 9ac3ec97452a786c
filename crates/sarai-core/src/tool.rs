//! Tools that a model may call.

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

/// What a request says of tools.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tools {
    /// A JSON array of OpenAI's tool definitions; as text, so that its nesting adds nothing to a frame's.
    pub definitions: String,
    /// Their names, in the same order.
    pub names: Vec<String>,
    /// Whether one must be called.
    pub choice: ToolChoice,
    /// Whether several may be called in one answer; `None` leaves it to the model's template.
    pub parallel: Option<bool>,
}

/// Whether a tool must be called. That none may is said by not showing any.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolChoice {
    /// The model decides.
    #[default]
    Auto,
    /// One of them.
    Required,
    /// This one.
    Named(String),
}

/// One call of a tool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    /// Names it in the result's message.
    pub id: String,
    /// The tool.
    pub name: String,
    /// Its arguments as JSON.
    pub arguments: String,
}

impl ToolCall {
    /// Whether its arguments came to their end.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        serde_json::from_str::<IgnoredAny>(&self.arguments).is_ok()
    }
}

/// A piece of a call, as it is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCallPart {
    /// Counts the calls of one answer.
    pub index: usize,
    /// What is new: the id and the name with the call's first piece, and more of its arguments.
    pub call: ToolCall,
}

impl ToolCallPart {
    /// Adds it to the calls that it is a piece of.
    pub fn add_to(self, calls: &mut Vec<ToolCall>) {
        if calls.len() <= self.index {
            calls.resize_with(self.index + 1, ToolCall::default);
        }
        let call = &mut calls[self.index];
        call.id.push_str(&self.call.id);
        call.name.push_str(&self.call.name);
        call.arguments.push_str(&self.call.arguments);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_grow_from_their_pieces() {
        let piece = |index, id: &str, name: &str, arguments: &str| ToolCallPart {
            index,
            call: ToolCall { id: id.into(), name: name.into(), arguments: arguments.into() },
        };
        let mut calls = Vec::new();
        for part in
            [piece(0, "a", "f", ""), piece(0, "", "", "{\"x\""), piece(1, "b", "g", "{}"), piece(0, "", "", ":1}")]
        {
            part.add_to(&mut calls);
        }
        assert_eq!((calls[0].name.as_str(), calls[0].arguments.as_str()), ("f", "{\"x\":1}"));
        assert!(calls[0].is_whole() && !ToolCall { arguments: "{\"x".into(), ..ToolCall::default() }.is_whole());
        assert_eq!((calls[1].id.as_str(), calls[1].arguments.as_str()), ("b", "{}"));
    }
}
