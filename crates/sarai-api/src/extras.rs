//! What a body holds beyond what is read here.

use sarai_core::{Api, Error, Extras, Need, ToolCall, Tools};
use serde_json::{Map, Value};

use crate::{check, json, tools};

/// The sampling keys, which both APIs spell the same.
pub const SAMPLING: [&str; 12] = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "seed",
    "repeat_penalty",
    "repeat_last_n",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "logit_bias",
];

/// Collects what is left of a body.
pub struct Rest {
    extras: Extras,
    /// The fields that are read.
    read: Map<String, Value>,
}

impl Rest {
    /// All fields of a body but those that are read.
    ///
    /// # Errors
    /// It is not JSON.
    pub fn of(api: Api, body: &[u8], read: &[&str]) -> Result<Self, Error> {
        let fields: Map<String, Value> = json::parse(body)?;
        let (read, fields) = fields.into_iter().partition(|(name, _)| read.contains(&name.as_str()));
        let (options, needs, degrades) = (Map::new(), Vec::new(), Vec::new());
        Ok(Self { extras: Extras { api, fields, options, is_generate: false, needs, degrades }, read })
    }

    /// Those of these fields that are set are needed.
    pub fn need(&mut self, params: &[&str]) {
        for param in params {
            if self.extras.fields.get(*param).is_some_and(|value| !check::is_default(value)) {
                self.need_also(param, format!("`{param}` is not supported"), false);
            }
        }
    }

    /// A field that was not read.
    pub fn field(&self, name: &str) -> Option<&Value> {
        self.extras.fields.get(name)
    }

    /// Reads tools, and who may be asked with them.
    ///
    /// # Errors
    /// `tool_choice` is wrong.
    pub fn tools(&mut self) -> Result<Option<Tools>, Error> {
        let Some(written) = self.field("tools").and_then(Value::as_array).filter(|tools| !tools.is_empty()) else {
            return Ok(None);
        };
        match tools::definitions(written) {
            Ok(mut definitions) => {
                definitions.parallel = self.field("parallel_tool_calls").and_then(Value::as_bool);
                let chosen = tools::choose(definitions, self.field("tool_choice"))?;
                self.need_also("tools", "`tools` is not supported".into(), true);
                Ok(chosen)
            }
            Err(lack) => {
                self.need_also("tools", lack, false);
                Ok(None)
            }
        }
    }

    /// Reads the calls in a message, and who may be asked with them.
    pub fn calls(&mut self, param: &str, written: &Value) -> Vec<ToolCall> {
        let calls = tools::calls(written);
        self.need_also(param, format!("`{param}` is not supported"), calls.is_some());
        calls.unwrap_or_default()
    }

    /// All that is set, but for what is needed and these, is lost where it is not understood.
    pub fn degrades_without(&mut self, harmless: &[&str]) {
        let Extras { fields, needs, .. } = &self.extras;
        let is_needed = |name: &str| needs.iter().any(|need| need.param == name) || harmless.contains(&name);
        let lost = fields.iter().filter(|(name, value)| !check::is_default(value) && !is_needed(name));
        self.extras.degrades = lost.map(|(name, _)| name.clone()).collect();
    }

    /// Something else is needed.
    pub fn need_also(&mut self, param: &str, lack: String, at_worker: bool) {
        self.extras.needs.push(Need { param: param.to_owned(), lack, at_worker });
    }

    /// Whether anything is needed.
    pub fn is_needy(&self) -> bool {
        !self.extras.needs.is_empty()
    }

    /// Keeps a field as it was sent, although it is read.
    pub fn keep(&mut self, name: &str) {
        if let Some(value) = self.read.remove(name) {
            self.extras.fields.insert(name.to_owned(), value);
        }
    }

    /// Of Ollama's options, all but those that are read; those in `degrading` change the answer.
    pub fn options(&mut self, options: Map<String, Value>, read: &[&str], degrading: &[&str]) {
        self.extras.options = options;
        self.extras.options.retain(|name, _| !read.contains(&name.as_str()));
        let set = degrading.iter().filter(|name| self.extras.options.contains_key(**name));
        self.extras.degrades = set.map(|name| (*name).to_owned()).collect();
    }

    /// Marks Ollama's prompt as one that stands as `prompt`.
    pub fn generate(&mut self) {
        self.extras.is_generate = true;
    }

    /// What there is, if anything.
    pub fn finish(self) -> Option<Box<Extras>> {
        let is_empty = self.extras.fields.is_empty() && self.extras.options.is_empty();
        (!is_empty).then(|| Box::new(self.extras))
    }
}
