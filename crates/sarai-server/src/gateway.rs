//! From a model's name to an answer: find, admit, dispatch.

use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;

use futures_util::StreamExt;
use sarai_api::embed::{self, Embedded};
use sarai_api::{Parsed, Served};
use sarai_core::{Error, Event, GenerateRequest, KeepAlive, Lane, MediaSource, Residence};

use crate::admission::Admission;
use crate::catalog::{Catalog, Catalogs};
use crate::config::{Deployment, Model, ModelRole};
use crate::dispatch::{Answer, Dispatch, Manner, Terms, is_held_back};
use crate::fetch::Fetcher;

/// The entrance for every request, whatever its API.
#[derive(Clone, Debug)]
pub struct Gateway {
    /// All models.
    pub catalogs: Catalogs,
    /// The loop over deployments.
    pub dispatch: Dispatch,
    /// Pictures that are only named.
    pub fetcher: Fetcher,
    /// Permits.
    pub admission: Arc<Admission>,
}

impl Gateway {
    /// Answers a request; the events own its permit.
    ///
    /// # Errors
    /// Whatever keeps it from beginning.
    pub async fn answer(&self, parsed: Parsed, terms: Terms) -> Result<Answer, Error> {
        let model = self.chat_model(&parsed.model)?;
        let answered = pin!(self.answered(&model, parsed, terms));
        terms.within(&model, answered).await
    }

    async fn answered(&self, model: &Arc<Model>, parsed: Parsed, terms: Terms) -> Result<Answer, Error> {
        let arrived = Instant::now();
        let ticket = self.admission.admit(parsed.request.lane).await?;
        let queued = arrived.elapsed();
        let mut request = parsed.request;
        request.sampling = request.sampling.or(&model.sampling);
        request.tells_context &= model.is_of_one_file();
        let missing = self.bring_media(model, &mut request).await;
        let manner = Manner { whole: !parsed.delivery.stream, terms };
        let answer =
            self.dispatch.answer(model, request, manner, &ticket).await.map_err(|error| match (error, missing) {
                // Nobody can answer who needs not see it: why it is not there says more.
                (Error::InvalidRequest { .. }, Some(missing)) => missing,
                (error, _) => error,
            })?;
        let events = answer.events.map(move |event| {
            let _held = &ticket;
            event.map(|event| match event {
                Event::Done { finish, usage, mut timings } => {
                    timings.queue += queued;
                    Event::Done { finish, usage, timings }
                }
                text => text,
            })
        });
        Ok(Answer { served: answer.served, events: Box::pin(events) })
    }

    /// Fetches what a request only names, for workers: hosts of the client's API fetch it themselves, or not. Why it cannot be had, if
    /// it cannot.
    async fn bring_media(&self, model: &Model, request: &mut GenerateRequest) -> Option<Error> {
        if !request.media().any(|media| matches!(media.source, MediaSource::Url(_))) {
            return None;
        }
        let catalog = self.catalog();
        let mut deployments = catalog.with_fallbacks(model).flat_map(|model| &model.deployments);
        match deployments.any(|deployment| !matches!(deployment, Deployment::Remote(_))) {
            true => self.fetcher.bring(request).await.err(),
            false => None,
        }
    }

    /// Makes vectors or scores.
    ///
    /// # Errors
    /// Whatever keeps it from that.
    pub async fn embed(&self, parsed: &embed::Parsed, terms: Terms) -> Result<(Served, Embedded), Error> {
        let model = Arc::clone(self.catalog().find(&parsed.model)?);
        if model.role == ModelRole::Router {
            let message = format!("`{}` chooses models: use a model of role embedding", parsed.model);
            return Err(Error::invalid("model", message));
        }
        if parsed.request.inputs.is_empty() {
            // As Ollama's clients have a model loaded, or unloaded.
            match parsed.keep_alive {
                Some(KeepAlive::For(0)) => self.unload(&parsed.model).await?,
                keep_alive => self.load(&parsed.model, Residence { context_tokens: None, keep_alive }).await?,
            }
            return Ok((Served::default(), Embedded::default()));
        }
        let embedded = pin!(async {
            let arrived = Instant::now();
            let ticket = self.admission.admit(parsed.request.lane).await?;
            let queued = arrived.elapsed();
            let (served, mut embedded) = self.dispatch.embed(&model, parsed, terms, &ticket).await?;
            embedded.timings.queue += queued;
            Ok((served, embedded))
        });
        terms.within(&model, embedded).await
    }

