//! What is known of remote deployments: whether they answer, how fast, how far away, and how much they have to do.

mod breaker;
mod commands;
mod going_on;
mod host;
mod looks;
mod pace;
mod probe;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use sarai_core::{Deadlines, Error, Lane, MediaKind, Phase, RemoteCause};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};

pub use breaker::State;
pub use host::{Look, Place, is_same};
pub use pace::{Expected, Gaps, Pace, Sample};

use crate::backend::remote::{self, Hosts};
use crate::catalog::Catalog;
use crate::config::Remote;
use crate::lanes::Places;
use crate::state::State as Learned;
use breaker::Breaker;
use commands::Commands;
use host::Host;

/// Opened breakers that wait to be told of.
const WAITING: usize = 64;
/// How long a look at a host may take that a request waits for.
const LOOK_NOW: Duration = Duration::from_millis(400);

/// Names a deployment: the host and its model.
type Key = (String, String);

struct Entry {
    /// As it is configured now: a prober that began before uses it too.
    remote: Remote,
    deadlines: Deadlines,
    breaker: Breaker,
    /// Probes it while it is open.
    prober: Option<AbortHandle>,
    /// Has it load its model.
    loader: Option<AbortHandle>,
    /// Counts probers and successes: a prober that finds another number has been overtaken.
    turn: u64,
    pace: Pace,
}

/// What is known of one deployment.
#[derive(Clone, Debug)]
pub struct Known {
    /// Its breaker.
    pub state: State,
    /// Why it was opened.
    pub last: Option<Error>,
    /// Requests that its host answers for us now.
    pub outstanding: usize,
    /// What it usually does.
    pub pace: Pace,
    /// Whether its model is loaded there, if that is known.
    pub is_loaded: Option<bool>,
    /// Whether it is new in the list of what is loaded, and has not answered yet: it may be loading.
    pub may_load: bool,
    /// The shortest round trip to its host that was seen lately.
    pub round_trip: Option<Duration>,
    /// Whether that is beyond the local network.
    pub is_far: bool,
}

impl Known {
    /// Whether a request would wait for its model to be loaded there, as far as that is known.
    pub fn loads(&self) -> bool {
        self.is_loaded == Some(false) || self.may_load
    }
}

/// All remote deployments.
#[derive(Clone)]
pub struct Health {
    table: Table,
    /// Those of this machine.
    pub commands: Commands,
    /// Ends the probers with the last handle.
    _probers: Arc<EndProbers>,
}

#[derive(Default)]
struct Entries {
    deployments: HashMap<Key, Entry>,
    /// By URL.
    hosts: HashMap<String, Host>,
    /// Of deployments that the configuration does not have any more, and that were left alone: if they come back, they still are.
    left: HashMap<Key, Breaker>,
    /// What models can do on hosts, and when that was asked.
    capabilities: HashMap<Key, (Vec<String>, Instant)>,
    /// Whether they go on with raw prompts.
    going_on: HashMap<Key, going_on::Proven>,
}

/// What is known, and how to find out more. The lock is held for look-ups only.
#[derive(Clone)]
struct Table {
    hosts: Hosts,
    entries: Arc<Mutex<Entries>>,
    learned: Arc<Learned>,
    /// Hears of each breaker that opens.
    opened: mpsc::Sender<Remote>,
    /// Counts up when a breaker opens or closes: whoever waits for a place thinks again.
    changed: watch::Sender<u64>,
    /// Counts looks that have ended.
    looks: watch::Sender<u64>,
}

/// A deployment that comes back after this is asked like a new one.
const LEFT_LAST: Duration = Duration::from_secs(600);
/// For so long it counts what a model can do on a host.
const CAPABILITIES_LAST: Duration = Duration::from_secs(300);

impl std::fmt::Debug for Health {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Health").field("hosts", &self.table.lock().hosts.len()).finish_non_exhaustive()
    }
}

struct EndProbers(Table);

impl Drop for EndProbers {
    fn drop(&mut self) {
        let mut entries = self.0.lock();
        let tasks = entries.deployments.values_mut().flat_map(|entry| [entry.prober.take(), entry.loader.take()]);
        tasks.flatten().for_each(|task| task.abort());
    }
}

fn key(remote: &Remote) -> Key {
    (remote.url.clone(), remote.model_name.clone())
}

