//! What must be survived: killed workers, broken files, bad bodies, slow clients, signals.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Answer, Sarai, chat, is_alive, sketch, smollm2};
use futures_util::StreamExt;
use serde_json::json;

fn config() -> String {
    format!(
        "models:\n  lfm2: {{ backend: gguf_native, gguf_path: {}, context_length: 4096, parallel: 2 }}\n",
        smollm2()
    )
}

fn endless(stream: bool) -> String {
    chat(
        "lfm2",
        "Write a very long story.",
        json!({ "stream": stream, "max_tokens": 4000, "logit_bias": { "2": -100, "0": -100 } }),
    )
}

fn kill(pid: u64) {
    assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
}

#[tokio::test]
async fn a_worker_killed_in_mid_answer_is_started_again_and_the_answer_goes_on() {
    let sarai = Sarai::start(&config());
    let body = || {
        chat(
            "lfm2",
            "Write a long story.",
            json!({ "stream": true, "max_tokens": 120, "stream_options": { "include_usage": true } }),
        )
    };
    let whole = sarai.post("/v1/chat/completions", body()).await;
    let response = sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(body()).send().await.unwrap();
    let mut chunks = response.bytes_stream();
    let mut seen = Vec::new();
    while seen.iter().filter(|&&byte| byte == b'\n').count() < 40 {
        seen.extend_from_slice(&chunks.next().await.unwrap().unwrap());
    }
    kill(sarai.worker_pids().await[0]);
    while let Some(chunk) = chunks.next().await {
        seen.extend_from_slice(&chunk.unwrap());
    }
    let resumed = Answer { status: 200, headers: whole.headers.clone(), text: String::from_utf8(seen).unwrap() };
    let text = |answer: &Answer| -> String {
        answer
            .sse()
            .iter()
            .filter_map(|event| event["choices"][0]["delta"]["content"].as_str().map(str::to_owned))
            .collect()
    };
    assert_eq!(text(&resumed), text(&whole), "as if nothing had happened");
    assert_eq!(
        resumed.sse().last().unwrap()["usage"]["completion_tokens"],
        whole.sse().last().unwrap()["usage"]["completion_tokens"]
    );
    assert!(resumed.text.contains("\"resumed\""), "and it says so: {}", resumed.text);
}

#[tokio::test]
async fn where_nobody_may_resume_a_killed_worker_gives_an_error_event_at_once_and_the_next_request_is_served() {
    let sarai = Sarai::start(&config().replace("parallel: 2", "parallel: 2, resume: never"));
    for api in ["/v1/chat/completions", "/api/chat"] {
        let body = if api == "/api/chat" {
            json!({ "model": "lfm2", "messages": [{ "role": "user", "content": "Write a long story." }] }).to_string()
        } else {
            endless(true)
        };
        let response = sarai.client.post(format!("{}{api}", sarai.url)).body(body).send().await.unwrap();
        let mut chunks = response.bytes_stream();
        let mut seen = chunks.next().await.unwrap().unwrap().to_vec();
        kill(sarai.worker_pids().await[0]);
        let killed = Instant::now();
        while let Some(chunk) = chunks.next().await {
            seen.extend_from_slice(&chunk.unwrap());
        }
        let seen = String::from_utf8(seen).unwrap();
        assert!(seen.lines().last().is_some_and(|_| seen.contains("ended unexpectedly")), "{api}: {seen}");
        assert!(!seen.contains("[DONE]") && !seen.contains("\"done\":true"), "never a clean end: {seen}");
        assert!(killed.elapsed() < Duration::from_secs(2), "at once, not after {:?}", killed.elapsed());
        let next = sarai.post("/v1/chat/completions", chat("lfm2", "Hi", json!({}))).await;
        assert_eq!(next.status, 200, "{}", next.text);
        assert_eq!(sarai.worker_pids().await.len(), 1, "nothing leaks");
    }
}

