//! What is known of remote deployments: whether they answer, how fast, and how much they have to do.

mod breaker;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use sarai_core::{Deadlines, Error, GenerateRequest, Message, Phase, Prompt, RemoteCause, Residence, Role, Sampling};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};

pub use breaker::State;

use crate::backend::remote::{Hosts, Place};
use crate::config::{Config, Deployment, Remote};
use crate::state::State as Learned;
use breaker::Breaker;

/// Gaps that must have been seen before their length is relied on.
const GAPS_TO_LEARN: u32 = 32;
/// A gap is too long at so many times the longest usual one, and not before the shortest limit.
const GAP_FACTOR: u32 = 12;
const SHORTEST_GAP_LIMIT: Duration = Duration::from_secs(4);
/// Opened breakers that wait to be told of.
const WAITING: usize = 64;

/// Names a deployment: the host and its model.
type Key = (String, String);

struct Entry {
    deadlines: Deadlines,
    breaker: Breaker,
    /// Probes it while it is open.
    prober: Option<AbortHandle>,
    /// Counts probers and successes: a prober that finds another number has been overtaken.
    turn: u64,
    gaps: Gaps,
}

/// How long the pauses between pieces of an answer usually are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gaps {
    seen: u32,
    /// The longest one; each further gap lets it fade by a hundredth.
    longest: Duration,
}

impl Gaps {
    fn remembered((seen, longest_ms): (u32, u64)) -> Self {
        Self { seen, longest: Duration::from_millis(longest_ms) }
    }

    fn to_remember(self) -> (u32, u64) {
        (self.seen, u64::try_from(self.longest.as_millis()).unwrap_or(u64::MAX))
    }

    /// Takes one more into account.
    pub fn saw(&mut self, gap: Duration) {
        self.seen = self.seen.saturating_add(1);
        self.longest = gap.max(self.longest.mul_f64(0.99));
    }

    /// Takes those of a whole stream into account.
    fn absorb(&mut self, other: Self) {
        let faded = self.longest.mul_f64(0.99_f64.powi(i32::try_from(other.seen.min(10_000)).unwrap_or(0)));
        *self = Self { seen: self.seen.saturating_add(other.seen), longest: faded.max(other.longest) };
    }

    /// How long a gap may be, within the configured limit.
    pub fn limit(&self, configured: Duration) -> Duration {
        if self.seen < GAPS_TO_LEARN {
            return configured;
        }
        (self.longest * GAP_FACTOR).max(SHORTEST_GAP_LIMIT).min(configured)
    }
}

/// What is known of one deployment.
#[derive(Clone, Debug)]
pub struct Known {
    /// Its breaker.
    pub state: State,
    /// Why it was opened.
    pub last: Option<Error>,
    /// Requests that it answers for us now.
    pub outstanding: usize,
}

/// All remote deployments.
#[derive(Clone)]
pub struct Health {
    table: Table,
    /// Places at each host, by its URL.
    places: Arc<HashMap<String, (usize, Arc<Semaphore>)>>,
    /// Ends the probers with the last handle.
    _probers: Arc<EndProbers>,
}

/// What is known, and how to find out more.
#[derive(Clone)]
struct Table {
    hosts: Hosts,
    entries: Arc<Mutex<HashMap<Key, Entry>>>,
    learned: Arc<Learned>,
    /// Hears of each breaker that opens.
    opened: mpsc::Sender<Remote>,
}

impl std::fmt::Debug for Health {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Health").field("hosts", &self.places.len()).finish_non_exhaustive()
    }
}

struct EndProbers(Table);

