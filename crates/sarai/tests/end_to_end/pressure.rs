//! Memory that is taken behind the ledger's back: caught before the kernel acts, or survived when it does.
//!
//! Needs root, as CI has it.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::cgroup::Group;
use crate::support::smollm2;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// So much memory, and no more.
struct Cage(Group);

impl Cage {
    fn new(name: &str, limit: u64) -> Self {
        let group = Group::new("memory", name);
        group.write(if group.v1 { "memory.limit_in_bytes" } else { "memory.max" }, limit);
        if !group.v1 {
            group.write("memory.swap.max", 0);
        }
        Self(group)
    }

    fn kills(&self) -> u64 {
        let text = self.0.read(if self.0.v1 { "memory.oom_control" } else { "memory.events" });
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok()).unwrap()
    }
}

/// A server whose workers grow when told to, in a cage or free.
struct Growing {
    child: Child,
    url: String,
    folder: tempfile::TempDir,
    client: reqwest::Client,
}

impl Growing {
    fn start(config: &str, cage: Option<&Cage>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("sarai.yaml");
        std::fs::write(&file, config).unwrap();
        let binary = std::env::current_exe().unwrap();
        let binary = binary.parent().unwrap().parent().unwrap().join("examples/growing_worker");
        let mut command = Command::new(binary);
        command
            .arg("serve")
            .arg(&file)
            .env("SARAI_GROW", folder.path().join("grow"))
            .env("SARAI_STATE_DIR", folder.path().join("state"))
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        if let Some(cage) = cage {
            let procs = cage.0.processes();
            // SAFETY: only writes a file between fork and exec.
            #[expect(unsafe_code, reason = "the child must be in the cage before it allocates")]
            unsafe {
                command.pre_exec(move || std::fs::write(&procs, std::process::id().to_string()));
            }
        }
        let mut child = command.spawn().unwrap();
        let mut url = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut url).unwrap();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { child, url: url.trim().to_owned(), folder, client }
    }

    fn grow(&self, mib: u64) {
        std::fs::write(self.folder.path().join("grow"), mib.to_string()).unwrap();
    }

    fn grow_no_more(&self) {
        let _ = std::fs::remove_file(self.folder.path().join("grow"));
    }

    async fn ask(&self, model: &str) -> (u16, String) {
        let body = json!({ "model": model, "prompt": "Name three colours.", "stream": false, "options": { "num_predict": 4 } });
        let response =
            self.client.post(format!("{}/api/generate", self.url)).body(body.to_string()).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    async fn unload(&self, model: &str) {
        let body = json!({ "model": model, "keep_alive": 0 }).to_string();
        self.client.post(format!("{}/api/generate", self.url)).body(body).send().await.unwrap();
    }

    async fn ledger(&self) -> Value {
        let response = self.client.get(format!("{}/api/pool/ledger", self.url)).send().await.unwrap();
        serde_json::from_str(&response.text().await.unwrap()).unwrap()
    }

    async fn until(&self, what: &str, shows: impl Fn(&Value) -> bool) -> Value {
        let started = Instant::now();
        loop {
            let ledger = self.ledger().await;
            if shows(&ledger) {
                return ledger;
            }
            assert!(started.elapsed() < Duration::from_secs(30), "never came: {what}; {ledger:#}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Growing {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn config(max_ram_gb: f64) -> String {
    format!(
        "server:\n  listen: 127.0.0.1:0\nmemory:\n  max_ram_gb: {max_ram_gb}\nmodels:\n  lfm2:\n    backend: gguf_native\n    \
         gguf_path: {}\n    context_length: 1024\n",
        smollm2()
    )
}

fn decided(ledger: &Value, what: &str, why: &str) -> bool {
    let decisions = ledger["decisions"].as_array().unwrap();
    decisions.iter().any(|decision| decision["what"] == what && decision["why"].as_str().unwrap().contains(why))
}

#[tokio::test]
async fn a_worker_that_grows_beyond_the_budget_is_stopped_before_the_kernel_acts() {
    let cage = Cage::new("caught", 1200 * MIB);
    let server = Growing::start(&config(0.5), Some(&cage));
    assert_eq!(server.ask("lfm2").await.0, 200);
    server.grow(900);
    // It grows by 320 MiB a second, and an idle worker is measured every ten: so it is kept busy.
    let started = Instant::now();
    let ledger = loop {
        let (status, text) = server.ask("lfm2").await;
        assert!([200, 502, 503].contains(&status), "{status} {text}");
        let ledger = server.ledger().await;
        if decided(&ledger, "kill", "more than was planned") || decided(&ledger, "evict", "the budget is") {
            break ledger;
        }
        assert!(started.elapsed() < Duration::from_secs(30), "{ledger:#}");
    };
    server.grow_no_more();
    assert_eq!(cage.kills(), 0, "{ledger:#}");
    // What it took is remembered: the next load is planned with it, and refused in numbers.
    let (status, text) = server.ask("lfm2").await;
    assert!(status == 200 || (status == 503 && text.contains("learned")), "{status} {text}");
}

#[tokio::test]
async fn a_worker_that_the_kernel_kills_is_known_as_such_and_planned_higher_and_the_server_lives() {
    let cage = Cage::new("killed", 400 * MIB);
    let server = Growing::start(&config(100.0), Some(&cage));
    assert_eq!(server.ask("lfm2").await.0, 200);
    let planned = |ledger: &Value| ledger["engines"][0]["planned_bytes"].as_u64().unwrap();
    let before = planned(&server.ledger().await);
    // Idle, so nobody looks for ten seconds: the kernel acts first.
    server.grow(10_000);
    let ledger = server.until("the kill is known", |ledger| {
        ledger["engines"][0]["failure"].as_str().is_some_and(|why| why.contains("killed it for want of memory"))
    });
    let ledger = ledger.await;
    server.grow_no_more();
    assert!(cage.kills() >= 1, "{ledger:#}");
    // It is written aside.
    let learned = server.folder.path().join("state/learned.json");
    let is_written = |_: &Value| std::fs::read_to_string(&learned).is_ok_and(|text| text.contains("\"oom_kills\": 1"));
    server.until("the kill is written down", is_written).await;
    let (status, text) = server.ask("lfm2").await;
    assert_eq!(status, 200, "{text}");
    let after = planned(&server.ledger().await);
    assert!(after >= before + before / 11, "{before} planned before, {after} after");
    // A worker that ends well afterwards does not make it forgotten.
    server.unload("lfm2").await;
    server.until("it is unloaded", |ledger| ledger["engines"][0]["state"] == "absent").await;
    assert_eq!(server.ask("lfm2").await.0, 200);
    let again = server.ledger().await;
    let state = std::fs::read_to_string(server.folder.path().join("state/learned.json")).unwrap();
    assert!(planned(&again) >= before + before / 11, "{before} planned before, {again:#} after; {state}");
}

#[tokio::test]
async fn the_budget_of_a_control_group_counts_and_the_server_is_never_the_victim() {
    let cage = Cage::new("budget", 300 * MIB);
    let server = Growing::start(&config(100.0), Some(&cage));
    let ledger = server.ledger().await;
    let budget = ledger["budget_bytes"].as_u64().unwrap();
    assert!(budget < 300 * MIB && budget > 280 * MIB, "{ledger:#}");
    assert_eq!(server.ask("lfm2").await.0, 200);
    let worker = server.ledger().await["engines"][0]["pid"].as_u64().unwrap();
    let score = |pid: u64| std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().parse::<i32>();
    assert!(score(worker).unwrap() >= score(server.child.id().into()).unwrap() + 500);
}
