//! `sarai worker`: computes for the server that started it.

use std::os::fd::AsFd;
use std::process::ExitCode;

use crate::log;

/// Runs until the server closes its end of the socket, which is our standard input.
pub fn run() -> ExitCode {
    let socket = std::io::stdin().as_fd().try_clone_to_owned();
    let outcome = socket.map_err(anyhow::Error::from).and_then(sarai_llama::run_worker);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::complain(&format!("worker: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
