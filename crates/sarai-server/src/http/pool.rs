//! What the pool holds, why, and what it would do: `/api/pool/*`, `/models/load` and `/models/unload`, `/metrics`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use sarai_api::ollama::{OllamaRequest, parse_generate, parse_model_name};
use sarai_core::{Error, Residence};
use sarai_plan::ledger::Decision;
use sarai_plan::{Effect, EngineId};
use serde_json::{Value, json};

use super::error::{Failure, refusal_body};
use super::{App, body, json_response};
use crate::config::{Deployment, Model};
use crate::dispatch::label;
use crate::health::Known;
use crate::machine;
use crate::metrics;
use crate::pool::{Snapshot, WhatIf};

/// `GET /api/pool/ledger`: what is planned, measured, claimed and free, and the last decisions with their reasons.
///
/// # Units
/// Bytes and milliseconds.
pub async fn ledger(State(app): State<App>) -> Result<Response, Failure> {
    let snapshot = snapshot(&app).await.map_err(Failure::Ollama)?;
    Ok(json_response(HeaderMap::new(), &ledger_body(&app, &snapshot)))
}

async fn snapshot(app: &App) -> Result<Snapshot, Error> {
    app.gateway.dispatch.pool.snapshot().await.ok_or(Error::ShuttingDown)
}

fn ledger_body(app: &App, snapshot: &Snapshot) -> Value {
    let engines = snapshot.rows.iter().map(|row| {
        let worker = snapshot.workers.get(&row.engine);
        json!({
            "models": name(app, row.engine), "state": row.state.name(), "pid": worker.map(|worker| worker.pid),
            "context_tokens": row.context_tokens, "busy": row.busy, "waiting": row.waiting,
            "planned_bytes": row.planned, "planned": row.parts, "claimed_bytes": row.claimed,
            "anonymous_bytes": row.measured.anonymous, "file_bytes": row.measured.file,
            "expires_in_ms": row.expires_at.map(|at| at.saturating_sub(snapshot.now)),
            "loading_percent": snapshot.loading.get(&row.engine),
            "failure": snapshot.failures.get(&row.engine),
        })
    });
    json!({
        "budget_bytes": snapshot.limits.budget, "claimed_bytes": snapshot.claimed,
        "free_bytes": snapshot.limits.budget.less(snapshot.claimed), "server_bytes": snapshot.server,
        "measured_bytes": snapshot.rows.iter().map(|row| row.measured.total()).sum::<sarai_core::Bytes>() + snapshot.server,
        "strategy": snapshot.limits.strategy.name(), "max_concurrent_llms": snapshot.limits.max_concurrent_llms,
        "machine": {
            "limit_bytes": machine::limit(), "available_bytes": snapshot.pressure.available,
            "pressure": snapshot.is_pressed, "full_avg10_percent": snapshot.pressure.full_avg10,
        },
        "engines": engines.collect::<Vec<_>>(), "decisions": decisions(app, snapshot),
    })
}

/// The last decisions, newest first.
pub fn decisions(app: &App, snapshot: &Snapshot) -> Vec<Value> {
    snapshot.decisions.iter().map(|decision| decision_body(app, decision, snapshot.now)).collect()
}

fn name(app: &App, engine: EngineId) -> String {
    app.gateway.catalog().engines.get(engine.0).map(|engine| engine.label.clone()).unwrap_or_default()
}

fn decision_body(app: &App, decision: &Decision, now: u64) -> Value {
    json!({
        "ago_ms": now.saturating_sub(decision.at), "models": name(app, decision.engine),
        "what": decision.what, "why": decision.why,
    })
}

/// `POST /api/pool/plan`: what a request for a model would lead to now, without doing it. The body is that of
/// `/api/generate`: `model`, and if wished `options.num_ctx`.
///
/// # Errors
/// The model is unknown, or its file cannot be used.
pub async fn plan(State(app): State<App>, request: Request) -> Result<Response, Failure> {
    let planned = async {
        let (model, residence) = match parse_generate(&body::read(request, &app).await?)? {
            OllamaRequest::Generate(parsed) => (parsed.model, parsed.request.residence),
            OllamaRequest::Load { model, residence } => (model, residence),
            OllamaRequest::Unload { model } => (model, Residence::default()),
        };
        what_if(&app, &model, residence).await
    };
    planned.await.map(|body| json_response(HeaderMap::new(), &body)).map_err(Failure::Ollama)
}