#[tokio::test]
async fn sigterm_drains_what_runs_and_ends_every_child() {
    let mut sarai = Sarai::start(&config());
    let body = chat("lfm2", "Write a story.", json!({ "stream": true, "max_tokens": 60 }));
    let response = sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(body).send().await.unwrap();
    let mut chunks = response.bytes_stream();
    let mut seen = chunks.next().await.unwrap().unwrap().to_vec();
    let worker = sarai.worker_pids().await[0];
    Command::new("kill").args(["-TERM", &sarai.pid().to_string()]).status().unwrap();
    while let Some(chunk) = chunks.next().await {
        seen.extend_from_slice(&chunk.unwrap());
    }
    assert!(String::from_utf8(seen).unwrap().ends_with("data: [DONE]\n\n"), "the answer was drained");
    assert!(sarai.child.wait().unwrap().success());
    assert!(!is_alive(worker), "the worker outlived its server");
}

#[tokio::test]
async fn a_worker_killed_before_the_first_token_costs_its_request_nothing() {
    let sarai = Sarai::start(&config());
    sarai.post("/api/generate", r#"{"model":"lfm2"}"#).await;
    let worker = sarai.worker_pids().await[0];
    // A long prompt: there is time to kill the worker while it computes it.
    let body = chat("lfm2", &"word ".repeat(1200), json!({ "stream": true, "max_tokens": 4 }));
    let asked = tokio::spawn(sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(body).send());
    sarai.until("it computes", |ps| ps["workers"][0]["busy"] == 1).await;
    kill(worker);
    let answer = Answer::of(asked.await.unwrap().unwrap()).await;
    assert!(answer.status == 200 && answer.text.ends_with("data: [DONE]\n\n"), "{}", answer.text);
    assert_ne!(sarai.worker_pids().await, [worker]);
}

/// llama.cpp ends the process at a vocabulary that has a token twice.
#[tokio::test]
async fn a_file_that_ends_the_worker_is_told_with_llama_cpps_own_words() {
    let mut bytes = std::fs::read(sketch("sensing/reciting/reasoning.gguf")).unwrap();
    let at = bytes.windows(4).position(|four| four == b"-two").unwrap();
    bytes[at..at + 4].copy_from_slice(b"blue");
    let files = tempfile::tempdir().unwrap();
    let file = files.path().join("twice.gguf");
    std::fs::write(&file, bytes).unwrap();
    let sarai = Sarai::start(&format!("models:\n  twice: {{ backend: gguf_native, gguf_path: {} }}\n", file.display()));
    let answer = sarai.post("/v1/chat/completions", chat("twice", "Hi", json!({}))).await;
    assert!(answer.status >= 500 && answer.text.contains("GGML_ASSERT(id_to_token"), "{}", answer.text);
}

#[tokio::test]
async fn a_deeply_nested_schema_is_an_error_of_its_request_alone() {
    let sarai = Sarai::start(&config());
    let nested = format!("{}true{}", "{\"not\":".repeat(120), "}".repeat(120));
    let body = format!(
        r#"{{"model":"lfm2","stream":false,"options":{{"num_predict":2}},"format":{nested},"messages":[{{"role":"user","content":"Hi"}}]}}"#
    );
    sarai.post("/api/generate", r#"{"model":"lfm2"}"#).await;
    let worker = sarai.worker_pids().await;
    let answer = sarai.post("/api/chat", body).await;
    assert!([200, 400].contains(&answer.status), "{}", answer.text);
    // The deepest body that is read has 126 schemas in each other; one more is beyond what JSON is read to.
    for (depth, status) in [(126, 200), (127, 400), (100_000, 400)] {
        let nested =
            format!("{}true{}", "{\"type\":\"array\",\"maxItems\":1,\"items\":".repeat(depth), "}".repeat(depth));
        let body = format!(
            r#"{{"model":"lfm2","stream":false,"options":{{"num_predict":8}},"format":{nested},"messages":[{{"role":"user","content":"Hi"}}]}}"#
        );
        let answer = sarai.post("/api/chat", body).await;
        assert_eq!(answer.status, status, "{depth}: {}", answer.text);
    }
    assert_eq!(sarai.worker_pids().await, worker, "the worker lives");
}

#[tokio::test]
async fn a_server_that_is_killed_leaves_no_worker_behind_even_one_that_computes() {
    let mut sarai = Sarai::start(&config());
    let running =
        sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(endless(true)).send().await.unwrap();
    let worker = sarai.worker_pids().await[0];
    let _running = running;
    sarai.child.kill().unwrap();
    sarai.child.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while is_alive(worker) {
        assert!(Instant::now() < deadline, "the worker outlived its server");
        std::thread::yield_now();
    }
}

#[tokio::test]
async fn a_truncated_or_wrong_file_is_a_state_and_an_error_that_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let (cut, wrong) = (folder.path().join("cut.gguf"), folder.path().join("wrong.gguf"));
    let mut whole = std::fs::File::open(smollm2()).unwrap().take(30 << 20);
    std::io::copy(&mut whole, &mut std::fs::File::create(&cut).unwrap()).unwrap();
    std::fs::write(&wrong, "<html>not a model</html>").unwrap();
    let entry = |name: &str, path: &std::path::Path| {
        format!("  {name}: {{ backend: gguf_native, gguf_path: {} }}\n", path.display())
    };
    let config = format!(
        "models:\n{}{}{}",
        entry("cut", &cut),
        entry("wrong", &wrong),
        entry("missing", &folder.path().join("no.gguf"))
    );
    let sarai = Sarai::start(&config);
    for (model, says) in [("cut", "truncated"), ("wrong", "not a GGUF"), ("missing", "cannot be opened")] {
        let answer = sarai.post("/v1/chat/completions", chat(model, "Hi", json!({}))).await;
        assert_eq!(answer.status, 503, "{}", answer.text);
        let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(message.contains(says), "{message}");
    }
    let ps = sarai.ps().await;
    assert!(
        ps["models"].as_array().unwrap().iter().all(|model| model["deployments"][0]["state"] == "unavailable"),
        "{ps}"
    );
    assert_eq!((sarai.get("/health").await.status, sarai.get("/ready").await.status), (200, 503));
}

#[tokio::test]
async fn a_file_that_llama_cpp_refuses_is_reported_with_its_words() {
    // A header that is whole, of an architecture that does not exist.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.gguf");
    let mut file = b"GGUF".to_vec();
    file.extend(3_u32.to_le_bytes());
    file.extend(0_u64.to_le_bytes());
    file.extend(1_u64.to_le_bytes());
    for text in ["general.architecture", "nonesuch"] {
        file.extend((text.len() as u64).to_le_bytes());
        file.extend(text.as_bytes());
        if text != "nonesuch" {
            file.extend(8_u32.to_le_bytes());
        }
    }
    file.resize(4096, 0);
    std::fs::write(&path, file).unwrap();
    let sarai = Sarai::start(&format!("models:\n  odd: {{ backend: gguf_native, gguf_path: {} }}\n", path.display()));
    let answer = sarai.post("/v1/chat/completions", chat("odd", "Hi", json!({}))).await;
    assert_eq!(answer.status, 503, "{}", answer.text);
    assert!(answer.text.contains("nonesuch"), "llama.cpp's own reason: {}", answer.text);
    assert!(sarai.worker_pids().await.is_empty());
}

#[tokio::test]
async fn bad_requests_get_their_status_and_a_message_in_the_shape_of_their_api() {
    let sarai = Sarai::start(&config());
    let long = chat("lfm2", &"word ".repeat(9000), json!({}));
    let cases: Vec<(&str, Vec<u8>, u16, &str)> = vec![
        ("/v1/chat/completions", b"{".to_vec(), 400, "JSON"),
        ("/v1/chat/completions", b"{\"model\":\"\xff\"}".to_vec(), 400, "UTF-8"),
        ("/v1/chat/completions", chat("nobody", "Hi", json!({})).into(), 404, "lfm2"),
        ("/v1/chat/completions", chat("lfm2", "Hi", json!({ "messages": [] })).into(), 400, "at least one message"),
        ("/v1/chat/completions", chat("lfm2", "Hi", json!({ "temperature": "hot" })).into(), 400, "temperature"),
        ("/v1/chat/completions", chat("lfm2", "Hi", json!({ "temperature": -3 })).into(), 400, "from 0 to 2"),
        (
            "/v1/chat/completions",
            chat("lfm2", "Hi", json!({ "messages": [{ "role": "wizard", "content": "x" }] })).into(),
            400,
            "wizard",
        ),
        ("/v1/chat/completions", chat("lfm2", "Hi", json!({ "n": 0 })).into(), 400, "`n` is 0"),
        ("/v1/chat/completions", long.clone().into(), 400, "4096"),
        ("/v1/chat/completions", vec![b' '; 50 << 20], 413, "max_body_mb"),
        ("/v1/nothing", b"{}".to_vec(), 404, "/v1"),
        ("/v1/chat/completions", b"[1,2]".to_vec(), 400, "an object"),
        (
            "/v1/chat/completions",
            chat("lfm2", "Hi", json!({ "messages": [["user", "Hi"]] })).into(),
            400,
            "messages[0]",
        ),
        (
            "/api/chat",
            br#"{"model":"lfm2","messages":[{"role":"user","content":"x"}],"options":[0.5]}"#.to_vec(),
            400,
            "options",
        ),
        ("/api/chat", b"{".to_vec(), 400, "JSON"),
        ("/api/chat", br#"{"model":"nobody","messages":[{"role":"user","content":"x"}]}"#.to_vec(), 404, "nobody"),
        (
            "/api/chat",
            br#"{"model":"lfm2","messages":[{"role":"user","content":"x"}],"options":{"temperature":-3}}"#.to_vec(),
            400,
            "temperature",
        ),
        ("/api/generate", br#"{"model":7}"#.to_vec(), 400, "model"),
        ("/api/chat", vec![b' '; 50 << 20], 413, "max_body_mb"),
        ("/api/chat", b"{\"model\":\"\xff\"}".to_vec(), 400, "UTF-8"),
        (
            "/api/chat",
            json!({ "model": "lfm2", "truncate": false, "messages": [{ "role": "user", "content": "word ".repeat(9000) }] })
                .to_string()
                .into(),
            400,
            "4096",
        ),
        (
            "/api/chat",
            json!({ "model": "lfm2", "messages": [{ "role": "user", "content": "a\u{0}b" }] }).to_string().into(),
            400,
            "NUL",
        ),
        ("/v1/chat/completions", chat("lfm2", "Hi", json!({ "max_tokens": 0 })).into(), 400, "from 1"),
        ("/api/show", b"{}".to_vec(), 400, "model"),
    ];
    for (path, body, status, says) in cases {
        let answer = sarai.post(path, body).await;
        assert_eq!(answer.status, status, "{path} {says}: {}", answer.text);
        let error = &answer.json()["error"];
        let message = if path.starts_with("/api") { error.as_str() } else { error["message"].as_str() };
        assert!(message.unwrap().contains(says), "{path}: {error}");
    }
    let overflow = sarai.post("/v1/chat/completions", long).await.json();
    assert_eq!(overflow["error"]["code"], "context_length_exceeded");
    assert_eq!(sarai.get("/v1/chat/completions").await.status, 405);
    assert_eq!(sarai.post("/v1/chat/completions", chat("lfm2", "Hi", json!({}))).await.status, 200, "still serving");
}

#[tokio::test]
async fn a_client_that_never_reads_delays_nobody_and_frees_its_slot_when_it_goes() {
    let sarai = Sarai::start(&config());
    let address = sarai.url.trim_start_matches("http://").to_owned();
    let mut socket = std::net::TcpStream::connect(&address).unwrap();
    let body = endless(true);
    write!(socket, "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        .unwrap();
    sarai.until("it runs", |ps| ps["workers"][0]["busy"] == 1).await;
    let quick = sarai.post("/v1/chat/completions", chat("lfm2", "Hi", json!({ "max_tokens": 2 }))).await;
    assert_eq!(quick.status, 200, "{}", quick.text);
    drop(socket);
    sarai.until("its slot is free", |ps| ps["workers"][0]["busy"] == 0).await;
}

#[tokio::test]
async fn a_full_disk_for_logs_stops_nothing() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let sarai = Sarai::start_with(&config(), Stdio::from(full));
    assert_eq!(sarai.post("/v1/chat/completions", chat("lfm2", "Hi", json!({}))).await.status, 200);
    assert_eq!(sarai.post("/v1/chat/completions", chat("nobody", "Hi", json!({}))).await.status, 404);
    assert_eq!(sarai.get("/health").await.status, 200);
}

#[tokio::test]
async fn requests_beyond_the_queue_are_shed_with_429() {
    let sarai = Sarai::start(&format!("server: {{ max_in_flight: 1, max_queued: 0 }}\n{}", config()));
    let running =
        sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(endless(true)).send().await.unwrap();
    let shed = sarai.post("/v1/chat/completions", chat("lfm2", "Hi", json!({}))).await;
    assert_eq!((shed.status, shed.header("retry-after")), (429, Some("1")), "{}", shed.text);
    drop(running);
    sarai.until("the permit is back", |ps| ps["workers"][0]["busy"] == 0).await;
    assert_eq!(sarai.post("/v1/chat/completions", chat("lfm2", "Hi", json!({}))).await.status, 200);
}

#[tokio::test]
async fn an_answer_that_outlasts_the_drain_deadline_is_ended_with_an_error_not_cleanly() {
    let mut sarai = Sarai::start(&format!("server: {{ drain_seconds: 0.3 }}\n{}", config()));
    let response =
        sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(endless(true)).send().await.unwrap();
    let worker = sarai.worker_pids().await[0];
    let asked = Instant::now();
    Command::new("kill").args(["-TERM", &sarai.pid().to_string()]).status().unwrap();
    let answer = Answer::of(response).await;
    assert!(
        !answer.text.contains("[DONE]") && !answer.text.contains("\"finish_reason\":\"stop\""),
        "never a clean end"
    );
    assert!(sarai.child.wait().unwrap().success());
    assert!(asked.elapsed() < Duration::from_secs(4), "it ended after {:?}", asked.elapsed());
    assert!(!is_alive(worker));
}

#[tokio::test]
async fn a_client_that_stops_in_the_middle_of_its_body_gets_an_error() {
    let sarai = Sarai::start(&format!("server: {{ stall_seconds: 0.3 }}\n{}", config()));
    let mut socket = std::net::TcpStream::connect(sarai.url.trim_start_matches("http://")).unwrap();
    write!(socket, "POST /api/chat HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{\"model\"").unwrap();
    let mut answer = [0; 12];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 400");
}

/// As nginx does it, between two requests and before the first.
#[tokio::test]
async fn a_connection_that_says_nothing_is_closed_after_a_while() {
    let sarai = Sarai::start(&config());
    let connect = || std::net::TcpStream::connect(sarai.url.trim_start_matches("http://")).unwrap();
    let (silent, mut asked, mut half) = (connect(), connect(), connect());
    write!(asked, "GET /health HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    write!(half, "GET /health HTTP/1.1\r\nho").unwrap();
    let began = Instant::now();
    let ends = [silent, asked, half].map(|mut socket| {
        std::thread::spawn(move || {
            socket.set_read_timeout(Some(Duration::from_secs(100))).unwrap();
            let mut said = String::new();
            socket.read_to_string(&mut said).map(|_| (said, began.elapsed())).ok()
        })
    });
    let ended = ends.map(|end| end.join().unwrap().expect("it was never closed"));
    assert!(ended.iter().all(|(_, after)| *after > Duration::from_secs(70)), "too soon: {ended:?}");
    assert!(ended[1].0.starts_with("HTTP/1.1 200"), "{ended:?}");
}

/// Bodies that come slowly are held in memory together: there are eight of the largest size at most.
#[tokio::test]
async fn more_bodies_than_there_is_room_for_are_told_to_come_again() {
    let sarai = Sarai::start(&format!("server: {{ max_body_mb: 1 }}\n{}", config()));
    let half_sent = || {
        let mut socket = std::net::TcpStream::connect(sarai.url.trim_start_matches("http://")).unwrap();
        write!(socket, "POST /api/chat HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n").unwrap();
        socket.write_all(&[b' '; 999_000]).unwrap();
        socket
    };
    let mut held: Vec<_> = (0..8).map(|_| half_sent()).collect();
    let large = || sarai.post("/api/chat", " ".repeat(600_000));
    let began = Instant::now();
    let refused = loop {
        // What was sent has come once it is refused.
        let answer = large().await;
        if answer.status == 429 {
            break answer;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{}", answer.text);
        // The large one may have had the place of one that is held.
        held.push(half_sent());
    };
    assert_eq!(refused.header("retry-after"), Some("1"), "{}", refused.text);
    drop(held);
    while large().await.status == 429 {
        assert!(began.elapsed() < Duration::from_secs(20), "it is not given back");
    }
    assert_eq!(sarai.post("/v1/chat/completions", chat("lfm2", "Hi", json!({}))).await.status, 200);
}
