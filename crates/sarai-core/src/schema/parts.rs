//! Where a schema holds others.

use serde_json::{Map, Value};

/// How a keyword holds schemas.
enum Holds {
    Named,
    Listed,
    One,
    None,
}

fn holds(keyword: &str, value: &Value) -> Holds {
    match (keyword, value) {
        ("properties", Value::Object(_)) => Holds::Named,
        ("items" | "prefixItems" | "anyOf" | "oneOf" | "allOf", Value::Array(_)) => Holds::Listed,
        ("items" | "additionalProperties", _) => Holds::One,
        _ => Holds::None,
    }
}

/// The schemas that a schema holds, and where; not those that it only defines.
#[must_use]
pub fn parts(schema: &Map<String, Value>) -> Vec<(String, &Value)> {
    let mut parts = Vec::new();
    for (keyword, value) in schema {
        match holds(keyword, value) {
            Holds::Named => {
                let all = value.as_object().into_iter().flatten();
                parts.extend(all.map(|(name, part)| (format!("{keyword}/{name}"), part)));
            }
            Holds::Listed => {
                let all = value.as_array().into_iter().flatten().enumerate();
                parts.extend(all.map(|(index, part)| (format!("{keyword}/{index}"), part)));
            }
            Holds::One => parts.push((keyword.clone(), value)),
            Holds::None => {}
        }
    }
    parts
}

/// The same, to be changed.
pub fn parts_mut(schema: &mut Map<String, Value>) -> Vec<&mut Value> {
    let mut parts = Vec::new();
    for (keyword, value) in schema {
        match holds(keyword, value) {
            Holds::Named => parts.extend(value.as_object_mut().into_iter().flat_map(Map::values_mut)),
            Holds::Listed => parts.extend(value.as_array_mut().into_iter().flatten()),
            Holds::One => parts.push(value),
            Holds::None => {}
        }
    }
    parts
}

/// What a `$ref` means within its document; nothing if it points elsewhere, or at nothing.
#[must_use]
pub fn target<'a>(document: &'a Value, reference: &str) -> Option<&'a Value> {
    reference.strip_prefix('#').and_then(|pointer| document.pointer(pointer))
}
