//! One attempt at one deployment: its deadlines, and what it teaches about a host.

use std::pin::Pin;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use sarai_core::{Error, Event, GenerateRequest, Phase, RemoteCause};
use sarai_plan::EngineId;
use tokio::time::{Instant, timeout, timeout_at};

use super::Dispatch;
use super::candidates::Candidate;
use super::spread::Work;
use crate::backend::{EventStream, local, remote};
use crate::config::{Deployment, Remote};
use crate::health::{Gaps, Health, Known, Place, Sample};
use crate::pool::Lease;

/// How long a command that cannot be reached may take to end, with all that it has started.
const PROCESS_ENDS: Duration = Duration::from_secs(6);
/// How long a command that closed a connection is given to turn out to be ending.
const CONNECTION_ENDS: Duration = Duration::from_millis(200);

/// Asks a candidate; returns once its first event is there. A host's place is held by the events.
///
/// # Errors
/// Why it did not answer. A host's failure is known to its breaker then.
pub async fn open(
    dispatch: &Dispatch,
    candidate: &Candidate,
    request: &GenerateRequest,
    place: Place,
) -> Result<EventStream, Error> {
    let opened = match candidate.deployment() {
        Deployment::Local { engine, context_tokens } => {
            at_worker(dispatch, candidate, (*engine, *context_tokens), request).await
        }
        Deployment::Process { engine, context_tokens, remote } => {
            // Apart: hardly anybody needs it.
            let asked = Box::pin(at_process(dispatch, candidate, (*engine, *context_tokens, remote), request));
            let opened = asked.await;
            let (commands, name) = (dispatch.health.commands.clone(), candidate.label());
            match opened {
                Ok(events) => {
                    let judged = events.inspect(move |event| match event {
                        Ok(Event::Done { .. }) => commands.succeeded(&name),
                        Err(error) => commands.failed(&name, error),
                        Ok(_) => {}
                    });
                    Ok(judged.boxed())
                }
                Err(error) => {
                    commands.failed(&name, &error);
                    Err(error)
                }
            }
        }
        Deployment::Remote(host) => {
            let opened = at_host(dispatch, candidate, host, request, place).await;
            opened.inspect_err(|error| dispatch.health.failed(host, error))
        }
    };
    opened.map_err(|error| error.of_model(&candidate.model.name))
}

async fn at_worker(
    dispatch: &Dispatch,
    candidate: &Candidate,
    (engine, context_tokens): (EngineId, u32),
    request: &GenerateRequest,
) -> Result<EventStream, Error> {
    let deadlines = &candidate.model.deadlines;
    let want = dispatch.want(engine, context_tokens, request.residence).await?.in_lane(request.lane);
    let place = local::Place {
        engine,
        context_tokens: request.residence.context_tokens.unwrap_or(context_tokens),
        model: &candidate.model.name,
    };
    // The load and the queue of a worker have deadlines of their own.
    let events = local::open(&dispatch.pool, &place, want, deadlines, request.clone()).await?;
    within_deadlines(candidate, events, Instant::now() + deadlines.first_token).await
}

/// A command is asked like a host, and held like a worker.
async fn at_process(
    dispatch: &Dispatch,
    candidate: &Candidate,
    (engine, context_tokens, remote): (EngineId, u32, &Remote),
    request: &GenerateRequest,
) -> Result<EventStream, Error> {
    let (model, deadlines) = (&candidate.model, &candidate.model.deadlines);
    let want = dispatch.want(engine, context_tokens, request.residence).await?.in_lane(request.lane);
    let lease = dispatch.pool.lease(engine, want, &model.name, deadlines).await?;
    let Some(url) = &lease.worker.url else {
        return Err(Error::Internal("a worker of frames was taken for a command".into()));
    };
    let remote = Remote { url: url.to_string(), ..remote.clone() };
    let place = remote::Place { remote: &remote, context_tokens: None, connect: deadlines.connect };
    let seconds = deadlines.first_token.as_secs();
    let late = |_| Error::Deadline { model: model.name.clone(), phase: Phase::FirstToken, seconds };
    let until = Instant::now() + deadlines.first_token;
    let opened = timeout_at(until, dispatch.hosts.open(&place, request)).await.map_err(late)?;
    let events = unless_ending(&lease, &model.name, opened).await?;
    // The lease ends with the events.
    let held = stream::unfold((events, lease), |(mut events, lease)| async {
        let event = events.next().await?;
        Some((event, (events, lease)))
    });
    within_deadlines(candidate, Box::pin(held), until).await
}

