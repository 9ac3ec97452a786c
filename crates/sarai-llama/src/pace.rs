//! How many tokens of prompts a step takes beside running answers, so that these keep their pace.

use std::time::Duration;

/// How much longer than a step of answers alone a step may be that takes prompts in beside them.
const LONGER: f64 = 6.0;
/// A step takes at least so many tokens of a prompt: fewer are hardly quicker.
const FEWEST: usize = 16;
/// Tokens of a prompt beside answers while nothing has been measured.
const UNKNOWN: usize = 64;
/// A measurement counts as so many times what is known at most.
const MOST: f64 = 8.0;
/// How much the newest measurement counts.
const NEWEST: f64 = 0.25;

/// What steps take, learned from those that were computed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// Seconds of a step of answers alone.
    answers: Option<f64>,
    /// Seconds of one token of a prompt.
    prompt_token: Option<f64>,
}

impl Pace {
    /// Learns from a step.
    pub fn observe(&mut self, answers: usize, prompt_tokens: usize, took: Duration) {
        let took = took.as_secs_f64();
        match (answers, prompt_tokens) {
            (0, 0) => {}
            (_, 0) => mix(&mut self.answers, took),
            (0, tokens) => mix(&mut self.prompt_token, took / tokens as f64),
            (_, tokens) => {
                let beside = took - self.answers.unwrap_or(0.0);
                mix(&mut self.prompt_token, beside.max(took / 10.0) / tokens as f64);
            }
        }
    }

    /// Tokens of prompts for a step that also has answers.
    pub fn prompt_tokens_beside_answers(&self) -> usize {
        let (Some(answers), Some(prompt_token)) = (self.answers, self.prompt_token) else { return UNKNOWN };
        let tokens = answers * (LONGER - 1.0) / prompt_token.max(f64::MIN_POSITIVE);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small positive number")]
        let tokens = tokens.min(f64::from(u16::MAX)) as usize;
        tokens.max(FEWEST)
    }

    /// How long so many tokens of prompts take, once that is known.
    pub fn prompt_seconds(&self, tokens: usize) -> Option<f64> {
        self.prompt_token.map(|prompt_token| prompt_token * tokens as f64)
    }

    /// How often so many seconds pass while one token of a prompt is computed, once that is known.
    pub fn prompt_tokens_worth(&self, seconds: f64) -> Option<u64> {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a positive number, or infinity")]
        self.prompt_token.map(|prompt_token| (prompt_token / seconds) as u64)
    }
}

fn mix(known: &mut Option<f64>, newest: f64) {
    // A process that was stopped meanwhile has not computed for so long.
    *known = Some(known.map_or(newest, |known| known + NEWEST * (newest.min(known * MOST) - known)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_beside_answers_takes_a_few_times_as_long_as_one_of_answers_alone() {
        let mut pace = Pace::default();
        assert_eq!(pace.prompt_tokens_beside_answers(), UNKNOWN);
        for _ in 0..40 {
            pace.observe(4, 0, Duration::from_millis(25));
            let prompt = pace.prompt_tokens_beside_answers();
            pace.observe(4, prompt, Duration::from_millis(25 + 2 * prompt as u64));
        }
        // 25 ms of answers, and five times as much of prompts at 2 ms each.
        let tokens = pace.prompt_tokens_beside_answers();
        assert!((60..=64).contains(&tokens), "{tokens}");
    }

    #[test]
    fn a_pause_of_the_process_is_forgotten_soon() {
        let mut pace = Pace::default();
        for _ in 0..8 {
            pace.observe(4, 0, Duration::from_millis(25));
            pace.observe(4, 50, Duration::from_millis(125));
        }
        let usual = pace.prompt_tokens_beside_answers();
        pace.observe(4, 0, Duration::from_secs(600));
        assert!(pace.prompt_tokens_beside_answers() < 4 * usual);
        (0..8).for_each(|_| pace.observe(4, 0, Duration::from_millis(25)));
        assert!(pace.prompt_tokens_beside_answers() < usual + usual / 3);
    }

    #[test]
    fn a_slow_prompt_still_goes_on() {
        let mut pace = Pace::default();
        pace.observe(1, 0, Duration::from_millis(1));
        pace.observe(0, 1, Duration::from_secs(1));
        assert_eq!(pace.prompt_tokens_beside_answers(), FEWEST);
    }
}
