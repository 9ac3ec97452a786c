//! Which of a model's hosts is asked: by weight, speed, load and distance.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::support::host::{Host, Step, ollama, on_host, served_by, with_worker};
use crate::support::{Ollama, Sarai, chat};
use serde_json::{Value, json};

#[tokio::test]
async fn hosts_share_the_load_by_their_weights_and_those_of_a_higher_priority_stand_by() {
    let hosts: Vec<_> = (0..3).map(|_| Host::start(|_, _| ollama(&["yes"]))).collect();
    let urls = format!(
        "[{{ url: \"{}\", weight: 3 }}, \"{}\", {{ url: \"{}\", priority: 1 }}]",
        hosts[0].url, hosts[1].url, hosts[2].url
    );
    let config = format!("models:\n  solar: {{ backend: ollama_http, urls: {urls}, model_name: m }}\n");
    let sarai = Sarai::start(&config);
    for n in 0..120 {
        let answer = sarai.post("/v1/chat/completions", chat("solar", &format!("conversation {n}"), json!({}))).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
    }
    let counts: Vec<_> = hosts.iter().map(|host| host.asked().len()).collect();
    assert!(counts[0] > counts[1] && counts[1] > 5 && counts[2] == 0, "{counts:?}");
}

#[tokio::test]
async fn the_host_that_was_found_to_be_faster_is_asked() {
    let late =
        |time: u64| Host::start(move |_, _| [vec![Step::Wait(Duration::from_millis(time))], ollama(&["yes"])].concat());
    let hosts = [late(400), late(0)];
    let urls = format!("[\"{}\", \"{}\"]", hosts[0].url, hosts[1].url);
    let sarai = Sarai::start(&format!("models:\n  solar: {{ backend: ollama_http, urls: {urls}, model_name: m }}\n"));
    let counts = || [hosts[0].asked().len(), hosts[1].asked().len()];
    // Each conversation has a host that it prefers among equals, by chance: until both were asked.
    let mut conversations = 0..;
    while counts().contains(&0) {
        let next = conversations.next().filter(|n| *n < 200).unwrap();
        sarai.post("/v1/chat/completions", chat("solar", &format!("conversation {next}"), json!({}))).await;
    }
    let [slow, _] = counts();
    for n in conversations.take(30) {
        let answer = sarai.post("/v1/chat/completions", chat("solar", &format!("conversation {n}"), json!({}))).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
    }
    assert_eq!(counts()[0], slow, "the slow one was asked again");
}

#[tokio::test]
async fn what_is_known_of_hosts_stands_in_the_metrics() {
    let (busy, away) = (Host::start(|_, _| vec![Step::Hold]), Ollama::unreachable());
    let more = format!("  gone: {{ backend: ollama_http, url: \"{away}\", model_name: m }}\n");
    let sarai = Sarai::start(&on_host(&busy.url, &more));
    let body = chat("solar", "Hello.", json!({}));
    let asked = tokio::spawn(sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(body).send());
    busy.until("the request", |asked| asked.len() == 1).await;
    assert_eq!(sarai.post("/v1/chat/completions", chat("gone", "Hello.", json!({}))).await.status, 502);
    let metrics = sarai.get("/metrics").await.text;
    for (metric, model, url, value) in [
        ("breaker_open", "solar", &busy.url, 0),
        ("breaker_open", "gone", &away, 1),
        ("host_outstanding", "solar", &busy.url, 1),
        ("host_outstanding", "gone", &away, 0),
    ] {
        let place = url.strip_prefix("http://").unwrap();
        let line = format!("sarai_{metric}{{deployment=\"{model}@ollama_http({place})\"}} {value}\n");
        assert!(metrics.contains(&line), "{line}{metrics}");
    }
    asked.abort();
    // Its connection is closed, so that nothing keeps the server from its end.
    assert!(asked.await.unwrap_err().is_cancelled());
    busy.until("it is told", |asked| asked[0].left.is_some()).await;
}

