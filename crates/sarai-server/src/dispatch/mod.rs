//! The one loop that tries deployments in order until one answers.
//!
//! Before the first token any failure of a place moves on to the next one. After it, the answer goes on elsewhere where
//! that is sound (`resume`), or ends with an error event: it is never ended cleanly when it was not finished.

mod attempt;
mod candidates;
mod checked;
mod embed;
mod hedge;
mod load;
mod places;
mod resume;
mod spread;
#[cfg(test)]
mod tests;
mod warm;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::{StreamExt, stream};
use sarai_api::Served;
use sarai_core::{Attempt, Error, Event, GenerateRequest, Phase, RemoteCause};
use tokio::time::{Instant, timeout};

use crate::admission::Ticket;
use crate::backend::EventStream;
use crate::backend::remote::Hosts;
use crate::catalog::Catalogs;
use crate::config::{Deployment, Model};
use crate::health::{self, Health};
use crate::planner::Planner;
use crate::pool::Pool;
use crate::supervise::validate::Validator;
pub use candidates::label;
use candidates::{Candidate, Tier, near_first, tiers};
pub use checked::is_held_back;
use checked::{Begun, Checks, guarded};
use hedge::{Hedged, Others};
use places::Waited;
use spread::{Work, spread};
pub use warm::warm_fallbacks;

/// An answer that has begun: its first event is there.
pub struct Answer {
    /// Who answers.
    pub served: Served,
    /// The events, the first one included.
    pub events: EventStream,
}

/// What the client says of how it is to be served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// Rather not at all than degraded.
    pub strict: bool,
    /// In so much time, or not at all: until a stream begins, or a whole answer is there.
    pub within: Option<Duration>,
}

impl Terms {
    /// What comes within the deadline of the request, the client's or the model's.
    ///
    /// # Errors
    /// It does not.
    pub async fn within<T>(
        self,
        model: &Model,
        coming: Pin<&mut impl Future<Output = Result<T, Error>>>,
    ) -> Result<T, Error> {
        let Some(limit) = self.within.into_iter().chain(model.deadlines.request).min() else { return coming.await };
        let seconds = limit.as_secs();
        let late = Error::Deadline { model: model.name.clone(), phase: Phase::Request, seconds };
        timeout(limit, coming).await.unwrap_or(Err(late))
    }
}

/// How the client wants its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manner {
    /// Not before its end.
    pub whole: bool,
    /// What else it says.
    pub terms: Terms,
}

/// What is wanted of those who are tried.
struct Wants {
    manner: Manner,
    /// Nobody else is asked.
    only: Option<Vec<String>>,
    /// For whom the prompt was too long, when nobody could answer.
    too_long_for: Vec<String>,
}

/// What the loop works with.
#[derive(Clone, Debug)]
pub struct Dispatch {
    /// Models, and files of local deployments.
    pub catalogs: Catalogs,
    /// Plans of them.
    pub planner: Planner,
    /// Workers.
    pub pool: Pool,
    /// Remote hosts.
    pub hosts: Hosts,
    /// What is known of them.
    pub health: Health,
    /// Of answers that no grammar holds to their schema.
    pub validator: Validator,
}

/// One request on its way through the candidates.
struct Ask<'a> {
    model: &'a Arc<Model>,
    request: Arc<GenerateRequest>,
    /// Whether the client has set none.
    seed_is_ours: bool,
    manner: Manner,
    /// Lets it be answered.
    ticket: &'a Ticket,
    attempts: Attempts,
    /// Who has failed: nobody is asked twice, but for what is said otherwise.
    failed: Vec<Candidate>,
    /// The model's hosts, in order.
    hosts: Vec<Candidate>,
    /// What a worker's answer is checked against, where its grammar does not follow the schema.
    checks: Option<Arc<Checks>>,
    /// The model's own worker, which may be asked while a host is late.
    worker: Option<Candidate>,
    /// The first worker of the models that it falls back to.
    fallback: Option<Candidate>,
    /// Whose breaker is open, or who broke off before anything was out: asked only when nobody else answered.
    last_resort: Vec<Candidate>,
    /// Since when a place is waited for, whoever has it.
    arrived: Instant,
}

/// Who was tried in vain, and why: the last reason of each.
#[derive(Default)]
struct Attempts(Vec<Attempt>);

