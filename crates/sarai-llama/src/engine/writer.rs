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
    /// Each with what it says.
    tokens: Vec<(LlamaToken, Vec<u8>)>,
    /// What was passed on.
    text: String,
}

impl Told {
    /// A token that was chosen, and what it says.
    pub fn push(&mut self, token: LlamaToken, piece: &[u8]) {
        self.tokens.push((token, piece.to_vec()));
    }

    /// Those that say what was passed on, and what is left of that: a text that ends the answer may begin within a token.
    pub fn passed_on(&self) -> (impl Iterator<Item = LlamaToken>, &str) {
        let (mut end, mut whole, mut said) = (0, 0, 0);
        for (index, (_, piece)) in self.tokens.iter().enumerate() {
            if !self.text.as_bytes()[end..].starts_with(piece) {
                break;
            }
            end += piece.len();
            if self.text.is_char_boundary(end) {
                (whole, said) = (index + 1, end);
            }
        }
        (self.tokens[..whole].iter().map(|(token, _)| *token), &self.text[said..])
    }
}

impl Writer {
    /// What is passed on of more text.
    pub fn events(&mut self, text: String) -> Vec<Event> {
        self.told.iter_mut().for_each(|told| told.text.push_str(&text));
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
    fn what_was_passed_on_is_told_and_nothing_of_a_text_that_ended_it() {
        let told = |text: &str| {
            let mut told = Told { text: text.into(), ..Told::default() };
            let pieces: [&[u8]; 7] = [b"one", b" t", b"wo", &[0xc3], &[0xa9], b"##", b""];
            pieces.iter().zip(1..).for_each(|(piece, token)| told.push(LlamaToken(token), piece));
            let (tokens, rest) = told.passed_on();
            (tokens.map(|token| token.0).collect::<Vec<_>>(), rest.to_owned())
        };
        assert_eq!(told(""), (vec![], String::new()));
        assert_eq!(told("one two"), (vec![1, 2, 3], String::new()));
        assert_eq!(told("one tw"), (vec![1, 2], "w".into()), "it ended within a token");
        assert_eq!(told("one twoé"), (vec![1, 2, 3, 4, 5], String::new()), "a letter of two tokens");
        assert_eq!(told("one twoé##"), (vec![1, 2, 3, 4, 5, 6, 7], String::new()), "the mark of its end says nothing");
        assert_eq!(told("one two\u{fffd}"), (vec![1, 2, 3], "\u{fffd}".into()), "what is no letter was replaced");
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
