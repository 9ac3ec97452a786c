//! Numbers within bounds, as rules in GBNF: llama.cpp makes right ones only of two bounds of whole numbers, and knows no multiples.

use serde_json::{Map, Number, Value};

/// Digits behind the point that a bounded number has at most.
const DECIMALS: usize = 6;
/// Bounds beyond this are not told from their neighbours with so many decimals.
const FURTHEST: f64 = 1e9;
/// Whole numbers are told from their neighbours up to this.
const FURTHEST_WHOLE: f64 = 9_007_199_254_740_991.0;
/// Which has so many digits.
const MOST_DIGITS: usize = 16;
/// Of the whole numbers that have no upper bound, the digits.
const DIGITS: usize = 15;
/// Decimals of a cell that a bound parts, at least, if there are so many.
const ENOUGH: u64 = 10;

/// A rule in GBNF for the numbers that a schema's bounds allow, and its decimals where they are to be multiples of 0.1, 0.01 and so on; if it
/// has any and they can be followed: it is of type `number` or `integer`, alone or among others.
#[must_use]
pub fn number_rule(schema: &Map<String, Value>) -> Option<String> {
    let is_of = |wanted: &str| match schema.get("type") {
        Some(Value::String(kind)) => kind == wanted,
        Some(Value::Array(kinds)) => kinds.contains(&wanted.into()),
        _ => false,
    };
    let is_number = is_of("number");
    if !(is_number || is_of("integer")) || is_decided(schema) {
        return None;
    }
    let step = schema.get("multipleOf").and_then(Step::of).filter(|step| is_number && step.is_decimal());
    let decimals = step.map_or(DECIMALS, |step| step.decimals);
    let has_decimals = is_number && decimals > 0;
    let furthest = if has_decimals { FURTHEST } else { FURTHEST_WHOLE };
    let bound = |keyword: &str, is_excluded: bool| bound(schema, keyword, is_excluded, furthest);
    let least = tighter(bound("minimum", false)?, bound("exclusiveMinimum", true)?, f64::gt);
    let most = tighter(bound("maximum", false)?, bound("exclusiveMaximum", true)?, f64::lt);
    let sizes =
        |from: Bound, to: Option<Bound>| if has_decimals { sizes(from, to, decimals) } else { whole_sizes(from, to) };
    let mirrored = |bound: Bound| Bound { at: -bound.at, ..bound };
    let zero = |is_excluded: bool| Bound { at: 0.0, is_excluded };
    let mut alternatives = Vec::new();
    if least.is_none_or(|least| least.at < 0.0) {
        let from = most.filter(|most| most.at < 0.0).map_or(zero(true), mirrored);
        alternatives.extend(sizes(from, least.map(mirrored)).map(|sizes| format!("\"-\" ({sizes})")));
    }
    if most.is_none_or(|most| most.at >= 0.0) {
        alternatives.extend(sizes(least.filter(|least| least.at >= 0.0).unwrap_or(zero(false)), most));
    }
    let is_bounded = least.is_some() || most.is_some() || step.is_some();
    (is_bounded && !alternatives.is_empty()).then(|| alternatives.join(" | "))
}

/// What `multipleOf` asks for: a number of tenths, hundredths and so on.
#[derive(Clone, Copy, Debug)]
struct Step {
    parts: i64,
    decimals: usize,
}

impl Step {
    /// One that is above zero and has not too many decimals.
    fn of(value: &Value) -> Option<Self> {
        let step = value.as_f64().filter(|step| *step > 0.0 && *step <= FURTHEST)?;
        let written = format!("{step}");
        let (whole, behind) = written.split_once('.').unwrap_or((&written, ""));
        let parts = format!("{whole}{behind}").parse().ok()?;
        (behind.len() <= DECIMALS).then_some(Self { parts, decimals: behind.len() })
    }

    /// Whether all numbers with so many decimals are multiples.
    fn is_decimal(self) -> bool {
        self.parts == 1
    }

    fn times(self, count: i64) -> f64 {
        let parts = self.parts.saturating_mul(count);
        format!("{parts}e-{}", self.decimals).parse().unwrap_or(f64::NAN)
    }
}

