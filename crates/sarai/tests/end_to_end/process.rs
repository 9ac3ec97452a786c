//! Commands as deployments: started, measured, stopped with all that they started. The command is another sarai, a real
//! server of OpenAI's API whose worker is a process of its own.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Answer, BINARY, Sarai, chat, is_alive, minilm, smollm2};
use futures_util::StreamExt;
use serde_json::json;

/// `small`, served by a sarai that this one starts.
fn config(folder: &std::path::Path, more: &str) -> String {
    config_of(&smollm2(), folder, more)
}

/// The same with another file.
fn config_of(file: &str, folder: &std::path::Path, more: &str) -> String {
    let inner = folder.join("inner.yaml");
    std::fs::write(
        &inner,
        format!(
            "models:\n  small: {{ backend: gguf_native, gguf_path: {file}, context_length: 1024, pinned: true }}\n"
        ),
    )
    .unwrap();
    format!(
        "models:\n  small:\n    backend: process\n    command: {BINARY} serve --listen 127.0.0.1:${{PORT}} --config {}\n    env: {{ SARAI_STATE_DIR: {} }}\n    memory_gb: 1.5\n    parallel: 2\n{more}",
        inner.display(),
        folder.join("inner-state").display()
    )
}

async fn ask(sarai: &Sarai, more: serde_json::Value) -> Answer {
    sarai.post("/v1/chat/completions", chat("small", "Name three colours.", more)).await
}

/// Every process whose command line names this folder.
fn processes_of(folder: &std::path::Path) -> Vec<u64> {
    let name = folder.display().to_string();
    let pids =
        std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let names_it = |pid: &u64| {
        std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).contains(&name))
    };
    pids.filter(|pid| names_it(pid) && *pid != u64::from(std::process::id())).collect()
}

/// A process and what descends from it.
fn tree(pid: u64) -> Vec<u64> {
    let pids = sarai_server::machine::process::tree(u32::try_from(pid).unwrap());
    pids.into_iter().map(u64::from).collect()
}

async fn until_gone(what: &str, pids: &[u64]) {
    let began = Instant::now();
    while pids.iter().any(|&pid| is_alive(pid)) {
        assert!(began.elapsed() < Duration::from_secs(20), "{what}: {pids:?} are still there");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_command_is_started_by_its_first_request_measured_as_a_tree_and_stopped_when_idle() {
    let folder = tempfile::tempdir().unwrap();
    let sarai = Sarai::start(&config(folder.path(), "    keep_alive: 1s\n"));
    assert!(processes_of(folder.path()).is_empty(), "nothing runs before it is asked for");
    let scores = json!({ "model": "small", "query": "a", "documents": ["b"] });
    let scores = sarai.post("/v1/rerank", scores.to_string()).await;
    assert!(scores.status == 503 && scores.text.contains("not asked for scores"), "{}", scores.text);
    let whole = ask(&sarai, json!({})).await;
    assert_eq!((whole.status, whole.header("x-sarai-served-by")), (200, Some("small@process")), "{}", whole.text);
    let text = whole.json()["choices"][0]["message"]["content"].clone();
    let streamed = ask(&sarai, json!({ "stream": true, "stream_options": { "include_usage": true } })).await;
    let said: String =
        streamed.sse().iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, said.as_str());
    assert_eq!(
        streamed.sse().last().unwrap()["usage"]["completion_tokens"],
        whole.json()["usage"]["completion_tokens"]
    );
    let ps = sarai.ps().await;
    let worker = &ps["workers"][0];
    let pids = tree(worker["pid"].as_u64().unwrap());
    assert!(pids.len() >= 3, "a shepherd, the command and its worker: {pids:?}");
    let (measured, claimed) = (
        worker["anonymous_bytes"].as_u64().unwrap() + worker["file_bytes"].as_u64().unwrap(),
        worker["claimed_bytes"].as_u64().unwrap(),
    );
    assert!(measured > 100 << 20, "the weights of its worker count: {worker}");
    assert!((3 << 29..measured + (3 << 29)).contains(&claimed), "what is declared is booked: {worker}");
    sarai.until("it is stopped", |ps| ps["workers"].as_array().unwrap().is_empty()).await;
    until_gone("idle", &pids).await;
    // The next one is planned with what was measured.
    assert_eq!(ask(&sarai, json!({})).await.status, 200);
    let planned = sarai.ps().await["workers"][0]["planned_bytes"].as_u64().unwrap();
    assert!((100 << 20..3 << 29).contains(&planned), "{planned}");
    let pids = processes_of(folder.path());
    drop(sarai);
    until_gone("the server is stopped", &pids).await;
}

#[tokio::test]
async fn nothing_of_a_command_is_left_whatever_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    for victim in ["server", "shepherd", "command"] {
        let mut sarai = Sarai::start(&config(folder.path(), ""));
        assert_eq!(ask(&sarai, json!({ "max_tokens": 2 })).await.status, 200);
        let shepherd = sarai.worker_pids().await[0];
        let pids = tree(shepherd);
        let pid = match victim {
            "server" => u64::from(sarai.pid()),
            "shepherd" => shepherd,
            _ => pids[1],
        };
        assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
        if victim == "server" {
            sarai.child.wait().unwrap();
        }
        until_gone(victim, &pids).await;
        if victim != "server" {
            let again = ask(&sarai, json!({ "max_tokens": 2 })).await;
            assert_eq!(again.status, 200, "it is started again: {}", again.text);
        }
    }
}

