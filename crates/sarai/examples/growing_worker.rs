//! `sarai` as it is, but for workers that grow behind the ledger's back once told to: for `tests/end_to_end/pressure.rs` only.
//!
//! When the file named by `SARAI_GROW` exists, a worker takes the MiB that are written in it, a few at a time, and
//! keeps them.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a hook for tests: it may fail by panicking")]

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sarai_server::Server;
use sarai_server::config::{self, Environment};

/// Taken at once, so that the growth can be seen coming.
const STEP_MIB: usize = 16;
const PAUSE: Duration = Duration::from_millis(50);

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments[1].as_str() {
        "worker" => worker(&arguments[2]),
        _ => serve(Path::new(&arguments[2])),
    }
}

fn worker(kind: &str) {
    let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    match kind {
        "probe" => return sarai_llama::run_probe(socket).unwrap(),
        "spare" => return sarai_llama::run_spare(socket).unwrap(),
        _ => {}
    }
    std::thread::spawn(grow_when_told);
    sarai_llama::run_worker(socket).unwrap();
}

fn grow_when_told() {
    let file = PathBuf::from(std::env::var("SARAI_GROW").unwrap());
    let mut taken: Vec<Vec<u8>> = Vec::new();
    loop {
        let wanted: usize = std::fs::read_to_string(&file).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        if taken.len() * STEP_MIB < wanted {
            taken.push(vec![1; STEP_MIB << 20]);
        }
        std::thread::sleep(PAUSE);
    }
}

fn serve(file: &Path) {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let config = config::load(file, &Environment::of_process()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let server = Server::start(config, PathBuf::from("/proc/self/exe"), None).await.unwrap();
        println!("http://{}", server.address().unwrap());
        server.serve(std::future::pending()).await;
    });
}
