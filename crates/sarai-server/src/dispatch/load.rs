//! A model at its places: loaded, let go of, and shown.

use sarai_core::{Api, Attempt, Error, KeepAlive, Lane, Phase, Residence};
use sarai_plan::{EngineId, Want};
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::{Dispatch, failed, label};
use crate::backend::remote;
use crate::config::{Deployment, Model, Remote};

impl Dispatch {
    /// Has the model loaded by the first deployment that can.
    ///
    /// # Errors
    /// None could.
    pub async fn load(&self, model: &Model, residence: Residence) -> Result<(), Error> {
        let mut attempts = Vec::new();
        for deployment in &model.deployments {
            match self.load_at(model, deployment, residence).await {
                Ok(()) => return Ok(()),
                Err(error) => attempts.push(Attempt { deployment: label(model, deployment), error: Box::new(error) }),
            }
        }
        Err(failed(model, attempts))
    }

    async fn load_at(&self, model: &Model, deployment: &Deployment, residence: Residence) -> Result<(), Error> {
        let deadlines = &model.deadlines;
        let late =
            || Error::Deadline { model: model.name.clone(), phase: Phase::Load, seconds: deadlines.load.as_secs() };
        let loaded = async {
            match deployment {
                Deployment::Local { engine, context_tokens } | Deployment::Process { engine, context_tokens, .. } => {
                    let want = self.want(*engine, *context_tokens, residence).await?;
                    self.pool.acquire(*engine, want).await.map(drop)
                }
                Deployment::Remote(remote) => {
                    let context_tokens = residence.context_tokens.or(remote.context_tokens);
                    let place = remote::Place { remote, context_tokens, connect: deadlines.connect };
                    self.hosts.load(&place, residence.keep_alive).await
                }
            }
        };
        let loaded = timeout(deadlines.load, loaded).await.unwrap_or_else(|_| Err(late()));
        loaded.map_err(|error| error.of_model(&model.name))
    }

    /// What the first host of a model says of it, in Ollama's words.
    pub async fn shown(&self, model: &Model) -> Option<Map<String, Value>> {
        let remotes = model.deployments.iter().filter_map(|deployment| match deployment {
            Deployment::Remote(remote) if !self.health.is_open(remote) => Some(remote),
            _ => None,
        });
        for remote in remotes {
            if let Some(shown) = self.hosts.shown(remote, model.deadlines.connect).await {
                return Some(shown);
            }
        }
        None
    }

    /// Has a host let go of a model.
    ///
    /// # Errors
    /// It cannot be told in time.
    pub async fn unload_at(&self, model: &Model, remote: &Remote) -> Result<(), Error> {
        if remote.api == Api::OpenAi {
            let message = format!(
                "`{}` cannot be unloaded: its host speaks OpenAI's API, which has no word for that",
                model.name
            );
            return Err(Error::invalid("keep_alive", message));
        }
        let deadlines = &model.deadlines;
        let place = remote::Place { remote, context_tokens: None, connect: deadlines.connect };
        let told = timeout(deadlines.load, self.hosts.load(&place, Some(KeepAlive::For(0)))).await;
        let (model, seconds) = (model.name.clone(), deadlines.load.as_secs());
        told.unwrap_or(Err(Error::Deadline { model, phase: Phase::Load, seconds }))
    }

    /// What a request needs of an engine: the context that it asks for or that its model has, and what the engine is
    /// usually loaded with.
    ///
    /// # Errors
    /// The engine's file cannot be used.
    pub async fn want(&self, engine: EngineId, context_tokens: u32, residence: Residence) -> Result<Want, Error> {
        let (catalog, planner) = (self.catalogs.now(), self.planner.clone());
        let needed = residence.context_tokens.unwrap_or(context_tokens);
        let want = move || {
            let source = catalog.source(engine)?;
            let settings = catalog.engines[engine.0].settings;
            // What makes vectors has the context that it was loaded with.
            let needed = if source.is_for_answers() { needed } else { settings.context_tokens };
            Ok(Want {
                needed: planner.size(&source, settings, needed),
                usual: planner.size(&source, settings, settings.context_tokens),
                keep_alive: residence.keep_alive,
                lane: Lane::Interactive,
            })
        };
        let made = tokio::task::spawn_blocking(want).await;
        made.unwrap_or_else(|error| Err(Error::Internal(error.to_string())))
    }
}
