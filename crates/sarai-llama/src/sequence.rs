//! One sequence of the KV cache: the tokens that it holds, and the generation that runs in it, if any.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use llama_cpp_4::token::LlamaToken;
use sarai_core::{FinishReason, Lane, Timings, Usage};

use crate::draft::Acceptance;
use crate::unit::{Unit, positions};

/// A generation that has not begun.
pub struct Waiting<W> {
    /// Names it in frames.
    pub id: u64,
    /// All of the prompt; it ends with text.
    pub prompt: Vec<Unit>,
    /// Tokens at its end that are the beginning of the answer, given elsewhere.
    pub given: usize,
    /// Whether it may take its time.
    pub lane: Lane,
    /// Tokens it may generate.
    pub max_tokens: u32,
    /// Tokens that prompt and answer may have together.
    pub context_tokens: usize,
    /// When it came.
    pub since: Instant,
    /// How long its pictures and sound took to be encoded.
    pub encode: Duration,
    /// Pieces of media that must be encoded before they can be computed.
    pub lacks: HashSet<u32>,
    /// Chooses its tokens and writes its text.
    pub writer: W,
}

impl<W> Waiting<W> {
    /// Cells that it may need.
    pub fn reserves(&self) -> usize {
        let answer = (self.max_tokens as usize).max(self.given);
        (self.prompt.len() - self.given).saturating_add(answer).min(self.context_tokens)
    }

    /// Whether a unit must be encoded first.
    pub fn lacks(&self, unit: Option<Unit>) -> bool {
        matches!(unit, Some(Unit::Media { piece, .. }) if self.lacks.contains(&piece))
    }
}

/// A running generation.
pub struct Generation<W> {
    /// What was asked for.
    pub asked: Waiting<W>,
    /// Tokens of the prompt that it did not have to compute.
    pub cached: usize,
    /// The first step that it could take part in.
    pub began: u64,
    /// The step that computes the first token of its answer.
    pub answers_since: Option<u64>,
    /// Tokens generated.
    pub generated: u32,
    /// The token that the next step computes, once the prompt is done.
    pub next: Option<LlamaToken>,
    /// What may follow it.
    pub draft: Vec<LlamaToken>,
    /// Row of this step's batch that holds its logits; those of its draft follow.
    pub output_row: Option<i32>,
    /// Guesses that this step computes.
    pub drafted: usize,
    /// How much of its drafts was accepted.
    pub acceptance: Acceptance,
    /// The same of all of them, in tokens: drafted, accepted.
    drafts: (u32, u32),
    /// When the first token was there.
    pub first_token: Option<Instant>,
}

impl<W> Generation<W> {
    /// A generation of which nothing is computed but what the cache has, before this step.
    pub fn new(asked: Waiting<W>, cached: usize, began: u64) -> Self {
        Self {
            asked,
            cached,
            began,
            answers_since: None,
            generated: 0,
            next: None,
            draft: Vec::new(),
            output_row: None,
            drafted: 0,
            acceptance: Acceptance::default(),
            drafts: (0, 0),
            first_token: None,
        }
    }

    /// Counts a draft that was computed.
    pub fn count_draft(&mut self, accepted: usize, drafted: usize) {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        self.drafts = (self.drafts.0.saturating_add(count(drafted)), self.drafts.1.saturating_add(count(accepted)));
    }

    /// What it took in tokens.
    pub fn usage(&self) -> Usage {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let Waiting { prompt, given, .. } = &self.asked;
        Usage {
            prompt_tokens: count(prompt.len() - given),
            cached_tokens: count(self.cached.min(prompt.len() - given)),
            completion_tokens: count(*given).saturating_add(self.generated),
        }
    }

    /// What it took in time; the server adds queue and load.
    pub fn timings(&self) -> Timings {
        let first = self.first_token.unwrap_or_else(Instant::now);
        let Waiting { since, encode, .. } = self.asked;
        let prefill = (first - since).saturating_sub(encode);
        let (drafted, accepted) = self.drafts;
        Timings { encode, prefill, decode: first.elapsed(), drafted, accepted, ..Timings::default() }
    }

    /// Why it must end now, if it must.
    pub fn limit(&self, in_cache: usize) -> Option<FinishReason> {
        (self.usage().completion_tokens >= self.asked.max_tokens || in_cache >= self.asked.context_tokens)
            .then_some(FinishReason::Length)
    }
}

/// A place for one generation; its cache outlives the generation, so that later ones can share a prefix.
pub struct Sequence<W> {
    /// What has its keys and values in the cache, in order.
    pub cached: Vec<Unit>,
    /// What runs in it.
    pub generation: Option<Generation<W>>,
    /// Counts up with each use, to find the least recently used.
    pub last_used: u64,
    /// How many tokens had been computed when it was used last.
    pub last_row: u64,
}

impl<W> Default for Sequence<W> {
    fn default() -> Self {
        Self { cached: Vec::new(), generation: None, last_used: 0, last_row: 0 }
    }
}

impl<W> Sequence<W> {
    /// The position that follows the first `count` units that it holds.
    pub fn position(&self, count: usize) -> usize {
        positions(&self.cached[..count])
    }

    /// Units of the running generation's prompt that are not computed yet.
    pub fn prompt_left(&self) -> usize {
        let generation = self.generation.as_ref();
        generation.map_or(0, |generation| generation.asked.prompt.len().saturating_sub(self.cached.len()))
    }

    /// What of the running generation's prompt is computed next.
    pub fn next_of_prompt(&self) -> Option<Unit> {
        self.generation.as_ref()?.asked.prompt.get(self.cached.len()).copied()
    }

    /// Whether the next of the running generation's prompt must be encoded first.
    pub fn is_stuck(&self) -> bool {
        let lacks = |generation: &Generation<W>| generation.asked.lacks(self.next_of_prompt());
        self.generation.as_ref().is_some_and(lacks)
    }

    /// How many of the last of its tokens are an answer's that the step that is being filled computes.
    pub fn in_step(&self) -> usize {
        let generation = self.generation.as_ref().filter(|generation| generation.output_row.is_some());
        generation.map_or(0, |generation| 1 + generation.drafted)
    }

    /// Whether nobody waits for the running generation.
    pub fn is_bulk(&self) -> bool {
        self.generation.as_ref().is_some_and(|generation| generation.asked.lane == Lane::Bulk)
    }

    /// When the running generation came, as a number that grows.
    pub fn age(&self) -> u64 {
        self.generation.as_ref().map_or(u64::MAX, |generation| generation.asked.id)
    }
}
