//! Vectors of texts, and scores: by the first deployment of a model that makes them. Hosts share this work, and a late one has others asked
//! too, as for answers. Vectors of another model mean nothing to those of the one that was asked for, so nobody else stands in.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use sarai_api::Served;
use sarai_api::embed::{Embedded, Parsed};
use sarai_core::{Api, Error, Input, Phase, Purpose, RemoteCause, Residence};
use tokio::time::{Instant, timeout};

use super::attempt::{FirstLimit, unless_ending};
use super::candidates::{Candidate, Tier, embedders, near_first};
use super::hedge::{self, Hedged, Others};
use super::spread::{Work, spread};
use super::{Attempts, Dispatch, Terms, failed, is_allowed, refuses_degraded, was_hardly_asked};
use crate::admission::Ticket;
use crate::backend::{local, remote};
use crate::config::{Deployment, Model, Remote};
use crate::health::{Gaps, Place, Sample};

/// A request for vectors on its way.
struct Ask<'a> {
    model: &'a Model,
    parsed: &'a Parsed,
    strict: bool,
    ticket: &'a Ticket,
    arrived: Instant,
    /// The model's own worker, which may be asked while a host is late.
    worker: Option<Candidate>,
    attempts: Attempts,
    /// Whose breaker is open: asked only when nobody else could.
    last_resort: Vec<Candidate>,
}

impl Ask<'_> {
    /// Why a candidate is not asked for this.
    fn refuses(&self, candidate: &Candidate) -> Option<Error> {
        let unavailable =
            |reason: &str| Some(Error::Unavailable { model: self.model.name.clone(), reason: reason.to_owned() });
        if !is_allowed(candidate, self.strict) {
            return unavailable(&refuses_degraded(&candidate.degraded));
        }
        if self.parsed.request.query.is_some() && !candidate.is_worker() {
            return unavailable("hosts and commands are not asked for scores in this version");
        }
        let has_tokens = || self.parsed.request.inputs.iter().any(|input| matches!(input, Input::Tokens(_)));
        match candidate.remote() {
            Some(host) if host.api == Api::Ollama && has_tokens() => unavailable("Ollama takes texts, and no tokens"),
            _ => None,
        }
    }
}

impl Dispatch {
    /// Makes vectors, or scores.
    ///
    /// # Errors
    /// The model is none that makes them, or no deployment could.
    pub async fn embed(
        &self,
        model: &Arc<Model>,
        parsed: &Parsed,
        terms: Terms,
        ticket: &Ticket,
    ) -> Result<(Served, Embedded), Error> {
        self.read_files(model).await;
        let tiers = embedders(model, parsed);
        self.health.get_to_know(tiers.iter().flatten().filter_map(Candidate::remote)).await;
        let tiers = near_first(tiers, &self.health);
        let mut ask = Ask {
            model,
            parsed,
            strict: terms.strict,
            ticket,
            arrived: Instant::now(),
            worker: None,
            attempts: Attempts::default(),
            last_resort: Vec::new(),
        };
        let own = tiers.iter().flatten().find(|one| one.remote().is_none() && ask.refuses(one).is_none());
        ask.worker = own.filter(|one| !one.is_left_alone(&self.health)).cloned();
        match self.embedded(&mut ask, tiers).await {
            Ok(None) => Err(failed(model, ask.attempts.0)),
            Ok(Some(embedded)) => Ok(embedded),
            Err(error) => Err(error),
        }
    }

    async fn embedded(&self, ask: &mut Ask<'_>, tiers: Vec<Tier>) -> Result<Option<(Served, Embedded)>, Error> {
        for tier in tiers {
            if let Some(embedded) = self.embedded_by(ask, tier).await? {
                return Ok(Some(embedded));
            }
        }
        for candidate in std::mem::take(&mut ask.last_resort) {
            let place = self.place_at(&candidate, ask.arrived, ask.parsed.request.lane, ask.ticket).await;
            let Some(place) = place else { continue };
            if let Some(embedded) = self.asked_for_vectors(ask, &candidate, place, &[]).await? {
                return Ok(Some(embedded));
            }
        }
        Ok(None)
    }

