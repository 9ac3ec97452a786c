//! Local models through the real binary: sampling, streaming, sharing, limits.

use crate::support::{Sarai, chat, gemma, qwen, sketch, smollm2};
use futures_util::StreamExt;
use futures_util::future::join_all;
use serde_json::{Value, json};

fn config(more: &str) -> String {
    format!(
        "memory: {{ max_ram_gb: 4, max_concurrent_llms: 2 }}\nmodels:\n  lfm2:\n    backend: gguf_native\n    gguf_path: {}\n    context_length: 1024\n    parallel: 4\n{more}",
        smollm2()
    )
}

#[tokio::test]
async fn streamed_and_whole_answers_are_the_same_text_and_count_the_same_tokens() {
    let sarai = Sarai::start(&config(""));
    let whole = sarai.post("/v1/chat/completions", chat("lfm2", "Name three colours.", json!({}))).await;
    assert_eq!(whole.status, 200, "{}", whole.text);
    assert_eq!(whole.header("x-sarai-served-by"), Some("lfm2@gguf_native"));
    let whole = whole.json();
    let options = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let streamed = sarai.post("/v1/chat/completions", chat("lfm2", "Name three colours.", options)).await;
    assert!(streamed.text.ends_with("data: [DONE]\n\n"));
    let chunks = streamed.sse();
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert!(chunks.len() > 4, "token by token: {chunks:?}");
    assert_eq!(whole["choices"][0]["message"]["content"].as_str(), Some(text.as_str()));
    let usage = &chunks.last().unwrap()["usage"];
    assert_eq!(usage["completion_tokens"], whole["usage"]["completion_tokens"]);
    assert_eq!(usage["prompt_tokens"], whole["usage"]["prompt_tokens"]);
}

#[tokio::test]
async fn a_seed_repeats_an_answer_and_another_seed_changes_it() {
    let sarai = Sarai::start(&config(""));
    let ask = async |seed: u32| {
        let body = chat("lfm2", "Tell a story.", json!({ "seed": seed, "temperature": 1.5, "max_tokens": 24 }));
        sarai.post("/v1/chat/completions", body).await.json()["choices"][0]["message"]["content"].to_string()
    };
    let (first, again, other) = (ask(1).await, ask(1).await, ask(2).await);
    assert_eq!(first, again);
    assert_ne!(first, other);
}

