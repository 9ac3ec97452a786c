//! Many allowed values as one rule in GBNF, in which what they begin with alike is written once: llama.cpp writes them side by side, follows
//! each as a way of its own, and needs seconds for each token of some thousands.

use std::collections::BTreeSet;
use std::fmt::Write;

use serde_json::{Map, Value};

/// Fewer are left as they are.
const MANY: usize = 16;
/// Groups within groups at most.
const DEEPEST: usize = 48;

/// A rule for the values of an `enum`, if they are many and nothing stands beside it that decides before.
#[must_use]
pub fn values_rule(schema: &Map<String, Value>) -> Option<String> {
    if ["$ref", "oneOf", "anyOf", "const"].iter().any(|keyword| schema.contains_key(*keyword)) {
        return None;
    }
    let values = schema.get("enum")?.as_array().filter(|values| values.len() >= MANY)?;
    let written: BTreeSet<String> = values.iter().map(Value::to_string).collect();
    let written: Vec<&str> = written.iter().map(String::as_str).collect();
    let mut rule = String::new();
    write_rest(&written, DEEPEST, &mut rule)?;
    Some(rule)
}

/// Writes what is left of values that are sorted; nothing if groups would stand too deep in each other.
fn write_rest(values: &[&str], deepest: usize, rule: &mut String) -> Option<()> {
    let deepest = deepest.checked_sub(1)?;
    let mut left = values;
    let mut is_first = true;
    while let Some(first) = left.first().and_then(|value| value.chars().next()) {
        let count = left.partition_point(|value| value.starts_with(first));
        let (alike, others) = left.split_at(count);
        left = others;
        if !std::mem::take(&mut is_first) {
            rule.push_str(" | ");
        }
        let (shortest, longest) = (alike[0], alike[count - 1]);
        // They are sorted: what the first and the last have in common, all have.
        let common: String =
            shortest.chars().zip(longest.chars()).take_while(|(a, b)| a == b).map(|(letter, _)| letter).collect();
        write_literal(&common, rule);
        let rest: Vec<&str> =
            alike.iter().map(|value| &value[common.len()..]).filter(|rest| !rest.is_empty()).collect();
        if rest.is_empty() {
            continue;
        }
        rule.push_str(" (");
        write_rest(&rest, deepest, rule)?;
        // One of them may end here.
        rule.push_str(if rest.len() < count { ")?" } else { ")" });
    }
    Some(())
}

/// Writes text as GBNF has it.
fn write_literal(text: &str, rule: &mut String) {
    rule.push('"');
    for letter in text.chars() {
        match letter {
            '"' | '\\' => rule.extend(['\\', letter]),
            letter if letter.is_control() => drop(write!(rule, "\\U{:08X}", u32::from(letter))),
            letter => rule.push(letter),
        }
    }
    rule.push('"');
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn rule(values: &[Value]) -> Option<String> {
        values_rule(json!({ "enum": values }).as_object().unwrap())
    }

    /// All that a rule of these few words allows.
    fn allowed(rule: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Vec<String> {
        let (mut all, mut one) = (Vec::new(), vec![String::new()]);
        while let Some(letter) = rule.next() {
            match letter {
                '"' => {
                    let mut text = String::new();
                    while let Some(letter) = rule.next().filter(|letter| *letter != '"') {
                        text.push(if letter == '\\' { rule.next().unwrap() } else { letter });
                    }
                    one.iter_mut().for_each(|one| one.push_str(&text));
                }
                '(' => {
                    let mut inner = allowed(rule);
                    if rule.next_if_eq(&'?').is_some() {
                        inner.push(String::new());
                    }
                    one = one.iter().flat_map(|one| inner.iter().map(move |inner| format!("{one}{inner}"))).collect();
                }
                ')' => break,
                '|' => all.append(&mut std::mem::replace(&mut one, vec![String::new()])),
                _ => {}
            }
        }
        all.append(&mut one);
        all
    }

    proptest! {
        #[test]
        fn a_rule_allows_these_values_and_no_other(
            texts in prop::collection::btree_set("[ab\"é]{0,4}", MANY..60),
            numbers in prop::collection::btree_set(0_u32..2000, 0..20),
        ) {
            let values: Vec<Value> = texts.iter().map(|text| json!(text)).chain(numbers.iter().map(|number| json!(number))).collect();
            let rule = rule(&values).unwrap();
            let mut found = allowed(&mut rule.chars().peekable());
            found.sort();
            let mut wanted: Vec<String> = values.iter().map(Value::to_string).collect();
            wanted.sort();
            prop_assert_eq!(found, wanted);
        }
    }

    #[test]
    fn few_values_and_those_that_stand_too_deep_in_each_other_are_left_as_they_are() {
        assert_eq!(rule(&[json!(1), json!(2)]), None);
        let deep: Vec<Value> = (0..100).map(|length| json!("a".repeat(length))).collect();
        assert_eq!(rule(&deep), None);
        let flat: Vec<Value> = (0..5000).map(|number| json!(format!("value {number}"))).collect();
        let length: usize = flat.iter().map(|value| value.to_string().len()).sum();
        assert!(rule(&flat).unwrap().len() < length, "what they begin with is written once");
    }
}
