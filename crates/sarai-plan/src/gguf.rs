//! The header of a GGUF file: its metadata and the shapes of its tensors. Tensor data is never read.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3.

use std::collections::HashMap;
use std::io::{self, Read};

use sarai_core::Bytes;
use thiserror::Error;

/// No string, array or tensor list of a real file is longer; a longer one is a broken header.
const MAX_COUNT: u64 = 1 << 28;
/// No real model has more layers.
const MAX_LAYERS: i64 = 4096;
/// The longest string that is kept; a chat template is a few kilobytes.
const MAX_STRING_BYTES: u64 = 16 << 20;

/// Why a file is not a GGUF that can be used.
#[derive(Debug, Error)]
pub enum GgufError {
    /// It does not begin with the letters `GGUF`.
    #[error("it is not a GGUF file (it begins with {0:02x?}): check the path, or fetch the file again")]
    NotGguf([u8; 4]),
    /// A version this crate does not know.
    #[error("GGUF version {0} is not supported: convert the file to version 3")]
    Version(u32),
    /// It is one of several, and is not named as the first.
    #[error(
        "it is one of {0} files, which llama.cpp finds by their names: name the first, and let it end in `-00001-of-{0:05}.gguf`"
    )]
    Renamed(i64),
    /// It is a model, where the projector of one is wanted.
    #[error("its architecture is `{0}` and not `clip`: name the model's mmproj file")]
    NotAProjector(String),
    /// It cannot draft for a model: its tokens are others.
    #[error(
        "it cannot draft for this model ({0}): name a smaller model of the same family and vocabulary as `draft_path`"
    )]
    NotADraft(String),
    /// The header says what cannot be.
    #[error("its header is malformed ({0}): fetch the file again")]
    Malformed(String),
    /// The header or the tensor data ends early.
    #[error("it is truncated: its header promises {needed} bytes, the file has {actual}: fetch the file again")]
    Truncated {
        /// Bytes that the header promises.
        needed: u64,
        /// Bytes that are there.
        actual: u64,
    },
    /// The file cannot be read.
    #[error("it cannot be read ({0})")]
    Io(#[from] io::Error),
}

/// A metadata value; of arrays only numbers are kept, and the length of the others.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any integer or bool.
    Int(i64),
    /// Any float.
    Float(f64),
    /// A string.
    Text(String),
    /// An array of integers or bools.
    Ints(Vec<i64>),
    /// The length of any other array.
    Length(u64),
}

/// One tensor.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Elements per dimension, the row first.
    pub shape: Vec<u64>,
    /// Its type.
    pub kind: u32,
    /// Its size.
    pub bytes: Bytes,
    /// Where it begins in its file.
    pub offset: u64,
}

/// What a GGUF file says of itself.
#[derive(Clone, Debug, Default)]
pub struct Header {
    /// Metadata by key.
    pub metadata: HashMap<String, Value>,
    /// All tensors.
    pub tensors: Vec<Tensor>,
    /// Where the tensor data ends: the least size that the file must have.
    pub end_of_data: u64,
    /// Whether its vocabulary has a token that text before a gap begins with.
    pub fills_in: bool,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// The bytes are not a GGUF header; nothing is allocated on the word of a broken one.
    pub fn read(from: impl Read) -> Result<Self, GgufError> {
        let mut from = Reader { from, at: 0, fills_in: false };
        let magic = from.array::<4>()?;
        if &magic != b"GGUF" {
            return Err(GgufError::NotGguf(magic));
        }
        let version = from.u32()?;
        if !(2..=3).contains(&version) {
            return Err(GgufError::Version(version));
        }
        let tensors = from.count()?;
        let pairs = from.count()?;
        let mut header = Self::default();
        for _ in 0..pairs {
            let key = from.text()?;
            let kind = from.u32()?;
            let value = from.value(kind)?;
            header.metadata.insert(key, value);
        }
        let keys = ["tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id"];
        header.fills_in = from.fills_in || keys.iter().any(|key| header.metadata.contains_key(*key));
        let mut end = 0;
        for _ in 0..tensors {
            let tensor = from.tensor()?;
            end = end.max(tensor.offset.saturating_add(tensor.bytes.0));
            header.tensors.push(tensor);
        }
        if let Some(layers) = header.arch_int("block_count").filter(|layers| !(0..=MAX_LAYERS).contains(layers)) {
            return Err(GgufError::Malformed(format!("it has {layers} layers")));
        }
        let alignment = header.int("general.alignment").and_then(|n| u64::try_from(n).ok()).unwrap_or(32).max(1);
        let start = from.at.div_ceil(alignment).saturating_mul(alignment);
        for tensor in &mut header.tensors {
            tensor.offset = tensor.offset.saturating_add(start);
        }
        header.end_of_data = start.saturating_add(end);
        Ok(header)
    }

