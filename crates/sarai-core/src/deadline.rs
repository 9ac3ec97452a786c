//! How long each phase of a request may take.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The deadlines of one model, one per phase.
///
/// A phase that takes longer fails with [`crate::Error::Deadline`] or moves the request on to the next
/// deployment; a stream that keeps sending is never cut by the length of the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deadlines {
    /// To open a connection to a remote host.
    pub connect: Duration,
    /// To wait for a slot of a model that is busy.
    pub queue: Duration,
    /// To load a local model.
    pub load: Duration,
    /// From the start of the work to the first token; on a remote this includes its own queue and load.
    pub first_token: Duration,
    /// Between two tokens of a running answer.
    pub gap: Duration,
    /// For all attempts together, until a stream begins or a whole answer is there; `None` is without an end of its own.
    pub request: Option<Duration>,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(2),
            queue: Duration::from_secs(300),
            load: Duration::from_secs(300),
            first_token: Duration::from_secs(300),
            gap: Duration::from_secs(60),
            request: None,
        }
    }
}
