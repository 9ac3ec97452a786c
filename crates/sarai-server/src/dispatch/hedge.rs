//! A host that is late beyond what is usual for it: the model's own worker is loaded and reads the prompt meanwhile, and
//! the first to give a token answers. The other is let go of, which cancels it.
//!
//! Nothing is generated twice: before its first token, nobody has generated anything.

use sarai_core::{Error, GenerateRequest, RemoteCause};
use tokio::time::{Instant, sleep};

use super::candidates::{Candidate, expected};
use super::{Dispatch, attempt, warm};
use crate::backend::EventStream;
use crate::config::Remote;
use crate::health::Place;

/// What came of asking a host, and perhaps a worker.
pub enum Hedged {
    /// The host has answered, or failed while nobody else could.
    Host(Result<EventStream, Error>),
    /// The worker was faster, or the host failed: why it did not answer, and the worker's events.
    Worker(Error, EventStream),
}

/// Asks a host; if it is late, the worker too.
pub async fn open(
    dispatch: &Dispatch,
    host: (&Candidate, &Remote),
    worker: &Candidate,
    request: &GenerateRequest,
    place: Place,
) -> Hedged {
    let (candidate, remote) = host;
    let (expected, known) = expected(&dispatch.health, remote, request);
    let began = Instant::now();
    let mut asked = Box::pin(attempt::open(dispatch, candidate, request, place));
    let worker_is_free = async {
        sleep(known.pace.late(expected)).await;
        warm::until_free(dispatch, worker, request.residence).await;
    };
    tokio::select! {
        opened = &mut asked => return Hedged::Host(opened),
        () = worker_is_free => {}
    }
    let late = began.elapsed();
    tracing::info!(deployment = candidate.label(), after = ?late, "late: the worker is asked as well");
    let mut also = Box::pin(attempt::open(dispatch, worker, request, None));
    tokio::select! {
        opened = &mut asked => match opened {
            Ok(events) => Hedged::Host(Ok(events)),
            // What is wrong with the request is wrong anywhere.
            Err(error) if !error.may_succeed_elsewhere() => Hedged::Host(Err(error)),
            Err(error) => match also.await {
                Ok(events) => Hedged::Worker(error, events),
                Err(_) => Hedged::Host(Err(error)),
            },
        },
        opened = &mut also => match opened {
            Ok(events) => {
                // Before its breaker hears of it, it is cancelled.
                drop(asked);
                // How long the worker then took is not its matter.
                let cause = RemoteCause::Late { seconds: late.as_secs() };
                let late = Error::Remote { host: remote.url.clone(), cause };
                // What is seen counts for a while only: a load may take longer.
                if known.loads() || dispatch.health.of(remote).loads() {
                    // A host that loads takes its time, and gives it up with the request: it is to have the model for the next one.
                    dispatch.health.load_aside(remote, &candidate.model.deadlines);
                } else {
                    dispatch.health.failed(remote, &late);
                }
                Hedged::Worker(late, events)
            }
            Err(error) => {
                tracing::info!(deployment = worker.label(), %error, "the worker cannot");
                Hedged::Host(asked.await)
            }
        },
    }
}
