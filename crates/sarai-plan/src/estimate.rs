//! How much memory a model will take, from its header and its settings alone.
//!
//! The formulas follow llama.cpp's allocation: see `docs` of each part below. Where the header does not say
//! enough, the estimate is taken high, never as zero. (The exact planner is a later step.)

use sarai_core::{Bytes, Part};

use crate::gguf::Header;

/// Heap of a worker process without a model: code, threads, allocator.
const PROCESS: Bytes = Bytes::mib(24);
/// Heap per token of the vocabulary; 235 (SPM) to 490 (BPE) measured.
const VOCABULARY_BYTES_PER_TOKEN: u64 = 490;

/// What decides the size besides the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Tokens that one sequence can hold.
    pub context_tokens: u32,
    /// Sequences computed at the same time.
    pub parallel: u32,
    /// Tokens that one step computes at most.
    pub ubatch_tokens: u32,
}

/// The parts of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// One row per part; none is zero unless the model has no such part.
    pub parts: Vec<Part>,
}

impl Plan {
    /// Plans a model.
    #[must_use]
    pub fn of(header: &Header, settings: Settings) -> Self {
        let part = |name: &str, bytes| Part { name: name.to_owned(), bytes };
        let vocabulary = header.vocabulary();
        let parts = vec![
            part("weights", header.weights()),
            part("repacked", repacked(header)),
            part("kv", kv_cache(header, settings)),
            part("compute", compute(header, settings)),
            part("output", Bytes(4) * vocabulary * u64::from(settings.parallel)),
            part("vocabulary", Bytes(VOCABULARY_BYTES_PER_TOKEN) * vocabulary),
            part("process", PROCESS),
        ];
        Self { parts: parts.into_iter().filter(|part| part.bytes > Bytes::ZERO).collect() }
    }

    /// The sum of the parts.
    #[must_use]
    pub fn total(&self) -> Bytes {
        self.parts.iter().map(|part| part.bytes).sum()
    }
}

/// The anonymous copy that ggml's CPU backend makes of tensors it repacks (x86: Q4_0, Q4_K, IQ4_NL, MXFP4);
/// the file copy stays mapped. Embeddings are not repacked.
fn repacked(header: &Header) -> Bytes {
    let eligible = |kind: u32| matches!(kind, 2 | 12 | 20 | 39);
    let matrices =
        header.tensors.iter().filter(|tensor| tensor.shape.len() > 1 && !tensor.name.starts_with("token_embd"));
    matrices.filter(|tensor| eligible(tensor.kind)).map(|tensor| tensor.bytes).sum()
}

/// K and V in f16 for every layer: cells x heads x (key length + value length) x 2 bytes, and for hybrid and
/// recurrent layers their F32 state.
fn kv_cache(header: &Header, settings: Settings) -> Bytes {
    let layers = size(header.arch_int("block_count")).unwrap_or(0);
    let embedding = size(header.arch_int("embedding_length")).unwrap_or(0);
    let context = u128::from(settings.context_tokens).next_multiple_of(256);
    let window = size(header.arch_int("attention.sliding_window")).filter(|&window| window > 0);
    let mut total = 0;
    for layer in 0..usize::try_from(layers).unwrap_or(0) {
        let heads = size(header.arch_int_of_layer("attention.head_count", layer)).unwrap_or(1).max(1);
        let kv_heads = size(header.arch_int_of_layer("attention.head_count_kv", layer)).unwrap_or(heads);
        let head = embedding / heads;
        let key = size(header.arch_int("attention.key_length")).unwrap_or(head);
        let value = size(header.arch_int("attention.value_length")).unwrap_or(head);
        let cells = match window {
            Some(window) if is_windowed(header, layer) => {
                context.min((window + u128::from(settings.ubatch_tokens)).next_multiple_of(256))
            }
            _ => context,
        };
        total += kv_heads * (key + value) * 2 * cells;
        if kv_heads == 0 || header.arch_int("ssm.state_size").is_some() {
            total += recurrent_state(header, embedding);
        }
    }
    bytes(total * u128::from(settings.parallel))
}

