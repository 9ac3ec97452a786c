//! An answer as the body of a response, and an answer collected whole.

use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use sarai_core::{Error, Event, FinishReason, Timings, Usage};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::backend::EventStream;

/// Pieces that wait for a slow client at most.
const WAITING_PIECES: usize = 64;

/// Streams an answer. A client that goes away, or leaves it unread for `stall`, ends it and frees all it holds.
pub fn body(
    mut events: EventStream,
    stall: Duration,
    first: Option<Bytes>,
    mut encode: impl FnMut(Result<Event, Error>) -> Bytes + Send + 'static,
) -> Body {
    let (sender, receiver) = mpsc::channel(WAITING_PIECES);
    // What is there already goes out with the headers, in one write.
    let ready = events.next().now_or_never().flatten().map(&mut encode);
    for piece in first.into_iter().chain(ready) {
        let _ = sender.try_send(Ok::<_, std::convert::Infallible>(piece));
    }
    // Owned by the response: it ends when the body is dropped, since the channel is then closed.
    tokio::spawn(async move {
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = sender.closed() => return,
            };
            let Some(event) = event else { return };
            match tokio::time::timeout(stall, sender.send(Ok(encode(event)))).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return,
                Err(_) => {
                    tracing::info!(seconds = stall.as_secs(), "a client left its answer unread; it is dropped");
                    return;
                }
            }
        }
    });
    Body::from_stream(ReceiverStream::new(receiver))
}

/// A whole answer.
pub struct Whole {
    /// The text.
    pub text: String,
    /// Why it ended.
    pub finish: FinishReason,
    /// Tokens.
    pub usage: Usage,
    /// Time.
    pub timings: Timings,
}

/// Collects an answer.
///
/// # Errors
/// It ended with an error, or without an end.
pub async fn collect(mut events: EventStream) -> Result<Whole, Error> {
    let mut text = String::new();
    while let Some(event) = events.next().await {
        match event? {
            Event::Text(more) => text.push_str(&more),
            Event::Done { finish, usage, timings } => return Ok(Whole { text, finish, usage, timings }),
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
        let _unread = body(endless(held), Duration::from_secs(60), None, |_| Bytes::from_static(b"x"));
        freed.await.unwrap_err();
        assert_eq!(started.elapsed().as_secs(), 60);
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
