//! What an answer may go on with: where its last tokens stood before, in the prompt or the answer, the same may follow again. llama.cpp
//! finds it, the model computes it in one step, and what it would have said otherwise is taken back.

use llama_cpp_4::ngram::ngram_simple_draft;
use llama_cpp_4::token::LlamaToken;

use crate::unit::Unit;

/// So many of the last tokens must have stood there before.
const ALIKE: u16 = 3;
/// How much the newest step counts.
const NEWEST: f32 = 0.3;
/// Below this share of accepted tokens, nothing is drafted for a while.
const FEWEST: f32 = 0.3;
/// For so many tokens.
const PAUSE: u32 = 24;

/// How much of what was drafted was accepted in one answer.
#[derive(Clone, Copy, Debug)]
pub struct Acceptance {
    /// Share of the drafted tokens that were accepted, lately.
    accepted: f32,
    /// Tokens until it is tried again.
    pause: u32,
}

impl Default for Acceptance {
    fn default() -> Self {
        Self { accepted: 0.6, pause: 0 }
    }
}

impl Acceptance {
    /// Learns how many of the drafted tokens were accepted.
    #[expect(clippy::cast_precision_loss, reason = "a few tokens")]
    pub fn learn(&mut self, accepted: usize, drafted: usize) {
        if drafted == 0 {
            return;
        }
        self.accepted += NEWEST * (accepted as f32 / drafted as f32 - self.accepted);
        if self.accepted < FEWEST {
            // Afterwards it has another chance.
            *self = Self { pause: PAUSE, ..Self::default() };
        }
    }

    /// Whether nothing is drafted for now.
    pub fn is_paused(&self) -> bool {
        self.pause > 0
    }

    /// Guesses what follows, at most so many tokens; nothing if they did not stand there before.
    pub fn draft(&mut self, before: &[Unit], next: LlamaToken, most: usize) -> Vec<LlamaToken> {
        self.pause = self.pause.saturating_sub(1);
        if self.pause > 0 || most == 0 {
            return Vec::new();
        }
        // What comes after the last picture.
        let mut text: Vec<_> = before.iter().rev().map_while(|unit| unit.text()).collect();
        text.reverse();
        let most = u16::try_from(most).unwrap_or(u16::MAX);
        ngram_simple_draft(ALIKE, most, &text, next).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn units(tokens: &[i32]) -> Vec<Unit> {
        tokens.iter().map(|&token| LlamaToken(token).into()).collect()
    }

    #[test]
    fn what_followed_before_is_drafted() {
        let before = units(&[9, 1, 2, 3, 4, 5, 6, 7, 8, 20, 21, 1, 2]);
        let drafted = Acceptance::default().draft(&before, LlamaToken(3), 4);
        assert_eq!(drafted, [4, 5, 6, 7].map(LlamaToken));
        assert!(Acceptance::default().draft(&before, LlamaToken(30), 4).is_empty());
    }

    #[test]
    fn who_is_wrong_too_often_pauses_and_tries_again() {
        let before = units(&[9, 1, 2, 3, 4, 5, 6, 7, 8, 20, 21, 1, 2]);
        let mut acceptance = Acceptance::default();
        while !acceptance.draft(&before, LlamaToken(3), 4).is_empty() {
            acceptance.learn(0, 4);
        }
        let paused = (0..100).take_while(|_| acceptance.draft(&before, LlamaToken(3), 4).is_empty()).count();
        assert!((20..30).contains(&paused), "{paused}");
    }
}
