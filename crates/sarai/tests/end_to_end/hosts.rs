//! Several hosts of a model, how they are chosen, limited, added and left; and what passes through to them.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::host::{Host, Step, last_line, line, ok, ollama, on_host, openai, served_by, with_worker};
use crate::support::{Answer, Ollama, Sarai, chat, smollm2};
use futures_util::StreamExt;
use serde_json::{Value, json};

async fn ask(sarai: &Sarai, more: Value) -> Answer {
    sarai.post("/v1/chat/completions", chat("solar", "Hello.", more)).await
}

#[tokio::test]
async fn what_the_client_says_beyond_what_is_known_here_reaches_the_host_and_what_the_host_says_the_client() {
    let call =
        json!({ "index": 0, "id": "call_1", "type": "function", "function": { "name": "weather", "arguments": "" } });
    let delta = |delta: Value| json!({ "id": "x", "service_tier": "default", "choices": [{ "index": 0, "delta": delta, "finish_reason": null }] });
    let part = |text: &str| delta(json!({ "tool_calls": [{ "index": 0, "function": { "arguments": text } }] }));
    let end = json!({ "id": "x", "choices": [{ "index": 0, "delta": {}, "finish_reason": "tool_calls" }] });
    let usage = json!({ "id": "x", "choices": [], "usage": { "prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13,
        "prompt_tokens_details": { "cached_tokens": 3, "audio_tokens": 1 }, "completion_tokens_details": { "reasoning_tokens": 2 } } });
    let chunks = [
        delta(json!({ "role": "assistant", "tool_calls": [call] })),
        part("{\"city\":"),
        part("\"Oslo\"}"),
        end,
        usage,
    ];
    let host = Host::start(move |_, _| openai(&chunks));
    let config = format!(
        "models:\n  solar: {{ backend: openai_http, url: \"{}/v1\", model_name: m, api_key: secret }}\n",
        host.url
    );
    let sarai = Sarai::start(&config);
    let tools = json!([{ "type": "function", "function": { "name": "weather", "parameters": { "type": "object" } } }]);
    let more =
        json!({ "tools": tools, "tool_choice": "auto", "vendor_option": { "a": 1 }, "parallel_tool_calls": false });
    let whole = ask(&sarai, more.clone()).await;
    let asked = host.asked()[0].clone();
    assert!(asked.head.to_ascii_lowercase().contains("authorization: bearer secret"), "{}", asked.head);
    for key in ["tools", "tool_choice", "vendor_option", "parallel_tool_calls"] {
        assert_eq!(asked.body[key], more[key], "{key}");
    }
    let body = whole.json();
    let choice = &body["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{body}");
    let called = &choice["message"]["tool_calls"][0];
    assert_eq!((&called["id"], &called["function"]["arguments"]), (&json!("call_1"), &json!("{\"city\":\"Oslo\"}")));
    assert_eq!(body["service_tier"], "default", "{body}");
    let counts = json!({ "prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13,
        "prompt_tokens_details": { "cached_tokens": 3, "audio_tokens": 1 }, "completion_tokens_details": { "reasoning_tokens": 2 } });
    assert_eq!(body["usage"], counts);
    let mut streamed = more;
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({ "include_usage": true });
    let events = ask(&sarai, streamed).await;
    let arguments: String = events
        .sse()
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"].as_str())
        .collect();
    assert_eq!(arguments, "{\"city\":\"Oslo\"}", "{}", events.text);
    let said: Vec<_> =
        events.sse().into_iter().map(|event| event["usage"].clone()).filter(|usage| !usage.is_null()).collect();
    assert_eq!(said, [counts], "once, at the end");
    assert!(events.text.contains("\"finish_reason\":\"tool_calls\"") && events.text.ends_with("data: [DONE]\n\n"));
}

/// As servers write them that say all once more in each step, or begin with a mark of their byte order.
#[tokio::test]
async fn odd_dialects_of_a_stream_are_understood() {
    let chunk = |text: &str, so_far: &str| json!({ "choices": [{ "index": 0, "delta": { "role": "assistant", "content": text }, "message": { "role": "assistant", "content": so_far }, "finish_reason": null }] });
    let end = json!({ "choices": [{ "index": 0, "delta": {}, "message": { "content": "one two" }, "finish_reason": "stop" }] });
    let lines = [chunk("one ", "one "), chunk("two", "one two"), end]
        .map(|chunk| format!("event: message\r\ndata: {chunk}\r\n\r\n"));
    let body = format!("{}\u{feff}{}data: [DONE]\r\n\r\n", ok("text/event-stream"), lines.concat());
    let host = Host::start(move |_, _| vec![Step::Send(body.clone())]);
    let url = host.url.replace("http://", "http://me:very%20secret@");
    let sarai =
        Sarai::start(&format!("models:\n  solar: {{ backend: openai_http, url: \"{url}/v1\", model_name: m }}\n"));
    let answer = ask(&sarai, json!({})).await;
    assert_eq!(answer.json()["choices"][0]["message"]["content"], "one two", "{}", answer.text);
    // A name and a password in the URL are for the host alone.
    let asked = host.asked()[0].head.to_ascii_lowercase();
    assert!(asked.contains("authorization: basic bwu6dmvyesbzzwnyzxq="), "{asked}");
    let ps = sarai.get("/api/ps").await.text;
    for text in [&format!("{:?}", answer.headers), &answer.text, &ps] {
        assert!(!text.contains("secret"), "{text}");
    }
}

