//! What the server says of itself: health, readiness, and who is resident.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::future::join_all;
use sarai_api::ollama::process_entry;
use sarai_core::RemoteCause;
use sarai_plan::EngineId;
use serde_json::{Value, json};

use super::{App, json_response};
use crate::catalog::Catalog;
use crate::config::{Deployment, Model, Remote};
use crate::dispatch::label;
use crate::health::is_same;
use crate::machine::process::{Memory, measure};
use crate::pool::Snapshot;

/// How long `ps` waits for a remote host to tell its models.
const ASK_HOST: Duration = Duration::from_secs(1);

/// `GET /health`: the server runs.
pub async fn health() -> Response {
    json_response(HeaderMap::new(), &json!({ "status": "ok" }))
}

/// `GET /ready`: at least one model could answer now.
pub async fn ready(State(app): State<App>) -> Response {
    let hosts = host_states(&app).await;
    let snapshot = app.gateway.dispatch.pool.snapshot().await;
    let catalog = app.gateway.catalog();
    let states: Vec<_> =
        catalog.models.iter().map(|model| model_state(&app, model, snapshot.as_ref(), &hosts)).collect();
    let ready = states.iter().any(|state| state["available"] == true);
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, json_response(HeaderMap::new(), &json!({ "ready": ready, "models": states }))).into_response()
}

/// `GET /api/ps`: Ollama's list of resident models, with the ledger and every model's state under `sarai`.
pub async fn ps(State(app): State<App>) -> Response {
    let hosts = host_states(&app).await;
    let Some(snapshot) = app.gateway.dispatch.pool.snapshot().await else {
        return json_response(HeaderMap::new(), &json!({ "models": [] }));
    };
    let catalog = &app.gateway.catalog();
    let memory = measure_all(catalog, &snapshot).await;
    let mut resident = Vec::new();
    for model in &catalog.models {
        for deployment in &model.deployments {
            let Some((engine, context_tokens)) = deployment.engine() else { continue };
            let Some(worker) = snapshot.workers.get(&engine) else { continue };
            let measured = memory.get(&engine).copied().unwrap_or_default();
            let sarai = worker_row(&snapshot, engine, worker.pid, measured);
            let context = worker.info.context_tokens.min(context_tokens);
            let expires = snapshot.rows[engine.0].expires_at;
            let expires = expires.map(|at| SystemTime::now() + Duration::from_millis(at.saturating_sub(snapshot.now)));
            resident.push(process_entry(&catalog.facts(model), measured.total().0, context, expires, sarai));
        }
    }
    let states: Vec<_> = catalog.models.iter().map(|model| model_state(&app, model, Some(&snapshot), &hosts)).collect();
    let workers = snapshot.workers.iter().map(|(engine, worker)| {
        let mut row = worker_row(&snapshot, *engine, worker.pid, memory.get(engine).copied().unwrap_or_default());
        row["models"] = catalog.engines.get(engine.0).map(|engine| engine.label.clone()).into();
        row
    });
    let server = measure(std::process::id()).unwrap_or_default();
    let sarai = json!({
        "budget_bytes": snapshot.limits.budget, "claimed_bytes": snapshot.claimed,
        "free_bytes": snapshot.limits.budget.less(snapshot.claimed),
        "max_concurrent_llms": snapshot.limits.max_concurrent_llms,
        "server_bytes": snapshot.server, "strategy": snapshot.limits.strategy.name(), "pressure": snapshot.is_pressed,
        "decisions": super::pool::decisions(&app, &snapshot),
        "requests": { "in_flight": app.gateway.admission.in_flight(), "queued": app.gateway.admission.queued() },
        "server": { "anonymous_bytes": server.anonymous, "file_bytes": server.file },
        "workers": workers.collect::<Vec<_>>(), "models": states,
    });
    json_response(HeaderMap::new(), &json!({ "models": resident, "sarai": sarai }))
}

fn worker_row(snapshot: &Snapshot, engine: EngineId, pid: u32, memory: Memory) -> Value {
    let row = &snapshot.rows[engine.0];
    json!({
        "pid": pid, "state": row.state.name(), "busy": row.busy, "planned_bytes": row.planned,
        "claimed_bytes": row.claimed, "anonymous_bytes": memory.anonymous, "file_bytes": memory.file,
    })
}

