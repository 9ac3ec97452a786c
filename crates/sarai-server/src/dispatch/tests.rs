//! Properties of the loop, on paused time: hosts that do what chance says, clients that come and go.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use proptest::prelude::*;
use sarai_core::{
    Error, Event, FinishReason, GenerateRequest, Lane, Message, Prompt, RemoteCause, Role, Sampling, Timings, ToolCall,
    ToolCallPart, Usage,
};
use tokio::time::Instant;

use super::candidates::tiers;
use super::spread::{Work, spread};
use super::{Dispatch, Manner, Terms};
use crate::admission::{Admission, Ticket};
use crate::backend::EventStream;
use crate::backend::remote::{Hosts, Script, Scripted};
use crate::catalog::{Catalog, Catalogs};
use crate::config::{self, Environment, Remote};
use crate::health::{Health, State as BreakerState};
use crate::planner::Planner;
use crate::pool::{Parts, Pool};
use crate::state::State;
use crate::supervise::validate::Validator;

const MOST: usize = 2;
const PIECES: usize = 6;

/// What a host does about one request.
#[derive(Clone, Copy, Debug)]
pub enum Does {
    Answers,
    Refuses,
    Fails,
    /// After so many pieces.
    Cuts(usize),
    Stalls(usize),
    Hangs,
}

#[derive(Clone, Debug)]
struct Client {
    arrives_ms: u64,
    whole: bool,
    is_bulk: bool,
    leaves_after_ms: Option<u64>,
}

/// How many may be answered and may wait.
#[derive(Clone, Copy, Debug)]
struct Room {
    in_flight: usize,
    queued: usize,
}

fn text(pieces: usize) -> String {
    (0..pieces).map(|n| format!("piece{n} ")).collect()
}

/// How many a host answers now and at the most, and how often it was asked.
#[derive(Default)]
struct Seen {
    now: AtomicUsize,
    most: AtomicUsize,
    asked: AtomicUsize,
}

/// How one client's request fares: since when nobody answers it, or `None` once its client has gone.
type Waits = Mutex<Option<Instant>>;

struct Answering(Arc<Seen>, Arc<Waits>);

impl Answering {
    fn at(seen: &Arc<Seen>, waits: &Arc<Waits>) -> Self {
        let now = seen.now.fetch_add(1, Ordering::SeqCst) + 1;
        seen.most.fetch_max(now, Ordering::SeqCst);
        Self(Arc::clone(seen), Arc::clone(waits))
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::SeqCst);
        if let Some(since) = &mut *self.1.lock().unwrap() {
            *since = Instant::now();
        }
    }
}

fn answer(remote: &Remote, does: Does, guard: Answering) -> Scripted {
    let error = |cause| Error::Remote { host: remote.url.clone(), cause };
    let headers = Duration::from_millis(20);
    let pieces = match does {
        Does::Refuses => return (Duration::ZERO, Err(error(RemoteCause::Unreachable("refused".into())))),
        Does::Fails => {
            let cause = RemoteCause::Status { status: 500, message: "oops".into(), retry_after: None };
            return (headers, Err(error(cause)));
        }
        Does::Hangs => return (Duration::from_secs(100_000), Err(error(RemoteCause::Cut))),
        Does::Answers => PIECES,
        Does::Cuts(n) | Does::Stalls(n) => n,
    };
    let texts = stream::iter(0..pieces).then(|n| async move {
        tokio::time::sleep(Duration::from_millis(30)).await;
        Ok(Event::Text(format!("piece{n} ")))
    });
    let cut = error(RemoteCause::Cut);
    let end = stream::once(async move {
        match does {
            Does::Cuts(_) => Err(cut),
            Does::Stalls(_) => {
                tokio::time::sleep(Duration::from_secs(100_000)).await;
                Err(cut)
            }
            _ => {
                let usage = Usage { prompt_tokens: 1, completion_tokens: 6, cached_tokens: 0 };
                Ok(Event::Done { finish: FinishReason::Stop, usage, timings: Timings::default() })
            }
        }
    });
    // The host answers for as long as somebody listens.
    let events = texts.chain(end).map(move |event| {
        let _ = &guard;
        event
    });
    (headers, Ok(Box::pin(events) as EventStream))
}

