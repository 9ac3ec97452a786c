//! As many threads compute as there are cores for: by the affinity of the process, and by a quota, also when they change.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::cgroup::Group;
use crate::support::{Sarai, chat, smollm2};
use serde_json::json;

fn config() -> String {
    format!("models:\n  lfm2:\n    backend: gguf_native\n    gguf_path: {}\n    context_length: 1024\n", smollm2())
}

/// Processor time of each thread of a process, in ticks.
fn times(pid: u64) -> Vec<(String, u64)> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let time = |thread: std::fs::DirEntry| {
        // It may have ended.
        let stat = std::fs::read_to_string(thread.path().join("stat")).ok()?;
        let ticks = stat.rsplit_once(") ")?.1.split(' ').nth(11)?.parse().ok()?;
        Some((thread.file_name().into_string().unwrap(), ticks))
    };
    threads.filter_map(time).collect()
}

/// How many threads of the worker compute an answer: those that take at least a fifth of what the busiest takes.
async fn computing(sarai: &Sarai) -> usize {
    let ask = |tokens: u32| {
        sarai
            .post("/v1/chat/completions", chat("lfm2", "A story.", json!({ "max_tokens": tokens, "ignore_eos": true })))
    };
    assert_eq!(ask(1).await.status, 200);
    let worker = sarai.worker_pids().await[0];
    let before = times(worker);
    assert_eq!(ask(80).await.status, 200);
    let of = |thread: &str| before.iter().find(|(known, _)| known == thread).map_or(0, |(_, ticks)| *ticks);
    let took: Vec<_> = times(worker).into_iter().map(|(thread, ticks)| ticks - of(&thread)).collect();
    let most = took.iter().copied().max().unwrap();
    assert!(most > 0, "{took:?}");
    took.iter().filter(|ticks| **ticks * 5 >= most).count()
}

/// What has changed is seen within a few seconds.
async fn until_computing(sarai: &Sarai, wanted: usize) {
    let began = Instant::now();
    loop {
        let threads = computing(sarai).await;
        if threads == wanted {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "{threads} threads compute, and not {wanted}");
    }
}

#[tokio::test]
async fn a_narrower_affinity_is_kept_and_a_wider_one_used() {
    let sarai = Sarai::start_below(&["taskset", "-c", "0"], &config());
    assert_eq!(computing(&sarai).await, 1, "there is one core");
    for pid in [u64::from(sarai.pid())].into_iter().chain(sarai.worker_pids().await) {
        let widened = Command::new("taskset").args(["-acp", "0,1", &pid.to_string()]).output().unwrap();
        assert!(widened.status.success(), "{widened:?}");
    }
    until_computing(&sarai, 2).await;
}

#[tokio::test]
async fn a_quota_of_one_core_has_one_thread_compute_and_more_has_two() {
    let group = Group::new("cpu", "cores");
    let grant = |cores: f64| {
        let period = 100_000.0;
        match group.v1 {
            true => group.write("cpu.cfs_quota_us", cores * period),
            false => group.write("cpu.max", format!("{} {period}", cores * period)),
        }
    };
    grant(1.0);
    let enter = format!("echo $$ > {} && exec \"$0\" \"$@\"", group.processes().display());
    let sarai = Sarai::start_below(&["sh", "-c", &enter], &config());
    assert_eq!(computing(&sarai).await, 1, "there is one core's worth of time");
    grant(1.5);
    // Alone, it uses the core that is there for half of the time too.
    until_computing(&sarai, 2).await;
}
