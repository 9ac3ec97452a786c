//! Worker processes: starting, talking to, measuring and ending them.

pub mod child;
pub mod measure;
pub mod route;