/// What a command said. If it did not answer since it is ending, that is waited for: only then can it be started again.
///
/// # Errors
/// It did not answer, or with an error.
pub async fn unless_ending<T>(lease: &Lease, model: &str, said: Result<T, Error>) -> Result<T, Error> {
    let (limit, cause) = match said {
        Err(Error::Remote { cause: cause @ RemoteCause::Unreachable(_), .. }) => (PROCESS_ENDS, cause),
        Err(Error::Remote { cause: cause @ RemoteCause::Unanswered, .. }) => (CONNECTION_ENDS, cause),
        said => return said,
    };
    let id = lease.worker.next_id();
    if let Some(mut ended) = lease.worker.routes.enter(id, 1, Box::new(())) {
        let _ = timeout(limit, ended.recv()).await;
        lease.worker.routes.leave(id);
    }
    Err(Error::WorkerDied { model: model.to_owned(), detail: format!("its command {cause}") })
}

/// The events of what runs here; one that is late, or a gap that is too long, ends them with an error.
async fn within_deadlines(
    candidate: &Candidate,
    mut events: EventStream,
    until: Instant,
) -> Result<EventStream, Error> {
    let deadlines = &candidate.model.deadlines;
    let model = candidate.model.name.clone();
    let late = move |phase, limit: Duration| Error::Deadline { model: model.clone(), phase, seconds: limit.as_secs() };
    let first = first_event(&mut events, deadlines.first_token, until).await;
    let first = first.map_err(|limit| late(Phase::FirstToken, limit))??;
    let limits = Limits { silence: deadlines.gap, whole: deadlines.gap };
    Ok(with_gaps_limited(first, events, move |_| limits, move |limit| late(Phase::Gap, limit)))
}

/// How long a host may be silent at first.
pub struct FirstLimit {
    /// By what is usual there, or configured.
    limit: Duration,
    /// While it loads, or writes a call.
    most: Duration,
    may_call: bool,
    known: Known,
}

impl FirstLimit {
    /// That of a host.
    pub async fn of(health: &Health, candidate: &Candidate, host: &Remote, work: &Work<'_>) -> Self {
        let (expected, known) = work.expected_now(health, host).await;
        let most = candidate.model.deadlines.first_token;
        let limit = match candidate.model.first_token_is_set {
            true => most,
            false => known.pace.first_limit(expected, most),
        };
        Self { limit, most, known, may_call: work.may_call }
    }

    /// What a host says within it.
    ///
    /// # Errors
    /// What it fails with, or its silence.
    pub async fn keep<T>(
        &self,
        health: &Health,
        host: &Remote,
        mut asking: Pin<Box<impl Future<Output = Result<T, Error>>>>,
    ) -> Result<T, Error> {
        let (mut said, mut waited) = (timeout(self.limit, &mut asking).await, self.limit);
        let may_be_at_work =
            async || if self.may_call { health.is_there(host).await } else { health.loads_now(host).await };
        if said.is_err() && self.limit < self.most && may_be_at_work().await {
            // Somebody had another model loaded meanwhile, or its disk is slower than usual; or a call is long.
            (said, waited) = (timeout(self.most - self.limit, &mut asking).await, self.most);
        }
        said.unwrap_or_else(|_| {
            let cause = RemoteCause::Silent { phase: Phase::FirstToken, seconds: waited.as_secs() };
            Err(Error::Remote { host: host.url.clone(), cause })
        })
    }
}

async fn at_host(
    dispatch: &Dispatch,
    candidate: &Candidate,
    host: &Remote,
    request: &GenerateRequest,
    permit: Place,
) -> Result<EventStream, Error> {
    let (deadlines, health) = (&candidate.model.deadlines, &dispatch.health);
    let url = host.url.clone();
    let silent = move |phase, limit: Duration| Error::Remote {
        host: url.clone(),
        cause: RemoteCause::Silent { phase, seconds: limit.as_secs() },
    };
    let place = remote::Place { remote: host, context_tokens: host.context_tokens, connect: deadlines.connect };
    let limits = FirstLimit::of(health, candidate, host, &Work::of(request)).await;
    let began = Instant::now();
    let mut events = limits.keep(health, host, Box::pin(dispatch.hosts.open(&place, request))).await?;
    let (first_limit, known) = (limits.limit, limits.known);
    let until = began + deadlines.first_token;
    let first = first_event(&mut events, first_limit, until).await;
    let (early, first) = first.map_err(|limit| silent(Phase::FirstToken, limit))??;
    let took = began.elapsed();
    // Of a call, nothing may come before it is whole.
    let is_set = candidate.model.gap_is_set || request.may_call();
    let (pace, whole) = (known.pace, deadlines.gap);
    let limits = move |gaps: Gaps| Limits { silence: if is_set { whole } else { pace.gap_limit(gaps, whole) }, whole };
    let events = with_gaps_limited((early, first), events, limits, move |limit| silent(Phase::Gap, limit));
    Ok(observed(events, host.clone(), health.clone(), permit, took))
}

/// Steps that only describe the answer and are kept until its first token.
const MOST_EARLY: usize = 16;

