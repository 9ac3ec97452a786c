//! The whole server: started from a configuration, ended by a signal.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use sarai_core::{Error, Phase, Residence};
use thiserror::Error as ThisError;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::admission::Admission;
use crate::backend::remote::Hosts;
use crate::catalog::{Catalog, Catalogs};
use crate::config::Config;
use crate::dispatch::{Dispatch, warm_fallbacks};
use crate::fetch::Fetcher;
use crate::gateway::Gateway;
use crate::health::Health;
use crate::http::connections::Stop;
use crate::http::{App, Shared, connections, door};
use crate::planner::Planner;
use crate::pool::{Parts, Pool};
use crate::reload::{Live, Names, keep_current};
use crate::state::State;
use crate::supervise::child::park_grace;
use crate::supervise::spare::spare_the_server;
use crate::supervise::validate::Validator;

/// Bodies of the largest size that may come at the same time.
const MOST_BODIES: usize = 8;
/// How long the workers together may take to end, beyond what parking may take; those that still live are killed with their handles.
const END_WORKERS: Duration = Duration::from_secs(8);

/// Why the server cannot start.
#[derive(Debug, ThisError)]
pub enum ServerError {
    /// The address is taken or not ours.
    #[error("cannot listen on {address} ({source}): stop what listens there, or change server.listen")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// The HTTP client for remotes cannot be made.
    #[error("the HTTP client cannot be set up ({0})")]
    Client(#[from] reqwest::Error),
    /// The drill's model is not in the configuration.
    #[error("no model is called `{0}`: name one of the configuration")]
    NoModel(String),
    /// Serving ended by itself.
    #[error("serving failed ({0})")]
    Serve(std::io::Error),
}

/// A server that listens.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    gateway: Gateway,
    pool: (Pool, JoinHandle<()>),
    config: Config,
    /// Keeps a process that the kernel may take in our place; ends with the server.
    spare: Option<JoinHandle<()>>,
    /// Loads fallbacks of hosts that are away; ends with the server.
    warming: JoinHandle<()>,
    /// Reads the configuration again; ends with the server.
    reloading: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens, and starts the pool. `executable` is the binary that is run as a worker; `file` is what the configuration was
    /// read from, if it is to be read again.
    ///
    /// # Errors
    /// The address cannot be listened on. Missing files and hosts are no errors.
    pub async fn start(config: Config, executable: PathBuf, file: Option<PathBuf>) -> Result<Self, ServerError> {
        let mut names = Names::default();
        names.look_up(&config).await;
        let as_written = config;
        let config = names.in_place(&as_written);
        let spare = spare_the_server(executable.clone());
        let address = config.server.listen;
        let listener = TcpListener::bind(address).await.map_err(|source| ServerError::Listen { address, source })?;
        // An error means that a provider is installed already, which is as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let hosts = Hosts::new(config.models.iter().map(|model| model.deadlines.connect))?;
        let (sender, catalogs) = Catalogs::new(Catalog::new(&config));
        let catalog = catalogs.now();
        let state = Arc::new(State::open(&config.server.state_dir));
        tokio::task::spawn_blocking({
            let config = config.clone();
            move || forget_others(&config)
        });
        let planner = Planner::new(Arc::clone(&state));
        let pool = Pool::start(Parts {
            catalog: Arc::clone(&catalog),
            planner: planner.clone(),
            memory: config.memory,
            executable: executable.clone(),
        });
        let limits = &config.server;
        let (health, opened) = Health::new(&catalog, hosts.clone(), state);
        let validator = Validator::new(executable, pool.0.clone());
        let dispatch = Dispatch { catalogs: catalogs.clone(), planner, pool: pool.0.clone(), hosts, health, validator };
        let warming = tokio::spawn(warm_fallbacks(dispatch.clone(), opened));
        let live = Live { sender, catalogs: catalogs.clone(), dispatch: dispatch.clone() };
        let reloading = file.map(|file| tokio::spawn(keep_current(file, as_written, names, live)));
        let gateway = Gateway {
            dispatch,
            catalogs,
            fetcher: Fetcher::new(config.media.clone())?,
            admission: Arc::new(Admission::new(limits.max_in_flight, limits.max_queued, limits.queue)),
        };
        Ok(Self { listener, gateway, pool, config, spare, warming, reloading })
    }

