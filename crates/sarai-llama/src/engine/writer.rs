//! What writes an answer: it chooses the tokens, and makes of them what is passed on.

use std::collections::HashMap;

use llama_cpp_4::model::Special;
use llama_cpp_4::token::LlamaToken;
use sarai_core::{Event, TokenLogprob};

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
}

impl Writer {
    /// What is passed on of more text.
    pub fn events(&mut self, text: String) -> Vec<Event> {
        match &mut self.parts {
            _ if text.is_empty() => Vec::new(),
            Some(parts) => parts.push(&text),
            None => {
                let likely = self.likely_of(&text).map(Event::Logprobs);
                likely.into_iter().chain([Event::Text(text)]).collect()
            }
        }
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
