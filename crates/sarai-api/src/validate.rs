//! Whether an answer is what a JSON schema allows, by a validator: of what grammars do not follow, only that tells.
//!
//! A schema may keep it busy without end, or take its stack: where it comes from a client, a process apart does this.

use std::collections::BTreeSet;

use jsonschema::error::ValidationErrorKind;
use jsonschema::{Draft, PatternOptions, ValidationOptions, Validator};
use sarai_core::schema::visit;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Of a text, that a schema allows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The schema.
    pub schema: String,
    /// The text.
    pub text: String,
}

/// What is true of a claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It holds.
    Valid,
    /// The text breaks the schema: where, and how.
    Broken(String),
    /// The schema cannot be read: why.
    Unreadable(String),
}

/// Steps back that a pattern may take in a text.
const MOST_BACKTRACKING: usize = 100_000;

/// Whether a claim holds.
#[must_use]
pub fn verdict(claim: &Claim) -> Verdict {
    let schema = match serde_json::from_str(&claim.schema) {
        Ok(schema) => schema,
        Err(error) => return Verdict::Unreadable(error.to_string()),
    };
    let validator = match validator(&schema) {
        Ok(validator) => validator,
        Err(why) => return Verdict::Unreadable(why),
    };
    if let Some(format) = unknown_to(validator.draft(), &schema) {
        return Verdict::Unreadable(format!("its draft does not know the format `{format}`"));
    }
    let value: Value = match serde_json::from_str(&claim.text) {
        Ok(value) => value,
        Err(error) => return Verdict::Broken(format!("it is no JSON: {error}")),
    };
    match validator.validate(&value) {
        Ok(()) => Verdict::Valid,
        // It has not come to its end.
        Err(error) if matches!(error.kind(), ValidationErrorKind::BacktrackLimitExceeded { .. }) => {
            Verdict::Unreadable(error.masked().to_string())
        }
        Err(error) => Verdict::Broken(match error.instance_path().as_str() {
            "" => error.masked().to_string(),
            place => format!("`{place}`: {}", error.masked()),
        }),
    }
}

/// By the draft that the schema names; without a name, by the latest one that it is valid in.
fn validator(schema: &Value) -> Result<Validator, String> {
    let options = || options().should_validate_formats(true);
    let latest = options().build(schema).map_err(|error| error.to_string());
    if latest.is_ok() || schema.get("$schema").is_some() {
        return latest;
    }
    let older =
        [Draft::Draft7, Draft::Draft4].into_iter().find_map(|draft| options().with_draft(draft).build(schema).ok());
    older.map_or(latest, Ok)
}

fn options() -> ValidationOptions<'static> {
    let patterns = PatternOptions::fancy_regex().backtrack_limit(MOST_BACKTRACKING);
    jsonschema::options().offline().with_pattern_options(patterns)
}

/// A format that only other drafts than the schema's know.
fn unknown_to(draft: Draft, schema: &Value) -> Option<String> {
    let (mut found, known) = (None, options());
    let is_unknown =
        |format: &str| known.is_known_format(Draft::Draft202012, format) && !known.is_known_format(draft, format);
    visit(schema, |part| {
        found = part.get("format").and_then(Value::as_str).filter(|format| is_unknown(format)).map(str::to_owned);
        found.is_some()
    });
    found
}

