//! Memory decisions: from a GGUF header to bytes, and from events to loads, refusals and evictions.
//!
//! Pure: it reads what it is handed, spawns nothing and knows no clock. `sarai-server` reads the files,
//! measures the processes and carries out the effects.

pub mod draft;
pub mod estimate;
pub mod gguf;
pub mod layers;
pub mod ledger;
pub mod projector;
mod scratch;
pub mod system;
mod weights;

pub use estimate::{Companions, Plan, Repack, Settings, largest_context};
pub use gguf::{GgufError, Header};
pub use ledger::{Effect, EngineId, Ledger, Measured, Observation, PoolEvent, Size, Strategy, Ticket, Want};