    /// How far a load has come that an answer of this model may wait for, in parts of a hundred; `None` if nothing is being loaded
    /// for it.
    pub async fn loading(&self, name: &str) -> Option<u8> {
        let catalog = self.catalog();
        let model = catalog.find(name).ok()?;
        let engines: Vec<_> = catalog
            .with_fallbacks(model)
            .flat_map(|model| &model.deployments)
            .filter_map(|deployment| Some(deployment.engine()?.0))
            .collect();
        let loading = self.dispatch.pool.snapshot().await?.loading;
        engines.iter().filter_map(|engine| loading.get(engine)).max().copied()
    }

    /// Whether nothing of a streamed answer may come for as long as it is computed, since it is checked first.
    pub fn holds_back(&self, parsed: &Parsed) -> bool {
        let catalog = self.catalog();
        let Ok(model) = catalog.find(&parsed.model) else { return false };
        let mut deployments = catalog.with_fallbacks(model).flat_map(|model| &model.deployments);
        deployments.any(|deployment| deployment.engine().is_some()) && is_held_back(&parsed.request)
    }

    /// Has a model loaded, where its first deployment that can is.
    ///
    /// # Errors
    /// The load was refused or failed.
    pub async fn load(&self, name: &str, residence: Residence) -> Result<(), Error> {
        let model = Arc::clone(self.catalog().find(name)?);
        let _ticket = self.admission.admit(Lane::Interactive).await?;
        self.dispatch.load(&model, residence).await
    }

    /// Unloads a model where it is: a local engine once it is idle; a host is told.
    ///
    /// # Errors
    /// No model has this name, or none of its hosts can be told, and it is nowhere else.
    pub async fn unload(&self, name: &str) -> Result<(), Error> {
        let model = Arc::clone(self.catalog().find(name)?);
        let mut told = Err(None);
        for deployment in &model.deployments {
            let outcome = match (deployment.engine(), deployment) {
                (Some((engine, _)), _) => {
                    self.dispatch.pool.unload(engine);
                    Ok(())
                }
                (None, Deployment::Remote(remote)) => self.dispatch.unload_at(&model, remote).await,
                (None, _) => Ok(()),
            };
            told = told.or_else(|first: Option<Error>| outcome.map_err(|error| first.or(Some(error))));
        }
        told.or_else(|error| error.map_or(Ok(()), Err))
    }

    /// The only model of a role: what is meant where none is named.
    ///
    /// # Errors
    /// There are several, or none.
    pub fn only_model(&self, role: ModelRole) -> Result<String, Error> {
        let catalog = self.catalog();
        let names: Vec<_> = catalog.models.iter().filter(|model| model.role == role).map(|model| &model.name).collect();
        match names[..] {
            [only] => Ok(only.clone()),
            [] => Err(Error::invalid("model", "`model` is missing: name the model")),
            _ => {
                let names = names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
                Err(Error::invalid("model", format!("`model` is missing: name one of {names}")))
            }
        }
    }

    /// The catalog as it is now.
    pub fn catalog(&self) -> Arc<Catalog> {
        self.catalogs.now()
    }

    fn chat_model(&self, name: &str) -> Result<Arc<Model>, Error> {
        let model = Arc::clone(self.catalog().find(name)?);
        let purpose = match model.role {
            ModelRole::Chat => return Ok(model),
            ModelRole::Embedding => "makes vectors (/v1/embeddings)",
            ModelRole::Router => "chooses models",
        };
        Err(Error::invalid("model", format!("`{name}` {purpose} and does not answer: use a model of role chat")))
    }
}
