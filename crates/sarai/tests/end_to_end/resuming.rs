//! Who goes on, who is waited for, and where a request may go, when hosts break off, hang, are full or point elsewhere.

use crate::support::host::{Host, Step, line, ok, ollama, on_host, openai, served_by, with_worker};
use crate::support::{Answer, Ollama, Sarai, Watch, chat, smollm2};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

async fn ask(sarai: &Sarai, more: Value) -> Answer {
    let mut all = json!({ "temperature": 0, "max_tokens": 12 });
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    sarai.post("/v1/chat/completions", chat("solar", "Hello.", all)).await
}

fn worker() -> String {
    format!("fallback: gguf_native, gguf_path: {}, context_length: 1024", smollm2())
}

/// Sends so much, and is gone.
fn cut(text: &'static str) -> Host {
    Host::start(move |_, _| vec![Step::Send(format!("{}{}", ok("application/x-ndjson"), line(text)))])
}

/// All there is has come, and then the connection breaks: nothing of it is lost.
#[tokio::test]
async fn a_last_line_before_a_connection_breaks_is_passed_on() {
    let usage = json!({ "prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7 });
    let of = |kind: &str, value: Value| json!({ "id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [{ "index": 0, kind: value, "finish_reason": "stop" }], "usage": usage });
    let whole = of("message", json!({ "role": "assistant", "content": "all of it" })).to_string();
    let first = json!({ "id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [{ "index": 0, "delta": { "content": "all " }, "finish_reason": null }] });
    let last = of("delta", json!({ "content": "of it" }));
    // Neither of them is as long as it was said to be.
    let length = |kind: &str, body: &str| {
        format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n{body}", body.len() + 9)
    };
    for answer in
        [length("application/json", &whole), length("text/event-stream", &format!("data: {first}\n\ndata: {last}"))]
    {
        let host = Host::start(move |_, _| vec![Step::Send(answer.clone())]);
        let sarai = Sarai::start(&format!(
            "models:\n  solar: {{ backend: openai_http, url: \"{}\", model_name: m }}\n",
            host.url
        ));
        for stream in [false, true] {
            let answer = ask(&sarai, json!({ "stream": stream, "temperature": 1 })).await;
            assert_eq!(answer.status, 200, "{}", answer.text);
            let said = if stream {
                answer.said()
            } else {
                answer.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
            };
            assert_eq!(said, "all of it", "{}", answer.text);
        }
    }
}

/// What a host says is kept until it is whole: without an end, it would take all memory.
#[tokio::test]
async fn an_answer_without_an_end_is_given_up_and_the_worker_gives_another() {
    let text = line(&"many words ".repeat(90_000));
    let host = Host::start(move |_, _| {
        let begins = std::iter::once(Step::Send(ok("application/x-ndjson")));
        begins.chain(std::iter::repeat_n(Step::Send(text.clone()), 500)).collect()
    });
    let sarai = Sarai::start(&format!(
        "models:\n  solar: {{ backend: ollama_http, url: \"{}\", model_name: m, {} }}\n",
        host.url,
        worker()
    ));
    let memory = Watch::of(sarai.pid().into());
    let answer = ask(&sarai, json!({})).await;
    assert_eq!((answer.status, served_by(&answer)), (200, "solar@gguf_native"), "{}", answer.text);
    let reason = answer.header("x-sarai-fallback-reason").unwrap();
    assert!(reason.contains("more than 134217728 bytes"), "{reason}");
    assert!(memory.most() < 320 << 20, "what is kept and what is read");
}

/// Nothing of a whole answer is out when its connection breaks within a line: it is asked for once more.
#[tokio::test]
async fn a_whole_answer_that_is_cut_within_a_line_is_asked_for_once_more() {
    let half = format!("{}{}", ok("application/x-ndjson"), &line("all of it")[..20]);
    // Longer than it is: the transport breaks.
    let half = half.replace("connection: close", "content-length: 999");
    let host = Host::start(move |n, _| if n == 0 { vec![Step::Send(half.clone())] } else { ollama(&["all of it"]) });
    let sarai =
        Sarai::start(&format!("models:\n  solar: {{ backend: ollama_http, url: \"{}\", model_name: m }}\n", host.url));
    let answer = ask(&sarai, json!({})).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(
        (answer.json()["choices"][0]["message"]["content"].as_str(), host.asked().len()),
        (Some("all of it"), 2)
    );
}

/// With the settings that everybody uses: what is asked once more is asked with the same seed.
#[tokio::test]
async fn a_stream_goes_on_at_another_host_though_the_client_has_set_no_seed() {
    let pieces = ["One ", "and ", "two."];
    let first = cut("One ");
    let second = Host::start(move |_, _| ollama(&pieces));
    let config = format!(
        "models:\n  solar: {{ backend: ollama_http, urls: [\"{}\", {{ url: \"{}\", priority: 1 }}], model_name: m }}\n",
        first.url, second.url
    );
    let sarai = Sarai::start(&config);
    let answer = ask(&sarai, json!({ "stream": true, "temperature": null })).await;
    assert_eq!(answer.said(), "One and two.", "{}", answer.text);
    let seed = |host: &Host| host.asked()[0].body["options"]["seed"].as_u64();
    assert!(seed(&first).is_some() && seed(&first) == seed(&second), "{:?} {:?}", seed(&first), seed(&second));
}

/// As long as what is out is text, whatever else was offered or could have been.
#[tokio::test]
async fn an_answer_goes_on_though_tools_are_offered_or_fields_are_empty() {
    let tools = json!([{ "type": "function", "function": { "name": "f", "parameters": { "type": "object", "properties": {} } } }]);
    let chunk = |text: &str| json!({ "id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [{ "index": 0, "delta": { "content": text, "tool_calls": [], "reasoning_content": "" }, "finish_reason": null }] });
    let (part, rest) = (chunk("The answer"), chunk(" is 42."));
    let end = json!({ "id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [{ "index": 0, "delta": {}, "finish_reason": "stop" }] });
    let begun = format!("{}data: {part}\n\n", ok("text/event-stream"));
    let first = Host::start(move |_, _| vec![Step::Send(begun.clone())]);
    let second = Host::start(move |_, _| openai(&[part.clone(), rest.clone(), end.clone()]));
    let sarai = Sarai::start(&format!(
        "models:\n  solar: {{ backend: openai_http, urls: [\"{}\", {{ url: \"{}\", priority: 1 }}], model_name: m }}\n",
        first.url, second.url
    ));
    for more in [json!({ "stream": true }), json!({ "stream": true, "tools": tools })] {
        let answer = ask(&sarai, more).await;
        assert_eq!(answer.said(), "The answer is 42.", "{}", answer.text);
        assert!(answer.text.contains("\"resumed\":[{") && answer.text.ends_with("data: [DONE]\n\n"), "{}", answer.text);
    }
}

/// The policy is about the model that has written the text, which is not the one that was asked for.
#[tokio::test]
async fn a_fallback_that_breaks_off_goes_on_at_another_host_of_its_own() {
    let (first, second) = (cut("The answer"), Host::start(|_, _| ollama(&["The answer", " is 42."])));
    let sarai = Sarai::start(&format!(
        "models:\n  solar: {{ backend: ollama_http, url: \"{}\", fallback_models: [other] }}\n  other: {{ backend: ollama_http, urls: [\"{}\", {{ url: \"{}\", priority: 1 }}], model_name: m }}\n",
        Ollama::unreachable(),
        first.url,
        second.url
    ));
    let answer = ask(&sarai, json!({ "stream": true })).await;
    assert_eq!(answer.said(), "The answer is 42.", "{}", answer.text);
    assert!(answer.text.ends_with("data: [DONE]\n\n"), "{}", answer.text);
}

/// The other host could go on, and says nothing; the worker can at once.
#[tokio::test]
async fn who_should_go_on_and_hangs_gives_way_to_the_worker() {
    let (first, hangs) = (cut("The answer is"), Host::start(|_, _| vec![Step::Hold]));
    let sarai = Sarai::start(&format!(
        "models:\n  solar: {{ backend: ollama_http, urls: [\"{}\", {{ url: \"{}\", priority: 1 }}], model_name: m, {} }}\n",
        first.url,
        hangs.url,
        worker()
    ));
    let answer = ask(&sarai, json!({ "stream": true })).await;
    let end = answer.sse().into_iter().find(|event| event["sarai"]["resumed"].is_array()).unwrap();
    assert_eq!(end["sarai"]["resumed"][0]["by"], "solar@gguf_native", "{end}");
    assert!(answer.said().starts_with("The answer is") && answer.text.ends_with("data: [DONE]\n\n"));
    hangs.until("it is let go of", |asked| asked.len() == 1 && asked[0].left.is_some()).await;
}

/// The worker was faster, and then nothing came of it: what it writes never keeps the schema.
#[tokio::test]
async fn a_host_that_was_late_has_its_turn_again_when_the_worker_fails() {
    let whole = json!({ "id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [{ "index": 0, "message": { "role": "assistant", "content": "from the host" }, "finish_reason": "stop" }] });
    let host = Host::start(move |number, _| {
        let wait = Step::Wait(Duration::from_secs(if number == 0 { 60 } else { 0 }));
        vec![wait, Step::Send(format!("{}{whole}", ok("application/json")))]
    });
    let sarai = Sarai::start(&format!(
        "models:\n  solar: {{ backend: openai_http, url: \"{}\", model_name: m, {} }}\n",
        host.url,
        worker()
    ));
    let schema = json!({ "enum": ["red"], "not": { "const": "red" } });
    let form = json!({ "type": "json_schema", "json_schema": { "name": "answer", "schema": schema } });
    let answer = ask(&sarai, json!({ "response_format": form })).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(answer.json()["choices"][0]["message"]["content"], "from the host");
    assert!(answer.header("x-sarai-fallback-reason").unwrap().contains("solar@gguf_native"), "{:?}", answer.headers);
    assert_eq!(host.asked().len(), 2);
}

#[tokio::test]
async fn a_host_that_points_elsewhere_is_not_followed() {
    let elsewhere = Host::start(|_, _| ollama(&["from elsewhere"]));
    let head = format!(
        "HTTP/1.1 307 Temporary Redirect\r\nlocation: {}/api/chat\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
        elsewhere.url
    );
    let host = Host::start(move |_, _| vec![Step::Send(head.clone())]);
    let sarai = Sarai::start(&format!(
        "models:\n  solar: {{ backend: ollama_http, url: \"{}\", model_name: m, {} }}\n",
        host.url,
        worker()
    ));
    let answer = ask(&sarai, json!({})).await;
    assert_eq!(answer.header("x-sarai-served-by"), Some("solar@gguf_native"), "{}", answer.text);
    assert!(answer.header("x-sarai-fallback-reason").unwrap().contains("307"));
    assert!(elsewhere.asked().is_empty(), "a prompt goes where the configuration says");
}

/// Speech, say, is one line of megabytes.
#[tokio::test]
async fn an_answer_that_comes_whole_may_be_longer_than_a_line_of_a_stream() {
    let host = Host::start(|_, _| {
        let audio = json!({ "id": "a", "data": "A".repeat(3 << 20), "transcript": "hello" });
        let message = json!({ "role": "assistant", "content": "hello", "audio": audio });
        let body = json!({ "choices": [{ "index": 0, "message": message, "finish_reason": "stop" }] });
        vec![Step::Send(format!("{}{body}", ok("application/json")))]
    });
    let sarai = Sarai::start(&format!("models:\n  solar: {{ backend: openai_http, url: \"{}/v1\" }}\n", host.url));
    let answer = ask(&sarai, json!({})).await;
    let spoken = answer.json()["choices"][0]["message"]["audio"]["data"].as_str().map(str::len);
    assert_eq!((answer.status, spoken), (200, Some(3 << 20)), "{}", answer.text.chars().take(300).collect::<String>());
}

/// Hosts of two priorities, all full: the deadline of the queue is one for all of it.
#[tokio::test]
async fn a_place_is_waited_for_once() {
    let (one, other) = (Host::start(|_, _| vec![Step::Hold]), Host::start(|_, _| vec![Step::Hold]));
    let of =
        |host: &Host, priority: u32| format!("{{ url: \"{}\", priority: {priority}, max_outstanding: 1 }}", host.url);
    let sarai = Sarai::start(&format!(
        "models:\n  solar:\n    backend: ollama_http\n    urls: [{}, {}]\n    model_name: m\n    deadlines: {{ queue_seconds: 4 }}\n",
        of(&one, 0),
        of(&other, 1)
    ));
    let waits = async {
        one.until("it is full", |asked| asked.len() == 1).await;
        let other_too = async {
            other.until("it is full too", |asked| asked.len() == 1).await;
            let began = Instant::now();
            let answer = ask(&sarai, json!({})).await;
            assert!(answer.text.contains("queue"), "{}", answer.text);
            began.elapsed()
        };
        // The second one waits for the first host, and goes to the other when its time is over.
        tokio::select! {
            took = other_too => took,
            answer = ask(&sarai, json!({})) => panic!("{}", answer.text),
        }
    };
    let took = tokio::select! {
        took = waits => took,
        answer = ask(&sarai, json!({})) => panic!("{}", answer.text),
    };
    assert!(took < Duration::from_secs(7), "4 s, and not once more for each host: {took:?}");
    sarai.until("all have left", |ps| ps["requests"] == json!({ "in_flight": 0, "queued": 0 })).await;
}

/// What was known of a host is known when it comes back.
#[tokio::test]
async fn a_breaker_is_as_open_when_its_host_leaves_and_returns() {
    let broken = Host::start(|_, _| {
        vec![Step::Send("HTTP/1.1 500 Oops\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".into())]
    });
    let fine = Host::start(|_, _| ollama(&["fine"]));
    let folder = tempfile::tempdir().unwrap();
    let hosts = folder.path().join("hosts");
    std::fs::write(&hosts, format!("{}\n", broken.url)).unwrap();
    let config = format!(
        "models:\n  solar: {{ backend: ollama_http, hosts_file: {}, model_name: m, {} }}\n",
        hosts.display(),
        worker()
    );
    let sarai = Sarai::start(&config);
    for _ in 0..2 {
        assert_eq!(ask(&sarai, json!({})).await.status, 200);
    }
    let shows = |url: &str, is: &str, ps: &Value| {
        let all = ps["models"][0]["deployments"].as_array().unwrap();
        all.iter().any(|one| {
            one.to_string().contains(url.trim_start_matches("http://"))
                && (one["breaker"] == "closed") == (is == "closed")
        })
    };
    sarai.until("it is left alone", |ps| shows(&broken.url, "open", ps)).await;
    std::fs::write(&hosts, format!("{}\n", fine.url)).unwrap();
    sarai.until("another one is there", |ps| shows(&fine.url, "closed", ps)).await;
    std::fs::write(&hosts, format!("{}\n", broken.url)).unwrap();
    sarai.until("it is back", |ps| ps.to_string().contains(broken.url.trim_start_matches("http://"))).await;
    assert!(shows(&broken.url, "open", &sarai.ps().await), "{}", sarai.ps().await);
    let asked = broken.asked().len();
    assert_eq!(ask(&sarai, json!({})).await.header("x-sarai-served-by"), Some("solar@gguf_native"));
    assert_eq!(broken.asked().len(), asked, "and nobody asks it but its probes");
}

/// Nobody could know what was said within a call or a thought, so another host is not even asked.
#[tokio::test]
async fn what_broke_off_within_a_call_or_a_thought_ends_with_an_error() {
    let delta = |delta: Value| json!({ "id": "x", "choices": [{ "index": 0, "delta": delta, "finish_reason": null }] });
    let call =
        json!({ "index": 0, "id": "c", "type": "function", "function": { "name": "f", "arguments": "{\"a\": " } });
    for begun in [delta(json!({ "tool_calls": [call] })), delta(json!({ "reasoning_content": "Let me think" }))] {
        let text = begun.to_string();
        let cut = Host::start(move |_, _| vec![Step::Send(format!("{}data: {text}\n\n", ok("text/event-stream")))]);
        let other = Host::start(|_, _| openai(&[]));
        let sarai = Sarai::start(&format!(
            "models:\n  solar: {{ backend: openai_http, urls: [\"{}\", {{ url: \"{}\", priority: 1 }}], model_name: m, resume: any }}\n",
            cut.url, other.url
        ));
        let tools = json!([{ "type": "function", "function": { "name": "f", "parameters": { "type": "object" } } }]);
        let answer = ask(&sarai, json!({ "stream": true, "tools": tools, "temperature": 0 })).await;
        assert_eq!(answer.sse().last().unwrap()["error"]["code"], "cut", "{}", answer.text);
        assert!(!answer.text.contains("[DONE]") && !answer.text.contains("\"finish_reason\":\"stop\""));
        assert_eq!((cut.asked().len(), other.asked().len()), (1, 0));
    }
    // Ollama has the thoughts of a prompt beside its text.
    let thought = json!({ "model": "m", "response": "", "thinking": "Let me think", "done": false });
    let cut = Host::start(move |_, _| vec![Step::Send(format!("{}{thought}\n", ok("application/x-ndjson")))]);
    let sarai = Sarai::start(&on_host(&cut.url, &with_worker("")));
    let body = json!({ "model": "solar", "prompt": "Hi", "options": { "temperature": 0 } });
    let lines = sarai.post("/api/generate", body.to_string()).await.lines();
    assert_eq!((&lines[0]["thinking"], lines.len()), (&json!("Let me think"), 2), "{lines:?}");
    assert!(lines[1]["error"].is_string() && cut.asked()[0].head.starts_with("POST /api/generate"), "{lines:?}");
}
