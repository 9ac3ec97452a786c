//! A host that is late beyond what is usual for it: somebody else is asked meanwhile, and the first to give a token answers. The others are
//! let go of, which cancels them.
//!
//! Asked are other hosts of the model that have a place, one after the other, and then a worker that nobody else has to go for: the
//! model's own, or after a longer while that of a model which it falls back to. Nothing is generated twice: before its first token,
//! nobody has generated anything.

use std::future::pending;
use std::time::Duration;

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use sarai_core::{Error, GenerateRequest, RemoteCause};
use tokio::time::{Instant, sleep, sleep_until};

use super::candidates::{Candidate, expected};
use super::{Dispatch, attempt, warm};
use crate::backend::EventStream;
use crate::config::Remote;
use crate::health::Place;

/// An answer of another model is worse than a late one, for so long.
const ANOTHER_MODEL_AFTER: Duration = Duration::from_secs(10);

/// Who may be asked as well.
pub struct Others<'a> {
    /// Hosts of the same model.
    pub hosts: &'a [Candidate],
    /// A worker.
    pub worker: Option<&'a Candidate>,
    /// Whether that is the model's own.
    pub worker_is_own: bool,
}

/// What came of asking a host, and perhaps others.
pub struct Hedged {
    /// Who has answered, or failed while nobody else could.
    pub by: Candidate,
    /// What it says.
    pub opened: Result<EventStream, Error>,
    /// Why others that were asked before have not answered.
    pub before: Vec<(Candidate, Error)>,
}

/// Somebody who is asked, and since when.
struct Asked {
    candidate: Candidate,
    began: Instant,
    /// Whether it may be loading its model.
    may_load: bool,
}

/// Asks a host; if it is late, others too.
pub async fn open(
    dispatch: &Dispatch,
    host: &Candidate,
    others: Others<'_>,
    request: &GenerateRequest,
    place: Place,
) -> Hedged {
    let began = Instant::now();
    let mut asked: Vec<Asked> = Vec::new();
    let mut running = FuturesUnordered::new();
    let mut before = Vec::new();
    let mut next = Some((host.clone(), place));
    let mut hosts = others.hosts.iter();
    loop {
        if let Some((candidate, place)) = next.take() {
            if let Some(first) = asked.first() {
                let (deployment, also) = (first.candidate.label(), candidate.label());
                tracing::info!(deployment, also, after = ?began.elapsed(), "late: another one is asked as well");
            }
            let may_load = candidate.remote().is_some_and(|remote| dispatch.health.of(remote).loads());
            let index = asked.len();
            asked.push(Asked { candidate: candidate.clone(), began: Instant::now(), may_load });
            running.push(async move { (index, attempt::open(dispatch, &candidate, request, place).await) });
        }
        let last = asked.last().map(|last| &last.candidate);
        tokio::select! {
            biased;
            Some((index, opened)) = running.next() => {
                let by = asked[index].candidate.clone();
                match opened {
                    Err(error) if error.may_succeed_elsewhere() && !running.is_empty() => before.push((by, error)),
                    Err(error) if error.may_succeed_elsewhere() && index > 0 => {
                        // The host that was asked first is the one that is told of.
                        let first = before.iter().position(|(one, _)| one.is(host));
                        let (by, error) = match first {
                            Some(first) => std::mem::replace(&mut before[first], (by, error)),
                            None => (by, error),
                        };
                        return Hedged { by, opened: Err(error), before };
                    }
                    opened => {
                        // Before their breakers hear of it, they are cancelled.
                        drop(running);
                        if opened.is_ok() {
                            // Those who were asked after it had no time.
                            let told: Vec<_> = before.iter().map(|(one, _): &(Candidate, Error)| one.label()).collect();
                            let late = asked[..index].iter().filter(|one| !told.contains(&one.candidate.label()));
                            before.extend(late.filter_map(|one| Some((one.candidate.clone(), is_late(dispatch, one)?))));
                        }
                        return Hedged { by, opened, before };
                    }
                }
            }
            found = another(dispatch, &mut hosts, last, &others, request, began) => next = Some(found),
        }
    }
}

/// Waits until somebody else is to be asked.
async fn another(
    dispatch: &Dispatch,
    hosts: &mut std::slice::Iter<'_, Candidate>,
    last: Option<&Candidate>,
    others: &Others<'_>,
    request: &GenerateRequest,
    began: Instant,
) -> (Candidate, Place) {
    // A worker is the last one.
    let Some(remote) = last.and_then(Candidate::remote) else { return pending().await };
    let (expected, known) = expected(&dispatch.health, remote, request);
    sleep(known.pace.late(expected)).await;
    for host in hosts.filter(|host| !host.is_left_alone(&dispatch.health)) {
        let Some(remote) = host.remote() else { continue };
        if let Some((_, place)) = dispatch.health.place(&[remote]).now_or_never() {
            return (host.clone(), place);
        }
    }
    let Some(worker) = others.worker else { return pending().await };
    if !others.worker_is_own {
        sleep_until(began + ANOTHER_MODEL_AFTER).await;
    }
    warm::until_free(dispatch, worker, request.residence).await;
    (worker.clone(), None)
}

/// Why somebody has not answered while another one has; its health is told.
fn is_late(dispatch: &Dispatch, one: &Asked) -> Option<Error> {
    let remote: &Remote = one.candidate.remote()?;
    let error =
        Error::Remote { host: remote.url.clone(), cause: RemoteCause::Late { seconds: one.began.elapsed().as_secs() } };
    // What is seen counts for a while only: a load may take longer.
    if one.may_load || dispatch.health.of(remote).loads() {
        // A host that loads takes its time, and gives it up with the request: it is to have the model for the next one.
        dispatch.health.load_aside(remote, &one.candidate.model.deadlines);
    } else {
        dispatch.health.failed(remote, &error);
    }
    Some(error)
}
