//! The grammar of a JSON schema: llama.cpp's own, with what it knows no rules for written in other words, or put in afterwards.

use llama_cpp_4::chat::json_schema_to_grammar;
use sarai_core::schema::{multiples, number_rule, plain_pattern};
use serde_json::{Map, Value, json};

/// Deeper than any schema is meant to be.
const DEEPEST: usize = 64;
/// Stands for a number in a grammar, until its rule takes its place. No schema's own constant begins so.
const MARK: &str = "\u{1}number";

/// The grammar of a schema.
///
/// # Errors
/// llama.cpp cannot make one.
pub fn grammar(schema: &str) -> Result<String, String> {
    let convert = |schema: &str| json_schema_to_grammar(schema, false).map_err(|error| error.to_string());
    let Ok(mut value) = serde_json::from_str(schema) else { return convert(schema) };
    let mut rules = Vec::new();
    rewrite(&mut value, 0, &mut rules);
    let grammar = convert(&value.to_string())?;
    let grammar = without_escapes(&grammar);
    Ok(rules.iter().enumerate().fold(grammar, |grammar, (index, rule)| {
        grammar.replace(&format!("\"\\\"{}\\\"\"", written(index)), &format!("({rule})"))
    }))
}

/// Names of properties beside those that a schema knows: llama.cpp lets their first letter be one that JSON has to escape.
fn without_escapes(grammar: &str) -> String {
    let mut parts = grammar.split("[^\"");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |written, part| {
        // The rule for any character has them already.
        let escapes = if part.starts_with('\\') { "" } else { "\\\\\\x00-\\x1F" };
        format!("{written}[^\"{escapes}{part}")
    })
}

fn mark(index: usize) -> String {
    format!("{MARK}{index}.")
}

/// As it stands in a grammar.
fn written(index: usize) -> String {
    mark(index).replace('\u{1}', "\\\\u0001")
}

fn rewrite(schema: &mut Value, depth: usize, rules: &mut Vec<String>) {
    let Value::Object(fields) = schema else { return };
    if depth > DEEPEST {
        return;
    }
    if let Some(plain) = fields.get("pattern").and_then(Value::as_str).and_then(plain_pattern) {
        fields["pattern"] = plain.into();
    }
    for (keyword, value) in fields.iter_mut() {
        match (keyword.as_str(), value) {
            ("properties" | "$defs" | "definitions", Value::Object(all)) => {
                all.values_mut().for_each(|inner| rewrite(inner, depth + 1, rules));
            }
            ("items" | "prefixItems" | "anyOf" | "oneOf" | "allOf", Value::Array(all)) => {
                all.iter_mut().for_each(|inner| rewrite(inner, depth + 1, rules));
            }
            ("items" | "additionalProperties", one) => rewrite(one, depth + 1, rules),
            _ => {}
        }
    }
    if let Some(all) = multiples(fields) {
        *schema = json!({ "enum": all });
    } else if let Some(rule) = number_rule(fields) {
        let number = json!({ "const": mark(rules.len()) });
        rules.push(rule);
        *schema = match others(fields) {
            others if others.is_empty() => number,
            others => {
                let all: Vec<_> = [number].into_iter().chain(others).collect();
                json!({ "anyOf": all })
            }
        };
    }
}

/// What else than a number it may be.
fn others(fields: &Map<String, Value>) -> Vec<Value> {
    let kinds = fields.get("type").and_then(Value::as_array);
    let others = kinds.into_iter().flatten().filter(|kind| **kind != "number" && **kind != "integer");
    let of = |kind: &Value| {
        let mut other = fields.clone();
        other["type"] = kind.clone();
        other.into()
    };
    others.map(of).collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn bounded_numbers_have_their_rules_wherever_they_stand() {
        let number = json!({ "type": "number", "minimum": 0, "maximum": 1 });
        for schema in [
            number.clone(),
            json!({ "type": "object", "properties": { "x": number }, "required": ["x"] }),
            json!({ "type": "array", "items": { "type": ["number", "null"], "minimum": 0 } }),
            json!({ "$defs": { "n": number }, "$ref": "#/$defs/n" }),
        ] {
            let grammar = grammar(&schema.to_string()).unwrap();
            assert!(grammar.contains("\".\" [0-9]{1,6}"), "{schema}: {grammar}");
            assert!(!grammar.contains("number0") && !grammar.contains("u0001"), "{schema}: {grammar}");
        }
        let property = json!({ "type": "object", "properties": { "type": { "type": "string" }, "minimum": { "type": "integer" } } });
        let as_it_is = json_schema_to_grammar(&property.to_string(), false).unwrap();
        assert_eq!(grammar(&property.to_string()).unwrap(), as_it_is);
    }
}
