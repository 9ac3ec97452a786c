//! `make bench-gateway`: what a request costs that passes through to a host, beside asking it directly, beside nginx as a
//! plain proxy (the floor), and beside LiteLLM's proxy where it is there.
//!
//! The server under test runs on one core; the host, which answers by a script, and the load on the other. Rounds are
//! interleaved, and the medians over the rounds count.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a measuring tool"
)]

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::join_all;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const BINARY: &str = env!("CARGO_BIN_EXE_sarai");
const SERVER_CORE: &str = "0";
const LOAD_CORE: &str = "1";
/// Tokens of a stream, and the time between two.
const TOKENS: usize = 64;
const PACE: Duration = Duration::from_millis(10);
/// Each client asks so often, so that no server is saturated.
const EACH: Duration = Duration::from_millis(25);
const ROUND: Duration = Duration::from_secs(3);
const ROUNDS: usize = 5;
const LEVELS: [usize; 4] = [1, 4, 16, 64];
const OPEN: usize = 1000;

fn main() {
    let mut arguments = std::env::args().skip(1);
    if let (Some("bare"), Some(host)) = (arguments.next().as_deref(), arguments.next()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        return runtime.block_on(bare(host));
    }
    // This process is the load: it stays on its core.
    let pid = std::process::id().to_string();
    assert!(Command::new("taskset").args(["-acp", LOAD_CORE, &pid]).stdout(Stdio::null()).status().unwrap().success());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(run());
}

async fn run() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let host = host().await;
    let folder = tempfile::tempdir().unwrap();
    let mut servers = vec![Server { name: "direct", url: host.clone(), child: None }];
    servers.push(Server::sarai(&host, folder.path()));
    servers.push(Server::bare(&host));
    for (name, variable, start) in [
        ("nginx", "NGINX", Server::nginx as fn(&str, &str, &std::path::Path) -> Server),
        ("LiteLLM", "LITELLM", Server::litellm),
    ] {
        match std::env::var(variable).ok().filter(|path| !path.is_empty()) {
            Some(path) => servers.push(start(&path, &host, folder.path())),
            None => println!("NOT MEASURED: {name} ({variable} names no program)"),
        }
    }
    let client = client();
    let mut ready = Vec::new();
    for server in servers {
        if server.is_ready(&client).await {
            ready.push(server);
        } else {
            println!("NOT MEASURED: {} (it does not serve)", server.name);
        }
    }
    let servers = ready;
    println!("{:<8} at rest {:>37}", "", "");
    for server in &servers[1..] {
        println!("  {:<8} {:6.1} MiB", server.name, server.memory_mib());
    }
    // `cargo bench … -- quick` measures what the targets are about alone.
    let levels: &[usize] = if std::env::args().any(|arg| arg == "quick") { &[16] } else { &LEVELS };
    let only_open = std::env::args().any(|arg| arg == "open");
    for stream in [false, true].into_iter().filter(|_| !only_open) {
        for &level in levels {
            measure(&client, &servers, level, stream).await;
        }
    }
    open_streams(&servers).await;
}

/// The floor of the libraries that sarai stands on: a proxy that reads nothing and decides nothing.
async fn bare(host: String) {
    use axum::body::Body;
    use axum::extract::Request;
    use axum::response::Response;
    use axum::serve::ListenerExt;
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = client();
    let forward = move |request: Request| {
        let (client, host) = (client.clone(), host.clone());
        async move {
            let path = request.uri().path().to_owned();
            let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
            let asked = client.post(format!("{host}{path}")).header("content-type", "application/json").body(body);
            let answer = asked.send().await.unwrap();
            let mut response = Response::builder().status(answer.status());
            for (name, value) in answer.headers().iter().filter(|(name, _)| *name == "content-type") {
                response = response.header(name, value);
            }
            response.body(Body::from_stream(answer.bytes_stream())).unwrap()
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap().port());
    let listener = listener.tap_io(|socket| drop(socket.set_nodelay(true)));
    axum::serve(listener, axum::Router::new().fallback(forward).into_make_service()).await.unwrap();
}

fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().tcp_nodelay(true).pool_max_idle_per_host(OPEN).build().unwrap()
}

/// What one round of one server has shown.
#[derive(Default, Clone)]
struct Round {
    cpu_us: f64,
    p50: f64,
    p99: f64,
    jitter_p99: f64,
}

