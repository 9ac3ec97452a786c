//! Parts of JSON schemas in the words that llama.cpp makes grammars of: it knows no bounds of numbers that are not whole, and of
//! patterns only those that are anchored, without classes such as `\d`.
//!
//! Whatever is written so is allowed by the schema; not all that the schema allows is written so.

mod merge;
mod number;
mod parts;
mod pattern;
mod values;

pub use merge::put_together;
pub use number::{multiples, number_rule};
pub use parts::{meant, only_part, parts_mut, target, visit};
pub use pattern::{of_format, plain_pattern};
pub use values::values_rule;

/// llama.cpp repeats nothing more often.
pub const MOST_REPEATED: u64 = 2000;
/// Items of an array that may have none are repeated within a group, which counts too.
pub const MOST_ITEMS: u64 = 1990;
