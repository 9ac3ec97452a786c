//! What is known of one host, whatever its models: places at it, how far away it is, and which models it has loaded.

use std::time::Duration;

use tokio::time::Instant;

use crate::lanes::{self, Places};

/// What was seen of a host's models counts for so long.
const FRESH: Duration = Duration::from_secs(20);
/// For so long a model that is new in a host's list may still be loading, unless it answers.
const LOADS_FOR: Duration = Duration::from_secs(120);
/// Between two looks at a host that is in use.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// A round trip within a local network; of several, the shortest counts, for a host may be busy.
const LOCAL: Duration = Duration::from_millis(20);
/// Looks that count.
const LOOKS: usize = 5;

/// What a look at a host has shown.
#[derive(Clone, Debug)]
pub struct Look {
    /// How long it took.
    pub round_trip: Duration,
    /// Models that it has loaded; `None` where its API has no word for it.
    pub loaded: Option<Vec<String>>,
}

/// One host.
#[derive(Debug)]
pub struct Host {
    /// For requests that it answers for us.
    places: Places,
    round_trips: Vec<Duration>,
    loaded: Option<(Instant, Vec<String>)>,
    /// Those that a look was the first to show, and when: Ollama lists a model from the beginning of its load.
    newly: Vec<(String, Instant)>,
    looked: Option<Instant>,
    /// Whether a look is under way.
    is_looked_at: bool,
    /// Whether one has ended.
    was_looked_at: bool,
    /// Whether the last one had no end of its own.
    hangs: bool,
}

/// Places of a host without limit.
const UNLIMITED: usize = 1 << 20;

impl Host {
    /// A host of which nothing is known, and the requests that it answers for us at most; `None` is without limit.
    pub fn new(most: Option<usize>) -> Self {
        Self {
            places: Places::new(most.unwrap_or(UNLIMITED)),
            round_trips: Vec::new(),
            loaded: None,
            newly: Vec::new(),
            looked: None,
            is_looked_at: false,
            was_looked_at: false,
            hangs: false,
        }
    }

    /// Changes how many requests it answers for us; those under way go on.
    pub fn limit(&self, most: Option<usize>) {
        self.places.limit(most.unwrap_or(UNLIMITED));
    }

    /// Its places.
    pub fn places(&self) -> Places {
        self.places.clone()
    }

    /// Requests that it answers for us now.
    pub fn outstanding(&self) -> usize {
        self.places.taken()
    }

    /// Whether it is time to look at it again; whoever is told so looks.
    pub fn is_to_be_looked_at(&mut self, now: Instant) -> bool {
        let is_due = !self.is_looked_at && self.is_due(now);
        if is_due {
            self.looked = Some(now);
            self.is_looked_at = true;
        }
        is_due
    }

    fn is_due(&self, now: Instant) -> bool {
        self.looked.is_none_or(|looked| now - looked >= LOOK_EVERY)
    }

    /// A look has ended, whatever it has shown.
    pub fn has_been_looked_at(&mut self, now: Instant, hangs: bool) {
        self.hangs = hangs;
        self.is_looked_at = false;
        self.was_looked_at = true;
        self.looked = Some(now);
    }

    /// Whether its distance is not known, and a look is under way or due that may tell it.
    pub fn is_to_be_measured(&self, now: Instant) -> bool {
        self.round_trips.is_empty() && (self.is_looked_at || self.is_due(now))
    }

    /// Whether the last look at it had no end: the next one is hardly worth waiting for.
    pub const fn hangs(&self) -> bool {
        self.hangs
    }

    /// Whether nothing is known of it but its name.
    pub const fn is_new(&self) -> bool {
        !self.was_looked_at && self.round_trips.is_empty()
    }

    /// Takes a look into account.
    pub fn saw(&mut self, look: Look, now: Instant) {
        self.round_trips.push(look.round_trip);
        if self.round_trips.len() > LOOKS {
            self.round_trips.remove(0);
        }
        let seen = look.loaded.as_ref();
        self.newly.retain(|(name, since)| now - *since < LOADS_FOR && seen.is_some_and(|seen| seen.contains(name)));
        if let (Some((_, before)), Some(seen)) = (&self.loaded, seen) {
            let new = seen.iter().filter(|name| !before.contains(name));
            self.newly.extend(new.map(|name| (name.clone(), now)));
        }
        self.loaded = look.loaded.map(|loaded| (now, loaded));
    }

