//! What each layer of a model keeps between two steps: keys and values, a window of them, or a state.
//!
//! The rules are llama.cpp's own (`llama-hparams.cpp`, `llama-kv-cache.cpp`, `llama-memory-recurrent.cpp` and the
//! loaders of each architecture), read in the version that the worker links. An architecture that is not listed
//! here is counted as if every layer kept all keys and values, plus whatever state its header names: that is
//! never too little by much, and [`Layers::known`] says so, so that a dry run is made.

use sarai_core::frame::Purpose;

use crate::gguf::{Header, Value};

/// Architectures whose every layer attends to the whole context, with nothing special about it.
const PLAIN: &[&str] = &[
    "llama",
    "qwen",
    "qwen2",
    "qwen2moe",
    "qwen2vl",
    "qwen3",
    "qwen3moe",
    "qwen3vl",
    "qwen3vlmoe",
    "phi2",
    "phi3",
    "phimoe",
    "mistral3",
    "gemma",
    "falcon",
    "gpt2",
    "gptj",
    "gptneox",
    "mpt",
    "baichuan",
    "starcoder",
    "starcoder2",
    "refact",
    "bloom",
    "stablelm",
    "internlm2",
    "minicpm",
    "minicpm3",
    "command-r",
    "olmo",
    "olmoe",
    "openelm",
    "arctic",
    "deepseek",
    "chatglm",
    "glm4",
    "glm4moe",
    "bitnet",
    "nemotron",
    "exaone",
    "granite",
    "granitemoe",
    "smollm3",
    "seed-oss",
    "ernie4_5",
    "ernie4_5-moe",
    "hunyuan-moe",
    "hunyuan-dense",
    "dots1",
    "bailingmoe",
    "bailingmoe2",
    "arcee",
    "apertus",
    "dbrx",
    "grok",
    "orion",
    "xverse",
    "plm",
    "maincoder",
    "llama-embed",
    "t5encoder",
];
/// Architectures that keep nothing between steps.
const ENCODERS: &[&str] = &[
    "bert",
    "jina-bert-v2",
    "jina-bert-v3",
    "nomic-bert",
    "nomic-bert-moe",
    "neo-bert",
    "eurobert",
    "modern-bert",
    "gemma-embedding",
    "gemma-embedding2",
    "dream",
    "llada",
    "llada-moe",
    "rnd1",
];
/// Encoders that answer all the same, by diffusion.
const DIFFUSION: &[&str] = &["dream", "llada", "llada-moe", "rnd1"];
/// Architectures of which every layer is recurrent.
const RECURRENT: &[&str] = &["mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"];
/// Hybrids whose recurrent layers are those without key and value heads.
const HYBRID_BY_HEADS: &[&str] = &["jamba", "granitehybrid", "plamo2", "lfm2", "lfm2moe", "kimi-linear"];
/// Hybrids of which one layer in so many attends, unless the header lists them.
const HYBRID_BY_INTERVAL: &[&str] = &["qwen3next", "qwen35", "qwen35moe"];
/// Architectures with multi-head latent attention, which keep one compressed row per token.
const LATENT: &[&str] = &["deepseek2", "deepseek2-ocr", "mistral4"];

/// Whether recurrent layers follow the gated delta rule rather than a scan.
#[must_use]
pub fn has_delta_rule(header: &Header) -> bool {
    HYBRID_BY_INTERVAL.contains(&header.architecture())
}

/// What a file is made for: its header says how it pools tokens, if it does.
#[must_use]
pub fn purpose(header: &Header) -> Purpose {
    let architecture = header.architecture();
    match header.arch_int("pooling_type") {
        Some(4) => Purpose::Scores,
        Some(1..=3) => Purpose::Vectors,
        _ if ENCODERS.contains(&architecture) && !DIFFUSION.contains(&architecture) => Purpose::Vectors,
        _ => Purpose::Answers,
    }
}

/// One layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layer {
    /// Elements of a token's keys.
    pub keys: u64,
    /// Elements of a token's values; 0 where they are computed from the keys.
    pub values: u64,
    /// Tokens that a sliding window sees, if it has one.
    pub window: Option<u64>,
    /// F32 elements of the state of one sequence.
    pub state: u64,
    /// Elements of one head's keys.
    pub head: u64,
    /// Whether it attends by the keys and values of an earlier layer.
    pub reuses: bool,
}

