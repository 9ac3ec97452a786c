//! What tries forms and what checks answers: how much they may take, and that it is booked meanwhile.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::{BINARY, Sarai, Watch, chat, qwen, sketch, smollm2};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// What the validator says of one claim, if it comes to its end within so much memory.
fn verdict(schema: &Value, text: &str, most_bytes: u64) -> Option<Value> {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut validator = Command::new(BINARY)
        .args(["worker", "validate", "a test"])
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let claims = json!([{ "schema": schema.to_string(), "text": text }]).to_string();
    let mut said = Vec::new();
    // One that has ended reads no more.
    let _ = ours.write_all(&most_bytes.to_le_bytes()).and_then(|()| ours.write_all(claims.as_bytes()));
    let _ = ours.shutdown(std::net::Shutdown::Write);
    let _ = ours.read_to_end(&mut said);
    let ended_well = validator.wait().unwrap().success();
    ended_well.then(|| serde_json::from_slice::<Value>(&said).unwrap()[0].clone())
}

#[test]
fn a_validator_keeps_to_the_memory_and_the_time_that_it_has() {
    let patterns = |count: usize| {
        let property = |n: usize| (format!("p{n}"), json!({ "type": "string", "pattern": "^[a-z]{1,9}$" }));
        json!({ "properties": (0..count).map(property).collect::<serde_json::Map<_, _>>(), "not": { "const": 1 } })
    };
    assert_eq!(verdict(&patterns(1000), "{\"p1\":\"abc\"}", 16 * MIB), Some(json!("valid")));
    let broken = verdict(&patterns(1000), "{\"p1\":\"ABC\"}", 16 * MIB).unwrap();
    assert!(broken["broken"].as_str().unwrap().contains("/p1"), "{broken}");
    assert_eq!(verdict(&patterns(1000), "{}", 2 * MIB), None, "as much as it has, and no more");
    // Twice as long with each.
    let part = |n: usize| json!({ "allOf": [{ "$ref": format!("#/$defs/{}", n + 1) }, { "$ref": format!("#/$defs/{}", n + 1) }] });
    let mut parts: serde_json::Map<_, _> = (0..40).map(|n| (n.to_string(), part(n))).collect();
    parts.insert("40".into(), json!({ "type": "integer" }));
    assert_eq!(verdict(&json!({ "$ref": "#/$defs/0", "$defs": parts }), "1", 16 * MIB), None, "its time is over");
}

/// A grammar whose trial takes all the time that it may have.
fn slow_grammar() -> String {
    let rules: String = (0..30).map(|n| format!("r{n} ::= r{0} | r{0} \"a\"\n", n + 1)).collect();
    format!("root ::= r0\n{rules}r30 ::= \"b\" | \"bb\"\n")
}

/// What a worker writes meanwhile would be there twice, and in no plan.
#[tokio::test]
async fn the_copy_in_which_a_form_is_tried_has_neither_weights_nor_cache_nor_scratch() {
    let sarai = Sarai::start(&format!(
        "models:\n  coder: {{ backend: gguf_native, gguf_path: {}, context_length: 2048, parallel: 2 }}\n",
        qwen()
    ));
    assert_eq!(sarai.post("/v1/chat/completions", chat("coder", "Hi", json!({ "max_tokens": 1 }))).await.status, 200);
    let worker = sarai.worker_pids().await[0];
    let slow = json!({ "max_tokens": 1, "grammar": slow_grammar() });
    let mut asked = std::pin::pin!(sarai.post("/v1/chat/completions", chat("coder", "Hi", slow)));
    let mut copies = Vec::new();
    let answer = loop {
        tokio::select! {
            answer = &mut asked => break answer,
            () = tokio::time::sleep(Duration::from_millis(5)) => copies.extend(writable_of_children(worker)),
        }
    };
    assert_eq!(answer.status, 400, "{}", answer.text);
    let own = writable(worker).unwrap();
    let largest = copies.iter().copied().max().expect("a copy was seen");
    assert!(largest + (80 << 20) < own, "the copy may write to {largest} bytes, the worker to {own}");
}

