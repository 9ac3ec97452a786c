//! What is known of a model: of its file, or what its host says.

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::response::Response;
use sarai_api::ollama::{self, Abilities, parse_model_name};
use sarai_core::{Error, MediaKind};
use sarai_plan::Header;
use serde_json::{Map, Value};

use super::error::Failure;
use super::{App, body, json_response};
use crate::catalog::Catalog;
use crate::config::{Deployment, Model};
use crate::model_file::ModelFile;

/// `POST /api/show`.
pub async fn show(State(app): State<App>, request: Request) -> Result<Response, Failure> {
    let show = async {
        let name = parse_model_name(&body::read(request, &app).await?)?;
        let catalog = &app.gateway.catalog();
        let model = catalog.find(&name)?;
        let file = model.deployments.iter().find_map(|deployment| match deployment {
            Deployment::Local { engine, .. } => catalog.file(*engine).ok(),
            Deployment::Remote(_) | Deployment::Process { .. } => None,
        });
        let mut shown = of_file(catalog, model, file.as_deref());
        let host = if file.is_none() { app.gateway.dispatch.shown(model).await } else { None };
        // What it says of its model, under our name for it.
        host.into_iter().flatten().for_each(|(name, value)| shown[name] = value);
        if let Some(context) = context_of(model) {
            shown["parameters"] = ollama::parameters(context, &model.sampling).into();
        }
        Ok::<_, Error>(json_response(HeaderMap::new(), &shown))
    };
    show.await.map_err(Failure::Ollama)
}

fn of_file(catalog: &Catalog, model: &Model, file: Option<&ModelFile>) -> Value {
    let mut info = file.map(|file| metadata(&file.header)).unwrap_or_default();
    if let Some(file) = file {
        info.entry("general.parameter_count").or_insert_with(|| file.header.parameters().into());
    }
    let template = info.remove("tokenizer.chat_template");
    let template = template.as_ref().and_then(Value::as_str).unwrap_or_default();
    let license = info.get("general.license").cloned().unwrap_or_else(|| "".into());
    let purpose = file.map(ModelFile::purpose).unwrap_or_default();
    let is_sensed = |kind: &MediaKind| file.is_some_and(|file| file.senses(*kind));
    let senses: Vec<_> = [MediaKind::Image, MediaKind::Audio].into_iter().filter(is_sensed).collect();
    let fills_in = file.is_some_and(|file| file.header.fills_in);
    let abilities = Abilities { purpose, senses: &senses, template, fills_in };
    let mut shown = ollama::show(&catalog.facts(model), &abilities, Value::Object(info));
    shown["license"] = license;
    if let Some(projector) = file.and_then(ModelFile::projector_header) {
        shown["projector_info"] = metadata(projector).into();
    }
    shown
}

/// The context that a model is asked with.
fn context_of(model: &Model) -> Option<u32> {
    model.deployments.iter().find_map(|deployment| match deployment {
        Deployment::Local { context_tokens, .. } => Some(*context_tokens),
        Deployment::Remote(remote) => remote.context_tokens,
        Deployment::Process { .. } => None,
    })
}

/// What a header says, but for its long lists.
fn metadata(header: &Header) -> Map<String, Value> {
    use sarai_plan::gguf::Value as Gguf;
    let read = header.metadata.iter().filter_map(|(key, value)| {
        let value = match value {
            Gguf::Int(value) => Value::from(*value),
            Gguf::Float(value) => Value::from(*value),
            Gguf::Text(value) => Value::from(value.as_str()),
            Gguf::Ints(_) | Gguf::Length(_) => return None,
        };
        Some((key.clone(), value))
    });
    read.collect()
}
