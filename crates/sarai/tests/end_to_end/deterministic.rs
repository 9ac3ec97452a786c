//! `deterministic: true`: what is computed beside an answer changes nothing in it.

use crate::support::media::{BLUE, RED, image_part, png, text_part};
use crate::support::{Sarai, gemma, minilm, sketch, smollm2};
use futures_util::future::join_all;
use serde_json::{Value, json};

/// Of lengths that steps cut in different places; the longest says its sentence so often.
fn prompts(longest: usize) -> Vec<String> {
    let long = |count: usize| "It is a long time ago, and nobody knows it any more. ".repeat(count);
    ["a dog", "the sea at night", "kings"]
        .iter()
        .zip([0, 6, longest])
        .map(|(of, n)| format!("{}A story of {of}:", long(n)))
        .collect()
}

fn models(file: &str, more: &str) -> String {
    format!(
        "models:\n  m: {{ backend: gguf_native, gguf_path: {file}, context_length: 2560, parallel: 4, deterministic: true{more} }}\n  other: {{ backend: gguf_native, gguf_path: {}, context_length: 512 }}\n",
        smollm2()
    )
}

fn body(prompt: &str, tokens: u32) -> Value {
    json!({ "model": "m", "prompt": prompt, "temperature": 0, "max_tokens": tokens, "logprobs": 2 })
}

/// The tokens of an answer, and every digit of how likely each was.
async fn asked(sarai: &Sarai, body: &Value) -> (Value, u64) {
    let answer = sarai.post("/v1/completions", body.to_string()).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let answer = answer.json();
    let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    (answer["choices"][0]["logprobs"].clone(), cached)
}

/// Whoever asks and leaves.
async fn leaves(sarai: &Sarai, model: &str) {
    let mut body = body("Once", 200);
    body["model"] = json!(model);
    body["stream"] = json!(true);
    let asked = sarai.client.post(format!("{}/v1/completions", sarai.url)).body(body.to_string());
    asked.send().await.unwrap().chunk().await.unwrap();
}

/// Alone, in company, beside clients that leave and a worker that wants the cores too, from the cache and computed anew: the same bits.
async fn is_the_same(file: &str, longest: usize) {
    let (prompts, tokens) = (prompts(longest), 24);
    let sarai = Sarai::start(&models(file, ""));
    let bodies: Vec<_> = prompts.iter().map(|prompt| body(prompt, tokens)).collect();
    let mut alone = Vec::new();
    for body in &bodies {
        alone.push(asked(&sarai, body).await.0);
    }
    let company = join_all(bodies.iter().map(|body| asked(&sarai, body)));
    let (company, ..) = tokio::join!(company, leaves(&sarai, "m"), leaves(&sarai, "other"));
    for (one, (other, _)) in alone.iter().zip(company) {
        assert_eq!(*one, other, "{file}");
    }
    // A conversation goes on from what is in its cells; after others took them, from nothing.
    let said: String = alone[1]["tokens"].as_array().unwrap().iter().map(|token| token.as_str().unwrap()).collect();
    let next = body(&format!("{}{said} And then", prompts[1]), 16);
    let (warm, _) = asked(&sarai, &next).await;
    for n in 0..4 {
        asked(&sarai, &body(&format!("{n} is a number"), 2)).await;
    }
    let (cold, cached) = asked(&sarai, &next).await;
    assert!(cold == warm && cached < 10, "{file}: {cached} from the cache, {cold} after {warm}");
}

#[tokio::test]
async fn answers_are_the_same_to_the_last_bit_alone_and_in_company() {
    // Gemma's is longer than its window's cells, which are taken anew then; Qwen is asked beside forms (`tools`).
    for (file, longest) in [(smollm2(), 20), (gemma(), 60)] {
        is_the_same(&file, longest).await;
    }
}

/// Small files with random weights: sliding windows, recurrent states, experts.
#[tokio::test]
async fn so_they_are_on_every_architecture() {
    for name in ["gpt-oss", "lfm2"] {
        is_the_same(&sketch(&format!("{name}-MIX.gguf")), 20).await;
    }
}

/// A picture of Gemma's is one piece, and takes a step of its own.
#[tokio::test]
async fn so_they_are_beside_pictures() {
    let more = format!(", mmproj_path: {}", sketch("sensing/random/mmproj-gemma3.gguf"));
    let sarai = Sarai::start(&models(&sketch("sensing/random/gemma3.gguf"), &more));
    let sees = |colour| {
        let parts = [text_part("What is it?"), image_part(&png(64, 64, colour)), text_part("Say it.")];
        json!({ "model": "m", "messages": [{ "role": "user", "content": parts }], "temperature": 0, "max_tokens": 40, "logprobs": true })
    };
    let ask = async |body: Value| {
        let answer = sarai.post("/v1/chat/completions", body.to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()["choices"][0]["logprobs"].clone()
    };
    let text = body("A story of the sea:", 120);
    let alone = (ask(sees(RED)).await, ask(sees(BLUE)).await, asked(&sarai, &text).await.0);
    for _ in 0..3 {
        let (red, blue, (story, _)) = tokio::join!(ask(sees(RED)), ask(sees(BLUE)), asked(&sarai, &text));
        assert_eq!((red, blue, story), alone);
    }
}

#[tokio::test]
async fn so_are_vectors() {
    let sarai = Sarai::start(&models(&minilm(), ""));
    let embed = async |input: Value| {
        let answer = sarai.post("/v1/embeddings", json!({ "model": "m", "input": input }).to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let rows = answer.json()["data"].as_array().unwrap().clone();
        rows.into_iter().map(|row| row["embedding"].clone()).collect::<Vec<_>>()
    };
    let texts = prompts(9);
    let together = embed(json!(texts)).await;
    for (text, vector) in texts.iter().zip(together) {
        assert_eq!(embed(json!(text)).await, [vector], "{text}");
    }
}

/// What was kept on disk while its worker was away, states that stand for all tokens at once among it.
#[tokio::test]
async fn so_they_are_from_disk() {
    for file in [smollm2(), sketch("lfm2-MIX.gguf"), sketch("mamba2-MIX.gguf")] {
        let sarai = Sarai::start(&models(&file, ""));
        let prompt = &prompts(9)[2];
        // The one token of the answer is not computed, so what is kept is the prompt.
        asked(&sarai, &body(prompt, 1)).await;
        let unload = json!({ "model": "m", "keep_alive": 0 }).to_string();
        assert_eq!(sarai.post("/api/generate", unload).await.status, 200);
        sarai.until("it is unloaded", |ps| ps["workers"].as_array().unwrap().is_empty()).await;
        let next = body(&format!("{prompt} And then"), 16);
        let (back, cached) = asked(&sarai, &next).await;
        assert!(cached > 60, "{file}: {cached} tokens came back");
        assert_eq!(asked(&Sarai::start(&models(&file, "")), &next).await, (back, 0), "{file}");
    }
}

/// What is drafted, and taken back, leaves the text as it is where nothing repeats, too.
#[tokio::test]
async fn so_they_are_with_drafts() {
    let (plain, drafting) =
        (Sarai::start(&models(&smollm2(), "")), Sarai::start(&models(&smollm2(), ", draft_tokens: 8")));
    for prompt in ["One, two, three, one, two,", "A story of the sea:"] {
        let body = body(prompt, 150);
        assert_eq!(asked(&plain, &body).await, asked(&drafting, &body).await);
    }
}
