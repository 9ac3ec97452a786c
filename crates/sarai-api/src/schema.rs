//! What of a JSON schema llama.cpp's grammars do not follow: an answer has the form, and may still break these.

use std::collections::{BTreeSet, HashSet};

use sarai_core::schema::{
    MOST_ITEMS, MOST_REPEATED, meant, multiples, number_rule, of_format, only_part, plain_pattern, put_together, visit,
};
use serde_json::{Map, Value};

/// Keywords that are never followed.
const NEVER: [&str; 18] = [
    "$dynamicRef",
    "$recursiveRef",
    "multipleOf",
    "not",
    "if",
    "patternProperties",
    "propertyNames",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "contains",
    "minContains",
    "maxContains",
    "minProperties",
    "maxProperties",
    "unevaluatedProperties",
    "unevaluatedItems",
    "additionalItems",
];
/// Types that there are.
const TYPES: [&str; 7] = ["string", "integer", "number", "boolean", "null", "array", "object"];
/// Bounds of numbers: followed where a rule can be made.
const BOUNDS: [&str; 4] = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"];
/// What a keyword that decides alone leaves unread beside it.
const CONSTRAINTS: [&str; 17] = [
    "type",
    "enum",
    "const",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "prefixItems",
    "minItems",
    "maxItems",
    "pattern",
    "minLength",
    "maxLength",
    "anyOf",
    "oneOf",
    "allOf",
    "$ref",
];
/// Forms of texts that it has right rules for; others have a pattern of ours, or none.
const FORMATS: [&str; 7] = ["time", "uuid", "uuid1", "uuid2", "uuid3", "uuid4", "uuid5"];

/// The keywords of a schema that an answer of a local model may break, sorted.
#[must_use]
pub fn not_followed(schema: &str) -> Vec<String> {
    let mut found = BTreeSet::new();
    if let Ok(schema) = serde_json::from_str(schema) {
        look_through(&schema, &mut found);
    }
    found.into_iter().map(|keyword| format!("schema:{keyword}")).collect()
}

/// The same of the arguments of tools that are to be called strictly.
#[must_use]
pub fn not_followed_by_calls(definitions: &str) -> Vec<String> {
    let mut found = BTreeSet::new();
    strict(definitions).iter().for_each(|tool| look_through(&tool["function"]["parameters"], &mut found));
    found.into_iter().map(|keyword| format!("tools:{keyword}")).collect()
}

/// The tools that are to be called strictly: their names, and the schemas of their arguments.
#[must_use]
pub fn strict_arguments(definitions: &str) -> Vec<(String, String)> {
    let named = |tool: &Value| {
        let function = &tool["function"];
        Some((function["name"].as_str()?.to_owned(), function["parameters"].to_string()))
    };
    strict(definitions).iter().filter_map(named).collect()
}

fn strict(definitions: &str) -> Vec<Value> {
    let mut tools: Vec<Value> = serde_json::from_str(definitions).unwrap_or_default();
    tools.retain(|tool| tool["function"]["strict"] == true);
    tools
}

fn look_through(document: &Value, found: &mut BTreeSet<String>) {
    let document = &*put_together(document);
    visit(document, |schema| {
        if let Value::Object(fields) = schema {
            look(document, fields, found);
        }
        false
    });
}

