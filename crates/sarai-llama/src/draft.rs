//! What an answer may go on with: where its last tokens stood before, in the prompt or the answer, the same may follow again. llama.cpp
//! finds it, the model computes it in one step, and what it would have said otherwise is taken back.

use llama_cpp_4::ngram::ngram_simple_draft;
use llama_cpp_4::token::LlamaToken;

use crate::unit::Unit;

/// So many of the last tokens must have stood there before.
const ALIKE: u16 = 3;
/// How much the newest step counts.
const NEWEST: f32 = 0.3;
/// Below this share of guesses that were right, none are made for a while.
const UNLUCKY: f32 = 0.3;
/// For so many tokens.
const PAUSE: u32 = 24;

/// How well guessing has gone in one answer.
#[derive(Clone, Copy, Debug)]
pub struct Luck {
    /// Share of the guesses that were right, lately.
    right: f32,
    /// Tokens until it is tried again.
    pause: u32,
}

impl Default for Luck {
    fn default() -> Self {
        Self { right: 0.6, pause: 0 }
    }
}

impl Luck {
    /// Learns how many guesses were right.
    #[expect(clippy::cast_precision_loss, reason = "a few tokens")]
    pub fn learn(&mut self, right: usize, guessed: usize) {
        if guessed == 0 {
            return;
        }
        self.right += NEWEST * (right as f32 / guessed as f32 - self.right);
        if self.right < UNLUCKY {
            // Afterwards it has another chance.
            *self = Self { pause: PAUSE, ..Self::default() };
        }
    }

    /// Guesses what follows, at most so many tokens; nothing if they did not stand there before.
    pub fn guess(&mut self, before: &[Unit], next: LlamaToken, most: usize) -> Vec<LlamaToken> {
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
    fn what_followed_before_is_guessed() {
        let before = units(&[9, 1, 2, 3, 4, 5, 6, 7, 8, 20, 21, 1, 2]);
        let guessed = Luck::default().guess(&before, LlamaToken(3), 4);
        assert_eq!(guessed, [4, 5, 6, 7].map(LlamaToken));
        assert!(Luck::default().guess(&before, LlamaToken(30), 4).is_empty());
    }

    #[test]
    fn who_is_wrong_too_often_pauses_and_tries_again() {
        let before = units(&[9, 1, 2, 3, 4, 5, 6, 7, 8, 20, 21, 1, 2]);
        let mut luck = Luck::default();
        while !luck.guess(&before, LlamaToken(3), 4).is_empty() {
            luck.learn(0, 4);
        }
        let paused = (0..100).take_while(|_| luck.guess(&before, LlamaToken(3), 4).is_empty()).count();
        assert!((20..30).contains(&paused), "{paused}");
    }
}
