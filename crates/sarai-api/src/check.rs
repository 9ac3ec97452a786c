//! Ranges of the sampling parameters, and fields that this server does not serve.

use sarai_core::{Error, Role, Sampling};
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

/// Checks every parameter of the sampling.
pub fn sampling(sampling: &Sampling) -> Result<(), Error> {
    range("temperature", sampling.temperature, 0.0, 100.0)?;
    range("top_p", sampling.top_p, 0.0, 1.0)?;
    range("min_p", sampling.min_p, 0.0, 1.0)?;
    range("typical_p", sampling.typical_p, 0.0, 1.0)?;
    range("repeat_penalty", sampling.repeat_penalty, f32::MIN_POSITIVE, 100.0)?;
    range("presence_penalty", sampling.presence_penalty, -2.0, 2.0)?;
    range("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)?;
    if let Some(n) = sampling.repeat_last_n.filter(|&n| n < -1) {
        return Err(Error::invalid(
            "repeat_last_n",
            format!("`repeat_last_n` is {n}: use -1 for the whole context, or 0 and more"),
        ));
    }
    Ok(())
}

/// Refuses a field that is set to something, since ignoring it would change the answer's meaning.
pub fn unsupported(param: &str, value: &Option<Value>) -> Result<(), Error> {
    let is_default = match value {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::Array(items)) => items.is_empty(),
        Some(Value::String(text)) => text.is_empty(),
        Some(_) => false,
    };
    if is_default {
        return Ok(());
    }
    Err(Error::invalid(param, format!("`{param}` is not supported by this server yet: leave it out")))
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
    match name {
        "system" | "developer" => Ok(Role::System),
        "user" => Ok(Role::User),
        "assistant" => Ok(Role::Assistant),
        "tool" => Ok(Role::Tool),
        _ => {
            Err(Error::invalid(param, format!("`{param}` is `{name}`: use system, developer, user, assistant or tool")))
        }
    }
}

/// Reads a seed of either API: any integer; negative means random.
pub fn seed(seed: Option<i64>) -> Option<u32> {
    let seed = seed.filter(|&seed| seed >= 0)?;
    u32::try_from(seed % i64::from(u32::MAX)).ok()
}
