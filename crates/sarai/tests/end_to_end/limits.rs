//! Every limit at its edge: the most that is taken is answered, and one more is refused with the limit's name.

use crate::support::{Sarai, chat, minilm, sketch, smollm2};
use serde_json::{Value, json};

fn models() -> String {
    format!(
        "models:\n  m: {{ backend: gguf_native, gguf_path: {}, context_length: 512, parallel: 8 }}\n  vectors: {{ backend: gguf_native, gguf_path: {}, role: embedding }}\n",
        smollm2(),
        minilm()
    )
}

/// Asks, and has the answer's status and the error's field.
async fn tried(sarai: &Sarai, path: &str, body: String) -> (u16, Value) {
    let answer = sarai.post(path, body).await;
    let json = answer.json();
    let error = if json["error"].is_object() { json["error"]["param"].clone() } else { Value::Null };
    (answer.status, error)
}

#[tokio::test]
async fn numbers_are_taken_up_to_their_limit() {
    let sarai = Sarai::start(&models());
    let short = |more: Value| {
        let mut all = json!({ "max_tokens": 1 });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        chat("m", "Hi", all)
    };
    let one = |name: &str, value: Value| json!({ name: value });
    for (field, most, beyond) in [
        ("n", json!(128), json!(129)),
        ("temperature", json!(2), json!(2.01)),
        ("top_p", json!(1), json!(1.01)),
        ("presence_penalty", json!(2), json!(2.01)),
        ("frequency_penalty", json!(-2), json!(-2.01)),
        ("max_tokens", json!(1), json!(0)),
        ("stop", json!(vec!["§"; 64]), json!(vec!["§"; 65])),
        ("stop", json!(["§".repeat(512)]), json!(["§".repeat(513)])),
    ] {
        let path = "/v1/chat/completions";
        assert_eq!(tried(&sarai, path, short(one(field, most.clone()))).await, (200, Value::Null), "{field}: {most}");
        let refused = tried(&sarai, path, short(one(field, beyond.clone()))).await;
        assert_eq!(refused, (400, json!(field)), "{field}: {beyond}");
    }
    let bias = |token: u32, bias: f64| one("logit_bias", json!({ token.to_string(): bias }));
    for (token, value, status) in
        [(49_151, 100.0, 200), (0, -100.0, 200), (49_152, 1.0, 400), (0, 100.1, 400), (0, -100.1, 400)]
    {
        let tried = tried(&sarai, "/v1/chat/completions", short(bias(token, value))).await;
        let field = if status == 200 { Value::Null } else { json!("logit_bias") };
        assert_eq!(tried, (status, field), "{token}: {value}");
    }
    let likely = |count: u32| short(json!({ "logprobs": true, "top_logprobs": count }));
    let answer = sarai.post("/v1/chat/completions", likely(20)).await.json();
    let top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"].as_array().unwrap().len();
    assert_eq!(top, 20);
    assert_eq!(tried(&sarai, "/v1/chat/completions", likely(21)).await, (400, json!("top_logprobs")));
    let answer = sarai.post("/v1/chat/completions", short(json!({ "n": 128 }))).await.json();
    let indices: Vec<_> = answer["choices"].as_array().unwrap().iter().map(|one| one["index"].as_u64()).collect();
    assert_eq!(indices, (0..128).map(Some).collect::<Vec<_>>());
}

#[tokio::test]
async fn texts_are_taken_up_to_their_limit() {
    let sarai = Sarai::start(&models());
    for (path, field) in [("/v1/embeddings", "input"), ("/api/embed", "input")] {
        let body = |count: usize| json!({ "model": "vectors", field: vec!["hi"; count] }).to_string();
        let answer = sarai.post(path, body(2048)).await;
        let rows = answer.json();
        let rows = rows["data"].as_array().or(rows["embeddings"].as_array()).map(Vec::len);
        assert_eq!((answer.status, rows), (200, Some(2048)), "{path}");
        let refused = sarai.post(path, body(2049)).await;
        assert!(refused.status == 400 && refused.text.contains("at most 2048"), "{path}: {}", refused.text);
    }
}