fn look(document: &Value, fields: &Map<String, Value>, found: &mut BTreeSet<String>) {
    if only_part(fields).is_some() {
        // It is that part, which is looked at for itself.
        return;
    }
    let has = |keyword: &str| fields.contains_key(keyword);
    let mut miss = |keyword: &str| {
        if fields.contains_key(keyword) {
            found.insert(keyword.to_owned());
        }
    };
    let (has_rule, has_multiples) =
        (number_rule(fields).is_some(), multiples(fields).is_some() || has_decimals(fields));
    NEVER.iter().filter(|keyword| !(has_multiples && **keyword == "multipleOf")).for_each(|keyword| miss(keyword));
    if fields.get("uniqueItems") == Some(&Value::Bool(true)) {
        miss("uniqueItems");
    }
    if may_be(fields, &["number", "integer"]) && !has_rule && !has_multiples {
        BOUNDS.iter().for_each(|keyword| miss(keyword));
    }
    // Of two bounds on the same side, only one is read.
    for (one, other) in [("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")] {
        if has(one) && has(other) && !has_rule && !has_multiples {
            miss(other);
        }
    }
    if has("pattern") {
        ["minLength", "maxLength", "format"].iter().for_each(|keyword| miss(keyword));
        let plain = fields.get("pattern").and_then(Value::as_str).and_then(plain_pattern);
        if plain.is_none() {
            miss("pattern");
        }
    }
    // Of bounds that exclude each other, one is kept.
    for (least, most) in [("minItems", "maxItems"), ("minLength", "maxLength")] {
        let bounds = fields.get(least).and_then(Value::as_u64).zip(fields.get(most).and_then(Value::as_u64));
        if bounds.is_some_and(|(least, most)| least > most) {
            miss(least);
        }
    }
    for (bound, most) in [("maxLength", MOST_REPEATED), ("maxItems", MOST_ITEMS)] {
        if fields.get(bound).and_then(Value::as_u64).is_some_and(|bound| bound > most) {
            miss(bound);
        }
    }
    let format = fields.get("format").and_then(Value::as_str);
    let is_pattern = format.is_some_and(|format| of_format(format).is_some());
    let is_followed = is_pattern || format.is_some_and(|format| FORMATS.contains(&format));
    // Of anything else it says nothing.
    let is_of_text = may_be(fields, &["string"]);
    if is_followed && !has("pattern") {
        ["minLength", "maxLength"].iter().for_each(|keyword| miss(keyword));
    } else if is_of_text && !format.is_none_or(|format| FORMATS.contains(&format)) {
        miss("format");
    }
    if fields.get("allOf").and_then(Value::as_array).is_some_and(|parts| !are_put_together(document, fields, parts)) {
        miss("allOf");
    }
    if !["type", "items", "prefixItems", "properties", "$ref", "anyOf", "oneOf", "enum", "const"]
        .iter()
        .any(|one| has(one))
    {
        // Without them it may be anything.
        ["minItems", "maxItems"].iter().for_each(|keyword| miss(keyword));
    }
    // The first of these that is there decides, and what stands beside it is not read.
    let alone = ["$ref", "oneOf", "anyOf"].into_iter().find(|keyword| has(keyword)).or_else(|| {
        let decides = |keyword: &&str| has(keyword);
        ["const", "enum"].into_iter().find(decides)
    });
    if let Some(alone) = alone {
        let is_value = ["const", "enum"].contains(&alone);
        let is_of_type = is_value && values_are_of_type(fields, alone);
        let beside = CONSTRAINTS.iter().filter(|keyword| **keyword != alone && !(is_of_type && **keyword == "type"));
        beside.for_each(|keyword| miss(keyword));
        if !is_value {
            BOUNDS.iter().for_each(|keyword| miss(keyword));
        }
    } else {
        if has("properties") || (has("type") && fields.get("type") != Some(&"object".into())) {
            miss("allOf");
        }
        let known = |name: &Value| {
            name.as_str().is_some_and(|name| fields.get("properties").is_some_and(|all| all.get(name).is_some()))
        };
        let parts = fields.get("allOf").and_then(Value::as_array).into_iter().flatten();
        let of_parts = parts.filter_map(|part| meant(document, part)["properties"].as_object());
        let of_parts: HashSet<&String> = of_parts.flat_map(Map::keys).collect();
        let is_of_part = |name: &Value| matches!(name, Value::String(name) if of_parts.contains(name));
        let is_known = |name: &Value| known(name) || is_of_part(name);
        if fields.get("required").and_then(Value::as_array).is_some_and(|names| !names.iter().all(is_known)) {
            miss("required");
        }
        if has("prefixItems") && has("items") && fields["items"] != Value::Bool(false) {
            miss("prefixItems");
        }
        let row = fields.get("prefixItems").or(fields.get("items")).and_then(Value::as_array);
        if let Some(row) = row {
            // All of the row are written, and nothing behind it.
            let count = row.len() as u64;
            let is_kept = |keyword: &str, keeps: fn(u64, u64) -> bool| {
                fields.get(keyword).is_none_or(|bound| bound.as_u64().is_some_and(|bound| keeps(count, bound)))
            };
            if !is_kept("minItems", |count, least| count >= least) {
                found.insert("minItems".to_owned());
            }
            if !is_kept("maxItems", |count, most| count <= most) {
                found.insert("maxItems".to_owned());
            }
        }
    }
    if fields.get("oneOf").and_then(Value::as_array).is_some_and(|options| {
        let options: Vec<_> = options.iter().map(|option| meant(document, option)).collect();
        !exclude_each_other(&options)
    }) {
        found.insert("oneOf".to_owned());
    }
}

