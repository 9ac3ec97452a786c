//! The remote path on a real Ollama, and its failures.

use std::io::{Read, Write};
use std::net::TcpListener;

use crate::support::host::served_by;
use crate::support::{Answer, Ollama, Sarai, chat, smollm2};
use futures_util::StreamExt;
use serde_json::{Value, json};

/// `solar` on these hosts with a local fallback, and a model that only the host could serve.
fn config(url: &str) -> String {
    format!(
        "models:\n  solar:\n    backend: ollama_http\n    fallback: gguf_native\n    url: {url}\n    model_name: solar\n    gguf_path: {}\n    context_length: 2048\n    deadlines: {{ connect_seconds: 1, first_token_seconds: 20 }}\n  other: {{ backend: ollama_http, url: {url}, model_name: nonesuch }}\n",
        smollm2()
    )
}

fn ollama_body(stream: bool, n: u32) -> Value {
    json!({
        "model": "solar", "stream": stream, "messages": [{ "role": "user", "content": "Name three colours." }],
        "options": { "temperature": 0, "seed": 7, "num_predict": n, "num_ctx": 2048 },
    })
}

#[tokio::test]
async fn answers_through_sarai_equal_those_of_ollama_asked_directly() {
    let ollama = Ollama::start();
    let sarai = Sarai::start(&config(&ollama.url));
    let direct =
        |path: &str, body: &Value| sarai.client.post(format!("{}{path}", ollama.url)).body(body.to_string()).send();
    let mut body = ollama_body(false, 24);
    // The model's context is set in the configuration, as num_ctx: the same load on both ways.
    let whole = Answer::of(direct("/api/chat", &body).await.unwrap()).await.json();
    let ours = sarai.post("/api/chat", body.to_string()).await;
    assert_eq!(served_by(&ours), format!("solar@ollama_http(127.0.0.1:{})", ollama.port));
    assert_eq!(ours.header("x-sarai-fallback-reason"), None);
    let ours = ours.json();
    for key in ["message", "done_reason", "eval_count", "prompt_eval_count"] {
        assert_eq!(ours[key], whole[key], "{key}");
    }
    body["stream"] = true.into();
    let lines = sarai.post("/api/chat", body.to_string()).await.lines();
    let text: String = lines.iter().map(|line| line["message"]["content"].as_str().unwrap()).collect();
    assert_eq!(Some(text.as_str()), whole["message"]["content"].as_str());
    assert!(lines.len() > 5, "streamed token by token");

    let generate = json!({ "model": "solar", "stream": false, "raw": true, "prompt": "The sky is", "options": { "temperature": 0, "seed": 7, "num_predict": 12, "num_ctx": 2048 } });
    let whole = Answer::of(direct("/api/generate", &generate).await.unwrap()).await.json();
    let ours = sarai.post("/api/generate", generate.to_string()).await.json();
    assert_eq!((&ours["response"], &ours["eval_count"]), (&whole["response"], &whole["eval_count"]));

    let mut generate = json!({ "model": "solar", "stream": false, "system": "Be brief.", "prompt": "Name a colour.", "options": { "temperature": 0, "seed": 7, "num_predict": 12, "num_ctx": 2048 } });
    let whole = Answer::of(direct("/api/generate", &generate).await.unwrap()).await.json();
    generate["stream"] = true.into();
    let ours = sarai.post("/api/generate", generate.to_string()).await.lines();
    let text: String = ours.iter().map(|line| line["response"].as_str().unwrap()).collect();
    assert_eq!(Some(text.as_str()), whole["response"].as_str(), "with the template, streamed");

    generate["stream"] = false.into();
    (generate["prompt"], generate["context"]) = ("Name another.".into(), whole["context"].clone());
    let whole = Answer::of(direct("/api/generate", &generate).await.unwrap()).await.json();
    assert!(whole["context"].as_array().is_some_and(|tokens| tokens.len() > 30), "{whole}");
    generate["stream"] = true.into();
    let ours = sarai.post("/api/generate", generate.to_string()).await.lines();
    let (last, earlier) = ours.split_last().unwrap();
    assert_eq!((&last["done"], &last["context"]), (&json!(true), &whole["context"]), "beside the end");
    assert!(earlier.iter().all(|line| line["done"] == false && line["response"] != ""), "{earlier:?}");

    let loaded = sarai.post("/api/generate", r#"{"model":"solar"}"#).await;
    assert_eq!((loaded.status, &loaded.json()["done_reason"]), (200, &json!("load")), "{}", loaded.text);

    let both = tokio::join!(sarai.post("/api/chat", body.to_string()), sarai.post("/api/chat", body.to_string()));
    let content = |answer: &Answer| -> String {
        answer.lines().iter().map(|line| line["message"]["content"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!((both.0.status, content(&both.0)), (both.1.status, content(&both.1)), "two clients at once");
    assert!(sarai.worker_pids().await.is_empty(), "nothing was loaded here");
}

#[tokio::test]
async fn a_host_that_is_down_at_start_is_used_when_it_is_up_and_the_local_fallback_answers_until_then_and_after_it_is_killed()
 {
    let mut ollama = Ollama::start();
    ollama.kill();
    let sarai = Sarai::start(&config(&ollama.url));
    let ask = async |stream: bool| {
        sarai.post("/v1/chat/completions", chat("solar", "Say hello.", json!({ "stream": stream }))).await
    };
    let down = ask(false).await;
    assert_eq!((down.status, served_by(&down)), (200, "solar@gguf_native"), "{}", down.text);
    assert!(down.header("x-sarai-fallback-reason").unwrap().contains("cannot be reached"));
    assert!(down.json()["sarai"]["fallback_reason"].as_str().unwrap().contains("cannot be reached"));
    assert_eq!(sarai.ps().await["models"][0]["deployments"][0]["state"], "down");
    ollama.run();
    let answers_again = |ps: &serde_json::Value| ps["models"][0]["deployments"][0]["breaker"] == "closed";
    sarai.until("it is noticed without traffic", answers_again).await;
    let up = ask(true).await;
    assert!(served_by(&up).starts_with("solar@ollama_http"), "{:?}", up.headers);
    assert_eq!(sarai.ps().await["models"][0]["deployments"][0]["state"], "up");
    ollama.kill();
    let killed = ask(true).await;
    assert_eq!((killed.status, served_by(&killed)), (200, "solar@gguf_native"));
    assert!(killed.text.ends_with("data: [DONE]\n\n"));
    ollama.run();
    sarai.until("it is noticed again", answers_again).await;
    assert!(served_by(&ask(false).await).starts_with("solar@ollama_http"), "used again without a restart");
}

#[tokio::test]
async fn a_host_killed_before_its_first_token_hands_over_and_one_killed_after_it_is_resumed() {
    let mut ollama = Ollama::start();
    let sarai = Sarai::start(&config(&ollama.url));
    // A cold host sends nothing while it loads: there is time to kill it before its first token.
    let body = chat("solar", &"Tell me about colours. ".repeat(60), json!({ "stream": true }));
    let asked = tokio::spawn(sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(body).send());
    ollama.until_it_loads().await;
    ollama.kill();
    let answer = Answer::of(asked.await.unwrap().unwrap()).await;
    assert_eq!((answer.status, served_by(&answer)), (200, "solar@gguf_native"), "{}", answer.text);
    let reason = answer.header("x-sarai-fallback-reason").unwrap();
    assert!(!reason.contains("refused"), "it was killed while it worked: {reason}");
    for (policy, is_resumed) in [("same_model", true), ("never", false)] {
        ollama.run();
        let config =
            config(&ollama.url).replace("model_name: solar\n", &format!("model_name: solar\n    resume: {policy}\n"));
        let sarai = Sarai::start(&config);
        let long = chat(
            "solar",
            "Write a long story.",
            json!({ "stream": true, "max_tokens": 300, "stream_options": { "include_usage": true } }),
        );
        let response = sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(long).send().await.unwrap();
        assert!(response.headers()["x-sarai-served-by"].to_str().unwrap().starts_with("solar@ollama_http"));
        let mut chunks = response.bytes_stream();
        let mut seen = chunks.next().await.unwrap().unwrap().to_vec();
        ollama.kill();
        while let Some(Ok(chunk)) = chunks.next().await {
            seen.extend_from_slice(&chunk);
        }
        let seen = String::from_utf8(seen).unwrap();
        assert_eq!(seen.contains("\"error\""), !is_resumed, "{seen}");
        assert_eq!(seen.ends_with("data: [DONE]\n\n"), is_resumed, "a clean end only where it is one: {seen}");
        if is_resumed {
            let answer = Answer { status: 200, headers: reqwest::header::HeaderMap::new(), text: seen };
            let events = answer.sse();
            let end = events.iter().find(|event| event["sarai"].is_object()).unwrap();
            assert_eq!(end["sarai"]["resumed"][0]["by"], "solar@gguf_native", "{end}");
            let usage = &events.last().unwrap()["usage"];
            let length = end["choices"][0]["finish_reason"] == "length";
            assert!(!length || usage["completion_tokens"] == 300, "counted over both: {usage}");
        }
    }
}

#[tokio::test]
async fn a_model_that_the_host_lacks_is_said_so_or_served_by_the_fallback() {
    let ollama = Ollama::start();
    let config = config(&ollama.url).replace("model_name: solar\n", "model_name: gone\n");
    let sarai = Sarai::start(&config);
    let fallback = sarai.post("/v1/chat/completions", chat("solar", "Hi", json!({}))).await;
    assert_eq!((fallback.status, served_by(&fallback)), (200, "solar@gguf_native"));
    assert!(fallback.header("x-sarai-fallback-reason").unwrap().contains("does not have the model `gone`"));
    let none = sarai.post("/v1/chat/completions", chat("other", "Hi", json!({}))).await;
    assert_eq!((none.status, &none.json()["error"]["code"]), (502, &json!("model_missing")));
    assert_eq!(sarai.ps().await["models"][0]["deployments"][0]["state"], "model missing");
}

/// A host that answers every request with these bytes, then holds the connection if it is told to. It stands
/// beside the real one: a real Ollama cannot be made to send these on demand.
fn faulty_host(answer: &'static str, holds: bool) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut socket in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut buffer = [0; 65536];
                let _ = socket.read(&mut buffer);
                let _ = socket.write_all(answer.as_bytes());
                if holds {
                    // Until the other side gives up.
                    while socket.read(&mut buffer).is_ok_and(|n| n > 0) {}
                }
            });
        }
    });
    url
}

