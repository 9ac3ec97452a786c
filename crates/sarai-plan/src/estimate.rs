//! How much memory a model will take, from its header and its settings alone.
//!
//! Weights, keys and values and states are exact. Scratch follows from the widest tensors that live at the same
//! time in llama.cpp's graphs; the constants were fitted to its own dry runs (`make bench-memory` shows how well).
//! Where a header does not say enough, the estimate is taken high and a note says so; nothing is counted as zero.

use sarai_core::{Bytes, KvType, Part};

use crate::gguf::{Header, Tensor};
use crate::layers::{self, Layers};
use crate::projector;

/// Anonymous memory of a worker before it loads anything: libraries, tables, thread stacks, allocator.
const BARE_PROCESS: Bytes = Bytes::kib(3_000);
/// File pages of the binary that a worker keeps in memory, as its proportional share.
const BINARY: Bytes = Bytes::kib(9_700);
/// llama.cpp computes in multiples of so many cells.
const CELLS: u64 = 256;

/// Into which layout weights are copied, by what the CPU can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Repack {
    /// None: every tensor is computed with where the file has it.
    Off,
    /// Q4_0, Q4_K, IQ4_NL and MXFP4.
    #[default]
    Narrow,
    /// Q2_K too (AVX-512).
    Wide,
}

impl Repack {
    /// Whether ggml has a faster layout for this tensor type.
    const fn takes(self, kind: u32) -> bool {
        match self {
            Self::Off => false,
            Self::Narrow => matches!(kind, 2 | 12 | 20 | 39),
            Self::Wide => matches!(kind, 2 | 10 | 12 | 20 | 39),
        }
    }
}

/// What decides the size besides the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Settings {
    /// Tokens that one sequence can hold.
    pub context_tokens: u32,
    /// Sequences computed at the same time.
    pub parallel: u32,
    /// Tokens that one step computes at most.
    pub ubatch_tokens: u32,
    /// Type of the KV cache.
    pub kv: KvType,
    /// Whether attention is computed without its full matrix.
    pub flash_attention: bool,
    /// Whether eligible weights are copied into the layout that computes fastest.
    pub repack: Repack,
    /// Threads that compute.
    pub threads: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            context_tokens: 4096,
            parallel: 1,
            ubatch_tokens: 256,
            kv: KvType::F16,
            flash_attention: true,
            repack: Repack::default(),
            threads: 2,
        }
    }
}

impl Settings {
    /// Tokens that one sequence really holds: llama.cpp rounds up.
    #[must_use]
    pub fn cells(&self) -> u64 {
        u64::from(self.context_tokens).next_multiple_of(CELLS)
    }

    /// Tokens that one step really computes at most.
    fn step(&self) -> u64 {
        u64::from(self.ubatch_tokens.max(self.parallel)).min(self.cells() * u64::from(self.parallel))
    }
}

/// The parts of a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// One row per part; none is zero unless the model has no such part.
    pub parts: Vec<Part>,
    /// What the formula does not know of this model.
    pub notes: Vec<String>,
}

/// The part that the kernel can have back: pages of the file.
pub const WEIGHTS: &str = "weights mapped";
/// Pages of the binary.
pub const BINARY_PAGES: &str = "binary";
/// What an earlier worker took beyond its plan.
pub const LEARNED: &str = "learned";
/// All parts, in the order in which tables show them.
pub const PARTS: [&str; 12] = [
    WEIGHTS,
    "weights repacked",
    "kv",
    "state",
    "compute",
    "output",
    "vocabulary",
    "projector weights",
    "projector compute",
    "process",
    BINARY_PAGES,
    LEARNED,
];

impl Plan {
    /// Plans a model, with the projector that it sees or hears through, if it has one.
    #[must_use]
    pub fn of(header: &Header, settings: Settings, projector: Option<&Header>) -> Self {
        let layers = Layers::of(header);
        let part = |name: &str, bytes| Part { name: name.to_owned(), bytes };
        let (copied, replaced) = repacked(header, settings.repack);
        let mut parts = vec![
            part(WEIGHTS, header.weights().less(replaced)),
            part("weights repacked", copied),
            part("kv", kv_cache(&layers, settings)),
            part("state", states(&layers, settings)),
            part("compute", compute(header, &layers, settings)),
            part("output", output(header, settings)),
            part("vocabulary", vocabulary(header)),
            part("process", process(header, &layers, settings)),
            part(BINARY_PAGES, BINARY),
        ];
        let mut notes = Vec::new();
        if !layers.known {
            notes.push(format!(
                "the architecture `{}` is not known to the formula: every layer is counted with all its keys and values; \
                 a dry run tells exactly",
                header.architecture()
            ));
        }
        parts.retain(|part| part.bytes > Bytes::ZERO);
        let mut plan = Self { parts, notes };
        if let Some(projector) = projector {
            plan.add_projector(projector);
        }
        plan
    }

