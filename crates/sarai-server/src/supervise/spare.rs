//! Who the kernel takes when memory runs out: a worker, and never the server.
//!
//! A worker that is killed may hold its memory for a moment longer, in which the kernel looks for the next process of
//! the control group. If the server may not be exempted, a spare process that does nothing stands between.

use std::path::PathBuf;
use std::time::Duration;

use sarai_core::Bytes;
use tokio::task::JoinHandle;

use super::child::{self, ENVIRONMENT};

/// What a spare process holds of its own; measured: 1.2 MiB.
pub const TAKES: Bytes = Bytes::mib(2);
/// Between the death of a spare and the next one: time for the kernel to take back what it killed.
const REST: Duration = Duration::from_secs(1);

/// Exempts this process, or else keeps a spare one for as long as the task is not aborted.
///
/// Exempting needs `CAP_SYS_RESOURCE`.
pub fn spare_the_server(executable: PathBuf) -> Option<JoinHandle<()>> {
    std::fs::write("/proc/self/oom_score_adj", "-1000").err().map(|_| tokio::spawn(keep_one(executable)))
}

async fn keep_one(executable: PathBuf) {
    loop {
        match child::launch(&executable, ["spare", "for the kernel"], ENVIRONMENT) {
            // It ends when our end of its socket does, or killed.
            Ok(mut spare) => match spare.child.wait().await {
                Ok(status) => tracing::warn!(%status, "the kernel took the spare process instead of the server"),
                Err(error) => return tracing::warn!(%error, "the spare process cannot be watched"),
            },
            Err(error) => tracing::debug!(%error, "no spare process"),
        }
        tokio::time::sleep(REST).await;
    }
}
