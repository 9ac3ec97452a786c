//! What a client hears while a model is loaded for it.

use crate::support::host::{Host, Step};
use crate::support::{BINARY, Sarai, chat, qwen};
use serde_json::{Value, json};

fn config(model: &str) -> String {
    format!(
        "server: {{ heartbeat_seconds: 0.005 }}\nmodels:\n  coder: {{ backend: gguf_native, gguf_path: {model}, context_length: 512 }}\n"
    )
}

#[tokio::test]
async fn a_stream_that_waits_for_a_load_says_how_far_it_is_and_then_answers() {
    let more = json!({ "stream": true, "max_tokens": 4, "temperature": 0 });
    let sarai = Sarai::start(&config(&qwen()));
    let answer = sarai.post("/v1/chat/completions", chat("coder", "Hello.", more.clone())).await;
    let comments: Vec<_> = answer.text.lines().filter_map(|line| line.strip_prefix(": loading, ")).collect();
    let percents: Vec<u32> =
        comments.iter().map(|comment| comment.strip_suffix(" %").unwrap().parse().unwrap()).collect();
    assert!(percents.is_sorted() && percents.iter().any(|percent| *percent > 0), "{}", answer.text);
    let first = answer.text.find("data: ").unwrap();
    assert!(!answer.text[first..].contains("\n: "), "no word of it once the answer has begun: {}", answer.text);
    let chunks = answer.sse();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert!(
        chunks.iter().any(|chunk| chunk["sarai"]["served_by"] == "coder@gguf_native")
            && answer.text.ends_with("[DONE]\n\n")
    );
    let warm = sarai.post("/v1/chat/completions", chat("coder", "Hello.", more)).await;
    assert!(!warm.text.contains(": loading") && warm.header("x-sarai-served-by").is_some());

    let sarai = Sarai::start(&config(&qwen()));
    let body =
        json!({ "model": "coder", "messages": [{ "role": "user", "content": "Hi" }], "options": { "num_predict": 4 } });
    let lines = sarai.post("/api/chat", body.to_string()).await.lines();
    let waits: Vec<&Value> = lines.iter().filter(|line| line["sarai"].get("loading_percent").is_some()).collect();
    assert!(!waits.is_empty(), "{lines:?}");
    for line in waits {
        assert_eq!(
            (&line["message"]["content"], &line["done"]),
            (&json!(""), &json!(false)),
            "clients take it as an empty piece"
        );
    }
    assert_eq!(lines.last().unwrap()["done"], true);
    let sarai = Sarai::start(&config(&qwen()));
    let run = std::process::Command::new(BINARY).args(["run", "--url", &sarai.url, "coder", "Hi"]).output().unwrap();
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success() && said.contains("loading, "), "{said}");
}

/// Nothing of it is sent before it is checked, which may take as long as the whole answer.
#[tokio::test]
async fn a_stream_that_is_held_back_says_that_it_is_waited_for() {
    let sarai = Sarai::start(&config(&qwen()));
    let schema = json!({ "type": "array", "items": { "type": "integer", "maximum": 100000 }, "minItems": 40, "maxItems": 60, "uniqueItems": false, "contains": { "type": "integer" } });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "it", "schema": schema } });
    let more = json!({ "stream": true, "response_format": format, "temperature": 0, "max_tokens": 400 });
    sarai.post("/v1/chat/completions", chat("coder", "Hi", json!({ "max_tokens": 1 }))).await;
    let answer = sarai.post("/v1/chat/completions", chat("coder", "Numbers.", more)).await;
    assert!(answer.text.starts_with(": waiting\n\n"), "{}", answer.text);
    let text: String = answer
        .sse()
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().map(str::to_owned))
        .collect();
    let numbers: Vec<i64> = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{}", answer.text));
    assert!((40..=60).contains(&numbers.len()) && answer.text.ends_with("[DONE]\n\n"), "{}", answer.text);
}

/// Only a load is told of: whoever waits for anything else still gets the status of its failure.
#[tokio::test]
async fn a_failure_keeps_its_status_where_nothing_is_loaded() {
    let host = Host::start(|_, _| vec![Step::Hold]);
    let config = format!(
        "server: {{ heartbeat_seconds: 0.005 }}\nmodels:\n  far: {{ backend: ollama_http, url: \"{}\", deadlines: {{ first_token_seconds: 1 }} }}\n",
        host.url
    );
    let sarai = Sarai::start(&config);
    let failed = sarai.post("/v1/chat/completions", chat("far", "Hello.", json!({ "stream": true }))).await;
    assert_eq!(failed.status, 504, "{}", failed.text);
}

/// A load that fails after it was told of is an error in the stream.
#[tokio::test]
async fn a_load_that_fails_after_all_is_an_error_in_the_stream() {
    let short =
        config(&qwen()).replace("context_length: 512", "context_length: 512, deadlines: { load_seconds: 0.12 }");
    let sarai = Sarai::start(&short);
    let failed = sarai.post("/v1/chat/completions", chat("coder", "Hello.", json!({ "stream": true }))).await;
    assert_eq!(failed.status, 200);
    assert!(failed.text.starts_with(": ") && !failed.text.contains("[DONE]"), "{}", failed.text);
    let error = failed.sse().pop().unwrap();
    assert!(error["error"]["message"].as_str().unwrap().contains("load"), "{error}");
}
