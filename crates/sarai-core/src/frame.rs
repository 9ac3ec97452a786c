//! Frames between the server and a worker, over one socket pair.
//!
//! A frame is its length as four little-endian bytes, then so many bytes of JSON. Both ends are the same
//! binary, so frames need no version. Encoding and decoding are pure; the sockets are the crates' own.

use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error as ThisError;

use crate::error::Error;
use crate::event::Event;
use crate::memory::{EngineMemory, KvType};
use crate::request::{EmbedRequest, GenerateRequest};
use crate::units::Bytes;

/// The longest frame that is accepted, in bytes: a prompt and its JSON escapes.
pub const MAX_FRAME_BYTES: usize = 256 << 20;

/// How a line of a worker's log begins that is a warning of its own, and not one of llama.cpp's many.
pub const WARNING: &str = "warning: ";

/// Length of the frame header in bytes.
pub const HEADER_BYTES: usize = 4;

/// What a model is made for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// It goes on with text.
    #[default]
    Answers,
    /// It makes a vector of a text.
    Vectors,
    /// It says how well a text answers another one.
    Scores,
}

/// How a worker loads its file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadSpec {
    /// Name for messages.
    pub model: String,
    /// The GGUF file.
    pub path: PathBuf,
    /// The projector that it sees or hears through.
    #[serde(default)]
    pub projector: Option<Projector>,
    /// Tokens that one sequence can hold.
    pub context_tokens: u32,
    /// Sequences that are computed at the same time.
    pub parallel: u32,
    /// Whether all sequences together hold what one may hold.
    #[serde(default)]
    pub shared_context: bool,
    /// Tokens of a prompt that one step computes at most.
    pub ubatch_tokens: u32,
    /// A smaller model of the same vocabulary, which guesses what an answer goes on with.
    #[serde(default)]
    pub draft: Option<PathBuf>,
    /// Tokens of an answer that are guessed in advance at most, where its text repeats, or by the draft model.
    #[serde(default)]
    pub draft_tokens: u32,
    /// Threads when the worker is alone.
    pub threads: u32,
    /// Type of the KV cache.
    pub kv: KvType,
    /// Whether attention is computed without its full matrix.
    pub flash_attention: bool,
    /// Whether eligible weights are copied into the layout that computes fastest.
    pub repack: bool,
    /// Whether an answer's numbers are the same whatever is computed beside it.
    #[serde(default)]
    pub deterministic: bool,
    /// Bytes of the file, from and to, that nothing reads once the model is loaded, because they were copied.
    #[serde(default)]
    pub idle: Vec<(u64, u64)>,
    /// Layers whose attention passes over the cells of all sequences: others have a window, or a state.
    #[serde(default)]
    pub whole_layers: u32,
    /// What it is used for.
    #[serde(default)]
    pub purpose: Purpose,
    /// Where what was computed is kept when the worker goes, if it is.
    #[serde(default)]
    pub park: Option<Park>,
}

/// What a model sees or hears through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Projector {
    /// Its GGUF file.
    pub path: PathBuf,
    /// Tokens of a picture at most, where the model takes pictures in their own size and its own limit is beyond what is planned.
    pub most_tokens: Option<u32>,
    /// What is kept of encoded pictures and sound.
    pub kept: Bytes,
}

/// Room on disk for sequences of a worker that is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Park {
    /// A folder of this file's own.
    pub folder: PathBuf,
    /// All of it together.
    pub most_bytes: Bytes,
}

/// What a worker says of the model it loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadedInfo {
    /// Tokens that one sequence can hold, as the engine granted.
    pub context_tokens: u32,
    /// What llama.cpp says it allocated.
    pub memory: EngineMemory,
}