/// Whether the parts of `allOf` are objects whose properties are put together, each of them once.
fn are_put_together(document: &Value, fields: &Map<String, Value>, parts: &[Value]) -> bool {
    let mut names = BTreeSet::new();
    let is_open = |schema: Option<&Value>| schema.is_none_or(|additional| *additional == Value::Bool(true));
    is_open(fields.get("additionalProperties"))
        && parts.iter().map(|part| meant(document, part)).all(|part| {
            let is_alone = part.get("allOf").is_none() && is_open(part.get("additionalProperties"));
            let properties = part.get("properties").and_then(Value::as_object);
            is_alone && properties.is_some_and(|all| all.keys().all(|name| names.insert(name)))
        })
}

/// Whether the values that are allowed are all of the type that stands beside them.
fn values_are_of_type(fields: &Map<String, Value>, keyword: &str) -> bool {
    // Each once, however often it is said.
    let kinds: BTreeSet<&str> = match fields.get("type") {
        Some(Value::String(kind)) => BTreeSet::from([kind.as_str()]),
        Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).collect(),
        _ => return false,
    };
    let kinds: Vec<&str> = TYPES.into_iter().filter(|kind| kinds.contains(kind)).collect();
    let is = |value: &Value, kind: &str| match kind {
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    };
    let is_of = |value: &Value| kinds.iter().any(|kind| is(value, kind));
    match (keyword, fields.get(keyword)) {
        ("enum", Some(Value::Array(values))) => values.iter().all(is_of),
        (_, Some(value)) => is_of(value),
        _ => false,
    }
}

/// Whether it is to be a number with so many decimals, and a rule says so.
fn has_decimals(fields: &Map<String, Value>) -> bool {
    let said = ["type", "multipleOf"].into_iter();
    let alone = said.filter_map(|keyword| Some((keyword.to_owned(), fields.get(keyword)?.clone()))).collect();
    number_rule(&alone).is_some() && number_rule(fields).is_some()
}

/// Whether it may be of one of these types.
fn may_be(fields: &Map<String, Value>, types: &[&str]) -> bool {
    let is_it = |kind: &Value| kind.as_str().is_some_and(|kind| types.contains(&kind));
    match fields.get("type") {
        Some(Value::Array(kinds)) => kinds.iter().any(is_it),
        Some(kind) => is_it(kind),
        None => true,
    }
}

