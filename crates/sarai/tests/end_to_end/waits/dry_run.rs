//! What is found out about files while nobody asks for anything.

use std::time::{Duration, Instant};

use crate::support::{Sarai, qwen, smollm2};

#[tokio::test]
async fn a_dry_run_refines_the_plan_once_the_server_is_idle_and_is_remembered() {
    let state = tempfile::tempdir().unwrap();
    let model = |name: &str, path: String| {
        format!("  {name}: {{ backend: gguf_native, gguf_path: {path}, context_length: 512 }}\n")
    };
    let config = format!("memory: {{ max_ram_gb: 2 }}\nmodels:\n{}{}", model("a", smollm2()), model("b", qwen()));
    let path = state.path().display().to_string();
    let sarai = Sarai::start_with_env(&config, &[("SARAI_STATE_DIR", &path)]);
    let started = Instant::now();
    let learned = || std::fs::read_to_string(state.path().join("learned.json")).unwrap_or_default();
    while learned().matches("\"weights\"").count() < 2 {
        assert!(started.elapsed().as_secs() < 60, "no dry run: {}", learned());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(sarai.worker_pids().await.is_empty(), "nothing was loaded for it");
}
