//! Schemas that stand beside each other, put together: llama.cpp reads only the first of `$ref`, `oneOf`, `anyOf` and `allOf`, of what
//! `allOf` holds only objects, and of what is required only what has a schema of its own.
//!
//! What is put together allows nothing that its parts do not allow. Where that cannot be done, a schema stays as it is.

use std::borrow::Cow;

use serde_json::{Map, Value, json};

use super::parts::{describes, parts_mut, target, visit};

/// Schemas within each other that are put together, and how many more of them a document may have for it.
const DEEPEST: usize = 8;
const MOST_GROWTH: usize = 4;
const FEW: usize = 1_000;

/// Keywords that hold schemas of the same value.
const IN_PLACE: [&str; 4] = ["$ref", "allOf", "anyOf", "oneOf"];

/// Why two schemas cannot be put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clash {
    /// No value is allowed by both.
    Nothing,
    /// It is not known how.
    Unknown,
}

type Merged = Result<Map<String, Value>, Clash>;

/// The same document, with all put together that can be.
#[must_use]
pub fn put_together(document: &Value) -> Cow<'_, Value> {
    let mut count = 0;
    visit(document, |_, schema| {
        count += schema.as_object().map_or(0, Map::len);
        false
    });
    let mut left = FEW + MOST_GROWTH * count;
    let mut whole = document.clone();
    if walk(&mut whole, document, &mut left).is_none() {
        return Cow::Borrowed(document);
    }
    // What is referred to must be where it was.
    let mut is_lost = false;
    visit(&whole, |_, schema| {
        let reference = schema.get("$ref").and_then(Value::as_str);
        is_lost |= reference.is_some_and(|one| target(&whole, one).is_none() && target(document, one).is_some());
        is_lost
    });
    if is_lost { Cow::Borrowed(document) } else { Cow::Owned(whole) }
}

/// Puts together what a schema holds, from the outside in; `None` if it grows too large.
fn walk(schema: &mut Value, document: &Value, left: &mut usize) -> Option<()> {
    let Value::Object(fields) = schema else { return Some(()) };
    *left = left.checked_sub(fields.len() + 1)?;
    if let Some(simple) = simple(fields, document) {
        *fields = simple;
    }
    for part in parts_mut(fields) {
        walk(part, document, left)?;
    }
    for name in ["$defs", "definitions"] {
        let definitions = fields.get_mut(name).and_then(Value::as_object_mut);
        for definition in definitions.into_iter().flat_map(Map::values_mut) {
            walk(definition, document, left)?;
        }
    }
    Some(())
}

/// One schema, without what llama.cpp would not read of it.
fn simple(fields: &Map<String, Value>, document: &Value) -> Option<Map<String, Value>> {
    let constrains = |keyword: &str| !describes(keyword);
    let is_beside =
        |keyword: &str| fields.contains_key(keyword) && fields.keys().filter(|key| constrains(key)).count() > 1;
    let mut simple = None;
    if fields.contains_key("allOf") || is_beside("$ref") {
        simple = Some(flat(fields, document, 0).ok()?);
    }
    for keyword in ["anyOf", "oneOf"] {
        let fields = simple.as_ref().unwrap_or(fields);
        let is_beside = fields.keys().filter(|key| constrains(key)).count() > 1;
        if fields.contains_key(keyword) && is_beside {
            simple = Some(distributed(fields, keyword, document)?);
        }
    }
    let with_required = named(simple.as_ref().unwrap_or(fields));
    with_required.or(simple)
}

/// What `allOf` and `$ref` say, in one schema.
fn flat(fields: &Map<String, Value>, document: &Value, depth: usize) -> Merged {
    if depth > DEEPEST {
        return Err(Clash::Unknown);
    }
    let mut whole = fields.clone();
    let parts = whole.remove("allOf").map(|all| all.as_array().cloned().ok_or(Clash::Unknown)).transpose()?;
    let reference = whole.remove("$ref").map(|reference| {
        let reference = reference.as_str().and_then(|reference| target(document, reference));
        reference.cloned().ok_or(Clash::Unknown)
    });
    for part in reference.transpose()?.into_iter().chain(parts.into_iter().flatten()) {
        whole = match part {
            Value::Bool(true) => whole,
            Value::Bool(false) => return Err(Clash::Nothing),
            Value::Object(part) => both(whole, flat(&part, document, depth + 1)?)?,
            _ => return Err(Clash::Unknown),
        };
    }
    Ok(whole)
}