/// All layers of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layers {
    /// Whether these rules know the architecture.
    pub known: bool,
    /// Whether it keeps nothing between steps: a step then needs the whole text.
    pub encoder: bool,
    /// In order.
    pub layers: Vec<Layer>,
}

impl Layers {
    /// Reads them from a header.
    #[must_use]
    pub fn of(header: &Header) -> Self {
        let architecture = header.architecture();
        let listed = |list: &[&str]| list.contains(&architecture);
        let encoder = listed(ENCODERS);
        let window = Window::of(header);
        let hybrid = listed(HYBRID_BY_HEADS)
            || listed(HYBRID_BY_INTERVAL)
            || ["falcon-h1", "nemotron_h", "nemotron_h_moe"].contains(&architecture);
        let known = listed(PLAIN) || encoder || hybrid || listed(RECURRENT) || listed(LATENT) || window.known;
        let count = header.arch_size("block_count").unwrap_or(0);
        // Layers that predict further tokens keep nothing unless they are asked to.
        let count = count.saturating_sub(header.arch_size("nextn_predict_layers").unwrap_or(0));
        let layer = |index| match encoder {
            true => Layer::default(),
            false => layer(header, &window, usize::try_from(index).unwrap_or(0)),
        };
        Self { known, encoder, layers: (0..count).map(layer).collect() }
    }

    /// How many attend to the whole text: they have neither a window nor a state instead.
    #[must_use]
    pub fn whole(&self) -> u32 {
        let whole = self.layers.iter().filter(|layer| (layer.keys > 0 || layer.reuses) && layer.window.is_none());
        u32::try_from(whole.count()).unwrap_or(u32::MAX)
    }

    /// Whether any layer has a state.
    #[must_use]
    pub fn are_recurrent(&self) -> bool {
        self.layers.iter().any(|layer| layer.state > 0)
    }
}

fn layer(header: &Header, window: &Window, index: usize) -> Layer {
    let state = if is_recurrent(header, index) { state(header) } else { 0 };
    let reuses = reuses_keys(header, index);
    // Falcon-H1 runs both side by side in every layer.
    if (state > 0 && header.architecture() != "falcon-h1") || reuses || has_no_attention(header, index) {
        let window = (reuses && window.covers(index)).then_some(window.tokens);
        return Layer { state, reuses, window, ..Layer::default() };
    }
    let embedding = header.arch_size("embedding_length").unwrap_or(0);
    let heads = header.arch_size_of_layer("attention.head_count", index).unwrap_or(1).max(1);
    let kv_heads = header.arch_size_of_layer("attention.head_count_kv", index).unwrap_or(heads);
    let windowed = window.covers(index);
    let length = |key: &str| {
        let full = header.arch_size(key).unwrap_or(embedding / heads);
        if windowed { header.arch_size(&format!("{key}_swa")).unwrap_or(full) } else { full }
    };
    let (key, value) = (length("attention.key_length"), length("attention.value_length"));
    let latent = header.arch_size("attention.key_length_mla").is_some_and(|n| n > 0);
    Layer {
        keys: key.saturating_mul(kv_heads),
        values: if latent { 0 } else { value.saturating_mul(kv_heads) },
        window: windowed.then_some(window.tokens),
        state,
        head: key,
        reuses: false,
    }
}

/// Whether a layer is neither attention nor a state.
fn has_no_attention(header: &Header, index: usize) -> bool {
    ["nemotron_h", "nemotron_h_moe"].contains(&header.architecture())
        && header.arch_size_of_layer("feed_forward_length", index) != Some(0)
}

/// Whether an attention layer uses the keys and values of an earlier one.
fn reuses_keys(header: &Header, index: usize) -> bool {
    match header.architecture() {
        "gemma3n" => index >= 20,
        "gemma4" => {
            let layers = header.arch_size("block_count").unwrap_or(0);
            let shared = header.arch_size("attention.shared_kv_layers").unwrap_or(0);
            index as u64 >= layers.saturating_sub(shared)
        }
        _ => false,
    }
}