/// How long a request may wait for a place.
const QUEUE: Duration = Duration::from_secs(30);
pub const SHORT: &str = "queue_seconds: 30, first_token_seconds: 5, gap_seconds: 5";

pub fn dispatch(hosts: usize, deadlines: &str, script: Script, folder: &std::path::Path) -> Dispatch {
    let urls: Vec<_> = (0..hosts).map(|n| format!("\"http://host{n}\"")).collect();
    let text = format!(
        "models:\n  m: {{ backend: ollama_http, urls: [{}], max_outstanding: {MOST}, deadlines: {{ {deadlines} }} }}\n",
        urls.join(", ")
    );
    let config = config::parse(&text, &folder.join("sarai.yaml"), &Environment::default()).unwrap();
    let (_, catalogs) = Catalogs::new(Catalog::new(&config));
    let state = Arc::new(State::open(folder));
    let planner = Planner::new(Arc::clone(&state));
    let hosts = Hosts::scripted(script);
    let (catalog, memory) = (catalogs.now(), config.memory);
    let (pool, _) = Pool::start(Parts {
        catalog: Arc::clone(&catalog),
        planner: planner.clone(),
        memory,
        executable: "none".into(),
    });
    let (health, _) = Health::new(&catalog, hosts.clone(), state);
    let validator = Validator::new("none".into(), pool.clone());
    Dispatch { catalogs, planner, pool, hosts, health, validator }
}

fn request(tag: &str) -> GenerateRequest {
    GenerateRequest {
        sampling: Sampling { temperature: Some(0.0), ..Sampling::default() },
        ..GenerateRequest::new(Prompt::Chat(vec![Message::new(Role::User, tag)]))
    }
}

/// What a client has seen: its whole text, or an error and the text before it.
async fn ask(dispatch: &Dispatch, tag: &str, whole: bool) -> (String, Option<Error>) {
    let ticket = Arc::new(Admission::new(1, 0, Duration::ZERO)).admit(Lane::Interactive).await.unwrap();
    ask_with(dispatch, request(tag), whole, &ticket).await
}

async fn ask_with(
    dispatch: &Dispatch,
    request: GenerateRequest,
    whole: bool,
    ticket: &Ticket,
) -> (String, Option<Error>) {
    let model = Arc::clone(dispatch.catalogs.now().find("m").unwrap());
    let manner = Manner { whole, terms: Terms::default() };
    let mut events = match dispatch.answer(&model, request, manner, ticket).await {
        Ok(answer) => answer.events,
        Err(error) => return (String::new(), Some(error)),
    };
    let (mut said, mut ended) = (String::new(), 0);
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Text(text)) => said.push_str(&text),
            Ok(Event::Done { .. }) => ended += 1,
            Ok(_) => {}
            Err(error) => return (said, Some(error)),
        }
    }
    assert_eq!(ended, 1, "one end, after {said:?}");
    (said, None)
}

fn does() -> impl Strategy<Value = Does> {
    prop_oneof![
        4 => Just(Does::Answers),
        1 => Just(Does::Refuses),
        1 => Just(Does::Fails),
        2 => (0..PIECES).prop_map(Does::Cuts),
        1 => (0..PIECES).prop_map(Does::Stalls),
        1 => Just(Does::Hangs),
    ]
}

fn client() -> impl Strategy<Value = Client> {
    let leaves = prop_oneof![3 => Just(None), 1 => (0_u64..3000).prop_map(Some)];
    (0_u64..4000, any::<bool>(), any::<bool>(), leaves).prop_map(|(arrives_ms, whole, is_bulk, leaves_after_ms)| {
        Client { arrives_ms, whole, is_bulk, leaves_after_ms }
    })
}

