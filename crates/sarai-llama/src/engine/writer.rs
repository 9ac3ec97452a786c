//! What writes an answer: it chooses the tokens, and makes of them what is passed on.

use std::collections::HashMap;

use llama_cpp_4::model::Special;
use llama_cpp_4::token::LlamaToken;
use sarai_core::{Event, FinishReason, TokenLogprob};

use crate::answer::AnswerText;
use crate::chat::Parts;
use crate::media::{Lack, Pieces, Source};
use crate::sampler::Sampler;

/// What writes an answer.
pub struct Writer {
    /// Chooses its tokens.
    pub sampler: Sampler,
    /// Its text, as far as it is held back.
    pub answer: AnswerText,
    /// Its parts, where it is more than text.
    pub parts: Option<Parts>,
    /// What its prompt shows and lets hear, until that was computed.
    pub pieces: Pieces,
    /// What the pieces are of that it lacks, until they are being encoded.
    pub lacking: HashMap<u32, Lack>,
    /// What is being encoded.
    pub source: Source,
    /// How likely the tokens were whose text is not passed on yet, and how many others are told of.
    pub likely: Option<(usize, Vec<TokenLogprob>)>,
    /// The same of text of which it is not known yet whether it is the answer's, a thought's or a call's.
    pub unplaced: Vec<TokenLogprob>,
}

impl Writer {
    /// What is passed on of more text.
    pub fn events(&mut self, text: String) -> Vec<Event> {
        match &mut self.parts {
            _ if text.is_empty() => Vec::new(),
            Some(parts) => {
                let events = parts.push(&text);
                let likely = self.likely_of(&text);
                self.unplaced.extend(likely.into_iter().flatten());
                self.placed(events)
            }
            None => {
                let likely = self.likely_of(&text).map(Event::Logprobs);
                likely.into_iter().chain([Event::Text(text)]).collect()
            }
        }
    }

    /// What is passed on once all of the answer is there, beside its last text, and why it really ended.
    pub fn finish(&mut self, finish: FinishReason) -> (Vec<Event>, FinishReason) {
        let Some(parts) = &mut self.parts else { return (Vec::new(), finish) };
        let (rest, why) = parts.finish(finish);
        (self.placed(rest), why)
    }

    /// Puts how likely the tokens of the answer's own text were before it. Marks stand between the parts, so each is the last text that
    /// is as long as it.
    fn placed(&mut self, events: Vec<Event>) -> Vec<Event> {
        if events.is_empty() {
            return events;
        }
        let mut left = std::mem::take(&mut self.unplaced);
        let mut placed = Vec::with_capacity(2 * events.len());
        for event in events.into_iter().rev() {
            let length = match &event {
                Event::Text(text) | Event::Reasoning(text) => text.len(),
                _ => usize::MAX,
            };
            let likely = left.split_off(last(&left, length));
            let is_told = matches!(event, Event::Text(_)) && !likely.is_empty();
            placed.push(event);
            placed.extend(is_told.then_some(Event::Logprobs(likely)));
        }
        placed.reverse();
        placed
    }

    /// Of the tokens that this text is made of; those of a text that ended the answer are left.
    fn likely_of(&mut self, text: &str) -> Option<Vec<TokenLogprob>> {
        let (_, waiting) = self.likely.as_mut()?;
        let mut bytes = 0;
        let ends_within = |token: &&TokenLogprob| {
            bytes += token.bytes.len();
            bytes <= text.len().max(1)
        };
        let count = waiting.iter().take_while(ends_within).count();
        Some(waiting.drain(..count).collect())
    }

    /// Whether a special token is part of the text.
    pub fn shown(&self, token: LlamaToken) -> Special {
        match &self.parts {
            Some(parts) if parts.preserved.contains(&token) => Special::Tokenize,
            _ => Special::Plaintext,
        }
    }
}

/// Where the last tokens begin that together are so many bytes.
fn last(tokens: &[TokenLogprob], length: usize) -> usize {
    let mut bytes = 0;
    let is_of_it = |token: &&TokenLogprob| {
        let is_short = bytes < length;
        bytes += token.bytes.len();
        is_short
    };
    tokens.len() - tokens.iter().rev().take_while(is_of_it).count()
}
