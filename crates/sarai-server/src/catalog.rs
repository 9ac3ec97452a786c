//! The models by name, and what their files say.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use sarai_api::ollama::ModelFacts;
use sarai_core::Error;
use sarai_plan::EngineId;
use sha2::{Digest, Sha256};

use crate::config::{Config, Deployment, Engine, Model};
use crate::model_file::{ModelFile, hex};

/// All models and engines of the configuration.
#[derive(Debug)]
pub struct Catalog {
    /// Public models, in the order of the file.
    pub models: Vec<Arc<Model>>,
    /// By [`EngineId`].
    pub engines: Arc<[Engine]>,
    files: Mutex<HashMap<EngineId, Arc<ModelFile>>>,
}

impl Catalog {
    /// The models of a configuration.
    pub fn new(config: &Config) -> Self {
        Self {
            models: config.models.iter().cloned().map(Arc::new).collect(),
            engines: config.engines.clone().into(),
            files: Mutex::default(),
        }
    }

    /// Finds a model by name or alias; Ollama's clients may add `:latest`.
    ///
    /// # Errors
    /// [`Error::UnknownModel`] with the names that exist.
    pub fn find(&self, name: &str) -> Result<&Arc<Model>, Error> {
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
    pub fn file(&self, id: EngineId) -> Result<Arc<ModelFile>, Error> {
        let engine = &self.engines[id.0];
        let unavailable = |reason: String| Error::Unavailable { model: engine.label.clone(), reason };
        let cached = self.files.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        if let Some(file) = cached.filter(|file| file.is_unchanged()) {
            return Ok(file);
        }
        let file = Arc::new(ModelFile::read(&engine.path).map_err(|error| unavailable(error.to_string()))?);
        self.files.lock().unwrap_or_else(PoisonError::into_inner).insert(id, Arc::clone(&file));
        Ok(file)
    }

    /// What the lists say of a model; of a file that cannot be read, only the name.
    pub fn facts(&self, model: &Model) -> ModelFacts {
        let local = model.deployments.iter().find_map(|deployment| match deployment {
            Deployment::Local { engine, .. } => self.file(*engine).ok(),
            Deployment::Remote(_) => None,
        });
        let Some(file) = local else {
            // Clients show the first digits of a digest, so there must be some.
            let digest = hex(&Sha256::digest(&model.name));
            return ModelFacts { name: model.name.clone(), digest, ..ModelFacts::default() };
        };
        ModelFacts {
            name: model.name.clone(),
            size: file.size,
            digest: file.identity.clone(),
            family: file.header.architecture().to_owned(),
            parameter_size: parameter_size(file.header.parameters()),
            quantization: file.header.quantisation().to_owned(),
            modified: Some(file.modified),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
fn parameter_size(parameters: u64) -> String {
    let n = parameters as f64;
    if n >= 1e9 { format!("{:.1}B", n / 1e9) } else { format!("{:.1}M", n / 1e6) }
}
