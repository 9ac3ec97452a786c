//! While a host is away, the local fallback of its models is loaded, so that it is ready when it is needed.

use std::time::Duration;

use sarai_core::{Lane, Residence};
use sarai_plan::{Effect, EngineId, Want};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::Dispatch;
use super::candidates::Candidate;
use crate::catalog::Catalog;
use crate::config::{Deployment, Model, Remote};

/// Loads the fallback of whatever host's breaker opens, for as long as somebody can tell. One at a time, and only where
/// nothing must be evicted for it.
pub async fn warm_fallbacks(dispatch: Dispatch, mut opened: mpsc::Receiver<Remote>) {
    while let Some(remote) = opened.recv().await {
        for model in &dispatch.catalogs.now().models {
            if let Some((engine, context_tokens)) = fallback_of(&dispatch.catalogs.now(), model, &remote) {
                warm(&dispatch, model, engine, context_tokens).await;
            }
        }
    }
}

/// The worker that answers when this host does not: the model's own, or that of the first model it falls back to.
fn fallback_of(catalog: &Catalog, model: &Model, remote: &Remote) -> Option<(EngineId, u32)> {
    let is_it = |deployment: &&Deployment| matches!(deployment, Deployment::Remote(one) if (&one.url, &one.model_name) == (&remote.url, &remote.model_name));
    model.deployments.iter().find(is_it)?;
    catalog.with_fallbacks(model).flat_map(|model| &model.deployments).find_map(Deployment::engine)
}

async fn warm(dispatch: &Dispatch, model: &Model, engine: EngineId, context_tokens: u32) {
    let Ok(want) = dispatch.want(engine, context_tokens, Residence::default()).await else {
        return;
    };
    // Whoever waits for an answer comes first.
    let want = want.in_lane(Lane::Bulk);
    if !is_loaded_for_nothing(dispatch, engine, want.clone()).await {
        return;
    }
    let loaded = tokio::time::timeout(model.deadlines.load, dispatch.pool.acquire(engine, want)).await;
    tracing::info!(model = model.name, ready = matches!(loaded, Ok(Ok(_))), "its host is away: fallback warmed");
}

/// How often it is looked whether a worker can be asked by now: it may be on its way, or somebody may go meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Waits until a worker can be asked without anybody else going for it.
pub async fn until_free(dispatch: &Dispatch, worker: &Candidate, residence: Residence) {
    while !is_free(dispatch, worker, residence).await {
        sleep(LOOK_EVERY).await;
    }
}

async fn is_free(dispatch: &Dispatch, worker: &Candidate, residence: Residence) -> bool {
    let Some((engine, context_tokens)) = worker.deployment().engine() else { return false };
    let Ok(want) = dispatch.want(engine, context_tokens, residence).await else { return false };
    let Some(what_if) = dispatch.pool.what_if(engine, want).await else { return false };
    what_if.is_granted && !what_if.effects.iter().any(|effect| matches!(effect, Effect::Stop(_) | Effect::Resize(..)))
}

/// Whether it is not loaded, and can be with nobody else going for it.
async fn is_loaded_for_nothing(dispatch: &Dispatch, engine: EngineId, want: Want) -> bool {
    let Some(what_if) = dispatch.pool.what_if(engine, want).await else { return false };
    what_if.effects.iter().any(|effect| matches!(effect, Effect::Load(id, _) if *id == engine))
        && !what_if.effects.iter().any(|effect| matches!(effect, Effect::Stop(_) | Effect::Resize(..)))
}
