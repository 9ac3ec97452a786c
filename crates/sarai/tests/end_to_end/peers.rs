//! What clients of llama.cpp's server, of Ollama and of OpenAI expect beyond the fields of an answer.

use std::time::{Duration, Instant};

use crate::support::host::{Host, Step, ollama, on_host};
use crate::support::{Answer, BINARY, Ollama, Sarai, chat, minilm, qwen, sketch, smollm2};
use serde_json::{Value, json};

fn one_model() -> String {
    format!(
        "models:\n  coder: {{ backend: gguf_native, gguf_path: {}, context_length: 1024 }}\n  vectors: {{ backend: gguf_native, gguf_path: {}, role: embedding }}\n",
        qwen(),
        minilm()
    )
}

#[tokio::test]
async fn llama_cpps_paths_are_there_and_the_only_model_need_not_be_named() {
    let sarai = Sarai::start(&one_model());
    let body = json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 8, "temperature": 0 });
    let answer = sarai.post("/chat/completions", body.to_string()).await.json();
    assert_eq!(answer["model"], "coder", "{answer}");
    let timings = &answer["timings"];
    assert_eq!(timings["predicted_n"], answer["usage"]["completion_tokens"]);
    assert!(timings["prompt_ms"].as_f64().unwrap() > 0.0 && timings["predicted_per_second"].as_f64().unwrap() > 0.0);
    let prompt = json!({ "prompt": "Hi", "max_tokens": 2 });
    assert_eq!(sarai.post("/completions", prompt.to_string()).await.json()["object"], "text_completion");
    let vectors = sarai.post("/embeddings", json!({ "model": "vectors", "input": "Hi" }).to_string()).await.json();
    assert_eq!(vectors["data"][0]["embedding"].as_array().unwrap().len(), 384);
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    let chunks = sarai.post("/chat/completions", streamed.to_string()).await.sse();
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": null }));
    assert!(chunks.last().unwrap()["timings"]["predicted_ms"].is_number(), "{chunks:?}");
    let vectors = sarai.post("/v1/embeddings", json!({ "input": "one" }).to_string()).await.json();
    assert_eq!(vectors["model"], "vectors", "{vectors}");
    let listed = sarai.get("/models").await.json();
    assert_eq!(listed["data"].as_array().unwrap().len(), 2);
    assert!(listed["data"][0]["created"].as_u64().unwrap() > 1_700_000_000);
    let coder = &listed["data"][0];
    assert_eq!((&coder["meta"]["n_ctx"], &coder["max_model_len"]), (&json!(1024), &json!(1024)), "{coder}");
    assert_eq!(coder["meta"]["n_ctx_train"], 32768, "{coder}");
    assert!(coder["meta"]["n_params"].as_u64().unwrap() > 400_000_000, "{coder}");
    let answered = |answer: &Value| answer["system_fingerprint"].as_str().is_some_and(|print| print.starts_with('b'));
    assert!(answered(&answer) && chunks.iter().all(answered), "{answer}");
    assert_eq!(sarai.get("/v1/health").await.status, 200);
    let long = json!({ "messages": [{ "role": "user", "content": "word ".repeat(2000) }] });
    let refused = sarai.post("/v1/chat/completions", long.to_string()).await;
    let error = &refused.json()["error"];
    assert_eq!((refused.status, &error["n_ctx"]), (400, &json!(1024)));
    assert_eq!(error["type"], "exceed_context_size_error");
    let mut few = body.clone();
    few["n_predict"] = 2.into();
    let few = sarai.post("/v1/chat/completions", few.to_string()).await.json();
    assert_eq!(few["usage"]["completion_tokens"], 2, "llama.cpp's name counts first: {few}");
    assert!(error["n_prompt_tokens"].as_u64().unwrap() > 2000, "{error}");
    assert!(error["message"].as_str().unwrap().contains("exceeds the available context size"), "{error}");

    let two = format!("{}  other: {{ backend: gguf_native, gguf_path: {} }}\n", one_model(), smollm2());
    let sarai = Sarai::start(&two);
    let refused = sarai.post("/v1/chat/completions", body.to_string()).await;
    assert!(refused.status == 400 && refused.text.contains("`coder`, `other`"), "{}", refused.text);
}