/// A host says so in a stream of its own where it had to begin before it could know.
#[tokio::test]
async fn an_error_of_the_clients_making_within_a_stream_is_the_clients() {
    let wrong = json!({ "error": { "message": "`response_format` is no schema", "type": "invalid_request_error", "param": null, "code": null } });
    let body = format!("{}: loading\n\ndata: {wrong}\n\n", ok("text/event-stream"));
    let host = Host::start(move |_, _| vec![Step::Send(body.clone())]);
    let sarai = Sarai::start(&format!(
        "models:\n  solar: {{ backend: openai_http, url: \"{}/v1\", model_name: m }}\n",
        host.url
    ));
    for n in 1..=3 {
        let answer = ask(&sarai, json!({})).await;
        assert!(answer.status == 400 && answer.text.contains("is no schema"), "{}", answer.text);
        assert_eq!(host.asked().len(), n, "asked once");
    }
    assert_eq!(sarai.ps().await["models"][0]["deployments"][0]["breaker"], "closed");
}

/// A real Ollama knows log probabilities, which nothing here reads.
#[tokio::test]
async fn a_real_ollamas_log_probabilities_come_through() {
    let ollama = Ollama::start();
    let config = on_host(&ollama.url, "").replace("model_name: m", "model_name: solar");
    let sarai = Sarai::start(&config);
    let body = json!({
        "model": "solar", "stream": false, "messages": [{ "role": "user", "content": "Name a colour." }],
        "options": { "temperature": 0, "seed": 7, "num_predict": 4 }, "logprobs": true, "top_logprobs": 2,
    });
    let direct = sarai.client.post(format!("{}/api/chat", ollama.url)).body(body.to_string()).send().await.unwrap();
    let direct = Answer::of(direct).await.json();
    assert_eq!(direct["logprobs"].as_array().map(Vec::len), Some(4), "this Ollama has them: {direct}");
    let ours = sarai.post("/api/chat", body.to_string()).await.json();
    assert_eq!(ours["logprobs"], direct["logprobs"]);
    let mut streamed = body;
    streamed["stream"] = true.into();
    let lines = sarai.post("/api/chat", streamed.to_string()).await.lines();
    let tokens = lines.iter().filter_map(|line| line["logprobs"].as_array()).map(Vec::len).sum::<usize>();
    assert_eq!(tokens, 4, "{lines:?}");
}

#[tokio::test]
async fn what_only_a_host_can_do_is_never_asked_of_a_worker() {
    let host = Host::start(|_, _| vec![]);
    let config = on_host(&host.url, &with_worker(""));
    let sarai = Sarai::start(&config);
    let tools = json!([{ "type": "function", "function": { "name": "f", "parameters": {} } }]);
    let body =
        json!({ "model": "solar", "stream": false, "messages": [{ "role": "user", "content": "Hi" }], "tools": tools });
    let failed = sarai.post("/api/chat", body.to_string()).await;
    assert_eq!(failed.status, 502, "the worker, which knows no tools, is no fallback for this: {}", failed.text);
    // What Ollama's API has no words for is not asked of it either.
    let refused = ask(&sarai, json!({ "tools": tools, "tool_choice": "required" })).await;
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("tools")), "{}", refused.text);
}

/// Ollama's API has no field for them, and to another model they mean something else.
#[tokio::test]
async fn a_prompt_of_tokens_is_asked_of_nobody_who_would_read_it_otherwise() {
    let host = Host::start(|_, _| ollama(&["nothing"]));
    let other = format!("  tiny: {{ backend: gguf_native, gguf_path: {} }}\n", smollm2());
    let tokens = |model: &str| json!({ "model": model, "prompt": [49, 6376], "max_tokens": 2 }).to_string();
    let alone = Sarai::start(&format!("{}{other}", on_host(&host.url, "    fallback_models: [tiny]\n")));
    let refused = alone.post("/v1/completions", tokens("solar")).await;
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("prompt")), "{}", refused.text);
    let with_worker = Sarai::start(&on_host(&host.url, &with_worker("")));
    let answer = with_worker.post("/v1/completions", tokens("solar")).await;
    assert_eq!((answer.status, served_by(&answer)), (200, "solar@gguf_native"), "{}", answer.text);
    assert!(host.asked().is_empty());
}

