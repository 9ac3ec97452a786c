//! A form of an answer is tried in a process of its own before it is used: there are schemas and grammars that keep llama.cpp busy
//! without end, take all memory, or end the process. The process is a copy of this one, with little time and memory, and does nothing
//! else; answers go on meanwhile.

use std::collections::VecDeque;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use llama_cpp_4::chat::ChatTemplates;
use llama_cpp_4::model::{LlamaModel, Special};
use llama_cpp_4::sampling::LlamaSampler;
use llama_cpp_4::token::LlamaToken;
use llama_cpp_4::token::data::LlamaTokenData;
use llama_cpp_4::token::data_array::LlamaTokenDataArray;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SeekFrom, ftruncate, memfd_create, seek};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, pidfd_send_signal, waitpid};
use sarai_core::{Bytes, Error, Format, GenerateRequest, Message, Prompt, Role, form_bytes};

use crate::channel::Incoming;
use crate::{prompt, sampler, schema};

/// Processor time of a trial; the worker takes a few times as much of it between two steps when the form is used.
const BUSY: Duration = Duration::from_millis(500);
/// How long it is waited for, on a machine that has other things to do.
const WITHIN: Duration = Duration::from_secs(8);
/// What it may say: llama.cpp repeats a grammar that it refuses, from where it is wrong on and once more.
const SAID_BYTES: u64 = 80 << 20;
/// Of which so much is told.
const TOLD_BYTES: usize = 400;
/// How C++ says that there is none left.
const NO_MEMORY: &str = "bad_alloc";
/// Forms that are remembered.
const REMEMBERED: usize = 256;

/// What has become of a form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It can be used.
    Well,
    /// Its grammar is none, for this reason.
    Refused(String),
    /// It ends the process.
    Badly,
    /// It takes too much time or memory.
    Late,
    /// The machine has not let the trial come to its end: the next request with this form has it tried again.
    Unfinished,
}

impl Ended {
    /// # Errors
    /// The form of the request cannot be used, or was not tried.
    fn allows(&self, request: &GenerateRequest) -> Result<(), Error> {
        let param = sampler::form_param(request);
        let why = match self {
            Self::Well => return Ok(()),
            Self::Refused(why) => return Err(sampler::cannot(param, why)),
            Self::Badly => "it ends in a dead end, or refers to itself without end",
            Self::Late => "it takes too much time or memory: say less, repeat less, or nest repetitions less",
            Self::Unfinished => {
                return Err(Error::Internal(format!(
                    "the grammar of `{param}` could not be tried for want of memory or time: send it again"
                )));
            }
        };
        let place = match (&request.tools, &request.format) {
            (Some(tools), _) => schema::heaviest_of_tools(&tools.definitions),
            (None, Format::Schema(schema)) => {
                serde_json::from_str(schema).ok().and_then(|schema| schema::heaviest(&schema))
            }
            _ => None,
        };
        let place = place.map(|place| format!(" (most of it is {place})")).unwrap_or_default();
        Err(Error::invalid(param, format!("llama.cpp cannot follow the grammar of `{param}`{place}: {why}")))
    }
}

/// A request that waits for the trial of its form.
pub struct Untried {
    /// Names it in frames.
    pub id: u64,
    /// Tokens that prompt and answer may have together.
    pub context_tokens: u32,
    /// Memory that its form may take.
    pub form_bytes: Bytes,
    /// When it came.
    pub since: Instant,
    /// The request.
    pub request: GenerateRequest,
}

/// A trial that goes on.
struct Running {
    form: u64,
    /// The copy.
    copy: Option<OwnedFd>,
    /// Nobody waits for it any more: who comes now with the same form waits for another one.
    is_cancelled: bool,
}

/// Forms that were tried, and requests that wait for theirs; one is tried at a time.
pub struct Trials {
    inbox: SyncSender<Incoming>,
    ended: VecDeque<(u64, Ended)>,
    waiting: VecDeque<Untried>,
    running: Option<Running>,
    /// With which answers are begun.
    letters: Option<Vec<LlamaToken>>,
}

