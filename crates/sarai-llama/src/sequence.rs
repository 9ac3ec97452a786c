//! One sequence of the KV cache: the tokens that it holds, and the generation that runs in it, if any.

use std::time::Instant;

use llama_cpp_4::common_sampler::CommonSampler;
use llama_cpp_4::token::LlamaToken;
use sarai_core::{FinishReason, Timings, Usage};

use crate::answer::AnswerText;

/// A running generation.
pub struct Generation {
    /// Names it in frames.
    pub id: u64,
    /// Chooses its tokens.
    pub sampler: CommonSampler,
    /// Its text so far, as far as it is held back.
    pub answer: AnswerText,
    /// All tokens of the prompt.
    pub prompt: Vec<LlamaToken>,
    /// Tokens at its end that are the beginning of the answer, given elsewhere.
    pub given: usize,
    /// Tokens of the prompt that were in the cache already.
    pub cached: usize,
    /// Tokens generated.
    pub generated: u32,
    /// Tokens that prompt and answer may have together.
    pub context_tokens: usize,
    /// Tokens it may generate.
    pub max_tokens: u32,
    /// The token that the next step computes, once the prompt is done.
    pub next: Option<LlamaToken>,
    /// Row of this step's batch that holds its logits.
    pub output_row: Option<i32>,
    /// When prefill began.
    pub started: Instant,
    /// When the first token was there.
    pub first_token: Option<Instant>,
}

impl Generation {
    /// Cells that it may need.
    pub fn reserves(&self) -> usize {
        let answer = (self.max_tokens as usize).max(self.given);
        (self.prompt.len() - self.given).saturating_add(answer).min(self.context_tokens)
    }

    /// What it took in tokens.
    pub fn usage(&self) -> Usage {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Usage {
            prompt_tokens: count(self.prompt.len() - self.given),
            cached_tokens: count(self.cached.min(self.prompt.len() - self.given)),
            completion_tokens: count(self.given).saturating_add(self.generated),
        }
    }

    /// What it took in time; the server adds queue and load.
    pub fn timings(&self) -> Timings {
        let first = self.first_token.unwrap_or_else(Instant::now);
        Timings { prefill: first - self.started, decode: first.elapsed(), ..Timings::default() }
    }

    /// Why it must end now, if it must.
    pub fn limit(&self, in_cache: usize) -> Option<FinishReason> {
        (self.usage().completion_tokens >= self.max_tokens || in_cache >= self.context_tokens)
            .then_some(FinishReason::Length)
    }
}

/// A place for one generation; its cache outlives the generation, so that the next one can share a prefix.
#[derive(Default)]
pub struct Sequence {
    /// The tokens whose keys and values are in the cache, in order.
    pub cached: Vec<LlamaToken>,
    /// What runs in it.
    pub generation: Option<Generation>,
    /// Counts up with each use, to find the least recently used.
    pub last_used: u64,
}

impl Sequence {
    /// Tokens of the running generation's prompt that are not computed yet.
    pub fn prompt_left(&self) -> usize {
        let generation = self.generation.as_ref();
        generation.map_or(0, |generation| generation.prompt.len().saturating_sub(self.cached.len()))
    }

    /// When the running generation came, as a number that grows.
    pub fn age(&self) -> u64 {
        self.generation.as_ref().map_or(u64::MAX, |generation| generation.id)
    }

    /// How many tokens of this prompt are in the cache, from the start.
    pub fn shared_prefix(&self, prompt: &[LlamaToken]) -> usize {
        self.cached.iter().zip(prompt).take_while(|(cached, wanted)| cached == wanted).count()
    }
}
