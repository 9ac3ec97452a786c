//! Tokens that are drafted from repeated text (`draft_tokens`), or by a draft model (`draft_path`), on real models.

use std::path::Path;

use crate::support::{Sarai, chat, qwen, smollm2};
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
        let mut all = json!({ "temperature": 0, "max_tokens": 48 });
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

/// A copy of a file whose last weights are zero: it is of the same vocabulary, and mostly wrong.
fn spoilt(file: &str, to: &Path) -> String {
    let mut bytes = std::fs::read(file).unwrap();
    let length = bytes.len();
    bytes[length - length / 4..].fill(0);
    std::fs::write(to, bytes).unwrap();
    to.display().to_string()
}

/// The model itself is the best draft model there is, and a spoilt one the worst: either way the text is what it was.
#[tokio::test]
async fn a_draft_model_changes_nothing_of_the_text() {
    let folder = tempfile::tempdir().unwrap();
    let bad = spoilt(&smollm2(), &folder.path().join("spoilt.gguf"));
    let start = |draft: &str| {
        Sarai::start(&format!(
            "models:\n  tiny: {{ backend: gguf_native, gguf_path: {}, context_length: 1024, parallel: 2, deterministic: true{draft} }}\n",
            smollm2()
        ))
    };
    let long = format!("{} What was said most often?", "All work and no play makes a dull day. ".repeat(20));
    let asked = ["Tell me about the sea.", "Name three colours, and why.", &long];
    let ask = async |sarai: &Sarai| {
        let body = |prompt: &str| chat("tiny", prompt, json!({ "temperature": 0, "max_tokens": 36 }));
        let one = sarai.post("/v1/chat/completions", body(asked[0])).await.json();
        let rest = join_all(asked[1..].iter().map(|prompt| sarai.post("/v1/chat/completions", body(prompt)))).await;
        // A second turn goes on from what is in the cache, and sampled text is followed too.
        let sampled = json!({ "temperature": 0.9, "seed": 5, "max_tokens": 24 });
        let last = sarai.post("/v1/chat/completions", chat("tiny", asked[0], sampled)).await.json();
        let mut answers = vec![one];
        answers.extend(rest.into_iter().map(|answer| answer.json()));
        answers.push(last);
        answers
    };
    let texts = |answers: &[Value]| -> Vec<String> {
        answers.iter().map(|answer| answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()).collect()
    };
    let plain = ask(&start("")).await;
    assert!(plain[0]["timings"]["draft_n"].is_null());
    let mut shares = Vec::new();
    for draft in [smollm2(), bad] {
        let sarai = start(&format!(", draft_path: {draft}"));
        let drafted = ask(&sarai).await;
        assert_eq!(texts(&drafted), texts(&plain), "{draft}");
        let sum = |key: &str| -> f64 { drafted.iter().filter_map(|answer| answer["timings"][key].as_f64()).sum() };
        shares.push((sum("draft_n"), sum("draft_n_accepted")));
        // What it takes was planned.
        sarai.until("it was measured", |ps| ps["workers"][0]["anonymous_bytes"].as_u64() > Some(0)).await;
        let worker = sarai.ps().await["workers"][0].clone();
        let of = |key: &str| worker[key].as_u64().unwrap();
        assert!(of("anonymous_bytes") + of("file_bytes") <= of("planned_bytes"), "{worker}");
    }
    let [(drafted, accepted), (guessed, right)] = shares[..] else { unreachable!("two were asked") };
    // Where text repeats, what followed it before is drafted too, which is right less often.
    assert!(drafted > 15.0 && accepted > 0.7 * drafted, "by itself: {accepted} of {drafted}");
    assert!(right < 0.5 * guessed.max(1.0), "by a spoilt one: {right} of {guessed}");
}

#[tokio::test]
async fn a_draft_model_of_another_vocabulary_is_refused_with_what_would_fit() {
    let sarai = Sarai::start(&format!(
        "models:\n  tiny: {{ backend: gguf_native, gguf_path: {}, draft_path: {}, context_length: 512 }}\n",
        smollm2(),
        qwen()
    ));
    let answer = sarai.post("/v1/chat/completions", chat("tiny", "Hi", json!({}))).await;
    assert_eq!(answer.status, 503, "{}", answer.text);
    let said = answer.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(said.contains("cannot draft for this model") && said.contains("draft_path"), "{said}");
    assert_eq!(sarai.get("/health").await.status, 200);
}