/// Options, with what stands beside them in each; those that then allow nothing are left out.
fn distributed(fields: &Map<String, Value>, keyword: &str, document: &Value) -> Option<Map<String, Value>> {
    let mut beside = fields.clone();
    let options = beside.remove(keyword)?;
    let mut written: Vec<Value> = Vec::new();
    for option in options.as_array()? {
        let option = match option {
            Value::Bool(true) => Map::new(),
            Value::Bool(false) => continue,
            Value::Object(option) => match flat(option, document, 0) {
                Ok(option) => option,
                Err(Clash::Nothing) => continue,
                Err(Clash::Unknown) => return None,
            },
            _ => return None,
        };
        if IN_PLACE.iter().any(|keyword| option.contains_key(*keyword)) {
            return None;
        }
        let constraining =
            beside.iter().filter(|(key, _)| !describes(key)).map(|(key, value)| (key.clone(), value.clone()));
        match both(constraining.collect(), option) {
            Ok(whole) => written.push(whole.into()),
            Err(Clash::Nothing) => {}
            Err(Clash::Unknown) => return None,
        }
    }
    let mut whole = beside;
    whole.retain(|key, _| describes(key));
    (!written.is_empty()).then(|| {
        whole.insert(keyword.to_owned(), written.into());
        whole
    })
}

/// With a schema for each property that must be there.
fn named(fields: &Map<String, Value>) -> Option<Map<String, Value>> {
    let required = fields.get("required")?.as_array()?;
    let properties = match fields.get("properties") {
        Some(properties) => properties.as_object()?.clone(),
        None => Map::new(),
    };
    let is_object = fields.get("type").map_or(!properties.is_empty(), |kind| kind == "object");
    let missing: Vec<_> =
        required.iter().filter_map(Value::as_str).filter(|name| !properties.contains_key(*name)).collect();
    if missing.is_empty() || !is_object || IN_PLACE.iter().any(|keyword| fields.contains_key(*keyword)) {
        return None;
    }
    let any = match fields.get("additionalProperties") {
        None | Some(Value::Bool(true)) => json!({}),
        Some(Value::Object(any)) => any.clone().into(),
        Some(_) => return None,
    };
    let mut whole = fields.clone();
    let added = missing.into_iter().map(|name| (name.to_owned(), any.clone()));
    whole.insert("properties".into(), properties.into_iter().chain(added).collect::<Map<_, _>>().into());
    Some(whole)
}

/// What two schemas both allow.
fn both(mut one: Map<String, Value>, other: Map<String, Value>) -> Merged {
    close(&mut one, &other)?;
    let mut other = other;
    close(&mut other, &one)?;
    for (keyword, value) in other {
        match one.get_mut(&keyword) {
            None => drop(one.insert(keyword, value)),
            Some(_) if describes(&keyword) => {}
            Some(known) if *known == value => {}
            Some(known) => *known = of_both(&keyword, known, value)?,
        }
    }
    let required = one.get("required").and_then(Value::as_array);
    let is_missing = |name: &Value| {
        let properties = one.get("properties").and_then(Value::as_object);
        let has = properties.is_some_and(|all| name.as_str().is_some_and(|name| all.contains_key(name)));
        one.get("additionalProperties") == Some(&Value::Bool(false)) && !has
    };
    if required.is_some_and(|names| names.iter().any(is_missing)) { Err(Clash::Nothing) } else { Ok(one) }
}

/// Takes out of an object what another schema does not let it have.
fn close(one: &mut Map<String, Value>, other: &Map<String, Value>) -> Result<(), Clash> {
    let known = other.get("properties").and_then(Value::as_object);
    let is_known = |name: &str| known.is_some_and(|known| known.contains_key(name));
    let Some(Value::Object(properties)) = one.get_mut("properties") else { return Ok(()) };
    match other.get("additionalProperties") {
        None | Some(Value::Bool(true)) => {}
        Some(Value::Bool(false)) => properties.retain(|name, _| is_known(name)),
        Some(_) if properties.keys().all(|name| is_known(name)) => {}
        Some(_) => return Err(Clash::Unknown),
    }
    Ok(())
}