impl Attempts {
    fn note(&mut self, candidate: &Candidate, error: Error) {
        let deployment = candidate.label();
        self.0.retain(|attempt| attempt.deployment != deployment);
        self.0.push(Attempt { deployment, error: Box::new(error) });
    }

    /// Who has answered instead.
    fn served(&self, by: &Candidate) -> Served {
        let failed = self.0.iter().filter(|attempt| attempt.deployment != by.label());
        let reasons: Vec<_> = failed.map(|attempt| format!("{}: {}", attempt.deployment, attempt.error)).collect();
        Served {
            by: by.label(),
            is_local: by.is_worker(),
            fallback_reason: (!reasons.is_empty()).then(|| reasons.join("; ")),
            degraded: by.degraded.clone(),
            resumed: Vec::new(),
        }
    }
}

impl Ask<'_> {
    fn note(&mut self, candidate: &Candidate, error: Error) {
        self.attempts.note(candidate, error);
    }

    fn has_failed(&self, candidate: &Candidate) -> bool {
        self.failed.iter().any(|one| one.is(candidate))
    }

    /// Whether a worker, or a command, may be asked while a host is late.
    fn may_stand_in(&self, worker: &Candidate, health: &Health) -> bool {
        is_allowed(worker, self.manner.terms.strict) && !self.has_failed(worker) && !worker.is_left_alone(health)
    }

    fn begun(&self, candidate: &Candidate, events: EventStream) -> Answer {
        Answer { served: self.attempts.served(candidate), events }
    }
}

impl Dispatch {
    /// Tries whoever may answer, in order; with a prompt that is cut, where it is too long for all of them and may be.
    ///
    /// # Errors
    /// The request is wrong, or nobody answered: the only one's error, or all of them.
    pub async fn answer(
        &self,
        model: &Arc<Model>,
        mut request: GenerateRequest,
        manner: Manner,
        ticket: &Ticket,
    ) -> Result<Answer, Error> {
        let may_cut = std::mem::take(&mut request.truncate) && !manner.terms.strict;
        let mut wants = Wants { manner, only: None, too_long_for: Vec::new() };
        if !may_cut {
            return self.tried(model, request, &mut wants, ticket).await;
        }
        match Box::pin(self.tried(model, request.clone(), &mut wants, ticket)).await {
            // Nobody has room for all of it; who had another reason has had its turn.
            Err(error) if is_about_length(&error) => {
                request.truncate = true;
                wants.only = Some(std::mem::take(&mut wants.too_long_for));
                Box::pin(self.tried(model, request, &mut wants, ticket)).await
            }
            outcome => outcome,
        }
    }

    /// Tries whoever may answer, in order.
    async fn tried(
        &self,
        model: &Arc<Model>,
        request: GenerateRequest,
        wants: &mut Wants,
        ticket: &Ticket,
    ) -> Result<Answer, Error> {
        let (mut request, manner) = (Arc::new(request), wants.manner);
        self.read_files(model).await;
        if request.media().next().is_some() {
            self.read_capabilities(model).await;
        }
        let mut tiers = tiers(&self.catalogs.now(), &self.health, model, &request)?;
        if let Some(only) = &wants.only {
            tiers.iter_mut().for_each(|tier| tier.retain(|one| only.contains(&one.label())));
            tiers.retain(|tier| !tier.is_empty());
        }
        let seed_is_ours = !manner.whole && resume::may_be_asked_again(model, &request, tiers.iter().flatten());
        if seed_is_ours {
            Arc::make_mut(&mut request).sampling.seed = Some(rand::random_range(1..i32::MAX as u32));
        }
        self.health.get_to_know(tiers.iter().flatten().filter_map(Candidate::remote)).await;
        let mut tiers = near_first(tiers, &self.health);
        let has_worker = tiers.iter().flatten().any(Candidate::is_worker);
        let checks = if has_worker { Checks::of(&request, manner.whole).map(Arc::new) } else { None };
        if let Some(checks) = &checks {
            let workers = tiers.iter_mut().flatten().filter(|one| one.is_worker());
            workers.for_each(|worker| worker.degraded.retain(|lost| !checks.cover(lost)));
        }
        let is_own = |one: &&Candidate| one.model.name == model.name && one.remote().is_none();
        let worker = tiers.iter().flatten().find(is_own).cloned();
        let is_fallback = |one: &&Candidate| one.model.name != model.name && one.is_worker();
        let fallback = tiers.iter().flatten().find(is_fallback).cloned();
        let may_be_asked = |one: &&Candidate| is_allowed(one, manner.terms.strict);
        let own = tiers.iter().flatten().filter(|one| one.model.name == model.name && one.remote().is_some());
        let hosts = own.filter(may_be_asked).cloned().collect();
        let mut ask = Ask {
            model,
            request,
            seed_is_ours,
            manner,
            ticket,
            attempts: Attempts::default(),
            failed: Vec::new(),
            hosts,
            checks,
            worker,
            fallback,
            last_resort: Vec::new(),
            arrived: Instant::now(),
        };
        match self.ask_all(&mut ask, tiers).await? {
            Some(answer) => Ok(answer),
            None => {
                let too_long = ask.attempts.0.iter().filter(|attempt| is_about_length(&attempt.error));
                wants.too_long_for = too_long.map(|attempt| attempt.deployment.clone()).collect();
                Err(failed(model, ask.attempts.0))
            }
        }
    }