async fn measure(client: &reqwest::Client, servers: &[Server], level: usize, stream: bool) {
    let mut rounds: Vec<Vec<Round>> = vec![Vec::new(); servers.len()];
    for round in 0..=ROUNDS {
        for at in 0..servers.len() {
            // Another one begins each time.
            let at = (at + round) % servers.len();
            let seen = one_round(client, &servers[at], level, stream).await;
            // The first round warms all up.
            if round > 0 {
                rounds[at].push(seen);
            }
        }
    }
    let of = |at: usize, what: fn(&Round) -> f64| median(rounds[at].iter().map(what).collect());
    let what = if stream { format!("stream of {TOKENS} tokens") } else { "plain request of 1 KB".into() };
    println!("{what}, {level} at once");
    let floor = servers.iter().position(|server| server.name == "nginx").map(|at| of(at, |round| round.cpu_us));
    for (at, server) in servers.iter().enumerate() {
        let added = |what: fn(&Round) -> f64| {
            let pairs = rounds[at].iter().zip(&rounds[0]).map(|(one, direct)| what(one) - what(direct));
            median(pairs.collect())
        };
        let cpu = of(at, |round| round.cpu_us);
        let ratio = floor.filter(|_| at > 0).map_or(String::new(), |floor| format!("{:5.2}x nginx", cpu / floor));
        let jitter =
            if stream { format!("   gap p99 {:6.2} ms", of(at, |round| round.jitter_p99)) } else { String::new() };
        println!(
            "  {:<8} CPU {:8.0} us {ratio:<12}   first byte p50 {:6.2} p99 {:6.2} ms   added p50 {:6.2} p99 {:6.2} ms{jitter}",
            server.name,
            cpu,
            of(at, |round| round.p50),
            of(at, |round| round.p99),
            added(|round| round.p50),
            added(|round| round.p99),
        );
    }
}

async fn one_round(client: &reqwest::Client, server: &Server, level: usize, stream: bool) -> Round {
    let (before, until) = (server.cpu(), Instant::now() + ROUND);
    let clients = (0..level).map(|n| async move {
        let (mut firsts, mut gaps) = (Vec::new(), Vec::new());
        let mut next = Instant::now() + EACH.mul_f64(n as f64 / level as f64);
        while Instant::now() < until {
            tokio::time::sleep_until(next.into()).await;
            // Who is late does not ask faster for it.
            next = (next + EACH).max(Instant::now());
            let began = Instant::now();
            let request = client.post(format!("{}/v1/chat/completions", server.url));
            let request = request.header("content-type", "application/json").body(body(stream));
            let response = request.send().await.unwrap();
            assert_eq!(response.status(), 200, "{}", server.name);
            let (mut chunks, mut last, mut bytes) = (response.bytes_stream(), None, 0);
            while let Some(chunk) = chunks.next().await {
                bytes += chunk.unwrap().len();
                let now = Instant::now();
                match last.replace(now) {
                    None => firsts.push((now - began).as_secs_f64() * 1e3),
                    Some(last) => gaps.push((now - last).as_secs_f64() * 1e3),
                }
            }
            assert!(bytes > 500, "{}: {bytes} bytes", server.name);
        }
        (firsts, gaps)
    });
    let seen = join_all(clients).await;
    let firsts: Vec<f64> = seen.iter().flat_map(|(firsts, _)| firsts.iter().copied()).collect();
    let gaps: Vec<f64> = seen.iter().flat_map(|(_, gaps)| gaps.iter().copied()).collect();
    Round {
        cpu_us: (server.cpu() - before) * 1e6 / firsts.len() as f64,
        p50: percentile(&firsts, 0.5),
        p99: percentile(&firsts, 0.99),
        jitter_p99: percentile(&gaps, 0.99),
    }
}

/// Memory with many streams open.
async fn open_streams(servers: &[Server]) {
    println!("{OPEN} open streams");
    for server in &servers[1..] {
        let client = client();
        let opened = (0..OPEN).map(|_| {
            let request = client.post(format!("{}/v1/chat/completions", server.url));
            request.header("content-type", "application/json").body(held()).send()
        });
        let mut streams = Vec::new();
        for response in join_all(opened).await {
            let mut chunks = response.unwrap().bytes_stream();
            chunks.next().await.unwrap().unwrap();
            streams.push(chunks);
        }
        println!("  {:<8} {:6.1} MiB", server.name, server.memory_mib());
        drop(streams);
    }
}