impl Trials {
    /// What becomes of forms is told to the inbox.
    pub fn new(inbox: SyncSender<Incoming>) -> Self {
        Self { inbox, ended: VecDeque::new(), waiting: VecDeque::new(), running: None, letters: None }
    }

    /// Whether a request may go on: it has no form, or one that was tried and is sound.
    ///
    /// # Errors
    /// Its form was tried, and cannot be used.
    pub fn allows(&self, request: &GenerateRequest) -> Result<bool, Error> {
        if !request.has_form() {
            return Ok(true);
        }
        let form = form_of(request);
        let known = self.ended.iter().find(|(tried, _)| *tried == form);
        known.map_or(Ok(false), |(_, ended)| ended.allows(request).map(|()| true))
    }

    /// Lets a request wait for the trial of its form.
    pub fn push(&mut self, untried: Untried) {
        self.waiting.push_back(untried);
    }

    /// Forgets a request. A trial that nobody waits for any more is ended: what it may take is lent to those who wait.
    pub fn cancel(&mut self, id: u64) {
        self.waiting.retain(|untried| untried.id != id);
        if let Some(Running { form, copy: Some(copy), is_cancelled }) = &mut self.running
            && self.waiting.iter().all(|untried| form_of(&untried.request) != *form)
        {
            *is_cancelled = pidfd_send_signal(copy, Signal::KILL).is_ok();
        }
    }

    /// Begins the next trial, unless one goes on.
    pub fn begin(&mut self, model: &LlamaModel, templates: &ChatTemplates) {
        let Some(next) = self.waiting.front().filter(|_| self.running.is_none()) else { return };
        let form = form_of(&next.request);
        let letters = self.letters.get_or_insert_with(|| letters(model));
        let all = form_bytes(u64::try_from(model.n_vocab()).unwrap_or(0));
        let limit = Limit { bytes: next.form_bytes, is_short: next.form_bytes < all };
        let copy = Copy::begin(limit, || begins(model, templates, letters, &next.request));
        self.running = Some(Running { form, copy: copy.handle(), is_cancelled: false });
        let inbox = self.inbox.clone();
        let wait = move || {
            // It waits as long as the engine serves.
            let _ = inbox.send(Incoming::Tried(form, copy.ended()));
        };
        let waits = std::thread::Builder::new().name("trial".into()).spawn(wait);
        if waits.is_err() {
            // The copy ends by itself; nothing is known of it.
            let _ = self.inbox.try_send(Incoming::Tried(form, Ended::Unfinished));
        }
    }

    /// Remembers what has become of a form; returns the requests that have it, and whether they may go on.
    pub fn end(&mut self, form: u64, ended: Ended) -> Vec<(Untried, Result<(), Error>)> {
        if self.running.take().is_some_and(|running| running.is_cancelled) {
            return Vec::new();
        }
        if ended != Ended::Unfinished {
            if self.ended.len() >= REMEMBERED {
                self.ended.pop_front();
            }
            self.ended.push_back((form, ended.clone()));
        }
        let (tried, waiting) = self.waiting.drain(..).partition(|untried| form_of(&untried.request) == form);
        self.waiting = waiting;
        let told = |untried: Untried| {
            let allowed = ended.allows(&untried.request);
            (untried, allowed)
        };
        VecDeque::into_iter(tried).map(told).collect()
    }
}

/// A number for all of a request that its form depends on.
fn form_of(request: &GenerateRequest) -> u64 {
    let mut hasher = DefaultHasher::new();
    let is_chat = matches!(request.prompt, Prompt::Chat(_));
    format!("{is_chat} {:?} {:?} {:?}", request.format, request.tools, request.think).hash(&mut hasher);
    hasher.finish()
}