/// What a process may write to, in bytes.
fn writable(pid: u64) -> Option<u64> {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    Some(statm.split_whitespace().nth(5)?.parse::<u64>().ok()? * 4096)
}

fn writable_of_children(pid: u64) -> Vec<u64> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().filter_map(Result::ok);
    let listed = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let pids: Vec<u64> = listed
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect();
    pids.into_iter().filter_map(writable).filter(|bytes| *bytes > 0).collect()
}

/// The trial of this one takes all the time that it may have; it is refused, and nothing is booked for it afterwards.
#[tokio::test]
async fn what_a_trial_may_take_is_booked_for_as_long_as_it_takes() {
    let sarai = Sarai::start(&format!(
        "models:\n  tiny: {{ backend: gguf_native, gguf_path: {}, context_length: 512 }}\n",
        smollm2()
    ));
    let first = sarai.post("/v1/chat/completions", chat("tiny", "Hi", json!({ "max_tokens": 1 }))).await;
    assert_eq!(first.status, 200, "{}", first.text);
    let claimed = async || sarai.ps().await["claimed_bytes"].as_u64().unwrap();
    let slow = slow_grammar();
    let before = claimed().await;
    let asked = sarai.post("/v1/chat/completions", chat("tiny", "Hi", json!({ "grammar": slow, "max_tokens": 2 })));
    let is_booked = |ps: &Value| ps["claimed_bytes"].as_u64().unwrap() >= before + 15 * MIB;
    let (answer, ()) = tokio::join!(asked, sarai.until("it is booked", is_booked));
    assert_eq!(answer.status, 400, "{}", answer.text);
    sarai.until("it is given back", |ps| ps["claimed_bytes"].as_u64().unwrap() < before + 8 * MIB).await;
}

/// A large vocabulary is written down at each token that the grammar refuses.
#[tokio::test]
async fn an_answer_that_follows_a_form_takes_no_more_than_plan_and_loan() {
    let sarai = Sarai::start(&format!(
        "models:\n  coder: {{ backend: gguf_native, gguf_path: {}, context_length: 1024, parallel: 2 }}\n",
        qwen()
    ));
    let ask = async |more: Value| {
        let answer = sarai.post("/v1/chat/completions", chat("coder", "Name a colour.", more)).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
    };
    ask(json!({ "max_tokens": 1 })).await;
    let worker = sarai.ps().await["workers"][0].clone();
    let watch = Watch::of(worker["pid"].as_u64().unwrap());
    let grammar = json!({ "grammar": "root ::= \"<\" [a-z]{2,30} \">\"", "max_tokens": 30, "temperature": 1.5 });
    tokio::join!(ask(grammar.clone()), ask(grammar));
    let (most, of) = (watch.most(), |key: &str| worker[key].as_u64().unwrap());
    let lent = sarai_core::form_bytes(151_936).0;
    assert!(most + of("file_bytes") <= of("planned_bytes") + lent, "{most}: {worker}");
}

/// A short round of `make fuzz`: broken pictures and sound, and schemas, grammars and tools by chance. It ends at the first answer that is neither
/// a 200 that keeps its form nor a 400 with a reason, and when a worker dies.
#[test]
fn what_is_broken_or_hostile_is_answered_or_refused_and_ends_nobody() {
    let python = std::env::var("SARAI_PYTHON").expect("SARAI_PYTHON names no Python with the clients: run `make test`");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/fuzz.py");
    let folder = tempfile::tempdir().unwrap();
    let run = Command::new(python)
        .args([script, BINARY, &sketch("sensing"), &qwen(), "--minutes", "0.1", "--seed", "3"])
        .current_dir(folder.path())
        .output()
        .unwrap();
    let (said, complained) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success() && said.contains("schema   200"), "{said}{complained}");
}
