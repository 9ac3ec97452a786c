//! llama.cpp's further samplers, as its server writes them.

use sarai_core::{Error, Samplers};
use serde_json::{Map, Value};

use crate::{check, json};

/// Those that are numbers; the first of each group switches it on.
const GROUPS: [&[&str]; 5] = [
    &["min_keep"],
    &["top_n_sigma"],
    &["xtc_probability", "xtc_threshold"],
    &["dynatemp_range", "dynatemp_exponent"],
    &["mirostat", "mirostat_tau", "mirostat_eta"],
];
/// Penalties for repeated sequences, which are not followed: llama.cpp goes through the whole vocabulary for each answer that has them,
/// while all others wait.
const NOT_FOLLOWED: [&str; 5] =
    ["dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"];
const WHICH: &str = "samplers";
/// Samplers that may be named, with llama.cpp's other names for them.
const KINDS: [(&str, &[&str]); 8] = [
    ("top_k", &["top-k"]),
    ("typ_p", &["typical_p", "typical-p", "typical", "typ-p", "typ"]),
    ("top_p", &["top-p", "nucleus"]),
    ("top_n_sigma", &["top-n-sigma"]),
    ("min_p", &["min-p"]),
    ("temperature", &["temp"]),
    ("xtc", &[]),
    ("penalties", &[]),
];

/// Reads them of a body, or of Ollama's options, and says which are followed. What is off says nothing, nor does what belongs to it.
///
/// # Errors
/// [`Error::InvalidRequest`] with the field's name.
pub fn read(from: &Map<String, Value>) -> Result<(Samplers, Vec<&'static str>), Error> {
    let (mut read, mut followed) = (Map::new(), Vec::new());
    for names in GROUPS {
        let set = names.iter().filter(|name| from.contains_key(**name));
        followed.extend(set);
        let is_on = from.get(names[0]).is_some_and(|value| value.as_f64().is_none_or(|number| number > 0.0));
        if is_on || names[1..].is_empty() {
            let taken = names.iter().filter_map(|name| Some(((*name).to_owned(), whole(from.get(*name)?))));
            read.extend(taken);
        }
    }
    if from.get(NOT_FOLLOWED[0]).is_none_or(|value| value.as_f64() == Some(0.0)) {
        followed.extend(NOT_FOLLOWED);
    }
    if let Some(names) = from.get(WHICH).and_then(Value::as_array) {
        followed.push(WHICH);
        read.insert(WHICH.to_owned(), known(names).into());
    }
    if read.is_empty() {
        return Ok((Samplers::default(), followed));
    }
    let mut read: Samplers = json::read(Value::Object(read))?;
    check(&read)?;
    read.min_keep = read.min_keep.filter(|&n| n > 0);
    read.top_n_sigma = read.top_n_sigma.filter(|&n| n > 0.0);
    Ok((read, followed))
}

/// Some clients write whole numbers as floats.
fn whole(value: &Value) -> Value {
    #[expect(clippy::cast_possible_truncation, reason = "it has no further digits")]
    match value.as_f64().filter(|number| number.fract() == 0.0 && number.abs() < 1e15) {
        Some(number) => (number as i64).into(),
        None => value.clone(),
    }
}

/// Their own names, each once; as llama.cpp has it, what it does not know is passed over.
fn known(names: &[Value]) -> Vec<&'static str> {
    let mut known = Vec::new();
    for name in names.iter().filter_map(Value::as_str) {
        let kind = KINDS.iter().find(|(kind, others)| *kind == name || others.contains(&name));
        known.extend(kind.map(|(kind, _)| *kind).filter(|kind| !known.contains(kind)));
    }
    known
}

fn check(read: &Samplers) -> Result<(), Error> {
    let numbers = [
        ("top_n_sigma", read.top_n_sigma, -1.0, 100.0),
        ("xtc_probability", read.xtc_probability, 0.0, 1.0),
        ("xtc_threshold", read.xtc_threshold, 0.0, 1.0),
        ("dynatemp_range", read.dynatemp_range, 0.0, 100.0),
        ("dynatemp_exponent", read.dynatemp_exponent, 0.0, 100.0),
        ("mirostat_tau", read.mirostat_tau, 0.0, 100.0),
        ("mirostat_eta", read.mirostat_eta, 0.0, 1.0),
    ];
    for (name, value, low, high) in numbers {
        check::range(name, value, low, high)?;
    }
    match read.mirostat.filter(|&version| version > 2) {
        Some(version) => Err(Error::invalid("mirostat", format!("`mirostat` is {version}: use 0, 1 or 2"))),
        None => Ok(()),
    }
}

/// Those that are set, for hosts of the other API, which are not asked for them.
pub fn names(samplers: &Samplers) -> Vec<String> {
    if *samplers == Samplers::default() {
        return Vec::new();
    }
    let written = serde_json::to_value(samplers).unwrap_or_default();
    let set = written.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    set.map(|(name, _)| name.clone()).collect()
}
