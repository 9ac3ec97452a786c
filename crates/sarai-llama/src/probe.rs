//! The probe: what a load would take, by llama.cpp's own account, without allocating it.
//!
//! It takes the same first frame as a worker, answers it, and ends. llama.cpp aborts on settings that a model
//! does not allow, so it runs in a process of its own.

use std::os::fd::OwnedFd;

use llama_cpp_4::llama_backend::LlamaBackend;
use sarai_core::frame::{FromWorker, LoadSpec, LoadedInfo, ToWorker};

use crate::channel::Incoming;
use crate::model::{self, Allocation};
use crate::{WORKER_SCORE, channel, log, prefer_as_victim};

/// Answers one load as a dry run.
///
/// # Errors
/// The first frame is missing or is not a load.
pub fn run_probe(socket: OwnedFd) -> anyhow::Result<()> {
    prefer_as_victim(WORKER_SCORE);
    let (inbox, mut frames) = channel::open(socket)?;
    let Ok(Incoming::Command(ToWorker::Load(spec))) = inbox.receiver.recv() else {
        anyhow::bail!("the first frame of a probe must be a load");
    };
    frames.send(&match probe(&spec) {
        Ok(info) => FromWorker::Loaded(info),
        Err(reason) => FromWorker::LoadFailed(reason),
    })
}

fn probe(spec: &LoadSpec) -> Result<LoadedInfo, String> {
    log::capture_llama();
    let backend = LlamaBackend::init().map_err(|error| error.to_string())?;
    let model = model::load(spec, Allocation::DryRun, |_| {})?;
    let context = model::context(spec, &backend, &model)?;
    Ok(model::info(spec, &context))
}
