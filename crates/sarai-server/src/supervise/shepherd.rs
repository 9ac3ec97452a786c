//! `sarai worker shepherd`: runs a command, and sees to it that nothing of it is left when the server wants it gone, or is
//! gone itself.
//!
//! Whatever a process of the tree starts and leaves behind becomes the shepherd's own child (`PR_SET_CHILD_SUBREAPER`).

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, wait};

use crate::machine::process;

/// How long a tree may take to end by itself.
pub const GRACE: Duration = Duration::from_secs(5);
/// As likely as a worker.
const VICTIM_SCORE: &str = "500";
/// Between two turns of killing what is left of it.
const KILL_EVERY: Duration = Duration::from_millis(20);
/// What shells answer when a command cannot be started.
const CANNOT_START: u8 = 127;

/// Runs the command until it ends by itself, or until the standard input, which is a socket of the server, is closed.
///
/// # Errors
/// The system refuses what the shepherd needs.
pub fn run(command: &[String]) -> std::io::Result<ExitCode> {
    set_child_subreaper(Some(getpid()))?;
    prefer_as_victims();
    let Some((program, arguments)) = command.split_first() else { return Ok(ExitCode::from(CANNOT_START)) };
    let log = || rustix::io::dup(rustix::stdio::stderr()).map(Stdio::from);
    let spawned = Command::new(program).args(arguments).stdin(Stdio::null()).stdout(log()?).stderr(log()?).spawn();
    let child = spawned.map_err(|error| std::io::Error::new(error.kind(), format!("`{program}`: {error}")))?;
    std::thread::spawn(|| {
        // Nothing is ever sent: it is closed.
        let _ = std::io::stdin().read(&mut [0]);
        end_all();
    });
    let mut status = None;
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, ended))) if pid.as_raw_nonzero().get().unsigned_abs() == child.id() => {
                status = Some(std::process::ExitStatus::from_raw(ended.as_raw()));
                // The server of this tree is gone: its helpers go too.
                std::thread::spawn(end_all);
            }
            Err(Errno::CHILD) => break,
            _ => {}
        }
    }
    let code = status.and_then(|status| status.code().or_else(|| Some(128 + status.signal()?))).unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

/// Asks the kernel to take what is started here before the server, whose value it would inherit.
fn prefer_as_victims() {
    // Where that is not possible, the command is as likely to be taken as the server's own processes.
    let _ = std::fs::write("/proc/self/oom_score_adj", VICTIM_SCORE);
}

/// Asks all processes below this one to end, and kills those that do not.
fn end_all() {
    let signal = |signal| {
        let pids = process::tree(std::process::id()).into_iter().skip(1);
        for pid in pids.filter_map(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) {
            let _ = kill_process(pid, signal);
        }
    };
    signal(Signal::TERM);
    // This process ends as soon as it has no child, and this thread with it.
    std::thread::sleep(GRACE);
    loop {
        signal(Signal::KILL);
        // What was forked meanwhile is found by the next turn.
        std::thread::sleep(KILL_EVERY);
    }
}
