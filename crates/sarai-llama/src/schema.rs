//! The grammar of a JSON schema: llama.cpp's own, with what it knows no rules for written in other words, or put in afterwards.

use llama_cpp_4::chat::json_schema_to_grammar;
use sarai_core::schema::{
    MOST_ITEMS, MOST_REPEATED, multiples, number_rule, of_format, only_part, parts_mut, plain_pattern, put_together,
    target, values_rule, visit,
};
use serde_json::{Map, Value, json};

/// Numbers from here on stand for rules in a grammar, until these take their place: no schema's own constant is one of them.
const MARK: u64 = 7_301_859_264_017_530_000;

/// The grammar of a schema.
///
/// # Errors
/// llama.cpp cannot make one; says where in the schema.
pub fn grammar(schema: &str) -> Result<String, String> {
    let document: Value = serde_json::from_str(schema).map_err(|error| error.to_string())?;
    let mut words = Words::default();
    let written = words.of(&document);
    let grammar = json_schema_to_grammar(&written.to_string(), false);
    let grammar = grammar.map_err(|error| place_named(&document, words.as_asked(&error.to_string())))?;
    Ok(words.put_in(&grammar))
}

/// Schemas in the words that llama.cpp knows, and the rules that belong into the grammar that it makes of them.
#[derive(Default)]
pub struct Words {
    rules: Vec<String>,
    /// What is referred to gets names that differ: llama.cpp takes `a_b` and `a-b` for the same, and `#/$defs/a` of two tools.
    references: Vec<String>,
    /// Whether a model is to read them: then nothing is put in other words that llama.cpp can read.
    is_for_reading: bool,
    /// Whether values stay as they are listed: some templates have texts of calls without quotes, and of `allOf` llama.cpp sees the lists alone.
    keeps_values: bool,
}

impl Words {
    /// For schemas that a model is shown.
    pub fn for_reading() -> Self {
        Self { is_for_reading: true, ..Self::default() }
    }

    /// A schema in these words.
    pub fn of(&mut self, document: &Value) -> Value {
        let together = put_together(document);
        let document = if self.is_for_reading { document } else { &*together };
        self.keeps_values |= visit(document, |schema| schema.get("allOf").is_some()).is_some();
        let first = self.references.len();
        let mut written = self.rewritten(document, document, first);
        let mut definitions = Map::new();
        let mut next = first;
        while let Some(definition) = self.references.get(next).and_then(|reference| target(document, reference)) {
            let definition = self.rewritten(definition, document, first);
            definitions.insert(named(next), definition);
            next += 1;
        }
        if let Value::Object(fields) = &mut written
            && fields.remove("$defs").is_some() | !definitions.is_empty()
        {
            fields.insert("$defs".into(), definitions.into());
        }
        written
    }

    /// The definitions of tools, with their arguments' schemas in these words; nothing if they are so already.
    pub fn of_tools(&mut self, definitions: &str) -> Option<String> {
        let mut tools: Vec<Value> = serde_json::from_str(definitions).ok()?;
        self.keeps_values = true;
        let mut has_changed = false;
        for parameters in tools.iter_mut().filter_map(|tool| tool.pointer_mut("/function/parameters")) {
            let written = self.of(parameters);
            has_changed |= *parameters != written;
            *parameters = written;
        }
        has_changed.then(|| Value::from(tools).to_string())
    }

    /// A grammar with the rules in it.
    pub fn put_in(&self, grammar: &str) -> String {
        self.rules.iter().enumerate().fold(without_escapes(grammar), |grammar, (index, rule)| {
            grammar.replace(&format!("\"{}\"", mark(index)), &format!("({rule})"))
        })
    }

    /// What llama.cpp says, with the names that the client has given.
    pub fn as_asked(&self, said: &str) -> String {
        self.references.iter().enumerate().rev().fold(said.to_owned(), |said, (index, reference)| {
            said.replace(&format!("#/$defs/{}", named(index)), reference)
        })
    }

