//! How much memory a model will take, from its header and its settings alone.
//!
//! Weights, keys and values and states are exact. Scratch follows from the widest tensors that live at the same
//! time in llama.cpp's graphs; the constants were fitted to its own dry runs (`make bench-memory` shows how well).
//! Where a header does not say enough, the estimate is taken high and a note says so; nothing is counted as zero.

use sarai_core::frame::Purpose;
use sarai_core::{Bytes, KvType, MOST_INPUTS, Part};

use crate::draft;
use crate::gguf::Header;
use crate::layers::{self, Layers};
use crate::projector;
use crate::scratch::compute;
use crate::weights::repacked;
pub use crate::weights::{Repack, idle_pieces};

/// Anonymous memory of a worker before it loads anything: libraries, tables, thread stacks, allocator.
const BARE_PROCESS: Bytes = Bytes::kib(4_500);
/// File pages of the binary that a worker keeps in memory, as its proportional share.
const BINARY: Bytes = Bytes::kib(9_700);
/// llama.cpp computes in multiples of so many cells.
const CELLS: u64 = 256;

/// Texts that a model that makes vectors reads side by side.
const TEXTS_AT_ONCE: u32 = 16;

/// Tokens that a draft model guesses at most, where nothing else is said.
pub const DRAFT_TOKENS: u32 = 8;

/// What decides the size besides the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Settings {
    /// Tokens that one sequence can hold.
    pub context_tokens: u32,
    /// Sequences computed at the same time.
    pub parallel: u32,
    /// Whether all sequences together hold what one may hold.
    pub shared_context: bool,
    /// Tokens that one step computes at most.
    pub ubatch_tokens: u32,
    /// Tokens of an answer that are guessed in advance at most.
    pub draft_tokens: u32,
    /// Type of the KV cache.
    pub kv: KvType,
    /// Whether attention is computed without its full matrix.
    pub flash_attention: bool,
    /// Whether eligible weights are copied into the layout that computes fastest.
    pub repack: Repack,
    /// Whether an answer's numbers are the same whatever is computed beside it. Each sequence has cells of its own then.
    pub deterministic: bool,
    /// Threads that compute.
    pub threads: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            context_tokens: 4096,
            parallel: 1,
            shared_context: false,
            ubatch_tokens: 256,
            draft_tokens: 0,
            kv: KvType::F16,
            flash_attention: true,
            repack: Repack::default(),
            deterministic: false,
            threads: 2,
        }
    }
}

impl Settings {
    /// Tokens that all sequences together hold: llama.cpp rounds up.
    #[must_use]
    pub fn cells(&self) -> u64 {
        let times = if self.shared_context { 1 } else { u64::from(self.parallel) };
        u64::from(self.context_tokens).next_multiple_of(CELLS) * times
    }

    /// As this file can be used with: a model that makes vectors reads each text in one step, several side by side, and no
    /// longer ones than it was trained for.
    #[must_use]
    pub fn fitted(self, header: &Header) -> Self {
        if layers::purpose(header) == Purpose::Answers {
            return self;
        }
        let trained = header.arch_size("context_length").and_then(|n| u32::try_from(n).ok()).filter(|&n| n > 0);
        let context_tokens = trained.map_or(self.context_tokens, |most| self.context_tokens.min(most));
        let ubatch_tokens = self.ubatch_tokens.max(context_tokens);
        Self { context_tokens, ubatch_tokens, parallel: TEXTS_AT_ONCE, shared_context: true, ..self }
    }

    /// Whether each sequence has cells of its own: models that make vectors need none that are kept.
    pub(crate) fn has_own_cells(&self) -> bool {
        self.deterministic && !self.shared_context
    }

    /// Tokens that one step really computes at most.
    pub(crate) fn step(&self) -> u64 {
        u64::from(self.ubatch_tokens.max(self.parallel)).min(self.cells())
    }
}

/// What a model is loaded with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Companions<T> {
    /// What it sees or hears through.
    pub projector: Option<T>,
    /// A smaller model of the same vocabulary, which guesses what an answer goes on with.
    pub draft: Option<T>,
}

