//! Several answers to one request (`n`, or several prompts): each is dispatched for itself, so that they share the prompt's cells,
//! and hosts need know nothing of it.

use axum::response::Response;
use futures_util::future::{ready, try_join_all};
use futures_util::stream::{self, StreamExt};
use sarai_api::openai::{ChunkWriter, join};
use sarai_api::{Delivery, Parsed};
use sarai_core::{Error, Event, GenerateRequest, Usage};
use serde_json::Value;

use super::super::error::openai_body;
use super::super::{App, json_response, served_headers};
use super::{End, event_stream, last, sse, step};
use crate::dispatch::Answer;
use crate::http::stream as bodies;

/// Answers all of it.
pub async fn answer(app: App, parsed: Parsed, writer: ChunkWriter, strict: bool) -> Result<Response, Error> {
    let Parsed { model, request, others, delivery } = parsed;
    let asked: Vec<_> = [request].into_iter().chain(others).map(|request| one(&model, request, delivery)).collect();
    match delivery.stream {
        true => streamed(app, asked, writer, strict).await,
        false => whole(app, asked, writer, strict).await,
    }
}

fn one(model: &str, request: GenerateRequest, delivery: Delivery) -> Parsed {
    Parsed { model: model.to_owned(), request, others: Vec::new(), delivery }
}

/// Whether each has another prompt than the one before it.
fn prompts(asked: &[Parsed]) -> Vec<bool> {
    let is_other = |pair: &[Parsed]| pair[0].request.prompt != pair[1].request.prompt;
    [true].into_iter().chain(asked.windows(2).map(is_other)).collect()
}

async fn whole(app: App, asked: Vec<Parsed>, writer: ChunkWriter, strict: bool) -> Result<Response, Error> {
    let prompts = prompts(&asked);
    let answers = asked.into_iter().enumerate().map(|(index, parsed)| {
        let (gateway, writer) = (&app.gateway, ChunkWriter { index, ..writer.clone() });
        async move {
            let Answer { served, events } = gateway.answer(parsed, strict).await?;
            let whole = bodies::collect(events).await?;
            Ok::<_, Error>((served_headers(&served), writer.whole(whole, &served)))
        }
    });
    let mut answers = try_join_all(answers).await?.into_iter();
    let Some((headers, mut all)) = answers.next() else { return Err(Error::Internal("nothing was asked".into())) };
    for ((_, other), prompt) in answers.zip(prompts.into_iter().skip(1)) {
        join(&mut all, other, prompt);
    }
    Ok(json_response(headers, &all))
}

/// One of them, as far as it is written.
struct Writing {
    writer: ChunkWriter,
    /// Known once it has begun.
    end: Option<End>,
}

/// What one of them does.
enum Step {
    Begins(Box<End>),
    Says(Result<Event, Error>),
}

async fn streamed(app: App, asked: Vec<Parsed>, writer: ChunkWriter, strict: bool) -> Result<Response, Error> {
    let prompts = prompts(&asked);
    let mut asked = asked.into_iter();
    let Some(first) = asked.next() else { return Err(Error::Internal("nothing was asked".into())) };
    // Who serves stands in the headers, and how a failure before them looks is its own.
    let first = app.gateway.answer(first, strict).await?;
    let headers = served_headers(&first.served);
    let begun = |Answer { served, events }| {
        stream::iter([Step::Begins(Box::new(End::of(served)))]).chain(events.map(Step::Says)).boxed()
    };
    let gateway = app.gateway.clone();
    let later = asked.map(move |parsed| {
        let gateway = gateway.clone();
        let answer = async move {
            match gateway.answer(parsed, strict).await {
                Ok(answer) => begun(answer),
                Err(error) => stream::iter([Step::Says(Err(error))]).boxed(),
            }
        };
        stream::once(answer).flatten().boxed()
    });
    let all = [begun(first)].into_iter().chain(later).enumerate();
    let steps = stream::select_all(all.map(|(index, steps)| steps.map(move |step| (index, step)).boxed()));
    // After an error nothing follows, and the others end with it.
    let steps = steps.scan(false, |has_failed, (index, step)| {
        let goes_on = !*has_failed;
        *has_failed = matches!(step, Step::Says(Err(_)));
        ready(goes_on.then_some((index, step)))
    });

    let mut answers: Vec<_> = (0..prompts.len())
        .map(|index| Writing { writer: ChunkWriter { index, ..writer.clone() }, end: None })
        .collect();
    let (mut left, mut sum) = (answers.len(), Usage::default());
    let encode = move |(index, what): (usize, Step)| -> bytes::Bytes {
        let Writing { writer, end } = &mut answers[index];
        match (what, end) {
            (Step::Begins(begun), end) => {
                *end = Some(*begun);
                writer.role().map(|chunk| sse(&chunk)).unwrap_or_default().into()
            }
            (Step::Says(event), Some(end)) => {
                let done = match &event {
                    Ok(Event::Done { usage, .. }) => Some(*usage),
                    _ => None,
                };
                let mut text = step(writer, end, event);
                if let Some(usage) = done {
                    left -= 1;
                    add(&mut sum, usage, prompts[index]);
                    if left == 0 {
                        text.push_str(&last(writer, &sum, &Value::Null));
                    }
                }
                text.into()
            }
            (Step::Says(event), None) => event.err().map(|error| sse(&openai_body(&error))).unwrap_or_default().into(),
        }
    };
    Ok(event_stream(headers, bodies::body(steps.boxed(), app.stall, None, encode)))
}

/// Adds what another answer took; a prompt that is the same counts once.
fn add(sum: &mut Usage, usage: Usage, prompt: bool) {
    sum.completion_tokens = sum.completion_tokens.saturating_add(usage.completion_tokens);
    if prompt {
        sum.prompt_tokens = sum.prompt_tokens.saturating_add(usage.prompt_tokens);
        sum.cached_tokens = sum.cached_tokens.saturating_add(usage.cached_tokens);
    }
}
