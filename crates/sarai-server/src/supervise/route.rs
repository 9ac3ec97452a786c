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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use sarai_core::{FinishReason, Timings, Usage};

    use super::*;

    #[derive(Debug)]
    struct Guard(#[expect(dead_code, reason = "it is counted")] Arc<()>);

    /// What the worker has done is done: its place and its share of the cores are others' from then on.
    #[tokio::test]
    async fn what_a_request_holds_is_let_go_of_with_its_last_event_whether_that_is_read_or_not() {
        let routes = Routes::open();
        let held = Arc::new(());
        let enter = |id| routes.enter(id, 4, Box::new(Guard(Arc::clone(&held)))).unwrap();
        let end =
            || Ok(Event::Done { finish: FinishReason::Stop, usage: Usage::default(), timings: Timings::default() });
        let (mut first, _second, _third) = (enter(1), enter(2), enter(3));
        assert_eq!(Arc::strong_count(&held), 4);
        routes.pass(1, Ok(Event::Text("all".into())));
        assert_eq!(Arc::strong_count(&held), 4, "it goes on");
        routes.pass(1, end());
        assert_eq!(Arc::strong_count(&held), 3, "nobody has read it yet");
        assert_eq!((first.recv().await, first.recv().await), (Some(Ok(Event::Text("all".into()))), Some(end())));
        routes.leave(2);
        assert_eq!(Arc::strong_count(&held), 2);
        routes.close(&Error::ShuttingDown);
        assert_eq!(Arc::strong_count(&held), 1);
        assert!(routes.enter(4, 1, Box::new(())).is_none());
    }
}