/// What two values of a keyword both allow.
fn of_both(keyword: &str, one: &Value, other: Value) -> Result<Value, Clash> {
    let numbers = one.as_f64().zip(other.as_f64());
    match keyword {
        "type" => common_types(one, &other),
        "minimum" | "exclusiveMinimum" | "minLength" | "minItems" | "minProperties" => {
            let (a, b) = numbers.ok_or(Clash::Unknown)?;
            Ok(if a >= b { one.clone() } else { other })
        }
        "maximum" | "exclusiveMaximum" | "maxLength" | "maxItems" | "maxProperties" => {
            let (a, b) = numbers.ok_or(Clash::Unknown)?;
            Ok(if a <= b { one.clone() } else { other })
        }
        "required" => {
            let (Value::Array(one), Value::Array(other)) = (one, other) else { return Err(Clash::Unknown) };
            let more = other.into_iter().filter(|name| !one.contains(name));
            Ok(one.iter().cloned().chain(more.collect::<Vec<_>>()).collect())
        }
        "enum" => {
            let (Value::Array(one), Value::Array(other)) = (one, other) else { return Err(Clash::Unknown) };
            let common: Vec<_> = one.iter().filter(|value| other.contains(value)).cloned().collect();
            if common.is_empty() { Err(Clash::Nothing) } else { Ok(common.into()) }
        }
        "const" => Err(Clash::Nothing),
        "properties" => {
            let (Value::Object(one), Value::Object(other)) = (one, other) else { return Err(Clash::Unknown) };
            let mut all = one.clone();
            for (name, schema) in other {
                let schema = match all.remove(&name) {
                    Some(known) => of_one_value(known, schema)?,
                    None => schema,
                };
                all.insert(name, schema);
            }
            Ok(all.into())
        }
        "items" => of_one_value(one.clone(), other),
        "additionalProperties" => match (one, other) {
            (Value::Bool(true), value) => Ok(value),
            (value, Value::Bool(true)) => Ok(value.clone()),
            (Value::Bool(false), _) | (_, Value::Bool(false)) => Ok(false.into()),
            (one, other) => of_one_value(one.clone(), other),
        },
        "uniqueItems" => Ok(true.into()),
        _ => Err(Clash::Unknown),
    }
}

/// What two schemas of the same value both allow.
fn of_one_value(one: Value, other: Value) -> Result<Value, Clash> {
    match (one, other) {
        (Value::Bool(true), schema) | (schema, Value::Bool(true)) => Ok(schema),
        (one, other) if one == other => Ok(one),
        (Value::Object(one), Value::Object(other)) => {
            let is_plain = |schema: &Map<String, Value>| !IN_PLACE.iter().any(|keyword| schema.contains_key(*keyword));
            if is_plain(&one) && is_plain(&other) {
                // That a property allows nothing does not mean that its object does.
                both(one, other).map(Value::from).map_err(|_| Clash::Unknown)
            } else {
                // They are put together in their turn.
                Ok(json!({ "allOf": [one, other] }))
            }
        }
        _ => Err(Clash::Unknown),
    }
}

