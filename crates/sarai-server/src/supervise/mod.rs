//! Worker processes: starting, talking to and ending them.

pub mod child;
pub mod probe;
pub mod route;
pub mod spare;
