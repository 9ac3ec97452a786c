//! GGUF files of the true shapes of published models, without their data: a header, and a hole as long as the tensors.
//!
//! Shapes are from the models' published configurations, tensor types from the rules by which llama.cpp quantises
//! (`llama-quant.cpp`). The sums agree with the sizes of the published files but for the tokenizer's texts:
//! - SOLAR-10.7B: upstage/SOLAR-10.7B-Instruct-v1.0; Q4_K_M is published at 6.46 GB.
//! - LFM2-1.2B: LiquidAI/LFM2-1.2B; 730,893,248 bytes, of which 728,509,440 are tensors.
//! - Qwen2.5-Omni-7B and 3B: Qwen/Qwen2.5-Omni-7B, -3B (the thinker); 4,683,072,384 and 2,104,931,648 bytes, of which
//!   4,677,120,000 and 2,098,976,768 are tensors; projectors in Q8_0 1,548,488,480 and 1,538,031,328 bytes.
//! - EmbeddingGemma-300M: google/embeddinggemma-300m; Q8_0 with its dense layers 333,590,944 bytes, of which
//!   327,060,480 are tensors.

use std::fs::File;
use std::io::Write;
use std::path::Path;

const F32: u32 = 0;
const F16: u32 = 1;
const Q8_0: u32 = 8;
const Q4_K: u32 = 12;
const Q6_K: u32 = 14;

/// A file in the making.
pub struct Gguf {
    architecture: String,
    metadata: Vec<u8>,
    pairs: u64,
    tensors: Vec<(String, Vec<u64>, u32)>,
}

impl Gguf {
    fn new(architecture: &str) -> Self {
        let gguf = Self { architecture: architecture.into(), metadata: Vec::new(), pairs: 0, tensors: Vec::new() };
        gguf.text("general.architecture", architecture)
    }

    fn key(&mut self, key: &str, kind: u32) {
        self.metadata.extend((key.len() as u64).to_le_bytes());
        self.metadata.extend(key.as_bytes());
        self.metadata.extend(kind.to_le_bytes());
        self.pairs += 1;
    }

    fn text(mut self, key: &str, value: &str) -> Self {
        self.key(key, 8);
        self.metadata.extend((value.len() as u64).to_le_bytes());
        self.metadata.extend(value.as_bytes());
        self
    }

    fn int(mut self, key: &str, value: u32) -> Self {
        let key = if key.contains("general.") { key.to_owned() } else { format!("{}.{key}", self.architecture) };
        self.key(&key, 4);
        self.metadata.extend(value.to_le_bytes());
        self
    }

    fn ints(mut self, pairs: &[(&str, u32)]) -> Self {
        for (key, value) in pairs {
            self = self.int(key, *value);
        }
        self
    }

    fn int_array(mut self, key: &str, values: &[i32]) -> Self {
        let key = format!("{}.{key}", self.architecture);
        self.key(&key, 9);
        self.metadata.extend(5_u32.to_le_bytes());
        self.metadata.extend((values.len() as u64).to_le_bytes());
        for value in values {
            self.metadata.extend(value.to_le_bytes());
        }
        self
    }

    /// So many empty texts: only their number matters to a plan.
    fn vocabulary(mut self, tokens: usize, merges: usize) -> Self {
        for (key, count) in [("tokenizer.ggml.tokens", tokens), ("tokenizer.ggml.merges", merges)] {
            if count > 0 {
                self.key(key, 9);
                self.metadata.extend(8_u32.to_le_bytes());
                self.metadata.extend((count as u64).to_le_bytes());
                self.metadata.resize(self.metadata.len() + 8 * count, 0);
            }
        }
        self
    }

    fn tensor(&mut self, name: impl Into<String>, shape: &[u64], kind: u32) {
        self.tensors.push((name.into(), shape.to_vec(), kind));
    }

    fn size(shape: &[u64], kind: u32) -> u64 {
        let (per_block, bytes) = match kind {
            F32 => (1, 4),
            F16 => (1, 2),
            Q8_0 => (32, 34),
            Q4_K => (256, 144),
            Q6_K => (256, 210),
            other => unreachable!("type {other}"),
        };
        shape.iter().product::<u64>() / per_block * bytes
    }

