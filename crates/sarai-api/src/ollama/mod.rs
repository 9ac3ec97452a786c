//! Ollama's `/api`: as a server towards clients, and as a client towards Ollama hosts.

mod answer;
pub mod keep_alive;
mod remote;
mod request;

pub use answer::{
    Abilities, End, Kind, LineWriter, ModelFacts, error_body, list_entry, parameters, process_entry, show,
};
pub use remote::{chat_request, ignored_by_ollama, parse_line};
pub use request::{OllamaRequest, parse_chat, parse_generate, parse_model_name};