async fn play(hosts: usize, fates: Vec<Does>, clients: Vec<Client>, room: Room) {
    let admission = Arc::new(Admission::new(room.in_flight, room.queued, Duration::from_secs(60)));
    let queue = Arc::clone(&admission);
    let folder = tempfile::tempdir().unwrap();
    let seen: Arc<HashMap<String, Arc<Seen>>> =
        Arc::new((0..hosts).map(|n| (format!("http://host{n}"), Arc::default())).collect());
    let (next, healed) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
    let (of, is_healed) = (Arc::clone(&seen), Arc::clone(&healed));
    let waits: Arc<Vec<Arc<Waits>>> = Arc::new(clients.iter().map(|_| Arc::default()).collect());
    let of_client = Arc::clone(&waits);
    let script = Script(Arc::new(move |remote: &Remote, request: &GenerateRequest| {
        let host = &of[&remote.url];
        assert!(queue.queued() <= room.queued, "{} wait", queue.queued());
        let fate = fates[next.fetch_add(1, Ordering::SeqCst) % fates.len()];
        let is_probe = request.max_tokens == Some(1);
        if !is_probe {
            host.asked.fetch_add(1, Ordering::SeqCst);
        }
        let fate = if is_healed.load(Ordering::SeqCst) > 0 { Does::Answers } else { fate };
        let Prompt::Chat(messages) = &request.prompt else { unreachable!() };
        let guard = match messages[0].content.parse::<usize>().map(|tag| &of_client[tag]) {
            Ok(waits) => {
                let since =
                    waits.lock().unwrap().expect("nobody is asked for a client that has its answer or has left");
                assert!(
                    since.elapsed() <= QUEUE,
                    "nobody is asked after the deadline of its queue: {:?}",
                    since.elapsed()
                );
                Answering::at(host, waits)
            }
            // A probe takes no place.
            Err(_) if is_probe => Answering::at(&Arc::default(), &Arc::default()),
            Err(_) => Answering::at(host, &Arc::default()),
        };
        answer(remote, fate, guard)
    }));
    let dispatch = dispatch(hosts, SHORT, script, folder.path());
    let asked = clients.into_iter().zip(waits.iter().cloned()).enumerate().map(|(tag, (client, waits))| {
        let (dispatch, admission) = (dispatch.clone(), Arc::clone(&admission));
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(client.arrives_ms)).await;
            let lane = if client.is_bulk { Lane::Bulk } else { Lane::Interactive };
            let patience = Duration::from_millis(client.leaves_after_ms.unwrap_or(100_000_000));
            let asked = async {
                let ticket = admission.admit(lane).await.map_err(|error| (String::new(), Some(error)))?;
                *waits.lock().unwrap() = Some(Instant::now());
                Ok(ask_with(&dispatch, GenerateRequest { lane, ..request(&tag.to_string()) }, client.whole, &ticket)
                    .await)
            };
            let began = Instant::now();
            let outcome = tokio::time::timeout(patience, asked).await;
            let outcome = outcome.map(|outcome| outcome.unwrap_or_else(|shed| shed));
            *waits.lock().unwrap() = None;
            (outcome.ok(), began.elapsed(), client.whole)
        })
    });
    for task in asked.collect::<Vec<_>>() {
        let (outcome, took, whole) = task.await.unwrap();
        let Some((said, error)) = outcome else { continue };
        match error {
            // Answered once, nothing doubled and nothing missing, whoever went on.
            None => assert_eq!(said, text(PIECES)),
            Some(_) => {
                assert!(text(PIECES).starts_with(&said), "{said:?}");
                assert!(!whole || said.is_empty(), "nothing of a whole answer is out before its end");
            }
        }
        // A queue of 60 s and one of 30 s, and a few tries of at most 5 s of silence each.
        assert!(took < Duration::from_secs(180), "nobody waits for ever: {took:?}");
    }
    assert_eq!((admission.in_flight(), admission.queued()), (0, 0), "all permits and places are back");
    for seen in seen.values() {
        assert!(seen.most.load(Ordering::SeqCst) <= MOST, "no host has more than its limit");
        assert_eq!(seen.now.load(Ordering::SeqCst), 0, "what nobody listens to is cancelled");
    }
    // Breakers do not stick: whatever was, all are closed again without traffic once the hosts are well.
    healed.store(1, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_secs(90)).await;
    let remotes: Vec<_> = dispatch.catalogs.now().remotes().map(|(_, remote)| remote.clone()).collect();
    for remote in &remotes {
        let known = dispatch.health.of(remote);
        assert_eq!((known.state, known.outstanding), (BreakerState::Closed, 0), "{remote:?}");
    }
    // Nor do they flap: a host that is well stays closed under load.
    let before = seen.values().map(|seen| seen.asked.load(Ordering::SeqCst)).sum::<usize>();
    for _ in 0..4 {
        let (said, error) = ask(&dispatch, "after", true).await;
        assert_eq!((said, error), (text(PIECES), None));
    }
    let after = seen.values().map(|seen| seen.asked.load(Ordering::SeqCst)).sum::<usize>();
    assert_eq!(after - before, 4, "each asked of one host, once");
    dispatch.pool.stop().await;
}