    /// The sum of all tensors, each padded as in a file.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|(_, shape, kind)| Self::size(shape, *kind).next_multiple_of(32)).sum()
    }

    /// Writes it in two parts, as llama.cpp splits a file.
    pub fn write_split(mut self, folder: &Path, name: &str) {
        let rest = self.tensors.split_off(self.tensors.len() / 2);
        self.key("split.count", 2);
        self.metadata.extend(2_u16.to_le_bytes());
        self.write(&folder.join(format!("{name}-00001-of-00002.gguf")));
        let second = Self { tensors: rest, ..Self::new(&self.architecture) };
        second.write(&folder.join(format!("{name}-00002-of-00002.gguf")));
    }

    /// Writes the header, and a hole for the data.
    pub fn write(&self, path: &Path) {
        let mut file = b"GGUF".to_vec();
        file.extend(3_u32.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend(self.pairs.to_le_bytes());
        file.extend(&self.metadata);
        let mut offset = 0_u64;
        for (name, shape, kind) in &self.tensors {
            file.extend((name.len() as u64).to_le_bytes());
            file.extend(name.as_bytes());
            file.extend(u32::try_from(shape.len()).unwrap().to_le_bytes());
            for dimension in shape {
                file.extend(dimension.to_le_bytes());
            }
            file.extend(kind.to_le_bytes());
            file.extend(offset.to_le_bytes());
            offset += Self::size(shape, *kind).next_multiple_of(32);
        }
        let mut out = File::create(path).unwrap();
        out.write_all(&file).unwrap();
        out.set_len((file.len() as u64).next_multiple_of(32) + offset).unwrap();
    }
}

/// Whether Q4_K_M gives the i-th of n such tensors more bits.
fn more_bits(i: u64, n: u64) -> bool {
    i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2
}

fn mixed(i: u64, n: u64) -> u32 {
    if more_bits(i, n) { Q6_K } else { Q4_K }
}

/// A transformer as most are: llama and qwen.
struct Decoder {
    layers: u64,
    embedding: u64,
    kv: u64,
    forward: u64,
    vocabulary: u64,
    biases: bool,
}

impl Decoder {
    fn tensors(&self, gguf: &mut Gguf) {
        let Self { layers, embedding, kv, forward, vocabulary, biases } = *self;
        gguf.tensor("token_embd.weight", &[embedding, vocabulary], Q4_K);
        for i in 0..layers {
            let mut add = |name: &str, shape: &[u64], kind| gguf.tensor(format!("blk.{i}.{name}"), shape, kind);
            add("attn_norm.weight", &[embedding], F32);
            add("attn_q.weight", &[embedding, embedding], Q4_K);
            add("attn_k.weight", &[embedding, kv], Q4_K);
            add("attn_v.weight", &[embedding, kv], mixed(i, layers));
            if biases {
                add("attn_q.bias", &[embedding], F32);
                add("attn_k.bias", &[kv], F32);
                add("attn_v.bias", &[kv], F32);
            }
            add("attn_output.weight", &[embedding, embedding], Q4_K);
            add("ffn_norm.weight", &[embedding], F32);
            add("ffn_gate.weight", &[embedding, forward], Q4_K);
            add("ffn_up.weight", &[embedding, forward], Q4_K);
            add("ffn_down.weight", &[forward, embedding], mixed(i, layers));
        }
        gguf.tensor("output_norm.weight", &[embedding], F32);
        gguf.tensor("output.weight", &[embedding, vocabulary], Q6_K);
    }
}

/// SOLAR-10.7B-Instruct Q4_K_M.
pub fn solar() -> Gguf {
    let mut gguf = Gguf::new("llama")
        .ints(&[
            ("general.file_type", 15),
            ("block_count", 48),
            ("context_length", 4096),
            ("embedding_length", 4096),
            ("feed_forward_length", 14336),
            ("attention.head_count", 32),
            ("attention.head_count_kv", 8),
        ])
        .vocabulary(32000, 0);
    Decoder { layers: 48, embedding: 4096, kv: 1024, forward: 14336, vocabulary: 32000, biases: false }
        .tensors(&mut gguf);
    gguf
}

