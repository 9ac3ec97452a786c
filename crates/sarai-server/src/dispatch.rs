//! The one loop that tries deployments in order until one answers.
//!
//! Before the first token any failure of a place moves on to the next one. After it, the stream ends with an
//! error event: it is never ended cleanly when it was not finished.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use sarai_api::Served;
use sarai_api::ollama::ignored_by_ollama;
use sarai_core::{Attempt, Error, GenerateRequest, Phase, RemoteCause, Residence};
use sarai_plan::{EngineId, Want};
use tokio::time::timeout;

use crate::backend::ollama::{Hosts, Place};
use crate::backend::{EventStream, local};
use crate::catalog::Catalog;
use crate::config::{Deployment, Model};
use crate::planner::Planner;
use crate::pool::Pool;

/// An answer that has begun: its first event is there.
pub struct Answer {
    /// Who answers.
    pub served: Served,
    /// The events, the first one included.
    pub events: EventStream,
}

/// Whether the client wants its answer whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whole {
    /// Not before its end.
    Yes,
    /// As it comes.
    No,
}

/// One attempt: what is asked of whom.
struct Ask<'a> {
    model: &'a Model,
    deployment: &'a Deployment,
    request: &'a GenerateRequest,
    whole: Whole,
}

impl Ask<'_> {
    fn silent(&self, phase: Phase, limit: Duration) -> Error {
        let seconds = limit.as_secs();
        match self.deployment {
            Deployment::Ollama { url, .. } => {
                Error::Remote { host: url.clone(), cause: RemoteCause::Silent { phase, seconds } }
            }
            Deployment::Local { .. } => Error::Deadline { model: self.model.name.clone(), phase, seconds },
        }
    }
}

/// What the loop works with.
#[derive(Clone, Debug)]
pub struct Dispatch {
    /// Files of local deployments.
    pub catalog: Arc<Catalog>,
    /// Plans of them.
    pub planner: Planner,
    /// Workers.
    pub pool: Pool,
    /// Remote hosts.
    pub hosts: Hosts,
}

impl Dispatch {
    /// Tries the deployments of a model in order.
    ///
    /// # Errors
    /// The request is wrong, or no deployment answered: the only one's error, or all of them.
    pub async fn answer(&self, model: &Model, request: &GenerateRequest, whole: Whole) -> Result<Answer, Error> {
        let mut attempts: Vec<Attempt> = Vec::new();
        for deployment in &model.deployments {
            let ask = Ask { model, deployment, request, whole };
            match self.attempt_twice_if_it_died(&ask).await.map_err(|error| error.of_model(&model.name)) {
                Ok(events) => return Ok(begun(&ask, &attempts, events)),
                Err(error) if error.may_succeed_elsewhere() => {
                    tracing::warn!(deployment = label(model, deployment), %error, "attempt failed");
                    attempts.push(Attempt { deployment: label(model, deployment), error: Box::new(error) });
                }
                Err(error) => return Err(error),
            }
        }
        Err(failed(model, attempts))
    }

    /// A worker that died under a request that nothing was sent of: it may be replayed, once.
    async fn attempt_twice_if_it_died(&self, ask: &Ask<'_>) -> Result<EventStream, Error> {
        match self.attempt(ask).await {
            Err(Error::WorkerDied { .. }) => self.attempt(ask).await,
            other => other,
        }
    }

    async fn attempt(&self, ask: &Ask<'_>) -> Result<EventStream, Error> {
        let deadlines = &ask.model.deadlines;
        let late = || ask.silent(Phase::FirstToken, deadlines.first_token);
        let started = tokio::time::Instant::now();
        let (mut events, left) = match ask.deployment {
            Deployment::Local { engine, context_tokens } => {
                let want = self.want(*engine, *context_tokens, ask.request.residence).await?;
                let place = local::Place {
                    engine: *engine,
                    context_tokens: ask.request.residence.context_tokens.unwrap_or(*context_tokens),
                    model: &ask.model.name,
                };
                let events = local::open(&self.pool, &place, want, deadlines, ask.request.clone()).await?;
                // The load and the queue of a worker have deadlines of their own.
                (events, deadlines.first_token)
            }
            Deployment::Ollama { url, model_name, context_tokens } => {
                let place = Place { url, model_name, context_tokens: *context_tokens, connect: deadlines.connect };
                let opened = timeout(deadlines.first_token, self.hosts.open(&place, ask.request)).await;
                (opened.map_err(|_| late())??, deadlines.first_token.saturating_sub(started.elapsed()))
            }
        };
        let first = timeout(left, events.next()).await.map_err(|_| late())?;
        let first = first.unwrap_or_else(|| Err(Error::Internal("a stream without an end".into())))?;
        let events = with_gaps_limited(first, events, deadlines.gap, ask.silent(Phase::Gap, deadlines.gap));
        match ask.whole {
            Whole::No => Ok(events),
            Whole::Yes => gathered(events).await,
        }
    }

