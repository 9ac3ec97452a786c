//! Who is left alone is asked for a token now and then: that, and no list, shows that it answers again.

use std::time::Duration;

use futures_util::StreamExt;
use sarai_api::embed;
use sarai_core::{Deadlines, Error, GenerateRequest, Message, Phase, Prompt, RemoteCause, Role, Sampling};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};

use super::{Entry, Expected, State, Table, is_same, key};
use crate::backend::remote;
use crate::config::Remote;

/// A probe is given up after what is late there and at least this; twice as long after each one that was silent.
const PROBE_WITHIN: Duration = Duration::from_secs(5);

impl Table {
    /// Has a deployment that is left alone asked for a token now and then, unless that is under way.
    pub(super) fn probe_if_open(&self, entry: &mut Entry) {
        if entry.breaker.state() != State::Closed && entry.prober.as_ref().is_none_or(AbortHandle::is_finished) {
            entry.turn += 1;
            let prober = tokio::spawn(self.clone().probe_until_closed(entry.remote.clone(), entry.turn));
            entry.prober = Some(prober.abort_handle());
        }
    }

    /// Recovers without traffic: after each rest, one real token is asked for.
    async fn probe_until_closed(self, remote: Remote, turn: u64) {
        let nothing = Expected { prompt_tokens: 0, answer_tokens: 1, held_tokens: 0, is_resident: true };
        let mut within = self.of(&remote).pace.late(nothing).max(PROBE_WITHIN);
        loop {
            let State::Open { until } = self.breaker(&remote).state() else { return };
            tokio::time::sleep_until(until).await;
            if matches!(self.breaker(&remote).state(), State::Open { until } if until > Instant::now()) {
                // The host has asked for more time.
                continue;
            }
            let Some((current, deadlines)) = self.begin_probe(&remote, turn) else { return };
            let outcome = self.probe(&current, &deadlines, within).await;
            if matches!(outcome, Err(Error::Remote { cause: RemoteCause::Silent { .. }, .. })) {
                within = (within * 2).min(deadlines.first_token);
            }
            let mut entries = self.lock();
            let entry = entries.deployments.get_mut(&key(&remote)).filter(|entry| entry.turn == turn);
            let Some(entry) = entry else { return };
            match outcome {
                Ok(()) => {
                    tracing::info!(deployment = ?remote, "answers again: breaker closes");
                    entry.breaker.recovered();
                    entry.prober = None;
                    self.tell();
                    return;
                }
                Err(error) => {
                    tracing::debug!(deployment = ?remote, %error, "probe failed");
                    entry.breaker.failed(&error, Instant::now(), rand::random());
                }
            }
        }
    }

    fn begin_probe(&self, remote: &Remote, turn: u64) -> Option<(Remote, Deadlines)> {
        let mut entries = self.lock();
        let entry = entries.deployments.get_mut(&key(remote)).filter(|entry| entry.turn == turn)?;
        entry.breaker.probing();
        Some((entry.remote.clone(), entry.deadlines))
    }

    /// Asks for one token, or one vector: a list of models that is there proves nothing. A host that is silent for so long, and does not load, has its connection
    /// given up: the next one may be better.
    async fn probe(&self, remote: &Remote, deadlines: &Deadlines, within: Duration) -> Result<(), Error> {
        let place = remote::Place { remote, context_tokens: remote.context_tokens, connect: deadlines.connect };
        let hello = Message::new(Role::User, "Hi");
        let request = GenerateRequest {
            sampling: Sampling { temperature: Some(0.0), ..Sampling::default() },
            max_tokens: Some(1),
            ..GenerateRequest::new(Prompt::Chat(vec![hello]))
        };
        let within = within.min(deadlines.first_token);
        let silent = || Error::Remote {
            host: remote.url.clone(),
            cause: RemoteCause::Silent { phase: Phase::FirstToken, seconds: within.as_secs() },
        };
        let asked = async {
            if remote.makes_vectors {
                return self.hosts.embed(&place, &embed::Parsed::of_text("Hi")).await.map(drop);
            }
            let mut events = self.hosts.open(&place, &request).await?;
            while let Some(event) = events.next().await {
                event?;
            }
            Ok(())
        };
        let mut asked = std::pin::pin!(asked);
        let mut outcome = timeout(within, &mut asked).await;
        if outcome.is_err() && self.loads_now(remote).await {
            outcome = timeout(deadlines.first_token.saturating_sub(within), &mut asked).await;
        }
        match outcome.unwrap_or_else(|_| Err(silent())) {
            // It does not like this request, but it answers.
            Err(Error::InvalidRequest { .. }) => Ok(()),
            Err(Error::Remote { cause, .. }) if cause.is_of_the_request() => Ok(()),
            Err(error @ Error::Remote { cause: RemoteCause::ModelMissing(_), .. }) => {
                // Some make vectors or complete texts only, and know no chats: it is back, if it was away and has the model.
                let last = self.breaker(remote).last().cloned();
                let was_away = matches!(last, Some(Error::Remote { cause: RemoteCause::Unreachable(_), .. }));
                let listed = async { self.hosts.models(remote, deadlines.connect).await.unwrap_or_default() };
                let is_listed = was_away && listed.await.iter().any(|name| is_same(name, &remote.model_name));
                if is_listed { Ok(()) } else { Err(error) }
            }
            outcome => outcome,
        }
    }
}