    /// A model has just answered there: it is loaded.
    pub fn has(&mut self, model: &str, now: Instant) {
        self.newly.retain(|(name, _)| !is_same(name, model));
        match &mut self.loaded {
            Some((_, loaded)) if loaded.iter().any(|known| is_same(known, model)) => {}
            Some((_, loaded)) => loaded.push(model.to_owned()),
            None => self.loaded = Some((now, vec![model.to_owned()])),
        }
    }

    /// Whether a model is loaded there; `None` if that is not known.
    pub fn is_loaded(&self, model: &str, now: Instant) -> Option<bool> {
        let (_, loaded) = self.loaded.as_ref().filter(|(seen, _)| now - *seen < FRESH)?;
        Some(loaded.iter().any(|known| is_same(known, model)))
    }

    /// Whether a model is new in its list, and has not answered yet.
    pub fn may_load(&self, model: &str, now: Instant) -> bool {
        self.newly.iter().any(|(name, since)| now - *since < LOADS_FOR && is_same(name, model))
    }

    /// The shortest round trip that was seen lately.
    pub fn round_trip(&self) -> Option<Duration> {
        self.round_trips.iter().min().copied()
    }

    /// Whether it is beyond the local network.
    pub fn is_far(&self) -> bool {
        self.round_trip().is_some_and(|round_trip| round_trip > LOCAL)
    }
}

/// Whether a host's name for a model is this one; Ollama adds a tag.
pub fn is_same(known: &str, model: &str) -> bool {
    known == model || known.strip_suffix(":latest") == Some(model)
}

/// A place at a host, given back on drop; `None` where there is nothing to hold.
pub type Place = Option<lanes::Place>;

#[cfg(test)]
mod tests {
    use sarai_core::Lane;

    use super::*;

    fn look(ms: u64, loaded: &[&str]) -> Look {
        let loaded = Some(loaded.iter().map(|name| (*name).to_owned()).collect());
        Look { round_trip: Duration::from_millis(ms), loaded }
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_that_is_new_in_the_list_is_loading_until_it_answers() {
        let (mut host, now) = (Host::new(None), Instant::now());
        host.saw(look(1, &["old"]), now);
        assert!(!host.may_load("old", now), "whoever looks first cannot know");
        host.saw(look(1, &["old", "new:latest"]), now + LOOK_EVERY);
        let later = now + LOOK_EVERY;
        assert_eq!((host.may_load("old", later), host.may_load("new", later)), (false, true));
        assert_eq!(host.is_loaded("new", later), Some(true), "a request goes there all the same");
        host.has("new", later);
        assert!(!host.may_load("new", later));
        host.saw(look(1, &["old", "new:latest", "other"]), later + LOOK_EVERY);
        let much_later = later + LOOK_EVERY + LOADS_FOR;
        host.saw(look(1, &["old", "new:latest", "other"]), much_later);
        assert!(!host.may_load("other", much_later), "somebody else has asked for it");
    }

    #[tokio::test(start_paused = true)]
    async fn one_short_round_trip_shows_that_a_busy_host_is_near() {
        let mut host = Host::new(Some(2));
        assert!(!host.is_far(), "not known is near");
        host.saw(look(60, &[]), Instant::now());
        assert!(host.is_far());
        host.saw(look(2, &[]), Instant::now());
        assert!(!host.is_far());
        (0..LOOKS).for_each(|_| host.saw(look(50, &[]), Instant::now()));
        assert!(host.is_far(), "it has moved away");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_seen_loaded_is_forgotten_after_a_while() {
        let mut host = Host::new(Some(2));
        assert_eq!(host.is_loaded("solar", Instant::now()), None);
        host.saw(look(1, &["solar:latest"]), Instant::now());
        assert_eq!(host.is_loaded("solar", Instant::now()), Some(true));
        assert_eq!(host.is_loaded("other", Instant::now()), Some(false));
        tokio::time::advance(FRESH).await;
        assert_eq!(host.is_loaded("solar", Instant::now()), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lower_limit_holds_once_those_under_way_are_done() {
        let host = Host::new(Some(3));
        let mut held: Vec<_> = (0..3).filter_map(|_| host.places().try_take(Lane::Interactive)).collect();
        host.limit(Some(1));
        held.pop();
        assert!(host.places().try_take(Lane::Interactive).is_none(), "two are under way");
        held.clear();
        let one = host.places().try_take(Lane::Interactive);
        assert!(one.is_some() && host.places().try_take(Lane::Interactive).is_none());
        host.limit(None);
        assert!(host.places().try_take(Lane::Bulk).is_some() && host.outstanding() == 1);
    }
}