/// The thinker of Qwen2.5-Omni Q4_K_M.
pub fn omni(billions: u32) -> Gguf {
    let (layers, embedding, heads, kv_heads, forward, vocabulary) = match billions {
        7 => (28, 3584, 28, 4, 18944, 152_064),
        _ => (36, 2048, 16, 2, 11008, 151_936),
    };
    let mut gguf = Gguf::new("qwen2vl")
        .ints(&[
            ("general.file_type", 15),
            ("block_count", layers),
            ("context_length", 32768),
            ("embedding_length", embedding),
            ("feed_forward_length", forward),
            ("attention.head_count", heads),
            ("attention.head_count_kv", kv_heads),
        ])
        .int_array("rope.dimension_sections", &[16, 24, 24, 0])
        .vocabulary(vocabulary, 151_387);
    let decoder = Decoder {
        layers: layers.into(),
        embedding: embedding.into(),
        kv: u64::from(kv_heads) * 128,
        forward: forward.into(),
        vocabulary: vocabulary as u64,
        biases: true,
    };
    decoder.tensors(&mut gguf);
    gguf
}

/// The projector of Qwen2.5-Omni in Q8_0: pictures and sound.
pub fn omni_projector(billions: u32) -> Gguf {
    let out = if billions == 7 { 3584 } else { 2048 };
    let mut gguf = Gguf::new("clip").text("clip.projector_type", "qwen2.5o").ints(&[
        ("vision.image_size", 560),
        ("vision.patch_size", 14),
        ("vision.embedding_length", 1280),
        ("vision.feed_forward_length", 3420),
        ("vision.block_count", 32),
        ("vision.attention.head_count", 16),
        ("audio.embedding_length", 1280),
        ("audio.feed_forward_length", 5120),
        ("audio.block_count", 32),
        ("audio.attention.head_count", 20),
        ("audio.num_mel_bins", 128),
    ]);
    gguf.tensor("v.patch_embd.weight", &[14, 14, 3, 1280], F16);
    gguf.tensor("v.patch_embd.weight.1", &[14, 14, 3, 1280], F32);
    for i in 0..32 {
        for part in ["attn_q", "attn_k", "attn_v", "attn_out"] {
            gguf.tensor(format!("v.blk.{i}.{part}.weight"), &[1280, 1280], Q8_0);
            gguf.tensor(format!("v.blk.{i}.{part}.bias"), &[1280], F32);
            gguf.tensor(format!("a.blk.{i}.{part}.weight"), &[1280, 1280], Q8_0);
            if part != "attn_k" {
                gguf.tensor(format!("a.blk.{i}.{part}.bias"), &[1280], F32);
            }
        }
        for part in ["ffn_gate", "ffn_up"] {
            gguf.tensor(format!("v.blk.{i}.{part}.weight"), &[1280, 3420], Q8_0);
            gguf.tensor(format!("v.blk.{i}.{part}.bias"), &[3420], F32);
        }
        // Rows of 3420 are no multiple of a block.
        gguf.tensor(format!("v.blk.{i}.ffn_down.weight"), &[3420, 1280], F16);
        gguf.tensor(format!("v.blk.{i}.ffn_down.bias"), &[1280], F32);
        gguf.tensor(format!("a.blk.{i}.ffn_up.weight"), &[1280, 5120], Q8_0);
        gguf.tensor(format!("a.blk.{i}.ffn_up.bias"), &[5120], F32);
        gguf.tensor(format!("a.blk.{i}.ffn_down.weight"), &[5120, 1280], Q8_0);
        gguf.tensor(format!("a.blk.{i}.ffn_down.bias"), &[1280], F32);
        for norm in ["ln1", "ln2"] {
            gguf.tensor(format!("v.blk.{i}.{norm}.weight"), &[1280], F32);
            gguf.tensor(format!("a.blk.{i}.{norm}.weight"), &[1280], F32);
            gguf.tensor(format!("a.blk.{i}.{norm}.bias"), &[1280], F32);
        }
    }
    gguf.tensor("v.post_ln.weight", &[1280], F32);
    gguf.tensor("mm.0.weight", &[5120, 5120], Q8_0);
    gguf.tensor("mm.0.bias", &[5120], F32);
    gguf.tensor("mm.2.weight", &[5120, out], Q8_0);
    gguf.tensor("mm.2.bias", &[out], F32);
    gguf.tensor("a.conv1d.1.weight", &[3, 128, 1280], F16);
    gguf.tensor("a.conv1d.1.bias", &[1, 1280], F32);
    gguf.tensor("a.conv1d.2.weight", &[3, 1280, 1280], F16);
    gguf.tensor("a.conv1d.2.bias", &[1, 1280], F32);
    gguf.tensor("a.position_embd.weight", &[1280, 1500], F32);
    for end in ["weight", "bias"] {
        gguf.tensor(format!("a.post_ln.{end}"), &[1280], F32);
    }
    gguf.tensor("mm.a.fc.weight", &[1280, out], Q8_0);
    gguf.tensor("mm.a.fc.bias", &[out], F32);
    gguf
}