/// Makes the grammar of a request's form, as it will be made. What llama.cpp says of a schema is told when it is made.
fn begins(model: &LlamaModel, templates: &ChatTemplates, letters: &[LlamaToken], request: &GenerateRequest) -> Ended {
    let prompt = match request.prompt {
        Prompt::Chat(_) => Prompt::Chat(vec![Message::new(Role::User, "Hi")]),
        Prompt::Raw(_) | Prompt::Tokens(_) => Prompt::Raw("Hi".into()),
    };
    let short = GenerateRequest { prompt, prefill: String::new(), given: String::new(), ..request.clone() };
    // Some templates want more than one message.
    let rendered = prompt::render(model, templates, &short).or_else(|_| prompt::render(model, templates, request));
    let grammar = rendered.and_then(|rendered| sampler::grammar(request, rendered.form.as_ref()));
    match grammar {
        Ok(Some(grammar)) => compiles(model, letters, &grammar, matches!(request.format, Format::Gbnf(_))),
        Ok(None) => Ended::Well,
        Err(error) if error.to_string().contains(NO_MEMORY) => Ended::Unfinished,
        Err(_) => Ended::Well,
    }
}

/// Compiles a grammar, and asks it for the first token. Places in it mean something to its author alone.
fn compiles(model: &LlamaModel, letters: &[LlamaToken], grammar: &str, is_the_clients: bool) -> Ended {
    let began = Instant::now();
    let mut sampler = match LlamaSampler::try_grammar(model, grammar, "root") {
        Ok(sampler) => sampler,
        Err(error) => {
            let said = said();
            return match said.contains(NO_MEMORY) {
                true => Ended::Unfinished,
                false => Ended::Refused(reason(&said, grammar, is_the_clients).unwrap_or_else(|| error.to_string())),
            };
        }
    };
    let all: Vec<_> = (0..model.n_vocab()).map(LlamaToken).collect();
    allowed(&mut sampler, all.iter().copied());
    // A dead end, or what grows with each token, may stand behind the first one: answers are begun, letter by letter.
    let walks = if is_the_clients { WALKS } else { FEW_WALKS };
    for repeats in [false, true].into_iter().cycle() {
        // Each has its share, also of an answer that does not end.
        let until = (Instant::now() + walks / 4).min(began + walks);
        if grows(&mut sampler, &Walk { letters, repeats, until, most: usize::MAX }) {
            return Ended::Late;
        }
        let Ok(again) = LlamaSampler::try_grammar(model, grammar, "root") else { break };
        sampler = again;
        if began.elapsed() > walks {
            break;
        }
    }
    // Somewhere within an answer all tokens may take longer, by far, than at its beginning.
    let most = rand::random_range(1..FIRST_LETTERS);
    grows(&mut sampler, &Walk { letters, repeats: false, until: Instant::now() + walks / 4, most });
    allowed(&mut sampler, all.iter().copied());
    // An answer that llama.cpp could not go on with for want of memory has not shown anything.
    if said().contains(NO_MEMORY) { Ended::Unfinished } else { Ended::Well }
}

/// What llama.cpp has said: it goes there alone.
fn said() -> String {
    String::from_utf8_lossy(&std::fs::read("/proc/self/fd/2").unwrap_or_default()).into_owned()
}

/// Those of these tokens that a grammar allows next.
fn allowed(sampler: &mut LlamaSampler, tokens: impl Iterator<Item = LlamaToken>) -> Vec<LlamaToken> {
    let mut all = LlamaTokenDataArray::new(tokens.map(|token| LlamaTokenData::new(token, 0.0, 0.0)).collect(), false);
    sampler.apply(&mut all);
    all.data.iter().filter(|data| !data.logit().is_infinite()).map(LlamaTokenData::id).collect()
}

/// How an answer is begun.
struct Walk<'a> {
    letters: &'a [LlamaToken],
    /// Whether it repeats itself where it may.
    repeats: bool,
    until: Instant,
    /// Letters at most.
    most: usize,
}

