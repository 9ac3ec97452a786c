//! Vectors of texts: by the first deployment of a model that makes them. Vectors of another model mean nothing to those of
//! the one that was asked for, so nobody else stands in.

use std::sync::Arc;

use futures_util::future::join_all;
use sarai_api::Served;
use sarai_api::embed::{Embedded, Parsed};
use sarai_core::{Api, Attempt, Error, Input, Phase, Purpose, RemoteCause, Residence};
use tokio::time::{Instant, timeout, timeout_at};

use super::candidates::too_far;
use super::{Dispatch, failed, label, refuses_degraded, was_hardly_asked};
use crate::admission::Ticket;
use crate::backend::{local, remote};
use crate::config::{Deployment, Model, Remote};
use crate::health::Place;

impl Dispatch {
    /// Makes vectors, or scores.
    ///
    /// # Errors
    /// The model is none that makes them, or no deployment could.
    pub async fn embed(
        &self,
        model: &Arc<Model>,
        parsed: &Parsed,
        strict: bool,
        ticket: &Ticket,
    ) -> Result<(Served, Embedded), Error> {
        let arrived = Instant::now();
        self.read_files(model).await;
        let is_open = |deployment: &&Deployment| host_of(deployment).is_some_and(|host| self.health.is_open(host));
        let mut left: Vec<&Deployment> = model.deployments.iter().collect();
        left.sort_by_key(is_open);
        let mut attempts: Vec<Attempt> = Vec::new();
        while !left.is_empty() {
            let lost = lost(left[0], parsed);
            if strict && !lost.is_empty() {
                let reason = refuses_degraded(&lost);
                let error = Box::new(Error::Unavailable { model: model.name.clone(), reason });
                attempts.push(Attempt { deployment: label(model, left.remove(0)), error });
                continue;
            }
            let until = arrived + model.deadlines.queue;
            let (index, place) = self.embedder(model, &left, parsed, until, ticket).await;
            let deployment = left.remove(index);
            let outcome = match place {
                Ok(place) => self.embed_at(model, deployment, parsed, place).await,
                Err(error) => Err(error),
            };
            match outcome {
                Ok(embedded) => {
                    let reasons: Vec<_> =
                        attempts.iter().map(|attempt| format!("{}: {}", attempt.deployment, attempt.error)).collect();
                    let fallback_reason = (!reasons.is_empty()).then(|| reasons.join("; "));
                    let served =
                        Served { by: label(model, deployment), fallback_reason, degraded: lost, ..Served::default() };
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

    /// Who is asked next, with a place there: of hosts that share the load, the first one that has one.
    async fn embedder(
        &self,
        model: &Model,
        left: &[&Deployment],
        parsed: &Parsed,
        until: Instant,
        ticket: &Ticket,
    ) -> (usize, Result<Place, Error>) {
        let unavailable = |reason: &str| Error::Unavailable { model: model.name.clone(), reason: reason.to_owned() };
        if parsed.request.query.is_some() && !matches!(left[0], Deployment::Local { .. }) {
            return (0, Err(unavailable("hosts and commands are not asked for scores in this version")));
        }
        let Some(host) = host_of(left[0]) else { return (0, Ok(None)) };
        if host.api == Api::Ollama && parsed.request.inputs.iter().any(|input| matches!(input, Input::Tokens(_))) {
            return (0, Err(unavailable("Ollama takes texts, and no tokens")));
        }
        let alike = left.iter().filter_map(|one| host_of(one)).filter(|one| one.priority == host.priority);
        join_all(alike.map(|one| self.health.measure(one))).await;
        if let Some(error) = too_far(model, host, &self.health) {
            return (0, Err(error));
        }
        let shares = |other: &Remote| {
            (other.api, &other.model_name, other.priority) == (host.api, &host.model_name, host.priority)
                && self.health.is_open(other) == self.health.is_open(host)
                && too_far(model, other, &self.health).is_none()
        };
        let sharing: Vec<(usize, &Remote)> = left
            .iter()
            .enumerate()
            .filter_map(|(index, deployment)| Some((index, host_of(deployment).filter(|other| shares(other))?)))
            .collect();
        let hosts: Vec<&Remote> = sharing.iter().map(|(_, host)| *host).collect();
        match ticket.aside(timeout_at(until, self.health.place(&hosts))).await {
            Ok((index, place)) => (sharing[index].0, Ok(place)),
            Err(_) => {
                let seconds = model.deadlines.queue.as_secs();
                (0, Err(Error::Deadline { model: model.name.clone(), phase: Phase::Queue, seconds }))
            }
        }
    }

    async fn embed_at(
        &self,
        model: &Model,
        deployment: &Deployment,
        parsed: &Parsed,
        _place: Place,
    ) -> Result<Embedded, Error> {
        let mut embedded = self.embed_once(model, deployment, parsed).await;
        let may_repeat = host_of(deployment).is_none_or(|host| !host.managed_lb);
        if may_repeat && embedded.as_ref().is_err_and(was_hardly_asked) {
            embedded = self.embed_once(model, deployment, parsed).await;
        }
        if let Some(host) = host_of(deployment) {
            match &embedded {
                Ok(_) => self.health.reached(host),
                // Whether it answers in words is another question.
                Err(error @ Error::Remote { cause: RemoteCause::Unreachable(_), .. }) => {
                    self.health.failed(host, error)
                }
                Err(_) => {}
            }
        }
        embedded.map_err(|error| error.of_model(&model.name))
    }

    async fn embed_once(&self, model: &Model, deployment: &Deployment, parsed: &Parsed) -> Result<Embedded, Error> {
        let deadlines = &model.deadlines;
        let residence = Residence { context_tokens: None, keep_alive: parsed.keep_alive };
        match deployment {
            Deployment::Local { engine, context_tokens } => {
                // One that cannot be read says so when it is loaded.
                if let Some(file) = self.catalogs.now().known_file(*engine) {
                    refuse(model, file.purpose(), parsed.request.query.is_some())?;
                }
                let want = self.want(*engine, *context_tokens, residence).await?.in_lane(parsed.request.lane);
                let lease = self.pool.lease(*engine, want, &model.name, deadlines).await?;
                local::embed(lease, &model.name, deadlines.first_token, parsed.request.clone()).await
            }
            Deployment::Process { engine, context_tokens, remote } => {
                let want = self.want(*engine, *context_tokens, residence).await?.in_lane(parsed.request.lane);
                let lease = self.pool.lease(*engine, want, &model.name, deadlines).await?;
                let url = lease.worker.url.as_ref().map(ToString::to_string).unwrap_or_default();
                self.embed_there(model, &Remote { url, ..remote.clone() }, parsed).await
            }
            Deployment::Remote(host) => self.embed_there(model, host, parsed).await,
        }
    }

    async fn embed_there(&self, model: &Model, host: &Remote, parsed: &Parsed) -> Result<Embedded, Error> {
        let deadlines = &model.deadlines;
        let place = remote::Place { remote: host, context_tokens: None, connect: deadlines.connect };
        let embedded = timeout(deadlines.first_token, self.hosts.embed(&place, parsed)).await;
        embedded.unwrap_or_else(|_| {
            let cause = RemoteCause::Silent { phase: Phase::FirstToken, seconds: deadlines.first_token.as_secs() };
            Err(Error::Remote { host: host.url.clone(), cause })
        })
    }
}

/// What a deployment does not follow of a request.
fn lost(deployment: &Deployment, parsed: &Parsed) -> Vec<String> {
    let Some(extras) = &parsed.extras else { return Vec::new() };
    let understands = match deployment {
        Deployment::Remote(host) | Deployment::Process { remote: host, .. } => host.api == extras.api,
        Deployment::Local { .. } => false,
    };
    if understands { Vec::new() } else { extras.degrades.clone() }
}

fn host_of(deployment: &Deployment) -> Option<&Remote> {
    match deployment {
        Deployment::Remote(host) => Some(host),
        Deployment::Local { .. } | Deployment::Process { .. } => None,
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
