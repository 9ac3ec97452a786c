//! Which request the frames of a worker belong to.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

use sarai_core::{Error, Event};
use tokio::sync::mpsc;

/// The events of one request, as they arrive.
pub type Events = mpsc::Receiver<Result<Event, Error>>;

/// What a request holds for as long as the worker works on it: whoever reads slowly holds nothing longer.
pub type Held = Box<dyn Debug + Send>;

type Table = HashMap<u64, (mpsc::Sender<Result<Event, Error>>, Held)>;

/// The requests that a worker is answering. The lock is held for look-ups only, never across a wait.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    table: Arc<Mutex<Option<Table>>>,
}

impl Routes {
    /// An empty table that is open.
    pub fn open() -> Self {
        Self { table: Arc::new(Mutex::new(Some(HashMap::new()))) }
    }

    /// Enters a request; `None` when the worker has ended. The channel holds `capacity` events, which must be
    /// all that one answer can have: then a slow reader delays nobody else. What is held is let go of with the last event.
    pub fn enter(&self, id: u64, capacity: usize, held: Held) -> Option<Events> {
        let (sender, receiver) = mpsc::channel(capacity);
        self.table.lock().unwrap_or_else(PoisonError::into_inner).as_mut()?.insert(id, (sender, held));
        Some(receiver)
    }

    /// Takes a request out.
    pub fn leave(&self, id: u64) {
        if let Some(table) = self.table.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            table.remove(&id);
        }
    }

    /// Passes an event on; the last one of a request takes it out.
    pub fn pass(&self, id: u64, event: Result<Event, Error>) {
        let last = matches!(event, Ok(Event::Done { .. }) | Err(_));
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(table) = table.as_mut() else { return };
        if let Some((sender, _)) = table.get(&id) {
            let delivered = sender.try_send(event).is_ok();
            if last || !delivered {
                table.remove(&id);
            }
        }
    }

    /// Ends every request with this error, and lets none in any more.
    pub fn close(&self, error: &Error) {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner).take();
        for (sender, _held) in table.into_iter().flat_map(HashMap::into_values) {
            let _ = sender.try_send(Err(error.clone()));
        }
    }
}