/// Begins an answer that a grammar allows, for as long as there is time. Says whether each letter takes longer than the one before, by far.
fn grows(sampler: &mut LlamaSampler, walk: &Walk<'_>) -> bool {
    let (mut last, mut times) = (None, Vec::new());
    while Instant::now() < walk.until && times.len() < walk.most {
        let began = busy();
        let allowed = allowed(sampler, walk.letters.iter().copied());
        if allowed.is_empty() {
            break;
        }
        let again = last.filter(|last| walk.repeats && allowed.contains(last) && rand::random_range(0..32) > 0);
        let next = again.unwrap_or_else(|| allowed[rand::random_range(0..allowed.len())]);
        last = Some(next);
        if sampler.try_accept(next).is_err() {
            break;
        }
        times.push(busy().saturating_sub(began));
    }
    let last = &times[times.len().saturating_sub(FEW_LETTERS)..];
    let is_more = |pair: &[Duration]| pair[1] > pair[0].mul_f64(MORE);
    last.len() == FEW_LETTERS && last.windows(2).all(is_more) && last[FEW_LETTERS - 1] > A_LONG_TIME
}

/// What doubles with each letter has done so for so many of them, and takes long by then; a single one may well take longer.
const FEW_LETTERS: usize = 5;
const MORE: f64 = 1.4;
const A_LONG_TIME: Duration = Duration::from_millis(3);

/// Processor time of this thread.
fn busy() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// Letters of an answer behind one of which all tokens are asked for.
const FIRST_LETTERS: usize = 24;
/// Time for beginnings of an answer, with the compiling before them.
const WALKS: Duration = Duration::from_millis(200);
/// And where llama.cpp has made the grammar, which has no dead ends.
const FEW_WALKS: Duration = Duration::from_millis(80);

/// Tokens of one byte.
fn letters(model: &LlamaModel) -> Vec<LlamaToken> {
    let is_letter =
        |token: &LlamaToken| model.token_to_raw_bytes(*token, Special::Plaintext).is_ok_and(|bytes| bytes.len() == 1);
    (0..model.n_vocab()).map(LlamaToken).filter(is_letter).collect()
}

/// Why a grammar is refused, by what llama.cpp has written: the reason, the grammar from there on, and all of it.
fn reason(said: &str, grammar: &str, has_place: bool) -> Option<String> {
    let Some((_, parsed)) = said.split_once("error parsing grammar: ") else {
        return said.lines().map(str::trim).rfind(|line| !line.is_empty()).map(str::to_owned);
    };
    let said = parsed.split_once(&format!("\n\n{grammar}")).map_or(parsed, |(said, _)| said);
    let at = said.match_indices(" at ").find(|(at, mark)| grammar.ends_with(&said[at + mark.len()..]));
    let Some((at, mark)) = at else { return said.lines().next().map(str::to_owned) };
    let (why, read) = (&said[..at], &grammar[..grammar.len() - said[at + mark.len()..].len()]);
    let line = read.matches('\n').count() + 1;
    let column = read.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    Some(if has_place { format!("{why} in line {line}, column {column}") } else { why.to_owned() })
}

/// How a copy ends that has no memory left, one whose form is refused, and one whose form takes longer and longer.
const WITHOUT_MEMORY: i32 = 1;
const REFUSED: i32 = 2;
const LATE: i32 = 3;
/// How Rust and C++ say that there is no memory left, before they end a process.
const NO_MEMORY_LEFT: [&str; 2] = ["memory allocation of", NO_MEMORY];

/// What a copy may take beyond what there is.
#[derive(Clone, Copy, Debug)]
struct Limit {
    bytes: Bytes,
    /// Whether that is less than a form may take.
    is_short: bool,
}

/// A copy of this process, which does one thing and is gone; what it says is kept.
struct Copy(Option<(Pid, File, Limit)>);

