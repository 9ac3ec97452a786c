//! Answers of workers whose form no grammar follows in full, and calls that follow none: they are checked when they are there, and one that breaks its schema is
//! not passed on. Another one is asked for, sampled anew.

use sarai_api::schema::{not_followed, not_followed_by_calls, strict_arguments};
use sarai_api::validate::{Claim, Verdict, unknown_formats};
use sarai_core::{Event, FinishReason, Format, GenerateRequest, ToolCall, ToolChoice};

use crate::supervise::validate::Validator;

/// Of what no grammar follows, what hardly an answer breaks: no stream is held back for it, and it is named instead.
const HARDLY_BROKEN: [&str; 2] = ["maxLength", "maxItems"];
/// Answers that are asked for at most.
pub const MOST_ANSWERS: u32 = 4;
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
    pub covered: Vec<String>,
    /// Where a stop text may cut the answer.
    may_be_cut: bool,
}

/// What came of a check.
#[derive(Debug, PartialEq, Eq)]
pub enum Checked {
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
        let is_worth_it =
            |lost: &String| is_whole || !HARDLY_BROKEN.iter().any(|one| lost.ends_with(&format!(":{one}")));
        let (schema, mut lost) = match &request.format {
            Format::Schema(schema) => (Some(schema.clone()), not_followed(schema)),
            _ => (None, Vec::new()),
        };
        let schema = schema.filter(|_| lost.iter().any(is_worth_it));
        let definitions = request.tools.as_ref().map_or("", |tools| &tools.definitions);
        let lost_by_calls = not_followed_by_calls(definitions);
        // What a model calls of its own accord may have no mark, and follows no grammar then.
        let is_free = request.tools.as_ref().is_some_and(|tools| tools.choice == ToolChoice::Auto);
        let tools = match (is_whole && is_free) || lost_by_calls.iter().any(is_worth_it) {
            true => strict_arguments(definitions),
            false => Vec::new(),
        };
        if schema.is_none() && tools.is_empty() {
            return None;
        }
        let mut checks = Self { schema, tools, covered: Vec::new(), may_be_cut: !request.stop.is_empty() };
        lost.extend(lost_by_calls);
        lost.retain(|lost| checks.cover(lost));
        if is_whole && is_free && !checks.tools.is_empty() {
            lost.push("tools:strict".to_owned());
        }
        checks.covered = lost;
        Some(checks)
    }

    /// Whether a keyword that no grammar follows is checked.
    pub fn cover(&self, lost: &str) -> bool {
        let schemas = match lost.split_once(':') {
            Some(("schema", _)) => self.schema.iter().collect(),
            Some(("tools", _)) => self.tools.iter().map(|(_, schema)| schema).collect(),
            _ => Vec::new(),
        };
        let is_unknown = |schema: &&String| !unknown_formats(schema).is_empty();
        let is_not_checked = lost.ends_with(":format") && schemas.iter().any(is_unknown);
        !(schemas.is_empty() || is_not_checked)
    }

    /// Whether a whole answer keeps its form.
    pub async fn check(&self, answer: &[Event], validator: &Validator) -> Checked {
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

fn is_json(text: &str) -> bool {
    serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok()
}

/// The same request for one more answer, which is sampled otherwise; the first further one is 1.
pub fn anew(request: &GenerateRequest, number: u32) -> GenerateRequest {
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
mod tests {
    use sarai_core::{Timings, ToolCallPart, Usage};

    use super::*;

    fn checks() -> Checks {
        let schema = |name: &str| format!("{{\"title\":\"{name}\"}}");
        Checks {
            schema: Some(schema("text")),
            tools: vec![("f".into(), schema("f"))],
            covered: Vec::new(),
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