/// By its own deadlines, that is: what is learned or configured for others does not shorten them.
#[tokio::test(start_paused = true)]
async fn a_cold_host_that_loads_for_90_seconds_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let script = Script(Arc::new(|remote: &Remote, _: &GenerateRequest| {
        let guard = Answering::at(&Arc::default(), &Arc::default());
        let (_, events) = answer(remote, Does::Answers, guard);
        (Duration::from_secs(90), events)
    }));
    let dispatch = dispatch(1, "connect_seconds: 2", script, folder.path());
    for whole in [true, false] {
        assert_eq!(ask(&dispatch, "cold", whole).await, (text(PIECES), None));
    }
    dispatch.pool.stop().await;
}

/// Hosts that do something else each time, the last thing from then on.
pub fn by_turns(fates: &'static [Does]) -> Script {
    let next = AtomicUsize::new(0);
    Script(Arc::new(move |remote: &Remote, _: &GenerateRequest| {
        let turn = next.fetch_add(1, Ordering::SeqCst);
        answer(remote, fates[turn.min(fates.len() - 1)], Answering::at(&Arc::default(), &Arc::default()))
    }))
}

#[tokio::test(start_paused = true)]
async fn while_a_host_hangs_another_one_that_idles_is_asked_too() {
    for whole in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        // All of them but the last.
        let dispatch =
            dispatch(3, "connect_seconds: 2", by_turns(&[Does::Hangs, Does::Hangs, Does::Answers]), folder.path());
        let began = Instant::now();
        assert_eq!(ask(&dispatch, "m", whole).await, (text(PIECES), None));
        assert!(began.elapsed() < Duration::from_secs(25), "{:?}", began.elapsed());
        dispatch.pool.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_whole_answer_that_was_cut_is_asked_for_once_more_where_nobody_else_is() {
    let folder = tempfile::tempdir().unwrap();
    let once = dispatch(1, SHORT, by_turns(&[Does::Cuts(2), Does::Answers]), folder.path());
    assert_eq!(ask(&once, "m", true).await, (text(PIECES), None));
    let twice = dispatch(1, SHORT, by_turns(&[Does::Cuts(2), Does::Cuts(3), Does::Answers]), folder.path());
    let (said, error) = ask(&twice, "m", true).await;
    assert!(said.is_empty() && error.is_some_and(|error| error.to_string().contains("cut the stream")));
    for dispatch in [once, twice] {
        dispatch.pool.stop().await;
    }
}

/// The fault is over, and the connection that it has met stays silent.
#[tokio::test(start_paused = true)]
async fn a_probe_that_hangs_holds_its_breaker_open_for_seconds_only() {
    let folder = tempfile::tempdir().unwrap();
    let probes = Arc::new(AtomicUsize::new(0));
    let probed = Arc::clone(&probes);
    let script = Script(Arc::new(move |remote: &Remote, request: &GenerateRequest| {
        let does = match request.max_tokens {
            Some(1) if probed.fetch_add(1, Ordering::SeqCst) == 0 => Does::Hangs,
            Some(1) => Does::Answers,
            _ => Does::Fails,
        };
        answer(remote, does, Answering::at(&Arc::default(), &Arc::default()))
    }));
    let dispatch = dispatch(1, "connect_seconds: 2", script, folder.path());
    let remote = dispatch.catalogs.now().remotes().map(|(_, remote)| remote.clone()).next().unwrap();
    while dispatch.health.of(&remote).state == BreakerState::Closed {
        assert!(ask(&dispatch, "m", true).await.1.is_some());
    }
    tokio::time::sleep(Duration::from_secs(30)).await;
    let state = dispatch.health.of(&remote).state;
    assert_eq!((state, probes.load(Ordering::SeqCst)), (BreakerState::Closed, 2));
    dispatch.pool.stop().await;
}

/// Ollama says nothing of a call before it is whole: that is no stall, and nothing that others would be late by.
#[tokio::test(start_paused = true)]
async fn a_call_that_is_held_back_is_waited_for_and_what_is_usual_stays_so() {
    let folder = tempfile::tempdir().unwrap();
    let script = Script(Arc::new(|remote: &Remote, request: &GenerateRequest| {
        let (_, events) = answer(remote, Does::Answers, Answering::at(&Arc::default(), &Arc::default()));
        let Prompt::Chat(messages) = &request.prompt else { unreachable!() };
        let (late, pause) = match messages[0].content.as_str() {
            "call" => (90, 0),
            "text, then a call" => (0, 50),
            _ => (0, 0),
        };
        let calls = late + pause > 0;
        let events = events.map(|events| {
            let paused = events.enumerate().then(move |(n, event)| async move {
                tokio::time::sleep(Duration::from_secs(if n == 3 { pause } else { 0 })).await;
                let call = || ToolCallPart { index: 0, call: ToolCall::default() };
                if calls && n == 3 { Ok(Event::ToolCall(call())) } else { event }
            });
            Box::pin(paused) as EventStream
        });
        (Duration::from_secs(late), events)
    }));
    let dispatch = dispatch(1, "connect_seconds: 2", script, folder.path());
    let ticket = Arc::new(Admission::new(1, 0, Duration::ZERO)).admit(Lane::Interactive).await.unwrap();
    let remote = dispatch.catalogs.now().remotes().map(|(_, remote)| remote.clone()).next().unwrap();
    for _ in 0..10 {
        assert_eq!(ask(&dispatch, "usual", false).await, (text(PIECES), None));
    }
    let usual = Work::of(&request("usual")).expected(&dispatch.health, &remote);
    for tag in ["call", "text, then a call"].repeat(3) {
        let tools = sarai_core::Tools {
            definitions: "[]".into(),
            names: Vec::new(),
            choice: sarai_core::ToolChoice::Auto,
            parallel: None,
        };
        let asked = GenerateRequest { tools: Some(tools), ..request(tag) };
        let (_, error) = ask_with(&dispatch, asked, false, &ticket).await;
        assert!(error.is_none(), "{tag}: {error:?}");
        assert_eq!(dispatch.health.of(&remote).state, BreakerState::Closed);
    }
    let after = Work::of(&request("usual")).expected(&dispatch.health, &remote);
    assert_eq!(after.1.pace.late(after.0), usual.1.pace.late(usual.0));
    dispatch.pool.stop().await;
}

/// What is learned shortens a limit; what is written in the configuration stands.
#[tokio::test(start_paused = true)]
async fn explicit_limits_win_over_learned_ones() {
    for (deadlines, first_is_waited_for, gap_is_waited_for) in [
        ("connect_seconds: 2", false, false),
        ("first_token_seconds: 100", true, false),
        ("gap_seconds: 60", false, true),
        ("gap_seconds: 2", false, false),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let script = Script(Arc::new(|remote: &Remote, request: &GenerateRequest| {
            let Prompt::Chat(messages) = &request.prompt else { unreachable!() };
            let (headers, pause) = match messages[0].content.as_str() {
                "late" => (50, 0),
                "pauses" => (0, 20),
                _ => (0, 0),
            };
            let (_, events) = answer(remote, Does::Answers, Answering::at(&Arc::default(), &Arc::default()));
            let events = events.map(|events| {
                let paused = events.enumerate().then(move |(n, event)| async move {
                    tokio::time::sleep(Duration::from_secs(if n == 3 { pause } else { 0 })).await;
                    event
                });
                Box::pin(paused) as EventStream
            });
            (Duration::from_secs(headers), events)
        }));
        let dispatch = dispatch(1, deadlines, script, folder.path());
        for _ in 0..10 {
            assert_eq!(ask(&dispatch, "usual", false).await, (text(PIECES), None));
        }
        for (tag, is_waited_for) in [("late", first_is_waited_for), ("pauses", gap_is_waited_for)] {
            // Of a stream that was cut, the rest would be asked for.
            let (said, error) = ask(&dispatch, tag, true).await;
            assert_eq!(error.is_none(), is_waited_for, "{deadlines}: {tag}: {said} {error:?}");
            assert_eq!(said == text(PIECES), is_waited_for, "{deadlines}: {tag}");
            if deadlines == "gap_seconds: 2" && tag == "pauses" {
                assert!(error.is_some_and(|error| error.to_string().contains("for 2 s")), "{deadlines}");
            }
        }
        dispatch.pool.stop().await;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn no_request_is_lost_or_answered_twice_queues_are_bounded_and_breakers_neither_stick_nor_flap(
        hosts in 1_usize..4,
        fates in proptest::collection::vec(does(), 1..40),
        clients in proptest::collection::vec(client(), 1..24),
        (in_flight, queued) in (1_usize..8, 0_usize..24),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(play(hosts, fates, clients, Room { in_flight, queued }));
    }
}

/// The host that each beginning of a conversation goes to first, of so many.
fn preferred(hosts: usize, tags: usize) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let dispatch = dispatch(hosts, SHORT, by_turns(&[Does::Answers]), folder.path());
    let catalog = dispatch.catalogs.now();
    let first = |n: usize| {
        let request = request(&format!("conversation {n}"));
        let mut tier = tiers(&catalog, &dispatch.health, catalog.find("m").unwrap(), &request).unwrap().remove(0);
        assert_eq!(tier.len(), hosts);
        spread(&mut tier, &Work::of(&request), &dispatch.health);
        tier[0].remote().unwrap().url.clone()
    };
    (0..tags).map(first).collect()
}

#[tokio::test]
async fn few_conversations_move_when_a_host_comes_or_goes() {
    const MANY: usize = 400;
    let (of_three, of_four) = (preferred(3, MANY), preferred(4, MANY));
    let moved: Vec<_> = of_three.iter().zip(&of_four).filter(|(before, after)| before != after).collect();
    assert!(moved.iter().all(|(_, after)| after.contains("host3")), "only to the new one: {moved:?}");
    // A quarter of them, give or take four deviations.
    assert!((65..=135).contains(&moved.len()), "{} of {MANY}", moved.len());
}

#[test]
fn pictures_and_tools_are_part_of_what_a_host_has_to_read() {
    let mut asked = request("which colour");
    let text = super::spread::prompt_tokens(&asked);
    let Prompt::Chat(messages) = &mut asked.prompt else { return };
    let source = sarai_core::MediaSource::Base64("aGk=".into());
    messages[0].media.push(sarai_core::Media { kind: sarai_core::MediaKind::Image, source, at: 0, param: "p".into() });
    let with_picture = super::spread::prompt_tokens(&asked);
    let (definitions, choice) = ("x".repeat(3000), sarai_core::ToolChoice::Auto);
    asked.tools = Some(sarai_core::Tools { definitions, names: Vec::new(), choice, parallel: None });
    assert_eq!((with_picture - text, super::spread::prompt_tokens(&asked) - with_picture), (1024, 1000));
}