    /// Asks those who share the load until one could.
    async fn embedded_by(&self, ask: &mut Ask<'_>, tier: Tier) -> Result<Option<(Served, Embedded)>, Error> {
        join_all(tier.iter().filter_map(Candidate::remote).map(|host| self.health.measure(host))).await;
        let mut left = Tier::new();
        for candidate in tier {
            match ask.refuses(&candidate).or_else(|| candidate.is_too_far(&self.health)) {
                Some(error) => ask.attempts.note(&candidate, error),
                None => left.push(candidate),
            }
        }
        spread(&mut left, &Work::of_vectors(ask.parsed), &self.health);
        while let Some((deadline, found)) =
            ask.ticket.aside(self.wait_for_place(&left, ask.arrived, ask.parsed.request.lane)).await
        {
            let Some((index, place)) = found else {
                let (model, seconds) = (ask.model.name.clone(), deadline.as_secs());
                let late = Error::Deadline { model, phase: Phase::Queue, seconds };
                let (open, full): (Tier, Tier) = left.into_iter().partition(|one| one.is_left_alone(&self.health));
                full.iter().for_each(|candidate| ask.attempts.note(candidate, late.clone()));
                left = open;
                break;
            };
            let candidate = left.remove(index);
            if let Some(embedded) = self.asked_for_vectors(ask, &candidate, place, &left).await? {
                return Ok(Some(embedded));
            }
            left.retain(|one| ask.attempts.0.iter().all(|attempt| attempt.deployment != one.label()));
        }
        for candidate in left {
            if let Some(last) = candidate.last_failure(&self.health) {
                ask.attempts.note(&candidate, last);
            }
            ask.last_resort.push(candidate);
        }
        Ok(None)
    }

    /// Asks a candidate, and others if it is a host that is late.
    async fn asked_for_vectors(
        &self,
        ask: &mut Ask<'_>,
        candidate: &Candidate,
        place: Place,
        others: &[Candidate],
    ) -> Result<Option<(Served, Embedded)>, Error> {
        let parsed = ask.parsed;
        let at = |candidate: Candidate, place: Place| async move { self.embed_at(&candidate, parsed, place).await };
        let (by, outcome) = match candidate.remote() {
            None => (candidate.clone(), at(candidate.clone(), place).await),
            Some(host) => {
                let hosts = others.iter().filter(|_| !host.managed_lb).collect();
                let others = Others { hosts, worker: ask.worker.as_ref(), worker_is_own: true };
                let work = Work::of_vectors(parsed);
                let Hedged { by, opened, failed, late } =
                    hedge::open(self, (candidate, place), others, &work, at).await;
                failed.into_iter().chain(late).for_each(|(one, error)| ask.attempts.note(&one, error));
                (by, opened)
            }
        };
        match outcome {
            Ok(embedded) => Ok(Some((ask.attempts.served(&by), embedded))),
            Err(error) if error.may_succeed_elsewhere() => {
                ask.attempts.note(&by, error);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn embed_at(&self, candidate: &Candidate, parsed: &Parsed, _place: Place) -> Result<Embedded, Error> {
        let (model, deployment) = (&candidate.model, candidate.deployment());
        let mut embedded = self.embed_once(candidate, parsed).await;
        let may_repeat = candidate.remote().is_none_or(|host| !host.managed_lb);
        if may_repeat && embedded.as_ref().is_err_and(was_hardly_asked) {
            embedded = self.embed_once(candidate, parsed).await;
        }
        if let (Deployment::Remote(host), Err(error)) = (deployment, &embedded)
            && (host.makes_vectors || matches!(error, Error::Remote { cause: RemoteCause::Unreachable(_), .. }))
        {
            // Of one that answers in words as well, only that nobody is there is told.
            self.health.failed(host, error);
        }
        if let Deployment::Process { .. } = deployment {
            match &embedded {
                Ok(_) => self.health.commands.succeeded(&candidate.label()),
                Err(error) => self.health.commands.failed(&candidate.label(), error),
            }
        }
        embedded.map_err(|error| error.of_model(&model.name))
    }

    async fn embed_once(&self, candidate: &Candidate, parsed: &Parsed) -> Result<Embedded, Error> {
        let (model, deadlines) = (&candidate.model, &candidate.model.deadlines);
        let residence = Residence { context_tokens: None, keep_alive: parsed.keep_alive };
        match candidate.deployment() {
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
                let (remote, within) = (Remote { url, ..remote.clone() }, deadlines.first_token);
                let place = remote::Place { remote: &remote, context_tokens: None, connect: deadlines.connect };
                let embedded = timeout(within, self.hosts.embed(&place, parsed)).await.unwrap_or_else(|_| {
                    let cause = RemoteCause::Silent { phase: Phase::FirstToken, seconds: within.as_secs() };
                    Err(Error::Remote { host: remote.url.clone(), cause })
                });
                unless_ending(&lease, &model.name, embedded).await
            }
            Deployment::Remote(host) => {
                let place = remote::Place { remote: host, context_tokens: None, connect: deadlines.connect };
                let limit = FirstLimit::of(&self.health, candidate, host, &Work::of_vectors(parsed)).await;
                let began = Instant::now();
                let embedded = limit.keep(&self.health, host, Box::pin(self.hosts.embed(&place, parsed))).await?;
                match host.makes_vectors {
                    true => {
                        let (gaps, usage, timings) = (Gaps::default(), embedded.usage, embedded.timings);
                        let (first, rest) = (began.elapsed(), Duration::ZERO);
                        let sample = Sample { gaps, first, rest, usage, timings, is_held_back: false };
                        self.health.succeeded(host, &sample);
                    }
                    // Whether it answers in words is another question.
                    false => self.health.reached(host),
                }
                Ok(embedded)
            }
        }
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
