//! Whether a model reasons before it answers. No model that does is among the test weights: a small random one with such a template
//! shows what reaches it.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod support;

use serde_json::{Value, json};
use support::host::{Host, ollama};
use support::{Sarai, smollm2};

fn models() -> String {
    let folder = std::env::var("SARAI_SKETCHES").expect("SARAI_SKETCHES is missing: run the tests with `make test`");
    format!(
        "models:\n  thinker: {{ backend: gguf_native, gguf_path: {folder}/sensing/random/reasoning.gguf, context_length: 1024 }}\n  plain: {{ backend: gguf_native, gguf_path: {} }}\n",
        smollm2()
    )
}

#[tokio::test]
async fn reasoning_is_switched_by_the_fields_of_both_apis() {
    let sarai = Sarai::start(&models());
    let prompt_tokens = async |path: &str, more: Value| {
        let mut body = json!({
            "model": "thinker", "stream": false, "messages": [{ "role": "user", "content": "Hi" }],
            "max_tokens": 2, "options": { "num_predict": 2 },
        });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = sarai.post(path, body.to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let body = answer.json();
        body["prompt_eval_count"].as_u64().or(body["usage"]["prompt_tokens"].as_u64()).unwrap()
    };
    let usual = prompt_tokens("/api/chat", json!({})).await;
    for (path, more, thinks) in [
        ("/api/chat", json!({ "think": true }), true),
        ("/api/chat", json!({ "think": "high" }), true),
        ("/api/chat", json!({ "think": false }), false),
        ("/v1/chat/completions", json!({}), true),
        ("/v1/chat/completions", json!({ "chat_template_kwargs": { "enable_thinking": true } }), true),
        ("/v1/chat/completions", json!({ "chat_template_kwargs": { "enable_thinking": false } }), false),
        ("/v1/chat/completions", json!({ "reasoning_effort": "none" }), false),
        ("/v1/chat/completions", json!({ "reasoning_effort": "low" }), true),
    ] {
        let found = prompt_tokens(path, more.clone()).await;
        // Where it does not, what it would think stands there, empty.
        assert_eq!(found > usual, !thinks, "{path} {more}: {found} tokens, usually {usual}");
    }
    let shown = async |model: &str| sarai.post("/api/show", json!({ "model": model }).to_string()).await.json();
    assert_eq!(shown("thinker").await["capabilities"], json!(["completion", "thinking"]));
    assert_eq!(shown("plain").await["capabilities"], json!(["completion"]));
    for (model, more, says) in [
        ("plain", json!({ "think": true }), "`think` is not supported"),
        ("thinker", json!({ "think": "a lot" }), "`think` is \\\"a lot"),
    ] {
        let mut body = json!({ "model": model, "messages": [{ "role": "user", "content": "Hi" }] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let refused = sarai.post("/api/chat", body.to_string()).await;
        assert!(refused.status == 400 && refused.text.contains(says), "{}", refused.text);
    }
    let mut body = json!({ "model": "plain", "stream": false, "messages": [{ "role": "user", "content": "Hi" }] });
    body["think"] = false.into();
    body["options"] = json!({ "num_predict": 2 });
    assert_eq!(sarai.post("/api/chat", body.to_string()).await.status, 200, "not to reason is no effort");
}

#[tokio::test]
async fn a_host_of_the_other_api_is_told_in_its_words() {
    let host = Host::start(|_, _| ollama(&["done"]));
    let sarai =
        Sarai::start(&format!("models:\n  solar: {{ backend: ollama_http, url: \"{}\", model_name: m }}\n", host.url));
    for (think, more) in [(Value::Null, json!({})), (json!(false), json!({ "reasoning_effort": "none" }))] {
        let mut body = json!({ "model": "solar", "messages": [{ "role": "user", "content": "Hi" }] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        assert_eq!(sarai.post("/v1/chat/completions", body.to_string()).await.status, 200);
        assert_eq!(host.asked().last().unwrap().body["think"], think);
    }
}