#[tokio::test]
async fn every_fault_before_the_first_token_leads_to_the_fallback_with_its_reason() {
    let ndjson = "HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\nconnection: close\r\n\r\n";
    let html: &'static str = Box::leak(format!("{ndjson}<html>Gateway</html>").into_boxed_str());
    let reported: &'static str =
        Box::leak(format!("{ndjson}{{\"error\":\"llama runner process has terminated\"}}\n").into_boxed_str());
    let cases = [
        (
            "HTTP/1.1 500 Oops\r\nconnection: close\r\ncontent-length: 17\r\n\r\n{\"error\":\"broken\"}",
            false,
            "status 500",
        ),
        ("HTTP/1.1 503 Busy\r\nconnection: close\r\ncontent-length: 0\r\n\r\n", false, "status 503"),
        (html, false, "not an answer"),
        (reported, false, "terminated"),
        (ndjson, false, "cut the stream"),
        (ndjson, true, "sent nothing"),
        ("", true, "sent nothing"),
        ("", false, "without an answer"),
    ];
    for (answer, holds, reason) in cases {
        let config = config(&faulty_host(answer, holds)).replace("first_token_seconds: 20", "first_token_seconds: 1");
        let sarai = Sarai::start(&config.replace("first_token_seconds: 1", "first_token_seconds: 3"));
        let served = sarai.post("/v1/chat/completions", chat("solar", "Hi", json!({ "max_tokens": 2 }))).await;
        assert_eq!((served.status, served_by(&served)), (200, "solar@gguf_native"), "{reason}: {}", served.text);
        let said = served.header("x-sarai-fallback-reason").unwrap();
        assert!(said.contains(reason), "{reason}: {said}");
    }
}

