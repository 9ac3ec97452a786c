//! Units that must not be mistaken for one another.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Mul};

use serde::{Deserialize, Serialize};

/// An amount of memory or storage.
///
/// # Units
/// Bytes; shown as GiB or MiB (powers of two). Arithmetic saturates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// No bytes.
    pub const ZERO: Self = Self(0);

    /// So many KiB.
    #[must_use]
    pub const fn kib(count: u64) -> Self {
        Self(count << 10)
    }

    /// So many MiB.
    #[must_use]
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }

    /// So many GiB; negative amounts count as zero.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "float casts saturate, which is meant")]
    pub fn gib(count: f64) -> Self {
        Self((count * f64::from(1_u32 << 30)) as u64)
    }

    /// What is left after taking `other` away, zero at the least.
    #[must_use]
    pub const fn less(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// The amount in MiB, for people and metrics.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
    pub fn as_mib(self) -> f64 {
        self.0 as f64 / f64::from(1_u32 << 20)
    }
}

/// A text that is no amount of memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no amount of memory: write one such as 16GiB or 512MiB")]
pub struct NotBytes(String);

impl std::str::FromStr for Bytes {
    type Err = NotBytes;

    /// `16GiB`, `1.5G`, `512MiB`, `1024`; the units are powers of two, however they are written.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "float casts saturate, which is meant")]
    fn from_str(text: &str) -> Result<Self, NotBytes> {
        let bad = || NotBytes(text.to_owned());
        let trimmed = text.trim();
        let end = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let number: f64 = trimmed[..end].parse().map_err(|_| bad())?;
        let shift = match trimmed[end..].trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(bad()),
        };
        Ok(Self((number * 2_f64.powi(shift)) as u64))
    }
}

impl Add for Bytes {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl AddAssign for Bytes {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Mul<u64> for Bytes {
    type Output = Self;
    fn mul(self, times: u64) -> Self {
        Self(self.0.saturating_mul(times))
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, Add::add)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = self.as_mib();
        if mib >= 1024.0 {
            write!(f, "{:.1} GiB", mib / 1024.0)
        } else if mib >= 10.0 {
            write!(f, "{mib:.0} MiB")
        } else {
            write!(f, "{mib:.1} MiB")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_shown_in_the_unit_that_reads_best() {
        assert_eq!(Bytes::mib(1).to_string(), "1.0 MiB");
        assert_eq!(Bytes::mib(98).to_string(), "98 MiB");
        assert_eq!(Bytes::gib(6.94).to_string(), "6.9 GiB");
    }

    #[test]
    fn amounts_are_read_as_people_write_them() {
        assert_eq!("16GiB".parse(), Ok(Bytes::gib(16.0)));
        assert_eq!("1.5 g".parse(), Ok(Bytes::gib(1.5)));
        assert_eq!("512MiB".parse(), Ok(Bytes::mib(512)));
        assert!("lots".parse::<Bytes>().is_err() && "5 parsecs".parse::<Bytes>().is_err());
    }

    #[test]
    fn arithmetic_saturates_instead_of_wrapping() {
        assert_eq!(Bytes(u64::MAX) + Bytes(1), Bytes(u64::MAX));
        assert_eq!(Bytes(1).less(Bytes(2)), Bytes::ZERO);
        assert_eq!(Bytes::gib(-1.0), Bytes::ZERO);
    }
}
