//! One file per command.

pub mod check;
mod client;
pub mod drill;
pub mod load;
pub mod plan;
pub mod ps;
pub mod run;
pub mod serve;
pub mod worker;

use tokio::runtime::Runtime;

use crate::Failure;

/// A runtime for commands that wait.
fn runtime() -> Result<Runtime, Failure> {
    // The cores are for the models: one thread passes 20,000 tokens a second on, and a second one would only be woken by it,
    // which takes a core from a worker that computes on all of them.
    let threads = std::thread::available_parallelism().map_or(1, |cores| 1 + cores.get() / 8).min(4);
    tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build().map_err(Failure::failed)
}
