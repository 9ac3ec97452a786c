//! Everything of sarai that waits: configuration, dispatch, the pool and its workers, remotes, HTTP.
//!
//! It holds no model and never calls llama.cpp: a worker process does, and may die without harm here.

mod admission;
mod backend;
mod catalog;
pub mod config;
mod dispatch;
mod gateway;
mod http;
mod pool;
mod server;
mod supervise;

pub use server::{Server, ServerError};