    /// One schema of a document whose references are counted from the first on.
    fn rewritten(&mut self, schema: &Value, document: &Value, first: usize) -> Value {
        let mut fields = match schema {
            Value::Bool(true) => Map::new(),
            Value::Object(fields) => match only_part(fields) {
                Some(part) => return self.rewritten(part, document, first),
                None => fields.clone(),
            },
            other => return other.clone(),
        };
        // That nothing follows a fixed row of items goes without saying.
        if fields.contains_key("prefixItems") && fields.get("items") == Some(&Value::Bool(false)) {
            fields.remove("items");
        }
        // llama.cpp's rule for further names cannot tell them from these.
        let is_odd = |name: &String| name.contains(['"', '\\', ']', '^']);
        let properties = fields.get("properties").and_then(Value::as_object);
        if properties.is_some_and(|all| all.keys().any(is_odd)) && fields.get("additionalProperties").is_some() {
            fields["additionalProperties"] = false.into();
        }
        for (keyword, most) in [("maxItems", MOST_ITEMS), ("maxLength", MOST_REPEATED)] {
            if fields.get(keyword).and_then(Value::as_u64).is_some_and(|count| count > most) {
                fields.remove(keyword);
            }
        }
        if let Some(pattern) = fields.get("format").and_then(Value::as_str).and_then(of_format)
            && !self.is_for_reading
            && !fields.contains_key("pattern")
        {
            fields.insert("pattern".into(), pattern.into());
        }
        if let Some(pattern) = fields.get("pattern").and_then(Value::as_str).filter(|_| !self.is_for_reading) {
            match plain_pattern(pattern) {
                Some(plain) => fields["pattern"] = plain.into(),
                // llama.cpp's own rule would let through what JSON has to escape; a broken one is for it to refuse.
                None if is_valid(pattern) => drop(fields.remove("pattern")),
                None => {}
            }
        }
        if let Some(Value::String(reference)) = fields.get_mut("$ref")
            && target(document, reference).is_some()
        {
            let known = self.references[first..].iter().position(|known| known == reference);
            let index = first + known.unwrap_or(self.references.len() - first);
            if known.is_none() {
                self.references.push(reference.clone());
            }
            *reference = format!("#/$defs/{}", named(index));
        }
        for part in parts_mut(&mut fields) {
            // Without further items, or names, is no schema.
            if !part.is_boolean() || *part == Value::Bool(true) {
                *part = self.rewritten(part, document, first);
            }
        }
        if self.is_for_reading {
            return fields.into();
        }
        if let Some(all) = multiples(&fields) {
            fields = Map::from_iter([("enum".to_owned(), all.into())]);
        }
        if let Some(rule) = values_rule(&fields).filter(|_| !self.keeps_values) {
            self.rules.push(rule);
            return json!({ "const": mark(self.rules.len() - 1) });
        }
        let Some(rule) = number_rule(&fields) else { return fields.into() };
        let number = json!({ "const": mark(self.rules.len()) });
        self.rules.push(rule);
        match others(&fields) {
            others if others.is_empty() => number,
            others => {
                let all: Vec<_> = [number].into_iter().chain(others).collect();
                json!({ "anyOf": all })
            }
        }
    }
}

/// Whether llama.cpp can read a pattern.
fn is_valid(pattern: &str) -> bool {
    json_schema_to_grammar(&json!({ "type": "string", "pattern": pattern }).to_string(), false).is_ok()
}

fn mark(index: usize) -> u64 {
    MARK + index as u64
}

