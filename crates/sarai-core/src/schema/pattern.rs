//! Patterns without what llama.cpp does not know, or reads in another way, and without what JSON would have to escape.

use super::MOST_REPEATED;

/// Any character of a text that needs no escape in JSON, and ends no line.
const ANY: &str = r#"[^\x22\x5C\x00-\x1F\u2028\u2029]"#;

/// A pattern as llama.cpp makes grammars of it, with nothing in it that JSON would have to escape; none if it cannot be written so. What is
/// repeated stands in a group of its own: llama.cpp takes escaped characters together with their neighbours.
#[must_use]
pub fn plain_pattern(pattern: &str) -> Option<String> {
    let (begins, rest) = pattern.strip_prefix('^').map_or((false, pattern), |rest| (true, rest));
    let is_end = rest.ends_with('$') && !rest.ends_with("\\$");
    let inner = if is_end { &rest[..rest.len() - 1] } else { rest };
    let mut written = String::new();
    let mut chars = inner.chars().peekable();
    // An alternative with nothing in it is not known there.
    let (mut depth, mut may_repeat, mut is_nothing) = (0_usize, false, true);
    while let Some(c) = chars.next() {
        let repeats = may_repeat;
        may_repeat = true;
        if is_nothing && (c == '|' || c == ')') {
            return None;
        }
        is_nothing = c == '|' || c == '(';
        match c {
            '\\' => match chars.next()? {
                'd' => written.push_str("[0-9]"),
                'w' => written.push_str("[A-Za-z0-9_]"),
                's' => written.push_str("[ ]"),
                escaped if r"^$.[]()|{}*+?".contains(escaped) => written.extend(['(', '\\', escaped, ')']),
                escaped if is_harmless(escaped) && escaped.is_ascii_punctuation() => {
                    written.extend(['(', escaped, ')'])
                }
                _ => return None,
            },
            '[' => written.push_str(&class(&mut chars)?),
            '.' => written.push_str(ANY),
            '(' => {
                if chars.next_if_eq(&'?').is_some() {
                    chars.next_if_eq(&':')?;
                }
                depth += 1;
                may_repeat = false;
                written.push('(');
            }
            ')' => {
                depth = depth.checked_sub(1)?;
                written.push(')');
            }
            '|' => {
                may_repeat = false;
                written.push('|');
            }
            '*' | '+' | '?' | '{' if repeats => {
                written.push(c);
                if c == '{' {
                    written.push_str(&times(&mut chars)?);
                }
                // What matches at all is the same for those that take as little as they can.
                chars.next_if_eq(&'?');
                may_repeat = false;
            }
            c if is_harmless(c) && !"^$*+?{}]".contains(c) => match c.is_ascii() {
                true => written.push(c),
                false => written.extend(['(', c, ')']),
            },
            _ => return None,
        }
    }
    if depth > 0 || (is_nothing && !written.is_empty()) {
        return None;
    }
    if begins && is_end {
        return Some(format!("^{written}$"));
    }
    let written = if written.is_empty() { written } else { format!("({written})") };
    let around = |is_anchored: bool| if is_anchored { String::new() } else { format!("{ANY}*") };
    let after = if written.is_empty() && !begins { String::new() } else { around(is_end) };
    Some(format!("^{}{written}{after}$", around(begins)))
}

/// Whether a character stands in JSON as it is.
fn is_harmless(c: char) -> bool {
    !c.is_control() && c != '"' && c != '\\'
}

