//! Whether a model reasons before it answers. No model that does is among the test weights: a small random one with such a template
//! shows what reaches it, and one that recites shows what comes of its words (`scripts/sensing_models.py`).

use crate::support::host::{Host, ollama};
use crate::support::{Sarai, chat, sketch, smollm2};
use serde_json::{Value, json};

fn models() -> String {
    format!(
        "models:\n  thinker: {{ backend: gguf_native, gguf_path: {}, context_length: 1024 }}\n  plain: {{ backend: gguf_native, gguf_path: {} }}\n",
        sketch("sensing/random/reasoning.gguf"),
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
        ("/api/chat", json!({ "think": true, "options": { "num_predict": 1 } }), true),
        ("/api/chat", json!({ "think": false }), false),
        ("/v1/chat/completions", json!({}), true),
        ("/v1/chat/completions", json!({ "chat_template_kwargs": { "enable_thinking": true } }), true),
        ("/v1/chat/completions", json!({ "chat_template_kwargs": { "enable_thinking": false } }), false),
        ("/v1/chat/completions", json!({ "chat_template_kwargs": { "mood": "" } }), true),
        ("/v1/chat/completions", json!({ "chat_template_kwargs": { "mood": "Gently, then." } }), false),
        ("/v1/chat/completions", json!({ "reasoning_effort": "none" }), false),
    ] {
        let found = prompt_tokens(path, more.clone()).await;
        // Where it does not, what it would think stands there, empty. So does a value of the template's own.
        assert_eq!(found > usual, !thinks, "{path} {more}: {found} tokens, usually {usual}");
    }
    // How hard it reasons reaches a template that knows it, whoever says it how.
    let effort = async |path: &str, more| prompt_tokens(path, more).await - usual;
    let low = effort("/v1/chat/completions", json!({ "reasoning_effort": "low" })).await;
    assert!(low > 2, "{low}");
    assert_eq!(effort("/api/chat", json!({ "think": "low" })).await, low);
    assert_eq!(
        effort("/v1/chat/completions", json!({ "chat_template_kwargs": { "reasoning_effort": "low" } })).await,
        low
    );
    let low = json!({ "reasoning_effort": "low" });
    let knows = sarai.post("/v1/chat/completions", chat("thinker", "Hi", low.clone())).await;
    assert_eq!(knows.header("x-sarai-degraded"), None, "{}", knows.text);
    let plain = sarai.post("/v1/chat/completions", chat("plain", "Hi", low)).await;
    assert_eq!(plain.header("x-sarai-degraded"), Some("reasoning_effort"), "{}", plain.text);
    // What it thought before is shown to it again.
    let before = |name: &str, thought: &str| json!([{ "role": "user", "content": "Hi" }, { "role": "assistant", "content": "Ho", name: thought }, { "role": "user", "content": "Hi" }]);
    for (path, name) in [
        ("/api/chat", "thinking"),
        ("/v1/chat/completions", "reasoning_content"),
        ("/v1/chat/completions", "reasoning"),
    ] {
        let without = prompt_tokens(path, json!({ "messages": before(name, "") })).await;
        let with = prompt_tokens(path, json!({ "messages": before(name, "a thought that takes its tokens") })).await;
        assert!(with > without + 3, "{path} {name}: {with} tokens, {without} without");
    }
    // What has a form begins with it, and that it does not reason is said.
    let mut formed = json!({ "model": "thinker", "stream": false, "think": true, "format": { "const": 1 } });
    formed["messages"] = json!([{ "role": "user", "content": "Hi" }]);
    let formed = sarai.post("/api/chat", formed.to_string()).await;
    assert_eq!((formed.status, formed.header("x-sarai-degraded")), (200, Some("think")), "{}", formed.text);
    let none = chat("thinker", "Hi", json!({ "reasoning_effort": "none", "max_tokens": 1 }));
    assert_eq!(sarai.post("/v1/chat/completions", none).await.header("x-sarai-degraded"), None);
    let wrong = chat("thinker", "Hi", json!({ "chat_template_kwargs": "gently" }));
    let wrong = sarai.post("/v1/chat/completions", wrong).await;
    assert_eq!((wrong.status, &wrong.json()["error"]["param"]), (400, &json!("chat_template_kwargs")));
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

fn reciting() -> String {
    sketch("sensing/reciting/reasoning.gguf")
}

#[tokio::test]
async fn reasoning_is_told_apart_from_the_answer_in_both_apis_streamed_and_whole() {
    let sarai = Sarai::start(&format!("models:\n  thinker: {{ backend: gguf_native, gguf_path: {} }}\n", reciting()));
    let ask = async |path: &str, more: Value| {
        let mut body =
            json!({ "model": "thinker", "stream": false, "messages": [{ "role": "user", "content": "Hi" }] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = sarai.post(path, body.to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer
    };
    let joined =
        |parts: &[Value], at: &str| parts.iter().filter_map(|part| part.pointer(at)?.as_str()).collect::<String>();
    // As llama.cpp's own server tells it, line break and all.
    let (reasoned, said) = ("It is simple.\n", "Forty-two it is.");
    let whole = ask("/v1/chat/completions", json!({})).await.json();
    let message = &whole["choices"][0]["message"];
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!(reasoned), &json!(said)), "{whole}");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    let events = ask("/v1/chat/completions", json!({ "stream": true })).await.sse();
    let parts = |name: &str| joined(&events, &format!("/choices/0/delta/{name}"));
    assert_eq!((&*parts("reasoning_content"), &*parts("content")), (reasoned, said), "{events:?}");
    let whole = ask("/api/chat", json!({})).await.json();
    assert_eq!(
        (&whole["message"]["thinking"], &whole["message"]["content"]),
        (&json!(reasoned), &json!(said)),
        "{whole}"
    );
    let lines = ask("/api/chat", json!({ "stream": true })).await.lines();
    let parts = |name: &str| joined(&lines, &format!("/message/{name}"));
    assert_eq!((&*parts("thinking"), &*parts("content")), (reasoned, said), "{lines:?}");
    // How likely the tokens were is told of the answer's own, and of each.
    for (path, likely) in [("/v1/chat/completions", "/choices/0/logprobs/content"), ("/api/chat", "/logprobs")] {
        for stream in [false, true] {
            let answer = ask(path, json!({ "stream": stream, "logprobs": true, "top_logprobs": 2 })).await;
            let events = match (stream, path.starts_with("/api")) {
                (false, _) => vec![answer.json()],
                (true, false) => answer.sse(),
                (true, true) => answer.lines(),
            };
            let tokens: Vec<_> =
                events.iter().filter_map(|event| event.pointer(likely)?.as_array()).flatten().collect();
            let told: String = tokens.iter().map(|token| token["token"].as_str().unwrap()).collect();
            // The line breaks of its first token are not passed on.
            assert_eq!(told.trim_start(), said, "{path} {stream}: {}", answer.text);
            assert!(tokens.iter().all(|token| token["top_logprobs"].as_array().unwrap().len() == 2), "{tokens:?}");
        }
    }
    // Cut within it, there is no answer.
    let cut = ask("/v1/chat/completions", json!({ "max_tokens": 3 })).await.json();
    let choice = &cut["choices"][0];
    assert!(choice["finish_reason"] == "length" && choice["message"]["reasoning_content"] == "It is simple", "{cut}");
    assert!(choice["message"]["content"].as_str().is_none_or(str::is_empty), "{cut}");
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
