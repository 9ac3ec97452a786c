//! Where weights are kept: mapped from the file, or copied into a layout that computes faster.
//!
//! The rules are those of ggml's `repack.cpp`, and of the kernel, which maps a file in large pieces where it can.

use sarai_core::Bytes;

use crate::gguf::{Header, Tensor};
use crate::layers::Layers;

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

/// The kernel maps a file in pieces of so many bytes where it can.
const MAPPED_AT_ONCE: u64 = 2 << 20;

/// Bytes that repacking takes, and bytes of the file that it makes idle. Matrices are copied whose type has a
/// faster layout and whose rows come in eights, experts too; embeddings are only looked up in, unless they are the
/// output as well: then the copy comes on top. What lies between tensors that are used stays mapped with them.
pub(crate) fn repacked(header: &Header, repack: Repack) -> (Bytes, Bytes) {
    let takes = |tensor: &Tensor| is_repacked(tensor, repack);
    let looked_up = is_looked_up;
    let copied: Bytes =
        header.tensors.iter().filter(|tensor| takes(tensor) && !looked_up(tensor)).map(|tensor| tensor.bytes).sum();
    // A split file is never given back in part, but the kernel is free to take what is idle of it.
    let idle = idle_ranges(header, takes, looked_up);
    let idle = idle.iter().map(|(from, to)| Bytes(to - from)).sum();
    (copied + tied(header, repack), idle)
}

/// Bytes of weights that are not mapped: each is kept in one layout, but for embeddings that are the output as well and repacked.
pub(crate) fn unmapped(header: &Header, repack: Repack) -> Bytes {
    header.weights() + tied(header, repack)
}

/// Bytes of embeddings that are looked up in as they are, and are repacked as the output.
fn tied(header: &Header, repack: Repack) -> Bytes {
    let has_output = header.tensors.iter().any(|tensor| tensor.name == "output.weight");
    let answers = !Layers::of(header).encoder;
    let tied = header.tensors.iter().find(|tensor| tensor.name == "token_embd.weight" && is_repacked(tensor, repack));
    tied.filter(|_| answers && !has_output).map_or(Bytes::ZERO, |tensor| tensor.bytes)
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
