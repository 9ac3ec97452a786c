//! OpenAI's `/v1` API: chat completions, completions, models, errors.

mod answer;
pub mod remote;
mod request;

pub(crate) use answer::extension;
pub use answer::{
    AroundText, ChunkWriter, Kind, LocalModel, error_body, error_with_details, join, local_model, model, models,
};
pub use request::{parse_chat, parse_completion};
