//! Places that are handed out one by one: to interactive requests in their order, and to bulk ones when none of those waits.
//!
//! Bulk never takes the last place of several, and a bulk request that has waited for long stands before interactive ones that came
//! much later: nobody waits for ever.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sarai_core::Lane;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// A bulk request stands in the queue as if it had come so much later.
const LATER: Duration = Duration::from_secs(30);

/// So many places.
#[derive(Clone, Debug)]
pub struct Places(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    places: usize,
    taken: usize,
    /// How many of them are bulk's.
    bulk: usize,
    is_closed: bool,
    interactive: VecDeque<Waiting>,
    bulks: VecDeque<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    since: Instant,
    gets: oneshot::Sender<Place>,
}

/// A place; given back on drop.
#[derive(Debug)]
pub struct Place {
    places: Places,
    lane: Lane,
}

/// There are no places any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

impl Places {
    /// All of them free.
    pub fn new(places: usize) -> Self {
        let (interactive, bulks) = (VecDeque::new(), VecDeque::new());
        Self(Arc::new(Mutex::new(State { places, taken: 0, bulk: 0, is_closed: false, interactive, bulks })))
    }

    /// A place, if one is free for this lane and nobody waits for it.
    pub fn try_take(&self, lane: Lane) -> Option<Place> {
        let mut state = self.state();
        let is_next = match lane {
            Lane::Interactive => state.interactive.is_empty(),
            Lane::Bulk => state.interactive.is_empty() && state.bulks.is_empty() && state.has_room_for_bulk(),
        };
        (is_next && !state.is_closed && state.taken < state.places).then(|| state.take(self, lane))
    }

    /// Waits for a place.
    ///
    /// # Errors
    /// There are no places any more.
    ///
    /// # Cancel safety
    /// Whoever does not wait any more has left the queue.
    pub async fn take(&self, lane: Lane) -> Result<Place, Closed> {
        let (gets, got) = oneshot::channel();
        {
            let mut state = self.state();
            if state.is_closed {
                return Err(Closed);
            }
            let queue = state.queue(lane);
            queue.retain(|waiting| !waiting.gets.is_closed());
            queue.push_back(Waiting { since: Instant::now(), gets });
        }
        self.hand_out();
        got.await.map_err(|_| Closed)
    }

    /// Changes how many there are; who has one beyond that keeps it.
    pub fn limit(&self, places: usize) {
        self.state().places = places;
        self.hand_out();
    }

    /// How many are taken.
    pub fn taken(&self) -> usize {
        self.state().taken
    }

    /// Nobody gets a place any more.
    pub fn close(&self) {
        let mut state = self.state();
        state.is_closed = true;
        state.interactive.clear();
        state.bulks.clear();
    }

    /// Gives what is free to those who wait. Whoever leaves in this moment gives it back, which is why it is not done under the lock.
    fn hand_out(&self) {
        loop {
            let (waiting, place) = {
                let mut state = self.state();
                let Some(lane) = state.next() else { return };
                let Some(waiting) = state.queue(lane).pop_front() else { return };
                if waiting.gets.is_closed() {
                    continue;
                }
                (waiting, state.take(self, lane))
            };
            // If it is refused, it is dropped here.
            let _ = waiting.gets.send(place);
        }
    }

