//! Conversations on disk: what an idle worker keeps of its sequences when it goes, and finds again when it is back.
//!
//! A sequence is two files: llama.cpp's own state file, and a note that says of what it is and what its checksum is. Only
//! what this very file, version and settings have written is used; all else is ignored with a warning and removed.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use llama_cpp_4::context::LlamaContext;
use llama_cpp_4::model::LlamaModel;
use llama_cpp_4::token::LlamaToken;
use sarai_core::frame::LoadSpec;
use sarai_core::split;
use serde::{Deserialize, Serialize};

use crate::cells::{self, Wanted};
use crate::log::warn;
use crate::model;
use crate::unit::{Unit, common};

/// Shorter sequences are computed as fast as they are read.
const FEWEST_TOKENS: usize = 64;
/// How much of a file is read at a time for its checksum.
const CHUNK: usize = 1 << 20;

/// What stands beside a state file.
#[derive(Serialize, Deserialize)]
struct Note {
    /// Of which file, version and settings it is.
    key: String,
    tokens: Vec<i32>,
    bytes: u64,
    crc32: u32,
}

/// A sequence on disk.
struct Parked {
    note: PathBuf,
    tokens: Vec<Unit>,
    bytes: u64,
    crc32: u32,
    /// Whether its checksum was found to be right; it is read once, and not again while room is made for it.
    is_checked: bool,
}

impl Parked {
    fn state(&self) -> PathBuf {
        self.note.with_extension("kv")
    }

    fn remove(&self) {
        // Whoever is not there any more need not be removed.
        let _ = fs::remove_file(&self.note);
        let _ = fs::remove_file(self.state());
    }
}

/// The sequences of one GGUF file on disk.
pub struct Parking {
    folder: PathBuf,
    most_bytes: u64,
    key: String,
    parked: Vec<Parked>,
}

impl Parking {
    /// What is parked for this load; nothing if parking is off.
    pub fn open(spec: &LoadSpec, model: &LlamaModel) -> Option<Self> {
        if spec.deterministic && model.n_swa() > 0 {
            // llama.cpp brings a window's cells back in another order than that in which they were taken.
            return None;
        }
        let park = spec.park.as_ref()?;
        let key = key(spec, model)?;
        if let Err(error) = fs::DirBuilder::new().recursive(true).mode(0o700).create(&park.folder) {
            warn(&format!("nothing is parked in {}: {error}", park.folder.display()));
            return None;
        }
        // The bindings take no other paths.
        park.folder.to_str()?;
        let files: Vec<_> =
            fs::read_dir(&park.folder).into_iter().flatten().flatten().map(|file| file.path()).collect();
        let (notes, others): (Vec<_>, Vec<_>) =
            files.into_iter().partition(|path| path.extension().is_some_and(|extension| extension == "json"));
        // Whoever was stopped while it wrote has left a state without a note.
        for path in others.iter().filter(|path| !notes.contains(&path.with_extension("json"))) {
            let _ = fs::remove_file(path);
        }
        let mut parked: Vec<_> = notes.into_iter().filter_map(|note| read_note(note, &key)).collect();
        parked
            .sort_by_key(|parked| std::cmp::Reverse(fs::metadata(&parked.note).and_then(|note| note.modified()).ok()));
        let mut parking = Self { folder: park.folder.clone(), most_bytes: park.most_bytes.0, key, parked };
        parking.make_room(parking.most_bytes, &[]);
        Some(parking)
    }

    /// The parked sequence that begins like this prompt for longest, and for how long.
    fn best(&self, wanted: Wanted<'_>) -> Option<(usize, usize)> {
        let shared = self.parked.iter().map(|parked| match common(&parked.tokens, wanted.prompt) {
            part if wanted.whole && part < parked.tokens.len() => 0,
            shared => shared,
        });
        shared
            .enumerate()
            .filter(|(_, shared)| *shared > 0)
            .max_by_key(|(at, shared)| (*shared, std::cmp::Reverse(self.parked[*at].tokens.len())))
    }

    /// How many of the first tokens of a prompt are parked.
    pub fn holds(&self, wanted: Wanted<'_>) -> cells::Parked {
        let found = self.best(wanted);
        found.map(|(at, shared)| cells::Parked { shared, held: self.parked[at].tokens.len() }).unwrap_or_default()
    }

