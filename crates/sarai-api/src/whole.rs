//! Whole numbers as some clients of Ollama write them: `8192.0`.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

#[derive(Deserialize)]
#[serde(untagged, expecting = "a whole number")]
enum Number {
    Whole(i64),
    Float(f64),
}

/// Ollama cuts the digits off.
pub fn deserialize<'de, N: TryFrom<i64>, D: Deserializer<'de>>(from: D) -> Result<Option<N>, D::Error> {
    #[expect(clippy::cast_possible_truncation, reason = "what is beyond all numbers is refused with its range")]
    let number = match Option::<Number>::deserialize(from)? {
        None => return Ok(None),
        Some(Number::Whole(number)) => number,
        Some(Number::Float(number)) => number as i64,
    };
    N::try_from(number).map(Some).map_err(|_| D::Error::custom(format!("{number} is out of range")))
}