/// The multiples that a schema of type `integer` or `number` allows, but where all that has so many decimals is one; where it leaves a side
/// open, those next to the other bound or to zero.
#[must_use]
pub fn multiples(schema: &Map<String, Value>) -> Option<Vec<Number>> {
    let step = schema.get("multipleOf")?;
    if is_decided(schema) {
        return None;
    }
    match schema.get("type").and_then(Value::as_str)? {
        "integer" => Some(
            whole_multiples(schema, step.as_i64().filter(|step| *step > 0)?)?.into_iter().map(Number::from).collect(),
        ),
        "number" => fractions(schema, Step::of(step).filter(|step| !step.is_decimal())?),
        _ => None,
    }
}

/// Those that are not whole; of these, what is a multiple to whoever divides one float by the other.
#[expect(clippy::cast_possible_truncation, reason = "bounds are small")]
fn fractions(schema: &Map<String, Value>, step: Step) -> Option<Vec<Number>> {
    let bound = |keyword: &str, is_excluded: bool| bound(schema, keyword, is_excluded, FURTHEST);
    let least = tighter(bound("minimum", false)?, bound("exclusiveMinimum", true)?, f64::gt);
    let most = tighter(bound("maximum", false)?, bound("exclusiveMaximum", true)?, f64::lt);
    let one = step.times(1);
    let count = |bound: Bound| (bound.at / one) as i64;
    let first = match (least, most) {
        (Some(least), _) => count(least) - 1,
        (None, Some(most)) if most.at < 0.0 => count(most) - MOST_MULTIPLES,
        (None, _) => 0,
    };
    let last = most.map_or(i64::MAX, |most| count(most) + 1);
    let is_allowed = |number: &f64| {
        (number / one).fract() == 0.0
            && least.is_none_or(|least| least.is_below(*number))
            && most.is_none_or(|most| most.is_above(*number))
    };
    let number =
        |number: f64| if number.fract() == 0.0 { Some(Number::from(number as i64)) } else { Number::from_f64(number) };
    let all: Vec<_> = (first..=last.min(first + MOST_MULTIPLES))
        .map(|n| step.times(n))
        .filter(is_allowed)
        .filter_map(number)
        .collect();
    (!all.is_empty()).then_some(all)
}

fn whole_multiples(schema: &Map<String, Value>, step: i64) -> Option<Vec<i64>> {
    let whole = |keyword: &str| match schema.get(keyword) {
        Some(value) => value.as_i64().map(Some),
        None => Some(None),
    };
    let (least, above) = (whole("minimum")?, whole("exclusiveMinimum")?.map(|above| above.saturating_add(1)));
    let (most, below) = (whole("maximum")?, whole("exclusiveMaximum")?.map(|below| below.saturating_sub(1)));
    let (least, most) = (least.max(above), [most, below].into_iter().flatten().min());
    let span = step.checked_mul(MOST_MULTIPLES)?;
    let (least, most) = match (least, most) {
        (Some(least), most) => (least, most.unwrap_or(i64::MAX).min(least.checked_add(span)?)),
        (None, Some(most)) => (if most >= 0 { 0 } else { most.checked_sub(span)? }, most),
        (None, None) => (0, span),
    };
    let first = least.checked_add((step - least.rem_euclid(step)) % step)?;
    let all: Vec<_> =
        (0..MOST_MULTIPLES).filter_map(|n| first.checked_add(n * step)).take_while(|n| *n <= most).collect();
    (!all.is_empty()).then_some(all)
}

/// How many multiples are named.
const MOST_MULTIPLES: i64 = 200;

/// Whether a keyword stands there beside which no bound is read.
fn is_decided(schema: &Map<String, Value>) -> bool {
    ["$ref", "oneOf", "anyOf", "allOf", "const", "enum"].iter().any(|keyword| schema.contains_key(*keyword))
}

#[derive(Clone, Copy, Debug)]
struct Bound {
    at: f64,
    is_excluded: bool,
}

impl Bound {
    fn is_above(self, number: f64) -> bool {
        number < self.at || (number == self.at && !self.is_excluded)
    }

    fn is_below(self, number: f64) -> bool {
        number > self.at || (number == self.at && !self.is_excluded)
    }
}

/// A bound, or none; nothing at all if it is none that can be followed.
fn bound(schema: &Map<String, Value>, keyword: &str, is_excluded: bool, furthest: f64) -> Option<Option<Bound>> {
    let Some(value) = schema.get(keyword) else { return Some(None) };
    let at = value.as_f64().filter(|at| at.abs() <= furthest)?;
    Some(Some(Bound { at, is_excluded }))
}