#[tokio::test]
async fn a_client_that_leaves_before_any_header_came_cancels_at_the_host_and_nobody_is_asked_again() {
    let host = Host::start(|_, _| vec![Step::Hold]);
    let sarai = Sarai::start(&on_host(&host.url, &with_worker("")));
    let mut took = [Duration::MAX; 2];
    for stream in [false, true, false, true] {
        let before = host.asked().len();
        let body = chat("solar", "Hello.", json!({ "stream": stream }));
        let asked = tokio::spawn(sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(body).send());
        host.until("the request", |asked| asked.len() == before + 1).await;
        let left = Instant::now();
        asked.abort();
        let seen = host.until("the client's leave", |asked| asked[before].left.is_some()).await;
        let least = &mut took[usize::from(stream)];
        *least = seen[before].left.unwrap().duration_since(left).min(*least);
        sarai.until("its place is free", |ps| ps["models"][0]["deployments"][0]["outstanding"] == 0).await;
        assert_eq!(host.asked().len(), before + 1, "nothing is tried again for a client that has left");
        assert!(sarai.worker_pids().await.is_empty());
    }
    // What else the machine does may be in the way of one; what waits for something is in the way of all.
    assert!(took.iter().all(|least| *least < Duration::from_millis(100)), "{took:?}");
}

#[tokio::test]
async fn requests_beyond_a_hosts_limit_wait_here_in_their_order() {
    // The first one is there until all have come.
    let host = Host::start(|number, _| {
        let mut steps = vec![Step::Wait(Duration::from_millis(if number == 0 { 1_000 } else { 0 }))];
        steps.extend(ollama(&["done"]));
        steps
    });
    let sarai = Sarai::start(&on_host(&host.url, "    max_outstanding: 1\n"));
    let mut answers = Vec::new();
    for n in 0..6 {
        let body = chat("solar", &format!("number {n}"), json!({}));
        answers.push(tokio::spawn(sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(body).send()));
        // The next one comes when this one waits.
        sarai.until("it is there", |ps| ps["requests"] == json!({ "in_flight": 1, "queued": n })).await;
    }
    for answer in answers {
        assert_eq!(answer.await.unwrap().unwrap().status(), 200);
    }
    let order: Vec<_> =
        host.asked().iter().map(|asked| asked.body["messages"][0]["content"].as_str().unwrap().to_owned()).collect();
    assert_eq!(order, (0..6).map(|n| format!("number {n}")).collect::<Vec<_>>());
}

/// It is asked for its usage by this server's own wish: a server that knows nothing of that is asked without.
#[tokio::test]
async fn a_server_that_refuses_what_the_client_never_said_is_asked_without_it() {
    let chunk =
        |delta: Value, finish: Value| json!({ "choices": [{ "index": 0, "delta": delta, "finish_reason": finish }] });
    let answer = openai(&[chunk(json!({ "content": "here" }), Value::Null), chunk(json!({}), json!("stop"))]);
    let refusal = "HTTP/1.1 422 No\r\nconnection: close\r\ncontent-length: 31\r\n\r\nstream_options is not permitted";
    let host = Host::start(move |_, body| match body["stream_options"].is_null() {
        true => answer.clone(),
        false => vec![Step::Send(refusal.into())],
    });
    let config = format!("models:\n  solar: {{ backend: openai_http, url: \"{}/v1\", model_name: m }}\n", host.url);
    let sarai = Sarai::start(&config);
    let answer = ask(&sarai, json!({})).await;
    assert_eq!(answer.json()["choices"][0]["message"]["content"], "here", "{}", answer.text);
    let theirs = ask(&sarai, json!({ "stream": true, "stream_options": { "include_usage": true } })).await;
    assert_eq!(theirs.status, 400, "what the client said itself is its matter: {}", theirs.text);
}

