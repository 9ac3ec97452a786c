//! The llama worker: everything that computes with llama.cpp.
//!
//! One worker holds one GGUF file and answers generations over a socket pair. It is the only crate that
//! links llama.cpp; a failed assertion in there ends the worker, never the server. It opens no network
//! socket and decides nothing about memory: the server did that before it started the worker.

mod answer;
mod buffers;
mod cells;
mod channel;
mod chat;
mod draft;
mod drafter;
mod embed;
mod engine;
mod log;
mod logprobs;
mod media;
mod model;
mod pace;
mod pages;
mod park;
mod probe;
mod prompt;
mod reference;
mod rest;
mod sampler;
mod schedule;
mod schema;
mod sequence;
mod tiles;
mod trial;
mod unit;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use sarai_core::frame::{FromWorker, ToWorker};

use channel::Incoming;
pub use pages::release_start;
pub use probe::run_probe;
pub use tiles::refuse as refuse_tiles;

/// How much rather the kernel takes a worker than the server, in thousandths of all memory.
const WORKER_SCORE: i32 = 500;

/// Runs a worker on its end of the socket pair until the server closes it.
///
/// # Errors
/// The first frame is missing or is not a load; failures after that are reported as frames.
pub fn run_worker(socket: OwnedFd) -> anyhow::Result<()> {
    prefer_as_victim(WORKER_SCORE);
    let (inbox, mut frames) = channel::open(socket)?;
    let Ok(Incoming::Command(ToWorker::Load(spec))) = inbox.receiver.recv() else {
        anyhow::bail!("the first frame of a worker must be a load");
    };
    match engine::run(&spec, &inbox, &mut frames) {
        Ok(()) => Ok(()),
        Err(reason) => frames.send(&FromWorker::LoadFailed(reason)),
    }
}

/// Does nothing until the server closes its end: the kernel may take this process where it would take the server.
///
/// # Errors
/// The socket cannot be read.
pub fn run_spare(socket: OwnedFd) -> anyhow::Result<()> {
    prefer_as_victim(WORKER_SCORE / 2);
    pages::release_start();
    std::io::copy(&mut UnixStream::from(socket), &mut std::io::sink())?;
    Ok(())
}

/// Asks the kernel to take this process before the server that started it, whose value it inherited.
fn prefer_as_victim(by: i32) {
    let file = "/proc/self/oom_score_adj";
    let inherited = std::fs::read_to_string(file).ok().and_then(|text| text.trim().parse::<i32>().ok()).unwrap_or(0);
    if let Err(error) = std::fs::write(file, (inherited.max(0) + by).min(1000).to_string()) {
        log::warn(&format!("oom_score_adj stays as it is: {error}"));
    }
}
