//! Streams whose answer has not begun: while a model is loaded for it, the client is told so.
//!
//! Until an answer begins, a failure still has its own status, so nothing is sent. A long load, and an answer that is checked before it is
//! sent, are the exceptions: clients and proxies give up on a server that says nothing for long.

use std::pin::Pin;

use futures_util::stream::{self, BoxStream, StreamExt};
use sarai_api::{Parsed, Served};
use sarai_core::{Error, Event};

use super::App;
use crate::dispatch::{Answer, Terms};

/// An answer to come.
type Coming = Pin<Box<dyn Future<Output = Result<Answer, Error>> + Send>>;

/// A stream, as far as it is known.
pub enum Begun {
    /// It has begun.
    Answer(Answer),
    /// A model is loaded for it, or it is held back.
    Waiting(Waiting),
}

/// A stream that waits for its first word.
pub struct Waiting {
    app: App,
    model: String,
    coming: Coming,
}

/// What becomes of it.
pub enum Step {
    /// It still waits; how far the load has come.
    Waits(Option<u8>),
    /// It has begun.
    Begins(Box<Served>),
    /// A step of the answer.
    Says(Result<Event, Error>),
}

/// Waits until an answer begins, or for as long as it is waited without a word.
///
/// # Errors
/// It cannot begin.
pub async fn begin(app: App, parsed: Parsed, terms: Terms) -> Result<Begun, Error> {
    let (gateway, model, is_held_back) = (app.gateway.clone(), parsed.model.clone(), app.gateway.holds_back(&parsed));
    let mut coming: Coming = Box::pin(async move { gateway.answer(parsed, terms).await });
    loop {
        let answer = tokio::time::timeout(app.heartbeat, &mut coming).await;
        match answer {
            Ok(answer) => return answer.map(Begun::Answer),
            Err(_) if is_held_back || app.gateway.loading(&model).await.is_some() => {
                return Ok(Begun::Waiting(Waiting { app, model, coming }));
            }
            Err(_) => {}
        }
    }
}

impl Waiting {
    /// All that comes, the first word of the load at once.
    pub fn steps(self) -> BoxStream<'static, Step> {
        let words = stream::unfold((Some(self), true), |(waiting, is_first)| async move {
            let Waiting { app, model, mut coming } = waiting?;
            if !is_first && let Ok(answer) = tokio::time::timeout(app.heartbeat, &mut coming).await {
                return Some((answered(answer), (None, false)));
            }
            let percent = app.gateway.loading(&model).await;
            let waits = stream::iter([Step::Waits(percent)]).boxed();
            Some((waits, (Some(Self { app, model, coming }), false)))
        });
        words.flatten().boxed()
    }
}

/// An answer that has begun, or why it has not, step by step.
pub fn answered(answer: Result<Answer, Error>) -> BoxStream<'static, Step> {
    match answer {
        Ok(Answer { served, events }) => {
            stream::iter([Step::Begins(Box::new(served))]).chain(events.map(Step::Says)).boxed()
        }
        Err(error) => stream::iter([Step::Says(Err(error))]).boxed(),
    }
}
