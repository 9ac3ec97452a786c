//! What hosts refuse, and whom they keep waiting: whose fault it is, and who answers instead.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::host::{Host, Step, last_line, line, ok, ollama, on_host, openai, served_by, with_worker};
use crate::support::{Answer, Ollama, Sarai, chat, minilm, qwen, smollm2};
use serde_json::{Value, json};

const WORKER: &str = "solar@gguf_native";

/// `solar` on one host, with a worker of this file behind it.
fn config(url: &str, file: &str, more: &str) -> String {
    format!(
        "models:\n  solar: {{ backend: ollama_http, url: \"{url}\", model_name: m, fallback: gguf_native, gguf_path: {file}, context_length: 1024, {more} }}\n"
    )
}

async fn ask(sarai: &Sarai, more: Value) -> Answer {
    let mut all = json!({ "max_tokens": 2 });
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    sarai.post("/v1/chat/completions", chat("solar", "Hello.", all)).await
}

/// Answers with this status and body.
fn refusing(status: u16, kind: &str, body: &str) -> Host {
    let head = format!("HTTP/1.1 {status} No\r\ncontent-type: {kind}\r\nconnection: close\r\n");
    let answer = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
    Host::start(move |_, _| vec![Step::Send(answer.clone())])
}

async fn breaker(sarai: &Sarai) -> String {
    sarai.ps().await["models"][0]["deployments"][0]["breaker"].as_str().unwrap().to_owned()
}

/// SmolLM2's template has no tools, and Ollama says so with a 400.
#[tokio::test]
async fn tools_that_a_real_ollama_has_no_template_for_go_to_the_worker_that_has() {
    let ollama = Ollama::start();
    let sarai = Sarai::start(&config(&ollama.url, &qwen(), "").replace("model_name: m", "model_name: solar"));
    let city = json!({ "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] });
    let tools = json!([{ "type": "function", "function": { "name": "get_weather", "parameters": city } }]);
    for _ in 0..3 {
        let answer = ask(&sarai, json!({ "tools": tools })).await;
        assert_eq!((answer.status, served_by(&answer)), (200, WORKER), "{}", answer.text);
        assert!(answer.header("x-sarai-fallback-reason").unwrap().contains("does not support tools"));
    }
    let plain = ask(&sarai, json!({})).await;
    assert!(served_by(&plain).contains("ollama_http"), "it is not to blame: {}", plain.text);
    // Nobody else is there: it is the client's matter.
    let alone = format!("models:\n  solar: {{ backend: ollama_http, url: \"{}\" }}\n", ollama.url);
    let answer = ask(&Sarai::start(&alone), json!({ "tools": tools })).await;
    assert!(
        answer.status == 400 && answer.text.contains("does not support tools"),
        "{} {}",
        answer.status,
        answer.text
    );
}

#[tokio::test]
async fn what_stands_before_a_host_refuses_in_its_own_name_and_the_client_in_nobodys() {
    let page = "<html><body>No.</body></html>";
    for (status, kind, body, is_counted) in [
        (413, "text/html", page, false),
        (413, "application/json", "{\"error\":\"too large\"}", false),
        (400, "application/json", "{\"error\":\"\\\"m\\\" does not support thinking\"}", false),
        (400, "text/html", page, true),
        (403, "text/html", page, true),
    ] {
        let host = refusing(status, kind, body);
        let sarai = Sarai::start(&config(&host.url, &smollm2(), ""));
        for _ in 0..3 {
            let answer = ask(&sarai, json!({})).await;
            assert_eq!((answer.status, served_by(&answer)), (200, WORKER), "{status} {kind}: {}", answer.text);
        }
        assert_eq!(breaker(&sarai).await != "closed", is_counted, "{status} {kind}");
    }
    for (status, kind, body) in [
        (400, "application/json", "{\"error\":{\"message\":\"`top_p` is 7\"}}"),
        (422, "application/json", "{\"error\":{\"message\":\"`top_p` is 7\"}}"),
        (400, "text/plain; charset=utf-8", "`top_p` is 7"),
        (422, "application/problem+json", "{\"error\":\"`top_p` is 7\"}"),
    ] {
        let host = refusing(status, kind, body);
        let sarai = Sarai::start(&config(&host.url, &smollm2(), ""));
        for n in 1..=4 {
            for stream in [false, true] {
                let answer = ask(&sarai, json!({ "stream": stream })).await;
                assert!(answer.status == 400 && answer.text.contains("`top_p` is 7"), "{}", answer.text);
            }
            assert_eq!(host.asked().len(), 2 * n, "asked once for each");
        }
        assert_eq!(breaker(&sarai).await, "closed");
        assert!(sarai.worker_pids().await.is_empty(), "nobody else was asked");
    }
}

/// Its kernel takes no more connections: nobody accepts, and the queue is full.
#[tokio::test]
async fn a_host_whose_queue_of_connections_is_full_is_given_up_in_the_time_of_a_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let address = listener.local_addr().unwrap();
    let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(300));
    let filled: Vec<_> = std::iter::repeat_with(connect).take(64).map_while(Result::ok).collect();
    assert!(filled.len() < 64, "its queue is never full");
    let more = "deadlines: { connect_seconds: 1 }";
    let sarai = Sarai::start(&config(&format!("http://{address}"), &smollm2(), more));
    let began = Instant::now();
    let answer = ask(&sarai, json!({})).await;
    assert_eq!((answer.status, served_by(&answer)), (200, WORKER), "{}", answer.text);
    assert!(answer.header("x-sarai-fallback-reason").unwrap().contains("connection timed out"), "{:?}", answer.headers);
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
}

