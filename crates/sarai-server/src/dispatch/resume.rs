//! An answer that broke off after its first token goes on elsewhere, from the same character.
//!
//! A worker goes on from the exact text. So does an Ollama host with a raw prompt, once it has proven that it does. A host that is asked for a chat is asked
//! again, where the answer is determined (temperature 0, or a seed), and nothing is passed on before it has said once
//! more, letter for letter, what is out already. What cannot be resumed ends with an error.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use sarai_core::{Api, Error, Event, FinishReason, GenerateRequest, Phase, Prompt, RemoteCause, Timings, Usage};
use tokio::time::timeout;

use super::candidates::{Candidate, near_first, tiers, to_resume};
use super::spread::{Work, spread};
use super::{Dispatch, attempt, is_allowed};
use crate::backend::EventStream;
use crate::config::{Deployment, Model, Remote, Resume};
use crate::health::Place;

/// How often one answer is resumed at most.
const MOST: usize = 4;
/// How long a host's place is waited for: the client's stream stands still meanwhile.
const PLACE_WITHIN: Duration = Duration::from_secs(5);

/// How long a host may take to say once more what is out already, if a worker could go on instead.
const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(30);

/// How an answer may be gone on with.
#[derive(Clone, Copy)]
pub struct Terms {
    /// Rather not at all than degraded.
    pub strict: bool,
    /// Whether the seed is none of the client's.
    pub seed_is_ours: bool,
}

/// An answer under way that may be resumed.
struct Running {
    dispatch: Dispatch,
    model: Arc<Model>,
    request: Arc<GenerateRequest>,
    terms: Terms,
    candidate: Candidate,
    events: EventStream,
    /// The text that is out.
    journal: String,
    /// In so many pieces, which are tokens.
    pieces: u32,
    /// Whether all that is out is text: hidden reasoning and tool calls cannot be gone on with.
    is_text: bool,
    resumed: usize,
    waiting: VecDeque<Event>,
}

/// Whether an answer to this may be resumed: plain text only, never a constrained form, nor what only its host understands.
pub fn is_resumable(model: &Model, request: &GenerateRequest) -> bool {
    let is_understood = request.needs().iter().all(|need| need.at_worker);
    model.resume != Resume::Never && !request.format.is_constrained() && is_understood
}

/// Whether a seed that nobody asked for lets another host say the same once more: those of Ollama's API have one by chance otherwise; servers of
/// OpenAI's API may refuse the field.
pub fn may_be_asked_again<'a>(
    model: &Model,
    request: &GenerateRequest,
    mut all: impl Iterator<Item = &'a Candidate> + Clone,
) -> bool {
    let is_ollama = |candidate: &Candidate| match candidate.deployment() {
        Deployment::Local { .. } => true,
        Deployment::Remote(remote) | Deployment::Process { remote, .. } => remote.api == Api::Ollama,
    };
    let has_host = |candidate: &Candidate| candidate.remote().is_some();
    !is_determined(request) && is_resumable(model, request) && all.clone().any(has_host) && all.all(is_ollama)
}

/// Whether a host sees the client's own fields, in which nothing can be put behind the prompt.
fn is_sent_as_written(request: &GenerateRequest) -> bool {
    request.suffix.is_some() || request.extras.as_ref().is_some_and(|extras| extras.is_generate)
}

/// Whether a worker would know calls and reasoning in what it goes on with: it takes nothing apart in the middle of an answer.
fn is_text_alone(request: &GenerateRequest) -> bool {
    request.tools.is_none() && request.think != Some(true)
}

/// The same events; where they break off, those of whoever goes on.
pub fn resuming(
    dispatch: Dispatch,
    model: Arc<Model>,
    request: Arc<GenerateRequest>,
    terms: Terms,
    begun: (Candidate, EventStream),
) -> EventStream {
    let (candidate, events) = begun;
    let running = Running {
        dispatch,
        model,
        request,
        terms,
        candidate,
        events,
        journal: String::new(),
        pieces: 0,
        is_text: true,
        resumed: 0,
        waiting: VecDeque::new(),
    };
    Box::pin(stream::unfold(Some(running), |running| async {
        let mut running = running?;
        let event = running.next().await;
        let ends = matches!(event, Ok(Event::Done { .. }) | Err(_));
        Some((event, (!ends).then_some(running)))
    }))
}

