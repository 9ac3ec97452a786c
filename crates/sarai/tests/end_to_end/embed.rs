//! Vectors of a real model, through both APIs, beside those of the original.

use crate::support::host::{Host, Step};
use crate::support::{Ollama, Sarai, Watch, chat, minilm, sketch, smollm2};
use base64::Engine;
use futures_util::future::join_all;
use serde_json::{Value, json};

fn models() -> String {
    format!(
        "models:\n  minilm: {{ backend: gguf_native, gguf_path: {}, role: embedding }}\n  chatty: {{ backend: gguf_native, gguf_path: {}, context_length: 1024 }}\n",
        minilm(),
        smollm2()
    )
}

struct Reference {
    text: String,
    tokens: u64,
    vector: Vec<f64>,
    /// Of the first and the last token alone.
    first: Vec<f64>,
    last: Vec<f64>,
}

/// Of the original weights, computed by `scripts/minilm_reference.py`.
fn references() -> Vec<Reference> {
    let rows: Vec<Value> = serde_json::from_str(include_str!("../../../../tests/minilm_reference.json")).unwrap();
    let read = |row: &Value| Reference {
        text: row["text"].as_str().unwrap().to_owned(),
        tokens: row["tokens"].as_u64().unwrap(),
        vector: numbers(&row["vector"]),
        first: numbers(&row["first"]),
        last: numbers(&row["last"]),
    };
    rows.iter().map(read).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap_or_else(|| panic!("{value}")).iter().map(|number| number.as_f64().unwrap()).collect()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

async fn embed(sarai: &Sarai, body: Value) -> Value {
    let answer = sarai.post("/v1/embeddings", body.to_string()).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()
}

#[tokio::test]
async fn vectors_are_those_of_the_original_alone_together_and_in_company() {
    let sarai = Sarai::start(&models());
    let references = references();
    let texts: Vec<_> = references.iter().map(|reference| reference.text.clone()).collect();
    let all = embed(&sarai, json!({ "model": "minilm", "input": texts })).await;
    assert_eq!(all["usage"]["prompt_tokens"], references.iter().map(|reference| reference.tokens).sum::<u64>());
    for (row, reference) in all["data"].as_array().unwrap().iter().zip(&references) {
        let vector = numbers(&row["embedding"]);
        let (cosine, length) = (cosine(&vector, &reference.vector), vector.iter().map(|v| v * v).sum::<f64>());
        assert!(cosine >= 0.999, "{cosine} for {:?}", reference.text);
        assert!((length - 1.0).abs() < 1e-4, "{length}");
        let alone = embed(&sarai, json!({ "model": "minilm", "input": reference.text })).await;
        assert!(self::cosine(&numbers(&alone["data"][0]["embedding"]), &vector) > 0.9999, "{:?}", reference.text);
    }
    // Many requests at once, some of many texts, and a chat beside them.
    let many = |n: usize| json!({ "model": "minilm", "input": (0..n).map(|i| texts[i % texts.len()].clone()).collect::<Vec<_>>() });
    let asked = join_all((0..24).map(|n| embed(&sarai, many(1 + n * 7 % 60))));
    let chatting = sarai.post("/v1/chat/completions", chat("chatty", "Hello.", json!({ "max_tokens": 8 })));
    let (answers, chatted) = tokio::join!(asked, chatting);
    assert_eq!(chatted.status, 200);
    for answer in answers {
        for (index, row) in answer["data"].as_array().unwrap().iter().enumerate() {
            assert_eq!(row["index"], index);
            let wanted = &references[index % references.len()].vector;
            assert!(cosine(&numbers(&row["embedding"]), wanted) >= 0.999, "{index}");
        }
    }
}

/// MiniLM whose header says that it pools in another way.
fn pooled_otherwise(folder: &std::path::Path, name: &str, pooling: u32) -> String {
    const KEY: &[u8] = b"bert.pooling_type";
    let mut bytes = std::fs::read(minilm()).unwrap();
    let key = bytes.windows(KEY.len()).position(|window| window == KEY).unwrap();
    // The type of the value stands between.
    let value = key + KEY.len() + 4;
    bytes[value..value + 4].copy_from_slice(&pooling.to_le_bytes());
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    path.display().to_string()
}

#[tokio::test]
async fn tokens_are_pooled_as_the_header_says() {
    let folder = tempfile::tempdir().unwrap();
    // As llama.cpp numbers them.
    let models: String = [("first", 2), ("last", 3)]
        .map(|(name, pooling)| {
            let file = pooled_otherwise(folder.path(), name, pooling);
            format!("  {name}: {{ backend: gguf_native, gguf_path: {file}, role: embedding }}\n")
        })
        .concat();
    let sarai = Sarai::start(&format!("models:\n{models}"));
    let references = references();
    let texts: Vec<_> = references.iter().map(|reference| reference.text.clone()).collect();
    for name in ["first", "last"] {
        let all = embed(&sarai, json!({ "model": name, "input": texts })).await;
        for (row, reference) in all["data"].as_array().unwrap().iter().zip(&references) {
            let wanted = if name == "first" { &reference.first } else { &reference.last };
            let (vector, text) = (numbers(&row["embedding"]), &reference.text);
            let (close, mean) = (cosine(&vector, wanted), cosine(wanted, &reference.vector));
            assert!(close >= 0.999 && mean < 0.99, "{name}: {close}, the mean is {mean}, for {text:?}");
        }
    }
}

#[tokio::test]
async fn both_apis_say_the_same_in_their_own_ways() {
    let sarai = Sarai::start(&models());
    let text = "The cat sits on the mat.";
    let plain = numbers(&embed(&sarai, json!({ "model": "minilm", "input": text })).await["data"][0]["embedding"]);
    let body = json!({ "model": "minilm", "input": [text], "encoding_format": "base64" });
    let bytes = embed(&sarai, body).await["data"][0]["embedding"].as_str().unwrap().to_owned();
    let bytes = base64::engine::general_purpose::STANDARD.decode(bytes).unwrap();
    let decoded: Vec<f64> =
        bytes.chunks(4).map(|four| f64::from(f32::from_le_bytes(four.try_into().unwrap()))).collect();
    assert!(cosine(&plain, &decoded) > 0.999_999);
    let post = async |path: &str, body: Value| sarai.post(path, body.to_string()).await;
    let ollama = post("/api/embed", json!({ "model": "minilm", "input": [text, "Other."] })).await.json();
    assert!(cosine(&plain, &numbers(&ollama["embeddings"][0])) > 0.9999);
    assert!(
        ollama["embeddings"].as_array().unwrap().len() == 2 && ollama["prompt_eval_count"].as_u64() > Some(8),
        "{ollama}"
    );
    let old = post("/api/embeddings", json!({ "model": "minilm", "prompt": text })).await.json();
    assert!(cosine(&plain, &numbers(&old["embedding"])) > 0.9999);
    let short = embed(&sarai, json!({ "model": "minilm", "input": text, "dimensions": 64 })).await;
    let short = numbers(&short["data"][0]["embedding"]);
    assert!(short.len() == 64 && cosine(&plain[..64], &short) > 0.9999);
    assert!((short.iter().map(|v| v * v).sum::<f64>() - 1.0).abs() < 1e-4);
    // [CLS] the cat [SEP], as the vocabulary numbers them.
    let tokens = embed(&sarai, json!({ "model": "minilm", "input": [101, 1996, 4937, 102] })).await;
    let words = embed(&sarai, json!({ "model": "minilm", "input": "The cat" })).await;
    assert!(cosine(&numbers(&tokens["data"][0]["embedding"]), &numbers(&words["data"][0]["embedding"])) > 0.9999);
    let mixed = embed(&sarai, json!({ "model": "minilm", "input": ["The cat", [101, 1996, 4937, 102]] })).await;
    assert!(cosine(&numbers(&mixed["data"][0]["embedding"]), &numbers(&mixed["data"][1]["embedding"])) > 0.9999);
    // To Ollama, no dimensions or too many of them are all.
    for dimensions in [0, 385] {
        let all =
            post("/api/embed", json!({ "model": "minilm", "input": text, "dimensions": dimensions })).await.json();
        assert_eq!(numbers(&all["embeddings"][0]).len(), 384);
    }
    let shown = post("/api/show", json!({ "model": "minilm" })).await.json();
    assert_eq!(shown["capabilities"], json!(["embedding"]));
    // An empty text among others has a vector too, in Ollama's API.
    for input in [json!(["", "Other."]), json!([""])] {
        let some = post("/api/embed", json!({ "model": "minilm", "input": input })).await;
        let vectors = some.json()["embeddings"].as_array().unwrap().clone();
        assert_eq!(
            (vectors.len(), numbers(&vectors[0]).len()),
            (input.as_array().unwrap().len(), 384),
            "{}",
            some.text
        );
    }
    let refused = post("/v1/embeddings", json!({ "model": "minilm", "input": ["", "Other."] })).await;
    assert_eq!(refused.status, 400, "{}", refused.text);
}

#[tokio::test]
async fn what_is_too_long_is_cut_or_refused_as_asked_and_what_is_wrong_is_a_400() {
    let sarai = Sarai::start(&models());
    let long = "word ".repeat(600);
    let post = async |path: &str, body: Value| sarai.post(path, body.to_string()).await;
    let refused = post("/v1/embeddings", json!({ "model": "minilm", "input": ["short", long] })).await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (400, &json!("context_length_exceeded")));
    assert!(refused.text.contains("602") && refused.text.contains("512"), "{}", refused.text);
    let whole = post("/api/embed", json!({ "model": "minilm", "input": long, "truncate": false })).await;
    assert_eq!(whole.status, 400, "{}", whole.text);
    let cut = post("/api/embed", json!({ "model": "minilm", "input": long })).await.json();
    assert_eq!(cut["prompt_eval_count"], 512, "{cut}");
    let few = |truncate: bool| json!({ "model": "minilm", "input": long, "truncate": truncate, "options": { "num_ctx": 16.0 } });
    assert_eq!(post("/api/embed", few(true)).await.json()["prompt_eval_count"], 16);
    assert_eq!(post("/api/embed", few(false)).await.status, 400);
    let none_left = |most: u32| json!({ "model": "minilm", "input": long, "options": { "num_ctx": most } });
    for most in [0, 1, 2] {
        let refused = post("/api/embed", none_left(most)).await;
        // Ollama's own tests look for these words.
        let says = "input after truncation exceeds maximum context length";
        assert!(refused.status == 400 && refused.text.contains(says), "{}", refused.text);
    }
    assert_eq!(post("/api/embed", none_left(3)).await.json()["prompt_eval_count"], 3);
    let asked = post("/v1/embeddings", json!({ "model": "minilm", "input": long, "truncate": true })).await.json();
    assert_eq!(asked["usage"]["prompt_tokens"], 512, "{asked}");
    // The longest that fits: 510 words between two marks.
    let edge = embed(&sarai, json!({ "model": "minilm", "input": "word ".repeat(510) })).await;
    assert!(
        cosine(&numbers(&edge["data"][0]["embedding"]), &numbers(&cut["embeddings"][0])) > 0.9999,
        "the end mark stays"
    );
    for (path, body, says) in [
        ("/v1/embeddings", json!({ "model": "minilm", "input": [] }), "input"),
        ("/v1/embeddings", json!({ "model": "minilm", "input": [999_999] }), "999999"),
        ("/v1/embeddings", json!({ "model": "minilm", "input": "a", "dimensions": 385 }), "384"),
        ("/v1/embeddings", json!({ "model": "minilm", "input": "a", "encoding_format": "hex" }), "base64"),
        ("/v1/embeddings", json!({ "model": "chatty", "input": "a" }), "embedding model"),
        ("/v1/rerank", json!({ "model": "minilm", "query": "a", "documents": ["b"] }), "/v1/embeddings"),
        ("/v1/rerank", json!({ "model": "minilm", "query": "a", "documents": ["b"], "top_n": 0 }), "top_n"),
        ("/v1/chat/completions", serde_json::from_str(&chat("minilm", "Hello.", json!({}))).unwrap(), "/v1/embeddings"),
    ] {
        let answer = post(path, body).await;
        assert!(answer.status == 400 && answer.text.contains(says), "{path}: {} {}", answer.status, answer.text);
    }
}