    /// Checks that the file is as long as its header promises.
    ///
    /// # Errors
    /// It is shorter.
    pub fn check_length(&self, actual: u64) -> Result<(), GgufError> {
        if actual < self.end_of_data {
            return Err(GgufError::Truncated { needed: self.end_of_data, actual });
        }
        Ok(())
    }

    /// A metadata integer.
    #[must_use]
    pub fn int(&self, key: &str) -> Option<i64> {
        match self.metadata.get(key) {
            Some(Value::Int(value)) => Some(*value),
            _ => None,
        }
    }

    /// A metadata string.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key) {
            Some(Value::Text(value)) => Some(value),
            _ => None,
        }
    }

    /// The architecture, such as `llama`.
    #[must_use]
    pub fn architecture(&self) -> &str {
        self.text("general.architecture").unwrap_or("unknown")
    }

    /// An integer of the architecture: `key` without its prefix.
    #[must_use]
    pub fn arch_int(&self, key: &str) -> Option<i64> {
        self.int(&format!("{}.{key}", self.architecture()))
    }

    /// An integer of the architecture per layer: one for all, or one each.
    #[must_use]
    pub fn arch_int_of_layer(&self, key: &str, layer: usize) -> Option<i64> {
        match self.metadata.get(&format!("{}.{key}", self.architecture()))? {
            Value::Int(value) => Some(*value),
            Value::Ints(values) => values.get(layer).copied(),
            _ => None,
        }
    }

    /// A dimension of the architecture, at most 2^24: real ones are smaller, and products of five stay exact in 128
    /// bits.
    #[must_use]
    pub fn arch_size(&self, key: &str) -> Option<u64> {
        self.arch_int(key).and_then(size)
    }

    /// As [`Header::arch_size`], per layer.
    #[must_use]
    pub fn arch_size_of_layer(&self, key: &str, layer: usize) -> Option<u64> {
        self.arch_int_of_layer(key, layer).and_then(size)
    }

    /// Whether it names the size of a recurrent state.
    #[must_use]
    pub fn has_state(&self) -> bool {
        ["ssm.state_size", "shortconv.l_cache", "wkv.head_size", "kda.head_dim"]
            .iter()
            .any(|key| self.arch_size(key).is_some_and(|size| size > 0))
    }

    /// The length of an array of the tokenizer, such as `tokens` or `merges`.
    #[must_use]
    pub fn tokenizer_length(&self, key: &str) -> u64 {
        match self.metadata.get(&format!("tokenizer.ggml.{key}")) {
            Some(Value::Length(length)) => *length,
            _ => 0,
        }
    }

    /// The number of tokens in the vocabulary.
    #[must_use]
    pub fn vocabulary(&self) -> u64 {
        match self.metadata.get("tokenizer.ggml.tokens") {
            Some(Value::Length(length)) => *length,
            _ => self.arch_int("vocab_size").and_then(|n| u64::try_from(n).ok()).unwrap_or(0),
        }
    }

    /// The sum of all tensors.
    #[must_use]
    pub fn weights(&self) -> Bytes {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    /// The number of parameters.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.shape.iter().product::<u64>()).sum()
    }

    /// The name of the quantisation, such as `Q4_K_M`.
    #[must_use]
    pub fn quantisation(&self) -> &'static str {
        match self.int("general.file_type") {
            Some(0) => "F32",
            Some(1) => "F16",
            Some(2) => "Q4_0",
            Some(3) => "Q4_1",
            Some(7) => "Q8_0",
            Some(8) => "Q5_0",
            Some(9) => "Q5_1",
            Some(10) => "Q2_K",
            Some(11) => "Q3_K_S",
            Some(12) => "Q3_K_M",
            Some(13) => "Q3_K_L",
            Some(14) => "Q4_K_S",
            Some(15) => "Q4_K_M",
            Some(16) => "Q5_K_S",
            Some(17) => "Q5_K_M",
            Some(18) => "Q6_K",
            Some(25) => "IQ4_NL",
            Some(30) => "IQ4_XS",
            Some(32) => "BF16",
            _ => "unknown",
        }
    }
}

