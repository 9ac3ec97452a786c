//! `sarai worker`: computes, or plans by a dry run, for the server that started it.

use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use sarai_server::supervise::{shepherd, validate};

use crate::args::WorkerKind;
use crate::log;

/// Runs until the server closes its end of the socket, which is our standard input.
pub fn run(kind: &WorkerKind) -> ExitCode {
    let work = match kind {
        WorkerKind::Shepherd { command, .. } => {
            return shepherd::run(command).unwrap_or_else(|error| {
                log::complain(&format!("shepherd: {error}"));
                ExitCode::FAILURE
            });
        }
        WorkerKind::Llama { .. } => sarai_llama::run_worker,
        WorkerKind::Probe { .. } => sarai_llama::run_probe,
        WorkerKind::Spare { .. } => sarai_llama::run_spare,
        WorkerKind::Validate { .. } => |socket: OwnedFd| Ok(validate::run(socket.into())?),
    };
    let socket = std::io::stdin().as_fd().try_clone_to_owned();
    let outcome = socket.map_err(anyhow::Error::from).and_then(work);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::complain(&format!("worker: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
