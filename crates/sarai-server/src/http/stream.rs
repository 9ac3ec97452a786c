//! An answer as the body of a response, and an answer collected whole.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use sarai_api::Whole;
use sarai_core::{Error, Event, Extra, FinishReason, ToolCall};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::backend::EventStream;

/// Streams an answer. A client that goes away, or leaves it unread for `stall`, ends it and frees all it holds.
///
/// The connection polls the answer itself: a channel between them costs a task switch per token, which shows when
/// all cores compute.
pub fn body<T: 'static>(
    events: Steps<T>,
    stall: Duration,
    first: impl IntoIterator<Item = Bytes>,
    encode: impl FnMut(T) -> Bytes + Send + Unpin + 'static,
) -> Body {
    let reading = Arc::new(Mutex::new(Reading { events: Some(events), unread_since: Some(Instant::now()) }));
    let (alive, gone) = oneshot::channel();
    // Owned by the body: it ends when `alive` is dropped with it.
    tokio::spawn(watch(Arc::downgrade(&reading), stall, gone));
    Body::from_stream(Pieces { reading, waiting: first.into_iter().collect(), encode, _alive: alive })
}

/// What a body is written of.
pub type Steps<T> = Pin<Box<dyn Stream<Item = T> + Send>>;

/// An answer, and since when its client has left it unread.
struct Reading<T> {
    /// Taken when the client is given up.
    events: Option<Steps<T>>,
    /// `None` while the answer, not the client, is waited for.
    unread_since: Option<Instant>,
}

type Shared<T> = Mutex<Reading<T>>;

/// Drops the answer when its client has left it unread for `stall`.
async fn watch<T>(reading: Weak<Shared<T>>, stall: Duration, mut gone: oneshot::Receiver<()>) {
    loop {
        let Some(since) = reading.upgrade().map(|reading| lock(&reading).unread_since) else { return };
        tokio::select! {
            () = tokio::time::sleep_until(since.unwrap_or_else(Instant::now) + stall) => {}
            _ = &mut gone => return,
        }
        let Some(reading) = reading.upgrade() else { return };
        let mut reading = lock(&reading);
        if reading.unread_since.is_some_and(|since| since.elapsed() >= stall) {
            tracing::info!(seconds = stall.as_secs(), "a client left its answer unread; it is dropped");
            reading.events = None;
            return;
        }
    }
}

/// Locked for a poll only, never across a wait.
fn lock<T>(reading: &Shared<T>) -> std::sync::MutexGuard<'_, Reading<T>> {
    reading.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Pieces<T, F> {
    reading: Arc<Shared<T>>,
    waiting: VecDeque<Bytes>,
    encode: F,
    _alive: oneshot::Sender<()>,
}

impl<T, F: FnMut(T) -> Bytes + Unpin> Stream for Pieces<T, F> {
    type Item = io::Result<Bytes>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if let Some(piece) = this.waiting.pop_front() {
            return Poll::Ready(Some(Ok(piece)));
        }
        let mut reading = lock(&this.reading);
        loop {
            let polled = match &mut reading.events {
                Some(events) => events.poll_next_unpin(context),
                // The connection is broken off, so that what came through does not look like all of it.
                None => return Poll::Ready(Some(Err(io::ErrorKind::TimedOut.into()))),
            };
            reading.unread_since = polled.is_ready().then(Instant::now);
            let piece = polled.map(|event| event.map(&mut this.encode));
            // Some events are nothing to send, and an empty piece would end the body.
            if !matches!(&piece, Poll::Ready(Some(bytes)) if bytes.is_empty()) {
                return piece.map(|bytes| bytes.map(Ok));
            }
        }
    }
}

/// Collects an answer.
///
/// # Errors
/// It ended with an error, or without an end.
pub async fn collect(mut events: EventStream) -> Result<Whole, Error> {
    let (mut text, mut reasoning, mut tool_calls) = (String::new(), String::new(), Vec::new());
    let (mut logprobs, mut context, mut extra) = (Vec::new(), Vec::new(), None::<Box<Extra>>);
    while let Some(event) = events.next().await {
        match event? {
            Event::Text(more) => text.push_str(&more),
            Event::Reasoning(more) => reasoning.push_str(&more),
            Event::Logprobs(more) => logprobs.extend(more),
            Event::Context(tokens) => context = tokens,
            Event::ToolCall(part) => part.add_to(&mut tool_calls),
            Event::Extra(more) => {
                text.push_str(&more.text);
                match &mut extra {
                    Some(known) => known.absorb(*more),
                    None => extra = Some(more),
                }
            }
            // Whole answers are not resumed: they are asked for anew.
            Event::Resumed { .. } | Event::Alive | Event::Vector { .. } => {}
            Event::Done { finish, usage, timings } => {
                if finish == FinishReason::Stop {
                    // A text that ends the answer stood within one.
                    tool_calls.retain(ToolCall::is_whole);
                }
                return Ok(Whole { text, reasoning, tool_calls, logprobs, finish, usage, timings, extra, context });
            }
        }
    }
    Err(Error::Internal("the answer ended without its end mark".into()))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use futures_util::stream;

    fn endless(held: tokio::sync::oneshot::Sender<()>) -> EventStream {
        Box::pin(stream::repeat_with(move || {
            let _held = &held;
            Ok(Event::Text("word ".into()))
        }))
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_left_unread_is_dropped_after_the_stall_deadline() {
        let (held, freed) = tokio::sync::oneshot::channel();
        let started = tokio::time::Instant::now();
        let unread = body(endless(held), Duration::from_secs(60), None, |_| Bytes::from_static(b"x"));
        freed.await.unwrap_err();
        assert_eq!(started.elapsed().as_secs(), 60);
        let read = unread.into_data_stream().next().await.unwrap();
        assert!(read.is_err(), "what came through must not look like all of it");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_whose_body_is_dropped_is_dropped_at_once() {
        let (held, freed) = tokio::sync::oneshot::channel();
        drop(body(endless(held), Duration::from_secs(60), None, |_| Bytes::from_static(b"x")));
        let started = tokio::time::Instant::now();
        freed.await.unwrap_err();
        assert_eq!(started.elapsed().as_secs(), 0);
    }

    #[tokio::test]
    async fn an_answer_without_an_end_mark_is_an_error() {
        let events: EventStream = Box::pin(stream::iter([Ok(Event::Text("half".into()))]));
        assert!(matches!(collect(events).await, Err(Error::Internal(_))));
    }
}