impl Copy {
    /// Has something done in a copy.
    #[expect(unsafe_code, reason = "fork, and what a copy may do before it is gone")]
    fn begin(limit: Limit, what: impl FnOnce() -> Ended) -> Self {
        let Ok(said) = memfd_create("trial", MemfdFlags::CLOEXEC).map(File::from) else { return Self(None) };
        // SAFETY: the copy has this thread alone. glibc leaves its allocator usable there; nothing is called that waits for another
        // thread, and `_exit` runs none of what the original has to do at its end.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let lent = limit.bytes.0;
            let limit = |kind, value| {
                let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
                // SAFETY: the limit is a plain value that outlives the call.
                unsafe { libc::setrlimit(kind, &raw const limit) };
            };
            // Where memory is short, it goes before anything else does.
            let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
            // Beyond what the copy has, which is less than the original has (`buffers`).
            limit(libc::RLIMIT_DATA, lent.saturating_add(writable()));
            limit(libc::RLIMIT_CORE, 0);
            limit(libc::RLIMIT_FSIZE, SAID_BYTES);
            let busy = libc::timeval { tv_sec: 0, tv_usec: i64::from(BUSY.subsec_micros()) };
            let once = libc::itimerval { it_interval: libc::timeval { tv_sec: 0, tv_usec: 0 }, it_value: busy };
            // SAFETY: constants, C strings, and plain values that outlive the calls; the environment has no other reader in the copy.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                // Its signal ends the copy.
                libc::setitimer(libc::ITIMER_PROF, &raw const once, std::ptr::null_mut());
                libc::setenv(c"GGML_NO_BACKTRACE".as_ptr(), c"1".as_ptr(), 1);
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                libc::dup2(said.as_raw_fd(), libc::STDERR_FILENO);
            }
            // Nothing of the original is unwound.
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(what));
            let code = match ended.unwrap_or_else(|_| std::process::abort()) {
                Ended::Refused(why) => {
                    // It alone is left of what was said.
                    let _ = ftruncate(&said, 0).and_then(|()| seek(&said, SeekFrom::Start(0)));
                    let _ = (&said).write_all(why.as_bytes());
                    REFUSED
                }
                Ended::Late => LATE,
                Ended::Unfinished => WITHOUT_MEMORY,
                _ => 0,
            };
            // SAFETY: ends the copy at once.
            unsafe { libc::_exit(code) };
        }
        Self(if pid > 0 { Pid::from_raw(pid).map(|pid| (pid, said, limit)) } else { None })
    }

    /// What it is ended by, whoever waits for it.
    fn handle(&self) -> Option<OwnedFd> {
        self.0.as_ref().and_then(|(pid, ..)| pidfd_open(*pid, PidfdFlags::empty()).ok())
    }

    /// Waits for its end.
    fn ended(self) -> Ended {
        let Some((pid, said, limit)) = self.0 else { return Ended::Unfinished };
        if !ends_within(pid, WITHIN) {
            let _ = kill_process(pid, Signal::KILL);
            let _ = waitpid(Some(pid), WaitOptions::empty());
            return Ended::Unfinished;
        }
        let Ok(Some((_, status))) = waitpid(Some(pid), WaitOptions::empty()) else { return Ended::Unfinished };
        match (status.exit_status(), status.terminating_signal()) {
            (Some(0), _) => Ended::Well,
            (Some(REFUSED), _) => Ended::Refused(beginning(&said)),
            (Some(LATE), _) | (_, Some(libc::SIGPROF)) => Ended::Late,
            (_, Some(libc::SIGABRT)) if !is_without_memory(&said) => Ended::Badly,
            (_, Some(libc::SIGSEGV)) => Ended::Badly,
            // With all the memory that it may take, it takes too much of it; with less, that says nothing of the form.
            (Some(_), _) | (_, Some(libc::SIGABRT)) if !limit.is_short => Ended::Late,
            // Such as by the kernel, for want of memory.
            _ => Ended::Unfinished,
        }
    }
}

/// Whether the process was ended since an allocation failed.
fn is_without_memory(said: &File) -> bool {
    let mut end = [0; TOLD_BYTES];
    let length = said.metadata().map_or(0, |meta| meta.len());
    let read = said.read_at(&mut end, length.saturating_sub(TOLD_BYTES as u64)).unwrap_or(0);
    let end = String::from_utf8_lossy(&end[..read]);
    NO_MEMORY_LEFT.iter().any(|words| end.contains(words))
}

/// The beginning of what was said, as far as it is told.
fn beginning(said: &File) -> String {
    let mut bytes = [0; TOLD_BYTES];
    let read = said.read_at(&mut bytes, 0).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..read]).trim_end_matches('\u{fffd}').to_owned()
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

