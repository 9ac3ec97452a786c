//! Schemas that stand beside each other, put together: llama.cpp reads only the first of `$ref`, `oneOf`, `anyOf` and `allOf`, of what
//! `allOf` holds only objects, and of what is required only what has a schema of its own.
//!
//! What is put together allows nothing that its parts do not allow. Where that cannot be done, a schema stays as it is.

use std::borrow::Cow;

use serde_json::{Map, Value, json};

use super::parts::{describes, parts_mut, target, visit};

/// Parts within each other that are put together.
const DEEPEST: usize = 8;
/// Schemas within each other that are looked at.
const DEEPEST_SCHEMA: usize = 128;
/// Values that may be copied or compared for it: so many, so many more for each that the document has, and so many at the most.
const FEW: usize = 1_000;
const FOR_EACH: usize = 16;
const MOST: usize = 1_000_000;

/// Keywords that hold schemas of the same value.
const IN_PLACE: [&str; 4] = ["$ref", "allOf", "anyOf", "oneOf"];

/// Why two schemas cannot be put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clash {
    /// No value is allowed by both.
    Nothing,
    /// It is not known how.
    Unknown,
    /// It would take too long, or too much.
    TooMuch,
}

type Merged = Result<Map<String, Value>, Clash>;

/// The same document, with all put together that can be.
#[must_use]
pub fn put_together(document: &Value) -> Cow<'_, Value> {
    let size = size(document);
    if size > MOST || refers_elsewhere(document) {
        return Cow::Borrowed(document);
    }
    let mut whole = document.clone();
    let mut together = Together { document, left: (FEW + FOR_EACH * size).min(MOST) };
    match together.walk(&mut whole, 0) {
        Ok(()) => Cow::Owned(whole),
        Err(_) => Cow::Borrowed(document),
    }
}

/// Values in a value, itself included.
fn size(value: &Value) -> usize {
    match value {
        Value::Array(all) => 1 + all.iter().map(size).sum::<usize>(),
        Value::Object(all) => size_of_fields(all),
        _ => 1,
    }
}

fn size_of_fields(fields: &Map<String, Value>) -> usize {
    1 + fields.values().map(size).sum::<usize>()
}

/// Whether something is referred to that may be elsewhere then: what is not a definition.
fn refers_elsewhere(document: &Value) -> bool {
    let is_definition = |reference: &str| {
        let name = ["#/$defs/", "#/definitions/"].iter().find_map(|place| reference.strip_prefix(place));
        reference == "#" || name.is_some_and(|name| !name.contains('/'))
    };
    let refers = |schema: &Value| schema.get("$ref").and_then(Value::as_str).is_some_and(|one| !is_definition(one));
    visit(document, refers).is_some()
}

struct Together<'a> {
    document: &'a Value,
    /// What may still be copied or compared.
    left: usize,
}