/// Under which what was learned of a deployment is kept.
fn state_key(remote: &Remote) -> String {
    format!("host {} {}", remote.url, remote.model_name)
}

impl Health {
    /// Of every remote deployment in the catalog, with what was learned of it; and who hears of each breaker that
    /// opens.
    pub fn new(catalog: &Catalog, hosts: Hosts, learned: Arc<Learned>) -> (Self, mpsc::Receiver<Remote>) {
        let (opened, hears) = mpsc::channel(WAITING);
        let (changed, _) = watch::channel(0);
        let (looks, _) = watch::channel(0);
        let table = Table { hosts, entries: Arc::default(), learned, opened, changed, looks };
        let health = Self { _probers: Arc::new(EndProbers(table.clone())), table, commands: Commands::default() };
        health.reconfigure(catalog);
        (health, hears)
    }

    /// Takes another catalog's deployments for those there are; what is known of the ones in both is kept.
    pub fn reconfigure(&self, catalog: &Catalog) {
        let mut entries = self.table.lock();
        let mut old = std::mem::take(&mut *entries);
        let mut most: HashMap<String, Option<usize>> = HashMap::new();
        for (model, remote) in catalog.remotes() {
            let entry = old.deployments.remove(&key(remote)).unwrap_or_else(|| Entry {
                remote: remote.clone(),
                deadlines: model.deadlines,
                breaker: old.left.remove(&key(remote)).unwrap_or_default(),
                prober: None,
                loader: None,
                turn: 0,
                pace: self.table.learned.get(&state_key(remote)).pace,
            });
            let entry = Entry { remote: remote.clone(), deadlines: model.deadlines, ..entry };
            entries.deployments.entry(key(remote)).or_insert(entry);
            let most = most.entry(remote.url.clone()).or_insert(Some(0));
            *most = most.zip(remote.max_outstanding).map(|(a, b)| a.max(b));
        }
        for (url, most) in most {
            let host = old.hosts.remove(&url).unwrap_or_else(|| Host::new(most));
            host.limit(most);
            entries.hosts.insert(url, host);
        }
        // One that comes back meanwhile has the places that are taken now.
        entries.hosts.extend(old.hosts.into_iter().filter(|(_, host)| host.outstanding() > 0));
        entries.capabilities = old.capabilities;
        entries.going_on = old.going_on;
        entries.left = old.left;
        let now = Instant::now();
        for (key, entry) in &mut old.deployments {
            entry.breaker.interrupted(now);
            entries.left.insert(key.clone(), entry.breaker.clone());
        }
        entries.left.retain(|_, breaker| matches!(breaker.state(), State::Open { until } if now < until + LEFT_LAST));
        for entry in entries.deployments.values_mut() {
            self.table.probe_if_open(entry);
        }
        drop(entries);
        let tasks = old.deployments.into_values().flat_map(|entry| [entry.prober, entry.loader]);
        tasks.flatten().for_each(|task| task.abort());
        self.table.tell();
        catalog.remotes().for_each(|(_, remote)| self.table.look_if_due(remote));
    }

    /// Asks hosts what their models can do, where that is not known, or has not been asked for long: Ollama answers blind what a model
    /// cannot sense.
    pub async fn read_capabilities(&self, remotes: &[&Remote], connect: Duration) {
        let is_unknown = |remote: &&&Remote| {
            if self.is_open(remote) {
                return false;
            }
            let entries = self.table.lock();
            let known = entries.capabilities.get(&key(remote));
            known.is_none_or(|(_, since)| since.elapsed() > CAPABILITIES_LAST)
        };
        let asked: Vec<_> = remotes.iter().filter(is_unknown).collect();
        join_all(asked.into_iter().map(|remote| async move {
            if let Some(capabilities) = self.table.hosts.capabilities(remote, connect).await {
                self.table.lock().capabilities.insert(key(remote), (capabilities, Instant::now()));
            }
        }))
        .await;
    }

    /// Whether a host's model lacks a sense, as the host says itself.
    pub fn lacks(&self, remote: &Remote, kind: MediaKind) -> bool {
        let entries = self.table.lock();
        let known = entries.capabilities.get(&key(remote));
        known.is_some_and(|(can, _)| !can.iter().any(|capability| capability == kind.capability()))
    }

