//! Guards: an engine that is kept busy, a ticket that is waited with, and a slot of a worker.

use std::time::{Duration, Instant};

use super::{Message, Pool};
use crate::lanes::Place;
use crate::supervise::child::Worker;
use sarai_core::{Deadlines, Error, Lane, Phase};
use sarai_plan::{EngineId, Ticket, Want};

/// Keeps an engine from being unloaded; given back on drop.
#[derive(Debug)]
pub struct Busy {
    engine: EngineId,
    lane: Lane,
    pool: Pool,
}

impl Busy {
    pub(super) const fn new(engine: EngineId, lane: Lane, pool: Pool) -> Self {
        Self { engine, lane, pool }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.pool.send(Message::Released(self.engine, self.lane));
    }
}

/// A place in the queue of the pool; left on drop.
pub(super) struct Waiting {
    pub ticket: Ticket,
    pub pool: Pool,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.pool.send(Message::Abandoned(self.ticket));
    }
}

/// A slot of a loaded worker, for one generation.
#[derive(Debug)]
pub struct Lease {
    /// The worker.
    pub worker: Worker,
    /// How long its load was waited for.
    pub load: Duration,
    /// How long its slot was waited for.
    pub queue: Duration,
    /// Its slot, and what keeps it from being unloaded.
    pub held: (Place, Busy),
}

impl Pool {
    /// Takes a slot of an engine, loading it if need be.
    ///
    /// # Errors
    /// The load was refused, failed or took too long, or no slot came free in time.
    pub async fn lease(
        &self,
        engine: EngineId,
        want: Want,
        model: &str,
        deadlines: &Deadlines,
    ) -> Result<Lease, Error> {
        let late =
            |phase, limit: Duration| Error::Deadline { model: model.to_owned(), phase, seconds: limit.as_secs() };
        let started = Instant::now();
        let lane = want.lane;
        let loaded = tokio::time::timeout(deadlines.load, self.acquire(engine, want)).await;
        let (worker, busy) = loaded.map_err(|_| late(Phase::Load, deadlines.load))??;
        let load = started.elapsed();
        let slot = tokio::time::timeout(deadlines.queue, worker.slots.take(lane)).await;
        let died =
            || Error::WorkerDied { model: model.to_owned(), detail: "it ended while its slot was waited for".into() };
        let slot = slot.map_err(|_| late(Phase::Queue, deadlines.queue))?.map_err(|_| died())?;
        Ok(Lease { worker, load, queue: started.elapsed() - load, held: (slot, busy) })
    }
}