#[tokio::test]
async fn an_answer_cut_after_its_first_token_ends_with_an_error_in_both_apis() {
    let cut = "HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\nconnection: close\r\n\r\n{\"message\":{\"role\":\"assistant\",\"content\":\"half an\"},\"done\":false}\n";
    let config =
        config(&faulty_host(cut, false)).replace("model_name: solar\n", "model_name: solar\n    resume: never\n");
    let sarai = Sarai::start(&config);
    let streamed = sarai.post("/v1/chat/completions", chat("solar", "Hi", json!({ "stream": true }))).await;
    let events = streamed.sse();
    assert_eq!(events.last().unwrap()["error"]["code"], "cut", "{}", streamed.text);
    assert!(!streamed.text.contains("[DONE]") && !streamed.text.contains("\"finish_reason\":\"stop\""));
    let whole = sarai.post("/v1/chat/completions", chat("solar", "Hi", json!({}))).await;
    assert_eq!((whole.status, served_by(&whole)), (200, "solar@gguf_native"), "nothing was sent yet: {}", whole.text);
    assert!(whole.header("x-sarai-fallback-reason").unwrap().contains("cut the stream"));
    // Twice in a row is enough: the breaker is open, and who asks now is served elsewhere.
    let breaker = sarai.ps().await["models"][0]["deployments"][0]["breaker"].clone();
    assert_ne!(breaker, "closed");
    let sarai = Sarai::start(&config);
    let lines = sarai.post("/api/chat", ollama_body(true, 5).to_string()).await.lines();
    assert!(lines.last().unwrap()["error"].as_str().unwrap().contains("cut the stream"));
}

