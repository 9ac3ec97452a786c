//! The official, unmodified Python and JavaScript clients of both APIs, against the real binary.

use std::path::Path;
use std::process::Command;

use crate::support::{Ollama, Sarai, minilm, qwen, sketch, smollm2};

#[test]
fn the_official_clients_are_served() {
    let (sensing, reciting) = (sketch("sensing/fitted"), sketch("sensing/reciting"));
    let config = format!(
        "memory: {{ max_concurrent_llms: 7 }}\nmodels:\n  lfm2: {{ backend: gguf_native, gguf_path: {}, context_length: 1024, parallel: 2, aliases: [tiny] }}\n  expert: {{ backend: ollama_http, fallback: gguf_native, url: \"{}\", gguf_path: {0}, context_length: 1024 }}\n  coder: {{ backend: gguf_native, gguf_path: {}, context_length: 2048 }}\n  minilm: {{ backend: gguf_native, gguf_path: {} }}\n  omni: {{ backend: gguf_native, gguf_path: {sensing}/qwen2vl.gguf, mmproj_path: {sensing}/mmproj-omni.gguf, context_length: 2048 }}\n  thinker: {{ backend: gguf_native, gguf_path: {reciting}/reasoning.gguf, context_length: 1024 }}\n  caller: {{ backend: gguf_native, gguf_path: {reciting}/calls.gguf, context_length: 4096 }}\n",
        smollm2(),
        Ollama::unreachable(),
        qwen(),
        minilm(),
    );
    let sarai = Sarai::start(&config);
    let python = std::env::var("SARAI_PYTHON").expect("SARAI_PYTHON names no Python with the clients: run `make test`");
    let tests = |file: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/clients").join(file);
    let run = Command::new(python).arg(tests("test_clients.py")).env("SARAI_URL", &sarai.url).output().unwrap();
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{said}");
    assert!(said.contains("Ran ") && !said.contains("Ran 0"), "{said}");

    let packages = std::env::var("SARAI_NODE_CLIENTS").expect("SARAI_NODE_CLIENTS names no clients: run `make test`");
    // Node finds packages beside the file that asks for them.
    let copy = Path::new(&packages).join("test_clients.mjs");
    std::fs::copy(tests("test_clients.mjs"), &copy).unwrap();
    let run = Command::new("node").arg("--test").arg(&copy).env("SARAI_URL", &sarai.url).output().unwrap();
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{said}");
    assert!(said.contains("pass 11"), "{said}");
}