async fn what_if(app: &App, name: &str, residence: Residence) -> Result<Value, Error> {
    let catalog = app.gateway.catalog();
    let model = catalog.find(name)?;
    let dispatch = &app.gateway.dispatch;
    let mut deployments = Vec::new();
    for deployment in &model.deployments {
        let mut row = match deployment {
            Deployment::Remote(_) => json!({ "verdict": "remote" }),
            Deployment::Local { engine, context_tokens } | Deployment::Process { engine, context_tokens, .. } => {
                match dispatch.want(*engine, *context_tokens, residence).await {
                    Err(error) => json!({ "verdict": "unavailable", "reason": error.to_string() }),
                    Ok(want) => {
                        let needs = want.needed.plan.clone();
                        let what_if = dispatch.pool.what_if(*engine, want).await.ok_or(Error::ShuttingDown)?;
                        let mut row = verdict(app, &what_if);
                        row["needs_bytes"] = json!(needs.total());
                        row["needs"] = json!(needs.parts);
                        row["notes"] = json!(needs.notes);
                        row
                    }
                }
            }
        };
        row["deployment"] = label(model, deployment).into();
        deployments.push(row);
    }
    Ok(json!({ "model": model.name, "deployments": deployments }))
}

fn verdict(app: &App, what_if: &WhatIf) -> Value {
    let has = |wanted: fn(&Effect) -> bool| what_if.effects.iter().any(wanted);
    let refusal = what_if.effects.iter().find_map(|effect| match effect {
        Effect::Refuse(_, refusal) => Some(refusal),
        _ => None,
    });
    let granted = has(|effect| matches!(effect, Effect::Grant(..)));
    let verdict = match refusal {
        Some(_) => "refuse",
        None if !granted => "queue",
        None if has(|effect| matches!(effect, Effect::Stop(_))) => "evict, then load",
        None if has(|effect| matches!(effect, Effect::Resize(..))) => "resize",
        None if has(|effect| matches!(effect, Effect::Load(..))) => "load",
        None => "resident",
    };
    let steps: Vec<_> = what_if
        .decisions
        .iter()
        .map(|step| json!({ "models": name(app, step.engine), "what": step.what, "why": step.why }))
        .collect();
    json!({
        "verdict": verdict, "steps": steps, "free_after_bytes": what_if.free,
        "reason": refusal.map(ToString::to_string), "refusal": refusal.map(|refusal| refusal_body(refusal)),
    })
}

/// `POST /models/load`, as llama.cpp's router has it; answers when the model is loaded.
///
/// # Errors
/// The load was refused or failed.
pub async fn load(State(app): State<App>, request: Request) -> Result<Response, Failure> {
    let loaded = async {
        let name = parse_model_name(&body::read(request, &app).await?)?;
        app.gateway.load(&name, Residence::default()).await
    };
    loaded.await.map(|()| json_response(HeaderMap::new(), &json!({ "success": true }))).map_err(Failure::OpenAi)
}

/// `POST /models/unload`; the model goes when it is idle.
///
/// # Errors
/// The model is unknown.
pub async fn unload(State(app): State<App>, request: Request) -> Result<Response, Failure> {
    let unloaded = async {
        let name = parse_model_name(&body::read(request, &app).await?)?;
        app.gateway.unload(&name).await
    };
    unloaded.await.map(|()| json_response(HeaderMap::new(), &json!({ "success": true }))).map_err(Failure::OpenAi)
}

/// What is known of every remote deployment.
fn hosts(app: &App) -> Vec<(String, Known)> {
    let health = &app.gateway.dispatch.health;
    let catalog = app.gateway.catalog();
    let models = catalog.models.iter();
    let deployments = models.flat_map(|model| model.deployments.iter().map(move |deployment| (model, deployment)));
    let known = |(model, deployment): (&Arc<Model>, &Deployment)| match deployment {
        Deployment::Remote(remote) => Some((label(model, deployment), health.of(remote))),
        Deployment::Local { .. } | Deployment::Process { .. } => None,
    };
    deployments.filter_map(known).collect()
}

/// `GET /metrics`, in Prometheus's text format.
pub async fn metrics(State(app): State<App>) -> Result<Response, Failure> {
    let snapshot = snapshot(&app).await.map_err(Failure::OpenAi)?;
    let text = metrics::render(&snapshot, |engine| name(&app, engine), &hosts(&app), &app.gateway.admission);
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}