    /// Puts the best parked sequence into an empty one; returns its tokens. It is not parked any more then. `None` means that
    /// it stays parked, since the cache has no room for it; one whose files cannot be trusted goes, and has no tokens.
    pub fn restore(
        &mut self,
        context: &mut LlamaContext<'_>,
        sequence: usize,
        wanted: Wanted<'_>,
    ) -> Option<Vec<Unit>> {
        let Some((index, _)) = self.best(wanted) else { return Some(Vec::new()) };
        let parked = &mut self.parked[index];
        let path = parked.state();
        parked.is_checked |= checksum(&path).is_ok_and(|found| found == (parked.bytes, parked.crc32));
        let mut tokens = Vec::new();
        if parked.is_checked {
            let sequence = i32::try_from(sequence).ok()?;
            if context.state_seq_load_file(&path, sequence, &mut tokens, parked.tokens.len()) == 0 {
                // llama.cpp may have read a part of it.
                let _ = context.clear_kv_cache_seq(u32::try_from(sequence).ok(), None, None);
                return None;
            }
        } else {
            warn(&format!("{} is damaged, and is computed again", path.display()));
        }
        self.parked.swap_remove(index).remove();
        Some(tokens.into_iter().map(Unit::Text).collect())
    }

    /// Removes what would be restored: llama.cpp does not take it, though there is room.
    pub fn discard(&mut self, wanted: Wanted<'_>) {
        if let Some((index, _)) = self.best(wanted) {
            let parked = self.parked.swap_remove(index);
            warn(&format!("{} cannot be read back, and is computed again", parked.state().display()));
            parked.remove();
        }
    }

    /// Lets what is parked take so many bytes at most, and removes what these tokens make superfluous.
    fn make_room(&mut self, most: u64, tokens: &[Unit]) {
        let mut room = most;
        self.parked.retain(|parked| {
            let stays = parked.bytes <= room && common(&parked.tokens, tokens) < parked.tokens.len();
            if stays {
                room -= parked.bytes;
            } else {
                parked.remove();
            }
            stays
        });
    }

    /// Begins to park what a worker holds.
    pub fn begin(&mut self) -> Leaving<'_> {
        Leaving { parking: self, kept: Vec::new(), bytes: 0 }
    }

    fn write(&self, context: &mut LlamaContext<'_>, sequence: i32, tokens: &[LlamaToken]) -> io::Result<Parked> {
        let numbers: Vec<i32> = tokens.iter().map(|token| token.0).collect();
        let bytes: Vec<u8> = numbers.iter().flat_map(|token| token.to_le_bytes()).collect();
        let name = format!("{}-{:08x}", tokens.len(), crc32fast::hash(&bytes));
        let note = self.folder.join(name).with_extension("json");
        let state = note.with_extension("kv");
        // Without its note a state file is nothing, so the note goes first and comes last.
        let _ = fs::remove_file(&note);
        let written = context.state_seq_save_file(&state, sequence, tokens);
        let noted = self.write_note((&note, &state), numbers, written as u64);
        if noted.is_err() {
            let _ = fs::remove_file(&state);
        }
        let (bytes, crc32) = noted?;
        let tokens = tokens.iter().copied().map(Unit::Text).collect();
        Ok(Parked { note, tokens, bytes, crc32, is_checked: false })
    }

    /// Says that a state of so many bytes is there, and what it is of.
    fn write_note(&self, (note, state): (&Path, &Path), numbers: Vec<i32>, written: u64) -> io::Result<(u64, u32)> {
        let (bytes, crc32) = if written == 0 { (0, 0) } else { checksum(state)? };
        // llama.cpp does not see that the last of it could not be written.
        if bytes == 0 || bytes != written {
            return Err(io::Error::other(format!("{} cannot be written", state.display())));
        }
        let text = serde_json::to_string(&Note { key: self.key.clone(), tokens: numbers, bytes, crc32 })?;
        let unfinished = note.with_extension("unfinished");
        fs::write(&unfinished, text)?;
        fs::rename(&unfinished, note)?;
        Ok((bytes, crc32))
    }
}

