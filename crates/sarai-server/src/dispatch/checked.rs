//! Answers of workers whose form no grammar follows in full, and calls that follow none: they are checked when they are there, and one that breaks its schema is
//! not passed on. Another one is asked for, sampled anew.

use std::collections::VecDeque;
use std::sync::Arc;

use futures_util::{StreamExt, stream};
use sarai_api::schema::{not_followed, not_followed_by_calls, strict_arguments};
use sarai_api::validate::{Claim, Verdict, unknown_formats};
use sarai_core::{Error, Event, FinishReason, Format, GenerateRequest, ToolCall, ToolChoice};
use serde::de::IgnoredAny;

use super::candidates::Candidate;
use super::{Ask, Dispatch, attempt, gathered, refuses_degraded, replayed};
use crate::backend::EventStream;
use crate::supervise::validate::Validator;

/// Of what no grammar follows, what hardly an answer breaks: no stream is held back for it, and it is named instead.
const HARDLY_BROKEN: [&str; 2] = ["maxLength", "maxItems"];
/// Answers that are asked for at most.
const MOST_ANSWERS: u32 = 4;
/// The temperature of the second one at least, and what each further one has more.
const WARM: f32 = 0.8;
const WARMER: f32 = 0.2;

/// What a request's answers are checked against.
#[derive(Debug)]
pub struct Checks {
    /// The schema of the text, if it is to be checked.
    schema: Option<String>,
    /// Tools whose arguments are to be checked, with their schemas.
    tools: Vec<(String, String)>,
    /// What is checked: keywords as they are named where they are not followed.
    covered: Vec<String>,
    held: Held,
    /// Where a stop text may cut the answer.
    may_be_cut: bool,
}

/// What is not passed on before it is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    /// All of the answer.
    Answer,
    /// Calls that come in one piece, as those do that have no mark and followed no grammar.
    Calls,
}

/// What came of a check.
#[derive(Debug, PartialEq, Eq)]
enum Checked {
    /// The answer keeps its form.
    Kept,
    /// How it breaks it.
    Broken(String),
    /// The schema cannot be read, or the check did not come to its end.
    Unknown,
}

impl Checks {
    /// Those that a request needs; of an answer that is wanted whole, or step by step.
    pub fn of(request: &GenerateRequest, is_whole: bool) -> Option<Self> {
        let is_hardly_broken = |lost: &str| HARDLY_BROKEN.iter().any(|one| lost.ends_with(&format!(":{one}")));
        let is_worth_it =
            |lost: &str, schema: &str| (is_whole || !is_hardly_broken(lost)) && can_be_checked(lost, schema);
        let (schema, mut lost) = match &request.format {
            Format::Schema(schema) => (Some(schema.clone()), not_followed(schema)),
            _ => (None, Vec::new()),
        };
        let schema = schema.filter(|schema| lost.iter().any(|lost| is_worth_it(lost, schema)));
        let definitions = request.tools.as_ref().map_or("", |tools| &tools.definitions);
        let lost_by_calls = not_followed_by_calls(definitions);
        // What a model calls of its own accord may have no mark, and follows no grammar then.
        let is_free = request.tools.as_ref().is_some_and(|tools| tools.choice == ToolChoice::Auto);
        let mut tools = strict_arguments(definitions);
        let is_of_one = |lost: &String| tools.iter().all(|(_, schema)| is_worth_it(lost, schema));
        let are_worth_it = !tools.is_empty() && lost_by_calls.iter().any(is_of_one);
        if !(is_free || are_worth_it) {
            tools.clear();
        }
        if schema.is_none() && tools.is_empty() {
            return None;
        }
        let held = if is_whole || schema.is_some() || are_worth_it { Held::Answer } else { Held::Calls };
        let may_be_cut = !request.stop.is_empty();
        let mut checks = Self { schema, tools, covered: Vec::new(), held, may_be_cut };
        lost.extend(lost_by_calls);
        lost.retain(|lost| checks.cover(lost));
        if is_free && !checks.tools.is_empty() {
            lost.push("tools:strict".to_owned());
        }
        checks.covered = lost;
        Some(checks)
    }