    /// The address it listens on.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop` completes; then drains running answers up to their deadline and ends every worker.
    pub async fn serve(self, stop: impl Future<Output = ()> + Send + 'static) {
        // What serves is compiled in this crate, and not anew for each who stops it in another way.
        self.serve_until(Box::pin(stop)).await;
    }

    async fn serve_until(self, stop: Stop) {
        let app = App::new(Shared {
            gateway: self.gateway.clone(),
            max_body_bytes: self.config.server.max_body_bytes,
            bodies: Arc::new(Semaphore::new(MOST_BODIES * (self.config.server.max_body_bytes >> 10))),
            stall: self.config.server.stall,
            heartbeat: self.config.server.heartbeat,
            started: std::time::SystemTime::now(),
        });
        let resident = tokio::spawn(load_residents(self.gateway.clone(), self.config.clone()));
        let drain = self.config.server.drain;
        let (stopping, mut stopped) = tokio::sync::watch::channel(false);
        let signal = async move {
            stop.await;
            let _ = stopping.send(true);
        };
        tokio::select! {
            () = connections::serve(self.listener, door(app, &self.config.server.access), Box::pin(signal)) => {}
            () = async { let _ = stopped.wait_for(|&stopped| stopped).await; tokio::time::sleep(drain).await } => {
                tracing::warn!(seconds = drain.as_secs(), "answers that still ran were cut (server.drain_seconds)");
            }
        }
        resident.abort();
        self.warming.abort();
        self.reloading.inspect(JoinHandle::abort);
        self.spare.inspect(JoinHandle::abort);
        let (pool, owner) = self.pool;
        let parks = self.gateway.catalog();
        let parks = parks.engines.iter().filter_map(|engine| Some(park_grace(engine.park.as_ref()?.most_bytes)));
        let within = parks.max().unwrap_or_default() + END_WORKERS;
        let _ = tokio::time::timeout(within, pool.stop()).await;
        let _ = tokio::time::timeout(Duration::from_secs(1), owner).await;
        self.gateway.dispatch.planner.flush();
    }
}

/// For so long another configuration may come back, or another server with the same folder.
const FORGOTTEN_AFTER: Duration = Duration::from_hours(24);

/// Removes what is parked of models that the configuration has not had for long, or not so: it holds what was said to them.
fn forget_others(config: &Config) {
    let kept: Vec<_> = config.engines.iter().filter_map(|engine| Some(&engine.park.as_ref()?.folder)).collect();
    let folders = std::fs::read_dir(config.server.state_dir.join("park")).into_iter().flatten().flatten();
    let is_old = |path: &PathBuf| {
        let changed = path.metadata().and_then(|meta| meta.modified());
        changed.is_ok_and(|changed| changed.elapsed().is_ok_and(|age| age > FORGOTTEN_AFTER))
    };
    for folder in folders.map(|entry| entry.path()).filter(|path| !kept.contains(&path) && is_old(path)) {
        tracing::info!(folder = %folder.display(), "conversations of a model that is not configured any more are removed");
        let _ = std::fs::remove_dir_all(folder);
    }
}

/// Loads what is configured as resident, at the same time; what cannot be loaded is a state, not an end.
async fn load_residents(gateway: Gateway, config: Config) {
    let resident = config.engines.iter().enumerate().filter(|(_, engine)| engine.resident);
    join_all(resident.map(|(index, engine)| {
        let gateway = &gateway;
        async move {
            let id = sarai_plan::EngineId(index);
            let usual = engine.settings.context_tokens;
            let loaded = match gateway.dispatch.want(id, usual, Residence::default()).await {
                Ok(want) => {
                    let loaded = tokio::time::timeout(engine.load_deadline, gateway.dispatch.pool.acquire(id, want));
                    let seconds = engine.load_deadline.as_secs();
                    let late = || Error::Deadline { model: engine.label.clone(), phase: Phase::Load, seconds };
                    loaded.await.map_err(|_| late()).flatten().map(drop)
                }
                Err(error) => Err(error),
            };
            if let Err(error) = loaded {
                tracing::warn!(model = engine.label, %error, "a resident model is not loaded");
            }
        }
    }))
    .await;
}
