//! Tools and their calls: both APIs define them alike, and differ in how calls are written.

use sarai_core::{Error, ToolCall, ToolChoice, Tools};
use serde_json::{Map, Value, json};

/// As JSON has it: the engine's texts end at one.
const NUL: &str = "\\u0000";

/// Reads `tools`; `Err` says in words what is not understood of them here, and may be by a host.
pub fn definitions(tools: &[Value]) -> Result<Tools, String> {
    let mut names = Vec::new();
    for (index, tool) in tools.iter().enumerate() {
        let is_function = matches!(&tool["type"], Value::Null) || tool["type"] == "function" || tool["type"] == "";
        let name = tool["function"]["name"].as_str().filter(|name| !name.is_empty() && is_function);
        match name {
            Some(name) => names.push(name.to_owned()),
            None => return Err(format!("`tools[{index}]` is no function with a name, which is not supported")),
        }
        if tool.to_string().contains(NUL) {
            return Err(format!("`tools[{index}]` holds a NUL character, which is not supported"));
        }
        let parameters = &tool["function"]["parameters"];
        if !(parameters.is_object() || parameters.is_null()) {
            return Err(format!("`tools[{index}].function.parameters` is no JSON schema, which is not supported"));
        }
    }
    let definitions = tools.iter().map(|tool| {
        let mut tool = tool.clone();
        // Ollama's clients may leave it out.
        tool["type"] = "function".into();
        // Templates and grammars want a schema.
        if tool["function"]["parameters"].is_null() {
            tool["function"]["parameters"] = json!({ "type": "object", "properties": {} });
        }
        tool
    });
    let definitions = Value::Array(definitions.collect()).to_string();
    Ok(Tools { definitions, names, choice: ToolChoice::Auto, parallel: None })
}

/// Whether a chat template shows tools to its model.
#[must_use]
pub fn are_shown_by(template: &str) -> bool {
    template.contains("tools")
}

/// Whether a chat template has the model reason before it answers.
#[must_use]
pub fn reasons(template: &str) -> bool {
    // The marks of the templates that llama.cpp reads reasoning of.
    ["enable_thinking", "<think>", "[THINK]", "<mm:think>", "<|channel|>analysis", "<seed:think>"]
        .iter()
        .any(|mark| template.contains(mark))
}

/// What may be called.
pub enum Chosen {
    /// These, as they say.
    These(Tools),
    /// No tool.
    Nothing,
    /// A choice that is not understood here, and may be by a host: in words.
    Unknown(String),
}

/// Takes OpenAI's `tool_choice` into account.
///
/// # Errors
/// It names a tool that there is not.
pub fn choose(mut tools: Tools, choice: Option<&Value>) -> Result<Chosen, Error> {
    tools.choice = match choice {
        None | Some(Value::Null) => ToolChoice::Auto,
        Some(Value::String(word)) if word == "auto" => ToolChoice::Auto,
        Some(Value::String(word)) if word == "required" => ToolChoice::Required,
        Some(Value::String(word)) if word == "none" => return Ok(Chosen::Nothing),
        Some(choice) => {
            let Some(name) = choice["function"]["name"].as_str() else {
                let words =
                    "use \"auto\", \"none\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": …}}";
                return Ok(Chosen::Unknown(format!("`tool_choice` is {choice} ({words}), which is not supported")));
            };
            if !tools.names.iter().any(|known| known == name) {
                let known = tools.names.join("`, `");
                return Err(Error::invalid(
                    "tool_choice",
                    format!("`tool_choice` names `{name}`: use one of `{known}`"),
                ));
            }
            ToolChoice::Named(name.to_owned())
        }
    };
    Ok(Chosen::These(tools))
}

/// Reads the calls in a message, of either API; `None` if they are not understood.
pub fn calls(value: &Value) -> Option<Vec<ToolCall>> {
    if value.to_string().contains(NUL) {
        return None;
    }
    let calls = value.as_array()?.iter().enumerate().map(|(index, call)| {
        let function = &call["function"];
        let arguments = match &function["arguments"] {
            Value::String(text) => text.clone(),
            Value::Null => "{}".to_owned(),
            object => object.to_string(),
        };
        let id = call["id"].as_str().map_or_else(|| format!("call_{index}"), str::to_owned);
        Some(ToolCall { id, name: function["name"].as_str()?.to_owned(), arguments })
    });
    calls.collect()
}

/// A call in OpenAI's form: arguments are text.
pub fn to_openai(call: &ToolCall) -> Value {
    json!({ "id": call.id, "type": "function", "function": { "name": call.name, "arguments": call.arguments } })
}

/// Calls in Ollama's form: arguments are an object; those that are none stand as text, so that nothing is lost.
pub fn to_ollama(calls: &[ToolCall]) -> Value {
    let call = |(index, call): (usize, &ToolCall)| {
        let arguments = serde_json::from_str(&call.arguments).unwrap_or_else(|_| match call.arguments.is_empty() {
            true => Value::Object(Map::new()),
            false => call.arguments.as_str().into(),
        });
        json!({ "id": call.id, "function": { "index": index, "name": call.name, "arguments": arguments } })
    };
    calls.iter().enumerate().map(call).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_that_reason_are_known_by_their_marks() {
        for mark in ["<think>", "[THINK]", "<|channel|>analysis<|message|>", "{% if enable_thinking %}"] {
            assert!(reasons(&format!("{{{{ m }}}}{mark}")), "{mark}");
        }
        assert!(!reasons("{{ m['content'] }}"));
    }
}