/// How long nothing at all may come, and how long nothing that counts: bytes are a sign of life, and no tokens.
#[derive(Clone, Copy)]
struct Limits {
    silence: Duration,
    whole: Duration,
}

/// The next event that says something.
///
/// # Errors
/// The limit that has passed.
async fn next_event(events: &mut EventStream, limits: Limits) -> Result<Result<Event, Error>, Duration> {
    let end = Instant::now() + limits.whole;
    loop {
        let silent = Instant::now() + limits.silence;
        let limit = if silent < end { limits.silence } else { limits.whole };
        match timeout_at(silent.min(end), events.next()).await {
            Ok(Some(Ok(Event::Alive))) => {}
            Ok(Some(event)) => return Ok(event),
            Ok(None) => return Ok(Err(Error::Internal("the answer ended without its end mark".into()))),
            Err(_) => return Err(limit),
        }
    }
}

/// The first event of an answer, which has a token or ends it; and what came before it, which only describes the answer.
///
/// # Errors
/// The limit that has passed.
async fn first_event(
    events: &mut EventStream,
    silence: Duration,
    until: Instant,
) -> Result<Result<(Vec<Event>, Event), Error>, Duration> {
    let mut early = Vec::new();
    loop {
        let whole = until.saturating_duration_since(Instant::now());
        match next_event(events, Limits { silence: silence.min(whole), whole }).await? {
            Ok(Event::Extra(extra)) if extra.only_describes() && early.len() < MOST_EARLY => {
                early.push(Event::Extra(extra));
            }
            Ok(event) => return Ok(Ok((early, event))),
            Err(error) => return Ok(Err(error)),
        }
    }
}

/// The stream with its first event in front; a gap longer than the limits ends it with an error.
fn with_gaps_limited(
    (early, first): (Vec<Event>, Event),
    rest: EventStream,
    limits: impl Fn(Gaps) -> Limits + Send + 'static,
    late: impl Fn(Duration) -> Error + Send + 'static,
) -> EventStream {
    let goes_on = |event: &Event| !matches!(event, Event::Done { .. });
    let begun = goes_on(&first).then_some((rest, Gaps::default(), limits, late));
    let rest = stream::unfold(begun, move |state| async move {
        let (mut rest, mut gaps, limits, late) = state?;
        let asked = Instant::now();
        match next_event(&mut rest, limits(gaps)).await {
            Ok(Ok(event)) => {
                gaps.saw(asked.elapsed());
                let state = goes_on(&event).then_some((rest, gaps, limits, late));
                Some((Ok(event), state))
            }
            Ok(Err(error)) => Some((Err(error), None)),
            Err(limit) => Some((Err(late(limit)), None)),
        }
    });
    let begun = early.into_iter().chain([first]).map(Ok);
    Box::pin(stream::iter(begun).chain(rest))
}

/// A host's stream while it is watched: how it ends is what counts.
struct Observed {
    events: EventStream,
    remote: Remote,
    health: Health,
    gaps: Gaps,
    took: Duration,
    /// How long its events were waited for; how long the client took to read them is not its matter.
    rest: Duration,
    has_begun: bool,
    /// Steps that calls of tools came in: if it is one, they were held back until they were whole.
    calls: u32,
    _place: Place,
}

/// Whether tools are called in it.
fn is_call(event: &Event) -> bool {
    match event {
        Event::ToolCall(_) => true,
        Event::Extra(extra) => ["tool_calls", "function_call"].iter().any(|name| extra.message.contains_key(*name)),
        _ => false,
    }
}

fn observed(events: EventStream, remote: Remote, health: Health, place: Place, took: Duration) -> EventStream {
    let gaps = Gaps::default();
    let observed = Observed {
        events,
        remote,
        health,
        gaps,
        took,
        rest: Duration::ZERO,
        has_begun: false,
        calls: 0,
        _place: place,
    };
    Box::pin(stream::unfold(Some(observed), |observed| async {
        let mut observed = observed?;
        let asked = Instant::now();
        let event = observed.events.next().await?;
        let gap = asked.elapsed();
        observed.rest += gap;
        match &event {
            Ok(Event::Done { usage, timings, .. }) => {
                let Observed { remote, health, gaps, took, rest, calls, .. } = &observed;
                let (usage, timings, is_held_back) = (*usage, *timings, *calls == 1);
                let sample = Sample { gaps: *gaps, first: *took, rest: *rest, usage, timings, is_held_back };
                health.succeeded(remote, &sample);
                return Some((event, None));
            }
            Ok(event) => {
                observed.calls += u32::from(is_call(event));
                if std::mem::replace(&mut observed.has_begun, true) {
                    observed.gaps.saw(gap);
                }
            }
            Err(error) => {
                observed.health.failed(&observed.remote, error);
                return Some((event, None));
            }
        }
        Some((event, Some(observed)))
    }))
}
