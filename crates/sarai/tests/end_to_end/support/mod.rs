//! The real binary, started for one test on a free port, and ended with it.

#![allow(
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking, and each uses a part"
)]

pub mod cgroup;
pub mod gguf;
pub mod host;
pub mod media;
pub mod proxy;

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::Value;
use tokio::task::JoinHandle;

pub const BINARY: &str = env!("CARGO_BIN_EXE_sarai");

/// A file of the pinned test weights; missing weights are a failure, never a skip.
pub fn weights(file: &str) -> PathBuf {
    let home = std::env::var("HOME").unwrap_or_default();
    let folder = std::env::var("SARAI_MODELS").unwrap_or(format!("{home}/.cache/sarai/models"));
    let path = PathBuf::from(folder).join(file);
    assert!(path.is_file(), "{} is missing: run `make models`, or `make test` which does", path.display());
    path
}

/// A folder or file among those that `scripts/sketch_models.py` and its like make.
pub fn sketch(path: &str) -> String {
    let folder = std::env::var("SARAI_SKETCHES").expect("SARAI_SKETCHES is missing: run the tests with `make test`");
    let path = format!("{folder}/{path}");
    assert!(std::path::Path::new(&path).exists(), "{path} is missing: run the tests with `make test`");
    path
}

pub fn smollm2() -> String {
    weights("smollm2-135m-instruct-q4_1.gguf").display().to_string()
}

pub fn qwen() -> String {
    weights("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf").display().to_string()
}

pub fn minilm() -> String {
    weights("all-minilm-l6-v2-f16.gguf").display().to_string()
}

pub fn gemma() -> String {
    weights("gemma-3-270m-q4_k_m.gguf").display().to_string()
}

/// A running `sarai serve`.
pub struct Sarai {
    pub url: String,
    pub folder: tempfile::TempDir,
    pub child: Child,
    pub client: reqwest::Client,
}

impl Sarai {
    /// Starts it with this configuration and waits until it says that it is ready.
    pub fn start(config: &str) -> Self {
        Self::start_with(config, Stdio::null())
    }

    pub fn start_with(config: &str, log: Stdio) -> Self {
        Self::launch(&[], config, log, &[])
    }

    /// Below a command that runs what follows it.
    pub fn start_below(command: &[&str], config: &str) -> Self {
        Self::launch(command, config, Stdio::null(), &[])
    }

    pub fn start_with_env(config: &str, variables: &[(&str, &str)]) -> Self {
        Self::launch(&[], config, Stdio::null(), variables)
    }

    pub fn launch(below: &[&str], config: &str, log: Stdio, variables: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("sarai.yaml");
        std::fs::write(&file, config).unwrap();
        let mut words = below.iter().copied().chain([BINARY]);
        let mut child = Command::new(words.next().unwrap())
            .args(words)
            .args(["serve", "--listen", "127.0.0.1:0", "--config"])
            .arg(&file)
            .current_dir(folder.path())
            .env_remove("OLLAMA_BASE_URL")
            .env("SARAI_STATE_DIR", folder.path().join("state"))
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut said = String::new();
        while !said.contains("stop ") {
            assert!(lines.read_line(&mut said).unwrap() > 0, "sarai ended before it was ready: {said}");
        }
        let at = said.find("http://").unwrap();
        let url = said[at..].split("/v1").next().unwrap().to_owned();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { url, folder, child, client }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub async fn post(&self, path: &str, body: impl Into<reqwest::Body>) -> Answer {
        let request = self.client.post(format!("{}{path}", self.url)).body(body);
        Answer::of(request.send().await.unwrap()).await
    }

    pub async fn get(&self, path: &str) -> Answer {
        Answer::of(self.client.get(format!("{}{path}", self.url)).send().await.unwrap()).await
    }

    /// The `sarai` object of `/api/ps`.
    pub async fn ps(&self) -> Value {
        self.get("/api/ps").await.json()["sarai"].clone()
    }

    pub async fn worker_pids(&self) -> Vec<u64> {
        self.ps().await["workers"].as_array().unwrap().iter().map(|worker| worker["pid"].as_u64().unwrap()).collect()
    }

    /// Waits until `ps` shows what is wanted.
    pub async fn until(&self, what: &str, shows: impl Fn(&Value) -> bool) {
        let started = Instant::now();
        loop {
            let ps = self.ps().await;
            if shows(&ps) {
                return;
            }
            assert!(started.elapsed() < Duration::from_secs(20), "never came: {what}; {ps}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Sarai {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-TERM", &self.pid().to_string()]).status();
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.child.try_wait().ok().flatten().is_none() {
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::yield_now();
        }
    }
}

/// A response, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub text: String,
}