    /// Adds what a projector takes: a copy of its weights, which is never mapped, and the scratch of one picture.
    pub fn add_projector(&mut self, projector: &Header) {
        let name = str::to_owned;
        self.parts.push(Part { name: name("projector weights"), bytes: projector::weights(projector) });
        self.parts.push(Part { name: name("projector compute"), bytes: projector::compute(projector) });
    }

    /// The sum of the parts.
    #[must_use]
    pub fn total(&self) -> Bytes {
        self.parts.iter().map(|part| part.bytes).sum()
    }

    /// One part by its name; zero if the model has none.
    #[must_use]
    pub fn part(&self, name: &str) -> Bytes {
        self.parts.iter().filter(|part| part.name == name).map(|part| part.bytes).sum()
    }

    /// Adds what experience says on top.
    pub fn raise(&mut self, by: Bytes) {
        if by > Bytes::ZERO {
            self.correct(LEARNED, self.part(LEARNED) + by);
        }
    }

    /// Replaces one part by what is known better.
    pub fn correct(&mut self, name: &str, bytes: Bytes) {
        match self.parts.iter_mut().find(|part| part.name == name) {
            Some(part) => part.bytes = bytes,
            None if bytes > Bytes::ZERO => self.parts.push(Part { name: name.to_owned(), bytes }),
            None => {}
        }
    }
}

/// The longest context per sequence, up to what the model was trained for, whose plan fits in `free`; `None` if
/// not even the shortest does.
#[must_use]
pub fn largest_context(header: &Header, settings: Settings, projector: Option<&Header>, free: Bytes) -> Option<u32> {
    let trained = header.arch_size("context_length").filter(|&n| n > 0).unwrap_or(1 << 17);
    let fits = |blocks: u64| {
        let context_tokens = u32::try_from(blocks * CELLS).unwrap_or(u32::MAX);
        Plan::of(header, Settings { context_tokens, ..settings }, projector).total() <= free
    };
    let (mut fitting, mut beyond) = (0, trained / CELLS + 1);
    while beyond - fitting > 1 {
        let middle = fitting.midpoint(beyond);
        if fits(middle) { fitting = middle } else { beyond = middle }
    }
    (fitting > 0).then(|| u32::try_from(fitting * CELLS).unwrap_or(u32::MAX))
}

/// The kernel maps a file in pieces of so many bytes where it can.
const MAPPED_AT_ONCE: u64 = 2 << 20;

/// Bytes that repacking takes, and bytes of the file that it makes idle. Matrices are copied whose type has a
/// faster layout and whose rows come in eights, experts too; embeddings are only looked up in, unless they are the
/// output as well: then the copy comes on top. What lies between tensors that are used stays mapped with them.
fn repacked(header: &Header, repack: Repack) -> (Bytes, Bytes) {
    let takes = |tensor: &Tensor| is_repacked(tensor, repack);
    let looked_up = is_looked_up;
    let copied: Bytes =
        header.tensors.iter().filter(|tensor| takes(tensor) && !looked_up(tensor)).map(|tensor| tensor.bytes).sum();
    let has_output = header.tensors.iter().any(|tensor| tensor.name == "output.weight");
    let answers = !Layers::of(header).encoder;
    let tied = header.tensors.iter().find(|tensor| tensor.name == "token_embd.weight" && takes(tensor));
    let tied = tied.filter(|_| answers && !has_output).map_or(Bytes::ZERO, |tensor| tensor.bytes);
    // A split file is never given back in part, but the kernel is free to take what is idle of it.
    let idle = idle_ranges(header, takes, looked_up);
    let idle = idle.iter().map(|(from, to)| Bytes(to - from)).sum();
    (copied + tied, idle)
}

