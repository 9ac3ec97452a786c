//! One worker process, from its start to its end.
//!
//! The child is this binary again, with one end of a socket pair as its standard input. It ends when our
//! end is closed; if it does not, it is killed.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use sarai_core::frame::{self, FromWorker, HEADER_BYTES, LoadSpec, LoadedInfo, ToWorker, WARNING};
use sarai_core::{Bytes, Error};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::{mpsc, oneshot};
use tracing::Level;

use super::route::Routes;
use crate::config::Process;
use crate::lanes::Places;
use crate::machine::cgroup::Groups;

/// How long a worker may take to end by itself.
pub const END_GRACE: Duration = Duration::from_secs(2);
/// How long a worker that nobody needs may take to keep on disk what it computed, and for each further 64 MiB that it may keep.
const PARK_GRACE: Duration = Duration::from_secs(5);
const PARK_GRACE_MORE: Duration = Duration::from_secs(1);

/// How long a worker may write what it parks.
pub fn park_grace(most_bytes: Bytes) -> Duration {
    PARK_GRACE + PARK_GRACE_MORE * u32::try_from(most_bytes.0 >> 26).unwrap_or(u32::MAX).min(600)
}
/// How the system writes that a process was killed.
const KILLED: &str = "signal: 9";
/// How long a thread of OpenMP's (GNU) spins at a barrier before it sleeps, in turns of its loop; about a millisecond. A worker
/// that is alone needs it: while the server passes a token on, one of its threads waits for the other, and sleeping there costs
/// 5 % of its tokens (109 instead of 115 tokens/s with 1,000 turns). By default it is 15 times as long; then two workers that for
/// a moment have more threads than there are cores keep each other off them.
const SPIN: (&str, &str) = ("GOMP_SPINCOUNT", "20000");
/// Where llama.cpp ends the process, the reason is its last word, and not the frames of the stack, nor is a debugger started for them.
const NO_BACKTRACE: (&str, &str) = ("GGML_NO_BACKTRACE", "1");
/// What workers find in their environment beside the server's.
pub const ENVIRONMENT: [(&str, &str); 2] = [SPIN, NO_BACKTRACE];
/// Lines of a worker's log that are kept for its crash report.
const LAST_WORDS: usize = 5;

/// A worker whose model is loaded.
#[derive(Clone, Debug)]
pub struct Worker {
    /// Process id.
    pub pid: u32,
    /// What it loaded.
    pub info: LoadedInfo,
    /// The API of a command; a worker of ours is sent frames.
    pub url: Option<Arc<str>>,
    /// Places for generations.
    pub slots: Places,
    /// Requests it is answering.
    pub routes: Routes,
    // Unbounded in type: a guard that is dropped must be able to send. In fact a request sends two commands.
    pub(super) commands: mpsc::UnboundedSender<ToWorker>,
    pub(super) ids: Arc<AtomicU64>,
}

impl Worker {
    /// A number for a new generation.
    pub fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    /// Sends a command; a worker that has ended does not get it, and its requests are told by [`Routes::close`].
    pub fn send(&self, command: ToWorker) {
        if self.commands.send(command).is_err() {
            tracing::debug!(pid = self.pid, "the worker takes no commands any more");
        }
    }
}

/// What the supervisor of a worker tells the pool.
#[derive(Debug)]
pub enum Report {
    /// The process runs, and loads.
    Started(u32),
    /// The model is loaded.
    Loaded(Worker),
    /// Its context has another size now, or why not.
    Resized(LoadedInfo, Option<String>),
    /// The process has ended.
    Exited(Ended),
}

/// Why a worker is to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Nobody needs it.
    Idle,
    /// Although it is busy: its requests are told.
    Because(String),
}

/// How a worker ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// Why, unless it was asked to.
    pub failure: Option<String>,
    /// Whether the kernel killed it for want of memory.
    pub out_of_memory: bool,
}

/// What is started.
#[derive(Clone, Debug)]
pub enum Load {
    /// A worker of ours, with this file.
    File(LoadSpec),
    /// A command, below a shepherd.
    Process(Arc<Process>),
}

/// What starts a worker.
#[derive(Clone, Debug)]
pub struct Start {
    /// The binary to run, as a worker.
    pub executable: PathBuf,
    /// The models that it serves, for people.
    pub label: String,
    /// What to load.
    pub load: Load,
    /// How long that may take.
    pub load_deadline: Duration,
    /// How far it has come, in parts of a hundred.
    pub progress: Arc<AtomicU8>,
}