/// Nobody waits until it is gone: who asks at once gets an answer of the next one.
#[tokio::test]
async fn a_command_that_is_killed_costs_vectors_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let sarai = Sarai::start(&config_of(&minilm(), folder.path(), "    role: embedding\n"));
    let body = json!({ "model": "small", "input": "words" }).to_string();
    let before = sarai.post("/v1/embeddings", body.clone()).await;
    assert_eq!(before.status, 200, "{}", before.text);
    let command = tree(sarai.worker_pids().await[0])[1];
    assert!(Command::new("kill").args(["-KILL", &command.to_string()]).status().unwrap().success());
    let after = sarai.post("/v1/embeddings", body).await;
    assert_eq!(after.status, 200, "{}", after.text);
    assert_eq!(after.json()["data"], before.json()["data"]);
}

#[tokio::test]
async fn what_cannot_run_is_said_so_and_the_fallback_answers() {
    let fallback =
        format!("    fallback: gguf_native\n    gguf_path: {}\n    deadlines: {{ load_seconds: 2 }}\n", smollm2());
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let cases = [
        ("command: no-such-program ${PORT}".to_owned(), "no-such-program"),
        ("command: [sh, -c, 'echo its last words >&2; exit 3', '${PORT}']".to_owned(), "its last words"),
        ("command: [sh, -c, 'sleep 100', '${PORT}']".to_owned(), "load_seconds"),
        (format!("command: sleep 60\n    port: {port}"), "cannot be used"),
    ];
    for (command, reason) in cases {
        let sarai = Sarai::start(&format!(
            "models:\n  small:\n    backend: process\n    {command}\n    memory_gb: 0.1\n{fallback}"
        ));
        let answer = ask(&sarai, json!({ "max_tokens": 2 })).await;
        assert_eq!(
            (answer.status, answer.header("x-sarai-served-by")),
            (200, Some("small@gguf_native")),
            "{}",
            answer.text
        );
        let said = answer.header("x-sarai-fallback-reason").unwrap();
        assert!(said.contains(reason), "{command}: {said}");
    }
}

#[tokio::test]
async fn a_stream_of_a_command_that_is_killed_goes_on_at_the_fallback_and_its_log_is_ours() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let fallback = format!("    fallback: gguf_native\n    gguf_path: {}\n    context_length: 1024\n", smollm2());
    let sarai = Sarai::start_with(&config(folder.path(), &fallback), Stdio::from(std::fs::File::create(&log).unwrap()));
    let body = chat("small", "Write a long story.", json!({ "stream": true, "max_tokens": 200 }));
    let response = sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(body).send().await.unwrap();
    assert_eq!(response.headers()["x-sarai-served-by"], "small@process");
    let mut chunks = response.bytes_stream();
    let mut seen = String::new();
    while !seen.contains("\"content\":\" ") {
        seen.push_str(&String::from_utf8_lossy(&chunks.next().await.unwrap().unwrap()));
    }
    let shepherd = sarai.worker_pids().await[0];
    assert!(Command::new("kill").args(["-KILL", &tree(shepherd)[1].to_string()]).status().unwrap().success());
    while let Some(Ok(chunk)) = chunks.next().await {
        seen.push_str(&String::from_utf8_lossy(&chunk));
    }
    assert!(
        seen.ends_with("data: [DONE]\n\n") && seen.contains("\"resumed\":[{\"by\":\"small@gguf_native\""),
        "{seen}"
    );
    let log = std::fs::read_to_string(&log).unwrap();
    assert!(log.contains("process") && log.contains("loaded"), "what the command writes is in the log: {log}");
}

