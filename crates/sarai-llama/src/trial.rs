//! A grammar is tried in a process of its own before it is used: there are such that keep llama.cpp busy without end, or end the
//! process. The process is a copy of this one, with little time and memory, and does nothing else.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use llama_cpp_4::model::LlamaModel;
use llama_cpp_4::sampling::LlamaSampler;
use llama_cpp_4::token::LlamaToken;
use llama_cpp_4::token::data::LlamaTokenData;
use llama_cpp_4::token::data_array::LlamaTokenDataArray;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, waitpid};

/// Processor time of a trial, in whole seconds, as the kernel counts it; and how long it is waited for.
const SECONDS: u64 = 2;
const WITHIN: Duration = Duration::from_secs(4);
/// Memory that it may take beyond what there is.
const MORE_BYTES: u64 = 512 << 20;
/// Grammars that are remembered.
const REMEMBERED: usize = 256;

/// Grammars that were tried, and are sound.
#[derive(Default)]
pub struct Tried(Vec<u64>);

impl Tried {
    /// Tries a grammar, unless that was done.
    ///
    /// # Errors
    /// In words that go on: "llama.cpp cannot follow it: …".
    pub fn check(&mut self, model: &LlamaModel, grammar: &str) -> Result<(), &'static str> {
        let mut hasher = DefaultHasher::new();
        grammar.hash(&mut hasher);
        let hash = hasher.finish();
        if self.0.contains(&hash) {
            return Ok(());
        }
        match in_a_copy(|| begins(model, grammar)) {
            // What the grammar's own compiler refuses is told by it, in its words.
            Ended::Well => {}
            Ended::Badly => return Err("it ends in a dead end, or refers to itself without end"),
            Ended::Late => return Err("it takes too much time or memory: repeat less, or nest repetitions less"),
        }
        if self.0.len() >= REMEMBERED {
            self.0.remove(0);
        }
        self.0.push(hash);
        Ok(())
    }
}

/// Compiles a grammar, and asks it for the first token.
fn begins(model: &LlamaModel, grammar: &str) {
    let Ok(mut sampler) = LlamaSampler::try_grammar(model, grammar, "root") else { return };
    let all = (0..model.n_vocab()).map(|id| LlamaTokenData::new(LlamaToken(id), 0.0, 0.0));
    sampler.apply(&mut LlamaTokenDataArray::new(all.collect(), false));
}

#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Well,
    Badly,
    Late,
}

/// Does something in a copy of this process.
#[expect(unsafe_code, reason = "fork, and what a copy may do before it is gone")]
fn in_a_copy(what: impl FnOnce()) -> Ended {
    let most = MORE_BYTES.saturating_add(address_space());
    // SAFETY: the copy has this thread alone. glibc leaves its allocator usable there; nothing is called that waits for another
    // thread, and `_exit` runs none of what the original has to do at its end.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let limit = |kind, value| {
            let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
            // SAFETY: the limit is a plain value that outlives the call.
            unsafe { libc::setrlimit(kind, &raw const limit) };
        };
        limit(libc::RLIMIT_CPU, SECONDS);
        limit(libc::RLIMIT_AS, most);
        limit(libc::RLIMIT_CORE, 0);
        // SAFETY: constants and C strings; the environment has no other reader in the copy.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::setenv(c"GGML_NO_BACKTRACE".as_ptr(), c"1".as_ptr(), 1);
            let nothing = libc::open(c"/dev/null".as_ptr(), libc::O_WRONLY);
            libc::dup2(nothing, libc::STDERR_FILENO);
        }
        what();
        // SAFETY: ends the copy at once.
        unsafe { libc::_exit(0) };
    }
    // Without a copy nothing can be tried: the grammar is used as it is.
    let Some(pid) = Pid::from_raw(pid) else { return Ended::Well };
    if !ends_within(pid, WITHIN) {
        let _ = kill_process(pid, Signal::KILL);
        let _ = waitpid(Some(pid), WaitOptions::empty());
        return Ended::Late;
    }
    match waitpid(Some(pid), WaitOptions::empty()) {
        Ok(Some((_, status))) if status.exit_status() == Some(0) => Ended::Well,
        Ok(Some((_, status))) if status.terminating_signal() == Some(libc::SIGABRT) => Ended::Badly,
        _ => Ended::Late,
    }
}

fn ends_within(pid: Pid, limit: Duration) -> bool {
    let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else { return true };
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(0), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&left)) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return true,
        }
    }
}

/// What this process has mapped, in bytes.
fn address_space() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split_whitespace().next().and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(1 << 32);
    pages.saturating_mul(rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_well_badly_or_never_is_told_apart_and_the_original_goes_on() {
        assert_eq!(in_a_copy(|| {}), Ended::Well);
        assert_eq!(in_a_copy(|| std::process::abort()), Ended::Badly);
        assert_eq!(in_a_copy(|| while std::hint::black_box(true) {}), Ended::Late);
    }
}