impl Running {
    async fn next(&mut self) -> Result<Event, Error> {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                return Ok(self.noted(event));
            }
            let broken = || Error::Internal("the answer ended without its end mark".into());
            match self.events.next().await.unwrap_or_else(|| Err(broken())) {
                Ok(event) => return Ok(self.noted(event)),
                // Rarely done, and large.
                Err(error) => Box::pin(self.resume(error)).await?,
            }
        }
    }

    fn noted(&mut self, event: Event) -> Event {
        match &event {
            Event::Text(text) => {
                self.journal.push_str(text);
                self.pieces += 1;
            }
            Event::Extra(extra) => {
                self.journal.push_str(&extra.text);
                self.pieces += u32::from(!extra.text.is_empty());
                self.is_text &= extra.is_plain();
            }
            Event::Reasoning(_) | Event::ToolCall(_) => self.is_text = false,
            _ => {}
        }
        event
    }

    /// Finds somebody who goes on; else the error that broke it off stands.
    async fn resume(&mut self, error: Error) -> Result<(), Error> {
        // What broke is let go of before anything is asked for: its place, its lease, its slot.
        self.events = Box::pin(stream::empty());
        self.resumed += 1;
        if self.resumed > MOST || !self.is_text || !error.may_succeed_elsewhere() {
            return Err(error);
        }
        let reason = format!("{}: {error}", self.candidate.label());
        tracing::warn!(reason, characters = self.journal.chars().count(), "an answer broke off");
        let candidates = self.candidates();
        for (index, candidate) in candidates.iter().enumerate() {
            let given =
                Given { dispatch: &self.dispatch, request: &self.request, text: &self.journal, pieces: self.pieces };
            let has_worker = candidates[index + 1..].iter().any(|one| one.deployment().engine().is_some());
            let begun = match candidate.remote().filter(|_| has_worker) {
                Some(remote) => given.unless_late(candidate, remote).await,
                None => given.begin(candidate).await,
            };
            let outcome = match begun {
                Ok(begun) => given.go_on(candidate, begun, has_worker).await,
                Err(error) => Err(error),
            };
            match outcome {
                Ok(events) => {
                    tracing::info!(deployment = candidate.label(), "it goes on");
                    self.events = events;
                    self.waiting.push_back(Event::Resumed {
                        by: candidate.label(),
                        reason,
                        degraded: candidate.degraded.clone(),
                    });
                    self.candidate = candidate.clone();
                    return Ok(());
                }
                Err(error) => tracing::warn!(deployment = candidate.label(), %error, "cannot go on"),
            }
        }
        Err(error)
    }

    /// All others first, then who broke off; a host whose breaker is open only if there is nobody else.
    fn candidates(&self) -> Vec<Candidate> {
        let health = &self.dispatch.health;
        let tiers = tiers(&self.dispatch.catalogs.now(), health, &self.model, &self.request).unwrap_or_default();
        let mut tiers = near_first(tiers, health);
        tiers.iter_mut().for_each(|tier| spread(tier, &Work::of(&self.request), health));
        let all = to_resume(tiers, &self.candidate);
        let may = |candidate: &Candidate| {
            // As the one that wrote the text, which may be a fallback.
            let same = candidate.model.name == self.candidate.model.name;
            (same || self.model.resume == Resume::Any)
                && (!candidate.is_worker() || is_text_alone(&self.request))
                && is_allowed(candidate, self.terms.strict)
                && candidate.is_too_far(health).is_none()
                && !(candidate.is(&self.candidate) && candidate.remote().is_some_and(|remote| remote.managed_lb))
        };
        let (open, mut closed): (Vec<_>, Vec<_>) =
            all.into_iter().filter(may).partition(|one| one.is_left_alone(health));
        closed.extend(open);
        if self.terms.seed_is_ours {
            // By chance a host says the same; a worker goes on for certain, and nobody says what a worker has said.
            let (workers, hosts): (Vec<_>, Vec<_>) = closed.into_iter().partition(Candidate::is_worker);
            let may_say_the_same = !self.candidate.is_worker();
            return workers.into_iter().chain(hosts.into_iter().filter(|_| may_say_the_same)).collect();
        }
        closed
    }
}