fn is_recurrent(header: &Header, index: usize) -> bool {
    let architecture = header.architecture();
    let without_heads = header.arch_size_of_layer("attention.head_count_kv", index) == Some(0);
    if RECURRENT.contains(&architecture) || architecture == "falcon-h1" {
        return true;
    }
    if HYBRID_BY_INTERVAL.contains(&architecture) {
        let listed = header.arch_int_of_layer("attention.recurrent_layers", index);
        let interval = header.arch_size("full_attention_interval").unwrap_or(4).max(1);
        return listed.map_or(!(index as u64 + 1).is_multiple_of(interval), |listed| listed != 0);
    }
    if architecture.starts_with("nemotron_h") {
        return without_heads && header.arch_size_of_layer("feed_forward_length", index) == Some(0);
    }
    // Of an unknown architecture, a layer without heads must keep something else.
    without_heads && (HYBRID_BY_HEADS.contains(&architecture) || header.has_state())
}

/// F32 elements of the state of one recurrent layer and sequence: convolution and scan.
fn state(header: &Header) -> u64 {
    let get = |key: &str| header.arch_size(key).unwrap_or(0);
    let embedding = get("embedding_length");
    if get("wkv.head_size") > 0 {
        let shifts = header.arch_size("token_shift_count").unwrap_or(2);
        return shifts.saturating_mul(embedding).saturating_add(embedding.saturating_mul(get("wkv.head_size")));
    }
    if get("shortconv.l_cache") > 0 {
        return embedding.saturating_mul(get("shortconv.l_cache") - 1);
    }
    let kernel = get("ssm.conv_kernel");
    if get("kda.head_dim") > 0 {
        let (head, heads) = (get("kda.head_dim"), get("attention.head_count"));
        let steps = if kernel > 0 { kernel - 1 } else { 3 };
        return heads.saturating_mul(head).saturating_mul((3 * steps).saturating_add(head));
    }
    let groups = 2 * get("ssm.group_count").saturating_mul(get("ssm.state_size"));
    let convolution = kernel.saturating_sub(1).saturating_mul(get("ssm.inner_size").saturating_add(groups));
    convolution.saturating_add(get("ssm.state_size").saturating_mul(get("ssm.inner_size")))
}

/// Which layers see only a window.
struct Window {
    known: bool,
    tokens: u64,
    pattern: Pattern,
}

enum Pattern {
    None,
    /// All but the last of each so many; 0 is all.
    LastOfIsFull(u64),
    /// All but the first of each so many.
    FirstOfIsFull(u64),
    Listed(Vec<i64>),
}

impl Window {
    fn of(header: &Header) -> Self {
        use Pattern::{FirstOfIsFull, LastOfIsFull};
        let written = header.arch_size("attention.sliding_window").unwrap_or(0);
        let (tokens, pattern) = match header.architecture() {
            "llama4" if header.arch_size("attention.sliding_window") != Some(0) => (8192, LastOfIsFull(4)),
            "gemma2" => (if written > 0 { written } else { 4096 }, LastOfIsFull(2)),
            "gemma3" | "gemma-embedding" => (written, LastOfIsFull(6)),
            "gemma3n" => (written, LastOfIsFull(5)),
            "cohere2" | "olmo2" | "exaone-moe" | "afmoe" | "mellum" => (written, LastOfIsFull(4)),
            "exaone4" if header.arch_size("block_count") == Some(64) => {
                (if written > 0 { written } else { 4096 }, LastOfIsFull(4))
            }
            "exaone4" => (0, Pattern::None),
            "gpt-oss" => (written, LastOfIsFull(2)),
            "plamo3" => (written, LastOfIsFull(8)),
            "smallthinker" => (written.min(4096), FirstOfIsFull(4)),
            "modern-bert" => (written, FirstOfIsFull(3)),
            "gemma4" | "mimo2" | "step35" => (written, LastOfIsFull(1)),
            _ => return Self { known: false, tokens: 0, pattern: Pattern::None },
        };
        let key = format!("{}.attention.sliding_window_pattern", header.architecture());
        let pattern = match (header.metadata.get(&key), pattern) {
            (Some(Value::Ints(listed)), _) => Pattern::Listed(listed.clone()),
            (Some(Value::Int(every)), LastOfIsFull(_)) => LastOfIsFull(u64::try_from(*every).unwrap_or(1)),
            (Some(Value::Int(every)), FirstOfIsFull(_)) => FirstOfIsFull(u64::try_from(*every).unwrap_or(1)),
            (_, pattern) => pattern,
        };
        Self { known: true, tokens, pattern }
    }