/// Runs a worker until it ends, or until `stop` is dropped or sent; reports what happens, `Exited` last.
pub async fn supervise(start: Start, stop: oneshot::Receiver<Stop>, report: impl Fn(Report) + Send) {
    let model = start.label.clone();
    let groups = Groups::of_this_process();
    let kills = groups.kills();
    let (failure, places) = match &start.load {
        Load::File(spec) => match launch(&start.executable, ["llama", &model], ENVIRONMENT) {
            Ok(launched) => run(launched, (&start, spec), stop, &report).await,
            Err(error) => (Some(format!("the worker cannot be started ({error})")), None),
        },
        Load::Process(process) => super::process::run(process, &start, stop, &report).await,
    };
    // The counter tells of the whole group: a worker that was not killed did not die of it.
    let out_of_memory = failure.as_ref().is_some_and(|reason| reason.contains(KILLED)) && groups.kills() > kills;
    let failure = failure.map(|reason| match out_of_memory {
        true => format!("the kernel killed it for want of memory ({reason})"),
        false => reason,
    });
    // First the pool: whoever is woken by its request's end and asks again must get a new worker.
    report(Report::Exited(Ended { failure: failure.clone(), out_of_memory }));
    if let Some((routes, slots)) = places {
        slots.close();
        routes.close(&match &failure {
            None => Error::ShuttingDown,
            Some(detail) => Error::WorkerDied { model: model.clone(), detail: detail.clone() },
        });
    }
    if let Some(reason) = failure {
        tracing::warn!(model, reason, "worker ended");
    }
}

/// A child that was started, with our end of its socket.
pub struct Launched {
    /// The process.
    pub child: Child,
    pub(super) pid: u32,
    /// What it sends.
    pub reader: BufReader<OwnedReadHalf>,
    /// What it is sent.
    pub writer: OwnedWriteHalf,
}

/// Starts `sarai worker` with these arguments and variables, in a process group of its own.
///
/// # Errors
/// The system cannot.
pub fn launch<A: AsRef<OsStr>, V: AsRef<OsStr>>(
    executable: &Path,
    arguments: impl IntoIterator<Item = A>,
    variables: impl IntoIterator<Item = (V, V)>,
) -> std::io::Result<Launched> {
    let (ours, theirs) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let child = Command::new(executable)
        .arg("worker")
        .args(arguments)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .envs(variables)
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    let pid = child.id().unwrap_or_default();
    let (reader, writer) = UnixStream::from_std(ours)?.into_split();
    Ok(Launched { child, pid, reader: BufReader::new(reader), writer })
}

/// Requests of a worker, and the places for them.
pub(super) type Occupied = (Routes, Places);

/// Returns why the worker ended, or `None` if it was stopped, and whoever must be told.
async fn run(
    mut launched: Launched,
    (start, spec): (&Start, &LoadSpec),
    mut stop: oneshot::Receiver<Stop>,
    report: &(impl Fn(Report) + Send),
) -> (Option<String>, Option<Occupied>) {
    report(Report::Started(launched.pid));
    let slots = Places::new(spec.parallel as usize);
    let (commands, to_write) = mpsc::unbounded_channel();
    let (loaded, mut on_loaded) = mpsc::channel(1);
    let routes = Routes::open();
    let last_words = tokio::spawn(read_log(launched.child.stderr.take(), start.label.clone(), Level::DEBUG));
    let writing = tokio::spawn(write_frames(launched.writer, to_write, routes.clone()));
    let (resized, mut on_resized) = mpsc::unbounded_channel();
    let mut reading =
        tokio::spawn(read_frames(launched.reader, routes.clone(), loaded, resized, Arc::clone(&start.progress)));
    let _ = commands.send(ToWorker::Load(spec.clone()));

    let mut is_loaded = false;
    let loading = tokio::time::timeout(start.load_deadline, on_loaded.recv());
    let outcome = tokio::select! {
        loaded = loading => match loaded {
            Ok(Some(Ok(info))) => {
                is_loaded = true;
                report(Report::Loaded(Worker {
                    pid: launched.pid,
                    info,
                    url: None,
                    slots: slots.clone(),
                    routes: routes.clone(),
                    commands: commands.clone(),
                    ids: Arc::new(AtomicU64::new(1)),
                }));
                loop {
                    tokio::select! {
                        _ = &mut reading => break Outcome::Died,
                        reason = &mut stop => break Outcome::of(reason),
                        Some((info, failure)) = on_resized.recv() => report(Report::Resized(info, failure)),
                    }
                }
            }
            Ok(Some(Err(reason))) => Outcome::Failed(reason),
            Ok(None) => Outcome::Died,
            Err(_) => Outcome::Failed(format!("it was not loaded within {} s (deadline `load_seconds`)", start.load_deadline.as_secs())),
        },
        reason = &mut stop => Outcome::of(reason),
    };
    let may_park = is_loaded && spec.park.is_some() && matches!(outcome, Outcome::Stopped);
    if may_park && commands.send(ToWorker::Leave).is_ok() {
        // It keeps on disk what it can, unless that takes too long.
        let grace = spec.park.as_ref().map(|park| park_grace(park.most_bytes)).unwrap_or_default();
        let _ = tokio::time::timeout(grace, launched.child.wait()).await;
    }
    // Closing our end asks the worker to go.
    drop(commands);
    writing.abort();
    let status = end(&mut launched.child, END_GRACE).await;
    let words = last_words.await.unwrap_or_default();
    let failure = match outcome {
        Outcome::Stopped => None,
        Outcome::Failed(reason) => Some(with_words(reason, &words)),
        Outcome::Died => Some(with_words(status.map_or("lost".into(), |status| status.to_string()), &words)),
    };
    (failure, Some((routes, slots)))
}