fn body(stream: bool) -> String {
    let model = if stream { "paced" } else { "plain" };
    // A request of 1 KB.
    json!({ "model": model, "stream": stream, "messages": [{ "role": "user", "content": "word ".repeat(180) }] })
        .to_string()
}

fn held() -> String {
    json!({ "model": "held", "stream": true, "messages": [{ "role": "user", "content": "word" }] }).to_string()
}

struct Server {
    name: &'static str,
    url: String,
    child: Option<Child>,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
            let _ = child.wait();
        }
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Server {
    fn start(name: &'static str, port: u16, command: &mut Command) -> Self {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        Self { name, url: format!("http://127.0.0.1:{port}"), child: Some(child) }
    }

    fn sarai(host: &str, folder: &std::path::Path) -> Self {
        let (port, file) = (free_port(), folder.join("sarai.yaml"));
        let model =
            |name: &str| format!("  {name}: {{ backend: openai_http, url: \"{host}/v1\", max_outstanding: 4000 }}\n");
        let models: String = ["plain", "paced", "held"].map(model).concat();
        let server = "server: { max_in_flight: 4000 }\n";
        std::fs::write(&file, format!("{server}models:\n{models}")).unwrap();
        let mut command = Command::new("taskset");
        command.args(["-c", SERVER_CORE, BINARY, "serve", "--listen", &format!("127.0.0.1:{port}"), "--config"]);
        Self::start("sarai", port, command.arg(file).env("SARAI_STATE_DIR", folder.join("state")).current_dir(folder))
    }

    fn bare(host: &str) -> Self {
        let mut command = Command::new("taskset");
        command.args(["-c", SERVER_CORE]).arg(std::env::current_exe().unwrap());
        // It prints its port once it listens.
        let mut child = command.args(["bare", host]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut port = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut port).unwrap();
        Self { name: "bare", url: format!("http://127.0.0.1:{}", port.trim()), child: Some(child) }
    }

    fn nginx(binary: &str, host: &str, folder: &std::path::Path) -> Self {
        let (port, file) = (free_port(), folder.join("nginx.conf"));
        let upstream = host.trim_start_matches("http://");
        let config = format!(
            "worker_processes 1; daemon off; pid {0}/nginx.pid; error_log /dev/null;\nevents {{ worker_connections 8192; }}\nhttp {{ access_log off; client_body_temp_path {0}/a; proxy_temp_path {0}/b; fastcgi_temp_path {0}/c; uwsgi_temp_path {0}/d; scgi_temp_path {0}/e; upstream host {{ server {upstream}; keepalive 2000; }}\nserver {{ listen 127.0.0.1:{port}; keepalive_requests 1000000; location / {{ proxy_pass http://host; proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_buffering off; proxy_read_timeout 600s; }} }} }}\n",
            folder.display()
        );
        std::fs::write(&file, config).unwrap();
        let mut command = Command::new("taskset");
        command.args(["-c", SERVER_CORE, binary, "-p"]).arg(folder).arg("-c").arg(file);
        Self::start("nginx", port, &mut command)
    }

    fn litellm(binary: &str, host: &str, folder: &std::path::Path) -> Self {
        let (port, file) = (free_port(), folder.join("litellm.yaml"));
        let model = |name: &str| {
            format!(
                "  - model_name: {name}\n    litellm_params: {{ model: openai/{name}, api_base: \"{host}/v1\", api_key: none }}\n"
            )
        };
        std::fs::write(&file, format!("model_list:\n{}", ["plain", "paced", "held"].map(model).concat())).unwrap();
        let mut command = Command::new("taskset");
        command
            .args(["-c", SERVER_CORE, binary, "--host", "127.0.0.1", "--port", &port.to_string(), "--config"])
            .arg(file);
        command.env("LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY", "true");
        Self::start("LiteLLM", port, &mut command)
    }

    async fn is_ready(&self, client: &reqwest::Client) -> bool {
        let began = Instant::now();
        loop {
            let request = client.post(format!("{}/v1/chat/completions", self.url));
            let request = request.header("content-type", "application/json").body(body(false));
            if request.send().await.is_ok_and(|response| response.status() == 200) {
                return true;
            }
            if began.elapsed() > Duration::from_secs(90) {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    fn pids(&self) -> Vec<u32> {
        let Some(child) = &self.child else { return Vec::new() };
        sarai_server::machine::process::tree(child.id())
    }

    /// Seconds of all its processes.
    fn cpu(&self) -> f64 {
        let of = |pid: u32| {
            // In nanoseconds, of each thread.
            let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            let times = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("schedstat")).ok());
            times.filter_map(|text| text.split(' ').next()?.parse::<f64>().ok()).sum::<f64>() / 1e9
        };
        self.pids().into_iter().map(of).sum()
    }

    fn memory_mib(&self) -> f64 {
        let measured = self.pids().into_iter().filter_map(sarai_server::machine::process::measure);
        measured.map(|memory| memory.total().as_mib()).sum()
    }
}

fn median(values: Vec<f64>) -> f64 {
    percentile(&values, 0.5)
}

fn percentile(values: &[f64], share: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
    let at = ((values.len() as f64 * share) as usize).min(values.len().saturating_sub(1));
    values.get(at).copied().unwrap_or(0.0)
}

/// A host of OpenAI's API that answers by a script: at once, or token by token.
async fn host() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let answers = Arc::new(Answers::new());
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let _ = socket.set_nodelay(true);
            tokio::spawn(serve(socket, Arc::clone(&answers)));
        }
    });
    url
}

