//! Every fault of a host, played by the real binary: what a client sees, cell by cell.

use std::process::Command;

use crate::support::{BINARY, smollm2};
use serde_json::Value;

/// Runs a drill; the cells.
fn drill(config: &str) -> Vec<Value> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sarai.yaml");
    std::fs::write(&file, config).unwrap();
    let mut command = Command::new(BINARY);
    command.args([
        "drill",
        "--json",
        "--first-token-seconds",
        "2.5",
        "--gap-seconds",
        "1",
        "--max-tokens",
        "16",
        "--config",
    ]);
    let output = command.arg(&file).env_remove("OLLAMA_BASE_URL").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(&said).unwrap()
}

/// What each fault must lead to, streamed and whole: the host itself, whoever is next, or a resumed stream.
fn wanted(fault: &str, streamed: bool) -> &'static str {
    match fault {
        "none" | "slow headers" | "very slow" => "host",
        _ if streamed && !fault.ends_with(" 0") && fault.contains(" after ") => "resumed",
        _ => "next",
    }
}

fn check(cells: &[Value], host: &str, next: &str) {
    assert_eq!(cells.len(), 66);
    for cell in cells {
        let (fault, shape) = (cell["fault"].as_str().unwrap(), cell["shape"].as_str().unwrap());
        let verdict = cell["verdict"].as_str().unwrap();
        let begins = match wanted(fault, shape != "plain") {
            "host" => format!("served by {host}"),
            "resumed" => format!("resumed by {next}"),
            _ => format!("served by {next}"),
        };
        assert!(verdict.starts_with(&begins), "{fault}, {shape}: {verdict}, not {begins}");
    }
}

#[test]
fn with_a_local_fallback_every_fault_is_answered_and_every_cut_stream_goes_on() {
    let local = format!("gguf_path: {}", smollm2());
    let config = format!("models:\n  solar: {{ backend: ollama_http, fallback: gguf_native, {local} }}\n");
    let cells = drill(&config);
    check(&cells, "solar@ollama_http(127.0.0.1", "solar@gguf_native");
}

#[test]
fn with_a_second_host_that_speaks_openais_api_too_and_the_text_is_whole() {
    let config =
        "models:\n  solar: { backend: openai_http, urls: [\"http://127.0.0.1:9/v1\", \"http://127.0.0.1:10/v1\"] }\n";
    let cells = drill(config);
    check(&cells, "solar@openai_http(127.0.0.1", "solar@openai_http(127.0.0.1");
}

#[test]
fn with_nobody_else_every_fault_is_an_honest_failure() {
    let cells = drill("models:\n  solar: { backend: ollama_http }\n");
    for cell in &cells {
        let begins =
            if wanted(cell["fault"].as_str().unwrap(), true) == "host" { "served by" } else { "honest failure" };
        assert!(cell["verdict"].as_str().unwrap().starts_with(begins), "{cell}");
    }
}
