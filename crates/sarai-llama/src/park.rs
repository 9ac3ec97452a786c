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
use llama_cpp_4::token::LlamaToken;
use sarai_core::frame::LoadSpec;
use serde::{Deserialize, Serialize};

use crate::log::warn;
use crate::sequence::common;

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
    tokens: Vec<LlamaToken>,
    bytes: u64,
    crc32: u32,
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
    pub fn open(spec: &LoadSpec) -> Option<Self> {
        let park = spec.park.as_ref()?;
        let key = key(spec)?;
        if let Err(error) = fs::DirBuilder::new().recursive(true).mode(0o700).create(&park.folder) {
            warn(&format!("nothing is parked in {}: {error}", park.folder.display()));
            return None;
        }
        let notes = fs::read_dir(&park.folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let notes = notes.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
        let parked = notes.filter_map(|note| read_note(note, &key)).collect();
        Some(Self { folder: park.folder.clone(), most_bytes: park.most_bytes.0, key, parked })
    }

    /// The parked sequence that begins like this prompt for longest, and for how long.
    fn best(&self, prompt: &[LlamaToken], most: usize) -> Option<(usize, usize)> {
        let shared = self.parked.iter().map(|parked| common(&parked.tokens, prompt).min(most)).enumerate();
        shared.max_by_key(|(_, shared)| *shared)
    }

    /// How many of the first tokens of a prompt are parked.
    pub fn holds(&self, prompt: &[LlamaToken], most: usize) -> usize {
        self.best(prompt, most).map_or(0, |(_, shared)| shared)
    }

    /// Puts the best parked sequence into an empty one; returns all its tokens, or none if its file cannot be trusted. It is
    /// not parked any more then.
    pub fn restore(
        &mut self,
        context: &mut LlamaContext<'_>,
        sequence: usize,
        prompt: &[LlamaToken],
    ) -> Vec<LlamaToken> {
        let Some((index, _)) = self.best(prompt, usize::MAX) else { return Vec::new() };
        let parked = self.parked.swap_remove(index);
        let path = parked.state();
        let is_sound = checksum(&path).is_ok_and(|found| found == (parked.bytes, parked.crc32));
        let mut tokens = Vec::new();
        let read = match i32::try_from(sequence) {
            Ok(sequence) if is_sound => context.state_seq_load_file(&path, sequence, &mut tokens, parked.tokens.len()),
            _ => 0,
        };
        parked.remove();
        if read > 0 && tokens == parked.tokens {
            return tokens;
        }
        warn(&format!("{} is damaged, and is computed again", path.display()));
        Vec::new()
    }

    /// Parks sequences, those first that were used last, as far as the room reaches; what was parked longest gives way.
    pub fn park<'a>(
        &mut self,
        context: &mut LlamaContext<'_>,
        sequences: impl Iterator<Item = (usize, &'a [LlamaToken])>,
    ) {
        let mut room = self.most_bytes;
        let mut kept: Vec<Parked> = Vec::new();
        for (sequence, tokens) in sequences {
            let is_known = kept.iter().any(|parked| common(&parked.tokens, tokens) == tokens.len());
            if tokens.len() < FEWEST_TOKENS || is_known {
                continue;
            }
            let Ok(sequence) = i32::try_from(sequence) else { continue };
            if context.state_seq_get_size(sequence) as u64 > room {
                continue;
            }
            match self.write(context, sequence, tokens) {
                Ok(parked) => {
                    room = room.saturating_sub(parked.bytes);
                    kept.push(parked);
                }
                Err(error) => warn(&format!("a sequence is not parked: {error}")),
            }
        }
        for older in std::mem::take(&mut self.parked) {
            let is_known = kept.iter().any(|parked| common(&parked.tokens, &older.tokens) == older.tokens.len());
            if is_known || older.bytes > room {
                // The same tokens have the same name.
                if kept.iter().all(|parked| parked.note != older.note) {
                    older.remove();
                }
            } else {
                room -= older.bytes;
                kept.push(older);
            }
        }
        self.parked = kept;
    }

    fn write(&self, context: &mut LlamaContext<'_>, sequence: i32, tokens: &[LlamaToken]) -> io::Result<Parked> {
        let numbers: Vec<i32> = tokens.iter().map(|token| token.0).collect();
        let bytes: Vec<u8> = numbers.iter().flat_map(|token| token.to_le_bytes()).collect();
        let name = format!("{}-{:08x}", tokens.len(), crc32fast::hash(&bytes));
        let note = self.folder.join(name).with_extension("json");
        let state = note.with_extension("kv");
        // Without its note a state file is nothing, so the note goes first and comes last.
        let _ = fs::remove_file(&note);
        if context.state_seq_save_file(&state, sequence, tokens) == 0 {
            return Err(io::Error::other(format!("{} cannot be written", state.display())));
        }
        let (bytes, crc32) = checksum(&state)?;
        let text = serde_json::to_string(&Note { key: self.key.clone(), tokens: numbers, bytes, crc32 })?;
        let unfinished = note.with_extension("unfinished");
        fs::write(&unfinished, text)?;
        fs::rename(&unfinished, &note)?;
        Ok(Parked { note, tokens: tokens.to_vec(), bytes, crc32 })
    }
}

/// What a state depends on beside its tokens.
fn key(spec: &LoadSpec) -> Option<String> {
    let file = fs::metadata(&spec.path).ok()?;
    let changed = file.modified().ok()?.duration_since(UNIX_EPOCH).ok()?.as_nanos();
    let path = fs::canonicalize(&spec.path).ok()?;
    let LoadSpec { kv, flash_attention, repack, .. } = spec;
    let version = concat!(env!("CARGO_PKG_VERSION"), " with llama-cpp-4 0.11.0");
    Some(format!("{} {} {changed} {version} {kv:?} {flash_attention} {repack}", path.display(), file.len()))
}

fn read_note(path: PathBuf, key: &str) -> Option<Parked> {
    let note = fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Note>(&text).ok());
    match note {
        Some(Note { key: of, tokens, bytes, crc32 }) if of == key => {
            let tokens = tokens.into_iter().map(LlamaToken).collect();
            Some(Parked { note: path, tokens, bytes, crc32 })
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
