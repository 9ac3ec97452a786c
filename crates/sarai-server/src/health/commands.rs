//! Breakers of commands of this machine. Nobody probes them: after a rest, the next request does.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use sarai_core::{Error, Phase};
use tokio::time::Instant;

use super::breaker::{Breaker, State};

/// Of all commands, by the names of their deployments.
#[derive(Clone, Default)]
pub struct Commands(Arc<Mutex<HashMap<String, Breaker>>>);

impl Commands {
    /// Whether it is to be left alone for now.
    pub fn is_open(&self, name: &str) -> bool {
        matches!(self.breaker(name).state(), State::Open { until } if until > Instant::now())
    }

    /// Why it was left alone last.
    pub fn last(&self, name: &str) -> Option<Error> {
        self.breaker(name).last().cloned()
    }

    /// An answer came to its own end.
    pub fn succeeded(&self, name: &str) {
        // Hardly any has ever failed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    /// A request failed; only what is the command's fault counts.
    pub fn failed(&self, name: &str, error: &Error) {
        if !is_its_fault(error) {
            return;
        }
        let (mut all, now) = (self.0.lock().unwrap_or_else(PoisonError::into_inner), Instant::now());
        let breaker = all.entry(name.to_owned()).or_default();
        if matches!(breaker.state(), State::Open { until } if until <= now) {
            breaker.probing();
        }
        if breaker.failed(error, now, rand::random()) {
            tracing::warn!(deployment = name, %error, "breaker opens");
        }
    }

    fn breaker(&self, name: &str) -> Breaker {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned().unwrap_or_default()
    }
}

/// Whether a command does not what it should: not that there is no room for it, or that it is busy.
const fn is_its_fault(error: &Error) -> bool {
    match error {
        Error::Remote { cause, .. } => !cause.is_of_the_request(),
        Error::Deadline { phase, .. } => matches!(phase, Phase::FirstToken | Phase::Gap),
        Error::WorkerDied { .. } => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sarai_core::RemoteCause;
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_rests_after_two_failures_longer_each_time_and_one_answer_forgives_all() {
        let (commands, name) = (Commands::default(), "m@process");
        let error = Error::Remote { host: "h".into(), cause: RemoteCause::Cut };
        let refused = Error::Unavailable { model: "m".into(), reason: "no room".into() };
        (0..5).for_each(|_| commands.failed(name, &refused));
        commands.failed(name, &error);
        assert!(!commands.is_open(name));
        commands.failed(name, &error);
        assert!(commands.is_open(name) && commands.last(name) == Some(error.clone()));
        advance(Duration::from_millis(1_300)).await;
        assert!(!commands.is_open(name), "the next request tries it");
        commands.failed(name, &error);
        advance(Duration::from_millis(1_300)).await;
        assert!(commands.is_open(name), "twice as long");
        advance(Duration::from_millis(1_300)).await;
        assert!(!commands.is_open(name));
        commands.succeeded(name);
        commands.failed(name, &error);
        assert!(!commands.is_open(name), "one failure is forgiven again");
    }
}