/// Scores are those of llama.cpp's own server (`scripts/ranking_model.py`: real weights below a random head), alone and in company.
#[tokio::test]
async fn texts_are_ranked_as_llama_cpps_server_ranks_them() {
    let file = sketch("ranking/minilm.gguf");
    let sarai =
        Sarai::start(&format!("models:\n  ranker: {{ backend: gguf_native, gguf_path: {file}, role: embedding }}\n"));
    let references: Vec<Value> =
        serde_json::from_str(include_str!("../../../../tests/ranking_reference.json")).unwrap();
    let ask = async |reference: &Value, more: Value| {
        let mut body = json!({ "model": "ranker", "query": reference["query"], "documents": reference["documents"] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = sarai.post("/v1/rerank", body.to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()
    };
    for reference in &references {
        let scores = numbers(&reference["scores"]);
        let ranked = ask(reference, json!({})).await;
        let results = ranked["results"].as_array().unwrap();
        assert_eq!((results.len(), &ranked["usage"]["total_tokens"]), (scores.len(), &reference["tokens"]));
        for result in results {
            let (index, score) = (result["index"].as_u64().unwrap() as usize, &result["relevance_score"]);
            assert!((score.as_f64().unwrap() - scores[index]).abs() < 0.01, "{index}: {score} of {}", scores[index]);
        }
        assert!(results.is_sorted_by(|a, b| a["relevance_score"].as_f64() >= b["relevance_score"].as_f64()));
        let first = ask(reference, json!({ "top_n": 1, "return_documents": true })).await["results"].clone();
        let best = results[0]["index"].as_u64().unwrap() as usize;
        assert_eq!((first.as_array().unwrap().len(), &first[0]["index"]), (1, &results[0]["index"]));
        assert_eq!(first[0]["document"]["text"], reference["documents"][best], "{first}");
    }
    let as_tei =
        json!({ "model": "ranker", "query": "a cat", "texts": ["The cat sits.", "A stone."], "return_text": true });
    let as_tei = sarai.post("/v1/rerank", as_tei.to_string()).await.json();
    assert!(as_tei[0]["score"].is_number() && as_tei[0]["text"].is_string() && as_tei[1]["index"].is_u64(), "{as_tei}");
    let long = |more: Value| {
        let mut body = json!({ "model": "ranker", "query": "a cat", "documents": ["short", "word ".repeat(600)] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body.to_string()
    };
    assert_eq!(sarai.post("/v1/rerank", long(json!({}))).await.status, 400);
    let cut = sarai.post("/v1/rerank", long(json!({ "truncate": true }))).await;
    assert_eq!((cut.status, cut.json()["results"].as_array().map(Vec::len)), (200, Some(2)), "{}", cut.text);
    let unknown = sarai.post("/v1/rerank", long(json!({ "truncate": true, "max_chunks_per_doc": 3 }))).await;
    assert_eq!(unknown.header("x-sarai-degraded"), Some("max_chunks_per_doc"), "{}", unknown.text);
    let together = join_all((0..6).map(|n| ask(&references[n % references.len()], json!({})))).await;
    assert_eq!(together[0]["results"].as_array().unwrap().len(), references[0]["scores"].as_array().unwrap().len());
    let refused = sarai.post("/v1/chat/completions", chat("ranker", "Hello.", json!({}))).await;
    assert_eq!(refused.status, 400, "{}", refused.text);
}

/// A step holds no more than the context that the model was given.
#[tokio::test]
async fn a_short_context_is_kept_by_texts_that_are_read_side_by_side() {
    let config = format!(
        "models:\n  minilm: {{ backend: gguf_native, gguf_path: {}, role: embedding, context_length: 256 }}\n",
        minilm()
    );
    let sarai = Sarai::start(&config);
    let made = embed(&sarai, json!({ "model": "minilm", "input": vec!["word ".repeat(120); 5] })).await;
    assert_eq!(made["data"].as_array().unwrap().len(), 5);
    let pids = sarai.worker_pids().await;
    let load = json!({ "model": "minilm", "options": { "num_ctx": 512 } });
    assert_eq!(sarai.post("/api/generate", load.to_string()).await.status, 200);
    embed(&sarai, json!({ "model": "minilm", "input": "a" })).await;
    assert_eq!(sarai.worker_pids().await, pids, "the same worker");
}

/// As Ollama's clients do it: without a text, the model is only loaded, or unloaded.
#[tokio::test]
async fn an_embedding_model_is_loaded_by_a_request_without_a_text() {
    let sarai = Sarai::start(&models());
    let post = async |path: &str, body: Value| sarai.post(path, body.to_string()).await;
    for (path, body, wanted) in [
        ("/api/embed", json!({ "model": "minilm" }), json!([])),
        ("/api/embed", json!({ "model": "minilm", "input": "" }), json!([])),
        ("/api/embed", json!({ "model": "minilm", "input": [] }), json!([])),
    ] {
        let answer = post(path, body.clone()).await;
        assert_eq!((answer.status, &answer.json()["embeddings"]), (200, &wanted), "{body}: {}", answer.text);
    }
    let old = post("/api/embeddings", json!({ "model": "minilm", "prompt": "" })).await;
    assert_eq!((old.status, &old.json()["embedding"]), (200, &json!([])), "{}", old.text);
    assert_eq!(sarai.worker_pids().await.len(), 1, "it is loaded");
    assert_eq!(post("/api/embed", json!({ "model": "minilm", "keep_alive": 0 })).await.status, 200);
    sarai.until("it is unloaded", |ps| ps["workers"].as_array().is_some_and(Vec::is_empty)).await;
}

/// A model of the hosts' kind is asked where it is; its local copy stands in.
#[tokio::test]
async fn a_host_makes_vectors_too_and_the_local_file_stands_in() {
    let ollama = Ollama::start_with(&minilm());
    let config = |url: &str| {
        format!(
            "models:\n  minilm: {{ backend: ollama_http, fallback: gguf_native, url: \"{url}\", model_name: solar, gguf_path: {} }}\n",
            minilm()
        )
    };
    for (url, place) in [(ollama.url.clone(), "minilm@ollama_http"), (Ollama::unreachable(), "minilm@gguf_native")] {
        let sarai = Sarai::start(&config(&url));
        let answer = sarai
            .post(
                "/v1/embeddings",
                json!({ "model": "minilm", "input": ["a", "The cat sits on the mat."] }).to_string(),
            )
            .await;
        assert!(answer.header("x-sarai-served-by").unwrap_or_default().starts_with(place), "{}", answer.text);
        let vector = numbers(&answer.json()["data"][1]["embedding"]);
        assert!(cosine(&vector, &references()[0].vector) >= 0.999, "{place}");
    }
}

/// Vectors are asked of the hosts that share a model; a host without them is no reason to leave it alone with chats.
#[tokio::test]
async fn a_host_that_fails_to_make_vectors_is_not_to_blame_and_what_is_not_read_here_reaches_it() {
    let made =
        json!({ "data": [{ "index": 0, "embedding": [0.6, 0.8] }], "usage": { "prompt_tokens": 3 } }).to_string();
    let whole = move |body: &str| {
        let length = body.len();
        format!(
            "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        )
    };
    let missing = "HTTP/1.1 404 No\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    let without = Host::start(move |_, _| vec![Step::Send(missing.to_owned())]);
    let with = Host::start(move |_, _| vec![Step::Send(whole(&made))]);
    let config = format!(
        "models:\n  vectors:\n    backend: openai_http\n    model_name: m\n    urls: [{{ url: \"{}/v1\" }}, {{ url: \"{}/v1\", priority: 1 }}]\n",
        without.url, with.url
    );
    let sarai = Sarai::start(&config);
    for _ in 0..4 {
        let body = json!({ "model": "vectors", "input": "a", "input_type": "query", "encoding_format": "base64" });
        let answer = sarai.post("/v1/embeddings", body.to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert!(answer.header("x-sarai-fallback-reason").unwrap().contains("does not have the model"));
    }
    assert_eq!(with.asked()[0].body["input_type"], "query");
    let ps = sarai.ps().await;
    assert_eq!(ps["models"][0]["deployments"][0]["breaker"], "closed", "{ps}");
    let local = Sarai::start(&models());
    let body = json!({ "model": "minilm", "input": "a", "input_type": "query" });
    let answer = local.post("/v1/embeddings", body.to_string()).await;
    assert_eq!(answer.header("x-sarai-degraded"), Some("input_type"), "{}", answer.text);
}

/// The largest batch, and the longest texts side by side: what the worker has of its own at any moment was planned.
#[tokio::test]
async fn batches_of_vectors_take_no_more_than_was_planned() {
    let sarai = Sarai::start(&models());
    let ask = async |texts: Vec<String>| {
        let body = json!({ "model": "minilm", "input": texts });
        let answer = sarai.post("/v1/embeddings", body.to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
    };
    ask(vec!["first".into()]).await;
    let worker = sarai.ps().await["workers"][0].clone();
    let watch = Watch::of(worker["pid"].as_u64().unwrap());
    ask((0..2048).map(|n| format!("text {n}")).collect()).await;
    let long = |n: usize| format!("{n} {}", "words and words ".repeat(70));
    join_all((0..4).map(|side| ask((0..6).map(|n| long(100 * side + n)).collect()))).await;
    let (most, of) = (watch.most(), |key: &str| worker[key].as_u64().unwrap());
    assert!(most >= of("anonymous_bytes"), "{most} is what it had before: {worker}");
    assert!(most + of("file_bytes") <= of("planned_bytes"), "{most}: {worker}");
}