impl Answer {
    pub async fn of(response: reqwest::Response) -> Self {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let mut body = Vec::new();
        let mut chunks = response.bytes_stream();
        while let Some(Ok(chunk)) = chunks.next().await {
            body.extend_from_slice(&chunk);
        }
        Self { status, headers, text: String::from_utf8(body).unwrap() }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// The text of a stream of OpenAI's chat.
    pub fn said(&self) -> String {
        self.sse().iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect()
    }

    /// The JSON of every SSE event, `[DONE]` left out.
    pub fn sse(&self) -> Vec<Value> {
        let data = self.text.lines().filter_map(|line| line.strip_prefix("data: "));
        data.filter(|data| *data != "[DONE]").map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    pub fn lines(&self) -> Vec<Value> {
        self.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// A stream that is read while other things are asked.
pub struct Reading {
    events: Arc<AtomicUsize>,
    text: JoinHandle<String>,
}

impl Reading {
    /// Its first event has come when this returns.
    pub async fn begin(request: reqwest::RequestBuilder) -> Self {
        let mut response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        let mut text = String::from_utf8(response.chunk().await.unwrap().unwrap().to_vec()).unwrap();
        let events = Arc::new(AtomicUsize::new(1));
        let count = Arc::clone(&events);
        let text = tokio::spawn(async move {
            while let Some(piece) = response.chunk().await.unwrap() {
                text.push_str(std::str::from_utf8(&piece).unwrap());
                count.store(text.matches("data: {").count(), Ordering::SeqCst);
            }
            text
        });
        Self { events, text }
    }

    /// How many have come.
    pub fn events(&self) -> usize {
        self.events.load(Ordering::SeqCst)
    }

    /// All of it, once it has ended.
    pub async fn text(self) -> String {
        self.text.await.unwrap()
    }
}

/// A chat body in OpenAI's shape.
pub fn chat(model: &str, prompt: &str, more: Value) -> String {
    let mut body = serde_json::json!({
        "model": model, "messages": [{ "role": "user", "content": prompt }], "temperature": 0, "max_tokens": 16,
    });
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body.to_string()
}

/// A real Ollama on a free port, with the file of `model` created under the name `solar`.
pub struct Ollama {
    pub url: String,
    pub port: u16,
    folder: tempfile::TempDir,
    child: Option<Child>,
}

impl Ollama {
    pub fn start() -> Self {
        Self::start_with(&smollm2())
    }

    /// With another file under that name.
    pub fn start_with(file: &str) -> Self {
        Self::start_from(&[file])
    }

    /// With a model and its projector.
    pub fn start_from(files: &[&str]) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut ollama =
            Self { url: format!("http://127.0.0.1:{port}"), port, folder: tempfile::tempdir().unwrap(), child: None };
        ollama.run();
        let modelfile = ollama.folder.path().join("Modelfile");
        let lines: String = files.iter().map(|file| format!("FROM {file}\n")).collect();
        std::fs::write(&modelfile, lines).unwrap();
        let created = ollama.command().arg("create").arg("solar").arg("-f").arg(&modelfile).output().unwrap();
        assert!(created.status.success(), "ollama create: {}", String::from_utf8_lossy(&created.stderr));
        ollama
    }

    fn command(&self) -> Command {
        let binary = std::env::var("SARAI_OLLAMA").expect("SARAI_OLLAMA names no Ollama binary: run `make test`");
        let mut command = Command::new(binary);
        command
            .env("OLLAMA_HOST", format!("127.0.0.1:{}", self.port))
            .env("OLLAMA_MODELS", self.folder.path().join("models"))
            .env("HOME", self.folder.path());
        command
    }

    /// Starts the server process, in a group of its own, and waits until it answers.
    pub fn run(&mut self) {
        use std::os::unix::process::CommandExt;
        let mut command = self.command();
        command.arg("serve").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        self.child = Some(command.spawn().unwrap());
        let deadline = Instant::now() + Duration::from_secs(30);
        while std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(Instant::now() < deadline, "ollama does not listen");
            std::thread::yield_now();
        }
    }

    /// Starts it again if it hangs: Ollama 0.24 may lose its only place for good when a client leaves (its runner takes the next request,
    /// and never looks for a cache slot), which a test cannot prevent that has clients leave.
    pub async fn revive(&mut self) {
        let body = serde_json::json!({ "model": "solar", "prompt": "Hi", "options": { "num_predict": 1 } });
        let asked = reqwest::Client::new().post(format!("{}/api/generate", self.url)).body(body.to_string()).send();
        let answered = async { asked.await.ok()?.bytes().await.ok() };
        if tokio::time::timeout(Duration::from_secs(5), answered).await.is_ok_and(|answer| answer.is_some()) {
            return;
        }
        self.kill();
        self.run();
    }

    /// A URL where nothing listens.
    pub fn unreachable() -> String {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        format!("http://127.0.0.1:{port}")
    }

    /// Waits until it has started a runner: a request has reached it, and it loads.
    pub async fn until_it_loads(&self) {
        let parent = self.child.as_ref().unwrap().id().to_string();
        let is_runner = |pid: &std::ffi::OsStr| {
            let stat =
                std::fs::read_to_string(std::path::Path::new("/proc").join(pid).join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.split_whitespace().nth(1) == Some(&parent))
        };
        let deadline = Instant::now() + Duration::from_secs(20);
        while !std::fs::read_dir("/proc").unwrap().flatten().any(|entry| is_runner(&entry.file_name())) {
            assert!(Instant::now() < deadline, "ollama never started a runner");
            tokio::task::yield_now().await;
        }
    }

    /// Sends a signal to it and all its runners.
    pub fn signal(&self, signal: &str) {
        let group = format!("-{}", self.child.as_ref().unwrap().id());
        assert!(Command::new("kill").args([signal, "--", &group]).status().unwrap().success());
    }

    /// Kills it with all its runners.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = Command::new("kill").args(["-KILL", "--", &format!("-{}", child.id())]).status();
            let _ = child.wait();
        }
    }
}

impl Drop for Ollama {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Reads a child's whole standard output.
pub fn output_of(child: &mut Child) -> String {
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    text
}

/// Whether a process still runs (a zombie does not).
pub fn is_alive(pid: u64) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// Watches what a process has of its own, until it is stopped.
pub struct Watch {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: std::thread::JoinHandle<u64>,
}

impl Watch {
    pub fn of(pid: u64) -> Self {
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = std::sync::Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut most = 0;
            while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                most = most.max(
                    sarai_server::machine::process::glance(pid.try_into().unwrap()).map_or(0, |of| of.anonymous.0),
                );
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            most
        });
        Self { stop, thread }
    }

    /// The most that was seen, in bytes.
    pub fn most(self) -> u64 {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}
