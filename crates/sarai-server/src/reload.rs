//! The configuration, read again while the server runs: on SIGHUP, when a file of it has changed, and when a name has
//! other addresses. Either all of it is taken, or none: a bad file changes nothing, and the log says why.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::catalog::{Catalog, Catalogs};
use crate::config::{self, Config, Deployment, Environment, Remote};
use crate::dispatch::Dispatch;

/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often names are asked for their addresses, in looks.
const NAMES_EVERY: u32 = 10;
/// How long that may take.
const NAMES_WITHIN: Duration = Duration::from_secs(5);

/// What a change of the configuration reaches.
pub struct Live {
    /// Where the catalog that counts is put.
    pub sender: watch::Sender<Arc<Catalog>>,
    /// The catalog that counts.
    pub catalogs: Catalogs,
    /// Pool and health of hosts.
    pub dispatch: Dispatch,
}

/// Which files, of which change, and which addresses names have.
struct Watched {
    path: PathBuf,
    files: Vec<PathBuf>,
    stamps: Vec<Stamp>,
    names: Names,
}

/// Keeps the configuration current, for as long as the server runs. `config` is the one that is in use, with names in it and not
/// yet addresses.
pub async fn keep_current(path: PathBuf, config: Config, names: Names, live: Live) {
    let Ok(mut hup) = signal(SignalKind::hangup()) else {
        return tracing::warn!("SIGHUP cannot be heard: the configuration is not read again");
    };
    let mut watched = Watched { path, files: Vec::new(), stamps: Vec::new(), names };
    watched.watch(&config, HashMap::new());
    let mut current = config;
    let mut look = tokio::time::interval(LOOK_EVERY);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut looks = 0_u32;
    // Why it was not taken last.
    let mut wrong: Option<String> = None;
    loop {
        let asked = tokio::select! {
            _ = hup.recv() => true,
            _ = look.tick() => false,
        };
        looks = looks.wrapping_add(1);
        let has_changed = watched.have_files_changed();
        // Of before they are read: what is written meanwhile is seen at the next look.
        let read = watched.files.iter().cloned().zip(watched.stamps.clone()).collect();
        let mut written = None;
        // One that is wrong is read again: it may lack a file that is not watched yet.
        if asked || has_changed || wrong.is_some() {
            match watched.read().await {
                Ok(config) => {
                    wrong = None;
                    written = Some(config);
                }
                Err(mistakes) => {
                    if asked || wrong.as_ref() != Some(&mistakes) {
                        tracing::error!(%mistakes, "the configuration is not taken: nothing has changed");
                    }
                    wrong = Some(mistakes);
                }
            }
        }
        let names_are_due = looks.is_multiple_of(NAMES_EVERY) && watched.names.any();
        if written.is_none() && !names_are_due {
            continue;
        }
        let config = written.unwrap_or_else(|| current.clone());
        let names_changed = watched.names.look_up(&config).await;
        if config == current && !names_changed {
            if asked {
                tracing::info!("the configuration is read again and says the same");
            }
            continue;
        }
        live.take(&current, &config, &watched.names);
        watched.watch(&config, read);
        current = config;
    }
}

impl Watched {
    /// Watches the files of a configuration, since their stamps as far as those are known.
    fn watch(&mut self, config: &Config, known: HashMap<PathBuf, Stamp>) {
        self.files = [self.path.clone(), PathBuf::from(".env")].into_iter().chain(config.host_files.clone()).collect();
        self.stamps = self.files.iter().map(|file| known.get(file).copied().unwrap_or_else(|| stamp(file))).collect();
    }

    fn stamps_now(&self) -> Vec<Stamp> {
        self.files.iter().map(|file| stamp(file)).collect()
    }

    fn have_files_changed(&mut self) -> bool {
        let now = self.stamps_now();
        let before = std::mem::replace(&mut self.stamps, now);
        before != self.stamps
    }

    async fn read(&self) -> Result<Config, String> {
        let path = self.path.clone();
        let read = move || config::load(&path, &Environment::of_process()).map_err(|mistakes| mistakes.to_string());
        tokio::task::spawn_blocking(read).await.unwrap_or_else(|error| Err(error.to_string()))
    }
}

/// When a file was changed last, and its length; `None` while it is not there.
type Stamp = Option<(SystemTime, u64)>;

fn stamp(file: &Path) -> Stamp {
    let meta = std::fs::metadata(file).ok()?;
    Some((meta.modified().ok()?, meta.len()))
}

impl Live {
    fn take(&self, old: &Config, new: &Config, names: &Names) {
        if old.server != new.server {
            tracing::warn!("what stands under `server` counts from the next start on");
        }
        let new = names.in_place(new);
        let catalog = Arc::new(Catalog::succeeding(&new, &self.catalogs.now()));
        self.dispatch.pool.reconfigure(Arc::clone(&catalog), new.memory);
        self.dispatch.health.reconfigure(&catalog);
        // Last, so that whoever finds a model finds its engine and its hosts.
        self.sender.send_replace(catalog);
        tracing::info!(models = new.models.len(), "the configuration is taken");
    }
}