/// What this process may write to, in bytes, as `RLIMIT_DATA` counts it: its address space is larger by all that its allocator has only reserved.
fn writable() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split_whitespace().nth(5).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(1 << 32);
    pages.saturating_mul(rustix::param::page_size() as u64)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    const ALL: Limit = Limit { bytes: Bytes::mib(16), is_short: false };

    #[test]
    fn what_ends_well_badly_or_never_is_told_apart_and_the_original_goes_on() {
        assert_eq!(Copy::begin(ALL, || Ended::Well).ended(), Ended::Well);
        assert_eq!(Copy::begin(ALL, || Ended::Late).ended(), Ended::Late);
        let why = "x".repeat(TOLD_BYTES);
        let refused = || {
            let _ = writeln!(std::io::stderr(), "said before");
            Ended::Refused(format!("{why} and so on"))
        };
        assert_eq!(Copy::begin(ALL, refused).ended(), Ended::Refused(why.clone()));
        assert_eq!(Copy::begin(ALL, || std::process::abort()).ended(), Ended::Badly);
        assert_eq!(
            Copy::begin(ALL, || loop {
                std::hint::black_box(0);
            })
            .ended(),
            Ended::Late
        );
        let takes = |bytes: Bytes| {
            move || {
                std::hint::black_box(vec![1_u8; usize::try_from(bytes.0).unwrap_or(usize::MAX)]);
                Ended::Well
            }
        };
        // More than glibc keeps of what other tests have freed: the copy may use that too.
        let (greedy, modest) = (|| takes(Bytes::mib(1024)), takes(Bytes::mib(8)));
        assert_eq!(Copy::begin(ALL, modest).ended(), Ended::Well);
        assert_eq!(Copy::begin(ALL, greedy()).ended(), Ended::Late, "an allocation that fails ends the process");
        assert_eq!(
            Copy::begin(Limit { is_short: true, ..ALL }, greedy()).ended(),
            Ended::Unfinished,
            "it may have needed no more than it may have"
        );
        let short = Limit { is_short: true, ..ALL };
        assert_eq!(Copy::begin(short, || std::process::abort()).ended(), Ended::Badly, "whatever memory it had");
        assert_eq!(Copy::begin(short, || Ended::Late).ended(), Ended::Late);
        assert_eq!(Copy::begin(ALL, || Ended::Unfinished).ended(), Ended::Late, "it has no memory left, and had all");
        assert_eq!(Copy(None).ended(), Ended::Unfinished, "what was not tried is not used");
        assert_eq!(Copy::begin(ALL, || std::panic::resume_unwind(Box::new(()))).ended(), Ended::Badly);
        let goes_first = || match std::fs::read_to_string("/proc/self/oom_score_adj").as_deref() {
            Ok("1000\n") => Ended::Well,
            _ => Ended::Late,
        };
        assert_eq!(Copy::begin(ALL, goes_first).ended(), Ended::Well);
        let killed = || {
            let _ = kill_process(rustix::process::getpid(), Signal::KILL);
            Ended::Well
        };
        assert_eq!(Copy::begin(ALL, killed).ended(), Ended::Unfinished);
    }

    #[test]
    fn a_grammar_that_is_none_is_wrong_in_a_line_and_column() {
        let grammar = "root ::= a\na ::= \"b\" at \"c\nd\" )\n";
        let refused = format!("parse: error parsing grammar: expecting newline or end at )\n\n\n{grammar}\nfailed");
        let why = |is_the_clients: bool| reason(&refused, grammar, is_the_clients).unwrap();
        assert_eq!(why(true), "expecting newline or end in line 3, column 4");
        assert_eq!(why(false), "expecting newline or end");
        let unknown = "parse: error parsing grammar: Undefined rule identifier 'b'\n\nroot ::= b\n";
        assert_eq!(reason(unknown, "root ::= b", true).unwrap(), "Undefined rule identifier 'b'");
        assert_eq!(
            reason("grammar does not contain a 'root' symbol\n", "a ::= b", true).unwrap(),
            "grammar does not contain a 'root' symbol"
        );
    }
}