#[tokio::test]
async fn vectors_have_from_one_to_all_of_their_numbers() {
    let sarai = Sarai::start(&models());
    for (dimensions, status) in [(0, 400), (1, 200), (384, 200), (385, 400)] {
        let body = json!({ "model": "vectors", "input": "hi", "dimensions": dimensions });
        let answer = sarai.post("/v1/embeddings", body.to_string()).await;
        let made = answer.json()["data"][0]["embedding"].as_array().map(Vec::len);
        assert_eq!((answer.status, made), (status, (status == 200).then_some(dimensions)), "{}", answer.text);
        assert!(status == 200 || answer.text.contains("dimensions"), "{}", answer.text);
    }
    for (words, status) in [(510, 200), (511, 400)] {
        let body = json!({ "model": "vectors", "input": "word ".repeat(words) });
        let answer = sarai.post("/v1/embeddings", body.to_string()).await;
        assert_eq!(answer.status, status, "{words}: {}", answer.text);
    }
}

#[tokio::test]
async fn documents_are_ranked_up_to_their_limit() {
    let file = sketch("ranking/minilm.gguf");
    let sarai =
        Sarai::start(&format!("models:\n  ranker: {{ backend: gguf_native, gguf_path: {file}, role: embedding }}\n"));
    let rank = async |documents: usize, top: Value| {
        let body = json!({ "model": "ranker", "query": "hi", "documents": vec!["x"; documents], "top_n": top });
        let answer = sarai.post("/v1/rerank", body.to_string()).await;
        (answer.status, answer.json()["results"].as_array().map(Vec::len))
    };
    assert_eq!(rank(2048, Value::Null).await, (200, Some(2048)));
    assert_eq!(rank(2049, Value::Null).await, (400, None));
    assert_eq!(rank(0, Value::Null).await, (400, None));
    for (top, wanted) in [(json!(1), 1), (json!(3), 3), (json!(4), 3)] {
        assert_eq!(rank(3, top.clone()).await, (200, Some(wanted)), "{top}");
    }
    assert_eq!(rank(3, json!(0)).await, (400, None));
}

/// That something may be repeated more often than llama.cpp counts is checked afterwards; that it must be is refused, as is what is nested deeper
/// than JSON may be here.
#[tokio::test]
async fn schemas_are_followed_up_to_their_limits() {
    let sarai = Sarai::start(&models());
    let ask = async |schema: &Value| {
        let answer = sarai
            .post("/v1/chat/completions", chat("m", "Hi", json!({ "json_schema": schema, "max_tokens": 1 })))
            .await;
        (answer.status, answer.header("x-sarai-degraded").map(str::to_owned), answer.text)
    };
    for (keyword, of, most) in [
        ("maxLength", "string", 2000),
        ("minLength", "string", 2000),
        ("maxItems", "array", 1990),
        ("minItems", "array", 2001),
    ] {
        let schema = |count: u64| json!({ "type": of, keyword: count, "items": { "type": "null" } });
        let (status, degraded, text) = ask(&schema(most)).await;
        assert_eq!((status, degraded), (200, None), "{keyword}: {text}");
        let (status, degraded, text) = ask(&schema(most + 1)).await;
        match keyword.starts_with("max") {
            true => assert_eq!((status, degraded), (200, None), "{text}"),
            false => assert!(status == 400 && text.contains("number of repetitions"), "{status} {text}"),
        }
    }
    let nested = |depth: usize| {
        (0..depth).fold(json!({ "type": "null" }), |inner, _| json!({ "type": "array", "items": inner, "minItems": 1 }))
    };
    let (status, _, text) = ask(&nested(125)).await;
    assert_eq!(status, 200, "{text}");
    let (status, _, text) = ask(&nested(127)).await;
    assert!(status == 400 && text.contains("recursion limit"), "{status} {text}");
}

#[tokio::test]
async fn a_body_is_taken_up_to_its_limit() {
    for (config, most) in [("", 32 << 20), ("server: { max_body_mb: 1 }\n", 1 << 20)] {
        let sarai = Sarai::start(&format!("{config}{}", models()));
        for (path, body) in [
            ("/v1/chat/completions", chat("m", "Hi", json!({ "max_tokens": 1 }))),
            (
                "/api/generate",
                json!({ "model": "m", "prompt": "Hi", "stream": false, "options": { "num_predict": 1 } }).to_string(),
            ),
        ] {
            // Spaces between two parts of a body are part of it.
            let of = |bytes: usize| format!("{}{}", " ".repeat(bytes - body.len()), body);
            assert_eq!(sarai.post(path, of(most)).await.status, 200, "{path} {most}");
            let refused = sarai.post(path, of(most + 1)).await;
            assert!(refused.status == 413 && refused.text.contains("max_body_mb"), "{path}: {}", refused.text);
        }
    }
}