impl Drop for EndProbers {
    fn drop(&mut self) {
        let mut entries = self.0.lock();
        entries.values_mut().filter_map(|entry| entry.prober.take()).for_each(|prober| prober.abort());
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
    /// Of every remote deployment in the configuration, with what was learned of it; and who hears of each breaker that
    /// opens.
    pub fn new(config: &Config, hosts: Hosts, learned: Arc<Learned>) -> (Self, mpsc::Receiver<Remote>) {
        let (mut entries, mut places) = (HashMap::new(), HashMap::new());
        for model in &config.models {
            for deployment in &model.deployments {
                let Deployment::Remote(remote) = deployment else { continue };
                entries.entry(key(remote)).or_insert_with(|| Entry {
                    deadlines: model.deadlines,
                    breaker: Breaker::default(),
                    prober: None,
                    turn: 0,
                    gaps: Gaps::remembered(learned.get(&state_key(remote)).gaps),
                });
                let most = places.entry(remote.url.clone()).or_insert(0);
                *most = remote.max_outstanding.max(*most);
            }
        }
        let (opened, hears) = mpsc::channel(WAITING);
        let table = Table { hosts, entries: Arc::new(Mutex::new(entries)), learned, opened };
        let places = places.into_iter().map(|(url, most)| (url, (most, Arc::new(Semaphore::new(most))))).collect();
        (Self { _probers: Arc::new(EndProbers(table.clone())), table, places: Arc::new(places) }, hears)
    }

    /// What is known of a deployment.
    pub fn of(&self, remote: &Remote) -> Known {
        let breaker = self.table.breaker(remote);
        let outstanding = self.places.get(&remote.url).map_or(0, |(most, free)| most - free.available_permits());
        Known { state: breaker.state(), last: breaker.last().cloned(), outstanding }
    }

    /// Whether its breaker says to leave it alone.
    pub fn is_open(&self, remote: &Remote) -> bool {
        self.table.lock().get(&key(remote)).is_some_and(|entry| entry.breaker.state() != State::Closed)
    }

    /// Takes a place at one of these hosts, the first that has one; in this order if several have. What is no host has no
    /// places, and none is waited for.
    ///
    /// # Cancel safety
    /// Whoever does not wait any more leaves all queues.
    pub async fn place(&self, remotes: &[&Remote]) -> (usize, Option<OwnedSemaphorePermit>) {
        let places = |remote: &&Remote| self.places.get(&remote.url).map(|(_, free)| Arc::clone(free));
        let Some(places) = remotes.iter().map(places).collect::<Option<Vec<_>>>().filter(|places| !places.is_empty())
        else {
            return (0, None);
        };
        if let Some(free) = places.iter().enumerate().find_map(|(n, place)| {
            let permit = Arc::clone(place).try_acquire_owned().ok()?;
            Some((n, Some(permit)))
        }) {
            return free;
        }
        let waiting = places.into_iter().map(|place| Box::pin(place.acquire_owned()));
        let (permit, index, _) = futures_util::future::select_all(waiting).await;
        (index, permit.ok())
    }

    /// How long a gap in this deployment's streams may be.
    pub fn gap_limit(&self, remote: &Remote, configured: Duration) -> Duration {
        self.table.lock().get(&key(remote)).map_or(configured, |entry| entry.gaps.limit(configured))
    }

    /// A stream came to its own end, with these gaps.
    pub fn succeeded(&self, remote: &Remote, gaps: Gaps) {
        let mut entries = self.table.lock();
        let Some(entry) = entries.get_mut(&key(remote)) else { return };
        if entry.breaker.state() != State::Closed {
            tracing::info!(deployment = ?remote, "answers again");
        }
        entry.breaker.succeeded();
        entry.turn += 1;
        entry.gaps.absorb(gaps);
        self.table.learned.learn(&state_key(remote), |learned| learned.gaps = entry.gaps.to_remember());
        if let Some(prober) = entry.prober.take() {
            prober.abort();
        }
    }

    /// A request failed; only what is the deployment's fault counts.
    pub fn failed(&self, remote: &Remote, error: &Error) {
        if !matches!(error, Error::Remote { .. }) {
            return;
        }
        let mut entries = self.table.lock();
        let Some(entry) = entries.get_mut(&key(remote)) else { return };
        if let Error::Remote { cause: RemoteCause::Silent { phase: Phase::Gap, seconds }, .. } = error {
            // The limit may have been learned too short: what was cut for it counts as a gap of this length.
            entry.gaps.saw(Duration::from_secs(*seconds));
            self.table.learned.learn(&state_key(remote), |learned| learned.gaps = entry.gaps.to_remember());
        }
        if entry.breaker.failed(error, Instant::now(), rand::random()) {
            tracing::warn!(deployment = ?remote, %error, "breaker opens");
            // Who is too busy to hear of it misses a convenience.
            let _ = self.table.opened.try_send(remote.clone());
        }
        if entry.breaker.state() != State::Closed && entry.prober.as_ref().is_none_or(AbortHandle::is_finished) {
            entry.turn += 1;
            let prober = tokio::spawn(self.table.clone().probe_until_closed(remote.clone(), entry.turn));
            entry.prober = Some(prober.abort_handle());
        }
    }
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn breaker(&self, remote: &Remote) -> Breaker {
        self.lock().get(&key(remote)).map(|entry| entry.breaker.clone()).unwrap_or_default()
    }

    /// Recovers without traffic: after each rest, one real token is asked for.
    async fn probe_until_closed(self, remote: Remote, turn: u64) {
        loop {
            let State::Open { until } = self.breaker(&remote).state() else { return };
            tokio::time::sleep_until(until).await;
            if matches!(self.breaker(&remote).state(), State::Open { until } if until > Instant::now()) {
                // The host has asked for more time.
                continue;
            }
            let Some(deadlines) = self.begin_probe(&remote, turn) else { return };
            let outcome = self.probe(&remote, &deadlines).await;
            let mut entries = self.lock();
            let Some(entry) = entries.get_mut(&key(&remote)).filter(|entry| entry.turn == turn) else { return };
            match outcome {
                Ok(()) => {
                    tracing::info!(deployment = ?remote, "answers again: breaker closes");
                    entry.breaker.recovered();
                    entry.prober = None;
                    return;
                }
                Err(error) => {
                    tracing::debug!(deployment = ?remote, %error, "probe failed");
                    entry.breaker.failed(&error, Instant::now(), rand::random());
                }
            }
        }
    }

    fn begin_probe(&self, remote: &Remote, turn: u64) -> Option<Deadlines> {
        let mut entries = self.lock();
        let entry = entries.get_mut(&key(remote)).filter(|entry| entry.turn == turn)?;
        entry.breaker.probing();
        Some(entry.deadlines)
    }

    /// Asks for one token: a list of models that is there proves nothing.
    async fn probe(&self, remote: &Remote, deadlines: &Deadlines) -> Result<(), Error> {
        let place = Place { remote, context_tokens: remote.context_tokens, connect: deadlines.connect };
        let hello = Message { role: Role::User, content: "Hi".into() };
        let request = GenerateRequest {
            prompt: Prompt::Chat(vec![hello]),
            sampling: Sampling { temperature: Some(0.0), ..Sampling::default() },
            stop: Vec::new(),
            max_tokens: Some(1),
            format: sarai_core::Format::Text,
            residence: Residence::default(),
            given: String::new(),
        };
        let silent = || Error::Remote {
            host: remote.url.clone(),
            cause: RemoteCause::Silent { phase: Phase::FirstToken, seconds: deadlines.first_token.as_secs() },
        };
        let asked = async {
            let mut events = self.hosts.open(&place, &request).await?;
            while let Some(event) = events.next().await {
                event?;
            }
            Ok(())
        };
        match timeout(deadlines.first_token, asked).await.unwrap_or_else(|_| Err(silent())) {
            // It does not like this request, but it answers.
            Err(Error::InvalidRequest { .. }) => Ok(()),
            outcome => outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_a_gap_is_learned_and_never_beyond_the_configured_one() {
        let (ms, configured) = (Duration::from_millis, Duration::from_secs(60));
        let mut gaps = Gaps::default();
        assert_eq!(gaps.limit(configured), configured, "nothing is known yet");
        for _ in 0..40 {
            gaps.saw(ms(50));
        }
        assert_eq!(gaps.limit(configured), SHORTEST_GAP_LIMIT, "a host may pause for other clients");
        gaps.saw(ms(2_000));
        assert_eq!(gaps.limit(configured), ms(24_000));
        gaps.saw(ms(9_000));
        assert_eq!(gaps.limit(configured), configured);
        for _ in 0..500 {
            gaps.saw(ms(50));
        }
        assert_eq!(gaps.limit(configured), SHORTEST_GAP_LIMIT, "and forgotten");
    }
}