/// A worker that goes parks its sequences, those first that were used last.
pub struct Leaving<'a> {
    parking: &'a mut Parking,
    kept: Vec<Parked>,
    bytes: u64,
}

impl Leaving<'_> {
    /// Parks a sequence if there is room for it; what has been parked for longer gives way. One that has seen or heard is not
    /// parked: what a piece of media is called is known to this worker alone.
    pub fn add(&mut self, context: &mut LlamaContext<'_>, sequence: usize, units: &[Unit]) {
        let is_known = self.kept.iter().any(|parked| common(&parked.tokens, units) == units.len());
        let Some(tokens) = units.iter().map(|unit| unit.text()).collect::<Option<Vec<_>>>() else { return };
        let Ok(sequence) = i32::try_from(sequence) else { return };
        if tokens.len() < FEWEST_TOKENS || is_known {
            return;
        }
        let size = context.state_seq_get_size(sequence) as u64;
        let bytes = self.bytes + size;
        if bytes > self.parking.most_bytes {
            if size > self.parking.most_bytes {
                let (needs, most) = (size >> 20, self.parking.most_bytes >> 20);
                let tokens = tokens.len();
                warn(&format!(
                    "a conversation of {tokens} tokens is not parked: it takes {needs} MiB, `park_mb` is {most}"
                ));
            }
            return;
        }
        self.parking.make_room(self.parking.most_bytes - bytes, units);
        match self.parking.write(context, sequence, &tokens) {
            Ok(parked) => {
                self.bytes += parked.bytes;
                self.kept.push(parked);
            }
            Err(error) => warn(&format!("a sequence is not parked: {error}")),
        }
    }
}

/// The bindings whose llama.cpp writes the states.
const LLAMA: &str = "llama-cpp-4 0.11.0";

/// What a state depends on beside its tokens.
fn key(spec: &LoadSpec, model: &LlamaModel) -> Option<String> {
    let path = fs::canonicalize(&spec.path).ok()?;
    let mut key = format!("{} {} with {LLAMA}", path.display(), env!("CARGO_PKG_VERSION"));
    for part in split::parts(&path) {
        let file = fs::metadata(part).ok()?;
        let changed = file.modified().ok()?.duration_since(UNIX_EPOCH).ok()?.as_nanos();
        key.push_str(&format!(" {} {changed}", file.len()));
    }
    let LoadSpec { kv, flash_attention, repack, deterministic, .. } = spec;
    // Some models rotate keys in another way from a certain size of the context on.
    let is_stretched = model::pool_tokens(spec) > model::unstretched_tokens(model);
    // Sequences that have cells of their own are read back only where there are as many.
    let streams = if *deterministic { spec.parallel } else { 1 };
    key.push_str(&format!(" {kv:?} {flash_attention} {repack} {deterministic} {streams} {is_stretched}"));
    Some(key)
}

fn read_note(path: PathBuf, key: &str) -> Option<Parked> {
    let note = fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Note>(&text).ok());
    match note {
        Some(Note { key: of, tokens, bytes, crc32 }) if of == key => {
            let tokens = tokens.into_iter().map(|token| LlamaToken(token).into()).collect();
            Some(Parked { note: path, tokens, bytes, crc32, is_checked: false })
        }
        _ => {
            warn(&format!("{} is not of this file, version and settings, and is removed", path.display()));
            let _ = fs::remove_file(path.with_extension("kv"));
            let _ = fs::remove_file(path);
            None
        }
    }
}

fn checksum(path: &Path) -> io::Result<(u64, u32)> {
    let mut file = fs::File::open(path)?;
    let (mut hasher, mut bytes, mut buffer) = (crc32fast::Hasher::new(), 0, vec![0; CHUNK]);
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok((bytes, hasher.finalize()));
        }
        hasher.update(&buffer[..read]);
        bytes += read as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_that_is_named_is_the_one_that_is_built() {
        let (name, version) = LLAMA.split_once(' ').unwrap_or_default();
        let lock = include_str!("../../../Cargo.lock");
        assert!(lock.contains(&format!("name = \"{name}\"\nversion = \"{version}\"")), "{LLAMA} is not in Cargo.lock");
    }
}