/// Whether no value can be of two of these: they are of different types, or differ in a constant property that all must have.
fn exclude_each_other(options: &[&Value]) -> bool {
    let distinct = |values: Vec<&Value>| {
        let mut seen = BTreeSet::new();
        values.len() == options.len() && values.into_iter().all(|value| seen.insert(value.to_string()))
    };
    let types = options.iter().filter_map(|option| option.get("type").filter(|kind| kind.is_string()));
    let are_whole = |kind: &Value| options.iter().any(|option| option["type"] == *kind);
    if distinct(types.collect()) && !(are_whole(&"integer".into()) && are_whole(&"number".into())) {
        return true;
    }
    if distinct(options.iter().filter_map(|option| option.get("const")).collect()) {
        return true;
    }
    let required = |option: &'_ &Value| -> BTreeSet<String> {
        let names = option["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
        names.filter(|name| option["properties"][*name].get("const").is_some()).map(str::to_owned).collect()
    };
    let mut tags = options.iter().map(required);
    let first = tags.next().unwrap_or_default();
    let tags = tags.fold(first, |of_all, tags| of_all.intersection(&tags).cloned().collect());
    let of = |name: &str| options.iter().map(|option| &option["properties"][name]["const"]).collect();
    tags.iter().any(|name| distinct(of(name)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn missed(schema: Value) -> Vec<String> {
        not_followed(&schema.to_string())
    }

    #[test]
    fn what_grammars_follow_is_not_told() {
        for schema in [
            json!({ "type": "object", "properties": { "n": { "type": "integer", "minimum": 1, "exclusiveMaximum": 9 } }, "required": ["n"] }),
            json!({ "type": "array", "items": { "enum": ["a", 1, null] }, "minItems": 1, "maxItems": 3 }),
            json!({ "$defs": { "x": { "type": "string", "maxLength": 3 } }, "$ref": "#/$defs/x" }),
            json!({ "oneOf": [{ "type": "string" }, { "type": "integer" }] }),
            json!({ "oneOf": [
                { "type": "object", "properties": { "kind": { "const": "a" } }, "required": ["kind"] },
                { "type": "object", "properties": { "kind": { "const": "b" } }, "required": ["kind"] },
            ] }),
            json!({ "type": "string", "pattern": "^[a-z]+$", "title": "t", "description": "d" }),
            json!({ "type": "string", "pattern": "\\d{5}" }),
            json!({ "type": "number", "minimum": 0, "exclusiveMinimum": 0, "maximum": 1 }),
            json!({ "type": "integer", "minimum": 0, "exclusiveMinimum": 0, "multipleOf": 5 }),
            json!({ "type": ["number", "null"], "minimum": 0, "multipleOf": 0.01 }),
            json!({ "type": "number", "multipleOf": 2.5 }),
            json!({ "type": "array", "prefixItems": [{}, {}], "minItems": 2, "maxItems": 2 }),
            json!({ "allOf": [{ "type": "integer" }, { "minimum": 5 }] }),
            json!({ "allOf": [{ "properties": { "a": {} }, "additionalProperties": false }, { "properties": { "b": {} } }] }),
            json!({ "type": "object", "properties": { "a": {} }, "required": ["a", "b"] }),
            json!({ "type": "object", "properties": { "a": {} }, "anyOf": [{ "required": ["a"] }, { "required": ["b"] }] }),
            json!({ "anyOf": [{ "type": "string" }], "enum": ["a"] }),
            // Nothing refers to it.
            json!({ "$defs": { "x": { "type": "array", "uniqueItems": true } }, "type": "string" }),
            json!({ "type": "object", "properties": { "next": { "$ref": "#" } } }),
            json!({ "type": "integer", "minimum": -9_007_199_254_740_991_i64, "maximum": 9_007_199_254_740_991_i64 }),
            json!({ "type": ["string", "null"], "enum": ["a", null] }),
            json!({ "$defs": { "x": { "type": "string" } }, "allOf": [{ "$ref": "#/$defs/x" }], "description": "d" }),
            json!({ "allOf": [{ "properties": { "a": {} } }, { "properties": { "b": {} } }], "required": ["a", "b"] }),
            json!({
                "$defs": {
                    "a": { "type": "object", "properties": { "kind": { "const": "a" } }, "required": ["kind"] },
                    "b": { "type": "object", "properties": { "kind": { "const": "b" } }, "required": ["kind"] },
                },
                "oneOf": [{ "$ref": "#/$defs/a" }, { "$ref": "#/$defs/b" }],
            }),
        ] {
            assert!(missed(schema.clone()).is_empty(), "{schema}: {:?}", missed(schema.clone()));
        }
    }

    #[test]
    fn what_they_do_not_follow_is_told_wherever_it_stands() {
        for (schema, wanted) in [
            (json!({ "type": "number", "minimum": 1e12 }), "schema:minimum"),
            (json!({ "minimum": 1 }), "schema:minimum"),
            (
                json!({ "type": "object", "properties": { "a": { "type": "array", "items": { "type": "number", "multipleOf": 0.0000003 } } } }),
                "schema:multipleOf",
            ),
            (
                json!({ "$defs": { "x": { "type": "array", "uniqueItems": true } }, "$ref": "#/$defs/x" }),
                "schema:uniqueItems",
            ),
            (
                json!({ "type": "object", "properties": {}, "required": ["x"], "additionalProperties": false }),
                "schema:required",
            ),
            (json!({ "type": "string", "pattern": "^a*$", "maxLength": 3 }), "schema:maxLength"),
            (json!({ "anyOf": [{ "pattern": "a" }], "pattern": "b" }), "schema:pattern"),
            (json!({ "oneOf": [{ "type": "integer" }, { "type": "number" }] }), "schema:oneOf"),
            (json!({ "type": "string", "pattern": "^\\bx$" }), "schema:pattern"),
            (json!({ "type": "string", "format": "isbn" }), "schema:format"),
            (json!({ "type": "string", "format": "uri", "maxLength": 9 }), "schema:maxLength"),
            (json!({ "type": "string", "maxLength": 5000 }), "schema:maxLength"),
            (json!({ "allOf": [{ "$ref": "#/$defs/x" }, {}] }), "schema:allOf"),
            (json!({ "allOf": [{ "pattern": "a" }, { "pattern": "b" }] }), "schema:allOf"),
            (json!({ "type": "string", "format": "uuid", "maxLength": 8 }), "schema:maxLength"),
            (json!({ "$dynamicRef": "#n" }), "schema:$dynamicRef"),
            (json!({ "type": "array", "prefixItems": [{}, {}], "minItems": 3, "maxItems": 4 }), "schema:minItems"),
            (json!({ "minItems": 1 }), "schema:minItems"),
            (json!({ "type": "string", "enum": ["a", 1] }), "schema:type"),
            (json!({ "type": "string", "not": { "const": "a" } }), "schema:not"),
            (
                json!({ "parts": { "x": { "type": "array", "uniqueItems": true } }, "$ref": "#/parts/x" }),
                "schema:uniqueItems",
            ),
        ] {
            assert_eq!(missed(schema.clone()), [wanted], "{schema}");
        }
    }

    #[test]
    fn a_format_says_nothing_of_what_is_no_text() {
        assert!(missed(json!({ "type": "integer", "format": "int64" })).is_empty());
        assert_eq!(missed(json!({ "type": ["integer", "string"], "format": "int64" })), ["schema:format"]);
    }

    #[test]
    fn of_bounds_that_exclude_each_other_one_is_told() {
        let items = json!({ "type": "array", "items": { "type": "null" }, "minItems": 3, "maxItems": 1 });
        assert_eq!(missed(json!({ "anyOf": [items, { "type": "null" }] })), ["schema:minItems"]);
        assert_eq!(missed(json!({ "type": "string", "minLength": 2, "maxLength": 1 })), ["schema:minLength"]);
        assert!(missed(json!({ "type": "string", "minLength": 1, "maxLength": 1 })).is_empty());
    }

    /// The server itself reads these, and does nothing else meanwhile.
    #[test]
    fn what_is_large_in_one_way_or_another_is_read_once() {
        let many: Vec<String> = (0..100_000).map(|n| n.to_string()).collect();
        let numbers: Vec<usize> = (0..100_000).collect();
        let kinds: Vec<_> = (0..100_000).map(|_| "x").chain(["number"]).collect();
        assert!(missed(json!({ "type": kinds, "enum": numbers })).is_empty());
        let inner: Map<String, Value> = many.iter().map(|name| (name.clone(), json!({}))).collect();
        let long = "n".repeat(500_000);
        assert!(missed(json!({ "properties": { &long: { "properties": inner } } })).is_empty(), "50 GB of places");
        let mut parts = vec![json!({}); 20_000];
        parts.push(json!({ "properties": { "z": {} } }));
        let names = vec!["z"; 20_000];
        missed(json!({ "allOf": parts, "required": names, "not": {} }));
        let tagged: Map<String, Value> =
            many.iter().take(20_000).map(|name| (name.clone(), json!({ "const": 1 }))).collect();
        let option = json!({ "properties": tagged, "required": many[..20_000] });
        missed(json!({ "oneOf": [option, option] }));
    }

    #[test]
    fn what_calls_may_break_is_told_of_strict_tools() {
        let tool = |strict: bool| {
            json!({ "type": "function", "function": { "name": "f", "strict": strict,
                "parameters": { "type": "object", "properties": { "x": { "type": "array", "uniqueItems": true } } } } })
        };
        let missed = |tools: Value| not_followed_by_calls(&tools.to_string());
        assert_eq!(missed(json!([tool(false), tool(true)])), ["tools:uniqueItems"]);
        assert!(missed(json!([tool(false)])).is_empty());
        let arguments = strict_arguments(&json!([tool(false), tool(true)]).to_string());
        assert_eq!(arguments, [("f".to_owned(), tool(true)["function"]["parameters"].to_string())]);
    }
}