#[tokio::test]
async fn mistakes_in_the_configuration_of_a_command_are_told_with_their_fix() {
    let folder = tempfile::tempdir().unwrap();
    for (lines, says) in [
        ("memory_gb: 1", "command: is missing"),
        ("command: serve", "does not say where it listens"),
        ("command: serve ${PORT}", "memory_gb: is missing"),
        ("command: \"serve '${PORT}\"\n    memory_gb: 1", "close the quotes"),
        ("command: serve ${PORT}\n    memory_gb: 1\n    ready_path: health", "begin it with /"),
        ("command: serve\n    port: 70000\n    memory_gb: 1", "from 1 to 65535"),
    ] {
        let file = folder.path().join("sarai.yaml");
        std::fs::write(&file, format!("models:\n  small:\n    backend: process\n    {lines}\n")).unwrap();
        let output = Command::new(BINARY).args(["check", "--config"]).arg(&file).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success() && said.contains(says), "{lines}: {said}");
    }
}

/// llama.cpp's own server, from its package on PyPI.
#[tokio::test]
async fn a_real_server_from_pypi_is_run_and_what_only_it_can_do_passes_through() {
    let python = std::env::var("SARAI_PYTHON").expect("SARAI_PYTHON names no Python: run `make test`");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/clients/llama_server.py");
    let sarai = Sarai::start(&format!(
        "models:\n  small:\n    backend: process\n    command: [{python}, {script}, {}, '${{PORT}}']\n    memory_gb: 0.8\n",
        smollm2()
    ));
    let more = json!({ "logprobs": true, "top_logprobs": 2, "max_tokens": 6 });
    let whole = ask(&sarai, more.clone()).await;
    assert_eq!((whole.status, whole.header("x-sarai-served-by")), (200, Some("small@process")), "{}", whole.text);
    let (whole, mut more) = (whole.json(), more);
    let known = |logprobs: &serde_json::Value| logprobs["content"].as_array().map_or(0, Vec::len);
    assert_eq!(known(&whole["choices"][0]["logprobs"]), 6, "{whole}");
    assert_eq!(whole["usage"]["completion_tokens"], 6);
    more["stream"] = true.into();
    let streamed = ask(&sarai, more).await;
    let all: usize = streamed.sse().iter().map(|event| known(&event["choices"][0]["logprobs"])).sum();
    assert_eq!(all, 6, "{}", streamed.text);
    let worker = sarai.ps().await["workers"][0].clone();
    let mapped = std::fs::metadata(smollm2()).unwrap().len();
    let taken = worker["anonymous_bytes"].as_u64().unwrap() + worker["file_bytes"].as_u64().unwrap();
    assert!(taken > mapped, "Python below the shepherd, with the weights: {worker}");
    let pids = tree(worker["pid"].as_u64().unwrap());
    drop(sarai);
    until_gone("stopped", &pids).await;
}

/// It is ready, and answers nothing that it is asked.
#[tokio::test]
async fn a_command_that_fails_again_and_again_is_left_alone_for_a_while() {
    let folder = tempfile::tempdir().unwrap();
    let (server, asked) = (folder.path().join("server.py"), folder.path().join("asked"));
    std::fs::write(
        &server,
        format!(
            "import http.server, sys\nclass Handler(http.server.BaseHTTPRequestHandler):\n    def answer(self, status):\n        self.send_response(status); self.send_header('content-length', '2'); self.end_headers(); self.wfile.write(b'{{}}')\n    def do_GET(self): self.answer(200)\n    def do_POST(self):\n        self.rfile.read(int(self.headers['content-length'])); open('{}', 'a').write('x'); self.answer(500)\n    def log_message(self, *_): pass\nhttp.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()\n",
            asked.display()
        ),
    )
    .unwrap();
    let config = format!(
        "models:\n  small:\n    backend: process\n    command: python3 {} ${{PORT}}\n    memory_gb: 0.1\n    fallback: gguf_native\n    gguf_path: {}\n    context_length: 512\n",
        server.display(),
        smollm2()
    );
    let sarai = Sarai::start(&config);
    for _ in 0..12 {
        let answer = ask(&sarai, json!({ "max_tokens": 2 })).await;
        assert_eq!(
            (answer.status, answer.header("x-sarai-served-by")),
            (200, Some("small@gguf_native")),
            "{}",
            answer.text
        );
        assert!(
            answer.header("x-sarai-fallback-reason").unwrap().contains("500"),
            "{:?}",
            answer.header("x-sarai-fallback-reason")
        );
    }
    let count = std::fs::read_to_string(&asked).unwrap().len();
    assert!((2..=6).contains(&count), "its rests grow: asked {count} times");
}
