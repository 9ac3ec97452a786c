//! Scratch of one step: what llama.cpp reserves for the activations of a graph.
//!
//! Its allocator reuses memory as soon as a tensor is not needed any more, so the size is that of the widest set of
//! tensors that live at the same time. Which those are was read off its own dry runs on sixteen architectures of
//! different proportions; `tests/end_to_end/plan.rs` of the binary holds the formulas to them.

use sarai_core::Bytes;

use crate::estimate::{Settings, bytes, windowed_cells};
use crate::gguf::Header;
use crate::layers::{self, Layers};

/// Scratch of one step: the widest set of activations that live at the same time, the masks over the cells, without
/// flash attention the full matrix of every head, and for recurrent layers two states per sequence.
pub(crate) fn compute(header: &Header, layers: &Layers, settings: Settings) -> Bytes {
    let step = u128::from(settings.step());
    let full = if layers.encoder { settings.step() } else { settings.cells() };
    let windowed = layers.layers.iter().find_map(|layer| layer.window);
    let windowed = match windowed {
        Some(window) => windowed_cells(window, settings),
        // Encoders with two kinds of layers hold two masks.
        None if layers.encoder && header.arch_size("attention.sliding_window").is_some() => settings.step(),
        None => 0,
    };
    let attends = layers.encoder || layers.layers.iter().any(|layer| layer.keys > 0);
    // A token sees the cells of all, or those of its own sequence.
    let apart = if settings.has_own_cells() && !layers.encoder { u128::from(settings.parallel) } else { 1 };
    let seen = |cells: u64| if attends { u128::from(cells) / apart } else { 0 };
    let (full, windowed) = (seen(full), seen(windowed));
    let heads = u128::from(header.arch_size_of_layer("attention.head_count", 0).unwrap_or(0));
    let Activations { attention, others } = activations(header, layers);
    let per_token = if settings.flash_attention {
        4 * attention.max(others) + 2 * (full + windowed)
    } else {
        let matrix = 4 * attention + (4 * heads + 4) * full + 4 * windowed;
        matrix.max(4 * others + 4 * (full + windowed))
    };
    let scan = layers.layers.iter().map(|layer| u128::from(layer.state) * 4).max().unwrap_or(0);
    // Two states of every sequence, the old one and the new; the delta rule holds one more.
    let states = 2 * u128::from(settings.parallel) + u128::from(layers::has_delta_rule(header));
    let scan = if header.arch_size("ssm.state_size").is_some() { scan * states } else { scan };
    let logits = u128::from(header.vocabulary()) * 4 * u128::from(settings.parallel);
    bytes(
        (per_token * step + scan)
            .max(logits + 8 * step * u128::from(header.arch_size("embedding_length").unwrap_or(0))),
    )
}

/// F32 elements per token that live at the same time.
struct Activations {
    attention: u128,
    /// The widest of everything else.
    others: u128,
}

/// Indices, positions and such, per token.
const INPUTS: u128 = 14;

/// The sizes that activations follow from.
struct Widths<'a> {
    header: &'a Header,
    embedding: u128,
    /// The widest inner row of a feed-forward layer.
    forward: u128,
}

impl Widths<'_> {
    fn size(&self, key: &str) -> Option<u128> {
        self.header.arch_size(key).map(u128::from)
    }

    fn attention(&self, layers: &Layers) -> u128 {
        let heads = self.header.arch_size_of_layer("attention.head_count", 0).map_or(0, u128::from);
        let head = self.size("attention.key_length").unwrap_or(self.embedding.checked_div(heads).unwrap_or(0));
        if let Some(key) = self.size("attention.key_length_mla").filter(|&key| key > 0) {
            let latent = self.size("attention.kv_lora_rank").unwrap_or(512);
            return heads * (key + latent + head) + 3 * head + 2 * self.embedding;
        }
        let keys = layers.layers.iter().map(|layer| layer.keys).max().map_or(0, u128::from);
        let values = layers.layers.iter().map(|layer| layer.values).max().map_or(0, u128::from);
        self.embedding + 5 * heads * head + keys + values
    }

    fn dense(&self) -> u128 {
        let tensors = &self.header.tensors;
        let gated = tensors.is_empty() || tensors.iter().any(|tensor| tensor.name.contains("ffn_gate"));
        let (forward, embedding) = (self.forward, self.embedding);
        match self.size("expert_count") {
            // A model of experts may still have dense layers at its start.
            Some(count) if count > 0 && self.size("leading_dense_block_count").unwrap_or(0) == 0 => 0,
            _ if gated => 3 * forward + 5 * embedding,
            _ => (forward + 6 * embedding).min(2 * forward + 3 * embedding).max(7 * embedding),
        }
    }

    /// What the experts put out takes the place of what two of their inner rows left, if it fits there.
    fn routed(&self) -> u128 {
        let used = self.size("expert_used_count").unwrap_or(0);
        let inner = used * self.size("expert_feed_forward_length").unwrap_or(self.forward);
        let put_out = used * self.embedding;
        match inner {
            0 => 0,
            _ if 2 * inner >= put_out => 3 * inner + 5 * self.embedding,
            _ if inner <= self.embedding => put_out + 5 * self.embedding,
            _ => 3 * inner + put_out + 5 * self.embedding,
        }
    }

    fn scan(&self) -> u128 {
        let inner = self.size("ssm.inner_size").unwrap_or(0);
        let groups = self.size("ssm.group_count").unwrap_or(0) * self.size("ssm.state_size").unwrap_or(0);
        if inner == 0 {
            return 0;
        }
        if layers::has_delta_rule(self.header) {
            return 4 * inner + 3 * groups + 4 * self.embedding;
        }
        let ranks = self.size("ssm.time_step_rank").unwrap_or(0);
        // The first Mamba, and Falcon's attention beside the scan, hold one row more.
        let more = if groups == 0 || self.header.architecture() == "falcon-h1" { self.embedding } else { 0 };
        (2 * inner + 2 * groups + ranks) + 2 * (inner + 2 * groups) + 3 * inner + more
    }
}

fn activations(header: &Header, layers: &Layers) -> Activations {
    let embedding = header.arch_size("embedding_length").map_or(0, u128::from);
    let forward = (0..layers.layers.len().max(1))
        .filter_map(|layer| header.arch_size_of_layer("feed_forward_length", layer))
        .max()
        .map_or(4 * embedding, u128::from);
    let widths = Widths { header, embedding, forward };
    let attention = widths.attention(layers);
    let others = widths.dense().max(widths.routed()).max(widths.scan()).max(attention.min(3 * embedding));
    Activations { attention: attention + INPUTS, others: others + INPUTS }
}
