//! What writes an answer: it chooses the tokens, and makes of them what is passed on.

use std::collections::HashMap;
use std::ops::Range;

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
    /// Its tokens, where they are told.
    pub told: Option<Told>,
}

/// Tokens of an answer that are told behind its end.
#[derive(Default)]
pub struct Told {
    /// Each with the bytes of its text.
    tokens: Vec<(LlamaToken, usize)>,
    /// Bytes of the text that was passed on.
    bytes: usize,
}

impl Told {
    /// A token that was chosen.
    pub fn push(&mut self, token: LlamaToken, bytes: usize) {
        self.tokens.push((token, bytes));
    }

    /// Those whose text was passed on: of a text that ends the answer there is nothing.
    pub fn passed_on(&self) -> impl Iterator<Item = LlamaToken> {
        let mut end = 0;
        let is_within = move |(token, bytes): &(LlamaToken, usize)| {
            end += bytes;
            (end <= self.bytes).then_some(*token)
        };
        self.tokens.iter().map_while(is_within)
    }
}

impl Writer {
    /// What is passed on of more text.
    pub fn events(&mut self, text: String) -> Vec<Event> {
        self.told.iter_mut().for_each(|told| told.bytes += text.len());
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

    /// Puts how likely the tokens of the answer's own text were before it. Beside the parts stand marks, which are in no part.
    fn placed(&mut self, events: Vec<Event>) -> Vec<Event> {
        let calls = events.iter().any(|event| matches!(event, Event::ToolCall(_)));
        let mut placed = Vec::with_capacity(2 * events.len());
        for event in events {
            if let Event::Text(text) | Event::Reasoning(text) = &event {
                // What follows a call is the next call's; else, the text is what came last.
                let found = spanned(&self.unplaced, text.as_bytes(), !calls);
                let rest = self.unplaced.split_off(found.end);
                let likely = self.unplaced.split_off(found.start);
                self.unplaced = rest;
                if matches!(event, Event::Text(_)) && !likely.is_empty() {
                    placed.push(Event::Logprobs(likely));
                }
            }
            placed.push(event);
        }
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

/// Which tokens have a part in a text: where it stands for the first time, or for the last; those before it if it stands nowhere.
fn spanned(tokens: &[TokenLogprob], text: &[u8], is_last: bool) -> Range<usize> {
    let joined: Vec<u8> = tokens.iter().flat_map(|token| token.bytes.iter().copied()).collect();
    let mut places = joined.windows(text.len().max(1)).enumerate().filter(|(_, bytes)| *bytes == text);
    let place = if is_last { places.next_back() } else { places.next() };
    let Some((from, _)) = place else { return tokens.len()..tokens.len() };
    let mut end = 0;
    let ends: Vec<_> = tokens
        .iter()
        .map(|token| {
            end += token.bytes.len();
            end
        })
        .collect();
    let start = ends.partition_point(|end| *end <= from);
    start..ends.partition_point(|end| *end < from + text.len()) + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_text_that_ends_an_answer_no_token_is_told() {
        let mut told = Told::default();
        [("one", 1), (" t", 2), ("wo", 3), ("##", 4), ("#", 5)]
            .iter()
            .for_each(|(text, token)| told.push(LlamaToken(*token), text.len()));
        let of = |told: &Told| told.passed_on().map(|token| token.0).collect::<Vec<_>>();
        assert!(of(&told).is_empty());
        told.bytes = "one two".len();
        assert_eq!(of(&told), [1, 2, 3]);
        told.bytes = "one two###".len();
        told.push(LlamaToken(9), 0);
        assert_eq!(of(&told), [1, 2, 3, 4, 5, 9], "the mark of its end has no text");
    }

    #[test]
    fn tokens_are_found_by_the_text_that_they_have_a_part_in() {
        let token = |text: &str| TokenLogprob { bytes: text.as_bytes().to_vec(), logprob: 0.0, top: Vec::new() };
        let tokens: Vec<_> =
            ["<think>", "a", "</think>", "\n\nFor", "ty", ".", "<call>", "."].into_iter().map(token).collect();
        assert_eq!(spanned(&tokens, b"Forty", true), 3..5);
        assert_eq!(spanned(&tokens, b".", false), 5..6);
        assert_eq!(spanned(&tokens, b".", true), 7..8);
        assert_eq!(spanned(&tokens, b"nowhere", true), 8..8);
        assert_eq!(spanned(&[], b"x", true), 0..0);
    }
}
