//! Permits: so many requests are answered at a time, so many more may wait, further ones are shed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sarai_core::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The place where permits are handed out.
#[derive(Debug)]
pub struct Admission {
    permits: Arc<Semaphore>,
    max_in_flight: usize,
    max_queued: usize,
    deadline: Duration,
    waiting: AtomicUsize,
}

impl Admission {
    /// Permits for so many requests at a time.
    pub fn new(max_in_flight: usize, max_queued: usize, deadline: Duration) -> Self {
        let permits = Arc::new(Semaphore::new(max_in_flight));
        Self { permits, max_in_flight, max_queued, deadline, waiting: AtomicUsize::new(0) }
    }

    /// Takes a permit; it is given back when the guard is dropped.
    ///
    /// # Errors
    /// [`Error::Overloaded`] if the queue is full or the wait took too long.
    pub async fn admit(&self) -> Result<OwnedSemaphorePermit, Error> {
        if let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() {
            return Ok(permit);
        }
        let place = Waiting::enter(&self.waiting);
        if place.queued > self.max_queued {
            return Err(self.overloaded());
        }
        let wait = tokio::time::timeout(self.deadline, Arc::clone(&self.permits).acquire_owned()).await;
        match wait {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) => Err(Error::ShuttingDown),
            Err(_) => Err(self.overloaded()),
        }
    }

    /// Requests that are answered now.
    pub fn in_flight(&self) -> usize {
        self.max_in_flight.saturating_sub(self.permits.available_permits())
    }

    /// Requests that wait for a permit.
    pub fn queued(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    fn overloaded(&self) -> Error {
        let queued = self.waiting.load(Ordering::Relaxed).saturating_sub(1);
        Error::Overloaded { in_flight: self.max_in_flight, queued }
    }
}

/// A place in the queue, left on drop.
struct Waiting<'a> {
    count: &'a AtomicUsize,
    queued: usize,
}

impl<'a> Waiting<'a> {
    fn enter(count: &'a AtomicUsize) -> Self {
        Self { count, queued: count.fetch_add(1, Ordering::Relaxed) + 1 }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn beyond_the_queue_requests_are_shed_and_a_freed_permit_goes_to_the_one_who_waits() {
        let admission = Arc::new(Admission::new(1, 1, Duration::from_secs(5)));
        let first = admission.admit().await.unwrap();
        let second = tokio::spawn({
            let admission = Arc::clone(&admission);
            async move { admission.admit().await }
        });
        tokio::task::yield_now().await;
        assert!(matches!(admission.admit().await, Err(Error::Overloaded { in_flight: 1, queued: 1 })));
        drop(first);
        assert!(second.await.unwrap().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_with_its_deadline() {
        let admission = Admission::new(1, 1, Duration::from_secs(5));
        let _held = admission.admit().await.unwrap();
        assert!(matches!(admission.admit().await, Err(Error::Overloaded { .. })));
        assert_eq!(admission.waiting.load(Ordering::Relaxed), 0);
    }
}
