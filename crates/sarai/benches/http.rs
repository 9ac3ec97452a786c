//! `make bench`: what the HTTP API costs over the bare engine, and what the remote path costs over asking
//! Ollama directly. All measurements of a pair are interleaved; the ratios count, not the absolutes.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a measuring tool"
)]

#[path = "../tests/end_to_end/support/mod.rs"]
mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::json;
use support::{BINARY, Ollama, Sarai, qwen, smollm2};

/// Fresh processes so often: where the system happens to place them moves a whole run by a few percent.
const STARTS: usize = 4;
const ROUNDS: usize = 6;
const REMOTE_ROUNDS: usize = 50;
const DECODED: u32 = 64;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let models = [("SmolLM2-135M", smollm2(), ["0", "2"]), ("Qwen2.5-Coder-0.5B", qwen(), ["151643", "151645"])];
    // `cargo bench … -- remote` measures the remote path alone.
    if !std::env::args().any(|arg| arg == "remote") {
        for (name, file, ends) in models {
            let mut pairs = Vec::new();
            for _ in 0..STARTS {
                runtime.block_on(local(&file, ends, &mut pairs));
            }
            show(name, &pairs);
        }
    }
    let mut pairs = Vec::new();
    for _ in 0..STARTS {
        runtime.block_on(remote(&mut pairs));
    }
    let through = median(pairs.iter().map(|pair| pair.0).collect());
    let direct = median(pairs.iter().map(|pair| pair.1).collect());
    let added = median(pairs.iter().map(|pair| pair.0 - pair.1).collect());
    println!(
        "remote first token   through sarai {through:.2} ms   direct {direct:.2} ms   added {added:.2} ms at the median of {} pairs",
        pairs.len()
    );
}

fn show(name: &str, pairs: &[(Rate, Rate)]) {
    for (what, of) in [("prefill", (|rate| rate.prefill) as fn(&Rate) -> f64), ("decode", |rate| rate.decode)] {
        let http = median(pairs.iter().map(|pair| of(&pair.0)).collect());
        let bare = median(pairs.iter().map(|pair| of(&pair.1)).collect());
        // Of neighbours in time: the machine's drift is in both.
        let ratio = median(pairs.iter().map(|pair| of(&pair.0) / of(&pair.1)).collect());
        println!(
            "{name:<20} {what:<8} http {http:8.1} tokens/s   bare {bare:8.1} tokens/s   ratio {ratio:.3} at the median of {} pairs",
            pairs.len()
        );
    }
}

/// Tokens per second of one request: prefill (to the first token) and decode.
struct Rate {
    prefill: f64,
    decode: f64,
}

async fn local(file: &str, ends: [&str; 2], pairs: &mut Vec<(Rate, Rate)>) {
    let engine = Path::new(BINARY).parent().unwrap().join("examples/bare_engine");
    let mut bare =
        Command::new(engine).arg(file).args(ends).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut to_bare = bare.stdin.take().unwrap();
    let mut from_bare = BufReader::new(bare.stdout.take().unwrap());
    let sarai =
        Sarai::start(&format!("models:\n  m: {{ backend: gguf_native, gguf_path: {file}, context_length: 2048 }}\n"));
    for round in 0..=ROUNDS {
        // Another beginning each time: nothing of the prompt is in the cache.
        let prompt = format!("{round} {}", "is a number, and the story of it is long and old. ".repeat(24));
        let mut ask_bare = || {
            writeln!(to_bare, "{prompt}").unwrap();
            let mut line = String::new();
            from_bare.read_line(&mut line).unwrap();
            let n: Vec<f64> = line.split_whitespace().map(|n| n.parse().unwrap()).collect();
            Rate { prefill: n[0] / n[1], decode: n[2] / n[3] }
        };
        let (first, second);
        if round % 2 == 0 {
            first = ask_bare();
            second = through_http(&sarai, &prompt, ends).await;
        } else {
            second = through_http(&sarai, &prompt, ends).await;
            first = ask_bare();
        }
        // The first round warms both up.
        if round > 0 {
            pairs.push((second, first));
        }
    }
    drop(to_bare);
    bare.wait().unwrap();
}

async fn through_http(sarai: &Sarai, prompt: &str, ends: [&str; 2]) -> Rate {
    let body = json!({
        "model": "m", "prompt": prompt, "max_tokens": DECODED, "temperature": 0, "stream": true,
        "stream_options": { "include_usage": true }, "logit_bias": { ends[0]: -100, ends[1]: -100 },
    });
    let started = Instant::now();
    let request = sarai.client.post(format!("{}/v1/completions", sarai.url)).body(body.to_string());
    let mut chunks = request.send().await.unwrap().bytes_stream();
    let (mut text, mut first, mut last) = (Vec::new(), None, started.elapsed());
    while let Some(chunk) = chunks.next().await {
        text.extend_from_slice(&chunk.unwrap());
        last = started.elapsed();
        first.get_or_insert(last);
    }
    let first = first.unwrap();
    let text = String::from_utf8(text).unwrap();
    let usage = text.lines().rev().find(|line| line.contains("prompt_tokens")).unwrap();
    let usage: serde_json::Value = serde_json::from_str(usage.trim_start_matches("data: ")).unwrap();
    let (prompt, decoded) =
        (usage["usage"]["prompt_tokens"].as_f64().unwrap(), usage["usage"]["completion_tokens"].as_f64().unwrap());
    assert!((decoded - f64::from(DECODED)).abs() < 0.5, "{usage}");
    Rate { prefill: prompt / first.as_secs_f64(), decode: (decoded - 1.0) / (last - first).as_secs_f64() }
}

async fn remote(pairs: &mut Vec<(f64, f64)>) {
    let ollama = Ollama::start();
    let sarai = Sarai::start(&format!("models:\n  solar: {{ backend: ollama_http, url: \"{}\" }}\n", ollama.url));
    let body = json!({ "model": "solar", "messages": [{ "role": "user", "content": "Hi" }], "options": { "num_predict": 2, "temperature": 0 } });
    let first_token = async |url: &str| {
        let started = Instant::now();
        let request = sarai.client.post(format!("{url}/api/chat")).body(body.to_string());
        let mut chunks = request.send().await.unwrap().bytes_stream();
        chunks.next().await.unwrap().unwrap();
        let first = started.elapsed();
        while chunks.next().await.is_some() {}
        first
    };
    for round in 0..REMOTE_ROUNDS + 5 {
        let (a, b) = if round % 2 == 0 { (&sarai.url, &ollama.url) } else { (&ollama.url, &sarai.url) };
        let (a, b) = (first_token(a).await, first_token(b).await);
        let (through, direct) = if round % 2 == 0 { (a, b) } else { (b, a) };
        if round >= 5 {
            pairs.push((ms(through), ms(direct)));
        }
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
