//! Several answers to one request (`n`, or several prompts): each is dispatched for itself, so that they share the prompt's cells,
//! and hosts need know nothing of it.

use std::future::ready;

use axum::http::HeaderMap;
use axum::response::Response;
use bytes::Bytes;
use futures_util::future::try_join_all;
use futures_util::stream::{self, StreamExt};
use sarai_api::openai::{ChunkWriter, join};
use sarai_api::{Delivery, Parsed};
use sarai_core::{Error, Event, GenerateRequest, Prompt, Usage};
use serde_json::Value;

use super::super::waiting::{self, Begun, Step};
use super::super::{App, json_response, served_headers};
use super::{End, event_stream, last, write_step};
use crate::dispatch::{Answer, Terms};
use crate::http::stream as bodies;

/// Answers all of it.
///
/// # Errors
/// One of them cannot begin, or, where they are wanted whole, ends with an error.
pub async fn answer(app: App, parsed: Parsed, writer: ChunkWriter, terms: Terms) -> Result<Response, Error> {
    let Parsed { model, request, others, delivery } = parsed;
    let requests: Vec<_> = [request].into_iter().chain(others).collect();
    let sum = Sum::of(&requests);
    let asked: Vec<_> = requests.into_iter().map(|request| one(&model, request, delivery)).collect();
    match delivery.stream {
        true => streamed(app, asked, sum, writer, terms).await,
        false => whole(app, asked, sum, writer, terms).await,
    }
}

fn one(model: &str, request: GenerateRequest, delivery: Delivery) -> Parsed {
    Parsed { model: model.to_owned(), request, others: Vec::new(), delivery }
}

/// What all of them took: a prompt that is the same counts once.
struct Sum {
    /// For each, the first that has the same prompt.
    first_of_prompt: Vec<usize>,
    usage: Usage,
}

impl Sum {
    fn of(requests: &[GenerateRequest]) -> Self {
        let mut known: Vec<(&Prompt, usize)> = Vec::new();
        let first = requests.iter().enumerate().map(|(index, request)| match known.last() {
            Some((prompt, first)) if **prompt == request.prompt => *first,
            _ => {
                known.push((&request.prompt, index));
                index
            }
        });
        Self { first_of_prompt: first.collect(), usage: Usage::default() }
    }

    fn add(&mut self, index: usize, usage: Usage) {
        let sum = &mut self.usage;
        sum.completion_tokens = sum.completion_tokens.saturating_add(usage.completion_tokens);
        if self.first_of_prompt[index] == index {
            sum.prompt_tokens = sum.prompt_tokens.saturating_add(usage.prompt_tokens);
            sum.cached_tokens = sum.cached_tokens.saturating_add(usage.cached_tokens);
        }
    }
}

async fn whole(
    app: App,
    asked: Vec<Parsed>,
    mut sum: Sum,
    writer: ChunkWriter,
    terms: Terms,
) -> Result<Response, Error> {
    let answers = asked.into_iter().enumerate().map(|(index, parsed)| {
        let (gateway, writer) = (&app.gateway, ChunkWriter { index, ..writer.clone() });
        async move {
            let Answer { served, events } = gateway.answer(parsed, terms).await?;
            let whole = bodies::collect(events).await?;
            Ok::<_, Error>((served_headers(&served), whole.usage, writer.by(&served).whole(whole, &served)))
        }
    });
    let mut all = None;
    for (index, (headers, usage, body)) in try_join_all(answers).await?.into_iter().enumerate() {
        sum.add(index, usage);
        match &mut all {
            None => all = Some((headers, body)),
            Some((_, all)) => join(all, body, &sum.usage),
        }
    }
    let (headers, all) = all.ok_or_else(|| Error::Internal("nothing was asked".into()))?;
    Ok(json_response(headers, &all))
}

async fn streamed(
    app: App,
    asked: Vec<Parsed>,
    mut sum: Sum,
    writer: ChunkWriter,
    terms: Terms,
) -> Result<Response, Error> {
    let mut answers: Vec<_> =
        (0..asked.len()).map(|index| (ChunkWriter { index, ..writer.clone() }, None::<End>)).collect();
    let mut asked = asked.into_iter();
    let Some(first) = asked.next() else { return Err(Error::Internal("nothing was asked".into())) };
    // Who serves stands in the headers, and how a failure before them looks is its own.
    let (headers, first) = match waiting::begin(app.clone(), first, terms).await? {
        Begun::Answer(answer) => (served_headers(&answer.served), waiting::answered(Ok(answer))),
        Begun::Waiting(waiting) => (HeaderMap::new(), waiting.steps()),
    };
    let gateway = app.gateway.clone();
    let later = asked.map(move |parsed| {
        let gateway = gateway.clone();
        let answer = async move { waiting::answered(gateway.answer(parsed, terms).await) };
        stream::once(answer).flatten().boxed()
    });
    let all = [first].into_iter().chain(later).enumerate();
    let steps = stream::select_all(all.map(|(index, steps)| steps.map(move |step| (index, step)).boxed()));
    // After an error nothing follows, and the others end with it.
    let steps = steps.scan(false, |has_failed, (index, step)| {
        let goes_on = !*has_failed;
        *has_failed = matches!(step, Step::Says(Err(_)));
        ready(goes_on.then_some((index, step)))
    });

    let mut left = answers.len();
    let encode = move |(index, what): (usize, Step)| -> Bytes {
        let done = match &what {
            Step::Says(Ok(Event::Done { usage, .. })) => Some(*usage),
            _ => None,
        };
        let (writer, end) = &mut answers[index];
        let mut text = write_step(writer, end, what);
        if let Some(usage) = done {
            left -= 1;
            sum.add(index, usage);
            if left == 0 {
                text.push_str(&last(writer, &sum.usage, None, &Value::Null));
            }
        }
        text.into()
    };
    Ok(event_stream(headers, bodies::body(steps.boxed(), app.stall, None, encode)))
}
