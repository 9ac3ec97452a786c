//! Permits: so many requests are answered at a time, so many more may wait, further ones are shed.
//!
//! Who waits for somebody else, a host that is busy, waits without a permit: a slow host does not keep those from their answers who ask
//! for other models.

use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use sarai_core::{Error, Lane};

use crate::lanes::{Closed, Place, Places};

/// The place where permits are handed out.
#[derive(Debug)]
pub struct Admission {
    permits: Places,
    max_in_flight: usize,
    max_queued: usize,
    deadline: Duration,
    waiting: AtomicUsize,
    /// Requests that are answered, those that came from a host's queue and found no permit among them.
    answered: AtomicUsize,
}

impl Admission {
    /// Permits for so many requests at a time.
    pub fn new(max_in_flight: usize, max_queued: usize, deadline: Duration) -> Self {
        let permits = Places::new(max_in_flight);
        Self {
            permits,
            max_in_flight,
            max_queued,
            deadline,
            waiting: AtomicUsize::new(0),
            answered: AtomicUsize::new(0),
        }
    }

    /// Takes a permit; it is given back when the ticket is dropped.
    ///
    /// # Errors
    /// [`Error::Overloaded`] if the queue is full or the wait took too long.
    pub async fn admit(self: &Arc<Self>, lane: Lane) -> Result<Ticket, Error> {
        let permit = match self.permits.try_take(lane) {
            Some(permit) => permit,
            None => {
                let _place = Waiting::enter(self).ok_or_else(|| self.overloaded())?;
                self.acquire(lane).await?
            }
        };
        self.answered.fetch_add(1, Ordering::Relaxed);
        Ok(Ticket { admission: Arc::clone(self), lane, permit: Mutex::new(Some(permit)) })
    }

    async fn acquire(&self, lane: Lane) -> Result<Place, Error> {
        match tokio::time::timeout(self.deadline, self.permits.take(lane)).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(Closed)) => Err(Error::ShuttingDown),
            Err(_) => Err(self.overloaded()),
        }
    }

    /// Requests that are answered now.
    pub fn in_flight(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }

    /// Requests that wait for a permit.
    pub fn queued(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// That no more can be taken now.
    pub fn overloaded(&self) -> Error {
        Error::Overloaded { in_flight: self.max_in_flight, queued: self.waiting.load(Ordering::Relaxed) }
    }
}

/// A request's permit.
#[derive(Debug)]
pub struct Ticket {
    admission: Arc<Admission>,
    lane: Lane,
    /// None while it waits for somebody else; the lock is held for a moment only.
    permit: Mutex<Option<Place>>,
}

impl Ticket {
    /// Waits for somebody else, in the queue and without the permit, unless the queue is full. Whoever has what it waited for goes
    /// on with it, also if there is no permit just then: what is waited for has a limit of its own, and is not held for another one.
    ///
    /// # Cancel safety
    /// Whoever does not wait any more has left the queue, and has no permit.
    pub async fn aside<T>(&self, wait: impl Future<Output = T>) -> T {
        let mut wait = pin!(wait);
        if let Some(value) = wait.as_mut().now_or_never() {
            return value;
        }
        let Some(place) = Waiting::enter(&self.admission) else { return wait.await };
        drop(self.replace(None));
        let not_answered = NotAnswered::begin(&self.admission);
        let value = wait.await;
        drop((place, not_answered));
        self.replace(self.admission.permits.try_take(self.lane));
        value
    }

    fn replace(&self, permit: Option<Place>) -> Option<Place> {
        std::mem::replace(&mut *self.permit.lock().unwrap_or_else(PoisonError::into_inner), permit)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.admission.answered.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request that has its turn and waits for somebody else.
struct NotAnswered<'a>(&'a Admission);

impl<'a> NotAnswered<'a> {
    fn begin(admission: &'a Admission) -> Self {
        admission.answered.fetch_sub(1, Ordering::Relaxed);
        Self(admission)
    }
}

impl Drop for NotAnswered<'_> {
    fn drop(&mut self) {
        self.0.answered.fetch_add(1, Ordering::Relaxed);
    }
}

/// A place in the queue, left on drop.
struct Waiting<'a>(&'a Admission);

impl<'a> Waiting<'a> {
    fn enter(admission: &'a Admission) -> Option<Self> {
        let enters = |waiting| (waiting < admission.max_queued).then_some(waiting + 1);
        admission.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enters).ok()?;
        Some(Self(admission))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn beyond_the_queue_requests_are_shed_and_a_freed_permit_goes_to_the_one_who_waits() {
        let admission = Arc::new(Admission::new(1, 1, Duration::from_secs(5)));
        let first = admission.admit(Lane::Interactive).await.unwrap();
        let second = tokio::spawn({
            let admission = Arc::clone(&admission);
            async move { admission.admit(Lane::Interactive).await }
        });
        tokio::task::yield_now().await;
        assert!(matches!(admission.admit(Lane::Interactive).await, Err(Error::Overloaded { in_flight: 1, queued: 1 })));
        drop(first);
        assert!(second.await.unwrap().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_with_its_deadline() {
        let admission = Arc::new(Admission::new(1, 1, Duration::from_secs(5)));
        let _held = admission.admit(Lane::Interactive).await.unwrap();
        assert!(matches!(admission.admit(Lane::Interactive).await, Err(Error::Overloaded { .. })));
        assert_eq!(admission.waiting.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_somebody_else_keeps_nobody_from_a_permit_and_stands_in_the_queue() {
        let admission = Arc::new(Admission::new(1, 1, Duration::from_secs(5)));
        let ticket = admission.admit(Lane::Interactive).await.unwrap();
        let (done, waits) = tokio::sync::oneshot::channel::<u8>();
        let waiting = tokio::spawn(async move { (ticket.aside(waits).await, ticket) });
        tokio::task::yield_now().await;
        assert_eq!((admission.in_flight(), admission.queued()), (0, 1));
        let other = admission.admit(Lane::Interactive).await.unwrap();
        assert!(matches!(admission.admit(Lane::Interactive).await, Err(Error::Overloaded { in_flight: 1, queued: 1 })));
        done.send(7).unwrap();
        tokio::task::yield_now().await;
        let (value, ticket) = waiting.await.unwrap();
        assert_eq!(
            (value.unwrap(), admission.in_flight(), admission.queued()),
            (7, 2, 0),
            "it goes on without a permit"
        );
        drop(other);
        let waits = ticket.aside(tokio::task::yield_now());
        waits.await;
        assert_eq!(admission.in_flight(), 1, "and has one where there is one");
        assert_eq!(ticket.aside(async { 3 }).await, 3, "what is there is not waited for");
        // Where the queue is full, it waits with its permit.
        let full = Arc::new(Admission::new(1, 0, Duration::from_secs(5)));
        let ticket = full.admit(Lane::Interactive).await.unwrap();
        let kept = ticket.aside(async {
            tokio::task::yield_now().await;
            full.in_flight()
        });
        assert_eq!(kept.await, 1);
    }
}