/// The rest of `{2,5}`.
fn times(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Option<String> {
    let mut times = String::new();
    loop {
        match chars.next()? {
            '}' => break,
            c @ ('0'..='9' | ',') => times.push(c),
            _ => return None,
        }
    }
    let (least, most) = times.split_once(',').unwrap_or((&times, &times));
    let few = |count: &str| count.parse::<u64>().ok().filter(|count| *count <= MOST_REPEATED);
    let least = few(least)?;
    if !most.is_empty() && few(most)? < least {
        return None;
    }
    times.push('}');
    Some(times)
}

/// The rest of a class of characters, as ranges of what stands in JSON as it is.
fn class(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Option<String> {
    let is_negated = chars.next_if_eq(&'^').is_some();
    let mut ranges: Vec<(char, char)> = Vec::new();
    // The character before, if a range may begin with it.
    let mut before: Option<char> = None;
    loop {
        let c = chars.next()?;
        if c == ']' {
            break;
        }
        let is_range = c == '-' && before.is_some() && chars.peek().is_some_and(|next| *next != ']');
        if is_range {
            let (from, to) = (before.take()?, one(chars)?);
            // A class cannot end a range.
            let to = to.ok()?;
            ranges.pop();
            ranges.push((from, (to >= from).then_some(to)?));
            continue;
        }
        let read = if c == '\\' { escaped(chars.next()?)? } else { Ok(c) };
        match read {
            Ok(c) => {
                ranges.push((c, c));
                before = Some(c);
            }
            Err(all) => {
                ranges.extend(all);
                before = None;
                // `\w-z` is read in two ways; a `-` at the end is one in both.
                if chars.peek() == Some(&'-') {
                    chars.next();
                    if chars.peek() != Some(&']') {
                        return None;
                    }
                    ranges.push(('-', '-'));
                }
            }
        }
    }
    if ranges.is_empty() {
        return None;
    }
    let escaped_in_json = [('\0', '\u{1f}'), ('"', '"'), ('\\', '\\')];
    let ranges = match is_negated {
        true => [ranges.as_slice(), &escaped_in_json].concat(),
        false => escaped_in_json.iter().fold(ranges, |ranges, taken| without(&ranges, *taken)),
    };
    let written: String = ranges.iter().map(|(from, to)| format!("{}-{}", code(*from), code(*to))).collect();
    (!written.is_empty()).then(|| format!("[{}{written}]", if is_negated { "^" } else { "" }))
}

/// A character of a class, or several.
type OneOrMore = Result<char, Vec<(char, char)>>;

fn one(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Option<OneOrMore> {
    match chars.next()? {
        '\\' => escaped(chars.next()?),
        c => Some(Ok(c)),
    }
}

fn escaped(c: char) -> Option<OneOrMore> {
    match c {
        'd' => Some(Err(vec![('0', '9')])),
        'w' => Some(Err(vec![('A', 'Z'), ('a', 'z'), ('0', '9'), ('_', '_')])),
        's' => Some(Err(vec![(' ', ' ')])),
        c if c.is_ascii_punctuation() => Some(Ok(c)),
        _ => None,
    }
}

fn without(ranges: &[(char, char)], (first, last): (char, char)) -> Vec<(char, char)> {
    let beside =
        |c: char, by: i32| u32::try_from(i64::from(u32::from(c)) + i64::from(by)).ok().and_then(char::from_u32);
    let mut left = Vec::new();
    for &(from, to) in ranges {
        if to < first || from > last {
            left.push((from, to));
            continue;
        }
        left.extend((from < first).then(|| beside(first, -1)).flatten().map(|end| (from, end)));
        left.extend((to > last).then(|| beside(last, 1)).flatten().map(|begin| (begin, to)));
    }
    left
}

/// A character by its number.
fn code(c: char) -> String {
    match u32::from(c) {
        number @ ..0x100 => format!("\\x{number:02X}"),
        number @ ..0x1_0000 => format!("\\u{number:04X}"),
        number => format!("\\U{number:08X}"),
    }
}

const DATE: &str = "^[12][0-9]{3}-((01|03|05|07|08|10|12)-(0[1-9]|[12][0-9]|3[01])|(04|06|09|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))$";
const DATE_TIME: &str = concat!(
    "^[12][0-9]{3}-((01|03|05|07|08|10|12)-(0[1-9]|[12][0-9]|3[01])|(04|06|09|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))",
    "T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]([.][0-9]{3})?(Z|[+-](0[0-9]|1[0-3]):[0-5][0-9])$"
);

/// A pattern for texts of a format that llama.cpp knows no rule for, or one that lets through what is none. It lets the usual ones through, and nothing else.
#[must_use]
pub fn of_format(format: &str) -> Option<&'static str> {
    match format {
        // A day that there is.
        "date" => Some(DATE),
        "date-time" => Some(DATE_TIME),
        "email" | "idn-email" => Some(
            "^[a-zA-Z0-9]{1,16}([._+-][a-zA-Z0-9]{1,16}){0,2}@[a-z0-9]{1,24}(-[a-z0-9]{1,12})?(\\.[a-z]{2,8}){1,2}$",
        ),
        "hostname" | "idn-hostname" => Some("^[a-z0-9]{1,24}(-[a-z0-9]{1,12}){0,2}(\\.[a-z]{2,12}){0,3}$"),
        "uri" | "iri" | "uri-reference" | "iri-reference" => Some(
            "^https?://[a-z0-9]{1,24}(-[a-z0-9]{1,12})?(\\.[a-z]{2,12}){1,3}(:[1-9][0-9]{1,3})?(/[a-zA-Z0-9._~-]{1,40}){0,6}/?([?][a-zA-Z0-9=&_-]{1,60})?$",
        ),
        "ipv4" => Some(
            "^(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9][0-9]|[0-9])(\\.(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9][0-9]|[0-9])){3}$",
        ),
        "ipv6" => Some("^[0-9a-f]{1,4}(:[0-9a-f]{1,4}){7}$"),
        "duration" => Some("^P([1-9][0-9]{0,2}[DWMY]|T[1-9][0-9]{0,2}[HMS])$"),
        _ => None,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use proptest::prelude::*;
    use regex_lite::Regex;

    use super::*;

    #[test]
    fn patterns_are_anchored_and_their_classes_written_out() {
        for (pattern, plain) in [
            ("^[a-z]{2,5}$", r"^[\x61-\x7A]{2,5}$"),
            (r"^\d{3}-\d{4}$", "^[0-9]{3}-[0-9]{4}$"),
            ("^(?:a|b)+?$", "^(a|b)+$"),
            (r"^v1\.?$", r"^v1(\.)?$"),
            (r"^\(.\|\)$", r"^(\()[^\x22\x5C\x00-\x1F\u2028\u2029](\|)(\))$"),
            ("^é+$", "^(é)+$"),
            ("b", r"^[^\x22\x5C\x00-\x1F\u2028\u2029]*(b)[^\x22\x5C\x00-\x1F\u2028\u2029]*$"),
            ("^a", r"^(a)[^\x22\x5C\x00-\x1F\u2028\u2029]*$"),
            ("z$", r"^[^\x22\x5C\x00-\x1F\u2028\u2029]*(z)$"),
            ("^[^,-]+$", r"^[^\x2C-\x2C\x2D-\x2D\x00-\x1F\x22-\x22\x5C-\x5C]+$"),
            ("^[ -~]+$", r"^[\x20-\x21\x23-\x5B\x5D-\x7E]+$"),
            (r"^[\w.-]$", r"^[\x41-\x5A\x61-\x7A\x30-\x39\x5F-\x5F\x2E-\x2E\x2D-\x2D]$"),
            ("", r"^[^\x22\x5C\x00-\x1F\u2028\u2029]*$"),
            ("^$", "^$"),
        ] {
            assert_eq!(plain_pattern(pattern).as_deref(), Some(plain), "{pattern}");
        }
        for pattern in [
            r"^\bx$",
            r"^(?=a)b$",
            r"^(a)\1$",
            r"^\u0041$",
            "a^b",
            "^a$b$",
            "^[$",
            "^a{3000}$",
            "^a{1,2,3}$",
            "^a{2,1}$",
            r#"^""$"#,
            r"\p{L}",
            "^a++$",
            "^*a$",
            "a)(b",
            "^(a$",
            r"^\[\d+]$",
            r"^\{[a-z]+}$",
            r"^[\w-z]$",
            r"^[a-\d]$",
            "^(|a)$",
            "^(a|)$",
            "^a|$",
            "^()$",
            "^[]$",
            r#"^["]$"#,
        ] {
            assert_eq!(plain_pattern(pattern), None, "{pattern}");
        }
    }

    /// Patterns of pieces that have something in them to get wrong.
    fn patterns() -> impl Strategy<Value = String> {
        let pieces = [
            "a", "ab", "é", ".", r"\d", r"\w", r"\s", r"\.", r"\+", r"\-", "[a-c]", "[^a-]", "[^,-]", r"[\w-]",
            r"[\w.-]", r"\(", r"\)", r"\|", "[ -~]", "[A-z]", r"[^\d,]", r"[\s-]", r"[\.-z]", "(a|b)", "(?:ab|c)", "x",
            "-", ":", "|",
        ];
        let times = ["", "", "", "*", "+", "?", "{2}", "{1,3}", "+?"];
        let piece = (prop::sample::select(pieces.to_vec()), prop::sample::select(times.to_vec()));
        (any::<bool>(), prop::collection::vec(piece, 0..5), any::<bool>()).prop_map(|(begins, pieces, ends)| {
            let inner: String = pieces
                .iter()
                .map(|(piece, times)| format!("{piece}{}", if *piece == "|" { "" } else { times }))
                .collect();
            format!("{}{inner}{}", if begins { "^" } else { "" }, if ends { "$" } else { "" })
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        /// What the plain pattern lets through, the pattern matches, and JSON need not escape it.
        #[test]
        fn a_plain_pattern_lets_nothing_through_that_the_pattern_does_not(
            pattern in patterns(), texts in prop::collection::vec("[abcxé0-9 ,.:+_~zA\"\\\\`-]{0,6}", 20),
        ) {
            let Some(plain) = plain_pattern(&pattern) else { return Ok(()) };
            let Ok(original) = Regex::new(&pattern) else { return Ok(()) };
            // A plain pattern's `|` is within its anchors, as llama.cpp has it.
            let plain = Regex::new(&format!("^(?:{})$", plain.trim_start_matches('^').trim_end_matches('$'))).unwrap();
            for text in texts.iter().filter(|text| plain.is_match(text)) {
                prop_assert!(original.is_match(text), "{pattern:?} as {plain} lets {text:?} through");
                prop_assert!(text.chars().all(is_harmless), "{pattern:?} as {plain} lets {text:?} through");
            }
        }
    }
}
