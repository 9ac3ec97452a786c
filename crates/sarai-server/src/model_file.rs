//! A GGUF file on disk: the header of all its parts, and an identity that costs no hashing of gigabytes.

use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use sarai_core::{MediaKind, Purpose, REASONING_EFFORT, split};
use sarai_plan::{Companions, GgufError, Header, projector};
use sha2::{Digest, Sha256};
use thiserror::Error;

/// A file that cannot be used.
#[derive(Debug, Error)]
pub enum FileError {
    /// It is not there, or not ours to read.
    #[error("{} cannot be opened ({source}): put the file there or correct the path", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// It is no GGUF, or a broken one.
    #[error("{}: {source}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: GgufError,
    },
}

/// What is known of a GGUF file that was read.
#[derive(Debug)]
pub struct ModelFile {
    /// The first part, which llama.cpp is given.
    pub path: PathBuf,
    /// The header, with the tensors of all parts.
    pub header: Header,
    /// Size in bytes of all parts.
    pub size: u64,
    /// Last change of the first part.
    pub modified: SystemTime,
    /// Of path, size, time and shape.
    pub identity: String,
    /// What it is loaded with.
    pub companions: Companions<Arc<ModelFile>>,
    first_size: u64,
}

impl ModelFile {
    /// Reads the header: milliseconds, but do it where blocking is fine.
    ///
    /// # Errors
    /// It is missing, truncated, or no GGUF.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let broken = |path: &Path| {
            let path = path.to_owned();
            move |source| FileError::Broken { path, source }
        };
        let (first, mut size, modified) = open(path)?;
        let first_size = size;
        let mut header = Header::read(first).map_err(broken(path))?;
        header.check_length(size).map_err(broken(path))?;
        // llama.cpp loads all parts of a split model when it is given the first.
        let count = header.int("split.count").unwrap_or(1);
        let parts = if count > 1 { split::parts(path) } else { Vec::new() };
        if count > 1 && usize::try_from(count) != Ok(parts.len()) {
            return Err(broken(path)(GgufError::Renamed(count)));
        }
        for part in parts.into_iter().skip(1) {
            let (next, length, _) = open(&part)?;
            let next = Header::read(next).map_err(broken(&part))?;
            next.check_length(length).map_err(broken(&part))?;
            header.tensors.extend(next.tensors);
            size += length;
        }
        let since = modified.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let identity = format!("{} {size} {} {}", path.display(), since.as_nanos(), header.tensors.len());
        let identity = hex(&Sha256::digest(identity));
        Ok(Self {
            path: path.to_owned(),
            header,
            size,
            modified,
            identity,
            companions: Companions::default(),
            first_size,
        })
    }

    /// Reads a model and what it is loaded with; what is learned of all together is kept apart from what is learned of the model
    /// alone.
    ///
    /// # Errors
    /// One of them cannot be read, or is not what it is named as.
    pub fn read_with(path: &Path, with: Companions<&Path>) -> Result<Self, FileError> {
        let mut file = Self::read(path)?;
        if let Some(path) = with.projector {
            let projector = Self::read(path)?;
            if projector.header.architecture() != "clip" {
                let source = GgufError::NotAProjector(projector.header.architecture().to_owned());
                return Err(FileError::Broken { path: path.to_owned(), source });
            }
            file.identity = hex(&Sha256::digest(format!("{} {}", file.identity, projector.identity)));
            file.companions.projector = Some(Arc::new(projector));
        }
        if let Some(path) = with.draft {
            let draft = Self::read(path)?;
            let broken = |source| FileError::Broken { path: path.to_owned(), source };
            sarai_plan::draft::check(&draft.header, &file.header).map_err(broken)?;
            file.identity = hex(&Sha256::digest(format!("{} drafted by {}", file.identity, draft.identity)));
            file.companions.draft = Some(Arc::new(draft));
        }
        Ok(file)
    }

    /// Whether it can see, or hear: what its projector says of itself.
    pub fn senses(&self, kind: MediaKind) -> bool {
        self.projector_header().is_some_and(|projector| projector::senses(projector, kind))
    }

    /// The projector's header.
    pub fn projector_header(&self) -> Option<&Header> {
        self.with().projector
    }

    /// The headers of what it is loaded with.
    pub fn with(&self) -> Companions<&Header> {
        let Companions { projector, draft } = &self.companions;
        Companions {
            projector: projector.as_ref().map(|file| &file.header),
            draft: draft.as_ref().map(|file| &file.header),
        }
    }

    /// What it is made for.
    pub fn purpose(&self) -> Purpose {
        sarai_plan::layers::purpose(&self.header)
    }

    /// Whether its chat template shows tools to the model.
    pub fn knows_tools(&self) -> bool {
        // Where tools are given, llama.cpp takes the second one if there is one.
        let templates = ["tokenizer.chat_template", "tokenizer.chat_template.tool_use"];
        templates.iter().filter_map(|key| self.header.text(key)).any(sarai_api::tools::are_shown_by)
    }

    /// Whether its chat template tells it how hard to reason.
    pub fn knows_effort(&self) -> bool {
        self.header.text("tokenizer.chat_template").is_some_and(|template| template.contains(REASONING_EFFORT))
    }

    /// Whether its chat template has it reason before it answers.
    pub fn reasons(&self) -> bool {
        sarai_api::tools::reasons(self.header.text("tokenizer.chat_template").unwrap_or_default())
    }

    /// Whether the file still is as it was read.
    pub fn is_unchanged(&self) -> bool {
        let meta = std::fs::metadata(&self.path);
        let is_same = meta
            .is_ok_and(|meta| meta.len() == self.first_size && meta.modified().is_ok_and(|time| time == self.modified));
        let mut with = self.companions.projector.iter().chain(&self.companions.draft);
        is_same && with.all(|file| file.is_unchanged())
    }
}

fn open(path: &Path) -> Result<(BufReader<std::fs::File>, u64, SystemTime), FileError> {
    let missing = |source| FileError::Missing { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(missing)?;
    let meta = file.metadata().map_err(missing)?;
    let modified = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    Ok((BufReader::with_capacity(1 << 18, file), meta.len(), modified))
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// llama.cpp takes the second template where tools are given.
    #[test]
    fn tools_are_known_by_either_template() {
        let with = |key: &str, template: &str| {
            let mut header = Header::default();
            header.metadata.insert(key.into(), sarai_plan::gguf::Value::Text(template.into()));
            ModelFile {
                path: PathBuf::new(),
                header,
                size: 0,
                modified: SystemTime::UNIX_EPOCH,
                identity: String::new(),
                companions: Companions::default(),
                first_size: 0,
            }
        };
        let shows = "{% for tool in tools %}{{ tool }}{% endfor %}";
        assert!(with("tokenizer.chat_template", shows).knows_tools());
        assert!(with("tokenizer.chat_template.tool_use", shows).knows_tools());
        assert!(!with("tokenizer.chat_template.rag", shows).knows_tools());
        assert!(!with("tokenizer.chat_template.tool_use", "{{ messages }}").knows_tools());
    }
}