#[tokio::test]
async fn ollamas_clients_find_its_words_and_its_tags() {
    let sarai = Sarai::start(&one_model());
    assert_eq!(sarai.get("/").await.text, "Ollama is running");
    let tags = sarai.get("/api/tags").await.json();
    let names: Vec<_> = tags["models"].as_array().unwrap().iter().map(|model| model["model"].clone()).collect();
    assert_eq!(names, ["coder:latest", "vectors:latest"]);
    for name in ["coder:latest", "Coder", "CODER:latest"] {
        let body = json!({ "model": name, "prompt": "Hi", "stream": false, "options": { "num_predict": 1 } });
        let answer = sarai.post("/api/generate", body.to_string()).await;
        assert_eq!((answer.status, &answer.json()["model"]), (200, &json!(name)), "{}", answer.text);
    }
    let ps = sarai.get("/api/ps").await.json();
    assert_eq!(ps["models"][0]["name"], "coder:latest", "{ps}");
    let shown = sarai.post("/api/show", r#"{"model":"coder"}"#).await.json();
    assert_eq!(shown["capabilities"], json!(["completion", "tools", "insert"]), "{shown}");
    let raw = json!({ "model": "coder", "prompt": "Hi", "raw": true, "system": "Be brief." });
    let refused = sarai.post("/api/generate", raw.to_string()).await;
    assert!(refused.status == 400 && refused.text.contains("raw mode does not support"), "{}", refused.text);
}

/// As Gemma's and Mistral's templates want it; Ollama says in one turn what follows itself, too.
#[tokio::test]
async fn who_speaks_twice_is_heard_by_templates_that_want_roles_to_alternate() {
    let file = sketch("sensing/random/gemma3.gguf");
    let sarai = Sarai::start(&format!("models:\n  strict: {{ backend: gguf_native, gguf_path: {file} }}\n"));
    let tokens = async |messages: Value| {
        let body = json!({ "model": "strict", "messages": messages, "max_tokens": 1 });
        let answer = sarai.post("/v1/chat/completions", body.to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()["usage"]["prompt_tokens"].clone()
    };
    let user = |text: &str| json!({ "role": "user", "content": text });
    let twice = tokens(json!([user("One."), user("Two.")])).await;
    assert_eq!(twice, tokens(json!([user("One.\n\nTwo.")])).await);
}

#[tokio::test]
async fn who_has_no_key_is_refused_and_pages_of_other_machines_are_not_let_in() {
    let config = format!(
        "server: {{ api_keys: [\"${{KEY}}\"], cors_origins: [\"https://chat.example.org\"] }}\n{}",
        one_model()
    );
    let sarai = Sarai::start_with_env(&config, &[("KEY", "very-secret")]);
    for (path, body) in [
        ("/v1/chat/completions", chat("coder", "Hi", json!({}))),
        ("/api/chat", json!({ "model": "coder", "messages": [] }).to_string()),
    ] {
        let url = format!("{}{path}", sarai.url);
        let refused = sarai.post(path, body.clone()).await;
        assert_eq!(refused.status, 401, "{}", refused.text);
        let wrong = sarai.client.post(&url).bearer_auth("very-secrets").body(body.clone()).send().await.unwrap();
        let wrong = Answer::of(wrong).await;
        assert!(wrong.status == 401 && !wrong.text.contains("very-secret"), "{}", wrong.text);
        let right = sarai.client.post(&url).bearer_auth("very-secret").body(body).send().await.unwrap();
        assert_eq!(right.status(), 200);
    }
    assert_eq!(sarai.post("/v1/chat/completions", "").await.json()["error"]["type"], "authentication_error");
    for open in ["/health", "/v1/models", "/"] {
        assert_eq!(sarai.get(open).await.status, 200, "{open}");
    }
    let mut listed = std::process::Command::new(BINARY);
    let with_key = listed.args(["ps", "--url", &sarai.url]).env("SARAI_API_KEY", "very-secret").output().unwrap();
    assert!(with_key.status.success(), "{}", String::from_utf8_lossy(&with_key.stderr));
    let allowed = async |origin: &str| {
        let asks = sarai.client.request(reqwest::Method::OPTIONS, format!("{}/v1/chat/completions", sarai.url));
        let asks = asks.header("origin", origin).header("access-control-request-method", "POST");
        let answer = asks.header("access-control-request-headers", "authorization, content-type").send().await.unwrap();
        let headers = answer.headers();
        let names = headers.get("access-control-allow-headers").map(|names| names.to_str().unwrap().to_owned());
        headers.contains_key("access-control-allow-origin").then(|| names.unwrap())
    };
    assert_eq!(allowed("https://chat.example.org").await.as_deref(), Some("authorization, content-type"));
    assert!(allowed("http://localhost:3000").await.is_some());
    assert_eq!(allowed("https://evil.example.org").await, None);
    let simple = async |origin: &str| {
        let url = format!("{}/models/unload", sarai.url);
        let asks =
            sarai.client.post(url).bearer_auth("very-secret").header("origin", origin).body(r#"{"model":"coder"}"#);
        asks.send().await.unwrap().status().as_u16()
    };
    assert_eq!((simple("https://evil.example.org").await, simple("null").await), (403, 403), "not even unread");
    assert_eq!((simple("https://chat.example.org").await, simple(&sarai.url).await), (200, 200));
}

/// All attempts share it: the host that hangs, and whoever would be next.
#[tokio::test]
async fn a_request_ends_with_its_own_deadline() {
    let host = Host::start(|_, _| vec![Step::Hold]);
    let sarai = Sarai::start(&on_host(&host.url, ""));
    let url = format!("{}/v1/chat/completions", sarai.url);
    let ask = |within: &str| {
        sarai.client.post(&url).header("x-sarai-timeout", within).body(chat("solar", "Hi", json!({}))).send()
    };
    let began = Instant::now();
    let late = Answer::of(ask("0.4").await.unwrap()).await;
    assert!(late.status == 504 && late.text.contains("request_seconds"), "{}", late.text);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    host.until("the client's leave", |asked| asked.iter().all(|one| one.left.is_some())).await;
    for wrong in ["soon", "0", "-1", "inf", "NaN"] {
        assert_eq!(ask(wrong).await.unwrap().status(), 400, "{wrong}");
    }
    let config =
        on_host(&host.url, "").replace("model_name: m", "model_name: m\n    deadlines: { request_seconds: 0.4 }");
    let sarai = Sarai::start(&config);
    assert_eq!(sarai.post("/v1/chat/completions", chat("solar", "Hi", json!({}))).await.status, 504);
    let vectors = json!({ "model": "solar", "input": "one" });
    assert_eq!(sarai.post("/v1/embeddings", vectors.to_string()).await.status, 504);
}

/// As Ollama has it; and the client is told.
#[tokio::test]
async fn the_oldest_messages_of_a_long_chat_make_room_in_ollamas_api() {
    let sarai = Sarai::start(&one_model());
    let mut messages =
        vec![json!({ "role": "system", "content": "The word is kiwi. Repeat the word that you are told." })];
    for n in 0..60 {
        messages.push(json!({ "role": "user", "content": format!("This is the message number {n} of a long chat.") }));
        messages.push(json!({ "role": "assistant", "content": "I see. Please go on." }));
    }
    messages.push(json!({ "role": "user", "content": "What is the word? Answer with that word only." }));
    let body = |more: Value| {
        let mut body = json!({ "model": "coder", "stream": false, "messages": messages, "options": { "temperature": 0, "num_predict": 12 } });
        more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
        body.to_string()
    };
    let url = format!("{}/api/chat", sarai.url);
    let cut = sarai.post("/api/chat", body(json!({}))).await;
    assert_eq!((cut.status, cut.header("x-sarai-degraded")), (200, Some("prompt:truncated")), "{}", cut.text);
    let answer = cut.json();
    assert!(answer["message"]["content"].as_str().unwrap().to_lowercase().contains("kiwi"), "{answer}");
    let tokens = answer["prompt_eval_count"].as_u64().unwrap();
    assert!((900..1024).contains(&tokens), "as much as there is room for: {tokens}");
    let refused = sarai.post("/api/chat", body(json!({ "truncate": false }))).await;
    assert!(refused.status == 400 && refused.text.contains("context size"), "{}", refused.text);
    let strict = sarai.client.post(&url).header("x-sarai-strict", "true").body(body(json!({}))).send().await.unwrap();
    assert_eq!(strict.status(), 400);
    let long = "word ".repeat(3000);
    let tiny = json!({ "model": "coder", "prompt": "one two three", "options": { "num_ctx": 1 } });
    assert_eq!(sarai.post("/api/generate", tiny.to_string()).await.status, 400, "there is no room for anything");
    let single = json!({ "model": "coder", "stream": false, "prompt": long, "options": { "num_predict": 4 } });
    let single = sarai.post("/api/generate", single.to_string()).await;
    assert_eq!((single.status, single.header("x-sarai-degraded")), (200, Some("prompt:truncated")), "{}", single.text);
    // A host is asked to refuse it first, since another place may have room, and then to cut it.
    let ollama = Ollama::start();
    let sarai = Sarai::start(&format!(
        "models:\n  coder: {{ backend: ollama_http, url: \"{}\", model_name: solar, context_length: 512 }}\n",
        ollama.url
    ));
    let cut = sarai.post("/api/chat", body(json!({}))).await;
    assert_eq!((cut.status, cut.header("x-sarai-degraded")), (200, Some("prompt:truncated")), "{}", cut.text);
}

#[tokio::test]
async fn what_follows_a_gap_is_taken_into_account_where_the_model_can_fill_in() {
    let more = format!("  plain: {{ backend: gguf_native, gguf_path: {} }}\n", smollm2());
    let sarai = Sarai::start(&format!("{}{more}", one_model()));
    let (before, behind) = ("def product(first, second):\n    return ", "\n\nprint(product(2, 3))\n");
    let generate = json!({ "model": "coder", "stream": false, "prompt": before, "suffix": behind, "options": { "temperature": 0, "num_predict": 12 } });
    let filled = sarai.post("/api/generate", generate.to_string()).await.json();
    assert!(filled["response"].as_str().unwrap().trim_start().starts_with("first * second"), "{filled}");
    let completion =
        json!({ "model": "coder", "prompt": before, "suffix": behind, "temperature": 0, "max_tokens": 12 });
    let completion = sarai.post("/v1/completions", completion.to_string()).await.json();
    assert_eq!(completion["choices"][0]["text"], filled["response"]);
    let plain = json!({ "model": "plain", "prompt": before, "suffix": behind });
    let refused = sarai.post("/api/generate", plain.to_string()).await;
    let says = refused.json()["error"].as_str().unwrap().to_owned();
    assert!(refused.status == 400 && says.starts_with("\"plain\" does not support insert"), "{says}");
    let more = format!("  either: {{ backend: gguf_native, gguf_path: {}, fallback_models: [coder] }}\n", smollm2());
    let sarai = Sarai::start(&format!("{}{more}", one_model()));
    let either = json!({ "model": "either", "prompt": before, "suffix": behind, "stream": false, "options": { "temperature": 0, "num_predict": 12 } });
    let answer = sarai.post("/api/generate", either.to_string()).await;
    assert_eq!((answer.status, answer.header("x-sarai-degraded")), (200, Some("model:coder")), "{}", answer.text);
}

#[tokio::test]
async fn a_host_is_told_to_unload_and_shows_its_model() {
    let host = Host::start(|_, _| ollama(&["yes"]));
    let sarai = Sarai::start(&on_host(&host.url, ""));
    let unload = json!({ "model": "solar", "keep_alive": 0 });
    let unloaded = sarai.post("/api/generate", unload.to_string()).await;
    assert_eq!((unloaded.status, &unloaded.json()["done_reason"]), (200, &json!("unload")));
    let asked = host.asked();
    let keep = &asked.last().unwrap().body["keep_alive"];
    assert!(asked.last().unwrap().head.starts_with("POST /api/generate") && keep == "0ms", "{asked:?}");
    let away = Sarai::start(&on_host(&Ollama::unreachable(), ""));
    assert_eq!(away.post("/api/generate", unload.to_string()).await.status, 502, "nobody was told");

    let ollama = Ollama::start();
    let sarai = Sarai::start(&format!("models:\n  solar: {{ backend: ollama_http, url: \"{}\" }}\n", ollama.url));
    let shown = sarai.post("/api/show", json!({ "model": "solar" }).to_string()).await.json();
    assert_eq!(shown["model_info"]["general.architecture"], "llama", "{shown}");
    assert!(shown["capabilities"].to_string().contains("completion"));
    let local = Sarai::start(&one_model());
    let shown = local.post("/api/show", json!({ "model": "coder" }).to_string()).await.json();
    assert!(shown["model_info"]["general.parameter_count"].as_u64().unwrap() > 100_000_000);
    assert!(shown["parameters"].as_str().unwrap().starts_with("num_ctx"), "{}", shown["parameters"]);
    let version = local.get("/api/version").await.json();
    assert_eq!(version["sarai"], env!("CARGO_PKG_VERSION"));
}

/// Those of Ollama's own integration tests that judge the server, and not what a larger model knows.
const OLLAMAS: [&str; 13] = [
    "TestAPIListModels",
    "TestAPIGenerateLogprobs",
    "TestAPIChatLogprobs",
    "TestAPIToolCalling",
    "TestNumPredict",
    "TestEmbedCosineDistanceCorrelation",
    "TestAllMiniLMEmbeddings",
    "TestAllMiniLMEmbed",
    "TestAllMiniLMBatchEmbed",
    "TestAllMiniLMEmbedTruncate",
    "TestEmbedTruncation",
    "TestEmbedLargeInput",
    "TestEmbedStatusCode",
];

/// Compiled from its source, unmodified. The names that it asks for stand for the weights that are here.
#[tokio::test]
async fn ollamas_own_tests_pass() {
    let program = std::env::var("SARAI_OLLAMA").expect("SARAI_OLLAMA is missing: run the tests with `make test`");
    let program = std::path::Path::new(&program).with_file_name("integration.test");
    let sarai = Sarai::start(&format!(
        "models:\n  llama3.2:1b: {{ backend: gguf_native, gguf_path: {}, aliases: [\"llama3.2\", \"qwen3:0.6b\"] }}\n  all-minilm: {{ backend: gguf_native, gguf_path: {}, role: embedding }}\n",
        qwen(),
        minilm()
    ));
    let mut tests = tokio::process::Command::new(program);
    tests.args(["-test.v", "-test.timeout", "5m", "-test.run", &format!("^({})$", OLLAMAS.join("|"))]);
    tests.env("OLLAMA_HOST", &sarai.url).env("OLLAMA_TEST_EXISTING", "1").kill_on_drop(true);
    let said = tests.output().await.unwrap();
    let said = String::from_utf8_lossy(&said.stdout);
    for name in OLLAMAS {
        assert!(said.contains(&format!("--- PASS: {name} (")), "{name}: {said}");
    }
    // What is skipped for lack of a model passes, too.
    for case in
        ["TestAPIToolCalling/llama3.2", "TestEmbedStatusCode/all-minilm", "TestAllMiniLMEmbedTruncate/truncate_error"]
    {
        assert!(said.contains(&format!("--- PASS: {case} (")), "{case}: {said}");
    }
}