/// Bytes of the file that nothing reads once its repacked tensors are copied, in whole pieces of what the kernel maps
/// at once. Of a split file there is no telling which part an offset belongs to.
#[must_use]
pub fn idle_pieces(header: &Header, repack: Repack) -> Vec<(u64, u64)> {
    if header.int("split.count").is_some_and(|parts| parts > 1) {
        return Vec::new();
    }
    idle_ranges(header, |tensor| is_repacked(tensor, repack), is_looked_up)
}

fn idle_ranges(
    header: &Header,
    takes: impl Fn(&Tensor) -> bool,
    looked_up: impl Fn(&Tensor) -> bool,
) -> Vec<(u64, u64)> {
    let mut idle = Vec::new();
    let mut run: Option<(u64, u64)> = None;
    for tensor in header.tensors.iter().chain([&END]) {
        let (start, end) = (tensor.offset, tensor.offset.saturating_add(tensor.bytes.0));
        let unused = takes(tensor) && !looked_up(tensor);
        run = match run {
            Some((from, to)) if unused && start >= to => Some((from, end)),
            Some((from, to)) => {
                let (first, last) = (from.next_multiple_of(MAPPED_AT_ONCE), to / MAPPED_AT_ONCE * MAPPED_AT_ONCE);
                if first < last {
                    idle.push((first, last));
                }
                unused.then_some((start, end))
            }
            None => unused.then_some((start, end)),
        };
    }
    idle
}

/// Whether a matrix is copied: its type has a faster layout and its rows come in eights.
fn is_repacked(tensor: &Tensor, repack: Repack) -> bool {
    let multiplied = tensor.shape.len() == 2 || (tensor.shape.len() == 3 && tensor.name.contains("_exps"));
    let rows = tensor.shape.get(1).is_some_and(|rows| rows % 8 == 0);
    multiplied && rows && repack.takes(tensor.kind) && tensor.name.ends_with(".weight")
}

/// Whether a tensor is an embedding, of which single rows are read.
fn is_looked_up(tensor: &Tensor) -> bool {
    let tables = ["token_embd.", "position_embd.", "token_types.", "per_layer_token_embd."];
    tables.iter().any(|name| tensor.name.starts_with(name))
}

/// Ends the last run of tensors.
const END: Tensor = Tensor { name: String::new(), shape: Vec::new(), kind: 0, bytes: Bytes::ZERO, offset: u64::MAX };

/// Keys and values: cells x (row of keys + row of values) per layer and sequence. A windowed layer holds the window
/// and one step. Quantised ones are rotated first, by one matrix per layer.
fn kv_cache(layers: &Layers, settings: Settings) -> Bytes {
    let mut total = 0_u128;
    for layer in &layers.layers {
        let cells = layer.window.map_or(settings.cells(), |window| windowed_cells(window, settings));
        let row = settings.kv.row(layer.keys) + settings.kv.row(layer.values);
        total += u128::from(row.0) * u128::from(cells) * u128::from(settings.parallel);
        if settings.kv != KvType::F16 && layer.keys > 0 {
            total += u128::from(rotations(layer.head, layer.values > 0));
        }
    }
    bytes(total)
}

fn windowed_cells(window: u64, settings: Settings) -> u64 {
    settings.cells().min((window + settings.step()).next_multiple_of(CELLS))
}

/// The largest power-of-two matrix that divides a head of keys, and a 64 x 64 one for the values, in F32.
fn rotations(head: u64, has_values: bool) -> u64 {
    if head == 0 || !head.is_multiple_of(64) {
        return 0;
    }
    let mut size = 64;
    while head.is_multiple_of(2 * size) {
        size *= 2;
    }
    4 * size * size + if has_values { 4 * 64 * 64 } else { 0 }
}

/// State of recurrent layers, in F32 and independent of the context.
fn states(layers: &Layers, settings: Settings) -> Bytes {
    let state: u128 = layers.layers.iter().map(|layer| u128::from(layer.state) * 4).sum();
    bytes(state * u128::from(settings.parallel))
}

