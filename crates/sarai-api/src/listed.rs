//! What a host lists of its models.

use sarai_core::Api;
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
}
