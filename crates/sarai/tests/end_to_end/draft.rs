//! Tokens that are drafted from repeated text (`draft_tokens`), on a real model.

use crate::support::{Sarai, chat, qwen};
use futures_util::future::join_all;
use serde_json::{Value, json};

fn sarai(draft_tokens: u32) -> Sarai {
    Sarai::start(&format!(
        "models:\n  coder: {{ backend: gguf_native, gguf_path: {}, context_length: 2048, parallel: 2, draft_tokens: {draft_tokens} }}\n",
        qwen()
    ))
}

const CODE: &str = "Write this code again, and change nothing.\n```python\ndef area(width, height):\n    if width < 0 or height < 0:\n        \
                    raise ValueError('negative')\n    return width * height\n\n\ndef circumference(width, height):\n    if width < 0 or height \
                    < 0:\n        raise ValueError('negative')\n    return 2 * (width + height)\n```";

/// Copying leaves no doubt about what is next, so the text is the same; limits, stop texts, grammars and what goes on in the cache
/// afterwards are as without.
#[tokio::test]
async fn drafted_tokens_change_nothing_but_the_pace() {
    let (plain, drafting) = (sarai(0), sarai(8));
    let ask = async |more: Value| {
        let mut all = json!({ "temperature": 0, "max_tokens": 70 });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let body = chat("coder", CODE, all);
        let (one, other) =
            tokio::join!(plain.post("/v1/chat/completions", body.clone()), drafting.post("/v1/chat/completions", body));
        let (one, other) = (one.json(), other.json());
        assert_eq!(one["choices"], other["choices"], "{more}");
        assert_eq!(one["usage"]["completion_tokens"], other["usage"]["completion_tokens"], "{more}");
        other
    };
    let whole = ask(json!({})).await;
    assert!(whole["choices"][0]["message"]["content"].as_str().unwrap().contains("return width * height"));
    ask(json!({ "stop": ["ValueError('neg"] })).await;
    for max_tokens in [1, 9] {
        let answer = ask(json!({ "max_tokens": max_tokens })).await;
        assert_eq!(answer["usage"]["completion_tokens"], max_tokens);
    }
    ask(json!({ "grammar": "root ::= \"```python\\n\" [^`]+ \"```\"", "max_tokens": 20 })).await;
    let body = chat("coder", CODE, json!({ "temperature": 0, "max_tokens": 20, "n": 2 }));
    let together = join_all((0..2).map(|_| drafting.post("/v1/chat/completions", body.clone()))).await;
    let begins = whole["choices"][0]["message"]["content"].as_str().unwrap();
    for answer in together {
        for choice in answer.json()["choices"].as_array().unwrap() {
            let text = choice["message"]["content"].as_str().unwrap();
            assert!(begins.starts_with(text), "{text}");
        }
    }
}
