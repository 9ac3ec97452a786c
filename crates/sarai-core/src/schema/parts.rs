//! Where a schema holds others.

use std::collections::HashSet;

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
fn parts(schema: &Map<String, Value>) -> Vec<(String, &Value)> {
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

/// Visits a document's schema, all that it holds, and all that it refers to, each with its place, until a visit says that it was the
/// one looked for; returns that one's place.
pub fn visit(document: &Value, mut is_it: impl FnMut(&str, &Value) -> bool) -> Option<String> {
    let (mut seen, mut left) = (HashSet::new(), vec![("#".to_owned(), document)]);
    while let Some((place, schema)) = left.pop() {
        // A reference may be spelled in many ways.
        if !seen.insert(std::ptr::from_ref(schema)) {
            continue;
        }
        if is_it(&place, schema) {
            return Some(place);
        }
        let Value::Object(fields) = schema else { continue };
        left.extend(parts(fields).into_iter().map(|(at, part)| (format!("{place}/{at}"), part)));
        if let Some(reference) = fields.get("$ref").and_then(Value::as_str) {
            left.extend(target(document, reference).map(|target| (reference.to_owned(), target)));
        }
    }
    None
}

/// What a `$ref` means within its document; nothing if it points elsewhere, or at nothing.
#[must_use]
pub fn target<'a>(document: &'a Value, reference: &str) -> Option<&'a Value> {
    let pointer = percent_encoding::percent_decode_str(reference.strip_prefix('#')?).decode_utf8().ok()?;
    document.pointer(&pointer)
}

/// What is meant by a schema that only holds another one, as one of `allOf` beside which nothing is said, or by reference.
#[must_use]
pub fn meant<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    let mut meant = schema;
    // A chain of references without an end means nothing.
    for _ in 0..MOST_HOPS {
        let inner = meant.as_object().and_then(|fields| {
            let reference = fields
                .get("$ref")
                .and_then(Value::as_str)
                .filter(|_| fields.keys().all(|key| describes(key) || key == "$ref"));
            reference.and_then(|reference| target(document, reference)).or_else(|| only_part(fields))
        });
        match inner {
            Some(inner) => meant = inner,
            None => break,
        }
    }
    meant
}

/// The only schema of `allOf`, if nothing is said beside it.
#[must_use]
pub fn only_part(schema: &Map<String, Value>) -> Option<&Value> {
    let all = schema.get("allOf")?.as_array().filter(|all| all.len() == 1)?;
    schema.keys().all(|key| describes(key) || key == "allOf").then(|| &all[0])
}

/// References that are followed one after the other.
const MOST_HOPS: usize = 32;

/// Whether a keyword says nothing of what is valid.
pub fn describes(keyword: &str) -> bool {
    [
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$comment",
        "$schema",
        "$id",
        "$defs",
        "definitions",
    ]
    .contains(&keyword)
}