    async fn ask_all(&self, ask: &mut Ask<'_>, tiers: Vec<Tier>) -> Result<Option<Answer>, Error> {
        for tier in tiers {
            if let Some(answer) = self.ask_tier(ask, tier).await? {
                return Ok(Some(answer));
            }
        }
        for candidate in std::mem::take(&mut ask.last_resort) {
            // Who waits in vain keeps the reason for which the breaker is open.
            let place = self.place_at(&candidate, ask.arrived, ask.request.lane, ask.ticket).await;
            let Some(place) = place else { continue };
            if let Some(answer) = self.ask_one(ask, &candidate, place, &[]).await? {
                return Ok(Some(answer));
            }
        }
        Ok(None)
    }

    /// Has hosts asked what their models can sense.
    async fn read_capabilities(&self, model: &Model) {
        let catalog = self.catalogs.now();
        let deployments = catalog.with_fallbacks(model).flat_map(|model| &model.deployments);
        let remotes: Vec<_> = deployments
            .filter_map(|deployment| match deployment {
                Deployment::Remote(remote) => Some(remote),
                Deployment::Local { .. } | Deployment::Process { .. } => None,
            })
            .collect();
        self.health.read_capabilities(&remotes, model.deadlines.connect).await;
    }

    /// Has the headers of a model's files read, aside, so that what they can do is known.
    async fn read_files(&self, model: &Arc<Model>) {
        let catalog = self.catalogs.now();
        let deployments = catalog.with_fallbacks(model).flat_map(|model| &model.deployments);
        let unread = deployments.filter_map(|deployment| match deployment {
            Deployment::Local { engine, .. } if catalog.known_file(*engine).is_none() => Some(*engine),
            _ => None,
        });
        for engine in unread.collect::<Vec<_>>() {
            let catalog = Arc::clone(&catalog);
            // One that cannot be read says so when it is asked.
            let _ = tokio::task::spawn_blocking(move || catalog.file(engine).map(drop)).await;
        }
    }

    /// Asks those who share the load until one answers.
    async fn ask_tier(&self, ask: &mut Ask<'_>, tier: Tier) -> Result<Option<Answer>, Error> {
        join_all(tier.iter().filter_map(Candidate::remote).map(|remote| self.health.measure(remote))).await;
        let mut left = self.fitting(ask, tier);
        left.retain(|one| !ask.has_failed(one));
        spread(&mut left, &Work::of(&ask.request), &self.health);
        loop {
            // Apart, as a thousand streams that begin at once have as many of these.
            let waiting = Box::pin(self.wait_for_place_or_worker(ask, &left));
            let found = match ask.ticket.aside(waiting).await {
                Waited::Worker(worker, events) => match self.answer_of_worker(ask, &left, &worker, events).await? {
                    None => continue,
                    answer => return Ok(answer),
                },
                Waited::Place(found) => found,
            };
            let Some((deadline, found)) = found else { break };
            let Some((index, place)) = found else {
                let late = |candidate: &Candidate| Error::Deadline {
                    model: candidate.model.name.clone(),
                    phase: Phase::Queue,
                    seconds: deadline.as_secs(),
                };
                let is_open = |one: &Candidate| one.is_left_alone(&self.health);
                let (open, full): (Vec<_>, Vec<_>) = left.into_iter().partition(is_open);
                full.iter().for_each(|candidate| ask.note(candidate, late(candidate)));
                left = open;
                break;
            };
            let candidate = left.remove(index);
            if let Some(answer) = self.ask_one(ask, &candidate, place, &left).await? {
                return Ok(Some(answer));
            }
            // It was only late, and whoever was faster has failed then: it has its turn again, where it may be asked twice.
            if candidate.remote().is_none_or(|remote| !remote.managed_lb) {
                left.push(candidate);
            }
            left.retain(|one| !ask.has_failed(one));
        }
        // Of these, none has recovered meanwhile.
        for candidate in left {
            if let Some(last) = candidate.last_failure(&self.health) {
                ask.note(&candidate, last);
            }
            ask.last_resort.push(candidate);
        }
        Ok(None)
    }