/// An answer that somebody has begun to go on with.
enum Begun {
    /// From where it broke off.
    Further(EventStream),
    /// From its beginning: what is out already comes once more.
    Again(EventStream),
}

/// What is out of an answer, for whoever goes on.
struct Given<'a> {
    dispatch: &'a Dispatch,
    request: &'a GenerateRequest,
    text: &'a str,
    pieces: u32,
}

impl Given<'_> {
    /// As a host begins, unless it is late: a worker could meanwhile.
    async fn unless_late(&self, candidate: &Candidate, remote: &Remote) -> Result<Begun, Error> {
        let (expected, known) = Work::of(self.request).expected(&self.dispatch.health, remote);
        let limit = known.pace.late(expected);
        let cause = RemoteCause::Late { seconds: limit.as_secs() };
        let late = Error::Remote { host: remote.url.clone(), cause };
        timeout(limit, self.begin(candidate)).await.unwrap_or(Err(late))
    }

    /// What follows the text that is out. A host that repeats that first is given its time, if a worker waits not without end.
    async fn go_on(&self, candidate: &Candidate, begun: Begun, has_worker: bool) -> Result<EventStream, Error> {
        let events = match begun {
            Begun::Further(events) => return Ok(events),
            Begun::Again(events) => events,
        };
        let (model, label) = (candidate.model.name.clone(), candidate.label());
        let reason = format!("{label}, asked again, gives another text");
        let gap = candidate.model.deadlines.gap;
        let limit = if has_worker { CAUGHT_UP_WITHIN } else { Duration::MAX };
        let caught_up = timeout(limit, caught_up(events, self.text, gap)).await;
        let late = || Error::Deadline { model: model.clone(), phase: Phase::Gap, seconds: limit.as_secs() };
        caught_up.map_err(|_| late())??.ok_or(Error::Unavailable { model, reason })
    }

    /// Has a candidate begin.
    async fn begin(&self, candidate: &Candidate) -> Result<Begun, Error> {
        let request = self.request;
        match candidate.deployment() {
            Deployment::Local { .. } => {
                let request = GenerateRequest { given: self.text.to_owned(), ..request.clone() };
                attempt::open(self.dispatch, candidate, &request, None).await.map(Begun::Further)
            }
            Deployment::Process { .. } => self.asked_again(candidate, None).await,
            Deployment::Remote(remote) => {
                let place = || async {
                    let place = timeout(PLACE_WITHIN, self.dispatch.health.place(&[remote], request.lane)).await;
                    let (model, seconds) = (candidate.model.name.clone(), PLACE_WITHIN.as_secs());
                    place.map(|(_, place)| place).map_err(|_| Error::Deadline { model, phase: Phase::Queue, seconds })
                };
                match &request.prompt {
                    Prompt::Raw(_)
                        if remote.api == Api::Ollama && request.max_tokens.is_some_and(|most| most <= self.pieces) =>
                    {
                        // All that was wanted is out; only the end is missing.
                        let usage = Usage { completion_tokens: self.pieces, ..Usage::default() };
                        let end = Event::Done { finish: FinishReason::Length, usage, timings: Timings::default() };
                        Ok(Begun::Further(Box::pin(stream::iter([Ok(end)]))))
                    }
                    Prompt::Raw(text) if remote.api == Api::Ollama && !is_sent_as_written(request) => {
                        let (place, deadlines) = (place().await?, &candidate.model.deadlines);
                        if !self.dispatch.health.goes_on_with_prompts(remote, deadlines).await {
                            return self.asked_again(candidate, place).await;
                        }
                        let request = GenerateRequest {
                            prompt: Prompt::Raw(format!("{text}{}", self.text)),
                            max_tokens: request.max_tokens.map(|most| most - self.pieces),
                            ..request.clone()
                        };
                        let events = attempt::open(self.dispatch, candidate, &request, place).await?;
                        Ok(Begun::Further(with_given_counted(events, self.pieces)))
                    }
                    // A place is not waited for in vain.
                    _ if !is_determined(request) => self.asked_again(candidate, None).await,
                    _ => self.asked_again(candidate, place().await?).await,
                }
            }
        }
    }

    /// Asks for the whole answer once more.
    async fn asked_again(&self, candidate: &Candidate, place: Place) -> Result<Begun, Error> {
        let (model, label) = (candidate.model.name.clone(), candidate.label());
        if !is_determined(self.request) {
            let reason = format!("{label} would give another text: only temperature 0 or a seed determine it");
            return Err(Error::Unavailable { model, reason });
        }
        attempt::open(self.dispatch, candidate, self.request, place).await.map(Begun::Again)
    }
}