fn named(index: usize) -> String {
    format!("{index}.")
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

/// The tool whose arguments have no grammar, and why.
pub fn broken_tool(definitions: &str) -> Option<String> {
    let tools: Vec<Value> = serde_json::from_str(definitions).unwrap_or_default();
    tools.iter().enumerate().find_map(|(index, tool)| {
        let why = grammar(&tool.pointer("/function/parameters")?.to_string()).err()?;
        Some(format!("`tools[{index}].function.parameters`: {why}"))
    })
}

/// The part of a schema that makes most rules, and how many: what takes too much time or memory is most likely there.
pub fn heaviest(document: &Value) -> Option<String> {
    let weight = |schema: &Value| {
        let properties = schema["properties"].as_object().map_or(0, Map::len) as u64;
        let counts =
            ["minItems", "maxItems", "minLength", "maxLength"].map(|keyword| schema[keyword].as_u64().unwrap_or(0));
        let pattern =
            schema["pattern"].as_str().map_or(0, |pattern| pattern.matches('{').count() as u64 * MOST_REPEATED);
        (properties * properties)
            .max(pattern)
            .max(counts.into_iter().filter(|count| *count <= MOST_REPEATED).max().unwrap_or(0))
    };
    let mut heaviest = 0;
    visit(document, |schema| {
        heaviest = heaviest.max(weight(schema));
        false
    });
    visit(document, |schema| heaviest > 0 && weight(schema) == heaviest)
}

/// The same of the arguments of tools.
pub fn heaviest_of_tools(definitions: &str) -> Option<String> {
    let tools: Vec<Value> = serde_json::from_str(definitions).unwrap_or_default();
    let size = |tool: &Value| tool["function"]["parameters"].to_string().len();
    let (index, tool) = tools.iter().enumerate().max_by_key(|(_, tool)| size(tool))?;
    let place = heaviest(&tool["function"]["parameters"])?;
    Some(format!("`tools[{index}].function.parameters` at {place}"))
}

/// What llama.cpp says of a schema; of a broken pattern it does not say where that stands.
fn place_named(document: &Value, said: String) -> String {
    const NAMES: &str = "Invalid pattern ";
    let Some((_, pattern)) = said.split_once(NAMES) else { return said };
    let is_named = |schema: &Value| schema["pattern"].as_str().is_some_and(|one| pattern.starts_with(one));
    match visit(document, is_named) {
        Some(place) => format!("JSON schema error at {place}: invalid pattern {pattern}"),
        None => said,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn many_values_are_one_rule_but_in_calls_and_parts_of_all() {
        let many: Vec<String> = (0..40).map(|number| format!("value {number}")).collect();
        let values = json!({ "type": "string", "enum": many });
        let common = "\"\\\"value \"";
        assert!(grammar(&values.to_string()).unwrap().contains(common));
        // Too many to be put together.
        let some = |from: usize| (from..from + 1_000).map(|number| format!("value {number}")).collect::<Vec<_>>();
        let both = json!({ "allOf": [{ "enum": some(0) }, { "enum": some(500) }] });
        assert!(!grammar(&both.to_string()).unwrap().contains(common));
        let tool = json!([{ "type": "function", "function": { "name": "f", "parameters": { "type": "object", "properties": { "x": values } } } }]);
        assert_eq!(Words::default().of_tools(&tool.to_string()), None);
    }

    #[test]
    fn bounded_numbers_have_their_rules_wherever_they_stand() {
        let number = json!({ "type": "number", "minimum": 0, "maximum": 1 });
        for schema in [
            number.clone(),
            json!({ "type": "object", "properties": { "x": number }, "required": ["x"] }),
            json!({ "type": "array", "items": { "type": ["number", "null"], "minimum": 0 } }),
            json!({ "$defs": { "n": number }, "$ref": "#/$defs/n" }),
            json!({ "components": { "n": number }, "type": "array", "items": { "$ref": "#/components/n" } }),
        ] {
            let grammar = grammar(&schema.to_string()).unwrap();
            assert!(grammar.contains("\".\" [0-9]{1,6}"), "{schema}: {grammar}");
            assert!(!grammar.contains("73018592640175"), "{schema}: {grammar}");
        }
        let property = json!({ "type": "object", "properties": { "type": { "type": "string" }, "minimum": { "type": "integer" } } });
        let as_it_is = json_schema_to_grammar(&property.to_string(), false).unwrap();
        assert_eq!(grammar(&property.to_string()).unwrap(), as_it_is);
    }

    #[test]
    fn schemas_that_say_nothing_more_are_written_as_llama_cpp_reads_them() {
        let written = |schema: Value| Words::default().of(&schema);
        let fixed = json!({ "prefixItems": [true, { "const": { "items": false } }], "items": false });
        assert_eq!(written(fixed), json!({ "prefixItems": [{}, { "const": { "items": false } }] }));
        for as_it_is in [json!({ "items": false }), json!({ "type": "object", "additionalProperties": false })] {
            assert_eq!(written(as_it_is.clone()), as_it_is);
        }
    }

    #[test]
    fn what_is_referred_to_is_told_apart_by_its_whole_name() {
        let constant = |value: &str| json!({ "const": value });
        let schema = json!({
            "$defs": { "a_b": constant("one"), "a-b": constant("two"), "a b": { "$ref": "#/$defs/a~1b" }, "a/b": constant("three") },
            "prefixItems": [{ "$ref": "#/$defs/a_b" }, { "$ref": "#/$defs/a-b" }, { "$ref": "#/$defs/a b" }],
        });
        let grammar = grammar(&schema.to_string()).unwrap();
        for value in ["one", "two", "three"] {
            assert!(grammar.contains(value), "{value}: {grammar}");
        }
        let escaped = json!({ "$defs": { "a%b": constant("four") }, "items": { "$ref": "#/$defs/a%25b" } });
        assert!(super::grammar(&escaped.to_string()).unwrap().contains("four"));
        let tree =
            json!({ "type": "object", "properties": { "next": { "$ref": "#" } }, "additionalProperties": false });
        assert!(super::grammar(&tree.to_string()).is_ok());
    }

    #[test]
    fn an_object_with_odd_names_has_no_others() {
        for name in ["a\"b", "a\\", "]", "^x"] {
            let object = |more: Value| {
                json!({ "type": "object", "properties": { name: { "type": "null" } }, "additionalProperties": more })
                    .to_string()
            };
            let closed = grammar(&object(json!(false))).unwrap();
            assert_eq!(grammar(&object(json!(true))).unwrap(), closed, "{name}");
            assert_eq!(grammar(&object(json!({ "type": "integer" }))).unwrap(), closed, "{name}");
        }
    }

    /// Nothing that JSON has to escape, whatever a pattern would let through.
    #[test]
    fn a_pattern_that_cannot_be_followed_lets_any_text_through() {
        let any = grammar(&json!({ "type": "string" }).to_string()).unwrap();
        for pattern in [r"^a\nb$", r#"^"[^"]*"$"#, r"^[^\x00-\x1f]+$", r"^(?=a)b$"] {
            assert_eq!(
                grammar(&json!({ "type": "string", "pattern": pattern }).to_string()).unwrap(),
                any,
                "{pattern}"
            );
        }
    }

    #[test]
    fn what_has_no_grammar_is_said_by_its_place() {
        let object =
            |part: Value| json!({ "type": "object", "properties": { "x": { "type": "array", "items": part } } });
        for (schema, place) in [
            (object(json!({ "type": "string", "pattern": "^(a$" })), "#/properties/x/items: invalid pattern ^(a$"),
            (object(json!({ "$ref": "#/$defs/none" })), "#/properties/x/items: "),
            (object(json!({ "type": "text" })), "#/properties/x/items: "),
            (
                json!({ "$defs": { "some": { "type": "string", "pattern": "^(a$" } }, "$ref": "#/$defs/some" }),
                "#/$defs/some: invalid pattern",
            ),
            (json!({ "$defs": { "some": { "type": "text" } }, "$ref": "#/$defs/some" }), "#/$defs/some: "),
        ] {
            let said = grammar(&schema.to_string()).unwrap_err();
            assert!(said.contains(place), "{schema}: {said}");
        }
        let many: Map<_, _> = (0..9).map(|n| (format!("p{n}"), json!({}))).collect();
        assert_eq!(heaviest(&object(json!({ "properties": many }))).unwrap(), "#/properties/x/items");
        let tool = |part: Value| json!({ "type": "function", "function": { "name": "f", "parameters": object(part) } });
        let tools = json!([tool(json!({})), tool(json!({ "type": "text" }))]);
        let said = broken_tool(&tools.to_string()).unwrap();
        assert!(said.contains("`tools[1].function.parameters`") && said.contains("#/properties/x/items"), "{said}");
    }
}
