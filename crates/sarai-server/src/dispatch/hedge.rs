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
use sarai_core::{Error, Lane, RemoteCause};
use tokio::time::{Instant, sleep_until};

use super::candidates::Candidate;
use super::spread::Work;
use super::{Dispatch, warm};
use crate::config::Remote;
use crate::health::Place;

/// An answer of another model is worse than a late one, for so long.
const ANOTHER_MODEL_AFTER: Duration = Duration::from_secs(10);

/// Who may be asked as well.
pub struct Others<'a> {
    /// Hosts of the same model, in order.
    pub hosts: Vec<&'a Candidate>,
    /// A worker.
    pub worker: Option<&'a Candidate>,
    /// Whether that is the model's own.
    pub worker_is_own: bool,
}

/// What came of asking a host, and perhaps others.
pub struct Hedged<T> {
    /// Who has answered, or failed while nobody else could.
    pub by: Candidate,
    /// What it says.
    pub opened: Result<T, Error>,
    /// Who else has failed, and why.
    pub failed: Vec<(Candidate, Error)>,
    /// Who was late, and was let go of.
    pub late: Vec<(Candidate, Error)>,
}

/// Somebody who is asked, and since when.
struct Asked {
    candidate: Candidate,
    began: Instant,
    /// How late it was when the next one was asked.
    late: Duration,
    /// Whether it may be loading its model.
    may_load: bool,
    has_failed: bool,
}

/// Asks a host; if it is late, others too.
pub async fn open<T, F: Future<Output = Result<T, Error>>>(
    dispatch: &Dispatch,
    (host, place): (&Candidate, Place),
    mut others: Others<'_>,
    work: &Work<'_>,
    ask: impl Fn(Candidate, Place) -> F,
) -> Hedged<T> {
    let began = Instant::now();
    let mut asked: Vec<Asked> = Vec::new();
    let mut running = FuturesUnordered::new();
    let mut failed: Vec<(Candidate, Error)> = Vec::new();
    let mut next = Some((host.clone(), place));
    loop {
        if let Some((candidate, place)) = next.take() {
            if let Some(last) = asked.last_mut() {
                last.late = last.began.elapsed();
                let (deployment, also) = (last.candidate.label(), candidate.label());
                tracing::info!(deployment, also, after = ?last.late, "late: another one is asked as well");
            }
            others.hosts.retain(|one| !one.is(&candidate));
            others.worker = others.worker.filter(|one| !one.is(&candidate));
            let may_load = candidate.remote().is_some_and(|remote| dispatch.health.of(remote).loads());
            let index = asked.len();
            asked.push(Asked {
                candidate: candidate.clone(),
                began: Instant::now(),
                late: Duration::ZERO,
                may_load,
                has_failed: false,
            });
            running.push(ask(candidate, place).map(move |opened| (index, opened)));
        }
        let (index, opened) = tokio::select! {
            biased;
            Some(opened) = running.next() => opened,
            found = another(dispatch, &others, asked.last(), work, began) => {
                next = Some(found);
                continue;
            }
        };
        let by = asked[index].candidate.clone();
        let error = match opened {
            Ok(opened) => {
                // Before their breakers hear of it, they are cancelled.
                drop(running);
                // Those who were asked after it had no time.
                let late = asked[..index].iter().filter(|one| !one.has_failed);
                let late =
                    late.filter_map(|one| Some((one.candidate.clone(), is_late(dispatch, one, work)?))).collect();
                return Hedged { by, opened: Ok(opened), failed, late };
            }
            Err(error) => error,
        };
        // What is wrong with the request is for the one to say that was meant to answer it.
        let is_final = index == 0 && !error.may_succeed_elsewhere();
        asked[index].has_failed = true;
        failed.push((by, error));
        if is_final || running.is_empty() {
            // The host that was asked first is the one that is told of.
            let first = failed.iter().position(|(one, _)| one.is(host)).unwrap_or(0);
            let (by, error) = failed.swap_remove(first);
            return Hedged { by, opened: Err(error), failed, late: Vec::new() };
        }
    }
}

/// Waits until somebody else is to be asked: the one that was asked last is late, or has failed, and another host has a place, or the
/// worker is free.
async fn another(
    dispatch: &Dispatch,
    others: &Others<'_>,
    last: Option<&Asked>,
    work: &Work<'_>,
    began: Instant,
) -> (Candidate, Place) {
    match last.filter(|last| !last.has_failed) {
        None => {}
        Some(last) => {
            // A worker is not late: it computes.
            let Some(remote) = last.candidate.remote() else { return pending().await };
            let (expected, known) = work.expected(&dispatch.health, remote);
            sleep_until(last.began + known.pace.late(expected)).await;
        }
    }
    let worker = async {
        let Some(worker) = others.worker else { return pending().await };
        if !others.worker_is_own {
            sleep_until(began + ANOTHER_MODEL_AFTER).await;
        }
        warm::until_free(dispatch, worker, work.residence).await;
        worker.clone()
    };
    tokio::select! {
        biased;
        found = host_with_place(dispatch, &others.hosts, work.lane) => found,
        worker = worker => (worker, None),
    }
}

/// Waits for a place at one of these hosts, as far as they may be asked.
async fn host_with_place(dispatch: &Dispatch, hosts: &[&Candidate], lane: Lane) -> (Candidate, Place) {
    let health = &dispatch.health;
    let may_be_asked = |host: &&Candidate| !host.is_left_alone(health) && host.is_too_far(health).is_none();
    loop {
        let mut changes = health.changes();
        let hosts: Vec<&Candidate> = hosts.iter().copied().filter(may_be_asked).collect();
        let remotes: Vec<_> = hosts.iter().filter_map(|host| host.remote()).collect();
        if remotes.is_empty() {
            let _ = changes.changed().await;
            continue;
        }
        tokio::select! {
            biased;
            (index, place) = health.place(&remotes, lane) => {
                // It may have changed while its place was waited for.
                if may_be_asked(&hosts[index]) {
                    return (hosts[index].clone(), place);
                }
            }
            _ = changes.changed() => {}
        }
    }
}

/// Why somebody has not answered while another one has; its health is told.
fn is_late(dispatch: &Dispatch, one: &Asked, work: &Work<'_>) -> Option<Error> {
    let remote: &Remote = one.candidate.remote()?;
    // How long the others then took is not its matter.
    let cause = RemoteCause::Late { seconds: one.late.as_secs() };
    let error = Error::Remote { host: remote.url.clone(), cause };
    // What is seen counts for a while only: a load may take longer.
    if one.may_load || dispatch.health.of(remote).loads() {
        // A host that loads takes its time, and gives it up with the request: it is to have the model for the next one.
        dispatch.health.load_aside(remote, &one.candidate.model.deadlines);
    } else if remote.makes_vectors || !work.is_of_vectors {
        let (expected, _) = work.expected(&dispatch.health, remote);
        dispatch.health.was_late(remote, expected, one.late, error.clone());
    }
    Some(error)
}