    /// What is known of a deployment.
    pub fn of(&self, remote: &Remote) -> Known {
        self.table.of(remote)
    }

    /// Whether its breaker says to leave it alone.
    pub fn is_open(&self, remote: &Remote) -> bool {
        self.table.breaker(remote).state() != State::Closed
    }

    /// Hears when a breaker opens or closes, or the deployments change.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.table.changed.subscribe()
    }

    /// Takes a place at one of these hosts, the first that has one; in this order if several have. What is no host has no
    /// places, and none is waited for.
    ///
    /// # Cancel safety
    /// Whoever does not wait any more leaves all queues.
    pub async fn place(&self, remotes: &[&Remote], lane: Lane) -> (usize, Place) {
        let of = |remote: &Remote| self.table.lock().hosts.get(&remote.url).map(Host::places);
        // A host that the configuration does not have any more has no place to wait for.
        let places: Vec<_> =
            remotes.iter().enumerate().filter_map(|(index, remote)| Some((index, of(remote)?))).collect();
        if places.is_empty() {
            return (0, None);
        }
        let free = |(index, places): &(usize, Places)| Some((*index, Some(places.try_take(lane)?)));
        if let Some(found) = places.iter().find_map(free) {
            return found;
        }
        let waiting =
            places.into_iter().map(|(index, places)| Box::pin(async move { (index, places.take(lane).await.ok()) }));
        futures_util::future::select_all(waiting).await.0
    }

    /// What an answer of so many tokens to so long a prompt would meet at this deployment. Looks at its host in the
    /// background, if that was not done lately.
    pub fn expected(&self, remote: &Remote, prompt_tokens: u32, answer_tokens: u32) -> (Expected, Known) {
        self.table.look_if_due(remote);
        let known = self.of(remote);
        let is_resident = known.is_loaded == Some(true) && !known.may_load;
        (Expected { prompt_tokens, answer_tokens, held_tokens: 0, is_resident }, known)
    }

    /// Has a host load a model, aside, unless that is under way: who asked for it has an answer from elsewhere.
    pub fn load_aside(&self, remote: &Remote, deadlines: &Deadlines) {
        let mut entries = self.table.lock();
        let Some(entry) = entries.deployments.get_mut(&key(remote)) else { return };
        if entry.loader.as_ref().is_some_and(|loader| !loader.is_finished()) {
            return;
        }
        let (table, hosts) = (self.table.clone(), self.table.hosts.clone());
        let (remote, deadlines) = (remote.clone(), *deadlines);
        let loading = tokio::spawn(async move {
            let place =
                remote::Place { remote: &remote, context_tokens: remote.context_tokens, connect: deadlines.connect };
            let seconds = deadlines.load.as_secs();
            let late = || RemoteCause::Silent { phase: Phase::Load, seconds };
            let loaded = timeout(deadlines.load, hosts.load(&place, None)).await;
            let loaded = loaded.unwrap_or_else(|_| Err(Error::Remote { host: remote.url.clone(), cause: late() }));
            // What it says of the request is no fault of its own.
            let is_refused =
                |error: &Error| matches!(error, Error::Remote { cause: RemoteCause::Status { status: ..500, .. }, .. });
            if let Err(error) = loaded
                && !is_refused(&error)
            {
                table.failed(&remote, &error);
            }
        });
        entry.loader = Some(loading.abort_handle());
    }

    /// A stream came to its own end.
    pub fn succeeded(&self, remote: &Remote, sample: &Sample) {
        let mut entries = self.table.lock();
        if let Some(host) = entries.hosts.get_mut(&remote.url) {
            host.has(&remote.model_name, Instant::now());
        }
        let Some(entry) = entries.deployments.get_mut(&key(remote)) else { return };
        let was_open = entry.breaker.state() != State::Closed;
        entry.breaker.succeeded(Instant::now());
        entry.pace.saw(sample);
        self.table.learned.learn(&state_key(remote), |learned| learned.pace = entry.pace);
        if entry.breaker.state() == State::Closed {
            entry.turn += 1;
            if let Some(prober) = entry.prober.take() {
                prober.abort();
            }
        }
        if was_open && entry.breaker.state() == State::Closed {
            tracing::info!(deployment = ?remote, "answers again");
            self.table.tell();
        }
    }

    /// A host answered something that is no stream: it can be reached again.
    pub fn reached(&self, remote: &Remote) {
        let mut entries = self.table.lock();
        let Some(entry) = entries.deployments.get_mut(&key(remote)) else { return };
        let was_away = matches!(entry.breaker.last(), Some(Error::Remote { cause: RemoteCause::Unreachable(_), .. }));
        if entry.breaker.state() == State::Closed || !was_away {
            return;
        }
        entry.breaker.recovered();
        entry.turn += 1;
        if let Some(prober) = entry.prober.take() {
            prober.abort();
        }
        tracing::info!(deployment = ?remote, "can be reached again");
        self.table.tell();
    }

    /// A request failed; only what is the deployment's fault counts.
    pub fn failed(&self, remote: &Remote, error: &Error) {
        self.table.failed(remote, error);
    }

    /// Somebody else was faster. A host that writes a call may be at work, and one of which nothing is known yet may just be slow: if it
    /// is there, it is given longer the next time, and is not to blame before that was long.
    pub fn was_late(&self, remote: &Remote, expected: Expected, late: Duration, error: Error) {
        let may_be_slow = self.of(remote).pace.may_be_slow(expected, late);
        if expected.held_tokens == 0 && !may_be_slow {
            return self.failed(remote, &error);
        }
        let (table, remote) = (self.table.clone(), remote.clone());
        // It ends by itself, soon.
        tokio::spawn(async move {
            if timeout(LOOK_NOW, table.look(&remote)).await != Ok(true) {
                return table.failed(&remote, &error);
            }
            let mut entries = table.lock();
            let entry = entries.deployments.get_mut(&key(&remote));
            if let Some(entry) = entry.filter(|_| may_be_slow && !remote.managed_lb) {
                entry.pace.gave_up(late);
            }
        });
    }
}