#[tokio::test]
async fn an_answer_cut_after_its_first_token_goes_on_from_the_same_character_in_both_apis() {
    let cut = "HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\nconnection: close\r\n\r\n{\"message\":{\"role\":\"assistant\",\"content\":\"The three colours are red, gre\"},\"done\":false}\n";
    let sarai = Sarai::start(&config(&faulty_host(cut, false)));
    let streamed =
        sarai.post("/v1/chat/completions", chat("solar", "Name three colours.", json!({ "stream": true }))).await;
    let text = |events: &[serde_json::Value]| -> String {
        events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect()
    };
    let said = text(&streamed.sse());
    assert!(said.starts_with("The three colours are red, gre") && said.len() > 32, "{said}");
    assert!(streamed.text.ends_with("data: [DONE]\n\n"), "{}", streamed.text);
    let sarai = Sarai::start(&config(&faulty_host(cut, false)));
    let lines = sarai.post("/api/chat", ollama_body(true, 12).to_string()).await.lines();
    let end = lines.last().unwrap();
    assert_eq!((&end["done"], &end["sarai"]["resumed"][0]["by"]), (&json!(true), &json!("solar@gguf_native")), "{end}");
    let said: String = lines.iter().filter_map(|line| line["message"]["content"].as_str()).collect();
    assert!(said.starts_with("The three colours are red, gre"), "{said}");
    assert!(end["eval_count"].as_u64().unwrap() <= 12, "the limit counts over both: {end}");
}

#[tokio::test]
async fn a_constrained_answer_is_never_resumed() {
    let cut = "HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\nconnection: close\r\n\r\n{\"message\":{\"role\":\"assistant\",\"content\":\"{\\\"a\"},\"done\":false}\n";
    let sarai = Sarai::start(&config(&faulty_host(cut, false)));
    let body = chat("solar", "Hi", json!({ "stream": true, "response_format": { "type": "json_object" } }));
    let streamed = sarai.post("/v1/chat/completions", body).await;
    assert_eq!(streamed.sse().last().unwrap()["error"]["code"], "cut", "{}", streamed.text);
}

#[tokio::test]
async fn strict_requests_are_refused_rather_than_degraded() {
    let ollama = Ollama::start();
    let sarai = Sarai::start(&config(&ollama.url).replace("    fallback: gguf_native\n", ""));
    let body = chat("solar", "Hi", json!({ "logit_bias": { "5": 1 }, "ignore_eos": true, "max_tokens": 4 }));
    let ask = async |strict: &'static str| {
        let request = sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(body.clone());
        Answer::of(request.header("x-sarai-strict", strict).send().await.unwrap()).await
    };
    let degraded = ask("false").await;
    let lost = degraded.header("x-sarai-degraded");
    assert_eq!((degraded.status, lost), (200, Some("logit_bias,ignore_eos")), "{}", degraded.text);
    let refused = ask("true").await;
    assert_eq!(refused.status, 503, "{}", refused.text);
    assert!(refused.text.contains("logit_bias"), "{}", refused.text);
    assert_eq!(ask("maybe").await.status, 400);
}

