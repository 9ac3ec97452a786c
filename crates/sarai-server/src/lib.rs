//! Everything of sarai that waits: configuration, dispatch, the pool and its workers, remotes, HTTP.
//!
//! It holds no model and never calls llama.cpp: a worker process does, and may die without harm here.

mod admission;
mod backend;
mod catalog;
pub mod config;
mod dispatch;
pub mod drill;
mod fetch;
mod gateway;
mod health;
mod http;
mod lanes;
pub mod machine;
mod metrics;
pub mod model_file;
pub mod planner;
mod pool;
mod reload;
mod server;
pub mod source;
pub mod state;
pub mod supervise;

pub use server::{Server, ServerError};
