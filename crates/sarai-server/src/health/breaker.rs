//! The circuit breaker of one deployment: whether it is worth asking. Pure; time is an argument.
//!
//! It is judged by how streams end, not by how they begin. It only orders: when nobody else can answer, a deployment
//! is asked although its breaker is open.

use std::time::Duration;

use sarai_core::{Error, RemoteCause};
use tokio::time::Instant;

/// Failures in a row that open it, unless one alone leaves no doubt.
const FAILURES: u32 = 2;
/// The first rest, and the longest.
const REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(30);
/// The longest time that a host may ask for.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(300);

/// What a breaker says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Ask it.
    Closed,
    /// Leave it alone until then.
    Open {
        /// When it is probed.
        until: Instant,
    },
    /// One real token is being asked for.
    HalfOpen,
}

impl State {
    /// The word in metrics and on pages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open { .. } => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

/// One breaker.
#[derive(Clone, Debug)]
pub struct Breaker {
    state: State,
    failures: u32,
    /// How often it has been opened since it was last closed.
    opened: u32,
    last: Option<Error>,
    /// Whether it is open because the host said so.
    asked_for_time: bool,
}

impl Default for Breaker {
    fn default() -> Self {
        Self { state: State::Closed, failures: 0, opened: 0, last: None, asked_for_time: false }
    }
}

impl Breaker {
    /// What it says now.
    pub const fn state(&self) -> State {
        self.state
    }

    /// Why it was opened.
    pub const fn last(&self) -> Option<&Error> {
        self.last.as_ref()
    }

    /// The probe got its token: it may be asked again, and one failure is enough to open it; how often it was opened is
    /// remembered until a stream of its own comes to an end.
    pub fn recovered(&mut self) {
        self.state = State::Closed;
        self.asked_for_time = false;
        self.failures = FAILURES - 1;
    }

    /// Whoever probed it is gone: it is to be probed anew.
    pub fn interrupted(&mut self, now: Instant) {
        if self.state == State::HalfOpen {
            self.state = State::Open { until: now };
        }
    }

    /// A stream came to its own end. One that began before the host asked for time changes nothing about that.
    pub fn succeeded(&mut self, now: Instant) {
        match self.state {
            State::Open { until } if self.asked_for_time && until > now => {}
            _ => *self = Self::default(),
        }
    }

    /// A request failed by the deployment's fault. `jitter` is from 0 to 1. Returns whether it opens now.
    pub fn failed(&mut self, error: &Error, now: Instant, jitter: f64) -> bool {
        self.failures += 1;
        self.last = Some(error.clone());
        self.asked_for_time |= !retry_after(error).is_zero();
        let is_open = self.state != State::Closed;
        if !is_open && self.failures < FAILURES && !is_beyond_doubt(error) {
            return false;
        }
        if let State::Open { until } = self.state {
            // A request that was under way, or that nobody else could answer: the probe comes all the same.
            self.state = State::Open { until: until.max(now + retry_after(error)) };
            return false;
        }
        let rest = REST.saturating_mul(1 << self.opened.min(8)).min(LONGEST_REST).mul_f64(0.8 + 0.4 * jitter);
        self.opened += 1;
        self.state = State::Open { until: now + rest.max(retry_after(error)) };
        !is_open
    }

    /// The rest is over, and one token is asked for.
    pub const fn probing(&mut self) {
        self.state = State::HalfOpen;
    }
}

/// Nobody is there, or the model is not: a second request would learn nothing new.
const fn is_beyond_doubt(error: &Error) -> bool {
    matches!(
        error,
        Error::Remote {
            cause: RemoteCause::Unreachable(_)
                | RemoteCause::ModelMissing(_)
                | RemoteCause::Status { retry_after: Some(_), .. },
            ..
        }
    )
}

fn retry_after(error: &Error) -> Duration {
    match error {
        Error::Remote { cause: RemoteCause::Status { retry_after: Some(seconds), .. }, .. } => {
            Duration::from_secs(*seconds).min(LONGEST_RETRY_AFTER)
        }
        _ => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(cause: RemoteCause) -> Error {
        Error::Remote { host: "http://h".into(), cause }
    }

    fn rest(breaker: &Breaker, now: Instant) -> Option<Duration> {
        match breaker.state() {
            State::Open { until } => Some(until - now),
            State::Closed | State::HalfOpen => None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_cut_stream_is_forgiven_two_in_a_row_are_not_and_a_host_that_is_not_there_never() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        assert!(!breaker.failed(&error(RemoteCause::Cut), now, 0.5));
        breaker.succeeded(now);
        assert!(!breaker.failed(&error(RemoteCause::Cut), now, 0.5));
        assert!(breaker.failed(&error(RemoteCause::Cut), now, 0.5));
        let mut gone = Breaker::default();
        assert!(gone.failed(&error(RemoteCause::Unreachable("refused".into())), now, 0.5));
    }

    #[tokio::test(start_paused = true)]
    async fn each_failed_probe_doubles_the_rest_up_to_half_a_minute_and_a_success_closes() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        let gone = error(RemoteCause::Unreachable("refused".into()));
        let mut rests = Vec::new();
        for _ in 0..8 {
            breaker.failed(&gone, now, 0.5);
            rests.push(rest(&breaker, now).map_or(0, |rest| rest.as_millis()));
            breaker.probing();
        }
        assert_eq!(rests, [1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]);
        breaker.succeeded(now);
        assert_eq!(breaker.state(), State::Closed);
        breaker.failed(&gone, now, 0.0);
        assert_eq!(rest(&breaker, now), Some(Duration::from_millis(800)), "and it begins anew, with jitter");
    }

    #[tokio::test(start_paused = true)]
    async fn requests_that_fail_while_it_is_open_do_not_put_the_probe_off() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        let gone = error(RemoteCause::Unreachable("refused".into()));
        breaker.failed(&gone, now, 0.5);
        let before = breaker.state();
        assert!(!breaker.failed(&gone, now + Duration::from_millis(900), 0.5));
        assert_eq!(breaker.state(), before);
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_answers_probes_and_cuts_streams_rests_longer_each_time() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        let cut = error(RemoteCause::Cut);
        breaker.failed(&cut, now, 0.5);
        for wanted in [1000, 2000, 4000] {
            assert!(breaker.failed(&cut, now, 0.5), "one more is enough");
            assert_eq!(rest(&breaker, now), Some(Duration::from_millis(wanted)));
            breaker.recovered();
        }
        breaker.succeeded(now);
        assert!(!breaker.failed(&cut, now, 0.5), "a stream that came to its end makes all good");
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_says_when_to_come_back_is_asked_then() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        let busy = RemoteCause::Status { status: 503, message: "busy".into(), retry_after: Some(20) };
        assert!(breaker.failed(&error(busy), now, 0.5));
        assert_eq!(rest(&breaker, now), Some(Duration::from_secs(20)));
        breaker.succeeded(now);
        assert_eq!(
            rest(&breaker, now),
            Some(Duration::from_secs(20)),
            "an older stream that ends well does not matter"
        );
    }
}
