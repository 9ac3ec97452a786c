//! The pool: one task that owns the ledger and the workers (`owner`).
//!
//! Everybody else holds a [`Pool`], which sends messages, and leases, which are guards.

mod lease;
mod loan;
mod observe;
mod owner;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sarai_core::{Bytes, EngineMemory, Error, Lane};
use sarai_plan::ledger::{DECISIONS_MADE, Decision, Limits, Row};
use sarai_plan::{Effect, EngineId, Ticket, Want};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::catalog::Catalog;
use crate::config::MemoryConfig;
use crate::machine::pressure::Reading;
use crate::planner::Planner;
use crate::supervise::child::{Report, Worker};

pub use lease::{Busy, Lease};
pub use loan::{Borrower, Loan};

/// What everybody else knows of the pool.
#[derive(Clone, Debug)]
pub struct Pool {
    // Unbounded in type, bounded in fact: a request has at most three messages under way, and requests are
    // bounded by admission. A guard that is dropped must be able to send without waiting.
    messages: mpsc::UnboundedSender<Message>,
    tickets: Arc<AtomicU64>,
}

type Reply = oneshot::Sender<Result<(Worker, Busy), Error>>;

#[derive(Debug)]
enum Message {
    Wanted(EngineId, Ticket, Box<Want>, Reply),
    Abandoned(Ticket),
    Released(EngineId, Lane),
    Lend(Borrower, oneshot::Sender<Loan>),
    GivenBack(Borrower),
    Report(EngineId, Report),
    Observed(Box<observe::Seen>),
    Probed(EngineId, Result<EngineMemory, String>),
    Unload(EngineId),
    Reconfigure(Arc<Catalog>, MemoryConfig),
    Snapshot(oneshot::Sender<Snapshot>),
    WhatIf(EngineId, Box<Want>, oneshot::Sender<WhatIf>),
    Stop(oneshot::Sender<()>),
}

/// The pool at one moment.
#[derive(Debug)]
pub struct Snapshot {
    /// The ledger, row by row.
    pub rows: Vec<Row>,
    /// All claims, the server's included.
    pub claimed: Bytes,
    /// What the server itself holds.
    pub server: Bytes,
    /// The limits.
    pub limits: Limits,
    /// The last decisions, newest first.
    pub decisions: Vec<Decision>,
    /// How often each of `sarai_plan::ledger::DECISIONS_MADE` was made.
    pub counts: [u64; DECISIONS_MADE.len()],
    /// Workers that the kernel killed for want of memory.
    pub oom_kills: u64,
    /// What the kernel says.
    pub pressure: Reading,
    /// Whether that is too little.
    pub is_pressed: bool,
    /// Now, on the ledger's clock.
    pub now: u64,
    /// Workers whose model is loaded.
    pub workers: HashMap<EngineId, Worker>,
    /// How far loads have come that are under way, in parts of a hundred.
    pub loading: HashMap<EngineId, u8>,
    /// Why the last worker of an engine ended, if it was not asked to.
    pub failures: HashMap<EngineId, String>,
}

/// What a request would lead to.
#[derive(Debug)]
pub struct WhatIf {
    /// Effects, in order, until it is granted, refused or has to wait.
    pub effects: Vec<Effect>,
    /// What they are for.
    pub decisions: Vec<Decision>,
    /// Whether it would be granted.
    pub is_granted: bool,
    /// What would be free then.
    pub free: Bytes,
}

/// What the pool works with.
#[derive(Debug)]
pub struct Parts {
    /// Engines and their files.
    pub catalog: Arc<Catalog>,
    /// Plans of them.
    pub planner: Planner,
    /// Limits.
    pub memory: MemoryConfig,
    /// The binary that is run as a worker.
    pub executable: PathBuf,
}

impl Pool {
    /// Starts the owner task.
    pub fn start(parts: Parts) -> (Self, JoinHandle<()>) {
        let (messages, inbox) = mpsc::unbounded_channel();
        let pool = Self { messages, tickets: Arc::default() };
        let owner = owner::Owner::new(parts, pool.clone());
        (pool, tokio::spawn(owner.run(inbox)))
    }

    /// Asks for a worker; waits for its load if need be.
    ///
    /// # Errors
    /// The load was refused or failed.
    ///
    /// # Cancel safety
    /// Whoever does not wait any more leaves the queue; a worker that is granted to nobody is given back by its guard.
    pub async fn acquire(&self, engine: EngineId, want: Want) -> Result<(Worker, Busy), Error> {
        let (reply, answer) = oneshot::channel();
        let ticket = Ticket(self.tickets.fetch_add(1, Ordering::Relaxed));
        let _waiting = lease::Waiting { ticket, pool: self.clone() };
        self.send(Message::Wanted(engine, ticket, Box::new(want), reply));
        answer.await.unwrap_or(Err(Error::ShuttingDown))
    }

    /// Unloads an engine, once it is idle.
    pub fn unload(&self, engine: EngineId) {
        self.send(Message::Unload(engine));
    }

    /// Takes a catalog that succeeds the one there is, and other limits. Engines that are to be loaded otherwise are unloaded once
    /// they are idle.
    pub fn reconfigure(&self, catalog: Arc<Catalog>, memory: MemoryConfig) {
        self.send(Message::Reconfigure(catalog, memory));
    }

    /// The pool as it stands.
    pub async fn snapshot(&self) -> Option<Snapshot> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Snapshot(reply));
        answer.await.ok()
    }

    /// What a request would lead to, without doing it.
    pub async fn what_if(&self, engine: EngineId, want: Want) -> Option<WhatIf> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::WhatIf(engine, Box::new(want), reply));
        answer.await.ok()
    }

    /// Ends every worker; returns when none is left.
    pub async fn stop(&self) {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Stop(reply));
        let _ = answer.await;
    }

    fn send(&self, message: Message) {
        // The owner lives as long as the server; after it, there is nobody to tell.
        let _ = self.messages.send(message);
    }
}