struct Answers {
    json: Vec<u8>,
    whole_stream: Vec<u8>,
    tokens: Vec<Vec<u8>>,
    end: Vec<u8>,
}

impl Answers {
    fn new() -> Self {
        let content = "token ".repeat(110);
        let usage = json!({ "prompt_tokens": 180, "completion_tokens": 110, "total_tokens": 290 });
        let head = |kind: &str, more: &str| format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\n{more}\r\n");
        let answer = json!({
            "id": "c", "object": "chat.completion", "created": 1, "model": "m", "usage": usage,
            "choices": [{ "index": 0, "message": { "role": "assistant", "content": content }, "finish_reason": "stop" }],
        })
        .to_string();
        let json = head("application/json", &format!("content-length: {}\r\n", answer.len())) + &answer;
        let chunk = |delta: serde_json::Value, finish: serde_json::Value| {
            let choice = json!({ "index": 0, "delta": delta, "finish_reason": finish });
            format!(
                "data: {}\n\n",
                json!({ "id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice] })
            )
        };
        let sized = |text: &str| format!("{:x}\r\n{text}\r\n", text.len());
        let usage = json!({ "id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [], "usage": usage });
        let end = chunk(json!({}), json!("stop")) + &format!("data: {usage}\n\ndata: [DONE]\n\n");
        let stream = head("text/event-stream", "transfer-encoding: chunked\r\n");
        let whole = stream.clone() + &sized(&(chunk(json!({ "content": content }), json!(null)) + &end)) + "0\r\n\r\n";
        let mut tokens: Vec<_> = (0..TOKENS)
            .map(|n| sized(&chunk(json!({ "content": format!("token{n} ") }), json!(null))).into_bytes())
            .collect();
        tokens[0] = [stream.into_bytes(), tokens[0].clone()].concat();
        Self {
            json: json.into_bytes(),
            whole_stream: whole.into_bytes(),
            tokens,
            end: (sized(&end) + "0\r\n\r\n").into_bytes(),
        }
    }
}

async fn serve(mut socket: TcpStream, answers: Arc<Answers>) -> Option<()> {
    let mut request = Vec::new();
    let mut buffer = vec![0; 16384];
    loop {
        let (end, length) = loop {
            if let Some(at) = request.windows(4).position(|four| four == b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&request[..at]).to_ascii_lowercase();
                let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
                let length: usize = length.unwrap_or(0);
                if request.len() >= at + 4 + length {
                    break (at + 4, length);
                }
            }
            let read = socket.read(&mut buffer).await.ok().filter(|&read| read > 0)?;
            request.extend_from_slice(&buffer[..read]);
        };
        let body = String::from_utf8_lossy(&request[end..end + length]).into_owned();
        request.drain(..end + length);
        if body.contains("\"paced\"") || body.contains("\"held\"") {
            let mut clock = tokio::time::interval(PACE);
            for token in &answers.tokens {
                clock.tick().await;
                socket.write_all(token).await.ok()?;
                if body.contains("\"held\"") {
                    // Until the other side leaves.
                    while socket.read(&mut buffer).await.ok()? > 0 {}
                    return None;
                }
            }
            socket.write_all(&answers.end).await.ok()?;
        } else if body.contains("\"stream\":true") || body.contains("\"stream\": true") {
            socket.write_all(&answers.whole_stream).await.ok()?;
        } else {
            socket.write_all(&answers.json).await.ok()?;
        }
    }
}