#[tokio::test]
async fn hosts_of_one_model_share_the_load_and_another_model_answers_when_all_are_gone() {
    let (a, b) = (Ollama::start(), Ollama::start());
    let config = format!(
        "models:\n  solar: {{ backend: ollama_http, urls: [\"{}\", \"{}\"], fallback_models: [lfm2] }}\n  lfm2: {{ backend: gguf_native, gguf_path: {} }}\n",
        a.url,
        b.url,
        smollm2()
    );
    let sarai = Sarai::start(&config);
    // Few tokens: the threads of two Ollamas keep each other off the cores.
    let body = || chat("solar", "Count to ten.", json!({ "max_tokens": 3 }));
    let together = futures_util::future::join_all((0..4).map(|_| sarai.post("/v1/chat/completions", body()))).await;
    let mut by: Vec<_> = together.iter().map(|answer| served_by(answer).to_owned()).collect();
    assert!(together.iter().all(|answer| answer.status == 200), "{together:?}");
    by.sort();
    assert!(by[0] == by[1] && by[1] != by[2] && by[2] == by[3], "two at each: {by:?}");
    let first = served_by(&sarai.post("/v1/chat/completions", body()).await).to_owned();
    let second = served_by(&sarai.post("/v1/chat/completions", body()).await).to_owned();
    assert_eq!(first, second, "a conversation stays with its host while that has time");
    drop((a, b));
    let other = sarai.post("/v1/chat/completions", body()).await;
    assert_eq!((other.status, served_by(&other)), (200, "lfm2@gguf_native"), "{}", other.text);
    assert_eq!(other.header("x-sarai-degraded"), Some("model:lfm2"));
}

#[tokio::test]
async fn connections_to_a_host_are_kept_and_used_again() {
    const REQUESTS: usize = 16;
    let ollama = Ollama::start();
    let sarai = Sarai::start(&config(&ollama.url));
    for request in 0..REQUESTS {
        assert_eq!(sarai.post("/api/chat", ollama_body(request % 2 == 0, 3).to_string()).await.status, 200);
    }
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let to_host = format!("0100007F:{:04X}", ollama.port);
    // Those that were closed are in TIME_WAIT. Looks at the host have connections of their own while an answer runs,
    // and one that comes too late gives its connection up; without reuse there is at least one for each request.
    let ours = table.lines().filter(|line| line.split_whitespace().nth(2) == Some(&to_host)).count();
    let accepted = table.lines().filter(|line| line.split_whitespace().nth(1) == Some(&to_host)).count();
    assert!(ours <= REQUESTS / 2 && accepted <= REQUESTS / 2, "{ours} connections, {accepted} accepted");
}

#[tokio::test]
async fn a_prompt_too_long_for_every_deployment_is_the_clients_matter() {
    let host = faulty_host("HTTP/1.1 500 Oops\r\nconnection: close\r\ncontent-length: 0\r\n\r\n", false);
    let config = format!(
        "models:\n  small: {{ backend: gguf_native, fallback: ollama_http, url: \"{host}\", gguf_path: {}, context_length: 256 }}\n",
        smollm2()
    );
    let sarai = Sarai::start(&config);
    let answer = sarai.post("/v1/chat/completions", chat("small", &"word ".repeat(400), json!({}))).await;
    assert_eq!(
        (answer.status, &answer.json()["error"]["code"]),
        (400, &json!("context_length_exceeded")),
        "{}",
        answer.text
    );
}

