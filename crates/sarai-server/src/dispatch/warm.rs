//! While a host is away, the local fallback of its models is loaded, so that it is ready when it is needed.

use sarai_core::Residence;
use sarai_plan::{Effect, EngineId};
use tokio::sync::mpsc;

use super::Dispatch;
use crate::config::{Deployment, Model, Remote};

/// Loads the fallback of whatever host's breaker opens, for as long as somebody can tell. One at a time, and only where
/// nothing must be evicted for it.
pub async fn warm_fallbacks(dispatch: Dispatch, mut opened: mpsc::Receiver<Remote>) {
    while let Some(remote) = opened.recv().await {
        for model in &dispatch.catalog.models {
            if let Some((engine, context_tokens)) = fallback_of(model, &remote) {
                warm(&dispatch, model, engine, context_tokens).await;
            }
        }
    }
}

/// The worker that answers when this host does not.
fn fallback_of(model: &Model, remote: &Remote) -> Option<(EngineId, u32)> {
    let is_it = |deployment: &&Deployment| matches!(deployment, Deployment::Remote(one) if (&one.url, &one.model_name) == (&remote.url, &remote.model_name));
    model.deployments.iter().find(is_it)?;
    model.deployments.iter().find_map(|deployment| match deployment {
        Deployment::Local { engine, context_tokens } => Some((*engine, *context_tokens)),
        Deployment::Remote(_) => None,
    })
}

async fn warm(dispatch: &Dispatch, model: &Model, engine: EngineId, context_tokens: u32) {
    let Ok(want) = dispatch.want(engine, context_tokens, Residence::default()).await else { return };
    let Some(what_if) = dispatch.pool.what_if(engine, want.clone()).await else { return };
    let is_free = what_if.effects.iter().any(|effect| matches!(effect, Effect::Load(id, _) if *id == engine))
        && !what_if.effects.iter().any(|effect| matches!(effect, Effect::Stop(_) | Effect::Resize(..)));
    if !is_free {
        return;
    }
    let loaded = tokio::time::timeout(model.deadlines.load, dispatch.pool.acquire(engine, want)).await;
    tracing::info!(model = model.name, ready = matches!(loaded, Ok(Ok(_))), "its host is away: fallback warmed");
}