fn tighter(one: Option<Bound>, other: Option<Bound>, is_tighter: fn(&f64, &f64) -> bool) -> Option<Bound> {
    match (one, other) {
        (Some(one), Some(excluded)) if is_tighter(&one.at, &excluded.at) => Some(one),
        (_, Some(excluded)) => Some(excluded),
        (one, None) => one,
    }
}

/// The first whole number from a bound that is not negative on.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small and not negative")]
fn first(from: Bound) -> u64 {
    from.at.ceil() as u64 + u64::from(!from.is_below(from.at.ceil()))
}

/// The last one up to such a bound, if there is one.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small and not negative")]
fn last(to: Bound) -> Option<u64> {
    (to.at.floor() as u64).checked_sub(u64::from(!to.is_above(to.at.floor())))
}

/// The whole numbers from one that is not negative to another one.
fn whole_sizes(from: Bound, to: Option<Bound>) -> Option<String> {
    match to.map(last) {
        Some(None) => None,
        last => whole(first(from), last.flatten()),
    }
}

/// The numbers from one that is not negative to another one.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "small and not negative"
)]
fn sizes(from: Bound, to: Option<Bound>, most_decimals: usize) -> Option<String> {
    let is_within = |number: f64| from.is_below(number) && to.is_none_or(|to| to.is_above(number));
    let (first, last) = (first(from), to.map(last));
    // All that begin with these and a point.
    let last_whole = to.map(|to| (to.at.floor() as u64).checked_sub(1));
    let mut alternatives = Vec::new();
    if last != Some(None) {
        alternatives.extend(whole(first, last.flatten()));
    }
    if last_whole != Some(None)
        && let Some(whole) = whole(first, last_whole.flatten())
    {
        alternatives.push(format!("({whole}) \".\" [0-9]{{1,{most_decimals}}}"));
    }
    // Those that a bound parts.
    let parted = [from.at.floor() as u64, to.map_or(u64::MAX, |to| to.at.floor() as u64)];
    let is_parted = |cell: u64| cell < first || last_whole.is_some_and(|last| last.is_none_or(|last| cell > last));
    let cells = if parted[0] == parted[1] { &parted[..1] } else { &parted[..] };
    for &cell in cells.iter().filter(|cell| **cell != u64::MAX && is_parted(**cell)) {
        let decimals = |digits: usize| {
            let parts = 10_u64.pow(digits as u32);
            let at = |bound: f64| ((bound - cell as f64).clamp(0.0, 1.0) * parts as f64) as u64;
            let (low, high) = (at(from.at).max(1), to.map_or(parts, |to| at(to.at) + 1).min(parts - 1));
            (low, high)
        };
        let mut written = Vec::new();
        for digits in 1..=most_decimals {
            let (low, high) = decimals(digits);
            let parts = (low..=high).map(|part| format!("{part:0digits$}"));
            let mut within = parts.filter(|part| format!("{cell}.{part}").parse().is_ok_and(is_within));
            if let Some(first) = within.next() {
                let last = within.next_back().unwrap_or_else(|| first.clone());
                written.push(alike(&first, &last));
            }
            if high > low + ENOUGH {
                break;
            }
        }
        if !written.is_empty() {
            alternatives.push(format!("\"{cell}.\" ({})", written.join(" | ")));
        }
    }
    (!alternatives.is_empty()).then(|| alternatives.join(" | "))
}

/// The whole numbers from one to another one, or as far as there are digits.
fn whole(from: u64, to: Option<u64>) -> Option<String> {
    let mut alternatives = Vec::new();
    for digits in 1..=MOST_DIGITS {
        let power = |digits: usize| 10_u64.pow(u32::try_from(digits).unwrap_or(0));
        let (shortest, longest) = (if digits == 1 { 0 } else { power(digits - 1) }, power(digits) - 1);
        if to.is_none() && from <= shortest {
            alternatives.extend((digits == 1).then(|| "[0-9]".to_owned()));
            alternatives.push(format!("[1-9] [0-9]{{{},{}}}", (digits - 1).max(1), DIGITS.max(digits) - 1));
            break;
        }
        let (low, high) = (shortest.max(from), to.map_or(longest, |to| longest.min(to)));
        if low <= high {
            alternatives.push(alike(&low.to_string(), &high.to_string()));
        }
    }
    (!alternatives.is_empty()).then(|| alternatives.join(" | "))
}