impl<T> Default for Companions<T> {
    fn default() -> Self {
        Self { projector: None, draft: None }
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
/// What somebody has said that it takes, of whatever kind.
pub const DECLARED: &str = "declared";
/// All parts, in the order in which tables show them.
pub const PARTS: [&str; 16] = [
    WEIGHTS,
    "weights repacked",
    "kv",
    "state",
    "compute",
    "output",
    "texts and vectors",
    "vocabulary",
    "draft model",
    "projector weights",
    "projector compute",
    "pictures and sound",
    "process",
    BINARY_PAGES,
    LEARNED,
    DECLARED,
];

impl Plan {
    /// A plan of one sum, for what has no formula.
    #[must_use]
    pub fn declared(bytes: Bytes) -> Self {
        Self { parts: vec![Part { name: DECLARED.to_owned(), bytes }], notes: Vec::new() }
    }

    /// Plans a model, with what it is loaded with.
    #[must_use]
    pub fn of(header: &Header, settings: Settings, with: Companions<&Header>) -> Self {
        let settings = settings.fitted(header);
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
            part("texts and vectors", batch(header)),
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
        if let Some(draft) = with.draft {
            plan.parts.push(part("draft model", draft::memory(draft, settings)));
        }
        if let Some(projector) = with.projector {
            plan.add_projector(projector, header, settings);
        }
        plan
    }

    /// Adds what a projector takes: a copy of its weights, which is never mapped, the scratch of one picture, and the picture.
    fn add_projector(&mut self, projector: &Header, model: &Header, settings: Settings) {
        let name = str::to_owned;
        self.parts.push(Part { name: name("projector weights"), bytes: projector::weights(projector) });
        self.parts.push(Part { name: name("projector compute"), bytes: projector::compute(projector) });
        self.parts.push(Part { name: name("pictures and sound"), bytes: projector::in_flight(model, settings) });
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
pub fn largest_context(header: &Header, settings: Settings, with: Companions<&Header>, free: Bytes) -> Option<u32> {
    let trained = header.arch_size("context_length").filter(|&n| n > 0).unwrap_or(1 << 17);
    let fits = |blocks: u64| {
        let context_tokens = u32::try_from(blocks * CELLS).unwrap_or(u32::MAX);
        Plan::of(header, Settings { context_tokens, ..settings }, with).total() <= free
    };
    let (mut fitting, mut beyond) = (0, trained / CELLS + 1);
    while beyond - fitting > 1 {
        let middle = fitting.midpoint(beyond);
        if fits(middle) { fitting = middle } else { beyond = middle }
    }
    (fitting > 0).then(|| u32::try_from(fitting * CELLS).unwrap_or(u32::MAX))
}

/// Keys and values: cells x (row of keys + row of values) per layer and sequence. A windowed layer holds the window
/// and one step. Quantised ones are rotated first, by one matrix per layer.
pub(crate) fn kv_cache(layers: &Layers, settings: Settings) -> Bytes {
    let mut total = 0_u128;
    for layer in &layers.layers {
        let cells = layer.window.map_or(settings.cells(), |window| windowed_cells(window, settings));
        let row = settings.kv.row(layer.keys) + settings.kv.row(layer.values);
        total += u128::from(row.0) * u128::from(cells);
        if settings.kv != KvType::F16 && layer.keys > 0 {
            total += u128::from(rotations(layer.head, layer.values > 0));
        }
    }
    bytes(total)
}

pub(crate) fn windowed_cells(window: u64, settings: Settings) -> u64 {
    let parallel = u64::from(settings.parallel);
    let cells = match settings.has_own_cells() {
        true => (window + settings.step()).next_multiple_of(CELLS) * parallel,
        false => (window * parallel + settings.step()).next_multiple_of(CELLS),
    };
    settings.cells().min(cells)
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

/// Logits of one row per sequence, and what the samplers keep of them.
pub(crate) fn output(header: &Header, settings: Settings) -> Bytes {
    if layers::purpose(header) != Purpose::Answers {
        // A row of each token, and one of each text.
        let width = header.arch_size("embedding_length").unwrap_or(0);
        return Bytes(4) * width * (settings.step() + u64::from(settings.parallel));
    }
    Bytes(4 + 12) * header.vocabulary() * u64::from(settings.parallel) * u64::from(1 + settings.draft_tokens)
}

/// The largest batch of texts, twice, and its vectors, as numbers and as they are sent.
fn batch(header: &Header) -> Bytes {
    const TEXT: Bytes = Bytes(2 * 2048);
    if layers::purpose(header) == Purpose::Answers {
        return Bytes::ZERO;
    }
    let width = header.arch_size("embedding_length").unwrap_or(0);
    (Bytes(4 + 12) * width + TEXT) * MOST_INPUTS as u64
}

/// Tables of the tokenizer: about 144 bytes a token and, for byte pairs, 104 a merge, and the longer strings.
pub(crate) fn vocabulary(header: &Header) -> Bytes {
    let merges = header.tokenizer_length("merges");
    let strings = if merges > 0 { 40 } else { 12 };
    Bytes(148 + strings) * header.vocabulary() + Bytes(112) * merges
}

/// What is neither of the model nor of its context: the process, graphs, bookkeeping per cell, work buffers.
pub(crate) fn process(header: &Header, layers: &Layers, settings: Settings) -> Bytes {
    let nodes = (8 * header.tensors.len() as u64).max(1024);
    let graphs = Bytes(3 * 420 + 20) * nodes;
    let attends = layers.layers.iter().any(|layer| layer.keys > 0);
    // 52 bytes from the start, 96 more once a cell is used.
    let cells = if attends { Bytes(148) * settings.cells() } else { Bytes::ZERO };
    let rows = header.tensors.iter().filter(|tensor| tensor.name.starts_with("blk.") && tensor.shape.len() > 1);
    let widest = rows.filter_map(|tensor| tensor.shape.first()).max().copied().unwrap_or(0);
    // A step's activations are quantised into a work buffer; every thread has a tile and its part of attention.
    let work = bytes(u128::from(widest) * u128::from(settings.step()) * 292 / 256);
    let tiles = Bytes::kib(700) * u64::from(settings.threads);
    BARE_PROCESS + graphs + cells + work + tiles
}

pub(crate) fn bytes(count: u128) -> Bytes {
    Bytes(u64::try_from(count).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{Tensor, Value};

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
        Plan::of(header, settings, Companions::default())
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
        let fits = |free| largest_context(&header, Settings::default(), Companions::default(), free);
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