impl Table {
    fn failed(&self, remote: &Remote, error: &Error) {
        let Error::Remote { cause, .. } = error else { return };
        if cause.is_of_the_request() {
            return;
        }
        let mut entries = self.lock();
        let Some(entry) = entries.deployments.get_mut(&key(remote)) else { return };
        match cause {
            RemoteCause::Silent { phase: Phase::Gap, seconds } => entry.pace.cut_for_gap(Duration::from_secs(*seconds)),
            // Of a cluster, another machine is asked the next time.
            RemoteCause::Late { .. } if remote.managed_lb => {}
            RemoteCause::Silent { seconds, .. } | RemoteCause::Late { seconds } => {
                entry.pace.gave_up(Duration::from_secs(*seconds));
            }
            _ => {}
        }
        self.learned.learn(&state_key(remote), |learned| learned.pace = entry.pace);
        if remote.managed_lb && !matches!(cause, RemoteCause::Unreachable(_)) {
            // One machine of the cluster, of which only its own balancer knows the others.
            return;
        }
        if entry.breaker.failed(error, Instant::now(), rand::random()) {
            tracing::warn!(deployment = ?remote, %error, "breaker opens");
            // Who is too busy to hear of it misses a convenience.
            let _ = self.opened.try_send(remote.clone());
            self.tell();
        }
        self.probe_if_open(entry);
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of(&self, remote: &Remote) -> Known {
        let (entries, now) = (self.lock(), Instant::now());
        let (entry, host) = (entries.deployments.get(&key(remote)), entries.hosts.get(&remote.url));
        Known {
            state: entry.map_or(State::Closed, |entry| entry.breaker.state()),
            last: entry.and_then(|entry| entry.breaker.last().cloned()),
            outstanding: host.map_or(0, Host::outstanding),
            pace: entry.map(|entry| entry.pace).unwrap_or_default(),
            is_loaded: host.and_then(|host| host.is_loaded(&remote.model_name, now)),
            may_load: host.is_some_and(|host| host.may_load(&remote.model_name, now)),
            round_trip: host.and_then(Host::round_trip),
            is_far: host.is_some_and(Host::is_far),
        }
    }

    fn tell(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    fn breaker(&self, remote: &Remote) -> Breaker {
        self.lock().deployments.get(&key(remote)).map(|entry| entry.breaker.clone()).unwrap_or_default()
    }
}
