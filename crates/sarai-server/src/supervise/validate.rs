//! A validator in a process of its own: what a client's schema does to it ends nothing else.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, setrlimit};
use sarai_api::validate::{Claim, Verdict, verdict};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::child::{self, ENVIRONMENT};
use crate::pool::{Borrower, Pool};

/// How long it may take, with its start and with those before it.
const DEADLINE: Duration = Duration::from_secs(5);
/// Processor time that it may take, in seconds.
const BUSY_SECONDS: u64 = 2;
/// What it says at most, in bytes.
const SAID_BYTES: u64 = 1 << 20;

/// Has claims checked.
#[derive(Clone, Debug)]
pub struct Validator(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    executable: PathBuf,
    /// Lends what it takes.
    pool: Pool,
    /// One at a time.
    turn: Semaphore,
}

impl Validator {
    /// One that runs this binary, in memory that the pool lends.
    pub fn new(executable: PathBuf, pool: Pool) -> Self {
        Self(Arc::new(Inner { executable, pool, turn: Semaphore::new(1) }))
    }

    /// What is true of each claim; nothing where that did not come out within the limits.
    pub async fn verdicts(&self, claims: &[Claim]) -> Option<Vec<Verdict>> {
        match timeout(DEADLINE, self.ask(claims)).await {
            Ok(Ok(verdicts)) => Some(verdicts),
            Ok(Err(error)) => {
                tracing::warn!(%error, "a schema could not be checked");
                None
            }
            Err(_) => {
                tracing::warn!("a schema was not checked within {} s", DEADLINE.as_secs());
                None
            }
        }
    }

    async fn ask(&self, claims: &[Claim]) -> std::io::Result<Vec<Verdict>> {
        let _turn = self.0.turn.acquire().await.map_err(std::io::Error::other)?;
        let loan =
            self.0.pool.lend(Borrower::Validator).await.ok_or_else(|| std::io::Error::other("the server stops"))?;
        // Dropped, it is killed.
        let mut launched = child::launch(&self.0.executable, ["validate", "an answer"], ENVIRONMENT)?;
        launched.writer.write_all(&loan.bytes.0.to_le_bytes()).await?;
        launched.writer.write_all(&serde_json::to_vec(claims)?).await?;
        launched.writer.shutdown().await?;
        let mut said = Vec::new();
        launched.reader.take(SAID_BYTES).read_to_end(&mut said).await?;
        let status = launched.child.wait().await?;
        serde_json::from_slice(&said).map_err(|_| std::io::Error::other(format!("the validator ended with {status}")))
    }
}

/// The process: reads what memory of its own it may take, and claims, from the socket that is its standard input, and answers there.
///
/// # Errors
/// The socket cannot be read or written.
pub fn run(mut socket: UnixStream) -> std::io::Result<()> {
    let limit = |resource, most| setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) });
    let mut most_bytes = [0; 8];
    socket.read_exact(&mut most_bytes)?;
    limit(Resource::Data, u64::from_le_bytes(most_bytes))?;
    limit(Resource::Cpu, BUSY_SECONDS)?;
    limit(Resource::Core, 0)?;
    // Where memory is short, it goes before anything else does.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    let mut asked = Vec::new();
    socket.read_to_end(&mut asked)?;
    let claims: Vec<Claim> = serde_json::from_slice(&asked)?;
    let verdicts: Vec<Verdict> = claims.iter().map(verdict).collect();
    socket.write_all(&serde_json::to_vec(&verdicts)?)
}
