//! `sarai ps`: every model's state and memory.

use std::process::ExitCode;

use sarai_core::Bytes;
use serde_json::Value;

use super::client::Server;
use crate::args::PsArgs;
use crate::{Failure, command, log};

/// Prints the table.
pub fn run(args: &PsArgs) -> Result<ExitCode, Failure> {
    let state = command::runtime()?.block_on(async { Server::at(&args.server)?.get("/api/ps").await })?;
    if state["sarai"].is_null() {
        let url = &args.server.url;
        return Err(Failure::no_server(anyhow::anyhow!("what answers at {url} is not sarai: name it with --url")));
    }
    let text = if args.json { format!("{state}\n") } else { table(&state["sarai"]) };
    log::print(&text);
    Ok(ExitCode::SUCCESS)
}

fn table(sarai: &Value) -> String {
    let bytes = |value: &Value| Bytes(value.as_u64().unwrap_or(0));
    let mut text = format!(
        "memory: {} of {} claimed (server {}), {} free; strategy {}; at most {} local LLMs{}\n\n",
        bytes(&sarai["claimed_bytes"]),
        bytes(&sarai["budget_bytes"]),
        bytes(&sarai["server_bytes"]),
        bytes(&sarai["free_bytes"]),
        sarai["strategy"].as_str().unwrap_or_default(),
        sarai["max_concurrent_llms"],
        if sarai["pressure"] == true { "; MEMORY IS SHORT" } else { "" },
    );
    text.push_str(&format!("{:<12} {:<44} {:<14} {}\n", "MODEL", "DEPLOYMENT", "STATE", "REASON"));
    for model in sarai["models"].as_array().into_iter().flatten() {
        let mut name = model["name"].as_str().unwrap_or_default();
        for place in model["deployments"].as_array().into_iter().flatten() {
            let field = |key: &str| place[key].as_str().unwrap_or_default();
            let line = format!("{name:<12} {:<44} {:<14} {}", field("deployment"), field("state"), field("reason"));
            text.push_str(line.trim_end());
            text.push('\n');
            name = "";
        }
    }
    let workers = sarai["workers"].as_array().filter(|workers| !workers.is_empty());
    if let Some(workers) = workers {
        text.push_str(&format!(
            "\n{:<12} {:>8} {:>5} {:>10} {:>10} {:>10} {:>10}\n",
            "WORKER", "PID", "BUSY", "PLANNED", "CLAIMED", "ANONYMOUS", "FILE"
        ));
        for worker in workers {
            text.push_str(&format!(
                "{:<12} {:>8} {:>5} {:>10} {:>10} {:>10} {:>10}\n",
                worker["models"].as_str().unwrap_or_default(),
                worker["pid"].to_string(),
                worker["busy"].to_string(),
                bytes(&worker["planned_bytes"]).to_string(),
                bytes(&worker["claimed_bytes"]).to_string(),
                bytes(&worker["anonymous_bytes"]).to_string(),
                bytes(&worker["file_bytes"]).to_string(),
            ));
        }
    }
    text.push_str(&decisions(sarai));
    text
}

/// The last decisions, newest first.
fn decisions(sarai: &Value) -> String {
    const SHOWN: usize = 8;
    let all = sarai["decisions"].as_array().filter(|decisions| !decisions.is_empty());
    let Some(all) = all else { return String::new() };
    let mut text = format!("\n{:<9} {:<12} {:>5}  {}\n", "DECISION", "MODEL", "AGO", "WHY");
    for decision in all.iter().take(SHOWN) {
        let field = |key: &str| decision[key].as_str().unwrap_or_default();
        let ago = format!("{}s", decision["ago_ms"].as_u64().unwrap_or(0) / 1000);
        text.push_str(&format!("{:<9} {:<12} {ago:>5}  {}\n", field("what"), field("models"), field("why")));
    }
    text
}