    #[cfg(test)]
    fn free(&self) -> usize {
        let state = self.state();
        state.places.saturating_sub(state.taken)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn queue(&mut self, lane: Lane) -> &mut VecDeque<Waiting> {
        match lane {
            Lane::Interactive => &mut self.interactive,
            Lane::Bulk => &mut self.bulks,
        }
    }

    fn take(&mut self, places: &Places, lane: Lane) -> Place {
        self.taken += 1;
        self.bulk += usize::from(lane == Lane::Bulk);
        Place { places: places.clone(), lane }
    }

    fn has_room_for_bulk(&self) -> bool {
        self.bulk < self.places.saturating_sub(1).max(1)
    }

    /// Whose turn it is, if there is a place.
    fn next(&self) -> Option<Lane> {
        if self.taken >= self.places {
            return None;
        }
        let bulk = self.bulks.front().filter(|_| self.has_room_for_bulk());
        match (self.interactive.front(), bulk) {
            (Some(interactive), Some(bulk)) if bulk.since + LATER < interactive.since => Some(Lane::Bulk),
            (Some(_), _) => Some(Lane::Interactive),
            (None, bulk) => bulk.map(|_| Lane::Bulk),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        {
            let mut state = self.places.state();
            state.taken -= 1;
            state.bulk -= usize::from(self.lane == Lane::Bulk);
        }
        self.places.hand_out();
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use Lane::{Bulk, Interactive};
    use futures_util::FutureExt;
    use std::pin::pin;
    use tokio::time::advance;

    #[tokio::test(start_paused = true)]
    async fn interactive_requests_go_first_each_lane_in_its_order() {
        let places = Places::new(1);
        let held = places.take(Interactive).await.unwrap();
        let waits = |lane| {
            let places = places.clone();
            Box::pin(async move { places.take(lane).await })
        };
        let mut waiting = [Bulk, Bulk, Interactive, Interactive].map(waits);
        for wait in &mut waiting {
            assert!(wait.now_or_never().is_none());
        }
        drop(held);
        let mut order = Vec::new();
        while order.len() < 4 {
            let ready = waiting.iter_mut().enumerate().filter(|(index, _)| !order.contains(index));
            let ready: Vec<_> =
                ready.filter_map(|(index, wait)| Some((index, wait.now_or_never()?.unwrap()))).collect();
            assert_eq!(ready.len(), 1, "one place");
            order.push(ready[0].0);
        }
        assert_eq!(order, [2, 3, 0, 1]);
        assert_eq!(places.free(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_waited_for_long_goes_before_those_that_came_much_later() {
        let places = Places::new(1);
        let held = places.take(Interactive).await.unwrap();
        let (mut bulk, mut soon, mut late) =
            (pin!(places.take(Bulk)), pin!(places.take(Interactive)), pin!(places.take(Interactive)));
        assert!(bulk.as_mut().now_or_never().is_none() && soon.as_mut().now_or_never().is_none());
        advance(LATER + Duration::from_millis(1)).await;
        assert!(late.as_mut().now_or_never().is_none());
        drop(held);
        drop(soon.as_mut().now_or_never().unwrap().unwrap());
        assert!(late.as_mut().now_or_never().is_none(), "the bulk request has its turn");
        drop(bulk.as_mut().now_or_never().unwrap().unwrap());
        assert!(late.as_mut().now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn bulk_leaves_one_of_several_places_and_whoever_leaves_takes_none() {
        let places = Places::new(3);
        let bulks = [places.try_take(Bulk).unwrap(), places.try_take(Bulk).unwrap()];
        assert!(places.try_take(Bulk).is_none() && places.free() == 1);
        {
            let mut left = pin!(places.take(Bulk));
            assert!(left.as_mut().now_or_never().is_none());
        }
        let last = places.try_take(Interactive).unwrap();
        let mut left = Box::pin(places.take(Interactive));
        assert!(left.as_mut().now_or_never().is_none());
        drop(last);
        // It has a place that it never took.
        drop(left);
        assert_eq!(places.free(), 1);
        drop(bulks);
        assert_eq!((places.free(), places.try_take(Bulk).is_some()), (3, true));
        let mut waits = pin!(places.take(Interactive));
        let all = [0; 3].map(|_| places.try_take(Interactive).unwrap());
        assert!(waits.as_mut().now_or_never().is_none());
        places.close();
        assert_eq!(waits.as_mut().now_or_never().unwrap().unwrap_err(), Closed);
        drop(all);
        assert_eq!(places.take(Bulk).await.unwrap_err(), Closed);
    }
}