/// Names of hosts, and the addresses that they have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    addresses: HashMap<(String, u16), Vec<SocketAddr>>,
}

impl Names {
    fn any(&self) -> bool {
        !self.addresses.is_empty()
    }

    /// Looks up every name that stands for all its addresses; one that cannot be looked up keeps those it had. Returns
    /// whether anything is other than before.
    pub async fn look_up(&mut self, config: &Config) -> bool {
        let before = std::mem::take(&mut self.addresses);
        for remote in remotes(config).filter(|remote| remote.dns) {
            let Some(name) = name_of(remote) else { continue };
            if self.addresses.contains_key(&name) {
                continue;
            }
            let found = tokio::time::timeout(NAMES_WITHIN, tokio::net::lookup_host(name.clone())).await;
            let found = match found {
                Ok(Ok(found)) => {
                    let mut found: Vec<_> = found.collect();
                    found.sort_unstable();
                    found.dedup();
                    found
                }
                Ok(Err(error)) => {
                    tracing::warn!(name = name.0, %error, "a host's name cannot be looked up");
                    before.get(&name).cloned().unwrap_or_default()
                }
                Err(_) => before.get(&name).cloned().unwrap_or_default(),
            };
            self.addresses.insert(name, found);
        }
        before != self.addresses
    }

    /// The configuration with a host for each address. A name without any stays: asking it says what is wrong.
    pub fn in_place(&self, config: &Config) -> Config {
        let mut config = config.clone();
        for model in &mut config.models {
            let deployments = std::mem::take(&mut model.deployments);
            model.deployments = deployments.into_iter().flat_map(|deployment| self.each(deployment)).collect();
        }
        config
    }

    fn each(&self, deployment: Deployment) -> Vec<Deployment> {
        let Deployment::Remote(remote) = &deployment else { return vec![deployment] };
        let addresses = name_of(remote).filter(|_| remote.dns).and_then(|name| self.addresses.get(&name));
        let at = |address: &SocketAddr| {
            let mut url = reqwest::Url::parse(&remote.url).ok()?;
            url.set_ip_host(address.ip()).ok()?;
            let url = url.as_str().trim_end_matches('/').to_owned();
            Some(Deployment::Remote(Remote { url, ..remote.clone() }))
        };
        let all: Vec<_> = addresses.into_iter().flatten().filter_map(at).collect();
        if all.is_empty() { vec![deployment] } else { all }
    }
}

fn remotes(config: &Config) -> impl Iterator<Item = &Remote> {
    config.models.iter().flat_map(|model| &model.deployments).filter_map(|deployment| match deployment {
        Deployment::Remote(remote) => Some(remote),
        Deployment::Local { .. } | Deployment::Process { .. } => None,
    })
}

fn name_of(remote: &Remote) -> Option<(String, u16)> {
    let url = reqwest::Url::parse(&remote.url).ok()?;
    Some((url.host_str()?.trim_matches(['[', ']']).to_owned(), url.port_or_known_default()?))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Config {
        config::parse(text, Path::new("sarai.yaml"), &Environment::default()).unwrap()
    }

    fn urls(config: &Config) -> Vec<&str> {
        remotes(config).map(|remote| remote.url.as_str()).collect()
    }

    #[tokio::test]
    async fn a_name_stands_for_all_its_addresses_and_keeps_them_while_nobody_can_be_asked() {
        let config = parsed("models:\n  m: { backend: ollama_http, url: \"http://expert.lan:11434\", dns: true }\n");
        let mut names = Names::default();
        assert_eq!(urls(&names.in_place(&config)), ["http://expert.lan:11434"], "nothing is known yet");
        let addresses = vec!["10.0.0.1:11434".parse().unwrap(), "[fd00::2]:11434".parse().unwrap()];
        names.addresses.insert(("expert.lan".into(), 11434), addresses);
        let wanted = ["http://10.0.0.1:11434", "http://[fd00::2]:11434"];
        assert_eq!(urls(&names.in_place(&config)), wanted);
        // `.lan` is nobody's name here.
        assert!(!names.look_up(&config).await);
        assert_eq!(urls(&names.in_place(&config)), wanted);
    }

    #[tokio::test]
    async fn localhost_is_looked_up() {
        let config = parsed("models:\n  m: { backend: openai_http, url: \"http://localhost:8000/v1\", dns: true }\n");
        let mut names = Names::default();
        assert!(names.look_up(&config).await);
        assert!(urls(&names.in_place(&config)).contains(&"http://127.0.0.1:8000/v1"));
    }
}
