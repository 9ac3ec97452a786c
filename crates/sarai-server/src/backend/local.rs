//! A worker of this server.

use std::time::Duration;

use futures_util::stream;
use sarai_api::embed::Embedded;
use sarai_core::frame::ToWorker;
use sarai_core::{Bytes, Deadlines, EmbedRequest, Error, Event, GenerateRequest, Phase};
use sarai_plan::{EngineId, Want};

use super::EventStream;
use crate::pool::{Borrower, Lease, Pool};
use crate::supervise::child::Worker;
use crate::supervise::route::Events;

/// Which engine, and what a model may use of it.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The engine.
    pub engine: EngineId,
    /// Tokens that prompt and answer may have together.
    pub context_tokens: u32,
    /// The model's name.
    pub model: &'a str,
}

/// Leases a slot and starts the generation.
///
/// # Errors
/// See [`Pool::lease`].
pub async fn open(
    pool: &Pool,
    place: &Place<'_>,
    want: Want,
    deadlines: &Deadlines,
    request: GenerateRequest,
) -> Result<EventStream, Error> {
    let Place { engine, context_tokens, model } = *place;
    let Lease { worker, load, queue, held } = pool.lease(engine, want, model, deadlines).await?;
    let loan = if request.has_form() { pool.lend(Borrower::Forms(engine)).await } else { None };
    let form_bytes = loan.as_ref().map_or(Bytes::ZERO, |loan| loan.bytes);
    let id = worker.next_id();
    // No answer has more steps than its context has tokens, each of a few events, and an end.
    let capacity = 3 * worker.info.context_tokens as usize + 8;
    let Some(events) = worker.routes.enter(id, capacity, Box::new((loan, held))) else {
        return Err(Error::WorkerDied {
            model: model.to_owned(),
            detail: "it ended before the request reached it".into(),
        });
    };
    worker.send(ToWorker::Generate { id, context_tokens, form_bytes, request: Box::new(request) });
    let generation = Generation { id, worker, events };
    Ok(Box::pin(stream::unfold(Some(generation), move |generation| async move {
        let mut generation = generation?;
        match generation.events.recv().await? {
            Ok(Event::Done { finish, usage, mut timings }) => {
                timings.load = load;
                timings.queue += queue;
                Some((Ok(Event::Done { finish, usage, timings }), None))
            }
            Ok(text) => Some((Ok(text), Some(generation))),
            Err(error) => Some((Err(error), None)),
        }
    })))
}

/// Has a leased worker make vectors.
///
/// # Errors
/// It died, took too long, or cannot.
pub async fn embed(lease: Lease, model: &str, limit: Duration, request: EmbedRequest) -> Result<Embedded, Error> {
    let Lease { worker, load, queue, held } = lease;
    let id = worker.next_id();
    let died = |detail: &str| Error::WorkerDied { model: model.to_owned(), detail: detail.to_owned() };
    let mut embedded = Embedded { vectors: vec![Vec::new(); request.inputs.len()], ..Embedded::default() };
    let events = worker.routes.enter(id, request.inputs.len() + 8, Box::new(held));
    let events = events.ok_or_else(|| died("it ended before the request reached it"))?;
    worker.send(ToWorker::Embed { id, request: Box::new(request) });
    let mut running = Generation { id, worker, events };
    loop {
        // As long as vectors come, it works.
        let event = tokio::time::timeout(limit, running.events.recv()).await;
        let late = |_| Error::Deadline { model: model.to_owned(), phase: Phase::FirstToken, seconds: limit.as_secs() };
        match event.map_err(late)?.ok_or_else(|| died("it ended"))?? {
            Event::Vector { index, values } => {
                if let Some(vector) = embedded.vectors.get_mut(index) {
                    *vector = values;
                }
            }
            Event::Done { usage, mut timings, .. } => {
                timings.load = load;
                timings.queue += queue;
                return Ok(Embedded { usage, timings, ..embedded });
            }
            _ => {}
        }
    }
}

/// A running generation; dropping it stops the worker's work on it and frees its slot.
struct Generation {
    id: u64,
    worker: Worker,
    events: Events,
}

impl Drop for Generation {
    fn drop(&mut self) {
        // First: whoever gets the place then must find it empty.
        self.worker.send(ToWorker::Cancel { id: self.id });
        self.worker.routes.leave(self.id);
    }
}
