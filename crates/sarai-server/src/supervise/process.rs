//! A command that serves OpenAI's API on this machine: started, asked until it is ready, and stopped with all that it
//! started.

use std::collections::VecDeque;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use sarai_core::frame::LoadedInfo;
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot};

use super::child::{self, Occupied, Outcome, Report, Start, Stop, Worker};
use super::route::Routes;
use super::shepherd;
use crate::config::{PORT, Process};
use crate::lanes::Places;

/// Between two questions whether it is ready.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// How long one answer to that may take.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);
/// How long its shepherd may take to end it.
const ENDS_WITHIN: Duration = shepherd::GRACE.saturating_add(Duration::from_secs(3));

/// Returns why the command ended, or `None` if it was stopped, and whoever must be told.
pub async fn run(
    process: &Process,
    start: &Start,
    stop: oneshot::Receiver<Stop>,
    report: &(impl Fn(Report) + Send),
) -> (Option<String>, Option<Occupied>) {
    let port = match free_port(process.port) {
        Ok(port) => port,
        Err(reason) => return (Some(reason), None),
    };
    let with_port = |text: &String| text.replace(PORT, &port.to_string());
    let arguments = process.command.iter().map(with_port);
    let shepherd = ["shepherd", &start.label, "--"].map(str::to_owned).into_iter().chain(arguments);
    let variables = process.env.iter().map(|(name, value)| (name.clone(), with_port(value)));
    let variables = variables.chain([("PORT".to_owned(), port.to_string())]);
    let launched = child::launch(&start.executable, shepherd, variables);
    let mut launched = match launched {
        Ok(launched) => launched,
        Err(error) => return (Some(format!("it cannot be started ({error})")), None),
    };
    report(Report::Started(launched.pid));
    let words = tokio::spawn(child::read_log(launched.child.stderr.take(), start.label.clone(), tracing::Level::INFO));
    let slots = Places::new(process.parallel);
    let routes = Routes::open();
    let url = format!("http://127.0.0.1:{port}/v1");
    let worker = |commands| Worker {
        pid: launched.pid,
        info: LoadedInfo { context_tokens: process.context_tokens, ..LoadedInfo::default() },
        url: Some(url.clone().into()),
        slots: slots.clone(),
        routes: routes.clone(),
        commands,
        ids: Arc::new(AtomicU64::new(1)),
    };
    // It takes no frames: what is sent there is for nobody.
    let (commands, _) = mpsc::unbounded_channel();
    let worker = worker(commands);
    let outcome = serve(&mut launched.child, process, start, (port, worker), stop, report).await;
    // Closing our end has the shepherd end all that the command has started.
    drop((launched.reader, launched.writer));
    let status = child::end(&mut launched.child, ENDS_WITHIN).await;
    if let Some(group) = i32::try_from(launched.pid).ok().and_then(rustix::process::Pid::from_raw) {
        // If the shepherd itself was killed, this is what is left of its tree.
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
    let words: VecDeque<String> = words.await.unwrap_or_default();
    let failure = match outcome {
        Outcome::Stopped => None,
        Outcome::Failed(reason) => Some(child::with_words(reason, &words)),
        Outcome::Died => Some(child::with_words(how_it_ended(status), &words)),
    };
    (failure, Some((routes, slots)))
}

async fn serve(
    child: &mut Child,
    process: &Process,
    start: &Start,
    (port, worker): (u16, Worker),
    mut stop: oneshot::Receiver<Stop>,
    report: &(impl Fn(Report) + Send),
) -> Outcome {
    let limit = start.load_deadline;
    tokio::select! {
        _ = child.wait() => return Outcome::Died,
        reason = &mut stop => return Outcome::of(reason),
        ready = tokio::time::timeout(limit, until_ready(port, &process.ready_path)) => match ready {
            Ok(Ok(())) => report(Report::Loaded(worker)),
            Ok(Err(reason)) => return Outcome::Failed(reason),
            Err(_) => {
                let path = &process.ready_path;
                let seconds = limit.as_secs();
                return Outcome::Failed(format!("{path} did not answer within {seconds} s (deadline `load_seconds`)"));
            }
        },
    }
    tokio::select! {
        _ = child.wait() => Outcome::Died,
        reason = &mut stop => Outcome::of(reason),
    }
}

/// Waits until the command answers.
async fn until_ready(port: u16, path: &str) -> Result<(), String> {
    let client = reqwest::Client::builder().no_proxy().timeout(ANSWERS_WITHIN).build();
    let client = client.map_err(|error| error.to_string())?;
    let url = format!("http://127.0.0.1:{port}{path}");
    loop {
        let answer = client.get(&url).send().await;
        if answer.is_ok_and(|answer| answer.status().is_success()) {
            return Ok(());
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// The port that is configured, or any that is free. Another program's server there must not be taken for ours.
fn free_port(wanted: Option<u16>) -> Result<u16, String> {
    let taken = |error: std::io::Error| match wanted {
        Some(port) => format!("port {port} cannot be used ({error}): end the program that has it, or name another"),
        None => format!("there is no free port ({error})"),
    };
    let listener = TcpListener::bind(("127.0.0.1", wanted.unwrap_or(0))).map_err(taken)?;
    listener.local_addr().map(|address| address.port()).map_err(taken)
}

/// The shepherd ends as its command did.
fn how_it_ended(status: Option<std::process::ExitStatus>) -> String {
    match status.map(|status| (status, status.code())) {
        None => "lost".into(),
        Some((_, Some(code @ 129..))) => format!("signal: {}", code - 128),
        Some((status, _)) => status.to_string(),
    }
}
