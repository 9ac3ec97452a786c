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

/// The way from a schema to one that it holds, or refers to.
#[derive(Clone, Copy)]
enum Step<'a> {
    Keyword(&'a str),
    Name(&'a str, &'a str),
    Index(&'a str, usize),
    Reference(&'a str),
}

/// The schemas that a schema holds, and where; not those that it only defines.
fn parts(schema: &Map<String, Value>) -> Vec<(Step<'_>, &Value)> {
    let mut parts = Vec::new();
    for (keyword, value) in schema {
        match holds(keyword, value) {
            Holds::Named => {
                let all = value.as_object().into_iter().flatten();
                parts.extend(all.map(|(name, part)| (Step::Name(keyword, name), part)));
            }
            Holds::Listed => {
                let all = value.as_array().into_iter().flatten().enumerate();
                parts.extend(all.map(|(index, part)| (Step::Index(keyword, index), part)));
            }
            Holds::One => parts.push((Step::Keyword(keyword), value)),
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

/// Visits a document's schema, all that it holds, and all that it refers to, until a visit says that it was the one looked for; returns
/// that one's place.
pub fn visit(document: &Value, mut is_it: impl FnMut(&Value) -> bool) -> Option<String> {
    // Places are steps from others, and written for the one that is found alone: names may be long, and schemas many.
    let mut steps: Vec<(usize, Step<'_>)> = Vec::new();
    let (mut seen, mut left) = (HashSet::new(), vec![(0, Step::Reference("#"), document)]);
    while let Some((from, step, schema)) = left.pop() {
        // A reference may be spelled in many ways.
        if !seen.insert(std::ptr::from_ref(schema)) {
            continue;
        }
        let at = steps.len();
        steps.push((from, step));
        if is_it(schema) {
            return Some(place(&steps));
        }
        let Value::Object(fields) = schema else { continue };
        left.extend(parts(fields).into_iter().map(|(step, part)| (at, step, part)));
        if let Some(reference) = fields.get("$ref").and_then(Value::as_str) {
            left.extend(target(document, reference).map(|target| (at, Step::Reference(reference), target)));
        }
    }
    None
}

/// Where the last of these steps leads to.
fn place(steps: &[(usize, Step<'_>)]) -> String {
    let mut parts = Vec::new();
    let mut next = steps.last();
    while let Some((from, step)) = next {
        match step {
            Step::Reference(reference) => {
                parts.push((*reference).to_owned());
                break;
            }
            Step::Keyword(keyword) => parts.push(format!("/{keyword}")),
            Step::Name(keyword, name) => parts.push(format!("/{keyword}/{name}")),
            Step::Index(keyword, index) => parts.push(format!("/{keyword}/{index}")),
        }
        next = steps.get(*from);
    }
    parts.reverse();
    parts.concat()
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