#[tokio::test]
async fn max_tokens_stop_logit_bias_and_ignore_eos_are_obeyed() {
    let sarai = Sarai::start(&config(""));
    let ask = async |more| {
        sarai.post("/v1/chat/completions", chat("lfm2", "Tell me a long story about a fox.", more)).await.json()
    };
    let free = ask(json!({ "max_tokens": 12 })).await;
    assert_eq!(
        (&free["choices"][0]["finish_reason"], &free["usage"]["completion_tokens"]),
        (&json!("length"), &json!(12))
    );
    let text = free["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let word = text.split_whitespace().nth(2).unwrap();
    let stopped = ask(json!({ "max_tokens": 12, "stop": [word] })).await;
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert_eq!(stopped["choices"][0]["message"]["content"].as_str().unwrap(), &text[..text.find(word).unwrap()]);
    // The model ends this one by itself otherwise.
    let short = async |more| {
        let answer = sarai.post("/v1/chat/completions", chat("lfm2", "Say yes.", more)).await;
        let usage = answer.json()["usage"]["completion_tokens"].as_u64().unwrap();
        (
            usage,
            answer.json()["choices"][0]["finish_reason"].clone(),
            answer.header("x-sarai-degraded").map(str::to_owned),
        )
    };
    let (tokens, finish, _) = short(json!({ "max_tokens": 200, "temperature": 0 })).await;
    assert!(tokens < 200 && finish == "stop", "{tokens} {finish}");
    let endless = json!({ "max_tokens": 200, "temperature": 0, "ignore_eos": true });
    assert_eq!(short(endless.clone()).await, (200, json!("length"), None));
    let mut formed = endless;
    formed["response_format"] =
        json!({ "type": "json_schema", "json_schema": { "name": "a", "schema": { "enum": ["yes"] } } });
    let (tokens, finish, degraded) = short(formed).await;
    assert!(tokens < 20 && finish == "stop", "a form ends with itself: {tokens} {finish}");
    assert_eq!(degraded.as_deref(), Some("ignore_eos"));
    let forced = ask(json!({ "max_tokens": 4, "logit_bias": { "28": 100 } })).await;
    let text = forced["choices"][0]["message"]["content"].as_str().unwrap();
    assert_eq!(text.chars().collect::<std::collections::HashSet<_>>().len(), 1, "one token over and over: {text}");
}

#[tokio::test]
async fn a_prompt_of_tokens_is_that_of_its_text() {
    let sarai = Sarai::start(&config(""));
    let ask = async |prompt: Value| {
        let body = json!({ "model": "lfm2", "prompt": prompt, "max_tokens": 12, "temperature": 0 });
        sarai.post("/v1/completions", body.to_string()).await
    };
    // "A sky" in SmolLM2's vocabulary, which puts no mark before it.
    let of_text = ask(json!("A sky")).await.json();
    assert_eq!(of_text["usage"]["prompt_tokens"], 2, "{of_text}");
    let vectors = ask(json!([[49, 6376], "A sky"])).await;
    let both = vectors.json();
    assert_eq!(vectors.status, 200, "{}", vectors.text);
    assert_eq!(both["choices"][0]["text"], of_text["choices"][0]["text"], "{both}");
    assert_eq!(both["choices"][1]["text"], of_text["choices"][0]["text"], "{both}");
    let unknown = ask(json!([999_999])).await;
    assert!(unknown.status == 400 && unknown.text.contains("999999"), "{}", unknown.text);
}

/// As Ollama's clients of `/api/generate` have a conversation.
#[tokio::test]
async fn who_goes_on_from_the_context_of_an_answer_is_answered_as_in_a_conversation() {
    let hosted = format!(
        "  hosted: {{ backend: ollama_http, fallback: gguf_native, url: 'http://127.0.0.1:9', gguf_path: {} }}\n",
        smollm2()
    );
    let guest = "  guest: { backend: ollama_http, url: 'http://127.0.0.1:9', fallback_models: [lfm2] }\n";
    let strict = sketch("sensing/random/gemma3.gguf");
    let strict = format!("  strict: {{ backend: gguf_native, gguf_path: {strict} }}\n");
    let sarai = Sarai::start(&config(&format!("{hosted}{guest}{strict}")));
    let ask = async |path: &str, more: Value| {
        let mut body = json!({ "model": "lfm2", "stream": false, "options": { "temperature": 0, "num_predict": 40 } });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        sarai.post(path, body.to_string()).await
    };
    let (hello, question) = ("My name is Ann. Say hello.", "What is my name?");
    let generate = async |more: Value| ask("/api/generate", more).await;
    let first = generate(json!({ "prompt": hello })).await.json();
    let count = |answer: &Value| answer["prompt_eval_count"].as_u64().unwrap() + answer["eval_count"].as_u64().unwrap();
    let length = |answer: &Value| answer["context"].as_array().map_or(0, |tokens| tokens.len() as u64);
    assert_eq!(length(&first), count(&first), "all that was said: {first}");

    let said = |text: &Value| json!([{ "role": "user", "content": hello }, { "role": "assistant", "content": text }, { "role": "user", "content": question }]);
    let chat = ask("/api/chat", json!({ "messages": said(&first["response"]) })).await.json();
    let further = generate(json!({ "prompt": question, "context": first["context"] })).await.json();
    assert_eq!(further["prompt_eval_count"], chat["prompt_eval_count"], "{further}");
    assert_eq!(further["response"], chat["message"]["content"]);
    let lines = generate(json!({ "prompt": question, "context": first["context"], "stream": true })).await.lines();
    assert_eq!(lines.last().unwrap()["context"], further["context"]);
    assert!(lines.iter().rev().skip(1).all(|line| line.get("context").is_none()), "{lines:?}");

    let word = first["response"].as_str().unwrap().split_whitespace().nth(2).unwrap();
    let stop = json!({ "temperature": 0, "num_predict": 40, "stop": [word] });
    let stopped = generate(json!({ "prompt": hello, "options": stop })).await.json();
    let context = json!({ "prompt": "Go on.", "context": stopped["context"] });
    // Up to within the token that the word begins in, whose space is out.
    let of = |answer: &Value| answer["context"].as_array().unwrap().clone();
    let (whole, told) = (of(&first), of(&stopped));
    let same = whole.iter().zip(&told).take_while(|(a, b)| a == b).count();
    assert!(stopped["response"].as_str().unwrap().ends_with(' '), "{stopped}");
    assert_eq!((same, told.len() as u64), (told.len() - 1, count(&stopped)), "nothing of what ended it: {stopped}");
    assert_eq!(generate(context).await.status, 200);

    let raw = generate(json!({ "prompt": hello, "raw": true })).await.json();
    assert!(raw.get("context").is_none(), "{raw}");
    for (wrong, says) in [
        (json!({ "prompt": "Hi", "context": [1, 999_999] }), "999999"),
        (json!({ "prompt": "Hi", "context": [1], "raw": true }), "leave `context` out"),
        (json!({ "prompt": "Hi", "context": "words" }), "context"),
        // It may be of a host, where tokens mean something else.
        (json!({ "prompt": "Hi", "context": [1], "model": "hosted" }), ""),
        (json!({ "prompt": "Hi", "context": [1], "model": "guest" }), ""),
    ] {
        let refused = generate(wrong.clone()).await;
        assert!(refused.status >= 400 && refused.text.contains(says), "{wrong}: {}", refused.text);
    }
    for model in ["hosted", "guest"] {
        let unsaid = generate(json!({ "prompt": "Hi", "model": model })).await.json();
        assert!(unsaid["done"] == true && unsaid.get("context").is_none(), "{unsaid}");
    }
    // Its template wants roles to alternate, and the system first.
    let asked = json!({ "prompt": "Hi", "model": "strict", "system": "Be brief.", "options": { "num_predict": 4 } });
    let mut further = asked.clone();
    further["context"] = generate(asked).await.json()["context"].clone();
    let answer = generate(further).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
}

#[tokio::test]
async fn ten_requests_for_a_cold_model_load_it_once_and_are_all_answered() {
    let sarai = Sarai::start(&config(""));
    let asks = (0..10).map(|n| sarai.post("/v1/chat/completions", chat("lfm2", &format!("Say {n}."), json!({}))));
    for answer in join_all(asks).await {
        assert_eq!(answer.status, 200, "{}", answer.text);
    }
    assert_eq!(sarai.worker_pids().await.len(), 1);
}

#[tokio::test]
async fn models_answer_at_the_same_time_and_two_names_on_one_file_share_its_worker() {
    let more = format!(
        "  solar:\n    backend: gguf_native\n    gguf_path: {0}\n  omni:\n    backend: gguf_native\n    gguf_path: {0}\n",
        qwen()
    );
    let sarai = Sarai::start(&config(&more));
    let asks = ["lfm2", "solar", "omni"]
        .map(|model| sarai.post("/v1/chat/completions", chat(model, "Say hello.", json!({ "stream": true }))));
    for answer in join_all(asks).await {
        assert!(answer.text.ends_with("data: [DONE]\n\n"), "{}", answer.text);
    }
    let ps = sarai.ps().await;
    assert_eq!(ps["workers"].as_array().unwrap().len(), 2, "{ps}");
    for worker in ps["workers"].as_array().unwrap() {
        let held = worker["anonymous_bytes"].as_u64().unwrap() + worker["file_bytes"].as_u64().unwrap();
        assert!(held > 90 << 20, "measured: {worker}");
        assert!(held <= worker["planned_bytes"].as_u64().unwrap(), "planned high enough: {worker}");
    }
}

#[tokio::test]
async fn a_load_that_does_not_fit_is_refused_with_an_itemised_reason() {
    let config = format!(
        "memory: {{ max_ram_gb: 0.3 }}\nmodels:\n  lfm2: {{ backend: gguf_native, gguf_path: {}, context_length: 512 }}\n  omni: {{ backend: gguf_native, gguf_path: {} }}\n",
        smollm2(),
        qwen()
    );
    let sarai = Sarai::start(&config);
    assert_eq!(sarai.post("/v1/chat/completions", chat("lfm2", "Hi", json!({}))).await.status, 200);
    let refused = sarai.post("/v1/chat/completions", chat("omni", "Hi", json!({}))).await;
    assert_eq!(refused.status, 503);
    let error = &refused.json()["error"];
    assert_eq!(error["code"], "insufficient_memory");
    assert_eq!(error["sarai"]["held"][0]["model"], "lfm2");
    assert!(error["sarai"]["needs"].as_array().unwrap().iter().any(|part| part["name"] == "kv"), "{error}");
    assert_eq!(
        sarai.post("/v1/chat/completions", chat("lfm2", "Hi", json!({}))).await.status,
        200,
        "the resident one still serves"
    );
}

#[tokio::test]
async fn max_concurrent_llms_limits_resident_llms() {
    let config = format!(
        "memory: {{ max_ram_gb: 4, max_concurrent_llms: 1 }}\nmodels:\n  lfm2: {{ backend: gguf_native, gguf_path: {}, context_length: 512 }}\n  omni: {{ backend: gguf_native, gguf_path: {} }}\n",
        smollm2(),
        qwen()
    );
    let sarai = Sarai::start(&config);
    assert_eq!(sarai.post("/api/generate", r#"{"model":"lfm2"}"#).await.json()["done_reason"], "load");
    let refused = sarai.post("/api/chat", r#"{"model":"omni","messages":[{"role":"user","content":"Hi"}]}"#).await;
    assert_eq!((refused.status, &refused.json()["sarai"]["max_concurrent_llms"]), (503, &json!(1)));
    assert_eq!(sarai.post("/api/generate", r#"{"model":"lfm2","keep_alive":0}"#).await.json()["done_reason"], "unload");
    sarai.until("lfm2 is unloaded", |ps| ps["workers"].as_array().unwrap().is_empty()).await;
    let body =
        r#"{"model":"omni","stream":false,"options":{"num_predict":4},"messages":[{"role":"user","content":"Hi"}]}"#;
    assert_eq!(sarai.post("/api/chat", body).await.status, 200);
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_slot_at_once() {
    let config = format!(
        "models:\n  lfm2: {{ backend: gguf_native, gguf_path: {}, context_length: 8192, parallel: 1 }}\n",
        smollm2()
    );
    let sarai = Sarai::start(&config);
    let endless = chat(
        "lfm2",
        "Write a very long story.",
        json!({ "stream": true, "max_tokens": 8000, "logit_bias": { "2": -100, "0": -100 } }),
    );
    let response =
        sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(endless.clone()).send().await.unwrap();
    let mut chunks = response.bytes_stream();
    chunks.next().await.unwrap().unwrap();
    drop(chunks);
    // The only slot is free again, or this would wait for eight thousand tokens.
    let quick = sarai.post("/v1/chat/completions", chat("lfm2", "Hi", json!({ "max_tokens": 2 })));
    let quick = tokio::time::timeout(std::time::Duration::from_secs(10), quick).await.expect("the slot was not freed");
    assert_eq!(quick.status, 200);
    // The same for a client that does not stream and hangs up.
    let whole = endless.replace("\"stream\":true", "\"stream\":false");
    let request = sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(whole).send();
    let asked = tokio::spawn(request);
    sarai.until("the request runs", |ps| ps["workers"][0]["busy"] == 1).await;
    asked.abort();
    sarai.until("the request is gone", |ps| ps["workers"][0]["busy"] == 0).await;
}

#[tokio::test]
async fn a_json_schema_shapes_the_answer() {
    let config = format!("models:\n  omni: {{ backend: gguf_native, gguf_path: {} }}\n", qwen());
    let sarai = Sarai::start(&config);
    let schema = json!({ "type": "object", "properties": { "colour": { "enum": ["red", "blue"] } }, "required": ["colour"], "additionalProperties": false });
    let format = json!({ "max_tokens": 60, "response_format": { "type": "json_schema", "json_schema": { "name": "c", "schema": schema } } });
    let answer = sarai.post("/v1/chat/completions", chat("omni", "Choose a colour.", format)).await.json();
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {answer}"));
    assert!(["red", "blue"].contains(&value["colour"].as_str().unwrap()));
}

#[tokio::test]
async fn text_outside_ascii_is_streamed_in_whole_characters() {
    let config = format!("models:\n  omni: {{ backend: gguf_native, gguf_path: {} }}\n", qwen());
    let sarai = Sarai::start(&config);
    let body = chat("omni", "Repeat exactly: 🦙🦙 日本語 ñandú", json!({ "stream": true, "max_tokens": 40 }));
    let answer = sarai.post("/v1/chat/completions", body).await;
    let text: String =
        answer.sse().iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str().map(str::to_owned)).collect();
    assert!(text.contains("日本語") && !text.contains('\u{fffd}'), "{text}");
}

#[tokio::test]
async fn top_k_top_p_min_p_and_penalties_shape_the_choice() {
    let sarai = Sarai::start(&config(""));
    let ask = async |more| {
        let body = chat("lfm2", "Tell me about the sea.", more);
        sarai.post("/v1/chat/completions", body).await.json()["choices"][0]["message"]["content"].to_string()
    };
    let greedy = ask(json!({})).await;
    for only_the_likeliest in [json!({ "top_k": 1 }), json!({ "top_p": 0.0 }), json!({ "min_p": 1.0 })] {
        let mut hot = json!({ "temperature": 2, "seed": 5 });
        hot.as_object_mut().unwrap().extend(only_the_likeliest.as_object().unwrap().clone());
        assert_eq!(ask(hot).await, greedy, "{only_the_likeliest}");
    }
    assert_ne!(ask(json!({ "temperature": 2, "seed": 5, "top_k": 0, "top_p": 1.0, "min_p": 0.0 })).await, greedy);
    assert_ne!(ask(json!({ "repeat_penalty": 3.0, "repeat_last_n": -1 })).await, greedy);
    // llama.cpp's further ones: some leave a hot choice no other than the likeliest, others take that away.
    for only_the_likeliest in [
        json!({ "top_n_sigma": 1e-6 }),
        json!({ "mirostat": 2, "mirostat_tau": 0.0 }),
        json!({ "samplers": ["top_k"], "top_k": 1 }),
    ] {
        let mut hot = json!({ "temperature": 2, "seed": 5, "top_k": 0, "top_p": 1.0, "min_p": 0.0 });
        hot.as_object_mut().unwrap().extend(only_the_likeliest.as_object().unwrap().clone());
        assert_eq!(ask(hot).await, greedy, "{only_the_likeliest}");
    }
    assert_ne!(ask(json!({ "xtc_probability": 1.0, "xtc_threshold": 0.1 })).await, greedy);
    let body = json!({ "model": "lfm2", "stream": false, "messages": [{ "role": "user", "content": "Hi" }], "options": { "mirostat": 1, "num_predict": 2.0, "num_ctx": 512.0 } });
    let answer = sarai.post("/api/chat", body.to_string()).await;
    assert_eq!((answer.status, answer.header("x-sarai-degraded")), (200, None), "{}", answer.text);
    assert_eq!(answer.json()["eval_count"], 2, "{}", answer.text);
    assert_ne!(
        ask(json!({ "presence_penalty": 2, "frequency_penalty": 2, "max_tokens": 40 })).await,
        ask(json!({ "max_tokens": 40 })).await
    );
}

#[tokio::test]
async fn timings_tell_load_queue_prefill_and_decode_apart() {
    let sarai = Sarai::start(&config("").replace("parallel: 4", "parallel: 1"));
    let ask = async |prompt: &str| {
        let answer = sarai.post("/v1/chat/completions", chat("lfm2", prompt, json!({}))).await.json();
        answer["sarai"]["timings_ms"].clone()
    };
    let ms = |timings: &serde_json::Value, key: &str| timings[key].as_f64().unwrap();
    let cold = ask("First.").await;
    assert!(ms(&cold, "load") > 10.0 && ms(&cold, "prefill") > 0.1 && ms(&cold, "decode") > 0.1, "{cold}");
    let (a, b) = tokio::join!(ask("Second of two."), ask("Third of two."));
    assert!(ms(&a, "load") < 5.0 && ms(&b, "load") < 5.0, "{a} {b}");
    assert!(ms(&a, "queue").max(ms(&b, "queue")) > 5.0, "one of them waited for the only slot: {a} {b}");
}

#[tokio::test]
async fn a_returning_prefix_is_not_computed_again_and_changes_no_answer() {
    let sarai = Sarai::start(&config("").replace("parallel: 4", "parallel: 1"));
    let story = "Once upon a time there was a fox who lived by the river. ".repeat(8);
    let ask = async |prompt: String| sarai.post("/v1/chat/completions", chat("lfm2", &prompt, json!({}))).await.json();
    let fresh = ask(format!("{story} What did it eat?")).await;
    ask(format!("{story} Where did it sleep?")).await;
    let again = ask(format!("{story} What did it eat?")).await;
    assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 80, "{again}");
    assert_eq!(again["choices"], fresh["choices"]);
}

#[tokio::test]
async fn the_environment_limits_resident_llms_too() {
    let config = format!(
        "models:\n  a: {{ backend: gguf_native, gguf_path: {}, context_length: 512 }}\n  b: {{ backend: gguf_native, gguf_path: {} }}\n",
        smollm2(),
        qwen()
    );
    let sarai = Sarai::start_with_env(&config, &[("MAX_CONCURRENT_LLMS", "1")]);
    assert_eq!(sarai.post("/api/generate", r#"{"model":"a"}"#).await.status, 200);
    assert_eq!(sarai.post("/api/generate", r#"{"model":"b"}"#).await.status, 503);
}

#[tokio::test]
async fn evict_lru_makes_room_by_unloading_what_is_idle() {
    let config = format!(
        "memory: {{ max_concurrent_llms: 1, strategy: evict_lru }}\nmodels:\n  a: {{ backend: gguf_native, gguf_path: {}, context_length: 512 }}\n  b: {{ backend: gguf_native, gguf_path: {} }}\n",
        smollm2(),
        qwen()
    );
    let sarai = Sarai::start(&config);
    for model in ["a", "b", "a"] {
        let answer = sarai.post("/v1/chat/completions", chat(model, "Hi", json!({ "max_tokens": 2 }))).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert_eq!(sarai.worker_pids().await.len(), 1);
    }
}

#[tokio::test]
async fn models_that_share_a_worker_are_each_held_to_their_own_context() {
    let config = format!(
        "models:\n  long: {{ backend: gguf_native, gguf_path: {0}, context_length: 1024 }}\n  short: {{ backend: gguf_native, gguf_path: {0}, context_length: 100 }}\n",
        smollm2()
    );
    let sarai = Sarai::start(&config);
    let prompt = "word ".repeat(90);
    assert_eq!(sarai.post("/v1/chat/completions", chat("long", &prompt, json!({}))).await.status, 200);
    let refused = sarai.post("/v1/chat/completions", chat("short", &prompt, json!({}))).await.json();
    let message = refused["error"]["message"].as_str().unwrap();
    assert!(message.contains("the context of `short` holds 100"), "{message}");
    let more = json!({ "max_tokens": null, "logit_bias": { "0": -100, "2": -100 } });
    let filled = sarai.post("/v1/chat/completions", chat("short", "Tell a story.", more)).await.json();
    assert_eq!(
        (&filled["choices"][0]["finish_reason"], &filled["usage"]["total_tokens"]),
        (&json!("length"), &json!(101)),
        "{filled}"
    );
}

#[tokio::test]
async fn a_returning_prefix_behind_a_sliding_window_changes_no_answer() {
    let config = format!("models:\n  base: {{ backend: gguf_native, gguf_path: {}, context_length: 2048 }}\n", gemma());
    let sarai = Sarai::start(&config);
    // Longer than the window of 512 tokens, with many ways to go on.
    let story: String = (0..90).map(|n| format!("On day {n} the fox ate {} eggs. ", n * 7 % 11)).collect();
    let half = &story[..story.find("On day 20 ").unwrap()];
    let ask = async |prompt: &str| {
        let body = json!({ "model": "base", "prompt": prompt, "max_tokens": 16, "temperature": 0 }).to_string();
        sarai.post("/v1/completions", body).await.json()
    };
    let fresh = ask(half).await;
    ask(&story).await;
    // The cache now begins with this very prompt, but the window has moved on beyond its end.
    let again = ask(half).await;
    assert_eq!(again["choices"], fresh["choices"], "{again}");
    assert_eq!(again["usage"]["prompt_tokens"], fresh["usage"]["prompt_tokens"]);
}

#[tokio::test]
async fn a_short_prompt_is_answered_while_a_long_one_is_still_computed() {
    let sarai = Sarai::start(&format!(
        "models:\n  lfm2: {{ backend: gguf_native, gguf_path: {}, context_length: 2048, parallel: 2 }}\n",
        smollm2()
    ));
    sarai.post("/api/generate", r#"{"model":"lfm2"}"#).await;
    let url = format!("{}/v1/chat/completions", sarai.url);
    let long = chat("lfm2", &"word ".repeat(1600), json!({ "stream": true, "max_tokens": 2 }));
    // Its headers come with its first token.
    let mut long = tokio::spawn(sarai.client.post(url).body(long).send());
    sarai.until("it is computed", |ps| ps["workers"][0]["busy"] == 1).await;
    let short = sarai.post("/v1/chat/completions", chat("lfm2", "Hi", json!({ "max_tokens": 2 })));
    tokio::select! {
        biased;
        answer = short => assert_eq!(answer.status, 200, "{}", answer.text),
        _ = &mut long => panic!("the short prompt waited for the long one"),
    }
    assert_eq!(long.await.unwrap().unwrap().status(), 200);
}

/// Ollama and OpenAI, chats and completions, whole and streamed.
#[tokio::test]
async fn how_likely_tokens_were_is_told_where_it_is_asked_for() {
    let sarai = Sarai::start(&format!(
        "models:\n  lfm2: {{ backend: gguf_native, gguf_path: {}, context_length: 512 }}\n",
        smollm2()
    ));
    let asked = json!({ "logprobs": true, "top_logprobs": 3, "max_tokens": 6, "temperature": 0 });
    let whole = sarai.post("/v1/chat/completions", chat("lfm2", "Name a colour.", asked.clone())).await.json();
    let tokens = whole["choices"][0]["logprobs"]["content"].as_array().unwrap_or_else(|| panic!("{whole}")).clone();
    let text: String = tokens.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!(text, whole["choices"][0]["message"]["content"], "{whole}");
    for token in &tokens {
        let top: Vec<f64> =
            token["top_logprobs"].as_array().unwrap().iter().map(|one| one["logprob"].as_f64().unwrap()).collect();
        // Greedily chosen: the likeliest of those that are told of, in their order.
        assert!(top.len() == 3 && token["logprob"] == top[0] && top.is_sorted_by(|a, b| a >= b), "{token}");
        assert!(
            top.iter().all(|logprob| *logprob <= 0.0) && top.iter().map(|logprob| logprob.exp()).sum::<f64>() <= 1.0001,
            "{token}"
        );
    }
    let mut streamed = asked;
    streamed["stream"] = true.into();
    let events = sarai.post("/v1/chat/completions", chat("lfm2", "Name a colour.", streamed)).await;
    let told: usize = events
        .sse()
        .iter()
        .filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array())
        .map(Vec::len)
        .sum();
    assert_eq!(told, tokens.len(), "{}", events.text);
    let body = json!({ "model": "lfm2", "prompt": "The sky is", "logprobs": 2, "max_tokens": 4, "temperature": 0 });
    let older = sarai.post("/v1/completions", body.to_string()).await.json();
    let told = &older["choices"][0]["logprobs"];
    assert_eq!((told["tokens"].as_array().unwrap().len(), &told["text_offset"][0]), (4, &json!(0)), "{older}");
    assert_eq!(told["top_logprobs"][0].as_object().unwrap().len(), 2, "{older}");
    let body = json!({ "model": "lfm2", "messages": [{ "role": "user", "content": "Hi" }], "logprobs": true, "stream": false, "options": { "num_predict": 3 } });
    let ollama = sarai.post("/api/chat", body.to_string()).await.json();
    assert_eq!(ollama["logprobs"].as_array().unwrap_or_else(|| panic!("{ollama}")).len(), 3);
    for wrong in [json!({ "logprobs": true, "top_logprobs": 21 }), json!({ "top_logprobs": 2 })] {
        let refused = sarai.post("/v1/chat/completions", chat("lfm2", "Hi", wrong)).await;
        assert_eq!(
            (refused.status, &refused.json()["error"]["param"]),
            (400, &json!("top_logprobs")),
            "{}",
            refused.text
        );
    }
}
