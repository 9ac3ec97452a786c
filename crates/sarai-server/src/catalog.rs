//! The models by name, and what their files say.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use sarai_api::ollama::ModelFacts;
use sarai_core::Error;
use sarai_plan::EngineId;
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use crate::config::{Config, Deployment, Engine, Model, Remote};
use crate::machine::process::{self, Memory};
use crate::model_file::{ModelFile, hex};
use crate::source::Source;

/// All models and engines of the configuration.
#[derive(Debug)]
pub struct Catalog {
    /// Public models, in the order of the file.
    pub models: Vec<Arc<Model>>,
    /// By [`EngineId`].
    pub engines: Arc<[Engine]>,
    files: Mutex<HashMap<EngineId, Arc<ModelFile>>>,
}

/// The catalog as it is now: another one takes its place when the configuration is read again.
#[derive(Clone, Debug)]
pub struct Catalogs(watch::Receiver<Arc<Catalog>>);

impl Catalogs {
    /// The first catalog, and where its successors are put.
    pub fn new(first: Catalog) -> (watch::Sender<Arc<Catalog>>, Self) {
        let (sender, receiver) = watch::channel(Arc::new(first));
        (sender, Self(receiver))
    }

    /// The one that counts now.
    pub fn now(&self) -> Arc<Catalog> {
        Arc::clone(&self.0.borrow())
    }
}

/// What Ollama adds to a name without a tag.
const TAG: &str = ":latest";

/// A name as it is told apart where case and tag do not count.
fn untagged(name: &str) -> String {
    let name = name.to_ascii_lowercase();
    name.strip_suffix(TAG).map(str::to_owned).unwrap_or(name)
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

    /// The models of another configuration. Engines keep their ids: those of the same file have the same one, new ones
    /// come after all others, and those that no model uses any more stay, to be unloaded.
    pub fn succeeding(config: &Config, old: &Self) -> Self {
        let mut engines = old.engines.to_vec();
        let mut ids = Vec::new();
        let mut taken = vec![false; engines.len()];
        for engine in &config.engines {
            let same = (0..taken.len()).find(|&id| !taken[id] && engines[id].is_same_place(engine));
            match same {
                Some(id) => {
                    taken[id] = true;
                    engines[id] = engine.clone();
                    ids.push(EngineId(id));
                }
                None => {
                    engines.push(engine.clone());
                    ids.push(EngineId(engines.len() - 1));
                }
            }
        }
        for (engine, _) in engines.iter_mut().zip(taken).filter(|(_, taken)| !taken) {
            engine.retire();
        }
        let model = |model: &Model| {
            let mut model = model.clone();
            for deployment in &mut model.deployments {
                if let Deployment::Local { engine, .. } | Deployment::Process { engine, .. } = deployment {
                    *engine = ids[engine.0];
                }
            }
            Arc::new(model)
        };
        Self { models: config.models.iter().map(model).collect(), engines: engines.into(), files: Mutex::default() }
    }

    /// Finds a model by name or alias; Ollama's clients may add `:latest`, and write it in another case.
    ///
    /// # Errors
    /// [`Error::UnknownModel`] with the names that exist.
    pub fn find(&self, name: &str) -> Result<&Arc<Model>, Error> {
        let named = |wanted: &str| {
            self.models.iter().find(|model| model.name == wanted || model.aliases.iter().any(|alias| alias == wanted))
        };
        let in_any_case = || {
            let wanted = untagged(name);
            self.models.iter().find(|model| {
                untagged(&model.name) == wanted || model.aliases.iter().any(|alias| untagged(alias) == wanted)
            })
        };
        let found = named(name).or_else(|| named(name.strip_suffix(TAG)?)).or_else(in_any_case);
        found.ok_or_else(|| Error::UnknownModel {
            name: name.to_owned(),
            known: self.models.iter().map(|model| model.name.clone()).collect(),
        })
    }

    /// A model, and those that it falls back to.
    pub fn with_fallbacks<'a>(&'a self, model: &'a Model) -> impl Iterator<Item = &'a Model> {
        let others = model.fallback_models.iter().filter_map(|name| self.find(name).ok());
        [model].into_iter().chain(others.map(|other| &**other))
    }

    /// Every deployment on a host, with its model.
    pub fn remotes(&self) -> impl Iterator<Item = (&Arc<Model>, &Remote)> {
        self.models.iter().flat_map(|model| {
            model.deployments.iter().filter_map(move |deployment| match deployment {
                Deployment::Remote(remote) => Some((model, remote)),
                Deployment::Local { .. } | Deployment::Process { .. } => None,
            })
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
        let file = ModelFile::read_with(&engine.path, engine.with());
        let file = Arc::new(file.map_err(|error| unavailable(error.to_string()))?);
        self.files.lock().unwrap_or_else(PoisonError::into_inner).insert(id, Arc::clone(&file));
        Ok(file)
    }

    /// The file of an engine as it was read last, if it was.
    pub fn known_file(&self, id: EngineId) -> Option<Arc<ModelFile>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// What an engine is loaded from. Blocks as [`Self::file`] does.
    ///
    /// # Errors
    /// As [`Self::file`].
    pub fn source(&self, id: EngineId) -> Result<Source, Error> {
        match &self.engines[id.0].process {
            Some(process) => Ok(Source::Process(Arc::clone(process))),
            None => self.file(id).map(Source::File),
        }
    }

    /// Measures what serves an engine: a worker is one process, a command a tree of them.
    pub fn measure(&self, id: EngineId, pid: u32, one: impl Fn(u32) -> Option<Memory>) -> Option<Memory> {
        if self.engines[id.0].process.is_some() { process::of_tree(pid, one) } else { one(pid) }
    }

    /// What the lists say of a model; of a file that cannot be read, only the name.
    pub fn facts(&self, model: &Model) -> ModelFacts {
        let local = model.deployments.iter().find_map(|deployment| match deployment {
            Deployment::Local { engine, .. } => self.file(*engine).ok(),
            Deployment::Remote(_) | Deployment::Process { .. } => None,
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
