//! One attempt at one deployment: its deadlines, and what it teaches about a host.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use sarai_core::{Error, Event, GenerateRequest, Phase, RemoteCause};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout};

use super::Dispatch;
use super::candidates::Candidate;
use crate::backend::{EventStream, local, remote};
use crate::config::{Deployment, Remote};
use crate::health::{Gaps, Health};

/// Asks a candidate; returns once its first event is there. A host's place is held by the events.
///
/// # Errors
/// Why it did not answer. A host's failure is known to its breaker then.
pub async fn open(
    dispatch: &Dispatch,
    candidate: &Candidate,
    request: &GenerateRequest,
    place: Option<OwnedSemaphorePermit>,
) -> Result<EventStream, Error> {
    let opened = first_event(dispatch, candidate, request).await.map_err(|error| error.of_model(&candidate.model.name));
    let Some(remote) = candidate.remote() else { return opened };
    match opened {
        Ok(events) => Ok(observed(events, remote.clone(), dispatch.health.clone(), place)),
        Err(error) => {
            dispatch.health.failed(remote, &error);
            Err(error)
        }
    }
}

async fn first_event(
    dispatch: &Dispatch,
    candidate: &Candidate,
    request: &GenerateRequest,
) -> Result<EventStream, Error> {
    let deadlines = &candidate.model.deadlines;
    let late = || silent(candidate, Phase::FirstToken, deadlines.first_token);
    let started = Instant::now();
    let (mut events, left, gap) = match candidate.deployment() {
        Deployment::Local { engine, context_tokens } => {
            let want = dispatch.want(*engine, *context_tokens, request.residence).await?;
            let place = local::Place {
                engine: *engine,
                context_tokens: request.residence.context_tokens.unwrap_or(*context_tokens),
                model: &candidate.model.name,
            };
            let events = local::open(&dispatch.pool, &place, want, deadlines, request.clone()).await?;
            // The load and the queue of a worker have deadlines of their own.
            (events, deadlines.first_token, deadlines.gap)
        }
        Deployment::Remote(host) => {
            let place = remote::Place { remote: host, context_tokens: host.context_tokens, connect: deadlines.connect };
            let opened = timeout(deadlines.first_token, dispatch.hosts.open(&place, request)).await;
            let gap = match candidate.model.gap_is_set {
                true => deadlines.gap,
                false => dispatch.health.gap_limit(host, deadlines.gap),
            };
            (opened.map_err(|_| late())??, deadlines.first_token.saturating_sub(started.elapsed()), gap)
        }
    };
    let first = timeout(left, events.next()).await.map_err(|_| late())?;
    let first = first.unwrap_or_else(|| Err(Error::Internal("a stream without an end".into())))?;
    Ok(with_gaps_limited(first, events, gap, silent(candidate, Phase::Gap, gap)))
}

fn silent(candidate: &Candidate, phase: Phase, limit: Duration) -> Error {
    let seconds = limit.as_secs();
    match candidate.remote() {
        Some(remote) => Error::Remote { host: remote.url.clone(), cause: RemoteCause::Silent { phase, seconds } },
        None => Error::Deadline { model: candidate.model.name.clone(), phase, seconds },
    }
}

/// The stream with its first event in front; a gap longer than the limit ends it with an error.
fn with_gaps_limited(first: Event, rest: EventStream, gap: Duration, late: Error) -> EventStream {
    let goes_on = |event: &Event| !matches!(event, Event::Done { .. });
    let begun = goes_on(&first).then_some((rest, late));
    let rest = stream::unfold(begun, move |state| async move {
        let (mut rest, late) = state?;
        match timeout(gap, rest.next()).await {
            Ok(Some(Ok(event))) => {
                let state = goes_on(&event).then_some((rest, late));
                Some((Ok(event), state))
            }
            Ok(Some(Err(error))) => Some((Err(error), None)),
            Ok(None) => Some((Err(Error::Internal("the answer ended without its end mark".into())), None)),
            Err(_) => Some((Err(late), None)),
        }
    });
    Box::pin(stream::once(async { Ok(first) }).chain(rest))
}

/// A host's stream while it is watched: how it ends is what counts.
struct Observed {
    events: EventStream,
    remote: Remote,
    health: Health,
    gaps: Gaps,
    last: Option<Instant>,
    _place: Option<OwnedSemaphorePermit>,
}

fn observed(events: EventStream, remote: Remote, health: Health, place: Option<OwnedSemaphorePermit>) -> EventStream {
    let observed = Observed { events, remote, health, gaps: Gaps::default(), last: None, _place: place };
    Box::pin(stream::unfold(Some(observed), |observed| async {
        let mut observed = observed?;
        let event = observed.events.next().await?;
        let now = Instant::now();
        match &event {
            Ok(Event::Done { .. }) => {
                observed.health.succeeded(&observed.remote, observed.gaps);
                return Some((event, None));
            }
            Ok(_) => {
                if let Some(last) = observed.last.replace(now) {
                    observed.gaps.saw(now - last);
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