#[tokio::test]
async fn a_model_is_asked_where_it_is_loaded() {
    let (a, b) = (Ollama::start(), Ollama::start());
    let load = json!({ "model": "solar", "stream": false }).to_string();
    let sarai =
        Sarai::start(&format!("models:\n  solar: {{ backend: ollama_http, urls: [\"{}\", \"{}\"] }}\n", a.url, b.url));
    let loaded = sarai.client.post(format!("{}/api/generate", b.url)).body(load).send().await.unwrap();
    assert_eq!(loaded.status(), 200);
    let is_seen = |ps: &Value| ps["models"][0]["deployments"].as_array().unwrap().iter().any(|d| d["loaded"] == true);
    let began = Instant::now();
    // A host is looked at when it is used; until then by what it was seen at when the server started.
    while !is_seen(&sarai.ps().await) {
        assert!(began.elapsed() < Duration::from_secs(20), "never seen");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for n in 0..4 {
        let answer =
            sarai.post("/v1/chat/completions", chat("solar", &format!("{n}"), json!({ "max_tokens": 2 }))).await;
        assert_eq!(served_by(&answer), format!("solar@ollama_http(127.0.0.1:{})", b.port));
    }
}

/// Passes bytes on to a host, each direction late.
fn far_away(to: &str, late: Duration) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let to = to.strip_prefix("http://").unwrap().to_owned();
    let pass = move |mut from: TcpStream, mut to: TcpStream| {
        std::thread::spawn(move || {
            let mut buffer = [0; 65536];
            while let Ok(read @ 1..) = from.read(&mut buffer) {
                std::thread::sleep(late);
                if to.write_all(&buffer[..read]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(std::net::Shutdown::Write);
        });
    };
    std::thread::spawn(move || {
        for socket in listener.incoming().map_while(Result::ok) {
            let Ok(host) = TcpStream::connect(&to) else { continue };
            pass(socket.try_clone().unwrap(), host.try_clone().unwrap());
            pass(host, socket);
        }
    });
    url
}

#[tokio::test]
async fn a_host_beyond_the_local_network_is_used_only_where_that_is_configured() {
    let ollama = Ollama::start();
    let far = far_away(&ollama.url, Duration::from_millis(25));
    for wan in [false, true] {
        let config =
            on_host(&far, &with_worker(&format!("    wan: {wan}\n"))).replace("model_name: m", "model_name: solar");
        let sarai = Sarai::start(&config);
        // The first request finds nothing measured yet.
        let answer = sarai.post("/v1/chat/completions", chat("solar", "Hello.", json!({ "max_tokens": 2 }))).await;
        assert_eq!((answer.status, served_by(&answer).contains("ollama_http")), (200, wan), "{:?}", answer.headers);
        let reason = answer.header("x-sarai-fallback-reason").unwrap_or_default();
        assert_eq!(reason.contains("beyond the local network"), !wan, "{reason}");
        let shown = sarai.ps().await["models"][0]["deployments"][0].clone();
        assert_eq!(shown["wan"], true, "{shown}");
        assert!(shown["round_trip_ms"].as_f64().is_some_and(|ms| (25.0..1_000.0).contains(&ms)), "{shown}");
    }
}

/// Of two that may be asked, the far one has its turn when the near one is away.
#[tokio::test]
async fn a_far_host_is_asked_after_the_near_ones() {
    let (near, far) = (Host::start(|_, _| ollama(&["near"])), Host::start(|_, _| ollama(&["far"])));
    let through = far_away(&far.url, Duration::from_millis(25));
    let config = format!(
        "models:\n  solar: {{ backend: ollama_http, urls: [\"{through}\", \"{}\"], model_name: m, wan: true }}\n",
        near.url
    );
    let sarai = Sarai::start(&config);
    let measured = |ps: &Value| {
        ps["models"][0]["deployments"].as_array().is_some_and(|all| all.iter().all(|one| one["round_trip_ms"].is_f64()))
    };
    sarai.until("both are measured", measured).await;
    for n in 0..8 {
        let body = chat("solar", &format!("conversation {n}"), json!({}));
        assert!(sarai.post("/v1/chat/completions", body).await.text.contains("near"));
    }
    assert_eq!(far.asked().len(), 0);
}

fn vector() -> Vec<Step> {
    let body = json!({ "model": "m", "embeddings": [[0.6, 0.8]], "prompt_eval_count": 1 });
    vec![Step::Send(format!("{}{body}", crate::support::host::ok("application/json")))]
}

/// Vectors are work like answers: hosts share it, and one that hangs has another asked.
#[tokio::test]
async fn vectors_are_made_by_all_hosts_and_by_another_one_where_one_is_late() {
    let hangs = Host::start(|number, _| if number < 12 { vector() } else { vec![Step::Hold] });
    let other = Host::start(|_, _| vector());
    let config = format!(
        "models:\n  vectors: {{ backend: ollama_http, urls: [\"{}\", \"{}\"], model_name: m, role: embedding }}\n",
        hangs.url, other.url
    );
    let sarai = Sarai::start(&config);
    let mut texts = 0..;
    let mut embed = async || {
        let input = format!("text {}", texts.next().unwrap());
        let answer = sarai.post("/api/embed", json!({ "model": "vectors", "input": input }).to_string()).await;
        assert_eq!((answer.status, &answer.json()["embeddings"]), (200, &json!([[0.6, 0.8]])), "{}", answer.text);
        answer
    };
    let began = Instant::now();
    while hangs.asked().len() < 12 {
        embed().await;
    }
    assert!(other.asked().len() > 3, "each had its share: {}", other.asked().len());
    assert!(began.elapsed() < Duration::from_secs(10));
    let late = loop {
        let answer = embed().await;
        if hangs.asked().len() > 12 {
            break answer;
        }
    };
    assert!(served_by(&late).contains(other.url.trim_start_matches("http://")), "{}", served_by(&late));
    assert!(late.header("x-sarai-fallback-reason").unwrap().contains("another place was faster"));
    let left = hangs.until("its client's leave", |asked| asked[12].left.is_some()).await;
    assert!(left[12].left.is_some());
}

/// A host that fails at vectors is left alone, and asked for one now and then.
#[tokio::test]
async fn a_host_that_makes_no_vectors_is_left_alone_until_it_does() {
    let fails = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let is_failing = std::sync::Arc::clone(&fails);
    let host = Host::start(move |_, _| match is_failing.load(std::sync::atomic::Ordering::Relaxed) {
        true => vec![Step::Send("HTTP/1.1 500 Broken\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".into())],
        false => vector(),
    });
    let stands_by = Host::start(|_, _| vector());
    let urls = format!("[\"{}\", {{ url: \"{}\", priority: 1 }}]", host.url, stands_by.url);
    let sarai = Sarai::start(&format!(
        "models:\n  vectors: {{ backend: ollama_http, urls: {urls}, model_name: m, role: embedding }}\n"
    ));
    let embed = async || {
        let answer = sarai.post("/api/embed", json!({ "model": "vectors", "input": "one" }).to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        served_by(&answer).contains(host.url.trim_start_matches("http://"))
    };
    let probes = || host.asked().iter().filter(|asked| asked.body["input"] == json!(["Hi"])).count();
    assert!(!embed().await && !embed().await && !embed().await);
    assert_eq!(host.asked().len() - probes(), 2, "two failures are enough");
    host.until("a probe", |_| probes() > 0).await;
    fails.store(false, std::sync::atomic::Ordering::Relaxed);
    let began = Instant::now();
    while !embed().await {
        assert!(began.elapsed() < Duration::from_secs(20), "it is asked again once its probe went well");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