/// The formats of a schema that the validator does not know.
#[must_use]
pub fn unknown_formats(schema: &str) -> BTreeSet<String> {
    let (mut found, known) = (BTreeSet::new(), options());
    if let Ok(schema) = serde_json::from_str::<Value>(schema) {
        visit(&schema, |part| {
            if let Some(format) = part.get("format").and_then(Value::as_str)
                && !known.is_known_format(Draft::Draft202012, format)
            {
                found.insert(format.to_owned());
            }
            false
        });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sarai_core::schema::put_together;
    use serde_json::json;

    #[test]
    fn a_check_that_does_not_come_to_its_end_says_nothing_of_the_answer() {
        let claim =
            |schema: Value, text: &Value| verdict(&Claim { schema: schema.to_string(), text: text.to_string() });
        let steps_back = json!({ "type": "string", "pattern": "^(?!(a|aa)+\\1c)" });
        assert!(matches!(claim(steps_back, &"a".repeat(40).into()), Verdict::Unreadable(_)));
        let draft = |draft: &str| json!({ "$schema": draft, "type": "string", "format": "uuid" });
        let dashes = Value::from("-".repeat(36));
        let latest = "https://json-schema.org/draft/2020-12/schema";
        assert!(matches!(claim(draft(latest), &dashes), Verdict::Broken(_)));
        let older = claim(draft("http://json-schema.org/draft-07/schema#"), &dashes);
        assert!(matches!(older, Verdict::Unreadable(_)), "it does not know that format: {older:?}");
    }

    /// Schemas in which things stand beside each other.
    fn schemas() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(json!({})),
            Just(json!({ "$ref": "#/$defs/x" })),
            Just(json!({ "$ref": "#/$defs/y", "minimum": 2 })),
            (-2_i32..5).prop_map(|n| json!({ "minimum": n })),
            (-2_i32..5).prop_map(|n| json!({ "type": "integer", "maximum": n })),
            (0_u32..4).prop_map(|n| json!({ "type": ["string", "null"], "minLength": n })),
            Just(json!({ "enum": [1, 2, "a", null] })),
            Just(json!({ "const": 2 })),
            Just(json!({ "required": ["a"] })),
            Just(json!({ "type": "object", "required": ["b"], "additionalProperties": { "type": "integer" } })),
            Just(json!({ "prefixItems": [{ "type": "integer" }] })),
            Just(json!({ "items": false })),
            Just(json!({ "items": { "minimum": 1 } })),
            Just(json!({ "unevaluatedProperties": false })),
            Just(json!({ "patternProperties": { "^a": { "minimum": 2 } } })),
            Just(json!({ "not": { "const": 2 } })),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            let closed = prop_oneof![Just(json!(true)), Just(json!(false)), inner.clone()];
            let object = (inner.clone(), inner.clone(), closed).prop_map(
                |(a, b, more)| json!({ "type": "object", "properties": { "a": a, "b": b }, "additionalProperties": more }),
            );
            let list = prop::sample::select(vec!["allOf", "anyOf", "oneOf"]);
            let several = (list, prop::collection::vec(inner.clone(), 1..4)).prop_map(|(list, all)| json!({ list: all }));
            let beside = (inner.clone(), inner).prop_map(|(one, other)| {
                let (mut one, other) = (one, other);
                for (key, value) in other.as_object().into_iter().flatten() {
                    one[key] = value.clone();
                }
                one
            });
            prop_oneof![object, several, beside]
        })
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf =
            prop_oneof![Just(Value::Null), (-2_i32..6).prop_map(Value::from), "[ab]{0,3}".prop_map(Value::from),];
        leaf.prop_recursive(2, 8, 3, |inner| {
            let fields = prop::collection::btree_map("[abc]", inner.clone(), 0..3);
            prop_oneof![
                fields.prop_map(|fields| fields.into_iter().collect::<serde_json::Map<_, _>>().into()),
                prop::collection::vec(inner, 0..3).prop_map(Value::from),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn what_is_put_together_allows_nothing_that_was_forbidden(
            schema in schemas(), values in prop::collection::vec(values(), 24),
        ) {
            let mut schema = schema;
            schema["$defs"] = json!({ "x": { "type": "string", "maxLength": 2 }, "y": { "type": ["integer", "null"] } });
            let together = put_together(&schema);
            let (Ok(original), Ok(together)) = (validator(&schema), validator(&together)) else { return Ok(()) };
            for value in values.iter().filter(|value| together.is_valid(value)) {
                prop_assert!(original.is_valid(value), "{value} is allowed by {}", put_together(&schema));
            }
        }
    }

    fn of(schema: &Value, text: &str) -> Verdict {
        verdict(&Claim { schema: schema.to_string(), text: text.to_owned() })
    }

    #[test]
    fn what_grammars_do_not_follow_is_told_with_its_place() {
        for (schema, good, bad, place) in [
            (json!({ "properties": { "a": { "uniqueItems": true } } }), r#"{"a":[1,2]}"#, r#"{"a":[1,1]}"#, "`/a`"),
            (json!({ "not": { "const": "x" } }), r#""y""#, r#""x""#, ""),
            (json!({ "if": { "type": "integer" }, "then": { "minimum": 5 } }), "7", "3", ""),
            (json!({ "oneOf": [{ "minimum": 1 }, { "maximum": 5 }] }), "7", "3", ""),
            (json!({ "multipleOf": 0.5 }), "1.5", "1.2", ""),
            (json!({ "type": "string", "pattern": "^(?!x)" }), r#""ya""#, r#""xa""#, ""),
            (json!({ "type": "string", "format": "email" }), r#""a@b.example""#, r#""ab""#, ""),
            // Draft 7.
            (json!({ "items": [{ "type": "integer" }], "additionalItems": false }), "[1]", "[1, 2]", ""),
            // Draft 4.
            (json!({ "minimum": 3, "exclusiveMinimum": true }), "4", "3", ""),
        ] {
            assert_eq!(of(&schema, good), Verdict::Valid, "{schema}");
            assert!(matches!(of(&schema, bad), Verdict::Broken(why) if why.starts_with(place)), "{schema}");
            assert!(matches!(of(&schema, "[1"), Verdict::Broken(why) if why.starts_with("it is no JSON")), "{schema}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_told_apart_from_what_is_broken() {
        for schema in [json!({ "type": "text" }), json!({ "pattern": "(" }), json!({ "$ref": "http://127.0.0.1:1/x" })]
        {
            assert!(matches!(of(&schema, "1"), Verdict::Unreadable(_)), "{schema}: {:?}", of(&schema, "1"));
        }
    }

    #[test]
    fn formats_that_nobody_knows_are_named() {
        let schema = json!({ "properties": { "a": { "format": "uri" }, "b": { "items": { "format": "isbn" } } } });
        assert_eq!(unknown_formats(&schema.to_string()), ["isbn".to_owned()].into());
    }
}