#[tokio::test]
async fn a_managed_cluster_is_neither_queued_for_nor_asked_twice_and_the_worker_stands_behind_it() {
    let cluster = Host::start(|_, body| match body["messages"][0]["content"] == "Hello." {
        true => vec![Step::Send("HTTP/1.1 503 Busy\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".into())],
        false => vec![Step::Hold],
    });
    let sarai = Sarai::start(&on_host(&cluster.url, &with_worker("    managed_lb: true\n")));
    for n in 1..=4 {
        let answer = ask(&sarai, json!({ "max_tokens": 2 })).await;
        assert_eq!((answer.status, served_by(&answer)), (200, "solar@gguf_native"), "{}", answer.text);
        assert_eq!(cluster.asked().len(), n, "asked once for each, and its breaker stays closed");
    }
    let long = |n: usize| chat("solar", &format!("hold {n}"), json!({}));
    let held: Vec<_> = (0..5)
        .map(|n| tokio::spawn(sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(long(n)).send()))
        .collect();
    cluster.until("all five at once", |asked| asked.len() == 9).await;
    held.iter().for_each(tokio::task::JoinHandle::abort);
    // One that hangs is as late as any: the worker answers.
    let config =
        on_host(&cluster.url, &with_worker("    managed_lb: true\n    deadlines: { first_token_seconds: 1 }\n"));
    let sarai = Sarai::start(&config);
    let answer = sarai.post("/v1/chat/completions", chat("solar", "hang", json!({ "max_tokens": 2 }))).await;
    assert_eq!((answer.status, served_by(&answer)), (200, "solar@gguf_native"), "{}", answer.text);
    assert_eq!(cluster.asked().len(), 10, "asked once");
}

/// Of two places of a host, bulk leaves one to whoever waits for an answer.
#[tokio::test]
async fn bulk_leaves_a_hosts_place_to_others_and_waits_for_its_own() {
    let host = Host::start(|_, body| match body["messages"][0]["content"].as_str() {
        Some("bulk") => vec![Step::Hold],
        _ => ollama(&["here"]),
    });
    let sarai = Sarai::start(&on_host(&host.url, "    max_outstanding: 2\n"));
    let bulk = chat("solar", "bulk", json!({ "service_tier": "flex" }));
    let url = format!("{}/v1/chat/completions", sarai.url);
    let waiting: Vec<_> = (0..3).map(|_| tokio::spawn(sarai.client.post(&url).body(bulk.clone()).send())).collect();
    sarai.until("two wait", |ps| ps["requests"] == json!({ "in_flight": 1, "queued": 2 })).await;
    for _ in 0..3 {
        assert_eq!(ask(&sarai, json!({})).await.status, 200);
    }
    let bulk_asked = host.asked().iter().filter(|asked| asked.body["messages"][0]["content"] == "bulk").count();
    assert_eq!(bulk_asked, 1, "the other place was free, and none of it");
    waiting.iter().for_each(tokio::task::JoinHandle::abort);
    sarai.until("nobody waits", |ps| ps["requests"] == json!({ "in_flight": 0, "queued": 0 })).await;
}

#[tokio::test]
async fn a_connection_that_ends_without_a_word_is_tried_once_more_and_a_cluster_is_not() {
    let once = Host::start(|n, _| if n == 0 { vec![] } else { ollama(&["yes"]) });
    let answer = ask(&Sarai::start(&on_host(&once.url, "")), json!({})).await;
    assert_eq!((answer.status, once.asked().len()), (200, 2), "{}", answer.text);
    for (more, times) in [("", 2), ("    managed_lb: true\n", 1)] {
        let never = Host::start(|_, _| vec![]);
        let answer = ask(&Sarai::start(&on_host(&never.url, more)), json!({})).await;
        assert_eq!((answer.status, never.asked().len()), (502, times), "{}", answer.text);
        assert_eq!(answer.json()["error"]["code"], "cut");
    }
}

/// A real host that stands still: its kernel takes the connection, and nothing comes.
#[tokio::test]
async fn while_a_host_is_late_the_worker_is_asked_too_and_the_first_one_answers() {
    let ollama = Ollama::start();
    let config = on_host(&ollama.url, &with_worker("    deadlines: { first_token_seconds: 60 }\n"))
        .replace("model_name: m", "model_name: solar");
    let sarai = Sarai::start(&config);
    for _ in 0..5 {
        assert!(served_by(&ask(&sarai, json!({ "max_tokens": 2 })).await).contains("ollama_http"));
    }
    ollama.signal("-STOP");
    let began = Instant::now();
    let answer = ask(&sarai, json!({ "max_tokens": 4, "stream": true })).await;
    assert_eq!((answer.status, served_by(&answer)), (200, "solar@gguf_native"), "{}", answer.text);
    assert!(began.elapsed() < Duration::from_secs(40), "long before the host's deadline: {:?}", began.elapsed());
    assert!(
        answer.header("x-sarai-fallback-reason").unwrap().contains("another place was faster"),
        "{:?}",
        answer.headers
    );
    ollama.signal("-CONT");
    sarai.until("its place is free", |ps| ps["models"][0]["deployments"][0]["outstanding"] == 0).await;
    sarai.until("it is up", |ps| ps["models"][0]["deployments"][0]["breaker"] == "closed").await;
    assert!(served_by(&ask(&sarai, json!({ "max_tokens": 2 })).await).contains("ollama_http"));
}

