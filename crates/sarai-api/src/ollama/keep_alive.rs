//! `keep_alive` as Ollama means it: a number of seconds, or a duration as Go writes it; negative is for ever.

use sarai_core::{Error, KeepAlive};
use serde_json::Value;

/// Reads it.
///
/// # Errors
/// [`Error::InvalidRequest`]: it is neither.
pub fn parse(value: &Value) -> Result<KeepAlive, Error> {
    let seconds = match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok().or_else(|| go_duration(text.trim())),
        _ => None,
    };
    let bad = || {
        let message =
            format!("`keep_alive` is {value}: use seconds, a duration such as \"5m\", 0 to unload, or -1 for ever");
        Error::invalid("keep_alive", message)
    };
    seconds.filter(|seconds| seconds.is_finite()).map(of_seconds).ok_or_else(bad)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "float casts saturate, which is meant")]
fn of_seconds(seconds: f64) -> KeepAlive {
    if seconds < 0.0 { KeepAlive::Forever } else { KeepAlive::For((seconds * 1000.0).round() as u64) }
}

/// As a host is told it.
#[must_use]
pub fn to_wire(keep_alive: KeepAlive) -> Value {
    match keep_alive {
        KeepAlive::Forever => Value::from(-1),
        KeepAlive::For(milliseconds) => Value::from(format!("{milliseconds}ms")),
    }
}

/// Seconds of a duration such as `1h30m`, `1.5h` or `-1m`; see Go's `time.ParseDuration`.
fn go_duration(text: &str) -> Option<f64> {
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1.0, rest),
        None => (1.0, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest.is_empty() {
        return None;
    }
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (value, tail) = rest.split_at(number);
        let unit = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let factor = match &tail[..unit] {
            "ns" => 1e-9,
            "us" | "\u{b5}s" | "\u{3bc}s" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        seconds += value.parse::<f64>().ok()? * factor;
        rest = &tail[unit..];
    }
    Some(sign * seconds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn seconds_and_durations_mean_what_ollama_means() {
        let of = |value: Value| parse(&value).ok();
        assert_eq!(of(json!(0)), Some(KeepAlive::For(0)));
        assert_eq!(of(json!(300)), Some(KeepAlive::For(300_000)));
        assert_eq!(of(json!(-1)), Some(KeepAlive::Forever));
        assert_eq!(of(json!("-1")), Some(KeepAlive::Forever));
        assert_eq!(of(json!("5m")), Some(KeepAlive::For(300_000)));
        assert_eq!(of(json!("1h30m")), Some(KeepAlive::For(5_400_000)));
        assert_eq!(of(json!("1.5s")), Some(KeepAlive::For(1_500)));
        assert_eq!(of(json!("-1m")), Some(KeepAlive::Forever));
        for bad in [json!("soon"), json!("5 parsecs"), json!(""), json!("-"), json!([1]), json!("5")] {
            assert_eq!(of(bad.clone()).is_none(), bad != json!("5"), "{bad}");
        }
    }
}
