//! Looks at hosts: how far away they are, and what they have loaded. One look at a host's distance is for all who wait for it.

use std::time::Duration;

use futures_util::future::join_all;
use sarai_core::Api;
use tokio::time::{Instant, timeout};

use super::host::Host;
use super::{Health, LOOK_NOW, Table, key};
use crate::config::Remote;

/// How long a look at a host may take that nobody waits for.
const LOOK_WITHIN: Duration = Duration::from_secs(10);
/// And one that tells how far away it is: a connection and three round trips.
const MEASURE_WITHIN: Duration = Duration::from_secs(4);

impl Health {
    /// Looks at a host and waits for it, if its API tells what is loaded and that is not known; whether it answered, as far as it was
    /// asked.
    pub async fn look_now(&self, remote: &Remote) -> bool {
        let is_known = self.of(remote).is_loaded.is_some();
        if is_known || remote.api != Api::Ollama || remote.managed_lb {
            return true;
        }
        // Who cannot be reached is told so by the request.
        timeout(LOOK_NOW, self.table.look(remote)).await.is_ok()
    }

    /// Looks at a host whose distance is not known, and waits for it: one that is far away may not be asked. One look is for all who
    /// wait; where it was in vain lately, who cannot be reached is told so by the request.
    pub async fn measure(&self, remote: &Remote) {
        let is_unknown = |host: &Host| host.is_to_be_measured(Instant::now());
        if remote.wan || self.is_open(remote) || !self.table.lock().hosts.get(&remote.url).is_some_and(is_unknown) {
            return;
        }
        let measured = async {
            let mut looks = self.table.looks.subscribe();
            while self.table.lock().hosts.get(&remote.url).is_some_and(is_unknown) {
                self.table.look_if_due(remote);
                if looks.changed().await.is_err() {
                    break;
                }
            }
        };
        let hangs = self.table.lock().hosts.get(&remote.url).is_some_and(Host::hangs);
        let _ = timeout(if hangs { LOOK_NOW } else { MEASURE_WITHIN }, measured).await;
    }

    /// Waits a little for the first look at hosts of which nothing is known yet: those that are near are found so at once, and share the
    /// load from the first request on.
    pub async fn get_to_know(&self, remotes: impl Iterator<Item = &Remote>) {
        let is_new = |remote: &&Remote| self.table.lock().hosts.get(&remote.url).is_some_and(Host::is_new);
        let new: Vec<_> = remotes.filter(is_new).collect();
        if !new.is_empty() {
            let looked = join_all(new.into_iter().map(|remote| self.measure(remote)));
            let _ = Box::pin(timeout(LOOK_NOW, looked)).await;
        }
    }

    /// Whether a host's distance is not known, and will be soon: it is looked at, aside.
    pub fn is_measured_soon(&self, remote: &Remote) -> bool {
        let is_unknown = |host: &Host| host.is_to_be_measured(Instant::now());
        let is_soon = !remote.wan && self.table.lock().hosts.get(&remote.url).is_some_and(is_unknown);
        if is_soon {
            self.look(remote);
        }
        is_soon
    }

    /// Whether a host answers, and has not the model loaded: a look that is waited for.
    pub async fn loads_now(&self, remote: &Remote) -> bool {
        self.table.loads_now(remote).await
    }

    /// Looks at a host in the background, if that was not done lately.
    pub fn look(&self, remote: &Remote) {
        self.table.look_if_due(remote);
    }

    /// Whether a host answers: a look that is waited for.
    pub async fn is_there(&self, remote: &Remote) -> bool {
        timeout(LOOK_NOW, self.table.look(remote)).await == Ok(true)
    }
}

impl Table {
    pub(super) async fn loads_now(&self, remote: &Remote) -> bool {
        if remote.api != Api::Ollama || remote.managed_lb {
            return false;
        }
        let looked = timeout(LOOK_NOW, self.look(remote)).await;
        looked == Ok(true) && self.of(remote).loads()
    }

    /// Looks at a host, aside, if that was not done lately.
    pub(super) fn look_if_due(&self, remote: &Remote) {
        let mut entries = self.lock();
        if !entries.hosts.get_mut(&remote.url).is_some_and(|host| host.is_to_be_looked_at(Instant::now())) {
            return;
        }
        let (table, remote) = (self.clone(), remote.clone());
        // It ends by itself, soon.
        tokio::spawn(async move {
            let hangs = timeout(LOOK_WITHIN, table.look(&remote)).await.is_err();
            if let Some(host) = table.lock().hosts.get_mut(&remote.url) {
                host.has_been_looked_at(Instant::now(), hangs);
            }
            table.looks.send_modify(|count| *count += 1);
        });
    }

    /// Looks at a host, and keeps what was seen; whether it answered.
    pub(super) async fn look(&self, remote: &Remote) -> bool {
        let connect = self.lock().deployments.get(&key(remote)).map(|entry| entry.deadlines.connect);
        let Some(connect) = connect else { return false };
        let Ok(look) = self.hosts.look(remote, connect).await else { return false };
        if let Some(host) = self.lock().hosts.get_mut(&remote.url) {
            host.saw(look, Instant::now());
        }
        true
    }
}