    /// Those whose answer would do; of the others it is noted why not.
    fn fitting(&self, ask: &mut Ask<'_>, tier: Tier) -> Tier {
        let mut fitting = Vec::new();
        for candidate in tier {
            if !is_allowed(&candidate, ask.manner.terms.strict) {
                let reason = refuses_degraded(&candidate.degraded);
                ask.note(&candidate, Error::Unavailable { model: ask.model.name.clone(), reason });
            } else if let Some(error) = candidate.is_too_far(&self.health) {
                ask.note(&candidate, error);
            } else {
                fitting.push(candidate);
            }
        }
        fitting
    }

    async fn ask_one(
        &self,
        ask: &mut Ask<'_>,
        candidate: &Candidate,
        place: health::Place,
        others: &[Candidate],
    ) -> Result<Option<Answer>, Error> {
        let (mut asked, mut outcome) = self.ask_once(ask, candidate, place, others).await;
        let may_repeat = candidate.remote().is_none_or(|remote| !remote.managed_lb);
        let is_it = asked.is(candidate) && !ask.has_failed(candidate);
        if may_repeat && is_it && outcome.as_ref().is_err_and(was_hardly_asked) {
            // Nothing was sent of it: it may be replayed, once, in its turn.
            if let Some(place) = self.place_at(candidate, ask.arrived, ask.request.lane, ask.ticket).await {
                match Box::pin(self.ask_once(ask, candidate, place, others)).await {
                    // It was there, and went while it was asked: that is the reason.
                    (_, Err(Error::Remote { cause: RemoteCause::Unreachable(_), .. })) => {}
                    again => (asked, outcome) = again,
                }
            }
        }
        let candidate = asked;
        match outcome {
            Ok(events) => Ok(Some(ask.begun(&candidate, events))),
            Err(error) if error.may_succeed_elsewhere() => {
                tracing::warn!(deployment = candidate.label(), %error, "attempt failed");
                if may_repeat && ask.manner.whole && matches!(error, Error::Remote { cause: RemoteCause::Cut, .. }) {
                    // Nothing of it is out: if nobody else answers, it may once more, as in a stream.
                    ask.last_resort.push(candidate.clone());
                }
                ask.failed.push(candidate.clone());
                ask.note(&candidate, error);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Asks a candidate, and others if it is late; says who answered.
    async fn ask_once(
        &self,
        ask: &mut Ask<'_>,
        candidate: &Candidate,
        place: health::Place,
        others: &[Candidate],
    ) -> (Candidate, Result<EventStream, Error>) {
        let allowed = |worker: &&Candidate| ask.may_stand_in(worker, &self.health);
        let own = ask.worker.as_ref().filter(allowed);
        let worker = own.or_else(|| ask.fallback.as_ref().filter(allowed));
        let is_alone = others.is_empty() && worker.is_none() && ask.hosts.iter().all(|host| host.is(candidate));
        let (mut asked, opened) = match candidate.remote() {
            Some(remote) if !is_alone => {
                let is_near =
                    |host: &Candidate| host.remote().is_some_and(|remote| !self.health.is_measured_soon(remote));
                let further = ask.hosts.iter().filter(|host| is_near(host) && !others.iter().any(|one| one.is(host)));
                let is_left = |host: &&Candidate| !host.is(candidate) && !ask.has_failed(host);
                let hosts = others.iter().chain(further).filter(|_| !remote.managed_lb).filter(is_left).collect();
                let others = Others { hosts, worker, worker_is_own: own.is_some() };
                let (work, request) = (Work::of(&ask.request), &*ask.request);
                let at =
                    |candidate: Candidate, place| async move { attempt::open(self, &candidate, request, place).await };
                let Hedged { by, opened, failed, late } =
                    hedge::open(self, (candidate, place), others, &work, at).await;
                // A worker has its own turn yet, and who was hardly asked has it too.
                let is_final = |(one, error): &&(Candidate, Error)| one.remote().is_some() && !was_hardly_asked(error);
                ask.failed.extend(failed.iter().filter(is_final).map(|(one, _)| one.clone()));
                failed.into_iter().chain(late).for_each(|(one, error)| ask.note(&one, error));
                (by, opened)
            }
            _ => (candidate.clone(), attempt::open(self, candidate, &ask.request, place).await),
        };
        let outcome = match opened {
            Ok(events) => self.begin(ask, &mut asked, events).await,
            Err(error) => Err(error),
        };
        (asked, outcome)
    }

    /// Makes of an attempt's events what the client wants.
    async fn begin(&self, ask: &Ask<'_>, candidate: &mut Candidate, events: EventStream) -> Result<EventStream, Error> {
        let Some(checks) = ask.checks.as_ref().filter(|_| candidate.is_worker()) else {
            return self.going_on(ask, candidate, events).await;
        };
        match Box::pin(self.check(ask, candidate, checks, events)).await? {
            Begun::Checked(events) => Ok(events),
            Begun::Going(events) => {
                let (checks, validator) = (Arc::clone(checks), self.validator.clone());
                let events = self.going_on(ask, candidate, events).await?;
                Ok(guarded(checks, validator, candidate.model.name.clone(), events))
            }
        }
    }

    /// All of an answer, or one that goes on elsewhere if it breaks off.
    async fn going_on(&self, ask: &Ask<'_>, candidate: &Candidate, events: EventStream) -> Result<EventStream, Error> {
        if ask.manner.whole {
            return gathered(events).await.map(replayed);
        }
        if !resume::is_resumable(ask.model, &ask.request) {
            return Ok(events);
        }
        let request = Arc::clone(&ask.request);
        let begun = (candidate.clone(), events);
        let terms = resume::Terms { strict: ask.manner.terms.strict, seed_is_ours: ask.seed_is_ours };
        Ok(resume::resuming(self.clone(), Arc::clone(ask.model), request, terms, begun))
    }
}

/// Whether it was the way to a place that failed, rather than the place: a worker died, or a kept-alive connection ended, just
/// when it was asked.
fn was_hardly_asked(error: &Error) -> bool {
    matches!(error, Error::WorkerDied { .. } | Error::Remote { cause: RemoteCause::Unanswered, .. })
}

fn refuses_degraded(lost: &[String]) -> String {
    format!("x-sarai-strict refuses a degraded answer, and this one would lack: {}", lost.join(", "))
}

/// Whether an answer from there would do.
fn is_allowed(candidate: &Candidate, strict: bool) -> bool {
    !strict || candidate.degraded.is_empty()
}

/// What is said when no deployment answered. A prompt that is too long for all that could be asked is the client's matter.
fn failed(model: &Model, mut attempts: Vec<Attempt>) -> Error {
    let too_long = attempts.iter().position(|attempt| is_about_length(&attempt.error));
    let is_of_the_request =
        |attempt: &Attempt| matches!(&*attempt.error, Error::Remote { cause, .. } if cause.is_of_the_request());
    match (attempts.len(), too_long) {
        (0, _) => Error::Unavailable {
            model: model.name.clone(),
            reason: "no deployment of it answers requests in this version".into(),
        },
        (_, Some(index)) => *attempts.swap_remove(index).error,
        (_, None) if attempts.len() == 1 || attempts.iter().all(is_of_the_request) => *attempts.swap_remove(0).error,
        _ => Error::AllFailed { model: model.name.clone(), attempts },
    }
}

/// Whether a prompt was too long.
const fn is_about_length(error: &Error) -> bool {
    matches!(
        error,
        Error::ContextOverflow { .. }
            | Error::TextTooLong { .. }
            | Error::Remote { cause: RemoteCause::TooLong(_), .. }
    )
}

/// An answer that nothing is sent of before it is whole: if it is cut, the next deployment may still give it.
async fn gathered(mut events: EventStream) -> Result<Vec<Event>, Error> {
    let mut whole = Vec::new();
    while let Some(event) = events.next().await {
        whole.push(event?);
    }
    Ok(whole)
}

fn replayed(whole: Vec<Event>) -> EventStream {
    Box::pin(stream::iter(whole.into_iter().map(Ok)))
}