    /// Has the model loaded by the first deployment that can.
    ///
    /// # Errors
    /// None could.
    pub async fn load(&self, model: &Model, residence: Residence) -> Result<(), Error> {
        let mut attempts = Vec::new();
        for deployment in &model.deployments {
            match self.load_at(model, deployment, residence).await {
                Ok(()) => return Ok(()),
                Err(error) => attempts.push(Attempt { deployment: label(model, deployment), error: Box::new(error) }),
            }
        }
        Err(failed(model, attempts))
    }

    async fn load_at(&self, model: &Model, deployment: &Deployment, residence: Residence) -> Result<(), Error> {
        let deadlines = &model.deadlines;
        let late =
            || Error::Deadline { model: model.name.clone(), phase: Phase::Load, seconds: deadlines.load.as_secs() };
        let loaded = async {
            match deployment {
                Deployment::Local { engine, context_tokens } => {
                    let want = self.want(*engine, *context_tokens, residence).await?;
                    self.pool.acquire(*engine, want).await.map(drop)
                }
                Deployment::Ollama { url, model_name, context_tokens } => {
                    let connect = deadlines.connect;
                    let context_tokens = residence.context_tokens.or(*context_tokens);
                    let place = Place { url, model_name, context_tokens, connect };
                    self.hosts.load(&place, residence.keep_alive).await
                }
            }
        };
        let loaded = timeout(deadlines.load, loaded).await.unwrap_or_else(|_| Err(late()));
        loaded.map_err(|error| error.of_model(&model.name))
    }

    /// What a request needs of an engine: the context that it asks for or that its model has, and what the engine is
    /// usually loaded with.
    ///
    /// # Errors
    /// The engine's file cannot be used.
    pub async fn want(&self, engine: EngineId, context_tokens: u32, residence: Residence) -> Result<Want, Error> {
        let (catalog, planner) = (Arc::clone(&self.catalog), self.planner.clone());
        let needed = residence.context_tokens.unwrap_or(context_tokens);
        let want = move || {
            let file = catalog.file(engine)?;
            let settings = catalog.engines[engine.0].settings;
            Ok(Want {
                needed: planner.size(&file, settings, needed),
                usual: planner.size(&file, settings, settings.context_tokens),
                keep_alive: residence.keep_alive,
            })
        };
        let made = tokio::task::spawn_blocking(want).await;
        made.unwrap_or_else(|error| Err(Error::Internal(error.to_string())))
    }
}

fn begun(ask: &Ask<'_>, attempts: &[Attempt], events: EventStream) -> Answer {
    let reasons: Vec<_> = attempts.iter().map(|attempt| format!("{}: {}", attempt.deployment, attempt.error)).collect();
    let degraded = match ask.deployment {
        Deployment::Ollama { .. } => ignored_by_ollama(&ask.request.sampling),
        Deployment::Local { .. } => Vec::new(),
    };
    let fallback_reason = (!reasons.is_empty()).then(|| reasons.join("; "));
    Answer { served: Served { by: label(ask.model, ask.deployment), fallback_reason, degraded }, events }
}

/// What is said when no deployment answered. A prompt that is too long for all of them is the client's matter.
fn failed(model: &Model, mut attempts: Vec<Attempt>) -> Error {
    let too_long = attempts.iter().position(|attempt| matches!(*attempt.error, Error::ContextOverflow { .. }));
    match (attempts.len(), too_long) {
        (0, _) => Error::Unavailable {
            model: model.name.clone(),
            reason: "no deployment of it answers requests in this version".into(),
        },
        (_, Some(index)) => *attempts.swap_remove(index).error,
        (1, None) => *attempts.swap_remove(0).error,
        _ => Error::AllFailed { model: model.name.clone(), attempts },
    }
}

/// An answer that nothing is sent of before it is whole: if it is cut, the next deployment may still give it.
async fn gathered(mut events: EventStream) -> Result<EventStream, Error> {
    let mut whole = Vec::new();
    while let Some(event) = events.next().await {
        whole.push(Ok(event?));
    }
    Ok(Box::pin(stream::iter(whole)))
}

/// `model@place`, as it stands in headers and errors.
pub fn label(model: &Model, deployment: &Deployment) -> String {
    match deployment {
        Deployment::Local { .. } => format!("{}@gguf_native", model.name),
        Deployment::Ollama { url, .. } => {
            let host = url.split_once("://").map_or(url.as_str(), |(_, host)| host);
            format!("{}@ollama_http({host})", model.name)
        }
    }
}

/// The stream with its first event in front; a gap longer than the limit ends it with an error.
fn with_gaps_limited(first: sarai_core::Event, rest: EventStream, gap: Duration, late: Error) -> EventStream {
    let rest = stream::unfold(Some((rest, late)), move |state| async move {
        let (mut rest, late) = state?;
        match timeout(gap, rest.next()).await {
            Ok(Some(event)) => Some((event, Some((rest, late)))),
            Ok(None) => None,
            Err(_) => Some((Err(late), None)),
        }
    });
    Box::pin(stream::once(async { Ok(first) }).chain(rest))
}