async fn measure_all(catalog: &Arc<Catalog>, snapshot: &Snapshot) -> HashMap<EngineId, Memory> {
    let pids: Vec<_> = snapshot.workers.iter().map(|(engine, worker)| (*engine, worker.pid)).collect();
    let catalog = Arc::clone(catalog);
    let measured = move |(engine, pid)| Some((engine, catalog.measure(engine, pid, measure)?));
    let all = move || pids.into_iter().filter_map(measured).collect();
    tokio::task::spawn_blocking(all).await.unwrap_or_default()
}

type HostStates = HashMap<String, Result<Vec<String>, RemoteCause>>;

/// Asks every remote host for its models, all at once.
async fn host_states(app: &App) -> HostStates {
    let catalog = app.gateway.catalog();
    let mut remotes: Vec<(&Remote, Duration)> = Vec::new();
    for (model, remote) in catalog.remotes() {
        if !remotes.iter().any(|(known, _)| known.url == remote.url) {
            remotes.push((remote, model.deadlines.connect));
        }
    }
    let asked = remotes.into_iter().map(|(remote, connect)| async move {
        let models = tokio::time::timeout(ASK_HOST, app.gateway.dispatch.hosts.models(remote, connect)).await;
        let late = || RemoteCause::Unreachable(format!("no answer within {} s", ASK_HOST.as_secs()));
        (remote.url.clone(), models.unwrap_or_else(|_| Err(late())))
    });
    join_all(asked).await.into_iter().collect()
}

fn model_state(app: &App, model: &Model, snapshot: Option<&Snapshot>, hosts: &HostStates) -> Value {
    let mut deployments = Vec::new();
    for deployment in &model.deployments {
        let (state, reason) = match deployment {
            Deployment::Local { engine, .. } | Deployment::Process { engine, .. } => {
                local_state(app, *engine, snapshot)
            }
            Deployment::Remote(remote) => {
                let state = remote_state(&remote.url, &remote.model_name, hosts);
                match state {
                    // Its list is no proof.
                    ("up", _) if app.gateway.dispatch.health.is_open(remote) => {
                        let last = app.gateway.dispatch.health.of(remote).last;
                        ("failing", last.map(|error| error.to_string()))
                    }
                    state => state,
                }
            }
        };
        let mut row = json!({ "deployment": label(model, deployment), "state": state, "reason": reason });
        if let Deployment::Remote(remote) = deployment {
            app.gateway.dispatch.health.look(remote);
            let known = app.gateway.dispatch.health.of(remote);
            row["breaker"] = known.state.name().into();
            row["outstanding"] = known.outstanding.into();
            row["loaded"] = known.is_loaded.into();
            row["round_trip_ms"] = known.round_trip.map(|time| time.as_secs_f64() * 1e3).into();
            row["wan"] = known.is_far.into();
        }
        deployments.push(row);
    }
    let usable = |state: &Value| {
        ["resident", "loading", "resizing", "absent", "stopping", "up"].iter().any(|s| state["state"] == *s)
    };
    json!({ "name": model.name, "available": deployments.iter().any(usable), "deployments": deployments })
}

fn local_state(app: &App, engine: EngineId, snapshot: Option<&Snapshot>) -> (&'static str, Option<String>) {
    let row = snapshot.map(|snapshot| &snapshot.rows[engine.0]);
    match row.map_or("absent", |row| row.state.name()) {
        "absent" => match app.gateway.catalog().source(engine) {
            Ok(_) => ("absent", snapshot.and_then(|snapshot| snapshot.failures.get(&engine).cloned())),
            Err(error) => ("unavailable", Some(error.to_string())),
        },
        state => (state, None),
    }
}

fn remote_state(url: &str, model_name: &str, hosts: &HostStates) -> (&'static str, Option<String>) {
    match hosts.get(url) {
        Some(Ok(models)) if models.iter().any(|name| is_same(name, model_name)) => ("up", None),
        Some(Ok(_)) => {
            ("model missing", Some(format!("host {url} {}", RemoteCause::ModelMissing(model_name.to_owned()))))
        }
        Some(Err(cause)) => ("down", Some(format!("host {url} {cause}"))),
        None => ("unknown", None),
    }
}
