//! Streams whose answer has not begun: while a model is loaded for it, the client is told so.
//!
//! Until an answer begins, a failure still has its own status, so nothing is sent. A long load is the exception: clients and proxies
//! give up on a server that says nothing for long.

use std::pin::Pin;

use futures_util::stream::{self, BoxStream, StreamExt};
use sarai_api::{Parsed, Served};
use sarai_core::{Error, Event};

use super::App;
use crate::dispatch::Answer;

/// An answer to come.
type Coming = Pin<Box<dyn Future<Output = Result<Answer, Error>> + Send>>;

/// A stream, as far as it is known.
pub enum Begun {
    /// It has begun.
    Answer(Answer),
    /// A model is loaded for it.
    Loading(Waiting),
}

/// A stream that waits for a load.
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
pub async fn begin(app: App, parsed: Parsed, strict: bool) -> Result<Begun, Error> {
    let (gateway, model) = (app.gateway.clone(), parsed.model.clone());
    let mut coming: Coming = Box::pin(async move { gateway.answer(parsed, strict).await });
    loop {
        let answer = tokio::time::timeout(app.heartbeat, &mut coming).await;
        match answer {
            Ok(answer) => return answer.map(Begun::Answer),
            Err(_) if app.gateway.loading(&model).await.is_some() => {
                return Ok(Begun::Loading(Waiting { app, model, coming }));
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
