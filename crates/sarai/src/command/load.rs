//! `sarai load` and `sarai unload`.

use std::process::ExitCode;

use serde_json::json;

use super::client::Server;
use crate::args::ModelArgs;
use crate::{Failure, command, log};

/// Returns when the model is loaded.
pub fn load(args: &ModelArgs) -> Result<ExitCode, Failure> {
    ask(args, &json!({ "model": args.model }), "loaded")
}

/// Returns at once; the model goes when it is idle.
pub fn unload(args: &ModelArgs) -> Result<ExitCode, Failure> {
    ask(args, &json!({ "model": args.model, "keep_alive": 0 }), "unloads once it is idle")
}

fn ask(args: &ModelArgs, body: &serde_json::Value, done: &str) -> Result<ExitCode, Failure> {
    let server = Server::at(&args.server)?;
    command::runtime()?.block_on(server.post("/api/generate", body))?;
    log::print(&format!("{}: {done}\n", args.model));
    Ok(ExitCode::SUCCESS)
}