/// Scratch of one step: the widest set of activations that live at the same time, the masks over the cells, without
/// flash attention the full matrix of every head, and for recurrent layers two states per sequence.
fn compute(header: &Header, layers: &Layers, settings: Settings) -> Bytes {
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
    let (full, windowed) = if attends { (u128::from(full), u128::from(windowed)) } else { (0, 0) };
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

fn activations(header: &Header, layers: &Layers) -> Activations {
    let size = |key: &str| header.arch_size(key).map(u128::from);
    let embedding = size("embedding_length").unwrap_or(0);
    let layer_count = layers.layers.len();
    let forward = (0..layer_count.max(1))
        .filter_map(|layer| header.arch_size_of_layer("feed_forward_length", layer))
        .max()
        .map_or(4 * embedding, u128::from);
    let heads = header.arch_size_of_layer("attention.head_count", 0).map_or(0, u128::from);
    let widest = |of: fn(&crate::layers::Layer) -> u64| layers.layers.iter().map(of).max().map_or(0, u128::from);
    let head = size("attention.key_length").unwrap_or(embedding.checked_div(heads).unwrap_or(0));
    let attention = match size("attention.key_length_mla") {
        Some(key) if key > 0 => {
            let latent = size("attention.kv_lora_rank").unwrap_or(512);
            heads * (key + latent + head) + 3 * head + 2 * embedding
        }
        _ => embedding + 5 * heads * head + widest(|layer| layer.keys) + widest(|layer| layer.values),
    };
    let gated = header.tensors.is_empty() || header.tensors.iter().any(|tensor| tensor.name.contains("ffn_gate"));
    let used = size("expert_used_count").unwrap_or(0);
    let experts = used * size("expert_feed_forward_length").unwrap_or(if used > 0 { forward } else { 0 });
    let dense = match size("expert_count") {
        // A model of experts may still have dense layers at its start.
        Some(count) if count > 0 && size("leading_dense_block_count").unwrap_or(0) == 0 => 0,
        _ if gated => 3 * forward + 5 * embedding,
        _ => (forward + 6 * embedding).min(2 * forward + 3 * embedding).max(7 * embedding),
    };
    // What the experts put out takes the place of what two of their inner rows left, if it fits there.
    let put_out = used * embedding;
    let routed = match experts {
        0 => 0,
        _ if 2 * experts >= put_out => 3 * experts + 5 * embedding,
        _ if experts <= embedding => put_out + 5 * embedding,
        _ => 3 * experts + put_out + 5 * embedding,
    };
    let inner = size("ssm.inner_size").unwrap_or(0);
    let groups = size("ssm.group_count").unwrap_or(0) * size("ssm.state_size").unwrap_or(0);
    let scan = if inner > 0 && layers::has_delta_rule(header) {
        4 * inner + 3 * groups + 4 * embedding
    } else if inner > 0 {
        let ranks = size("ssm.time_step_rank").unwrap_or(0);
        // The first Mamba, and Falcon's attention beside the scan, hold one row more.
        let more = if groups == 0 || header.architecture() == "falcon-h1" { embedding } else { 0 };
        (2 * inner + 2 * groups + ranks) + 2 * (inner + 2 * groups) + 3 * inner + more
    } else {
        0
    };
    let others = dense.max(routed).max(scan).max(attention.min(3 * embedding));
    Activations { attention: attention + INPUTS, others: others + INPUTS }
}

/// Logits of one row per sequence, and what the samplers keep of them.
fn output(header: &Header, settings: Settings) -> Bytes {
    Bytes(4 + 12) * header.vocabulary() * u64::from(settings.parallel)
}

/// Tables of the tokenizer: about 144 bytes a token and, for byte pairs, 104 a merge, and the longer strings.
fn vocabulary(header: &Header) -> Bytes {
    let merges = header.tokenizer_length("merges");
    let strings = if merges > 0 { 40 } else { 12 };
    Bytes(148 + strings) * header.vocabulary() + Bytes(112) * merges
}

/// What is neither of the model nor of its context: the process, graphs, bookkeeping per cell, work buffers.
fn process(header: &Header, layers: &Layers, settings: Settings) -> Bytes {
    let nodes = (8 * header.tensors.len() as u64).max(1024);
    let graphs = Bytes(3 * 420 + 20) * nodes;
    let attends = layers.layers.iter().any(|layer| layer.keys > 0);
    // 52 bytes from the start, 96 more once a cell is used.
    let cells = if attends { Bytes(148) * settings.cells() * u64::from(settings.parallel) } else { Bytes::ZERO };
    let rows = header.tensors.iter().filter(|tensor| tensor.name.starts_with("blk.") && tensor.shape.len() > 1);
    let widest = rows.filter_map(|tensor| tensor.shape.first()).max().copied().unwrap_or(0);
    // A step's activations are quantised into a work buffer; every thread has a tile and its part of attention.
    let work = bytes(u128::from(widest) * u128::from(settings.step()) * 292 / 256);
    let tiles = Bytes::kib(700) * u64::from(settings.threads);
    BARE_PROCESS + graphs + cells + work + tiles
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
            ("context_length", 8192),
        ];
        for (key, value) in ints {
            header.metadata.insert(format!("llama.{key}"), Value::Int(value));
        }
        header.metadata.insert("llama.attention.head_count_kv".into(), kv_heads);
        header.metadata.insert("tokenizer.ggml.tokens".into(), Value::Length(49152));
        header
    }

    fn plan(header: &Header, settings: Settings) -> Plan {
        Plan::of(header, settings, None)
    }

    #[test]
    fn kv_counts_grouped_heads_per_layer_and_sequence() {
        let header = llama(30, Value::Int(3));
        let settings = Settings { context_tokens: 2048, ..Settings::default() };
        assert_eq!(plan(&header, settings).part("kv"), Bytes(30 * 3 * (64 + 64) * 2 * 2048));
        let four = Settings { parallel: 4, ..settings };
        assert_eq!(plan(&header, four).part("kv"), plan(&header, settings).part("kv") * 4);
    }

    #[test]
    fn scratch_is_what_llama_cpp_reserves_for_smollm2() {
        // Its own dry run: 18.643 MiB with flash attention, 87.514 MiB without.
        let header = llama(30, Value::Int(3));
        let near = |settings, measured: f64| {
            let planned = plan(&header, settings).part("compute").as_mib();
            assert!((planned / measured - 1.0).abs() < 0.01, "{planned} planned, {measured} measured");
        };
        let of_512 = Settings { ubatch_tokens: 512, ..Settings::default() };
        near(of_512, 18.643);
        near(Settings { flash_attention: false, ..of_512 }, 87.514);
    }

    #[test]
    fn the_largest_context_is_the_last_that_fits() {
        let header = llama(30, Value::Int(3));
        let at = |context_tokens| plan(&header, Settings { context_tokens, ..Settings::default() }).total();
        let fits = |free| largest_context(&header, Settings::default(), None, free);
        assert_eq!(fits(at(4096)), Some(4096));
        assert_eq!(fits(at(4096).less(Bytes(1))), Some(4096 - 256));
        assert_eq!(fits(Bytes::gib(100.0)), Some(8192), "no longer than it was trained for");
        assert_eq!(fits(Bytes::mib(1)), None);
    }

    #[test]
    fn a_repacked_tensor_is_counted_once_and_a_tied_output_twice() {
        let mut header = llama(1, Value::Int(3));
        let tensor = |name: &str, kind, at: u64| Tensor {
            name: name.into(),
            shape: vec![256, 512],
            kind,
            bytes: Bytes::mib(8),
            offset: at << 20,
        };
        header.tensors = vec![
            tensor("token_embd.weight", 12, 1),
            tensor("blk.0.ffn_up.weight", 12, 9),
            tensor("blk.0.ffn_down.weight", 14, 17),
        ];
        let tied = plan(&header, Settings::default());
        // Of the 8 MiB from 9 to 17, the kernel maps those from 10 to 16 only with each other.
        assert_eq!((tied.part(WEIGHTS), tied.part("weights repacked")), (Bytes::mib(24 - 6), Bytes::mib(16)));
        header.tensors.push(tensor("output.weight", 14, 25));
        let untied = plan(&header, Settings::default());
        assert_eq!((untied.part(WEIGHTS), untied.part("weights repacked")), (Bytes::mib(32 - 6), Bytes::mib(8)));
        let off = plan(&header, Settings { repack: Repack::Off, ..Settings::default() });
        assert_eq!((off.part(WEIGHTS), off.part("weights repacked")), (Bytes::mib(32), Bytes::ZERO));
    }
}
