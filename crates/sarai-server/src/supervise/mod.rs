//! Worker processes: starting, talking to and ending them.

pub mod child;
pub mod probe;
pub mod process;
pub mod route;
pub mod shepherd;
pub mod spare;
pub mod validate;
