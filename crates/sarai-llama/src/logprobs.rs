//! How likely the chosen token was, and what else was likely: by the model alone, before any sampling.

use llama_cpp_4::model::{LlamaModel, Special};
use llama_cpp_4::token::LlamaToken;
use sarai_core::TokenLogprob;

/// What a token that has no chance is given: JSON has no infinity.
const NONE: f32 = -9999.0;

/// Of a chosen token, and of the so many likeliest.
pub fn of(model: &LlamaModel, logits: &[f32], chosen: LlamaToken, alternatives: usize) -> TokenLogprob {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - highest).exp()).sum();
    let log_of = |logit: f32| -> f32 {
        #[expect(clippy::cast_possible_truncation, reason = "a logarithm of a probability")]
        let logprob = (f64::from(logit - highest) - sum.ln()) as f32;
        if logprob.is_finite() { logprob.max(NONE) } else { NONE }
    };
    let bytes = |token: LlamaToken| model.token_to_raw_bytes(token, Special::Plaintext).unwrap_or_default();
    let logit = |token: LlamaToken| usize::try_from(token.0).ok().and_then(|id| logits.get(id)).copied();
    let one = |token| TokenLogprob {
        bytes: bytes(token),
        logprob: log_of(logit(token).unwrap_or(f32::NEG_INFINITY)),
        top: Vec::new(),
    };
    let top = likeliest(logits, alternatives).into_iter().map(|id| one(LlamaToken(id))).collect();
    TokenLogprob { top, ..one(chosen) }
}

/// The ids of the highest logits, the highest first.
fn likeliest(logits: &[f32], count: usize) -> Vec<i32> {
    let mut best: Vec<(f32, i32)> = Vec::with_capacity(count + 1);
    for (id, &logit) in (0..).zip(logits) {
        if best.len() < count || best.last().is_some_and(|(least, _)| logit > *least) {
            let at = best.partition_point(|(known, _)| *known >= logit);
            best.insert(at, (logit, id));
            best.truncate(count);
        }
    }
    best.into_iter().map(|(_, id)| id).collect()
}

#[cfg(test)]
mod tests {
    use super::likeliest;

    #[test]
    fn the_highest_come_first_and_of_equals_the_first() {
        assert_eq!(likeliest(&[0.5, 2.0, -1.0, 2.0, 1.0], 3), [1, 3, 4]);
        assert!(likeliest(&[0.5], 0).is_empty());
        assert_eq!(likeliest(&[0.5, 1.0], 5), [1, 0]);
    }
}