    /// Whether a keyword that no grammar follows is checked.
    pub fn cover(&self, lost: &str) -> bool {
        if self.held == Held::Calls {
            return false;
        }
        let schemas: Vec<_> = match lost.split_once(':') {
            Some(("schema", _)) => self.schema.iter().collect(),
            Some(("tools", _)) => self.tools.iter().map(|(_, schema)| schema).collect(),
            _ => Vec::new(),
        };
        !schemas.is_empty() && schemas.into_iter().all(|schema| can_be_checked(lost, schema))
    }

    /// Whether a whole answer keeps its form.
    async fn check(&self, answer: &[Event], validator: &Validator) -> Checked {
        let claims = self.claims(answer);
        if claims.is_empty() {
            return Checked::Kept;
        }
        let Some(verdicts) = validator.verdicts(&claims).await else { return Checked::Unknown };
        let mut checked = Checked::Kept;
        for verdict in verdicts {
            match verdict {
                Verdict::Valid => {}
                Verdict::Broken(why) => return Checked::Broken(why),
                Verdict::Unreadable(why) => {
                    tracing::info!(why, "an answer is not checked");
                    checked = Checked::Unknown;
                }
            }
        }
        checked
    }

    /// What an answer that ended by itself has to be.
    fn claims(&self, answer: &[Event]) -> Vec<Claim> {
        let (mut text, mut calls) = (String::new(), Vec::new());
        for event in answer {
            match event {
                Event::Text(more) => text.push_str(more),
                Event::ToolCall(part) => part.clone().add_to(&mut calls),
                _ => {}
            }
        }
        let finish = answer.iter().find_map(|event| match event {
            Event::Done { finish, .. } => Some(*finish),
            _ => None,
        });
        let claim = |schema: &String, text: &str| Claim { schema: schema.clone(), text: text.to_owned() };
        match (finish, &self.schema) {
            (Some(FinishReason::Stop), Some(_)) if self.may_be_cut && !is_json(&text) => Vec::new(),
            (Some(FinishReason::Stop), Some(schema)) => vec![claim(schema, &text)],
            (Some(FinishReason::ToolCalls), _) => {
                let of_call = |call: &ToolCall| {
                    let (_, schema) = self.tools.iter().find(|(name, _)| *name == call.name)?;
                    Some(claim(schema, &call.arguments))
                };
                calls.iter().filter_map(of_call).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// Whether a validator knows what no grammar follows of a schema.
fn can_be_checked(lost: &str, schema: &str) -> bool {
    !lost.ends_with(":format") || unknown_formats(schema).is_empty()
}

/// Whether nothing of a worker's stream is passed on before it is checked, for as far as the request says.
pub fn is_held_back(request: &GenerateRequest) -> bool {
    Checks::of(request, false).is_some_and(|checks| checks.held == Held::Answer)
}

/// A worker's answer, as far as it is known how it is to be checked.
pub enum Begun {
    /// It has kept its form.
    Checked(EventStream),
    /// It begins with what need not be checked.
    Going(EventStream),
}

impl Dispatch {
    /// Checks an answer that has begun: all of it, or calls that follow.
    ///
    /// # Errors
    /// It fails, or neither it nor any further one keeps its form.
    pub(super) async fn check(
        &self,
        ask: &Ask<'_>,
        worker: &mut Candidate,
        checks: &Arc<Checks>,
        mut events: EventStream,
    ) -> Result<Begun, Error> {
        if checks.held == Held::Calls {
            let Some(first) = events.next().await else { return Ok(Begun::Going(events)) };
            let is_call = first.as_ref().is_ok_and(is_call_in_one_piece);
            events = Box::pin(stream::iter([first]).chain(events));
            if !is_call {
                return Ok(Begun::Going(events));
            }
        }
        self.first_that_keeps(ask, worker, checks, events).await.map(Begun::Checked)
    }

    /// The first answer of a worker that keeps its form, whole.
    async fn first_that_keeps(
        &self,
        ask: &Ask<'_>,
        worker: &mut Candidate,
        checks: &Checks,
        mut events: EventStream,
    ) -> Result<EventStream, Error> {
        let mut answers = 1;
        loop {
            let answer = gathered(events).await?;
            let why = match checks.check(&answer, &self.validator).await {
                Checked::Kept => return Ok(replayed(answer)),
                Checked::Broken(why) => why,
                Checked::Unknown => {
                    worker.degraded.extend(checks.covered.iter().cloned());
                    if ask.manner.terms.strict {
                        let (model, reason) = (worker.model.name.clone(), refuses_degraded(&worker.degraded));
                        return Err(Error::Unavailable { model, reason });
                    }
                    return Ok(replayed(answer));
                }
            };
            tracing::info!(deployment = worker.label(), why, answers, "an answer broke its schema");
            if answers == MOST_ANSWERS {
                return Err(Error::SchemaBroken { model: worker.model.name.clone(), answers, why });
            }
            events = attempt::open(self, worker, &anew(&ask.request, answers), None).await?;
            answers += 1;
        }
    }
}

/// An answer under way of which calls are checked.
struct Guarded {
    events: EventStream,
    checks: Arc<Checks>,
    validator: Validator,
    model: String,
    /// Calls from the first one that came in one piece on.
    calls: Vec<Event>,
    checked: VecDeque<Event>,
}

/// The same answer, without calls that break their schema: it ends with an error instead.
pub fn guarded(checks: Arc<Checks>, validator: Validator, model: String, events: EventStream) -> EventStream {
    let guarded = Guarded { events, checks, validator, model, calls: Vec::new(), checked: VecDeque::new() };
    Box::pin(stream::unfold(Some(guarded), |guarded| async {
        let mut guarded = guarded?;
        let event = guarded.next().await?;
        let ends = event.is_err();
        Some((event, (!ends).then_some(guarded)))
    }))
}

impl Guarded {
    async fn next(&mut self) -> Option<Result<Event, Error>> {
        loop {
            if let Some(event) = self.checked.pop_front() {
                return Some(Ok(event));
            }
            match self.events.next().await? {
                Ok(event @ Event::ToolCall(_)) if !self.calls.is_empty() || is_call_in_one_piece(&event) => {
                    self.calls.push(event);
                }
                Ok(end @ Event::Done { .. }) if !self.calls.is_empty() => {
                    self.calls.push(end);
                    let why = match self.checks.check(&self.calls, &self.validator).await {
                        Checked::Kept => {
                            self.checked.extend(self.calls.drain(..));
                            continue;
                        }
                        Checked::Broken(why) => why,
                        Checked::Unknown => "it could not be checked".into(),
                    };
                    return Some(Err(Error::SchemaBroken { model: self.model.clone(), answers: 1, why }));
                }
                event => return Some(event),
            }
        }
    }
}

fn is_call_in_one_piece(event: &Event) -> bool {
    matches!(event, Event::ToolCall(part) if !part.call.name.is_empty() && part.call.is_whole())
}

fn is_json(text: &str) -> bool {
    serde_json::from_str::<IgnoredAny>(text).is_ok()
}

/// The same request for one more answer, which is sampled otherwise; the first further one is 1.
fn anew(request: &GenerateRequest, number: u32) -> GenerateRequest {
    let mut anew = request.clone();
    #[expect(clippy::cast_precision_loss, reason = "a few")]
    let warm = WARM + WARMER * (number - 1) as f32;
    let sampling = &mut anew.sampling;
    let is_fixed = sampling.seed.is_some() || sampling.temperature == Some(0.0);
    sampling.seed = is_fixed.then(|| sampling.seed.unwrap_or(0).wrapping_add(number));
    sampling.temperature = Some(sampling.temperature.unwrap_or(WARM).max(warm));
    anew
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use sarai_core::{Timings, ToolCallPart, Usage};

    use super::*;
    use crate::dispatch::tests::{Does, SHORT, by_turns, dispatch};

    fn checks() -> Checks {
        let schema = |name: &str| format!("{{\"title\":\"{name}\"}}");
        Checks {
            schema: Some(schema("text")),
            tools: vec![("f".into(), schema("f"))],
            covered: Vec::new(),
            held: Held::Answer,
            may_be_cut: false,
        }
    }

    fn ended(finish: FinishReason) -> Event {
        Event::Done { finish, usage: Usage::default(), timings: Timings::default() }
    }

    #[test]
    fn what_ended_by_itself_is_checked_whole_and_nothing_else() {
        let text = |text: &str| Event::Text(text.into());
        let claims = |answer: &[Event]| -> Vec<_> {
            checks().claims(answer).into_iter().map(|claim| (claim.schema, claim.text)).collect()
        };
        let of = |name: &str, text: &str| vec![(format!("{{\"title\":\"{name}\"}}"), text.to_owned())];
        assert_eq!(claims(&[text("[1"), text("]"), ended(FinishReason::Stop)]), of("text", "[1]"));
        assert!(claims(&[text("[1"), ended(FinishReason::Length)]).is_empty());
        let call = |index, name: &str, arguments: &str| {
            let call = ToolCall { id: "1".into(), name: name.into(), arguments: arguments.into() };
            Event::ToolCall(ToolCallPart { index, call })
        };
        let both = [call(0, "f", "{}"), call(1, "unchecked", "{}"), ended(FinishReason::ToolCalls)];
        assert_eq!(claims(&both), of("f", "{}"));
        let cut = Checks { may_be_cut: true, ..checks() };
        assert!(cut.claims(&[text("[1"), ended(FinishReason::Stop)]).is_empty(), "by a stop text");
        assert_eq!(cut.claims(&[text("[1]"), ended(FinishReason::Stop)]).len(), 1);
    }

    #[tokio::test]
    async fn a_call_in_one_piece_waits_for_its_check_and_one_in_parts_does_not() {
        let part = |name: &str, arguments: &str| {
            let call = ToolCall { id: "1".into(), name: name.into(), arguments: arguments.into() };
            Ok(Event::ToolCall(ToolCallPart { index: 0, call }))
        };
        // Nobody checks there.
        let folder = tempfile::tempdir().unwrap();
        let validator = dispatch(1, SHORT, by_turns(&[Does::Answers]), folder.path()).validator;
        let said = async |events: Vec<Result<Event, Error>>| {
            let checks = Arc::new(Checks { held: Held::Calls, ..checks() });
            let events = guarded(checks, validator.clone(), "m".into(), Box::pin(stream::iter(events)));
            events.collect::<Vec<_>>().await
        };
        let (text, end) = (Event::Text("Well.".into()), ended(FinishReason::ToolCalls));
        let in_parts = vec![Ok(text.clone()), part("f", "{"), part("", "}"), Ok(end.clone())];
        assert_eq!(said(in_parts.clone()).await, in_parts);
        let other = vec![Ok(text.clone()), part("other", "{}"), Ok(end.clone())];
        assert_eq!(said(other.clone()).await, other, "it is not strict");
        let whole = said(vec![Ok(text.clone()), part("f", "{}"), Ok(end)]).await;
        assert!(whole[0] == Ok(text) && whole.len() == 2, "{whole:?}");
        assert!(matches!(&whole[1], Err(Error::SchemaBroken { answers: 1, .. })));
    }

    #[test]
    fn keywords_are_covered_but_for_formats_that_nobody_knows() {
        assert!(checks().cover("schema:uniqueItems") && checks().cover("schema:format") && checks().cover("tools:not"));
        assert!(!checks().cover("model:other") && !checks().cover("tools"));
        let odd = Checks { schema: Some(r#"{"format":"isbn"}"#.into()), ..checks() };
        assert!(!odd.cover("schema:format") && odd.cover("schema:not"));
        let none = Checks { schema: None, ..checks() };
        assert!(!none.cover("schema:not"));
    }
}
