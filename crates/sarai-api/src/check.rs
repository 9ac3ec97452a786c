//! What a field may hold, and fields that this server does not serve.

use sarai_core::{Error, Role};
use serde_json::Value;

/// Refuses a number outside `[low, high]`.
pub fn range(param: &str, value: Option<f32>, low: f32, high: f32) -> Result<(), Error> {
    match value {
        Some(value) if !(low..=high).contains(&value) => {
            Err(Error::invalid(param, format!("`{param}` is {value}: use a number from {low} to {high}")))
        }
        _ => Ok(()),
    }
}

/// Whether a field says nothing: it is missing, or what its API takes it for then.
pub fn is_default(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// Refuses text that the engine cannot take: it ends at a NUL.
pub fn text(param: &str, text: String) -> Result<String, Error> {
    match text.find('\0') {
        None => Ok(text),
        Some(at) => Err(Error::invalid(param, format!("`{param}` holds a NUL character at byte {at}: leave it out"))),
    }
}

/// Reads a role.
pub fn role(param: &str, name: &str) -> Result<Role, Error> {
    match name.to_ascii_lowercase().as_str() {
        "system" | "developer" => Ok(Role::System),
        "user" => Ok(Role::User),
        "assistant" => Ok(Role::Assistant),
        "tool" => Ok(Role::Tool),
        _ => {
            Err(Error::invalid(param, format!("`{param}` is `{name}`: use system, developer, user, assistant or tool")))
        }
    }
}
