//! How many tokens of prompts a step takes beside running answers, so that these keep their pace.

use std::time::Duration;

/// How much longer than a step of answers alone a step may be that takes prompts in beside them.
const LONGER: f64 = 6.0;
/// A step takes at least so many tokens of a prompt: fewer are hardly quicker.
const FEWEST: usize = 16;
/// Tokens of a prompt beside answers while nothing has been measured.
const UNKNOWN: usize = 64;
/// How much the newest measurement counts.
const NEWEST: f64 = 0.25;

/// From so many rows on, llama.cpp computes the attention of a step in tiles, which takes a fraction of the time per row where there is much to attend
/// to (`GGML_FA_TILE_Q`).
const TILE: usize = 64;

/// What steps take, learned from those that were computed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// Seconds of a step of answers alone.
    answers: Option<f64>,
    /// Seconds of one token of a prompt in a step of few rows.
    by_rows: Option<f64>,
    /// And in one that has enough of them for a tile.
    in_tiles: Option<f64>,
}

impl Pace {
    /// Learns from a step.
    pub fn observe(&mut self, answers: usize, prompt_tokens: usize, took: Duration) {
        let took = took.as_secs_f64();
        let prompt_token = if answers + prompt_tokens < TILE { &mut self.by_rows } else { &mut self.in_tiles };
        match (answers, prompt_tokens) {
            (0, 0) => {}
            (_, 0) => mix(&mut self.answers, took),
            (0, tokens) => mix(prompt_token, took / tokens as f64),
            (_, tokens) => {
                let beside = took - self.answers.unwrap_or(0.0);
                mix(prompt_token, beside.max(took / 10.0) / tokens as f64);
            }
        }
    }

    /// Tokens of prompts for a step that also has so many answers.
    pub fn prompt_tokens_beside(&self, answers: usize) -> usize {
        let Some(alone) = self.answers else { return UNKNOWN };
        let within = |prompt_token: Option<f64>| {
            let tokens = alone * (LONGER - 1.0) / prompt_token?.max(f64::MIN_POSITIVE);
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small positive number")]
            let tokens = tokens.min(f64::from(u16::MAX)) as usize;
            Some(tokens.max(FEWEST))
        };
        let (in_tiles, by_rows) = (within(self.in_tiles), within(self.by_rows));
        match in_tiles.filter(|tokens| tokens + answers >= TILE) {
            Some(tokens) => tokens,
            None => by_rows.or(in_tiles).unwrap_or(UNKNOWN),
        }
    }

    /// How often so many seconds pass while one token of a prompt is computed, once that is known.
    pub fn prompt_tokens_worth(&self, seconds: f64) -> Option<u64> {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a positive number, or infinity")]
        self.in_tiles.or(self.by_rows).map(|prompt_token| (prompt_token / seconds) as u64)
    }
}

fn mix(known: &mut Option<f64>, newest: f64) {
    *known = Some(known.map_or(newest, |known| known + NEWEST * (newest - known)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_beside_answers_takes_a_few_times_as_long_as_one_of_answers_alone() {
        let mut pace = Pace::default();
        assert_eq!(pace.prompt_tokens_beside(4), UNKNOWN);
        for _ in 0..40 {
            pace.observe(4, 0, Duration::from_millis(25));
            let prompt = pace.prompt_tokens_beside(4);
            pace.observe(4, prompt, Duration::from_millis(25 + 3 * prompt as u64));
        }
        // 25 ms of answers, and five times as much of prompts at 3 ms each.
        let tokens = pace.prompt_tokens_beside(4);
        assert!((40..=42).contains(&tokens), "{tokens}");
    }

    #[test]
    fn a_tile_is_filled_where_that_does_not_take_too_long() {
        let mut pace = Pace::default();
        let computed = |pace: &mut Pace, prompt: usize, tile: u64| {
            let each = if prompt + 4 < TILE { 4 } else { tile };
            pace.observe(4, prompt, Duration::from_millis(25 + each * prompt as u64));
        };
        pace.observe(4, 0, Duration::from_millis(25));
        for prompt in [20, 200] {
            computed(&mut pace, prompt, 2);
        }
        // 31 at 4 ms each, 62 at 2 ms.
        assert_eq!(pace.prompt_tokens_beside(1), 31);
        assert_eq!(pace.prompt_tokens_beside(2), 62);
        for _ in 0..40 {
            computed(&mut pace, 200, 3);
        }
        assert_eq!(pace.prompt_tokens_beside(4), 31, "a tile would take too long");
    }

    #[test]
    fn a_slow_prompt_still_goes_on() {
        let mut pace = Pace::default();
        pace.observe(1, 0, Duration::from_millis(1));
        pace.observe(0, 1, Duration::from_secs(1));
        assert_eq!(pace.prompt_tokens_beside(1), FEWEST);
    }
}
