//! Vectors of texts: by the first deployment of a model that makes them. Vectors of another model mean nothing to those of
//! the one that was asked for, so nobody else stands in.

use std::sync::Arc;

use sarai_api::Served;
use sarai_api::embed::Embedded;
use sarai_core::{Attempt, EmbedRequest, Error, KeepAlive, Phase, Purpose, Residence};
use tokio::time::timeout;

use super::{Dispatch, failed, label};
use crate::backend::{local, remote};
use crate::config::{Deployment, Model, Remote};

impl Dispatch {
    /// Makes vectors, or scores.
    ///
    /// # Errors
    /// The model is none that makes them, or no deployment could.
    pub async fn embed(
        &self,
        model: &Arc<Model>,
        request: &EmbedRequest,
        keep_alive: Option<KeepAlive>,
    ) -> Result<(Served, Embedded), Error> {
        let mut attempts: Vec<Attempt> = Vec::new();
        for deployment in &model.deployments {
            match self.embed_at(model, deployment, request, keep_alive).await {
                Ok(embedded) => {
                    let reasons: Vec<_> =
                        attempts.iter().map(|attempt| format!("{}: {}", attempt.deployment, attempt.error)).collect();
                    let fallback_reason = (!reasons.is_empty()).then(|| reasons.join("; "));
                    let served = Served { by: label(model, deployment), fallback_reason, ..Served::default() };
                    return Ok((served, embedded));
                }
                Err(error) if error.may_succeed_elsewhere() => {
                    attempts.push(Attempt { deployment: label(model, deployment), error: Box::new(error) });
                }
                Err(error) => return Err(error),
            }
        }
        Err(failed(model, attempts))
    }

    async fn embed_at(
        &self,
        model: &Model,
        deployment: &Deployment,
        request: &EmbedRequest,
        keep_alive: Option<KeepAlive>,
    ) -> Result<Embedded, Error> {
        let deadlines = &model.deadlines;
        let embedded = match deployment {
            Deployment::Local { engine, context_tokens } => {
                let (catalog, engine) = (self.catalogs.now(), *engine);
                let file = tokio::task::spawn_blocking(move || catalog.file(engine)).await;
                let file = file.map_err(|error| Error::Internal(error.to_string()))??;
                refuse(model, file.purpose(), request.query.is_some())?;
                let residence = Residence { context_tokens: None, keep_alive };
                let want = self.want(engine, *context_tokens, residence).await?;
                let lease = self.pool.lease(engine, want, &model.name, deadlines).await?;
                local::embed(lease, &model.name, deadlines.first_token, request.clone()).await
            }
            Deployment::Process { engine, context_tokens, remote } => {
                let residence = Residence { context_tokens: None, keep_alive };
                let want = self.want(*engine, *context_tokens, residence).await?;
                let lease = self.pool.lease(*engine, want, &model.name, deadlines).await?;
                let url = lease.worker.url.as_ref().map(ToString::to_string).unwrap_or_default();
                self.embed_there(model, &Remote { url, ..remote.clone() }, request, keep_alive).await
            }
            Deployment::Remote(host) => {
                let (_, _place) =
                    timeout(deadlines.queue, self.health.place(&[host])).await.map_err(|_| Error::Deadline {
                        model: model.name.clone(),
                        phase: Phase::Queue,
                        seconds: deadlines.queue.as_secs(),
                    })?;
                let embedded = self.embed_there(model, host, request, keep_alive).await;
                embedded.inspect_err(|error| self.health.failed(host, error))
            }
        };
        embedded.map_err(|error| error.of_model(&model.name))
    }

    async fn embed_there(
        &self,
        model: &Model,
        host: &Remote,
        request: &EmbedRequest,
        keep_alive: Option<KeepAlive>,
    ) -> Result<Embedded, Error> {
        if request.query.is_some() {
            let reason = "hosts are not asked for scores in this version".into();
            return Err(Error::Unavailable { model: model.name.clone(), reason });
        }
        let deadlines = &model.deadlines;
        let place = remote::Place { remote: host, context_tokens: None, connect: deadlines.connect };
        let embedded = timeout(deadlines.first_token, self.hosts.embed(&place, request, keep_alive)).await;
        embedded.unwrap_or_else(|_| {
            let seconds = deadlines.first_token.as_secs();
            Err(Error::Deadline { model: model.name.clone(), phase: Phase::FirstToken, seconds })
        })
    }
}

/// Refuses what a file is not made for.
fn refuse(model: &Model, purpose: Purpose, wants_scores: bool) -> Result<(), Error> {
    let fix = match (purpose, wants_scores) {
        (Purpose::Vectors, false) | (Purpose::Scores, true) => return Ok(()),
        (Purpose::Answers, _) => "answers in words: use an embedding model",
        (Purpose::Vectors, true) => "makes vectors and no scores: use /v1/embeddings, or a model that reranks",
        (Purpose::Scores, false) => "scores texts and makes no vectors: use /v1/rerank",
    };
    Err(Error::invalid("model", format!("`{}` {fix}", model.name)))
}