impl Together<'_> {
    fn spend(&mut self, values: usize) -> Result<(), Clash> {
        self.left = self.left.checked_sub(values).ok_or(Clash::TooMuch)?;
        Ok(())
    }

    /// Puts together what a schema holds, from the outside in.
    fn walk(&mut self, schema: &mut Value, depth: usize) -> Result<(), Clash> {
        let Value::Object(fields) = schema else { return Ok(()) };
        self.spend(fields.len() + 1)?;
        if depth > DEEPEST_SCHEMA {
            return Err(Clash::TooMuch);
        }
        match self.simple(fields) {
            Ok(Some(simple)) => *fields = simple,
            Err(Clash::TooMuch) => return Err(Clash::TooMuch),
            Ok(None) | Err(_) => {}
        }
        for part in parts_mut(fields) {
            self.walk(part, depth + 1)?;
        }
        for name in ["$defs", "definitions"] {
            let definitions = fields.get_mut(name).and_then(Value::as_object_mut);
            for definition in definitions.into_iter().flat_map(Map::values_mut) {
                self.walk(definition, depth + 1)?;
            }
        }
        Ok(())
    }

    /// One schema, without what llama.cpp would not read of it; nothing if there is no such thing.
    fn simple(&mut self, fields: &Map<String, Value>) -> Result<Option<Map<String, Value>>, Clash> {
        let says_more = |fields: &Map<String, Value>| fields.keys().filter(|key| !describes(key)).count() > 1;
        let mut simple = None;
        if fields.contains_key("allOf") || (fields.contains_key("$ref") && says_more(fields)) {
            simple = Some(self.flat(fields, 0)?);
        }
        for keyword in ["anyOf", "oneOf"] {
            let fields = simple.as_ref().unwrap_or(fields);
            if fields.contains_key(keyword) && says_more(fields) {
                simple = Some(self.distributed(fields, keyword)?);
            }
        }
        let with_required = self.named(simple.as_ref().unwrap_or(fields))?;
        Ok(with_required.or(simple))
    }

    /// What `allOf` and `$ref` say, in one schema.
    fn flat(&mut self, fields: &Map<String, Value>, depth: usize) -> Merged {
        if depth > DEEPEST {
            return Err(Clash::Unknown);
        }
        self.spend(size_of_fields(fields))?;
        let mut whole = fields.clone();
        let parts = whole.remove("allOf").map(|all| all.as_array().cloned().ok_or(Clash::Unknown)).transpose()?;
        let reference = whole.remove("$ref").map(|reference| {
            let target = reference.as_str().and_then(|reference| target(self.document, reference));
            target.ok_or(Clash::Unknown)
        });
        let referred = reference.transpose()?;
        self.spend(referred.map_or(0, size))?;
        for part in referred.cloned().into_iter().chain(parts.into_iter().flatten()) {
            whole = match part {
                Value::Bool(true) => whole,
                Value::Bool(false) => return Err(Clash::Nothing),
                Value::Object(part) => {
                    let part = self.flat(&part, depth + 1)?;
                    self.both(whole, part)?
                }
                _ => return Err(Clash::Unknown),
            };
        }
        Ok(whole)
    }

    /// Options, with what stands beside them in each; those that then allow nothing are left out.
    fn distributed(&mut self, fields: &Map<String, Value>, keyword: &str) -> Merged {
        self.spend(size_of_fields(fields))?;
        let (mut whole, mut beside) = (Map::new(), Map::new());
        for (key, value) in fields.iter().filter(|(key, _)| *key != keyword) {
            let into = if describes(key) { &mut whole } else { &mut beside };
            into.insert(key.clone(), value.clone());
        }
        let each = size_of_fields(&beside);
        let mut written: Vec<Value> = Vec::new();
        for option in fields.get(keyword).and_then(Value::as_array).ok_or(Clash::Unknown)? {
            self.spend(each)?;
            let option = match option {
                Value::Bool(true) => Ok(Map::new()),
                Value::Bool(false) => Err(Clash::Nothing),
                Value::Object(option) => self.flat(option, 0),
                _ => Err(Clash::Unknown),
            };
            let is_plain = |option: &Map<String, Value>| !IN_PLACE.iter().any(|keyword| option.contains_key(*keyword));
            let option = match option {
                Ok(option) if is_plain(&option) => self.both(beside.clone(), option),
                Ok(_) => Err(Clash::Unknown),
                Err(clash) => Err(clash),
            };
            match option {
                Ok(option) => written.push(option.into()),
                Err(Clash::Nothing) => {}
                Err(clash) => return Err(clash),
            }
        }
        if written.is_empty() {
            return Err(Clash::Nothing);
        }
        whole.insert(keyword.to_owned(), written.into());
        Ok(whole)
    }

    /// With a schema for each property that must be there; nothing if all have one.
    fn named(&mut self, fields: &Map<String, Value>) -> Result<Option<Map<String, Value>>, Clash> {
        let Some(required) = fields.get("required").and_then(Value::as_array) else { return Ok(None) };
        let none = Map::new();
        let properties = match fields.get("properties") {
            Some(properties) => properties.as_object().ok_or(Clash::Unknown)?,
            None => &none,
        };
        let is_object = fields.get("type").map_or(!properties.is_empty(), |kind| kind == "object");
        let is_missing = |name: &&str| !properties.contains_key(*name);
        let missing: Vec<_> = required.iter().filter_map(Value::as_str).filter(is_missing).collect();
        if missing.is_empty() || !is_object || IN_PLACE.iter().any(|keyword| fields.contains_key(*keyword)) {
            return Ok(None);
        }
        let any = match fields.get("additionalProperties") {
            None | Some(Value::Bool(true)) => json!({}),
            Some(any @ Value::Object(_)) if !fields.contains_key("patternProperties") => any.clone(),
            Some(_) => return Err(Clash::Unknown),
        };
        self.spend(size_of_fields(fields) + missing.len() * size(&any))?;
        let mut whole = fields.clone();
        let added = missing.into_iter().map(|name| (name.to_owned(), any.clone()));
        let all: Map<_, _> = properties.clone().into_iter().chain(added).collect();
        whole.insert("properties".into(), all.into());
        Ok(Some(whole))
    }

    /// What two schemas both allow.
    fn both(&mut self, mut one: Map<String, Value>, mut other: Map<String, Value>) -> Merged {
        self.spend(one.len() + other.len())?;
        if depends_on_its_place(&one, &other) || depends_on_its_place(&other, &one) {
            return Err(Clash::Unknown);
        }
        close(&mut one, &other)?;
        close(&mut other, &one)?;
        for (keyword, value) in other {
            match one.get_mut(&keyword) {
                None => drop(one.insert(keyword, value)),
                Some(_) if describes(&keyword) => {}
                Some(known) if *known == value => {}
                Some(known) => *known = self.of_both(&keyword, known, value)?,
            }
        }
        let properties = one.get("properties").and_then(Value::as_object);
        let is_missing = |name: &Value| {
            let has = properties.is_some_and(|all| name.as_str().is_some_and(|name| all.contains_key(name)));
            one.get("additionalProperties") == Some(&Value::Bool(false)) && !has
        };
        let required = one.get("required").and_then(Value::as_array);
        if required.is_some_and(|names| names.iter().any(is_missing)) { Err(Clash::Nothing) } else { Ok(one) }
    }

    /// What two values of a keyword both allow.
    fn of_both(&mut self, keyword: &str, one: &Value, other: Value) -> Result<Value, Clash> {
        self.spend(size(one) + size(&other))?;
        let numbers = one.as_f64().zip(other.as_f64()).ok_or(Clash::Unknown);
        match keyword {
            "type" => common_types(one, &other),
            "minimum" | "exclusiveMinimum" | "minLength" | "minItems" | "minProperties" => {
                let (a, b) = numbers?;
                Ok(if a >= b { one.clone() } else { other })
            }
            "maximum" | "exclusiveMaximum" | "maxLength" | "maxItems" | "maxProperties" => {
                let (a, b) = numbers?;
                Ok(if a <= b { one.clone() } else { other })
            }
            "required" => {
                let (one, other) = self.lists(one, other)?;
                let more: Vec<_> = other.into_iter().filter(|name| !one.contains(name)).collect();
                Ok(one.iter().cloned().chain(more).collect())
            }
            "enum" => {
                let (one, other) = self.lists(one, other)?;
                let common: Vec<_> = one.iter().filter(|value| other.contains(value)).cloned().collect();
                if common.is_empty() { Err(Clash::Nothing) } else { Ok(common.into()) }
            }
            "const" => Err(Clash::Nothing),
            "properties" => {
                let (Value::Object(one), Value::Object(other)) = (one, other) else { return Err(Clash::Unknown) };
                let mut all = one.clone();
                for (name, schema) in other {
                    match all.get_mut(&name) {
                        Some(known) => *known = self.of_one_value(known.take(), schema)?,
                        None => drop(all.insert(name, schema)),
                    }
                }
                Ok(all.into())
            }
            "items" => self.of_one_value(one.clone(), other),
            "additionalProperties" => match (one, other) {
                (Value::Bool(true), value) => Ok(value),
                (value, Value::Bool(true)) => Ok(value.clone()),
                (Value::Bool(false), _) | (_, Value::Bool(false)) => Ok(false.into()),
                (one, other) => self.of_one_value(one.clone(), other),
            },
            "uniqueItems" => Ok(true.into()),
            _ => Err(Clash::Unknown),
        }
    }

    /// Two lists that are compared value by value.
    fn lists<'b>(&mut self, one: &'b Value, other: Value) -> Result<(&'b [Value], Vec<Value>), Clash> {
        let (Value::Array(one), Value::Array(other)) = (one, other) else { return Err(Clash::Unknown) };
        self.spend(one.len().saturating_mul(other.len()))?;
        Ok((one, other))
    }

    /// What two schemas of the same value both allow.
    fn of_one_value(&mut self, one: Value, other: Value) -> Result<Value, Clash> {
        match (one, other) {
            (Value::Bool(true), schema) | (schema, Value::Bool(true)) => Ok(schema),
            (one, other) if one == other => Ok(one),
            (Value::Object(one), Value::Object(other)) => {
                let is_plain =
                    |schema: &Map<String, Value>| !IN_PLACE.iter().any(|keyword| schema.contains_key(*keyword));
                if is_plain(&one) && is_plain(&other) {
                    // That a property allows nothing does not mean that its object does.
                    let both = self.both(one, other);
                    both.map(Value::from).map_err(|clash| if clash == Clash::Nothing { Clash::Unknown } else { clash })
                } else {
                    // They are put together in their turn.
                    Ok(json!({ "allOf": [one, other] }))
                }
            }
            _ => Err(Clash::Unknown),
        }
    }
}