#[tokio::test]
async fn the_one_that_loses_the_race_is_cancelled_at_the_host() {
    let host = Host::start(|_, _| vec![Step::Hold]);
    let sarai = Sarai::start(&on_host(&host.url, &with_worker("")));
    let answer = ask(&sarai, json!({ "max_tokens": 2 })).await;
    assert_eq!((answer.status, served_by(&answer)), (200, "solar@gguf_native"), "{}", answer.text);
    let asked = host.until("it is told", |asked| asked.iter().all(|asked| asked.left.is_some())).await;
    assert_eq!(asked.len(), 1, "asked once");
}

/// The host's first token comes while the worker still reads a long prompt, which it then gives up.
#[tokio::test]
async fn a_worker_that_loses_the_race_is_cancelled() {
    let late = Duration::from_secs(5);
    let host = Host::start(move |number, _| match number {
        0..5 => ollama(&["quick"]),
        _ => [vec![Step::Wait(late)], ollama(&["late"])].concat(),
    });
    let worker = format!("gguf_path: {}, context_length: 8192, parallel: 1", smollm2());
    let sarai = Sarai::start(&format!(
        "models:\n  tiny: {{ backend: gguf_native, {worker} }}\n  solar: {{ backend: ollama_http, url: \"{}\", model_name: m, fallback: gguf_native, {worker} }}\n",
        host.url
    ));
    for _ in 0..5 {
        assert!(served_by(&ask(&sarai, json!({})).await).contains("ollama_http"));
    }
    let long = chat("solar", &"All work and no play. ".repeat(1_200), json!({}));
    let asked = sarai.post("/v1/chat/completions", long);
    let is_busy = async { sarai.until("the worker is asked", |ps| ps["workers"][0]["busy"] == 1).await };
    let (answer, ()) = tokio::join!(asked, is_busy);
    assert!(served_by(&answer).contains("ollama_http"), "{:?} {}", answer.headers, answer.text);
    assert!(answer.text.contains("late"));
    sarai.until("the worker is let go of", |ps| ps["workers"][0]["busy"] == 0).await;
    // It has given its only place to whoever comes next, and does not read to the end of it: 7,000 tokens are half a minute.
    let began = Instant::now();
    let next = sarai.post("/v1/chat/completions", chat("tiny", "Hi", json!({ "max_tokens": 1 }))).await;
    assert_eq!(next.status, 200, "{}", next.text);
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_stall_is_noticed_within_a_few_of_the_hosts_usual_gaps_also_after_a_restart() {
    let host = Host::start(|number, _| {
        let mut steps = vec![Step::Send(ok("application/x-ndjson"))];
        for n in 0..20 {
            steps.push(Step::Send(line(&format!("{n} "))));
            steps.push(Step::Wait(Duration::from_millis(2)));
        }
        steps.push(if number < 3 { Step::Send(last_line(json!({}))) } else { Step::Hold });
        steps
    });
    // The limit in the configuration is what counts until the gaps are known: far longer than this test may take.
    let config = on_host(&host.url, &with_worker(""));
    let state = tempfile::tempdir().unwrap();
    let start = || Sarai::start_with_env(&config, &[("SARAI_STATE_DIR", state.path().to_str().unwrap())]);
    let sarai = start();
    for _ in 0..3 {
        assert_eq!(ask(&sarai, json!({})).await.status, 200);
    }
    drop(sarai);
    let sarai = start();
    let began = Instant::now();
    let answer = ask(&sarai, json!({ "stream": true, "max_tokens": 40 })).await;
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert!(answer.said().starts_with("0 1 2 3 "), "{}", answer.text);
    let end = answer.sse().into_iter().find(|event| event["sarai"]["resumed"].is_array()).expect("it is resumed");
    assert!(end["sarai"]["resumed"][0]["reason"].as_str().unwrap().contains("sent nothing"), "{end}");
}

/// A host that refuses a prompt for its length is not asked for what it cannot hold, and is not to blame for it.
#[tokio::test]
async fn a_prompt_too_long_for_a_host_goes_where_it_fits() {
    let ollama = Ollama::start();
    let config = format!(
        "models:\n  solar: {{ backend: ollama_http, url: \"{}\", model_name: solar, context_length: 256, fallback_models: [long] }}\n  long: {{ backend: gguf_native, gguf_path: {}, context_length: 2048 }}\n  alone: {{ backend: ollama_http, url: \"{0}\", model_name: solar, context_length: 256 }}\n",
        ollama.url,
        smollm2()
    );
    let sarai = Sarai::start(&config);
    let prompt = "word ".repeat(600);
    let ask = async |model: &str| {
        let body = chat(model, &prompt, json!({ "max_tokens": 4 }));
        sarai.post("/v1/chat/completions", body).await
    };
    let answer = ask("solar").await;
    assert_eq!((answer.status, served_by(&answer)), (200, "long@gguf_native"), "{}", answer.text);
    assert!(answer.header("x-sarai-fallback-reason").unwrap().contains("too long"));
    let refused = ask("alone").await;
    assert_eq!(
        (refused.status, &refused.json()["error"]["code"]),
        (400, &json!("context_length_exceeded")),
        "{}",
        refused.text
    );
    let short = chat("alone", "Hello.", json!({ "max_tokens": 4 }));
    assert_eq!(sarai.post("/v1/chat/completions", short).await.status, 200, "its breaker has heard of nothing");
}

#[tokio::test]
async fn another_model_goes_on_where_the_policy_allows_it() {
    let cut =
        |_: usize, _: &Value| vec![Step::Send(format!("{}{}", ok("application/x-ndjson"), line("The answer is")))];
    for (policy, goes_on) in [("any", true), ("same_model", false)] {
        let host = Host::start(cut);
        let more = format!(
            "    fallback_models: [lfm2]\n    resume: {policy}\n  lfm2: {{ backend: gguf_native, gguf_path: {} }}\n",
            smollm2()
        );
        let sarai = Sarai::start(&on_host(&host.url, &more));
        let answer = ask(&sarai, json!({ "stream": true })).await;
        assert_eq!(answer.text.ends_with("data: [DONE]\n\n"), goes_on, "{policy}: {}", answer.text);
        if goes_on {
            let end = answer.sse().into_iter().find(|event| event["sarai"]["resumed"].is_array()).unwrap();
            assert_eq!(end["sarai"]["resumed"][0]["by"], "lfm2@gguf_native");
            assert!(end["sarai"]["degraded"].to_string().contains("model:lfm2"), "{end}");
        }
    }
}

/// A raw prompt goes on at another Ollama from the exact text.
#[tokio::test]
async fn a_raw_prompt_that_was_cut_goes_on_at_another_real_ollama() {
    let ollama = Ollama::start();
    let body = |model: &str| json!({ "model": model, "stream": true, "raw": true, "prompt": "Once upon a time", "options": { "temperature": 0, "num_predict": 24 } });
    let response = |lines: &[Value]| -> String { lines.iter().filter_map(|line| line["response"].as_str()).collect() };
    let client = reqwest_client();
    let direct = client.post(format!("{}/api/generate", ollama.url)).body(body("solar").to_string()).send();
    let lines = Answer::of(direct.await.unwrap()).await.lines();
    let whole = response(&lines);
    let pieces: Vec<String> = lines.iter().take(8).map(|line| line["response"].as_str().unwrap().to_owned()).collect();
    let cut = Host::start(move |_, _| {
        let lines: String = pieces
            .iter()
            .map(|text| format!("{}\n", json!({ "model": "solar", "response": text, "done": false })))
            .collect();
        vec![Step::Send(format!("{}{lines}", ok("application/x-ndjson")))]
    });
    let sarai = Sarai::start(&format!(
        "models:\n  solar: {{ backend: ollama_http, urls: [\"{}\", {{ url: \"{}\", priority: 1 }}] }}\n",
        cut.url, ollama.url
    ));
    let ours = sarai.post("/api/generate", body("solar").to_string()).await.lines();
    let end = ours.last().unwrap();
    assert_eq!(end["sarai"]["resumed"].as_array().map(Vec::len), Some(1), "{end}");
    assert_eq!(response(&ours), whole, "one text, nothing doubled and nothing missing");
    assert_eq!(end["eval_count"], 24, "{end}");
}

/// One that says the same whatever the prompt is, as one that opens a new turn with it, is asked again from the beginning instead.
#[tokio::test]
async fn a_host_that_does_not_go_on_with_raw_prompts_is_not_trusted_to() {
    let lines = |texts: &[&str]| -> String {
        let line = |text: &&str| format!("{}\n", json!({ "model": "m", "response": text, "done": false }));
        format!("{}{}", ok("application/x-ndjson"), texts.iter().map(line).collect::<String>())
    };
    let end = json!({ "model": "m", "response": "", "done": true, "done_reason": "stop", "prompt_eval_count": 3, "eval_count": 4 });
    let (begins, says) = (lines(&["one ", "two "]), format!("{}{end}\n", lines(&["one ", "two ", "three ", "four"])));
    let cut = Host::start(move |_, _| vec![Step::Send(begins.clone())]);
    let turns = Host::start(move |_, _| vec![Step::Send(says.clone())]);
    let sarai = Sarai::start(&format!(
        "models:\n  m: {{ backend: ollama_http, urls: [\"{}\", {{ url: \"{}\", priority: 1 }}] }}\n",
        cut.url, turns.url
    ));
    let body =
        json!({ "model": "m", "stream": true, "raw": true, "prompt": "Count: ", "options": { "temperature": 0 } });
    for asked in [3, 4] {
        let answer = sarai.post("/api/generate", body.to_string()).await.lines();
        let said: String = answer.iter().filter_map(|line| line["response"].as_str()).collect();
        assert_eq!(said, "one two three four", "nothing doubled: {answer:?}");
        assert_eq!(turns.asked().len(), asked, "twice for the proof, which is remembered, and once for each answer");
        assert_eq!(turns.asked()[asked - 1].body["prompt"], "Count: ");
    }
}

fn reqwest_client() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().unwrap()
}