/// A list of models is there all the time; what closes the breaker is a token.
#[tokio::test]
async fn a_host_recovers_without_traffic_by_a_token_and_not_by_its_list() {
    let (works, failed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (is_up, fails) = (Arc::clone(&works), Arc::clone(&failed));
    let host = Host::start(move |_, _| match is_up.load(Ordering::SeqCst) {
        true => ollama(&["yes"]),
        false => {
            fails.fetch_add(1, Ordering::SeqCst);
            vec![Step::Send("HTTP/1.1 500 No\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".into())]
        }
    });
    let sarai = Sarai::start(&config(&host.url, &smollm2(), ""));
    for _ in 0..2 {
        assert_eq!(served_by(&ask(&sarai, json!({})).await), WORKER);
    }
    let asked = host.asked().len();
    let before = failed.load(Ordering::SeqCst);
    sarai.until("a probe in vain", |_| failed.load(Ordering::SeqCst) > before).await;
    assert_ne!(breaker(&sarai).await, "closed");
    works.store(true, Ordering::SeqCst);
    sarai.until("it is back", |ps| ps["models"][0]["deployments"][0]["breaker"] == "closed").await;
    assert_eq!(host.asked().len(), asked, "no client was needed for it");
    assert!(served_by(&ask(&sarai, json!({})).await).contains("ollama_http"));
}

/// Some servers complete texts and know no chats: a probe, which is one, tells nothing of them.
#[tokio::test]
async fn a_host_without_chats_is_used_again_once_it_is_there_and_lists_the_model() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let model = |name: &str| {
        format!(
            "  {name}: {{ backend: openai_http, url: \"http://{address}\", model_name: {name}, fallback: gguf_native, gguf_path: {}, context_length: 1024 }}\n",
            smollm2()
        )
    };
    let sarai = Sarai::start(&format!("models:\n{}{}", model("m"), model("gone")));
    let ask = async |name: &str| {
        let body = json!({ "model": name, "prompt": "Hello.", "max_tokens": 2 });
        let answer = sarai.post("/v1/completions", body.to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        served_by(&answer).to_owned()
    };
    let breaker = |ps: &Value, name: &str| -> String {
        let model = ps["models"].as_array().unwrap().iter().find(|model| model["name"] == name);
        model.map(|model| model["deployments"][0]["breaker"].as_str().unwrap().to_owned()).unwrap_or_default()
    };
    for name in ["m", "gone"] {
        assert_eq!((ask(name).await, ask(name).await), (format!("{name}@gguf_native"), format!("{name}@gguf_native")));
    }
    let probed = Arc::new(AtomicUsize::new(0));
    let counts = Arc::clone(&probed);
    let host = Host::start_at(&address, move |_, body| {
        let text = json!({ "choices": [{ "index": 0, "text": "yes", "finish_reason": "length" }] });
        if body.get("messages").is_none() {
            return openai(&[text]);
        }
        counts.fetch_add(usize::from(body["model"] == "gone"), Ordering::SeqCst);
        vec![Step::Send("HTTP/1.1 404 No\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".into())]
    });
    sarai.until("the model that is listed is back", |ps| breaker(ps, "m") == "closed").await;
    assert!(ask("m").await.starts_with("m@openai_http"));
    sarai.until("the one that is not was probed", |_| probed.load(Ordering::SeqCst) > 0).await;
    assert_ne!(breaker(&sarai.ps().await, "gone"), "closed");
    assert_eq!(ask("gone").await, "gone@gguf_native");
    assert_eq!(host.asked().len(), 1);
}

/// It takes connections, answers requests, and says nothing to whoever looks at it.
#[tokio::test]
async fn a_host_that_hangs_when_it_is_looked_at_is_asked_all_the_same_and_waited_for_once() {
    let host = Host::start_unseen(|_, _| ollama(&["yes"]));
    let sarai = Sarai::start(&on_host(&host.url, ""));
    let began = Instant::now();
    for round in 0..4 {
        let answer = ask(&sarai, json!({})).await;
        assert!(served_by(&answer).contains("ollama_http"), "{round}: {}", answer.text);
    }
    // Four seconds for the first look, and the moment that each later one is given: it would be four times as long.
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
}

/// The host has one place, and somebody holds it; the model's own worker has nothing to do.
#[tokio::test]
async fn a_full_host_is_not_waited_for_while_a_worker_is_free() {
    let host = Host::start(|_, body| match body["messages"][0]["content"] == "hold" {
        true => vec![Step::Send(format!("{}{}", ok("application/x-ndjson"), line("I"))), Step::Hold],
        false => ollama(&["yes"]),
    });
    let sarai = Sarai::start(&config(&host.url, &smollm2(), "max_outstanding: 1"));
    for _ in 0..5 {
        assert!(served_by(&ask(&sarai, json!({})).await).contains("ollama_http"));
    }
    let body = chat("solar", "hold", json!({ "stream": true }));
    let holds = sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(body).send().await.unwrap();
    let began = Instant::now();
    let answer = ask(&sarai, json!({})).await;
    assert_eq!((answer.status, served_by(&answer)), (200, WORKER), "{}", answer.text);
    let reason = answer.header("x-sarai-fallback-reason").unwrap();
    assert!(reason.contains("all places at its hosts were taken for "), "{reason}");
    assert!(began.elapsed() < Duration::from_secs(15), "the queue's deadline is a minute: {:?}", began.elapsed());
    drop(holds);
    sarai.until("its place is free", |ps| ps["models"][0]["deployments"][0]["outstanding"] == 0).await;
    assert!(served_by(&ask(&sarai, json!({})).await).contains("ollama_http"), "it is asked first, as before");
}

/// The worker is asked meanwhile, and cannot follow the form: the host has a place again after a while.
#[tokio::test]
async fn a_request_keeps_its_turn_at_a_full_host_while_the_worker_is_tried() {
    let host = Host::start(|_, body| match body["messages"][0]["content"] == "hold" {
        true => vec![
            Step::Send(format!("{}{}", ok("application/x-ndjson"), line("I"))),
            Step::Wait(Duration::from_secs(5)),
            Step::Send(last_line(json!({}))),
        ],
        false => ollama(&["yes"]),
    });
    let worker = format!("  twin: {{ backend: gguf_native, gguf_path: {}, context_length: 1024 }}\n", smollm2());
    let sarai = Sarai::start(&format!("{}{worker}", config(&host.url, &smollm2(), "max_outstanding: 1")));
    for _ in 0..5 {
        assert!(served_by(&ask(&sarai, json!({})).await).contains("ollama_http"));
    }
    let form = json!({ "type": "string", "pattern": "^((a{0,2000}){0,2000}){0,2000}$" });
    let form = json!({ "type": "json_schema", "json_schema": { "name": "a", "schema": form } });
    // It is loaded, and has tried the form, before it is asked in the host's place.
    let tried = chat("twin", "Hello.", json!({ "response_format": form }));
    assert_eq!(sarai.post("/v1/chat/completions", tried).await.status, 400);
    let hold = sarai.post("/v1/chat/completions", chat("solar", "hold", json!({ "stream": true })));
    let waits = async {
        host.until("it is held", |asked| asked.len() == 6).await;
        ask(&sarai, json!({ "response_format": form })).await
    };
    let (held, waited) = tokio::join!(hold, waits);
    for answer in [held, waited] {
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert!(served_by(&answer).contains("ollama_http"), "{}", answer.text);
    }
}

/// One asks for the worker to be loaded; the other finds it on its way.
#[tokio::test]
async fn two_requests_at_a_hung_host_are_both_answered_by_the_worker() {
    let host = Host::start(|_, body| match body["messages"][0]["content"] == "Hello." {
        true => vec![Step::Hold],
        false => ollama(&["yes"]),
    });
    let sarai = Sarai::start(&config(&host.url, &smollm2(), "max_outstanding: 2"));
    for _ in 0..5 {
        let usual = sarai.post("/v1/chat/completions", chat("solar", "Hi.", json!({}))).await;
        assert!(served_by(&usual).contains("ollama_http"), "{}", usual.text);
    }
    let (one, other) = tokio::join!(ask(&sarai, json!({})), ask(&sarai, json!({})));
    assert_eq!((served_by(&one), served_by(&other)), (WORKER, WORKER), "{} {}", one.text, other.text);
}

/// What makes vectors answers no chat: a probe that is told so has found the host alive.
#[tokio::test]
async fn a_real_host_of_vectors_is_asked_again_once_it_is_back() {
    let mut ollama = Ollama::start_with(&minilm());
    let sarai = Sarai::start(&format!(
        "models:\n  minilm: {{ backend: ollama_http, fallback: gguf_native, url: \"{}\", model_name: solar, gguf_path: {} }}\n",
        ollama.url,
        minilm()
    ));
    let embed = async || {
        let body = json!({ "model": "minilm", "input": "a" }).to_string();
        let answer = sarai.post("/v1/embeddings", body).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        served_by(&answer).to_owned()
    };
    assert!(embed().await.contains("ollama_http"));
    ollama.kill();
    assert_eq!(embed().await, "minilm@gguf_native");
    sarai.until("it is left alone", |ps| ps["models"][0]["deployments"][0]["breaker"] != "closed").await;
    ollama.run();
    sarai.until("it is back", |ps| ps["models"][0]["deployments"][0]["breaker"] == "closed").await;
    assert!(embed().await.contains("ollama_http"));
}

/// The queue's deadline is one for all hosts, and `x-sarai-strict` is heard.
#[tokio::test]
async fn vectors_are_waited_for_once_and_refused_where_they_would_lack_something() {
    let holds = || Host::start(|_, _| vec![Step::Hold]);
    let (one, other) = (holds(), holds());
    let of =
        |host: &Host, priority: u32| format!("{{ url: \"{}\", priority: {priority}, max_outstanding: 1 }}", host.url);
    let sarai = Sarai::start(&format!(
        "models:\n  far: {{ backend: ollama_http, urls: [{}, {}], model_name: m, deadlines: {{ queue_seconds: 2 }} }}\n  minilm: {{ backend: gguf_native, gguf_path: {}, role: embedding }}\n",
        of(&one, 0),
        of(&other, 1),
        minilm()
    ));
    let embed = || sarai.post("/v1/embeddings", json!({ "model": "far", "input": "a" }).to_string());
    let waits = async {
        one.until("it is full", |asked| asked.len() == 1).await;
        let began = Instant::now();
        let second = async {
            other.until("it is full too", |asked| asked.len() == 1).await;
            let answer = embed().await;
            assert!(answer.text.contains("queue"), "{}", answer.text);
        };
        tokio::select! {
            () = second => began.elapsed(),
            answer = embed() => panic!("{}", answer.text),
        }
    };
    let took = tokio::select! {
        took = waits => took,
        answer = embed() => panic!("{}", answer.text),
    };
    assert!(took < Duration::from_secs(6), "2 s each, and not once more for each host: {took:?}");
    for (is_strict, status) in [("false", 200), ("true", 503), ("maybe", 400)] {
        let body = json!({ "model": "minilm", "input": "a", "input_type": "query" }).to_string();
        let request = sarai.client.post(format!("{}/v1/embeddings", sarai.url)).body(body);
        let answer = Answer::of(request.header("x-sarai-strict", is_strict).send().await.unwrap()).await;
        assert_eq!(answer.status, status, "{is_strict}: {}", answer.text);
    }
}

/// `x-sarai-strict` holds for who goes on, too: the stream ends with an error, and never as if it were whole.
#[tokio::test]
async fn strictly_nobody_else_goes_on_and_a_cluster_is_not_asked_again() {
    let cut = || Host::start(|_, _| vec![Step::Send(format!("{}{}", ok("application/x-ndjson"), line("The answer")))]);
    let (host, other) = (cut(), Host::start(|_, _| ollama(&["The answer", " is 42."])));
    let sarai = Sarai::start(&format!(
        "models:\n  solar: {{ backend: ollama_http, url: \"{}\", model_name: m, resume: any, fallback_models: [other] }}\n  other: {{ backend: ollama_http, url: \"{}\", model_name: m }}\n",
        host.url, other.url
    ));
    for is_strict in [false, true] {
        let url = format!("{}/v1/chat/completions", sarai.url);
        let request = sarai.client.post(url).body(chat("solar", "Hello.", json!({ "stream": true })));
        let request = if is_strict { request.header("x-sarai-strict", "true") } else { request };
        let answer = Answer::of(request.send().await.unwrap()).await;
        assert!(answer.said().starts_with("The answer"), "{}", answer.text);
        assert_eq!(answer.text.contains("is 42."), !is_strict, "{}", answer.text);
        assert_eq!(answer.text.contains("\"finish_reason\":\"stop\""), !is_strict, "{}", answer.text);
        assert_eq!(answer.text.contains("\"error\":{"), is_strict, "{}", answer.text);
    }
    let cluster = cut();
    let sarai = Sarai::start(&config(&cluster.url, &smollm2(), "managed_lb: true"));
    let answer = ask(&sarai, json!({ "stream": true, "max_tokens": 12 })).await;
    let end = answer.sse().into_iter().find(|event| event["sarai"]["resumed"].is_array()).unwrap();
    assert_eq!(end["sarai"]["resumed"][0]["by"], WORKER, "{end}");
    assert!(answer.said().starts_with("The answer") && answer.text.ends_with("data: [DONE]\n\n"), "{}", answer.text);
    assert_eq!(cluster.asked().len(), 1, "its own balancer has had its try");
}

/// Ollama says of schemas and pictures that it cannot read that it has failed itself.
#[tokio::test]
async fn what_a_host_cannot_read_of_a_request_does_not_count_against_it() {
    let refuses = |body: &Value| !body["format"].is_null();
    let host = Host::start(move |_, body| match refuses(body) {
        true => {
            let error = json!({ "error": "invalid JSON schema in format" }).to_string();
            vec![Step::Send(format!(
                "HTTP/1.1 500 Internal Server Error\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{error}",
                error.len()
            ))]
        }
        false => ollama(&["yes"]),
    });
    let sarai = Sarai::start(&on_host(&host.url, ""));
    let form = json!({ "model": "solar", "messages": [{ "role": "user", "content": "Hi" }], "format": { "type": "string", "pattern": "[a-z]+" } });
    for _ in 0..3 {
        let refused = sarai.post("/api/chat", form.to_string()).await;
        assert!(refused.status == 400 && refused.text.contains("invalid JSON schema"), "{}", refused.text);
    }
    let asked = host.asked().len();
    let answer = sarai.post("/v1/chat/completions", chat("solar", "Hi", json!({}))).await;
    assert_eq!((answer.status, host.asked().len()), (200, asked + 1), "it is asked as before: {}", answer.text);
    assert_eq!(answer.header("x-sarai-fallback-reason"), None);
}

/// A host that failed for another reason is not asked once more when the prompt is cut for those who have no room.
#[tokio::test]
async fn a_prompt_is_cut_only_for_those_who_have_no_room_for_it() {
    let host = Host::start(|_, _| {
        vec![Step::Send("HTTP/1.1 500 Broken\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".into())]
    });
    let sarai = Sarai::start(&on_host(&host.url, &with_worker("")));
    let body =
        json!({ "model": "solar", "stream": false, "prompt": "word ".repeat(2000), "options": { "num_predict": 2 } });
    let answer = sarai.post("/api/generate", body.to_string()).await;
    assert_eq!((answer.status, answer.header("x-sarai-degraded")), (200, Some("prompt:truncated")), "{}", answer.text);
    assert_eq!(host.asked().len(), 1, "once");
}
