//! A draft model: a smaller one of the same vocabulary, which guesses what an answer goes on with. What it takes, and which can be one.

use sarai_core::{Bytes, Purpose};

use crate::estimate::{Settings, kv_cache, output, process, vocabulary};
use crate::gguf::{GgufError, Header};
use crate::layers::{Layers, purpose};
use crate::scratch::compute;
use crate::weights::unmapped;

/// By so many tokens vocabularies of one family differ: the larger ones are padded.
const PADDING: u64 = 128;

/// Whether one model can draft for another, as far as headers tell: the worker compares the tokens themselves.
///
/// # Errors
/// Why it cannot.
pub fn check(draft: &Header, model: &Header) -> Result<(), GgufError> {
    let kind = |header: &Header| header.text("tokenizer.ggml.model").unwrap_or("unknown").to_owned();
    let (own, other) = (kind(draft), kind(model));
    let why = if purpose(model) != Purpose::Answers {
        "the model does not answer in words".into()
    } else if purpose(draft) != Purpose::Answers {
        "it does not answer in words".into()
    } else if own != other {
        format!("its tokenizer is `{own}` and not `{other}`")
    } else if draft.vocabulary().abs_diff(model.vocabulary()) > PADDING {
        format!("it knows {} tokens, and the model {}", draft.vocabulary(), model.vocabulary())
    } else if cannot_take_back(model) {
        "the model has a sliding window or a recurrent state, of which nothing can be taken back".into()
    } else if Layers::of(draft).are_recurrent() {
        "it has a recurrent state, which cannot be taken back where a guess was wrong".into()
    } else {
        return Ok(());
    };
    Err(GgufError::NotADraft(why))
}

/// Whether tokens that were computed in vain cannot be taken back.
fn cannot_take_back(header: &Header) -> bool {
    let layers = Layers::of(header);
    layers.are_recurrent() || layers.layers.iter().any(|layer| layer.window.is_some())
}

/// What it takes, all of which is the worker's own memory: its weights are copied and never mapped.
pub(crate) fn memory(draft: &Header, settings: Settings) -> Bytes {
    let layers = Layers::of(draft);
    let settings = Settings { draft_tokens: 0, deterministic: false, ..settings };
    let own = [
        unmapped(draft, settings.repack),
        kv_cache(&layers, settings),
        compute(draft, &layers, settings),
        output(draft, settings),
        vocabulary(draft),
        process(draft, &layers, settings),
    ];
    own.into_iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Value;

    fn of(tokenizer: &str, tokens: u64) -> Header {
        let mut header = Header::default();
        let texts = [("general.architecture", "llama"), ("tokenizer.ggml.model", tokenizer)];
        for (key, value) in texts {
            header.metadata.insert(key.into(), Value::Text(value.into()));
        }
        header.metadata.insert("tokenizer.ggml.tokens".into(), Value::Length(tokens));
        header
    }

    #[test]
    fn only_a_model_of_the_same_vocabulary_drafts() {
        let model = of("gpt2", 151_936);
        assert!(check(&of("gpt2", 151_936), &model).is_ok());
        assert!(check(&of("gpt2", 151_936 - 128), &model).is_ok(), "padded");
        let why = |draft: Header| check(&draft, &model).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(why(of("gpt2", 49_152)).contains("it knows 49152 tokens, and the model 151936"));
        assert!(why(of("llama", 151_936)).contains("its tokenizer is `llama` and not `gpt2`"));
        let mut windowed = of("gpt2", 151_936);
        let fields = [
            ("general.architecture", Value::Text("gemma3".into())),
            ("gemma3.block_count", Value::Int(6)),
            ("gemma3.attention.sliding_window", Value::Int(512)),
        ];
        windowed.metadata.extend(fields.map(|(key, value)| (key.to_owned(), value)));
        let refused = check(&of("gpt2", 151_936), &windowed).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(refused.contains("a sliding window"), "{refused}");
    }
}