/// Ollama's own command line as a client of sarai.
#[tokio::test]
async fn ollamas_command_line_works_against_sarai() {
    let sarai = Sarai::start(&config(&Ollama::unreachable()).replace("model_name: solar\n", "model_name: gone\n"));
    let folder = tempfile::tempdir().unwrap();
    for (args, says) in [
        (vec!["list"], "solar"),
        (vec!["run", "solar", "Say hello."], ""),
        (vec!["ps"], "solar"),
        (vec!["show", "solar"], "llama"),
        (vec!["stop", "solar"], ""),
        (vec!["list"], "other"),
    ] {
        let mut command = std::process::Command::new(std::env::var("SARAI_OLLAMA").unwrap());
        command
            .args(&args)
            .env("OLLAMA_HOST", &sarai.url)
            .env("HOME", folder.path())
            .stdin(std::process::Stdio::null());
        let output = command.output().unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && said.contains(says), "ollama {args:?}: {said}");
    }
    sarai.until("it is unloaded", |ps| ps["workers"].as_array().unwrap().is_empty()).await;
}

#[tokio::test]
async fn the_environment_turns_the_order_of_the_deployments_around() {
    let ollama = Ollama::start();
    let local_first = config(&ollama.url)
        .replace("backend: ollama_http\n    fallback: gguf_native", "backend: gguf_native\n    fallback: ollama_http");
    for (config, prefer, served) in
        [(config(&ollama.url), "false", "solar@gguf_native"), (local_first, "true", "solar@ollama_http")]
    {
        let sarai = Sarai::start_with_env(&config, &[("SOLAR_PREFER_HTTP", prefer)]);
        let answer = sarai.post("/v1/chat/completions", chat("solar", "Hi", json!({ "max_tokens": 2 }))).await;
        assert!(served_by(&answer).starts_with(served), "{prefer}: {:?}", answer.headers);
    }
}

/// A real server of OpenAI's API: another sarai.
#[tokio::test]
async fn a_server_of_openais_api_is_a_host_too() {
    let file = smollm2();
    let host = Sarai::start(&format!("models:\n  small: {{ backend: gguf_native, gguf_path: {file} }}\n"));
    let sarai = Sarai::start(&format!(
        "models:\n  solar: {{ backend: openai_http, url: \"{}/v1\", model_name: small }}\n",
        host.url
    ));
    let direct = host.post("/v1/chat/completions", chat("small", "Name three colours.", json!({}))).await.json();
    for stream in [false, true] {
        let more = json!({ "stream": stream, "stream_options": { "include_usage": true } });
        let answer = sarai.post("/v1/chat/completions", chat("solar", "Name three colours.", more)).await;
        assert!(served_by(&answer).starts_with("solar@openai_http(127.0.0.1"), "{:?}", answer.headers);
        let (text, usage) = if stream {
            let events = answer.sse();
            let text = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
            (text, events.last().unwrap()["usage"]["completion_tokens"].clone())
        } else {
            let body = answer.json();
            (
                body["choices"][0]["message"]["content"].as_str().unwrap().to_owned(),
                body["usage"]["completion_tokens"].clone(),
            )
        };
        let text: String = text;
        assert_eq!(Some(text.as_str()), direct["choices"][0]["message"]["content"].as_str());
        assert_eq!(usage, direct["usage"]["completion_tokens"]);
    }
}

#[tokio::test]
async fn the_fallback_of_a_host_that_is_away_is_loaded_before_it_is_asked_for() {
    let (url, file) = (Ollama::unreachable(), smollm2());
    let host = |more: &str| format!("{{ backend: ollama_http, url: \"{url}\", model_name: m{more} }}");
    for others in [
        format!("  solar: {}\n", host(&format!(", fallback: gguf_native, gguf_path: {file}"))),
        format!(
            "  solar: {}\n  tiny: {{ backend: gguf_native, gguf_path: {file} }}\n",
            host(", fallback_models: [tiny]")
        ),
    ] {
        let sarai = Sarai::start(&format!("models:\n  bare: {}\n{others}", host("")));
        // The other model on the same host has no fallback of its own, so nothing but the breaker asks for the file.
        assert_eq!(sarai.post("/v1/chat/completions", chat("bare", "Hi", json!({}))).await.status, 502);
        sarai.until("it is warm", |ps| ps["workers"].as_array().unwrap().len() == 1).await;
    }
}