/// Whether asking again gives the same text, if the place is the same.
fn is_determined(request: &GenerateRequest) -> bool {
    request.sampling.temperature == Some(0.0) || request.sampling.seed.is_some()
}

/// Tokens of the answer that were part of the prompt count as what they are.
fn with_given_counted(events: EventStream, given: u32) -> EventStream {
    Box::pin(events.map(move |event| match event {
        Ok(Event::Done { finish, usage, timings }) => {
            let usage = Usage {
                prompt_tokens: usage.prompt_tokens.saturating_sub(given),
                completion_tokens: usage.completion_tokens.saturating_add(given),
                ..usage
            };
            Ok(Event::Done { finish, usage, timings })
        }
        other => other,
    }))
}

/// Reads past what is out already, letter by letter; `None` if it says anything else.
async fn caught_up(mut events: EventStream, out: &str, gap: Duration) -> Result<Option<EventStream>, Error> {
    let mut said = String::new();
    while said.len() < out.len() {
        let event = timeout(gap, events.next()).await.ok().flatten();
        match event.transpose()? {
            Some(Event::Text(text)) => said.push_str(&text),
            Some(Event::Extra(extra)) if extra.is_plain() => said.push_str(&extra.text),
            _ => return Ok(None),
        }
        let common = said.len().min(out.len());
        if said.as_bytes()[..common] != out.as_bytes()[..common] {
            return Ok(None);
        }
    }
    let beyond = said.split_off(out.len());
    let first = (!beyond.is_empty()).then_some(Ok(Event::Text(beyond)));
    Ok(Some(Box::pin(stream::iter(first).chain(events))))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn pieces(texts: &'static [&'static str]) -> EventStream {
        Box::pin(stream::iter(texts).map(|text| Ok(Event::Text((*text).to_owned()))))
    }

    async fn rest_of(texts: &'static [&'static str], out: &str) -> Option<String> {
        let events = caught_up(pieces(texts), out, Duration::from_secs(1)).await.unwrap()?;
        let texts: Vec<_> = events.collect().await;
        Some(
            texts
                .into_iter()
                .map(|event| if let Ok(Event::Text(text)) = event { text } else { String::new() })
                .collect(),
        )
    }

    #[tokio::test]
    async fn nothing_is_doubled_and_nothing_is_missing_wherever_it_broke() {
        assert_eq!(rest_of(&["one ", "two ", "three"], "one ").await.unwrap(), "two three");
        assert_eq!(rest_of(&["one ", "two ", "three"], "one t").await.unwrap(), "wo three");
        assert_eq!(rest_of(&["one ", "two ", "three"], "one two three").await.unwrap(), "");
        assert_eq!(rest_of(&["naïve ", "🦙"], "na").await.unwrap(), "ïve 🦙");
    }

    #[tokio::test]
    async fn another_text_is_never_passed_on() {
        assert_eq!(rest_of(&["one ", "too ", "three"], "one two").await, None);
        assert_eq!(rest_of(&["one"], "one two").await, None, "it ended earlier");
    }
}
