//! The models by name, and what their files say.

use std::collections::HashMap;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use sarai_api::ollama::ModelFacts;
use sarai_core::Error;
use sarai_plan::{EngineId, GgufError, Header, Plan};
use sha2::{Digest, Sha256};

use crate::config::{Config, Deployment, Engine, Model};

/// All models and engines of the configuration.
#[derive(Debug)]
pub struct Catalog {
    /// Public models, in the order of the file.
    pub models: Vec<Model>,
    /// By [`EngineId`].
    pub engines: Arc<[Engine]>,
    files: Mutex<HashMap<EngineId, Arc<File>>>,
}

/// What is known of a GGUF file that was read.
#[derive(Debug)]
pub struct File {
    /// Its header.
    pub header: Header,
    /// What a load would take.
    pub plan: Plan,
    /// Size in bytes.
    pub size: u64,
    /// Last change.
    pub modified: SystemTime,
    /// Of its path, size, time and shape: identifies the file without hashing gigabytes.
    pub digest: String,
}

impl Catalog {
    /// The models of a configuration.
    pub fn new(config: &Config) -> Self {
        Self { models: config.models.clone(), engines: config.engines.clone().into(), files: Mutex::default() }
    }

    /// Finds a model by name or alias; Ollama's clients may add `:latest`.
    ///
    /// # Errors
    /// [`Error::UnknownModel`] with the names that exist.
    pub fn find(&self, name: &str) -> Result<&Model, Error> {
        let named = |wanted: &str| {
            self.models.iter().find(|model| model.name == wanted || model.aliases.iter().any(|alias| alias == wanted))
        };
        named(name).or_else(|| named(name.strip_suffix(":latest")?)).ok_or_else(|| Error::UnknownModel {
            name: name.to_owned(),
            known: self.models.iter().map(|model| model.name.clone()).collect(),
        })
    }

    /// The file of an engine, read anew when it has changed. Reads a header: call it where blocking is fine.
    ///
    /// # Errors
    /// [`Error::Unavailable`]: it is missing, truncated, or no GGUF.
    pub fn file(&self, id: EngineId) -> Result<Arc<File>, Error> {
        let engine = &self.engines[id.0];
        let unavailable = |reason: String| Error::Unavailable { model: engine.label.clone(), reason };
        let meta = std::fs::metadata(&engine.path).map_err(|error| {
            unavailable(format!(
                "{} cannot be opened ({error}): put the file there or correct gguf_path",
                engine.path.display()
            ))
        })?;
        let (modified, size) = (meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), meta.len());
        let cached = self.files.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        if let Some(file) = cached.filter(|file| (file.modified, file.size) == (modified, size)) {
            return Ok(file);
        }
        let header = read_header(&engine.path, size)
            .map_err(|error| unavailable(format!("{}: {error}", engine.path.display())))?;
        let file = Arc::new(File {
            plan: Plan::of(&header, engine.settings),
            digest: digest(&engine.path, size, modified, &header),
            header,
            size,
            modified,
        });
        self.files.lock().unwrap_or_else(PoisonError::into_inner).insert(id, Arc::clone(&file));
        Ok(file)
    }

    /// What the lists say of a model; of a file that cannot be read, only the name.
    pub fn facts(&self, model: &Model) -> ModelFacts {
        let local = model.deployments.iter().find_map(|deployment| match deployment {
            Deployment::Local { engine, .. } => self.file(*engine).ok(),
            Deployment::Ollama { .. } => None,
        });
        let Some(file) = local else {
            // Clients show the first digits of a digest, so there must be some.
            let digest = hex(&Sha256::digest(&model.name));
            return ModelFacts { name: model.name.clone(), digest, ..ModelFacts::default() };
        };
        ModelFacts {
            name: model.name.clone(),
            size: file.size,
            digest: file.digest.clone(),
            family: file.header.architecture().to_owned(),
            parameter_size: parameter_size(file.header.parameters()),
            quantization: file.header.quantisation().to_owned(),
            modified: Some(file.modified),
        }
    }
}

fn read_header(path: &Path, size: u64) -> Result<Header, GgufError> {
    let mut header = Header::read(BufReader::with_capacity(1 << 16, std::fs::File::open(path)?))?;
    header.check_length(size)?;
    // llama.cpp loads all parts of a split model when it is given the first.
    for part in split_parts(path, header.int("split.count").unwrap_or(1)) {
        let file = std::fs::File::open(&part)?;
        let length = file.metadata()?.len();
        let next = Header::read(BufReader::with_capacity(1 << 16, file))?;
        next.check_length(length)?;
        header.tensors.extend(next.tensors);
    }
    Ok(header)
}

/// The paths of the parts after the first: `…-00001-of-00003.gguf` has two more.
fn split_parts(path: &Path, count: i64) -> Vec<PathBuf> {
    let text = path.to_string_lossy();
    let part = |n: i64| text.replace(&format!("-00001-of-{count:05}.gguf"), &format!("-{n:05}-of-{count:05}.gguf"));
    (2..=count.min(1000)).map(|n| PathBuf::from(part(n))).collect()
}

fn digest(path: &Path, size: u64, modified: SystemTime, header: &Header) -> String {
    let since = modified.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let identity = format!("{} {size} {} {}", path.display(), since.as_nanos(), header.tensors.len());
    hex(&Sha256::digest(identity))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
fn parameter_size(parameters: u64) -> String {
    let n = parameters as f64;
    if n >= 1e9 { format!("{:.1}B", n / 1e9) } else { format!("{:.1}M", n / 1e6) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_split_model_are_found_by_their_numbers() {
        let parts = split_parts(Path::new("/m/big-00001-of-00003.gguf"), 3);
        assert_eq!(parts, ["/m/big-00002-of-00003.gguf", "/m/big-00003-of-00003.gguf"].map(PathBuf::from));
        assert!(split_parts(Path::new("/m/one.gguf"), 1).is_empty());
    }
}