/// From the server to a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToWorker {
    /// Load the file; the first frame, once.
    Load(LoadSpec),
    /// Start a generation.
    Generate {
        /// Names it in the frames that follow.
        id: u64,
        /// Tokens that prompt and answer may have together, if the sequence can hold as many.
        context_tokens: u32,
        /// Memory that its form may take; none where it has no form.
        form_bytes: Bytes,
        /// What to generate.
        request: Box<GenerateRequest>,
    },
    /// Make vectors, or scores.
    Embed {
        /// Names it in the frames that follow.
        id: u64,
        /// Of what.
        request: Box<EmbedRequest>,
    },
    /// Stop a generation; unknown ids are ignored.
    Cancel {
        /// The generation.
        id: u64,
    },
    /// From the next step on, this is its share of the cores.
    Share {
        /// Threads that it computes with.
        threads: u32,
        /// So many times as long as each step took it rests after it; 0 while no other work comes first.
        rests: u32,
    },
    /// Hold so many tokens per sequence from now on; sent only while nothing is generated.
    Resize {
        /// Tokens that one sequence can hold.
        context_tokens: u32,
    },
    /// Keep on disk what was computed, and end.
    Leave,
    /// Give back what can be had again: pages of the weights, free heap.
    Trim,
}

/// From a worker to the server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromWorker {
    /// So many of a hundred parts of the model are loaded.
    Loading(u8),
    /// The model is loaded.
    Loaded(LoadedInfo),
    /// It cannot be loaded; the worker ends.
    LoadFailed(String),
    /// The context has its new size, or its old one where the new one could not be made; the text says why.
    Resized(LoadedInfo, Option<String>),
    /// The next step of a generation.
    Event {
        /// The generation.
        id: u64,
        /// The step.
        event: Event,
    },
    /// A generation failed; no further frame names it.
    Failed {
        /// The generation.
        id: u64,
        /// Why.
        error: Error,
    },
}

/// A frame that cannot be encoded or decoded.
#[derive(Debug, ThisError)]
pub enum FrameError {
    /// It is longer than [`MAX_FRAME_BYTES`].
    #[error("a frame of {0} bytes is longer than {MAX_FRAME_BYTES}")]
    TooLong(usize),
    /// It is not the JSON of this frame type.
    #[error("malformed frame: {0}")]
    Malformed(#[from] serde_json::Error),
}

/// Appends one frame to `out`.
///
/// # Errors
/// The frame is longer than [`MAX_FRAME_BYTES`] or cannot be written as JSON; `out` is then as it was.
pub fn encode<T: Serialize>(frame: &T, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER_BYTES]);
    let written = serde_json::to_writer(&mut *out, frame).map_err(FrameError::from);
    let length = out.len() - start - HEADER_BYTES;
    let fits = if length > MAX_FRAME_BYTES { Err(FrameError::TooLong(length)) } else { written };
    match fits {
        Ok(()) => {
            let header = u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
            out[start..start + HEADER_BYTES].copy_from_slice(&header);
        }
        Err(_) => out.truncate(start),
    }
    fits
}

/// Reads the length of the frame body from its header.
///
/// # Errors
/// The body would be longer than [`MAX_FRAME_BYTES`].
pub fn body_length(header: [u8; HEADER_BYTES]) -> Result<usize, FrameError> {
    let length = u32::from_le_bytes(header) as usize;
    if length > MAX_FRAME_BYTES { Err(FrameError::TooLong(length)) } else { Ok(length) }
}

/// Decodes a frame body.
///
/// # Errors
/// The body is not the JSON of this frame type.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    Ok(serde_json::from_slice(body)?)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::event::{FinishReason, Timings, Usage};

    #[test]
    fn frames_come_back_as_they_were_sent() {
        let sent = [
            FromWorker::Event { id: 1, event: Event::Text("naïve 🦙\n".into()) },
            FromWorker::Event {
                id: 2,
                event: Event::Done {
                    finish: FinishReason::Length,
                    usage: Usage { prompt_tokens: 3, cached_tokens: 1, completion_tokens: 2 },
                    timings: Timings::default(),
                },
            },
        ];
        let mut wire = Vec::new();
        for frame in &sent {
            encode(frame, &mut wire).unwrap();
        }
        let mut at = 0;
        for frame in &sent {
            let header = wire[at..at + HEADER_BYTES].try_into().unwrap();
            let length = body_length(header).unwrap();
            let body = &wire[at + HEADER_BYTES..at + HEADER_BYTES + length];
            assert_eq!(&decode::<FromWorker>(body).unwrap(), frame);
            at += HEADER_BYTES + length;
        }
        assert_eq!(at, wire.len());
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_anything_is_allocated() {
        assert!(matches!(body_length(u32::MAX.to_le_bytes()), Err(FrameError::TooLong(_))));
    }
}