#[tokio::test]
async fn hosts_come_and_go_while_the_server_runs_and_a_bad_file_changes_nothing() {
    let (a, b) = (Host::start(|_, _| ollama(&["from a"])), Host::start(|_, _| ollama(&["from b"])));
    let slow = Host::start(|_, _| {
        let mut steps = vec![Step::Send(ok("application/x-ndjson"))];
        for n in 0..40 {
            steps.push(Step::Send(line(&format!("{n} "))));
            steps.push(Step::Wait(Duration::from_millis(100)));
        }
        steps.push(Step::Send(last_line(json!({}))));
        steps
    });
    let folder = tempfile::tempdir().unwrap();
    let (hosts, log) = (folder.path().join("hosts"), folder.path().join("log"));
    std::fs::write(&hosts, format!("{} # the first\n", a.url)).unwrap();
    let config = |more: &str| {
        format!(
            "models:\n  solar: {{ backend: ollama_http, hosts_file: {}, model_name: m }}\n  slow: {{ backend: ollama_http, url: \"{}\", model_name: m }}\n{more}",
            hosts.display(),
            slow.url
        )
    };
    let sarai = Sarai::start_with(&config(""), Stdio::from(std::fs::File::create(&log).unwrap()));
    let said = async |what: &str, times: usize| {
        let began = Instant::now();
        while std::fs::read_to_string(&log).unwrap().matches(what).count() < times {
            assert!(began.elapsed() < Duration::from_secs(20), "never said: {what}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let content = async || ask(&sarai, json!({})).await.json()["choices"][0]["message"]["content"].clone();
    assert_eq!(content().await, "from a");
    let running = sarai.client.post(format!("{}/v1/chat/completions", sarai.url));
    let running = running.body(chat("slow", "count", json!({ "stream": true }))).send().await.unwrap();

    std::fs::write(&hosts, format!("{} weight=2\n", b.url)).unwrap();
    said("the configuration is taken", 1).await;
    assert_eq!(content().await, "from b", "noticed without a signal");

    std::fs::write(&hosts, format!("{} weight=none\n", a.url)).unwrap();
    said("the configuration is not taken", 1).await;
    assert_eq!(content().await, "from b", "a bad file changes nothing");

    std::fs::write(&hosts, format!("{}\n", a.url)).unwrap();
    said("the configuration is taken", 2).await;
    let file = sarai.folder.path().join("sarai.yaml");
    std::fs::write(&file, config("  third: { backend: ollama_http, url: \"http://127.0.0.1:1\" }\n")).unwrap();
    let hup = || assert!(Command::new("kill").args(["-HUP", &sarai.pid().to_string()]).status().unwrap().success());
    hup();
    said("the configuration is taken", 3).await;
    let list = sarai.get("/v1/models").await.text;
    assert!(list.contains("third"), "a model too: {list}");
    std::fs::write(&file, "models: [").unwrap();
    hup();
    said("the configuration is not taken", 2).await;
    assert_eq!(content().await, "from a");

    let events = Answer::of(running).await;
    assert_eq!(events.said(), (0..40).map(|n| format!("{n} ")).collect::<String>(), "a running answer goes on");
    assert!(events.text.ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn a_name_stands_for_all_its_addresses_where_that_is_configured() {
    let host = Host::start(|_, _| ollama(&["here"]));
    let port = host.url.rsplit(':').next().unwrap();
    let sarai = Sarai::start(&on_host(&format!("http://localhost:{port}"), "    dns: true\n"));
    let answer = ask(&sarai, json!({})).await;
    assert_eq!((answer.status, served_by(&answer)), (200, &*format!("solar@ollama_http(127.0.0.1:{port})")));
}

/// The server sees an `/etc/hosts` of its own, in a mount namespace: the name's addresses change while it runs.
#[tokio::test]
async fn a_name_whose_addresses_change_is_followed_while_the_server_runs() {
    let (a, folder) = (Host::start(|_, _| ollama(&["from a"])), tempfile::tempdir().unwrap());
    let port = a.url.rsplit(':').next().unwrap();
    let b = Host::start_at(&format!("127.0.0.2:{port}"), |_, _| ollama(&["from b"]));
    let file = folder.path().join("hosts");
    std::fs::write(&file, "127.0.0.1 expert.test\n").unwrap();
    let config = on_host(&format!("http://expert.test:{port}"), "    dns: true\n");
    let mounted = format!("mount --bind {} /etc/hosts && exec \"$0\" \"$@\"", file.display());
    let sarai = Sarai::start_below(&["unshare", "--mount", "sh", "-c", &mounted], &config);
    let served = async || served_by(&ask(&sarai, json!({})).await).to_owned();
    assert_eq!(served().await, format!("solar@ollama_http(127.0.0.1:{port})"));
    std::fs::write(&file, "127.0.0.2 expert.test\n").unwrap();
    let wanted = format!("solar@ollama_http(127.0.0.2:{port})");
    sarai.until("the other address", |ps| ps["models"][0]["deployments"][0]["deployment"] == *wanted).await;
    assert_eq!(served().await, wanted);
    assert_eq!(b.asked().len(), 1);
    std::fs::write(&file, "127.0.0.1 expert.test\n127.0.0.2 expert.test\n").unwrap();
    sarai.until("both", |ps| ps["models"][0]["deployments"].as_array().unwrap().len() == 2).await;
}

#[tokio::test]
async fn heartbeats_are_signs_of_life_and_not_tokens() {
    let beats =
        |n: usize| (0..n).flat_map(|_| [Step::Send(": alive\n\n".into()), Step::Wait(Duration::from_millis(50))]);
    let chunk = |delta: Value, finish: Value| {
        format!("data: {}\n\n", json!({ "choices": [{ "index": 0, "delta": delta, "finish_reason": finish }] }))
    };
    let host = Host::start(move |number, _| {
        let mut steps = vec![Step::Send(ok("text/event-stream"))];
        steps.extend(beats(if number == 0 { 30 } else { 400 }));
        let text = chunk(json!({ "content": "late" }), Value::Null) + &chunk(json!({}), json!("stop"));
        steps.push(Step::Send(text + "data: [DONE]\n\n"));
        steps
    });
    let config = |deadlines: &str| {
        format!(
            "models:\n  solar: {{ backend: openai_http, url: \"{}/v1\", model_name: m, deadlines: {{ {deadlines} }} }}\n",
            host.url
        )
    };
    let sarai = Sarai::start(&config("first_token_seconds: 4"));
    let alive = ask(&sarai, json!({})).await;
    assert_eq!(alive.json()["choices"][0]["message"]["content"], "late", "{}", alive.text);
    let only_beats = ask(&sarai, json!({})).await;
    assert_ne!(only_beats.status, 200, "beats without a token for longer than the deadline: {}", only_beats.text);
}

#[tokio::test]
async fn a_stream_through_sarai_is_passed_on_piece_by_piece() {
    let host = Host::start(|_, _| {
        let mut steps = vec![Step::Send(ok("application/x-ndjson")), Step::Send(line("first "))];
        steps.push(Step::Hold);
        steps
    });
    let sarai = Sarai::start(&on_host(&host.url, "    resume: never\n"));
    let body = chat("solar", "Hello.", json!({ "stream": true }));
    let response = sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(body).send().await.unwrap();
    let mut chunks = response.bytes_stream();
    let mut seen = String::new();
    while !seen.contains("first ") {
        seen.push_str(&String::from_utf8_lossy(&chunks.next().await.unwrap().unwrap()));
    }
    drop(chunks);
    host.until("the client's leave in mid-stream", |asked| asked[0].left.is_some()).await;
}

/// Its host holds one request and takes no more; the others wait for it without keeping anybody from an answer.
#[tokio::test]
async fn who_waits_for_a_slow_host_keeps_nobody_else_from_an_answer() {
    let slow = Host::start(|_, _| vec![Step::Hold]);
    let quick = Host::start(|_, _| ollama(&["here"]));
    let sarai = Sarai::start(&format!(
        "server: {{ max_in_flight: 2 }}\nmodels:\n  slow: {{ backend: ollama_http, url: \"{}\", max_outstanding: 1 }}\n  quick: {{ backend: ollama_http, url: \"{}\" }}\n",
        slow.url, quick.url
    ));
    let ask = |model: &str| sarai.post("/v1/chat/completions", chat(model, "Hi", json!({})));
    let waiting = futures_util::future::join_all((0..5).map(|_| ask("slow")));
    let answered = async {
        sarai.until("all wait but one", |ps| ps["requests"] == json!({ "in_flight": 1, "queued": 4 })).await;
        for _ in 0..3 {
            assert_eq!(ask("quick").await.status, 200);
        }
    };
    tokio::select! {
        () = answered => {}
        answers = waiting => panic!("{} were answered", answers.len()),
    }
    // Its clients are gone with the future.
    sarai.until("nobody waits", |ps| ps["requests"] == json!({ "in_flight": 0, "queued": 0 })).await;
}
