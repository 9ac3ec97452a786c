//! What must outlive the server: what was learned of each model. One JSON file in the state directory, replaced as a
//! whole; one that is missing or corrupt is rebuilt, with a warning where there was one.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use sarai_core::{Bytes, EngineMemory};
use serde::{Deserialize, Serialize};

use crate::health::Pace;

const FILE: &str = "learned.json";
/// Models that are remembered; the least recently used ones are forgotten.
const MOST: usize = 512;

/// What was learned of a file under certain settings.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Learned {
    /// llama.cpp's own dry run.
    pub probe: Option<EngineMemory>,
    /// Memory of its own that the last worker was seen to hold at the most, where that was more than planned.
    pub anonymous: Bytes,
    /// How often the kernel killed it for want of memory.
    pub oom_kills: u32,
    /// What the last load took, in milliseconds.
    pub load_ms: u64,
    /// Of a host's deployment: how fast it usually is.
    pub pace: Pace,
    /// Counts up with each use.
    used: u64,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Content {
    models: BTreeMap<String, Learned>,
    uses: u64,
}

/// The state directory.
#[derive(Debug)]
pub struct State {
    folder: PathBuf,
    content: Mutex<Content>,
    /// Set by what was learned and not written yet; the lock keeps writers in order.
    unwritten: Mutex<bool>,
}

impl State {
    /// Reads what is there.
    pub fn open(folder: &Path) -> Self {
        let file = folder.join(FILE);
        let content = match std::fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::warn!(file = %file.display(), %error, "what was learned is unreadable and is learned again");
                Content::default()
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Content::default(),
            Err(error) => {
                tracing::warn!(file = %file.display(), %error, "what was learned cannot be read and is learned again");
                Content::default()
            }
        };
        Self { folder: folder.to_owned(), content: Mutex::new(content), unwritten: Mutex::new(false) }
    }

    /// What is known under a key.
    pub fn get(&self, key: &str) -> Learned {
        self.content.lock().unwrap_or_else(PoisonError::into_inner).models.get(key).cloned().unwrap_or_default()
    }

    /// Changes what is known under a key. It counts at once; [`State::flush`] writes it.
    pub fn learn(&self, key: &str, change: impl FnOnce(&mut Learned)) {
        let mut content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
        let before = content.models.get(key).cloned().unwrap_or_default();
        let mut after = before.clone();
        change(&mut after);
        if after == before {
            return;
        }
        content.uses += 1;
        after.used = content.uses;
        content.models.insert(key.to_owned(), after);
        content.forget();
        drop(content);
        *self.unwritten.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Writes the file if anything was learned since the last time. Blocks for the write.
    pub fn flush(&self) {
        let mut unwritten = self.unwritten.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::take(&mut *unwritten) {
            return;
        }
        let text = serde_json::to_vec_pretty(&*self.content.lock().unwrap_or_else(PoisonError::into_inner));
        let written = text.map_err(std::io::Error::from).and_then(|text| self.replace(&text));
        if let Err(error) = written {
            tracing::warn!(folder = %self.folder.display(), %error, "what was learned cannot be kept");
        }
    }

    /// Written aside, synced, then renamed: a reader sees the old file or the new one.
    fn replace(&self, text: &[u8]) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        let aside = self.folder.join(format!("{FILE}.{}", std::process::id()));
        let mut file = std::fs::File::create(&aside)?;
        file.write_all(text)?;
        file.sync_all()?;
        std::fs::rename(aside, self.folder.join(FILE))
    }
}

impl Content {
    fn forget(&mut self) {
        while self.models.len() > MOST {
            let oldest = self.models.iter().min_by_key(|(_, learned)| learned.used).map(|(key, _)| key.clone());
            if let Some(key) = oldest {
                self.models.remove(&key);
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn what_was_learned_outlives_the_server() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path());
        state.learn("a", |learned| learned.anonymous = Bytes::mib(7));
        state.flush();
        assert_eq!(State::open(folder.path()).get("a").anonymous, Bytes::mib(7));
        assert_eq!(State::open(folder.path()).get("b"), Learned::default());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left aside");
    }

    #[test]
    fn a_corrupt_file_is_rebuilt() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), b"{\"models\": {\"a\": ").unwrap();
        let state = State::open(folder.path());
        assert_eq!(state.get("a"), Learned::default());
        state.learn("a", |learned| learned.oom_kills = 1);
        state.flush();
        assert_eq!(State::open(folder.path()).get("a").oom_kills, 1);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_reason_to_stop() {
        let state = State::open(Path::new("/proc/none"));
        state.learn("a", |learned| learned.oom_kills = 1);
        state.flush();
        assert_eq!(state.get("a").oom_kills, 1);
    }
}