/// Whether a schema has something that speaks of what stands beside it, and another one would change that.
fn depends_on_its_place(one: &Map<String, Value>, other: &Map<String, Value>) -> bool {
    let is_row = one.contains_key("prefixItems") || one.get("items").is_some_and(Value::is_array);
    let is_about_items = ["items", "prefixItems", "additionalItems"].iter().any(|keyword| other.contains_key(*keyword));
    let is_about_all = one.keys().any(|keyword| {
        [
            "unevaluatedProperties",
            "unevaluatedItems",
            "patternProperties",
            "if",
            "then",
            "else",
            "contains",
            "minContains",
        ]
        .contains(&keyword.as_str())
    });
    (is_row && is_about_items) || (is_about_all && other.keys().any(|keyword| !describes(keyword)))
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
            json!({ "type": "array", "allOf": [{ "prefixItems": [{ "type": "integer" }] }, { "items": false }] }),
            json!({ "allOf": [{ "properties": { "a": {} }, "unevaluatedProperties": false }, { "properties": { "b": {} } }] }),
            // It is referred to by its place, which would be another one.
            json!({ "type": "object", "properties": { "x": { "type": "string" }, "y": { "$ref": "#/properties/x" } }, "anyOf": [{ "required": ["x"] }, { "required": ["y"] }] }),
            json!({ "allOf": [{ "properties": { "a": { "type": "string" } } }], "properties": { "b": { "$ref": "#/allOf/0/properties/a" } } }),
            json!({ "type": "string", "title": "t" }),
        ] {
            assert_eq!(*put_together(&schema), schema);
        }
    }

    /// What is hostile takes no longer than what is not.
    #[test]
    fn a_document_that_would_grow_without_end_stays_as_it_is() {
        let next = |n: usize| json!({ "$ref": format!("#/$defs/{}", n + 1) });
        let wide: Map<_, _> = (0..9).map(|n| (n.to_string(), json!({ "allOf": vec![next(n); 200] }))).collect();
        let itself = json!({ "type": "object", "properties": { "x": { "$ref": "#/$defs/a", "minProperties": 1 } } });
        let mut deep = json!({ "$defs": { "a": itself }, "$ref": "#/$defs/a", "minProperties": 1 });
        (0..50_000).for_each(|n| deep[format!("p{n}")] = 0.into());
        let properties: Map<_, _> = (0..5_000).map(|n| (n.to_string(), json!({}))).collect();
        // The same reference, spelled in many ways.
        let letter =
            |letter: char, n: usize| if n == 0 { letter.to_string() } else { format!("%{:02x}", u32::from(letter)) };
        let spelling = |n: usize| "$defs".chars().enumerate().map(|(at, c)| letter(c, n >> at & 1)).collect::<String>();
        let spelled: Vec<_> =
            (0..32).cycle().take(20_000).map(|n| json!({ "$ref": format!("#/{}/big", spelling(n)) })).collect();
        for schema in [
            deep,
            json!({ "$defs": wide, "allOf": [{ "$ref": "#/$defs/0" }, {}] }),
            json!({ "properties": properties, "anyOf": vec![json!({}); 20_000] }),
            json!({ "$defs": { "big": { "properties": properties } }, "anyOf": spelled }),
        ] {
            assert_eq!(*put_together(&schema), schema);
        }
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
