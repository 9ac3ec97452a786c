//! llama.cpp's further samplers, as its server writes them.

use sarai_core::{Error, Samplers};
use serde_json::{Map, Value};

use crate::sampling::float;
use crate::{check, json};

const NAMES: [&str; 15] = [
    "min_keep",
    "top_n_sigma",
    "xtc_probability",
    "xtc_threshold",
    "dynatemp_range",
    "dynatemp_exponent",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_penalty_last_n",
    "dry_sequence_breakers",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
    "samplers",
];

/// Those that there are, by llama.cpp's names.
pub const KINDS: [&str; 10] =
    ["dry", "top_k", "typ_p", "top_p", "top_n_sigma", "min_p", "temperature", "xtc", "penalties", "adaptive_p"];

/// Texts that end a sequence, and bytes of each: llama.cpp compares each with all of the vocabulary.
const MOST_BREAKERS: usize = 8;
const LONGEST_BREAKER: usize = 40;

/// Takes them out of a body, or of Ollama's options. What is off says nothing, nor does what belongs to it.
///
/// # Errors
/// [`Error::InvalidRequest`] with the field's name.
pub fn take(from: &mut Map<String, Value>) -> Result<Samplers, Error> {
    let taken: Map<_, _> =
        NAMES.iter().filter_map(|name| Some(((*name).to_owned(), from.shift_remove(*name)?))).collect();
    if taken.is_empty() {
        return Ok(Samplers::default());
    }
    let mut read: Samplers = json::read(Value::Object(taken))?;
    check(&read)?;
    read.min_keep = read.min_keep.filter(|&n| n > 0);
    read.top_n_sigma = read.top_n_sigma.filter(|&n| n > 0.0);
    if read.xtc_probability.is_none_or(|p| p <= 0.0) {
        (read.xtc_probability, read.xtc_threshold) = (None, None);
    }
    if read.dynatemp_range.is_none_or(|range| range <= 0.0) {
        (read.dynatemp_range, read.dynatemp_exponent) = (None, None);
    }
    if read.dry_multiplier.is_none_or(|multiplier| multiplier <= 0.0) {
        (read.dry_multiplier, read.dry_base, read.dry_allowed_length) = (None, None, None);
        (read.dry_penalty_last_n, read.dry_sequence_breakers) = (None, None);
    }
    if read.mirostat.is_none_or(|version| version == 0) {
        (read.mirostat, read.mirostat_tau, read.mirostat_eta) = (None, None, None);
    }
    read.samplers = read.samplers.filter(|samplers| !samplers.is_empty());
    Ok(read)
}

fn check(read: &Samplers) -> Result<(), Error> {
    let numbers = [
        ("top_n_sigma", read.top_n_sigma, -1.0, 100.0),
        ("xtc_probability", read.xtc_probability, 0.0, 1.0),
        ("xtc_threshold", read.xtc_threshold, 0.0, 1.0),
        ("dynatemp_range", read.dynatemp_range, 0.0, 100.0),
        ("dynatemp_exponent", read.dynatemp_exponent, 0.0, 100.0),
        ("dry_multiplier", read.dry_multiplier, 0.0, 100.0),
        ("dry_base", read.dry_base, 0.0, 100.0),
        ("mirostat_tau", read.mirostat_tau, 0.0, 100.0),
        ("mirostat_eta", read.mirostat_eta, 0.0, 1.0),
    ];
    for (name, value, low, high) in numbers {
        check::range(name, value, low, high)?;
    }
    if let Some(version) = read.mirostat.filter(|&version| version > 2) {
        return Err(Error::invalid("mirostat", format!("`mirostat` is {version}: use 0, 1 or 2")));
    }
    if let Some(n) = read.dry_penalty_last_n.filter(|&n| n < -1) {
        let message = format!("`dry_penalty_last_n` is {n}: use -1 for the whole context, or 0 and more");
        return Err(Error::invalid("dry_penalty_last_n", message));
    }
    let breakers = read.dry_sequence_breakers.as_deref().unwrap_or_default();
    let is_wrong = |text: &&String| text.is_empty() || text.len() > LONGEST_BREAKER || text.contains('\0');
    if breakers.len() > MOST_BREAKERS || breakers.iter().any(|text| is_wrong(&text)) {
        let message =
            format!("`dry_sequence_breakers`: use at most {MOST_BREAKERS} texts of 1 to {LONGEST_BREAKER} bytes");
        return Err(Error::invalid("dry_sequence_breakers", message));
    }
    let unknown = |name: &&String| !KINDS.contains(&name.as_str());
    if let Some(name) = read.samplers.iter().flatten().find(unknown) {
        let message = format!("`samplers` names `{name}`: use {}", KINDS.join(", "));
        return Err(Error::invalid("samplers", message));
    }
    if read.samplers.as_ref().is_some_and(|samplers| samplers.len() > KINDS.len()) {
        return Err(Error::invalid("samplers", "`samplers` names one of them twice: name each once".to_owned()));
    }
    Ok(())
}

/// Those that are set, as a host reads them.
pub fn to_wire(samplers: &Samplers) -> Map<String, Value> {
    if *samplers == Samplers::default() {
        return Map::new();
    }
    let written = serde_json::to_value(samplers).unwrap_or_default();
    let written = written.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    // A float as the client wrote it.
    #[expect(clippy::cast_possible_truncation, reason = "it was one")]
    let short = |value: &Value| match value.as_f64().filter(|_| value.is_f64()) {
        Some(number) => float(number as f32),
        None => value.clone(),
    };
    written.map(|(name, value)| (name.clone(), short(value))).collect()
}