/// Whether a layer of a sliding-window model sees only the window: Gemma 3 has one full layer in six; for
/// other architectures every layer counts as full, which is never too little.
fn is_windowed(header: &Header, layer: usize) -> bool {
    header.architecture() == "gemma3" && !(layer + 1).is_multiple_of(6)
}

/// State of one recurrent or convolution layer and sequence, in F32.
fn recurrent_state(header: &Header, embedding: u128) -> u128 {
    let get = |key| size(header.arch_int(key));
    if let Some(cache) = get("shortconv.l_cache") {
        return embedding * cache.saturating_sub(1) * 4;
    }
    let inner = get("ssm.inner_size").unwrap_or(2 * embedding);
    let state = get("ssm.state_size").unwrap_or(128);
    let conv = get("ssm.conv_kernel").unwrap_or(4);
    inner * (state + conv) * 4
}

/// Scratch of one step with flash attention: linear in the step's tokens, in the widest activation and in
/// the mask over the context.
fn compute(header: &Header, settings: Settings) -> Bytes {
    let embedding = size(header.arch_int("embedding_length")).unwrap_or(0);
    let feed_forward = size(header.arch_int_of_layer("feed_forward_length", 0)).unwrap_or(4 * embedding);
    let experts = size(header.arch_int("expert_used_count")).unwrap_or(1).max(1);
    let cells = u128::from(settings.context_tokens) * u128::from(settings.parallel);
    let per_token = 4 * (4 * embedding + 2 * feed_forward * experts) + 2 * cells;
    let logits = u128::from(header.vocabulary()) * 4 * u128::from(settings.parallel);
    bytes(per_token * u128::from(settings.ubatch_tokens) + logits)
}

/// A dimension from the header, limited to 2^24: real ones are smaller, and products of five stay exact.
fn size(value: Option<i64>) -> Option<u128> {
    value.and_then(|value| u128::try_from(value).ok()).map(|value| value.min(1 << 24))
}

fn bytes(count: u128) -> Bytes {
    Bytes(u64::try_from(count).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Value;

    fn llama(layers: i64, kv_heads: Value) -> Header {
        let mut header = Header::default();
        header.metadata.insert("general.architecture".into(), Value::Text("llama".into()));
        let ints = [
            ("block_count", layers),
            ("embedding_length", 576),
            ("attention.head_count", 9),
            ("feed_forward_length", 1536),
        ];
        for (key, value) in ints {
            header.metadata.insert(format!("llama.{key}"), Value::Int(value));
        }
        header.metadata.insert("llama.attention.head_count_kv".into(), kv_heads);
        header.metadata.insert("tokenizer.ggml.tokens".into(), Value::Length(49152));
        header
    }

    fn kv_of(header: &Header, context_tokens: u32, parallel: u32) -> Bytes {
        kv_cache(header, Settings { context_tokens, parallel, ubatch_tokens: 512 })
    }

    #[test]
    fn kv_counts_grouped_heads_per_layer_and_sequence() {
        let header = llama(30, Value::Int(3));
        assert_eq!(kv_of(&header, 2048, 1), Bytes(30 * 3 * (64 + 64) * 2 * 2048));
        assert_eq!(kv_of(&header, 2048, 4), kv_of(&header, 2048, 1) * 4);
    }

    #[test]
    fn layers_without_attention_have_a_state_and_are_never_zero() {
        let attention_only = llama(2, Value::Ints(vec![3, 3]));
        let hybrid = llama(2, Value::Ints(vec![3, 0]));
        assert!(kv_of(&hybrid, 2048, 1) > Bytes(3 * 128 * 2 * 2048));
        assert!(kv_of(&hybrid, 2048, 1) < kv_of(&attention_only, 2048, 1));
    }
}