/// LFM2-1.2B Q4_K_M: ten short convolutions and six layers of attention.
pub fn lfm2() -> Gguf {
    let heads = [0, 0, 8, 0, 0, 8, 0, 0, 8, 0, 8, 0, 8, 0, 8, 0];
    let mut gguf = Gguf::new("lfm2")
        .ints(&[
            ("general.file_type", 15),
            ("block_count", 16),
            ("context_length", 128_000),
            ("embedding_length", 2048),
            ("feed_forward_length", 8192),
            ("attention.head_count", 32),
            ("shortconv.l_cache", 3),
        ])
        .int_array("attention.head_count_kv", &heads)
        .vocabulary(65536, 63683);
    gguf.tensor("token_embd.weight", &[2048, 65536], Q6_K);
    let mut attends = 0;
    for (i, kv) in (0..).zip(heads) {
        let mut add = |name: &str, shape: &[u64], kind| gguf.tensor(format!("blk.{i}.{name}"), shape, kind);
        add("attn_norm.weight", &[2048], F32);
        add("ffn_norm.weight", &[2048], F32);
        add("ffn_gate.weight", &[2048, 8192], Q4_K);
        add("ffn_up.weight", &[2048, 8192], Q4_K);
        add("ffn_down.weight", &[8192, 2048], mixed(i, 16));
        if kv > 0 {
            add("attn_q.weight", &[2048, 2048], Q4_K);
            add("attn_k.weight", &[2048, 512], Q4_K);
            add("attn_v.weight", &[2048, 512], mixed(attends, 6));
            add("attn_output.weight", &[2048, 2048], Q4_K);
            add("attn_q_norm.weight", &[64], F32);
            add("attn_k_norm.weight", &[64], F32);
            attends += 1;
        } else {
            add("shortconv.conv.weight", &[3, 2048], F32);
            add("shortconv.in_proj.weight", &[2048, 6144], Q4_K);
            add("shortconv.out_proj.weight", &[2048, 2048], Q4_K);
        }
    }
    gguf.tensor("token_embd_norm.weight", &[2048], F32);
    gguf
}

/// EmbeddingGemma-300M Q8_0 with its dense layers.
pub fn embedding_gemma() -> Gguf {
    let mut gguf = Gguf::new("gemma-embedding")
        .ints(&[
            ("general.file_type", 7),
            ("block_count", 24),
            ("context_length", 2048),
            ("embedding_length", 768),
            ("feed_forward_length", 1152),
            ("attention.head_count", 3),
            ("attention.head_count_kv", 1),
            ("attention.key_length", 256),
            ("attention.value_length", 256),
            ("attention.sliding_window", 512),
        ])
        .vocabulary(262_144, 0);
    gguf.tensor("token_embd.weight", &[768, 262_144], Q8_0);
    for i in 0..24 {
        let mut add = |name: &str, shape: &[u64], kind| gguf.tensor(format!("blk.{i}.{name}.weight"), shape, kind);
        for norm in ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"] {
            add(norm, &[768], F32);
        }
        add("attn_q_norm", &[256], F32);
        add("attn_k_norm", &[256], F32);
        add("attn_q", &[768, 768], Q8_0);
        add("attn_k", &[768, 256], Q8_0);
        add("attn_v", &[768, 256], Q8_0);
        add("attn_output", &[768, 768], Q8_0);
        add("ffn_gate", &[768, 1152], Q8_0);
        add("ffn_up", &[768, 1152], Q8_0);
        add("ffn_down", &[1152, 768], Q8_0);
    }
    gguf.tensor("output_norm.weight", &[768], F32);
    gguf.tensor("dense_2.weight", &[768, 3072], Q8_0);
    gguf.tensor("dense_3.weight", &[3072, 768], Q8_0);
    gguf
}