fn size(value: i64) -> Option<u64> {
    u64::try_from(value).ok().map(|value| value.min(1 << 24))
}

/// Elements per block and bytes per block of a tensor type, as in ggml.h.
fn block_of(kind: u32) -> Option<(u64, u64)> {
    Some(match kind {
        0 | 26 => (1, 4),
        1 | 25 | 30 => (1, 2),
        2 | 20 => (32, 18),
        3 => (32, 20),
        6 => (32, 22),
        7 => (32, 24),
        8 => (32, 34),
        9 => (32, 36),
        10 => (256, 84),
        11 | 21 => (256, 110),
        12 => (256, 144),
        13 => (256, 176),
        14 => (256, 210),
        15 => (256, 292),
        16 => (256, 66),
        17 => (256, 74),
        18 => (256, 98),
        19 => (256, 50),
        22 => (256, 82),
        23 => (256, 136),
        24 => (1, 1),
        27 | 28 => (1, 8),
        29 => (256, 56),
        34 => (256, 54),
        35 => (256, 66),
        39 => (32, 17),
        _ => return None,
    })
}

struct Reader<R> {
    from: R,
    at: u64,
    /// Whether a token was passed that text before a gap begins with.
    fills_in: bool,
}

impl<R: Read> Reader<R> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), GgufError> {
        let needed = self.at + bytes.len() as u64;
        match self.from.read_exact(bytes) {
            Ok(()) => {
                self.at = needed;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(GgufError::Truncated { needed, actual: self.at })
            }
            Err(error) => Err(error.into()),
        }
    }

    fn u32(&mut self) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn count(&mut self) -> Result<u64, GgufError> {
        let count = self.u64()?;
        if count > MAX_COUNT {
            return Err(GgufError::Malformed(format!("it counts {count} entries")));
        }
        Ok(count)
    }

    fn skip(&mut self, bytes: u64) -> Result<(), GgufError> {
        let skipped = io::copy(&mut self.from.by_ref().take(bytes), &mut io::sink())?;
        self.at += skipped;
        if skipped < bytes {
            return Err(GgufError::Truncated { needed: self.at - skipped + bytes, actual: self.at });
        }
        Ok(())
    }

    fn text(&mut self) -> Result<String, GgufError> {
        let length = self.u64()?;
        if length > MAX_STRING_BYTES {
            return Err(GgufError::Malformed(format!("a string of {length} bytes")));
        }
        let mut bytes = Vec::new();
        let read = self.from.by_ref().take(length).read_to_end(&mut bytes)? as u64;
        self.at += read;
        if read < length {
            return Err(GgufError::Truncated { needed: self.at - read + length, actual: self.at });
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn value(&mut self, kind: u32) -> Result<Value, GgufError> {
        Ok(match kind {
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array()?))),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            8 => Value::Text(self.text()?),
            9 => self.array_value()?,
            _ => Value::Int(self.integer(kind)?),
        })
    }

    fn integer(&mut self, kind: u32) -> Result<i64, GgufError> {
        Ok(match kind {
            0 | 7 => i64::from(self.array::<1>()?[0]),
            1 => i64::from(i8::from_le_bytes(self.array()?)),
            2 => i64::from(u16::from_le_bytes(self.array()?)),
            3 => i64::from(i16::from_le_bytes(self.array()?)),
            4 => i64::from(self.u32()?),
            5 => i64::from(i32::from_le_bytes(self.array()?)),
            10 => i64::try_from(self.u64()?).unwrap_or(i64::MAX),
            11 => i64::from_le_bytes(self.array()?),
            _ => return Err(GgufError::Malformed(format!("a value of type {kind}"))),
        })
    }

    fn array_value(&mut self) -> Result<Value, GgufError> {
        /// Longer integer arrays belong to the vocabulary and are only counted.
        const KEPT: u64 = 4096;
        let kind = self.u32()?;
        let length = self.count()?;
        match kind {
            8 => {
                for _ in 0..length {
                    self.pass_text()?;
                }
            }
            6 => self.skip(length * 4)?,
            12 => self.skip(length * 8)?,
            9 => return Err(GgufError::Malformed("an array of arrays".into())),
            _ if length <= KEPT => {
                let mut values = Vec::new();
                for _ in 0..length {
                    values.push(self.integer(kind)?);
                }
                return Ok(Value::Ints(values));
            }
            _ => {
                for _ in 0..length {
                    self.integer(kind)?;
                }
            }
        }
        Ok(Value::Length(length))
    }

    /// A text of a list, of which only some are of interest.
    fn pass_text(&mut self) -> Result<(), GgufError> {
        match self.u64()? {
            14 => self.fills_in |= &self.array::<14>()? == b"<|fim_prefix|>",
            12 => {
                let text = self.array::<12>()?;
                self.fills_in |= [b"<fim_prefix>", b"<fim-prefix>"].contains(&&text);
            }
            5 => self.fills_in |= &self.array::<5>()? == b"<PRE>",
            bytes => self.skip(bytes)?,
        }
        Ok(())
    }

    fn tensor(&mut self) -> Result<Tensor, GgufError> {
        let name = self.text()?;
        let dimensions = self.u32()?;
        if dimensions > 4 {
            return Err(GgufError::Malformed(format!("tensor `{name}` has {dimensions} dimensions")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(self.u64()?);
        }
        let kind = self.u32()?;
        let offset = self.u64()?;
        let (per_block, block_bytes) = block_of(kind)
            .ok_or_else(|| GgufError::Malformed(format!("tensor `{name}` has the unknown type {kind}")))?;
        let row = shape.first().copied().unwrap_or(1).div_ceil(per_block).saturating_mul(block_bytes);
        let rows = shape.iter().skip(1).fold(1_u64, |rows, &n| rows.saturating_mul(n));
        Ok(Tensor { name, shape, kind, bytes: Bytes(row) * rows, offset })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tiny() -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3_u32.to_le_bytes());
        file.extend(1_u64.to_le_bytes());
        file.extend(1_u64.to_le_bytes());
        let text = |file: &mut Vec<u8>, text: &str| {
            file.extend((text.len() as u64).to_le_bytes());
            file.extend(text.as_bytes());
        };
        text(&mut file, "general.architecture");
        file.extend(8_u32.to_le_bytes());
        text(&mut file, "llama");
        text(&mut file, "token_embd.weight");
        file.extend(2_u32.to_le_bytes());
        file.extend(64_u64.to_le_bytes());
        file.extend(10_u64.to_le_bytes());
        file.extend(8_u32.to_le_bytes());
        file.extend(0_u64.to_le_bytes());
        file
    }

    #[test]
    fn weights_are_row_size_times_rows() {
        let header = Header::read(tiny().as_slice()).unwrap();
        assert_eq!(header.architecture(), "llama");
        assert_eq!(header.weights(), Bytes(2 * 34 * 10));
        assert_eq!(header.parameters(), 640);
    }

    #[test]
    fn a_file_shorter_than_its_header_promises_is_truncated() {
        let header = Header::read(tiny().as_slice()).unwrap();
        assert!(matches!(header.check_length(header.end_of_data - 1), Err(GgufError::Truncated { .. })));
        assert!(header.check_length(header.end_of_data).is_ok());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic_or_allocate_much(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = Header::read(bytes.as_slice());
        }

        #[test]
        fn a_damaged_header_is_an_error_or_a_header(at in 0_usize..100, with: u8) {
            let mut file = tiny();
            let at = at % file.len();
            file[at] = with;
            let _ = Header::read(file.as_slice());
        }

        #[test]
        fn a_cut_header_is_truncated(cut in 4_usize..100) {
            let file = tiny();
            let cut = cut.min(file.len() - 1);
            let truncated = matches!(Header::read(&file[..cut]), Err(GgufError::Truncated { .. }));
            prop_assert!(truncated);
        }
    }
}
