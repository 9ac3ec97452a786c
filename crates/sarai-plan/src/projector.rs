//! What an encoder for pictures or sound takes besides its weights.

use sarai_core::Bytes;

use crate::gguf::Header;

/// Tokens of a picture at most, where the file does not say: what llama.cpp lets a Qwen model see.
const PICTURE_TOKENS: u64 = 4096;
/// Frames of 30 seconds of sound after the convolutions.
const SOUND_TOKENS: u64 = 1500;

/// All tensors; a file for pictures and sound is opened once for each, and both read the embedding of patches.
#[must_use]
pub fn weights(header: &Header) -> Bytes {
    let has = |kind: &str| header.arch_size(&format!("{kind}.embedding_length")).is_some();
    let patches = header.tensors.iter().filter(|tensor| tensor.name.starts_with("v.patch_embd."));
    let twice: Bytes =
        if has("vision") && has("audio") { patches.map(|tensor| tensor.bytes).sum() } else { Bytes::ZERO };
    header.weights() + twice
}

/// Scratch of one picture or one piece of sound, whichever is larger: activations as in a text layer, and the mask
/// over its own tokens. There is no dry run for it, so it is taken high.
#[must_use]
pub fn compute(header: &Header) -> Bytes {
    let size = |kind: &str, key: &str| header.arch_size(&format!("{kind}.{key}"));
    let scratch = |kind: &str, tokens: u64| {
        let embedding = size(kind, "embedding_length")?;
        let forward = size(kind, "feed_forward_length").unwrap_or(4 * embedding);
        let per_token = 4 * (3 * forward + 8 * embedding) + 2 * tokens;
        Some(Bytes(per_token) * tokens)
    };
    let patches = size("vision", "image_size").zip(size("vision", "patch_size")).map(|(image, patch)| {
        let side = image / patch.max(1);
        side * side
    });
    let dynamic = header.text("clip.projector_type").or_else(|| header.text("clip.vision.projector_type"));
    let picture = match patches {
        Some(_) if dynamic.is_some_and(|kind| kind.starts_with("qwen")) => PICTURE_TOKENS,
        Some(patches) => patches,
        None => PICTURE_TOKENS,
    };
    let all = [scratch("vision", picture), scratch("audio", SOUND_TOKENS)];
    all.into_iter().flatten().max().unwrap_or(Bytes::mib(256))
}
