//! Waiting for a place at a host, in its turn and within the deadline of its queue; the model's own worker is tried meanwhile, and the first
//! one counts.

use std::pin::pin;
use std::time::Duration;

use futures_util::FutureExt;
use sarai_core::{Error, Lane};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::candidates::Candidate;
use super::spread::Work;
use super::{Answer, Ask, Dispatch, attempt, warm};
use crate::admission::Ticket;
use crate::backend::EventStream;
use crate::health::{self, Expected};

/// What came of waiting for a place: who has one, or nobody within the deadline; or the worker was faster.
pub(super) enum Waited {
    Place(Option<(Duration, Option<(usize, health::Place)>)>),
    Worker(Candidate, EventStream),
}

impl Dispatch {
    /// Waits for a place at a candidate, within the deadline of its queue; workers have their own.
    pub(super) async fn place_at(
        &self,
        candidate: &Candidate,
        arrived: Instant,
        lane: Lane,
        ticket: &Ticket,
    ) -> Option<health::Place> {
        let Some(remote) = candidate.remote() else { return Some(None) };
        let until = arrived + candidate.model.deadlines.queue;
        let place = ticket.aside(timeout_at(until, self.health.place(&[remote], lane))).await;
        place.ok().map(|(_, place)| place)
    }

    /// Waits for a place at one of those that are not left alone: its index and the place, or nothing within the deadline;
    /// `None` if all are left alone. Who waits keeps its turn, unless a breaker changes who may be asked.
    pub(super) async fn wait_for_place(
        &self,
        left: &[Candidate],
        arrived: Instant,
        lane: Lane,
    ) -> Option<(Duration, Option<(usize, health::Place)>)> {
        let askable = || -> Vec<usize> {
            let all = left.iter().enumerate();
            all.filter(|(_, one)| !one.is_left_alone(&self.health)).map(|(index, _)| index).collect()
        };
        loop {
            let mut changes = self.health.changes();
            let current = askable();
            let deadline = left[*current.first()?].model.deadlines.queue;
            let remotes: Vec<_> = current.iter().filter_map(|&index| left[index].remote()).collect();
            let mut place = Box::pin(timeout_at(arrived + deadline, self.health.place(&remotes, lane)));
            loop {
                tokio::select! {
                    biased;
                    found = &mut place => {
                        let found = found.ok().map(|(at, place)| (current[at], place));
                        // Its breaker may have opened while its place was waited for.
                        match found {
                            Some((index, _)) if left[index].is_left_alone(&self.health) => break,
                            found => return Some((deadline, found)),
                        }
                    }
                    Ok(()) = changes.changed() => {
                        if askable() != current {
                            break;
                        }
                    }
                }
            }
        }
    }

    /// Waits for a place; once it is waited for as long as it is usual for the host to answer, the model's own worker is asked as well, if
    /// nobody else has to go for it. The first one counts: a place, or the worker's first token.
    pub(super) async fn wait_for_place_or_worker(&self, ask: &Ask<'_>, left: &[Candidate]) -> Waited {
        let mut place = pin!(self.wait_for_place(left, ask.arrived, ask.request.lane));
        if let Some(found) = place.as_mut().now_or_never() {
            return Waited::Place(found);
        }
        let worker = ask.worker.as_ref().filter(|worker| ask.may_stand_in(worker, &self.health));
        let Some(worker) = worker else { return Waited::Place(place.await) };
        let late = left.iter().filter(|one| !one.is_left_alone(&self.health)).filter_map(|one| {
            let (expected, known) = Work::of(&ask.request).expected(&self.health, one.remote()?);
            // Nothing is held back by who was not asked yet.
            Some(known.pace.late(Expected { held_tokens: 0, ..expected }))
        });
        let late = late.min().unwrap_or_default();
        let worker_is_free = async {
            sleep_until(ask.arrived + late).await;
            warm::until_free(self, worker, ask.request.residence).await;
        };
        tokio::select! {
            biased;
            found = &mut place => return Waited::Place(found),
            () = worker_is_free => {}
        }
        let mut asked = pin!(attempt::open(self, worker, &ask.request, None));
        let (opened, found) = tokio::select! {
            biased;
            found = &mut place => match found {
                Some((_, Some(_))) => return Waited::Place(found),
                // Nobody has one in time: the worker is the next, and has begun.
                nobody => (asked.await, Some(nobody)),
            },
            opened = &mut asked => (opened, None),
        };
        match (opened, found) {
            (Ok(events), _) => Waited::Worker(worker.clone(), events),
            (Err(error), found) => {
                tracing::info!(deployment = worker.label(), %error, "the worker cannot");
                match found {
                    Some(nobody) => Waited::Place(nobody),
                    None => Waited::Place(place.await),
                }
            }
        }
    }

    /// The answer of a worker that was faster than all hosts had a place; none if it breaks off before its client has any of it.
    pub(super) async fn answer_of_worker(
        &self,
        ask: &mut Ask<'_>,
        left: &[Candidate],
        worker: &Candidate,
        events: EventStream,
    ) -> Result<Option<Answer>, Error> {
        let seconds = ask.arrived.elapsed().as_secs();
        let mut answering = worker.clone();
        match self.begin(ask, &mut answering, events).await {
            Ok(events) => {
                let reason = format!("all places at its hosts were taken for {seconds} s, and its worker was faster");
                for candidate in left.iter().filter(|one| !one.is_left_alone(&self.health)) {
                    let (model, reason) = (candidate.model.name.clone(), reason.clone());
                    ask.note(candidate, Error::Unavailable { model, reason });
                }
                for candidate in left.iter().filter(|one| one.is_left_alone(&self.health)) {
                    if let Some(last) = candidate.last_failure(&self.health) {
                        ask.note(candidate, last);
                    }
                }
                Ok(Some(ask.begun(&answering, events)))
            }
            Err(error) if error.may_succeed_elsewhere() => {
                ask.note(worker, error);
                // It has its own turn yet.
                ask.worker = None;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}
