//! What an encoder for pictures or sound takes besides the model's own plan: weights, scratch, and what is in flight.
//!
//! The scratch is a formula over the activations that llama.cpp's graphs keep at once, checked against its own figures for SigLIP, Qwen's
//! and Whisper's encoders (docs/memory.md).

use sarai_core::media::{MOST_PICTURE_TOKENS, MOST_PIXELS};
use sarai_core::{Bytes, MediaKind};

use crate::estimate::Settings;
use crate::gguf::Header;

/// Patches that Qwen's encoders make one token of.
const PATCHES_PER_TOKEN: u64 = 4;
/// Frames of 30 seconds of sound after the convolutions.
const SOUND_TOKENS: u64 = 1500;

/// Whether a model sees, or hears, through it: what the file says of itself.
#[must_use]
pub fn senses(header: &Header, kind: MediaKind) -> bool {
    let (says, size) = match kind {
        MediaKind::Image => ("clip.has_vision_encoder", "vision.embedding_length"),
        MediaKind::Audio => ("clip.has_audio_encoder", "audio.embedding_length"),
    };
    header.int(says).map_or_else(|| header.arch_size(size).is_some(), |flag| flag != 0)
}

/// All tensors; a file for pictures and sound is opened once for each, and both read the embedding of patches.
#[must_use]
pub fn weights(header: &Header) -> Bytes {
    let patches = header.tensors.iter().filter(|tensor| tensor.name.starts_with("v.patch_embd."));
    let is_both = senses(header, MediaKind::Image) && senses(header, MediaKind::Audio);
    let twice: Bytes = if is_both { patches.map(|tensor| tensor.bytes).sum() } else { Bytes::ZERO };
    header.weights() + twice
}

/// Scratch of the largest picture and of thirty seconds of sound: each keeps its own.
#[must_use]
pub fn compute(header: &Header) -> Bytes {
    let known = [vision(header), sound(header)];
    match known.iter().any(Option::is_some) {
        true => known.into_iter().flatten().sum(),
        false => Bytes::mib(256),
    }
}

/// Pixels and samples while they are decoded, what prompts that wait or are computed were encoded to, and what is kept of that.
#[must_use]
pub fn in_flight(model: &Header, settings: Settings) -> Bytes {
    // Twelve bytes a pixel: sixteen bits of four colours and their eight, or two copies and what a decoder needs. The longest sound is
    // smaller. The files themselves, as they came, and the one that is decoded once more.
    let decoded = Bytes(12 * MOST_PIXELS) + FILES * (u64::from(settings.parallel) + 1);
    let prompts = row(model) * u64::from(settings.context_tokens) * u64::from(settings.parallel);
    decoded + prompts + kept(model)
}

/// Room for the files of one request: as large as a request may be, unless the configuration lets it be larger.
const FILES: Bytes = Bytes::mib(32);

/// What is kept of encoded pictures and sound: a conversation has a few pictures, and the longest sound is as long as eight.
#[must_use]
pub fn kept(model: &Header) -> Bytes {
    row(model) * 8 * u64::from(MOST_PICTURE_TOKENS)
}

/// What stands in the place of one token.
fn row(model: &Header) -> Bytes {
    Bytes(4 * model.arch_size("embedding_length").unwrap_or(4096))
}

/// The limit that a picture's tokens need, where the projector has a higher one of its own.
#[must_use]
pub fn most_tokens(header: &Header) -> Option<u32> {
    projector_kind(header).starts_with("qwen").then_some(MOST_PICTURE_TOKENS)
}

fn projector_kind(header: &Header) -> &str {
    let kind = header.text("clip.projector_type").or_else(|| header.text("clip.vision.projector_type"));
    kind.unwrap_or_default()
}

fn size(header: &Header, kind: &str, key: &str) -> Option<u64> {
    header.arch_size(&format!("{kind}.{key}"))
}

fn vision(header: &Header) -> Option<Bytes> {
    let of = |key: &str| size(header, "vision", key);
    let embedding = of("embedding_length")?;
    let forward = of("feed_forward_length").unwrap_or(4 * embedding);
    let patch = of("patch_size").unwrap_or(14).max(1);
    let kind = projector_kind(header);
    if !kind.starts_with("qwen") {
        let side = of("image_size").unwrap_or(1024) / patch;
        let patches = side * side;
        return Some(Bytes(4 * patches * (5 * embedding).max(3 * embedding + forward)));
    }
    let patches = PATCHES_PER_TOKEN * u64::from(MOST_PICTURE_TOKENS);
    // Those with windows have gates, and masks over all patches, in several copies.
    let has_windows = kind != "qwen2vl_merger";
    let (forwards, mask) = if has_windows { (3, 8 * patches * patches) } else { (1, 0) };
    let activations = (5 * embedding).max(2 * embedding + forwards * forward);
    let pixels = 3 * patch * patch;
    // The picture itself, as numbers with fractions, twice.
    let input = 2 * 4 * pixels * patches;
    Some(Bytes(4 * patches * (pixels + 4 + activations) + mask + input))
}

fn sound(header: &Header) -> Option<Bytes> {
    let of = |key: &str| size(header, "audio", key);
    let embedding = of("embedding_length")?;
    let forward = of("feed_forward_length").unwrap_or(4 * embedding);
    Some(Bytes(4 * SOUND_TOKENS * (5 * embedding).max(3 * embedding + forward)))
}
