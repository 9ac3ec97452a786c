//! The drill: every fault of a host, played against a configuration, and what a client would have seen.
//!
//! The first host of the model is replaced by one that has the fault, its other hosts by healthy ones; what is local is
//! as configured. Each cell has hosts of its own, so that no breaker knows them yet.

mod upstream;
mod verdict;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use sarai_core::Api;
use serde_json::json;

use crate::config::{Config, Deployment, Model, Remote};
use crate::dispatch::label;
use crate::server::{Server, ServerError};
pub use upstream::Fault;
use upstream::Upstream;
use verdict::{Seen, judge};
pub use verdict::{Shape, Verdict};

/// How long one cell may take beyond the deadlines of a host and the load of a fallback.
const CELL_SECONDS: u64 = 30;
/// Most of a cell is waiting, and each has hosts of its own.
const CELLS_AT_ONCE: usize = 4;

/// What to drill.
#[derive(Clone, Debug)]
pub struct Drill {
    /// The model, which has a host.
    pub model: String,
    /// Deadline of a host's first token, so that hanging ones do not take minutes.
    pub first_token: Duration,
    /// Deadline between two tokens.
    pub gap: Duration,
    /// Tokens that are asked for.
    pub max_tokens: u32,
}

/// One cell of the table.
#[derive(Clone, Debug)]
pub struct Cell {
    /// What the host does wrong.
    pub fault: Fault,
    /// How the client asked.
    pub shape: Shape,
    /// What it saw.
    pub verdict: Verdict,
    /// How long that took.
    pub took: Duration,
}

/// Models with a host.
pub fn models(config: &Config) -> impl Iterator<Item = &Model> {
    config.models.iter().filter(|model| model.deployments.iter().any(|d| matches!(d, Deployment::Remote(_))))
}

/// Plays all faults; `tell` hears of each cell as it comes.
///
/// # Errors
/// The server cannot be started.
pub async fn run(
    config: Config,
    drill: &Drill,
    executable: PathBuf,
    mut tell: impl FnMut(&Cell),
) -> Result<Vec<Cell>, ServerError> {
    let mut cells = Vec::new();
    for fault in Fault::ALL {
        for shape in Shape::ALL {
            cells.push(prepare(&config, drill, fault, shape).await?);
        }
    }
    let mut staged = config;
    staged.server.listen = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    staged.models.extend(cells.iter().map(|cell| cell.model.clone()));
    // What is learned in a drill is not the truth.
    staged.server.state_dir = std::env::temp_dir().join(format!("sarai-drill-{}", std::process::id()));
    let state_dir = staged.server.state_dir.clone();
    let server = Server::start(staged, executable, None).await?;
    let url = format!("http://{}", server.address().map_err(ServerError::Serve)?);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(server.serve(async { drop(stopped.await) }));
    let client = reqwest::Client::builder().no_proxy().build()?;
    let mut outcomes = Vec::new();
    {
        let played = cells.iter().map(|cell| play(&client, &url, cell, drill));
        let mut played = stream::iter(played).buffered(CELLS_AT_ONCE);
        while let Some(outcome) = played.next().await {
            tell(&outcome);
            outcomes.push(outcome);
        }
    }
    drop(stop);
    let _ = serving.await;
    let _ = std::fs::remove_dir_all(state_dir);
    Ok(outcomes)
}

async fn play(client: &reqwest::Client, url: &str, cell: &Staged, drill: &Drill) -> Cell {
    let started = tokio::time::Instant::now();
    let limit = drill.first_token + drill.gap + cell.model.deadlines.load + Duration::from_secs(CELL_SECONDS);
    let asked = tokio::time::timeout(limit, ask(client, url, cell, drill)).await;
    let verdict = match asked {
        Ok(seen) => judge(cell.shape, cell.fault, &cell.faulty, &seen),
        Err(_) => Verdict::Lie(format!("no end within {} s", limit.as_secs())),
    };
    Cell { fault: cell.fault, shape: cell.shape, verdict, took: started.elapsed() }
}

/// A cell that is ready to be played.
struct Staged {
    fault: Fault,
    shape: Shape,
    model: Model,
    /// The deployment with the fault.
    faulty: String,
    /// They end with the cell.
    _hosts: Vec<Arc<Upstream>>,
}

async fn prepare(config: &Config, drill: &Drill, fault: Fault, shape: Shape) -> Result<Staged, ServerError> {
    let original = config.models.iter().find(|model| model.name == drill.model);
    let Some(mut model) = original.cloned() else { return Err(ServerError::NoModel(drill.model.clone())) };
    model.name = format!("{}~{}~{}", drill.model, fault.name(), shape.name());
    model.aliases.clear();
    model.deadlines.first_token = drill.first_token;
    model.deadlines.gap = drill.gap;
    let (mut hosts, mut faulty) = (Vec::new(), None);
    for index in 0..model.deployments.len() {
        let Deployment::Remote(Remote { api, .. }) = model.deployments[index] else { continue };
        let host = start(api, if faulty.is_none() { fault } else { Fault::None }).await?;
        if let Deployment::Remote(remote) = &mut model.deployments[index] {
            remote.url.clone_from(&host.url);
            (remote.api_key, remote.user) = (None, None);
            // All hosts of the drill are looked at at once, by the process that plays them: how far away they seem says nothing.
            remote.wan = true;
            if faulty.is_none() {
                // Hosts that share the load are of one name: by another, it is always asked first.
                remote.model_name = "drill".into();
            }
        }
        faulty.get_or_insert_with(|| label(&model, &model.deployments[index]).replace(&model.name, &drill.model));
        hosts.push(Arc::new(host));
    }
    Ok(Staged { fault, shape, faulty: faulty.unwrap_or_default(), model, _hosts: hosts })
}

async fn start(api: Api, fault: Fault) -> Result<Upstream, ServerError> {
    Upstream::start(api, fault).await.map_err(ServerError::Serve)
}

async fn ask(client: &reqwest::Client, url: &str, cell: &Staged, drill: &Drill) -> Seen {
    let messages = json!([{ "role": "user", "content": "Count to twelve." }]);
    let (path, body) = match cell.shape {
        Shape::OllamaNdjson => (
            "/api/chat",
            json!({ "model": cell.model.name, "messages": messages, "options": { "temperature": 0, "num_predict": drill.max_tokens } }),
        ),
        shape => (
            "/v1/chat/completions",
            json!({ "model": cell.model.name, "messages": messages, "temperature": 0, "max_tokens": drill.max_tokens, "stream": shape == Shape::OpenAiSse }),
        ),
    };
    let sent = client.post(format!("{url}{path}")).body(body.to_string()).send().await;
    let Ok(response) = sent else { return Seen::default() };
    let served_by = response.headers().get("x-sarai-served-by").and_then(|value| value.to_str().ok());
    let served_by = served_by.unwrap_or_default().to_owned();
    let status = response.status().as_u16();
    let mut body = Vec::new();
    let mut pieces = response.bytes_stream();
    while let Some(Ok(piece)) = pieces.next().await {
        body.extend_from_slice(&piece);
    }
    // The copies of the model are nobody's business.
    let body = String::from_utf8_lossy(&body).replace(&cell.model.name, &drill.model);
    Seen { status, served_by: served_by.replace(&cell.model.name, &drill.model), body }
}
