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
    // On one core, a second thread only takes turns with the first.
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(2);
    tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build().map_err(Failure::failed)
}