/// The numbers of as many digits from one to another one.
fn alike(low: &str, high: &str) -> String {
    let (Some(first), Some(last)) = (low.chars().next(), high.chars().next()) else { return String::new() };
    let (low, high) = (&low[1..], &high[1..]);
    let rest = low.len();
    let (zeros, nines) = ("0".repeat(rest), "9".repeat(rest));
    let class = |from: char, to: char| if from == to { format!("[{from}]") } else { format!("[{from}-{to}]") };
    let followed = |digits: String, low: &str, high: &str| match rest {
        0 => digits,
        _ if low == zeros && high == nines => format!("{digits} [0-9]{{{rest}}}"),
        _ => format!("{digits} ({})", alike(low, high)),
    };
    if first == last || (low == zeros && high == nines) {
        return followed(class(first, last), low, high);
    }
    let step = |digit: char, by: i8| char::from((digit as u8).saturating_add_signed(by));
    let mut alternatives = vec![followed(class(first, first), low, &nines)];
    if step(first, 1) < last {
        alternatives.push(followed(class(step(first, 1), step(last, -1)), &zeros, &nines));
    }
    alternatives.push(followed(class(last, last), &zeros, high));
    alternatives.join(" | ")
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use proptest::prelude::*;
    use regex_lite::Regex;
    use serde_json::json;

    use super::*;

    /// The same language as a regular expression.
    fn regex(rule: &str) -> Regex {
        let mut written = String::new();
        let mut is_text = false;
        for c in rule.chars() {
            match c {
                '"' => is_text = !is_text,
                ' ' if !is_text => {}
                '.' if is_text => written.push_str(r"\."),
                c => written.push(c),
            }
        }
        Regex::new(&format!("^({written})$")).unwrap()
    }

    fn rule(schema: &Value) -> Option<Regex> {
        number_rule(schema.as_object().unwrap()).map(|rule| regex(&rule))
    }

    #[test]
    fn numbers_within_bounds_are_written_with_and_without_decimals() {
        for (schema, allowed, refused) in [
            (
                json!({ "type": "number", "minimum": 0 }),
                &["0", "7", "19.99", "123456.5"][..],
                &["-1", "-0.5", "01", "1.", "1e3"][..],
            ),
            (
                json!({ "type": "number", "minimum": 0, "maximum": 1 }),
                &["0", "1", "0.5", "0.123456"],
                &["1.01", "2", "-0.1", "1.000001"],
            ),
            (
                json!({ "type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1 }),
                &["0.01", "0.99"],
                &["0", "1", "0.0", "0.00"],
            ),
            (
                json!({ "type": "number", "minimum": -90, "maximum": 90 }),
                &["-90", "-89.99", "0", "45.25", "90"],
                &["-90.5", "91", "90.01", "100"],
            ),
            (
                json!({ "type": ["number", "null"], "maximum": -2.5 }),
                &["-3", "-2.5", "-2.75", "-100"],
                &["-2", "-2.4", "0", "3"],
            ),
            (
                json!({ "type": "integer", "minimum": 1900 }),
                &["1900", "1999", "2024", "10000"],
                &["190", "1899", "19", "1900.5", "-5"],
            ),
            (
                json!({ "type": "integer", "exclusiveMaximum": -99.5 }),
                &["-100", "-101", "-5000"],
                &["-10", "-99", "-01", "1", "0"],
            ),
            (
                json!({ "type": "integer", "minimum": -3, "maximum": 12 }),
                &["-3", "0", "12"],
                &["-4", "13", "1.5", "-0"],
            ),
            (json!({ "type": "number", "minimum": 0.001, "maximum": 0.002 }), &["0.001", "0.0015"], &["0", "0.003"]),
            (json!({ "type": "number", "multipleOf": 0.01 }), &["0", "-3", "19.99", "-0.5"], &["1.999", "1."]),
            (
                json!({ "type": "number", "multipleOf": 0.1, "exclusiveMinimum": 1.25, "maximum": 2.5 }),
                &["1.3", "2", "2.5"],
                &["1", "1.25", "1.26", "2.49", "2.6"],
            ),
            (json!({ "type": ["number", "null"], "multipleOf": 1, "minimum": 3 }), &["3", "17"], &["2", "3.5"]),
        ] {
            let rule = rule(&schema).unwrap();
            allowed.iter().for_each(|number| assert!(rule.is_match(number), "{number} of {schema}: {rule}"));
            refused.iter().for_each(|number| assert!(!rule.is_match(number), "{number} of {schema}: {rule}"));
        }
        for schema in [
            json!({ "type": "number" }),
            json!({ "type": "integer" }),
            json!({ "type": "integer", "minimum": 1e16 }),
            json!({ "type": "number", "minimum": 2, "maximum": 1 }),
            json!({ "type": "number", "minimum": 1e12 }),
            json!({ "type": "number", "minimum": "1" }),
            json!({ "type": "number", "minimum": 1, "enum": [1, 2] }),
        ] {
            assert!(number_rule(schema.as_object().unwrap()).is_none(), "{schema}");
        }
    }

    #[test]
    fn multiples_are_named() {
        let of = |schema: Value| {
            let all = multiples(schema.as_object().unwrap())?;
            Some(all.iter().map(|number| number.as_f64().unwrap()).collect::<Vec<_>>())
        };
        let bounded = json!({ "type": "integer", "minimum": -4, "exclusiveMaximum": 9, "multipleOf": 3 });
        assert_eq!(of(bounded), Some(vec![-3.0, 0.0, 3.0, 6.0]));
        let open = of(json!({ "type": "integer", "multipleOf": 5 })).unwrap();
        assert_eq!((open[0], open[1], open.len()), (0.0, 5.0, 200));
        let below = of(json!({ "type": "integer", "maximum": -1, "multipleOf": 10 })).unwrap();
        assert!(below.contains(&-10.0) && below.iter().all(|n| *n < 0.0 && n % 10.0 == 0.0), "{below:?}");
        let quarters = json!({ "type": "number", "exclusiveMinimum": -0.5, "maximum": 0.6, "multipleOf": 0.25 });
        assert_eq!(of(quarters), Some(vec![-0.25, 0.0, 0.25, 0.5]));
        let steps = of(json!({ "type": "number", "maximum": -1.2, "multipleOf": 0.3 })).unwrap();
        assert!(steps.len() > 50 && steps.iter().all(|n| *n <= -1.2 && (n / 0.3).fract() == 0.0), "{steps:?}");
        for none in [
            json!({ "type": "integer", "minimum": 1, "maximum": 2, "multipleOf": 3 }),
            json!({ "type": "number", "multipleOf": 0.01 }),
            json!({ "type": "number", "multipleOf": 0.000_000_3 }),
            json!({ "type": "integer", "multipleOf": 0.5 }),
            json!({ "type": "integer", "minimum": 0.5, "multipleOf": 3 }),
        ] {
            assert_eq!(of(none.clone()), None, "{none}");
        }
    }

    /// Numbers around what is asked for.
    fn bounds() -> impl Strategy<Value = f64> {
        prop_oneof![
            (-30_i32..30).prop_map(f64::from),
            (-3000_i32..3000).prop_map(|n| f64::from(n) / 100.0),
            (-200_000_i32..200_000).prop_map(f64::from)
        ]
    }

    proptest! {
        /// What the rule lets through is within the bounds, and every whole number within them is let through.
        #[test]
        fn a_rule_lets_nothing_through_beyond_its_bounds(
            one in bounds(), other in bounds(), kind in 0_usize..4, near in -3_i32..3, decimals in 0_u32..1_000_000, digits in 0_usize..7,
        ) {
            let (low, high) = (one.min(other), one.max(other));
            let names = [("minimum", "maximum"), ("exclusiveMinimum", "maximum"), ("minimum", "exclusiveMaximum"), ("minimum", "title")][kind];
            let Some(rule) = rule(&json!({ "type": "number", names.0: low, names.1: high })) else { return Ok(()) };
            let is_allowed = |number: f64| {
                (number > low || (number == low && names.0 == "minimum"))
                    && (names.1 == "title" || number < high || (number == high && names.1 == "maximum"))
            };
            for bound in [low, high, 0.0] {
                let whole = bound.trunc() + f64::from(near);
                prop_assert_eq!(rule.is_match(&whole.to_string().replace("-0", "0")), is_allowed(whole), "{} {}..{}: {}", whole, low, high, &rule);
                let written = &format!("{decimals:06}")[..digits.min(6)];
                let number = format!("{}{whole}.{written}", if whole == 0.0 && bound < 0.0 { "-" } else { "" }).replace("--", "-");
                if rule.is_match(&number) {
                    prop_assert!(is_allowed(number.parse().unwrap()), "{} {}..{}: {}", number, low, high, &rule);
                }
            }
        }
    }
}
