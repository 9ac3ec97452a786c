//! What a host lists of its models.

use sarai_core::{Api, MediaKind};
use serde_json::Value;

/// Names of the models that stand in a host's list.
#[must_use]
pub fn names(api: Api, listed: &Value) -> Vec<String> {
    entries(api, listed).map(|(name, _)| name).collect()
}

/// Names of those that are loaded: all that Ollama's `/api/ps` lists. OpenAI's API has no word for it; llama.cpp's router has, beside
/// each of its models. `None` where the host does not say.
#[must_use]
pub fn loaded(api: Api, listed: &Value) -> Option<Vec<String>> {
    match api {
        Api::Ollama => listed["models"].is_array().then(|| names(api, listed)),
        Api::OpenAi => {
            let states: Vec<_> = entries(api, listed)
                .filter_map(|(name, entry)| Some((name, entry["status"]["value"].as_str()? == "loaded")))
                .collect();
            let loaded = || states.iter().filter(|(_, is_loaded)| *is_loaded).map(|(name, _)| name.clone()).collect();
            (!states.is_empty()).then(loaded)
        }
    }
}

/// What a model of a host of OpenAI's API senses beside text, in Ollama's words, where the host says it: llama.cpp's server and OpenRouter do.
#[must_use]
pub fn senses(listed: &Value, model: &str) -> Option<Vec<String>> {
    let (_, entry) = entries(Api::OpenAi, listed).find(|(name, _)| name == model)?;
    let modalities = entry["architecture"]["input_modalities"].as_array()?;
    let kinds = [("image", MediaKind::Image), ("audio", MediaKind::Audio)];
    let sensed = kinds.iter().filter(|(name, _)| modalities.iter().any(|modality| modality == name));
    Some(sensed.map(|(_, kind)| kind.capability().to_owned()).collect())
}

fn entries(api: Api, listed: &Value) -> impl Iterator<Item = (String, &Value)> {
    let (list, name) = match api {
        Api::Ollama => ("models", "name"),
        Api::OpenAi => ("data", "id"),
    };
    let entries = listed[list].as_array().into_iter().flatten();
    entries.filter_map(move |entry| Some((entry[name].as_str()?.to_owned(), entry)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_loaded_is_known_where_the_host_says_it() {
        let ps = json!({ "models": [{ "name": "m:latest" }, { "model": "without a name" }] });
        assert_eq!(loaded(Api::Ollama, &ps), Some(vec!["m:latest".to_owned()]));
        assert_eq!(loaded(Api::Ollama, &json!({ "models": [] })), Some(Vec::new()));
        assert_eq!(loaded(Api::Ollama, &json!({ "error": "no" })), None);
        let plain = json!({ "object": "list", "data": [{ "id": "a", "object": "model" }] });
        assert_eq!((loaded(Api::OpenAi, &plain), names(Api::OpenAi, &plain)), (None, vec!["a".to_owned()]));
        let state = |id: &str, value: &str| json!({ "id": id, "status": { "value": value, "args": [] } });
        let router = json!({ "data": [state("a", "loaded"), state("b", "unloaded"), state("c", "loading"), state("d", "sleeping")] });
        assert_eq!(loaded(Api::OpenAi, &router), Some(vec!["a".to_owned()]));
    }

    #[test]
    fn what_a_model_senses_is_known_where_the_host_says_it() {
        let model =
            |id: &str, modalities: Value| json!({ "id": id, "architecture": { "input_modalities": modalities } });
        let listed = json!({ "data": [model("reads", json!(["text"])), model("all", json!(["text", "image", "audio"])), { "id": "silent" }] });
        assert_eq!(senses(&listed, "reads"), Some(Vec::new()));
        assert_eq!(senses(&listed, "all"), Some(vec!["vision".to_owned(), "audio".to_owned()]));
        assert_eq!((senses(&listed, "silent"), senses(&listed, "none")), (None, None));
    }
}
