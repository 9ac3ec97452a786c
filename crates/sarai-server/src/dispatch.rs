//! The one loop that tries deployments in order until one answers.
//!
//! Before the first token any failure of a place moves on to the next one. After it, the stream ends with an
//! error event: it is never ended cleanly when it was not finished.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use sarai_api::Served;
use sarai_api::ollama::ignored_by_ollama;
use sarai_core::{Attempt, Error, GenerateRequest, Phase, RemoteCause};
use sarai_plan::EngineId;
use tokio::time::timeout;

use crate::backend::ollama::{Hosts, Place};
use crate::backend::{EventStream, local};
use crate::catalog::Catalog;
use crate::config::{Deployment, Model};
use crate::pool::Pool;

/// An answer that has begun: its first event is there.
pub struct Answer {
    /// Who answers.
    pub served: Served,
    /// The events, the first one included.
    pub events: EventStream,
}

/// What the loop works with.
#[derive(Clone, Debug)]
pub struct Dispatch {
    /// Files of local deployments.
    pub catalog: Arc<Catalog>,
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
    pub async fn answer(&self, model: &Model, request: GenerateRequest) -> Result<Answer, Error> {
        let mut attempts: Vec<Attempt> = Vec::new();
        for deployment in &model.deployments {
            match self.attempt_twice_if_it_died(model, deployment, &request).await {
                Ok(events) => return Ok(begun(model, deployment, &request, &attempts, events)),
                Err(error) if error.may_succeed_elsewhere() => {
                    tracing::warn!(deployment = label(model, deployment), %error, "attempt failed");
                    attempts.push(Attempt { deployment: label(model, deployment), error: Box::new(error) });
                }
                Err(error) => return Err(error),
            }
        }
        match attempts.len() {
            0 => Err(Error::Unavailable {
                model: model.name.clone(),
                reason: "no deployment of it answers requests in this version".into(),
            }),
            1 => Err(*attempts.remove(0).error),
            _ => Err(Error::AllFailed { model: model.name.clone(), attempts }),
        }
    }

    /// A worker that dies before the first token has sent nothing: the request may be replayed, once.
    async fn attempt_twice_if_it_died(
        &self,
        model: &Model,
        deployment: &Deployment,
        request: &GenerateRequest,
    ) -> Result<EventStream, Error> {
        match self.attempt(model, deployment, request).await {
            Err(Error::WorkerDied { .. }) => self.attempt(model, deployment, request).await,
            other => other,
        }
    }

    async fn attempt(
        &self,
        model: &Model,
        deployment: &Deployment,
        request: &GenerateRequest,
    ) -> Result<EventStream, Error> {
        let deadlines = &model.deadlines;
        let silent = |phase, limit: Duration| match deployment {
            Deployment::Ollama { url, .. } => {
                Error::Remote { host: url.clone(), cause: RemoteCause::Silent { phase, seconds: limit.as_secs() } }
            }
            Deployment::Local(_) => Error::Deadline { model: model.name.clone(), phase, seconds: limit.as_secs() },
        };
        let late = || silent(Phase::FirstToken, deadlines.first_token);
        let started = tokio::time::Instant::now();
        let mut events = match deployment {
            Deployment::Local(engine) => {
                let plan = self.file(*engine).await?.plan.clone();
                local::open(&self.pool, *engine, plan, &model.name, deadlines, request.clone()).await?
            }
            Deployment::Ollama { url, model_name, context_tokens } => {
                let place = Place { url, model_name, context_tokens: *context_tokens, connect: deadlines.connect };
                timeout(deadlines.first_token, self.hosts.open(&place, request)).await.map_err(|_| late())??
            }
        };
        let left = match deployment {
            // The load and the queue of a worker have deadlines of their own.
            Deployment::Local(_) => deadlines.first_token,
            Deployment::Ollama { .. } => deadlines.first_token.saturating_sub(started.elapsed()),
        };
        let first = timeout(left, events.next()).await.map_err(|_| late())?;
        let first = first.unwrap_or_else(|| Err(Error::Internal("a stream without an end".into())))?;
        Ok(with_gaps_limited(first, events, deadlines.gap, silent(Phase::Gap, deadlines.gap)))
    }

    async fn file(&self, engine: EngineId) -> Result<Arc<crate::catalog::File>, Error> {
        let catalog = Arc::clone(&self.catalog);
        let read = tokio::task::spawn_blocking(move || catalog.file(engine)).await;
        read.unwrap_or_else(|error| Err(Error::Internal(error.to_string())))
    }
}

fn begun(
    model: &Model,
    deployment: &Deployment,
    request: &GenerateRequest,
    attempts: &[Attempt],
    events: EventStream,
) -> Answer {
    let reasons: Vec<_> = attempts.iter().map(|attempt| format!("{}: {}", attempt.deployment, attempt.error)).collect();
    let degraded = match deployment {
        Deployment::Ollama { .. } => ignored_by_ollama(&request.sampling),
        Deployment::Local(_) => Vec::new(),
    };
    let fallback_reason = (!reasons.is_empty()).then(|| reasons.join("; "));
    Answer { served: Served { by: label(model, deployment), fallback_reason, degraded }, events }
}

/// `model@place`, as it stands in headers and errors.
pub fn label(model: &Model, deployment: &Deployment) -> String {
    match deployment {
        Deployment::Local(_) => format!("{}@gguf_native", model.name),
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