    fn covers(&self, index: usize) -> bool {
        let index = index as u64;
        self.tokens > 0
            && match &self.pattern {
                Pattern::None => false,
                Pattern::LastOfIsFull(0) => true,
                Pattern::LastOfIsFull(every) => index % every < every - 1,
                Pattern::FirstOfIsFull(every) => !index.is_multiple_of((*every).max(1)),
                Pattern::Listed(listed) => usize::try_from(index)
                    .ok()
                    .and_then(|index| listed.get(index))
                    .is_some_and(|&windowed| windowed != 0),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(architecture: &str, ints: &[(&str, i64)]) -> Header {
        let mut header = Header::default();
        header.metadata.insert("general.architecture".into(), Value::Text(architecture.into()));
        for (key, value) in ints {
            header.metadata.insert(format!("{architecture}.{key}"), Value::Int(*value));
        }
        header
    }

    #[test]
    fn grouped_heads_make_keys_and_values_smaller() {
        let ints = [
            ("block_count", 30),
            ("embedding_length", 576),
            ("attention.head_count", 9),
            ("attention.head_count_kv", 3),
        ];
        let layers = Layers::of(&header("llama", &ints));
        assert_eq!(layers.layers.len(), 30);
        assert_eq!(layers.layers[0], Layer { keys: 192, values: 192, window: None, state: 0, head: 64, reuses: false });
        assert!(layers.known);
    }

    #[test]
    fn gemma3_has_one_full_layer_in_six() {
        let ints = [("block_count", 12), ("attention.sliding_window", 512), ("attention.key_length", 256)];
        let gemma3 = Layers::of(&header("gemma3", &ints));
        let full: Vec<_> = (0..12).filter(|&index| gemma3.layers[index].window.is_none()).collect();
        assert_eq!((full.as_slice(), gemma3.whole()), ([5, 11].as_slice(), 2));
    }

    /// They keep none of their own, and attend all the same.
    #[test]
    fn gemma3n_has_full_layers_among_those_that_use_the_keys_of_others() {
        let ints = [("block_count", 35), ("attention.sliding_window", 512), ("attention.key_length", 256)];
        let gemma3n = Layers::of(&header("gemma3n", &ints));
        let full: Vec<_> = (0..35).filter(|&index| gemma3n.layers[index].window.is_none()).collect();
        assert_eq!((full.as_slice(), gemma3n.whole()), ([4, 9, 14, 19, 24, 29, 34].as_slice(), 7));
        assert!(gemma3n.layers[20..].iter().all(|layer| layer.keys == 0 && layer.values == 0));
    }

    #[test]
    fn lfm2_keeps_a_convolution_where_it_has_no_heads() {
        let mut lfm2 = header(
            "lfm2",
            &[("block_count", 2), ("embedding_length", 2048), ("shortconv.l_cache", 3), ("attention.head_count", 32)],
        );
        lfm2.metadata.insert("lfm2.attention.head_count_kv".into(), Value::Ints(vec![0, 8]));
        assert_eq!(Layers::of(&lfm2).whole(), 1);
        let layers = Layers::of(&lfm2).layers;
        assert_eq!((layers[0].keys, layers[0].state), (0, 2048 * 2));
        assert_eq!((layers[1].keys, layers[1].state), (8 * 64, 0));
    }

    #[test]
    fn latent_attention_keeps_one_row_and_no_values() {
        let ints = [
            ("block_count", 1),
            ("attention.head_count", 16),
            ("attention.head_count_kv", 1),
            ("attention.key_length", 576),
            ("attention.value_length", 512),
            ("attention.key_length_mla", 192),
            ("attention.value_length_mla", 128),
        ];
        let layer = Layers::of(&header("deepseek2", &ints)).layers[0];
        assert_eq!((layer.keys, layer.values), (576, 0));
    }

    #[test]
    fn an_unknown_architecture_says_so_and_is_never_counted_as_nothing() {
        let ints = [("block_count", 4), ("embedding_length", 512), ("attention.head_count", 8)];
        let layers = Layers::of(&header("brand-new", &ints));
        assert!(!layers.known);
        assert!(layers.layers.iter().all(|layer| layer.keys == 512 && layer.values == 512));
    }
}