pub(super) enum Outcome {
    Stopped,
    Failed(String),
    Died,
}

impl Outcome {
    pub(super) fn of(stop: Result<Stop, oneshot::error::RecvError>) -> Self {
        match stop {
            Ok(Stop::Because(reason)) => Self::Failed(reason),
            Ok(Stop::Idle) | Err(_) => Self::Stopped,
        }
    }
}

/// A reason with what the child wrote last.
pub fn with_words(reason: String, words: &VecDeque<String>) -> String {
    if words.is_empty() {
        return reason;
    }
    format!("{reason}; its last words: {}", Vec::from(words.clone()).join(" | "))
}

/// Waits for the child to end, and kills it if it does not.
pub async fn end(child: &mut Child, grace: Duration) -> Option<ExitStatus> {
    match tokio::time::timeout(grace, child.wait()).await {
        Ok(status) => status.ok(),
        Err(_) => {
            let _ = child.start_kill();
            child.wait().await.ok()
        }
    }
}

/// Writes frames until the sender is dropped or the child is gone; a request that is too long for one is told so.
pub async fn write_frames(mut socket: OwnedWriteHalf, mut commands: mpsc::UnboundedReceiver<ToWorker>, routes: Routes) {
    let mut buffer = Vec::new();
    while let Some(command) = commands.recv().await {
        buffer.clear();
        if let Err(error) = frame::encode(&command, &mut buffer) {
            tracing::error!(%error, "a command could not be sent");
            if let ToWorker::Generate { id, .. } | ToWorker::Embed { id, .. } = command {
                let message = format!("the request does not reach the worker ({error}): send less at once");
                routes.pass(id, Err(Error::InvalidRequest { message, param: None }));
            }
            continue;
        }
        if socket.write_all(&buffer).await.is_err() {
            return;
        }
    }
}

/// The next frame; `None` when the child has closed its end or sends what is no frame.
pub async fn next_frame(socket: &mut BufReader<OwnedReadHalf>) -> Option<FromWorker> {
    let mut header = [0; HEADER_BYTES];
    socket.read_exact(&mut header).await.ok()?;
    let mut body = vec![0; frame::body_length(header).ok()?];
    socket.read_exact(&mut body).await.ok()?;
    let frame = frame::decode(&body);
    if let Err(error) = &frame {
        tracing::error!(%error, "a worker sent what is no frame");
    }
    frame.ok()
}

/// Passes frames on until the worker's end of the socket closes.
async fn read_frames(
    mut socket: BufReader<OwnedReadHalf>,
    routes: Routes,
    loaded: mpsc::Sender<Result<LoadedInfo, String>>,
    resized: mpsc::UnboundedSender<(LoadedInfo, Option<String>)>,
    progress: Arc<AtomicU8>,
) {
    while let Some(frame) = next_frame(&mut socket).await {
        match frame {
            FromWorker::Event { id, event } => routes.pass(id, Ok(event)),
            FromWorker::Failed { id, error } => routes.pass(id, Err(error)),
            FromWorker::Loading(percent) => progress.store(percent, Ordering::Relaxed),
            FromWorker::Loaded(info) => drop(loaded.try_send(Ok(info))),
            FromWorker::LoadFailed(reason) => drop(loaded.try_send(Err(reason))),
            FromWorker::Resized(info, failure) => drop(resized.send((info, failure))),
        }
    }
}

/// Logs what the worker writes, and returns its last lines.
pub async fn read_log(stderr: Option<ChildStderr>, model: String, level: Level) -> VecDeque<String> {
    let mut words = VecDeque::new();
    let Some(stderr) = stderr else { return words };
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match (level, line.strip_prefix(WARNING)) {
            (Level::DEBUG, Some(warning)) => tracing::warn!(model, "{warning}"),
            (Level::DEBUG, None) => tracing::debug!(model, line, "worker"),
            _ => tracing::info!(model, line, "process"),
        }
        words.push_back(line);
        if words.len() > LAST_WORDS {
            words.pop_front();
        }
    }
    words
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use sarai_core::{EmbedRequest, Input};

    use super::*;

    #[tokio::test]
    async fn a_request_that_no_frame_holds_is_told_so_and_the_next_one_reaches_the_worker() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (commands, to_write) = mpsc::unbounded_channel();
        let routes = Routes::open();
        let mut events = routes.enter(1, 1, Box::new(())).unwrap();
        let writing = tokio::spawn(write_frames(ours.into_split().1, to_write, routes));
        let inputs = vec![Input::Text("a".repeat(frame::MAX_FRAME_BYTES))];
        let request = EmbedRequest::new(inputs);
        commands.send(ToWorker::Embed { id: 1, request: Box::new(request) }).unwrap();
        let told = events.recv().await.unwrap().unwrap_err().to_string();
        assert!(told.contains("send less at once"), "{told}");
        commands.send(ToWorker::Cancel { id: 1 }).unwrap();
        let mut header = [0; HEADER_BYTES];
        BufReader::new(theirs).read_exact(&mut header).await.unwrap();
        assert!(frame::body_length(header).unwrap() < 100);
        drop(commands);
        writing.await.unwrap();
    }
}
