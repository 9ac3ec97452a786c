//! The words of sarai, shared by every other crate.
//!
//! Holds the types that requests, answers, errors and worker frames are made of. It does no I/O, reads no
//! clock and knows no wire format: those are `sarai-server` and `sarai-api`.

pub mod deadline;
pub mod error;
pub mod event;
pub mod frame;
pub mod media;
pub mod memory;
pub mod request;
pub mod schema;
pub mod split;
pub mod tool;
pub mod units;

pub use deadline::Deadlines;
pub use error::{Attempt, Error, Phase, RemoteCause};
pub use event::{Event, Extra, FinishReason, Timings, TokenLogprob, Usage};
pub use frame::Purpose;
pub use media::{Media, MediaKind, MediaSource};
pub use memory::{EngineMemory, Held, KeepAlive, KvType, Part, Refusal};
pub use request::{
    Api, EmbedRequest, Extras, FORM_BYTES, Format, GenerateRequest, Input, Lane, MOST_INPUTS, Message, Need, Prompt,
    REASONING_EFFORT, Residence, ResultOf, Role, Samplers, Sampling, form_bytes,
};
pub use tool::{ToolCall, ToolCallPart, ToolChoice, Tools};
pub use units::Bytes;