/// Types that both allow: of numbers, the whole ones are some.
fn common_types(one: &Value, other: &Value) -> Result<Value, Clash> {
    let all = |types: &Value| match types {
        Value::String(kind) => Ok(vec![kind.clone()]),
        Value::Array(kinds) => Ok(kinds.iter().filter_map(Value::as_str).map(str::to_owned).collect::<Vec<_>>()),
        _ => Err(Clash::Unknown),
    };
    let (one, other) = (all(one)?, all(other)?);
    let allows = |kinds: &[String], kind: &str| {
        kinds.iter().any(|known| known == kind || (kind == "integer" && known == "number"))
    };
    let mut common: Vec<_> = one.iter().filter(|kind| allows(&other, kind)).cloned().collect();
    common.extend(other.iter().filter(|kind| allows(&one, kind) && !one.contains(kind)).cloned());
    match common.as_slice() {
        [] => Err(Clash::Nothing),
        [kind] => Ok(kind.as_str().into()),
        _ => Ok(common.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_beside_each_other_is_put_together() {
        let a = json!({ "type": "object", "properties": { "a": { "type": "integer" } }, "required": ["a"] });
        for (schema, wanted) in [
            (json!({ "allOf": [{ "type": "integer" }, { "minimum": 5 }] }), json!({ "type": "integer", "minimum": 5 })),
            (
                json!({ "type": "string", "allOf": [{ "minLength": 3 }, { "maxLength": 5 }] }),
                json!({ "type": "string", "minLength": 3, "maxLength": 5 }),
            ),
            (
                json!({ "allOf": [{ "type": "number", "minimum": 1 }, { "type": ["integer", "null"], "minimum": 2 }] }),
                json!({ "type": "integer", "minimum": 2 }),
            ),
            (
                json!({ "allOf": [a, { "properties": { "b": { "type": "null" }, "a": { "maximum": 9 } }, "required": ["b"] }] }),
                json!({ "type": "object", "properties": { "a": { "type": "integer", "maximum": 9 }, "b": { "type": "null" } }, "required": ["a", "b"] }),
            ),
            (
                json!({ "type": "object", "properties": { "a": {}, "b": {} }, "additionalProperties": false, "anyOf": [{ "required": ["a"] }, { "required": ["b"] }, { "required": ["c"] }] }),
                json!({ "anyOf": [
                    { "type": "object", "properties": { "a": {}, "b": {} }, "additionalProperties": false, "required": ["a"] },
                    { "type": "object", "properties": { "a": {}, "b": {} }, "additionalProperties": false, "required": ["b"] },
                ] }),
            ),
            (
                json!({ "type": "object", "properties": { "a": {} }, "required": ["a", "b"] }),
                json!({ "type": "object", "properties": { "a": {}, "b": {} }, "required": ["a", "b"] }),
            ),
            (
                json!({ "$defs": { "x": { "type": "string" } }, "properties": { "y": { "$ref": "#/$defs/x", "maxLength": 2 } } }),
                json!({ "$defs": { "x": { "type": "string" } }, "properties": { "y": { "maxLength": 2, "type": "string" } } }),
            ),
            (
                json!({ "anyOf": [{ "type": "string" }, { "type": "integer" }], "enum": ["a", 1] }),
                json!({ "anyOf": [{ "enum": ["a", 1], "type": "string" }, { "enum": ["a", 1], "type": "integer" }] }),
            ),
        ] {
            assert_eq!(*put_together(&schema), wanted, "{schema}");
        }
    }

    #[test]
    fn what_cannot_be_put_together_stays_as_it_is() {
        for schema in [
            json!({ "allOf": [{ "pattern": "a" }, { "pattern": "b" }] }),
            json!({ "allOf": [{ "type": "string" }, { "type": "null" }] }),
            json!({ "$defs": { "a": { "allOf": [{ "$ref": "#/$defs/a" }, { "type": "object" }] } }, "$ref": "#/$defs/a" }),
            json!({ "type": "object", "anyOf": [{ "anyOf": [{ "required": ["a"] }] }] }),
            json!({ "type": "object", "required": ["a"], "additionalProperties": false }),
            json!({ "allOf": [{ "$ref": "#/nowhere" }, {}] }),
            // It is referred to by its place within what would be put together.
            json!({ "allOf": [{ "properties": { "a": { "type": "string" } } }], "properties": { "b": { "$ref": "#/allOf/0/properties/a" } } }),
            json!({ "type": "string", "title": "t" }),
        ] {
            assert_eq!(*put_together(&schema), schema);
        }
    }

    #[test]
    fn a_document_that_would_grow_without_end_stays_as_it_is() {
        let level = |n: usize| {
            let part = json!({ "allOf": [{ "$ref": format!("#/$defs/{}", n + 1) }, { "type": "object" }] });
            json!({ "properties": { "a": part, "b": part, "c": part } })
        };
        let mut definitions: Map<_, _> = (0..40).map(|n| (n.to_string(), level(n))).collect();
        definitions.insert("40".into(), json!({ "type": "object" }));
        let schema = json!({ "$defs": definitions, "$ref": "#/$defs/0" });
        assert_eq!(*put_together(&schema), schema);
    }
}
