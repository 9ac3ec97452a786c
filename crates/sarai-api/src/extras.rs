//! What a body holds beyond what is read here.

use sarai_core::{Api, Error, Extras, Need, REASONING_EFFORT, Samplers, ToolCall, Tools};
use serde_json::{Map, Value};

use crate::tools::Chosen;
use crate::{check, json, samplers, tools};

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

/// As OpenAI has it.
const MOST_LOGPROBS: u8 = 20;

/// Collects what is left of a body.
pub struct Rest {
    extras: Extras,
    /// The fields that are read.
    read: Map<String, Value>,
    /// Those of them that are kept as they were sent.
    kept: Vec<String>,
    /// Fields that may be lost.
    harmless: Option<&'static [&'static str]>,
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
        Ok(Self {
            extras: Extras { api, fields, options, is_generate: false, needs, degrades },
            read,
            kept: Vec::new(),
            harmless: None,
        })
    }

    /// Those of these fields that are set are needed.
    pub fn need(&mut self, params: &[&str]) {
        for param in params {
            if self.extras.fields.get(*param).is_some_and(|value| !check::is_default(value)) {
                self.need_also(param, format!("`{param}` is not supported"), false);
            }
        }
    }

    /// A field that is not read apart, and is followed all the same.
    pub fn follow(&mut self, name: &str) {
        self.kept.push(name.to_owned());
    }

    /// Reads what else the model's chat template is to know, how hard it reasons among it.
    ///
    /// # Errors
    /// It is no object.
    pub fn template_values(&mut self, is_chat: bool) -> Result<Option<String>, Error> {
        const NAME: &str = "chat_template_kwargs";
        let (mut values, effort_in) = match (self.extras.api, self.field(NAME)) {
            (Api::Ollama, _) => (Map::new(), "think"),
            (Api::OpenAi, None | Some(Value::Null)) => (Map::new(), REASONING_EFFORT),
            (Api::OpenAi, Some(Value::Object(values))) => (values.clone(), REASONING_EFFORT),
            (Api::OpenAi, Some(other)) => {
                return Err(Error::invalid(NAME, format!("`{NAME}` is {other}: use an object")));
            }
        };
        if !is_chat {
            return Ok(None);
        }
        self.follow(NAME);
        if let Some(Value::String(effort)) = self.field(effort_in).filter(|effort| *effort != "none") {
            values.entry(REASONING_EFFORT).or_insert_with(|| effort.as_str().into());
            self.follow(effort_in);
        }
        Ok((!values.is_empty()).then(|| Value::Object(values).to_string()))
    }

    /// Reads llama.cpp's further samplers; hosts of the client's API get them as they were sent.
    ///
    /// # Errors
    /// One of them is out of its range.
    pub fn samplers(&mut self) -> Result<Samplers, Error> {
        let (samplers, followed) = samplers::read(match self.extras.api {
            Api::OpenAi => &self.extras.fields,
            Api::Ollama => &self.extras.options,
        })?;
        followed.into_iter().for_each(|name| self.follow(name));
        Ok(samplers)
    }

    /// A field that was not read.
    pub fn field(&self, name: &str) -> Option<&Value> {
        self.extras.fields.get(name)
    }

    /// Reads tools, and who may be asked with them.
    ///
    /// # Errors
    /// `tool_choice` is wrong.
    pub fn tools(&mut self, is_chat: bool) -> Result<Option<Tools>, Error> {
        let written = match self.field("tools") {
            Some(Value::Array(tools)) if !tools.is_empty() => tools,
            Some(Value::Array(_) | Value::Null) | None => return self.no_tools(),
            Some(other) => return Err(Error::invalid("tools", format!("`tools` is {other}: use an array of tools"))),
        };
        if !is_chat {
            self.need_also("tools", "`tools` is not supported here".into(), false);
            return Ok(None);
        }
        match tools::definitions(written) {
            Ok(mut definitions) => {
                definitions.parallel = self.field("parallel_tool_calls").and_then(Value::as_bool);
                let chosen = tools::choose(definitions, self.field("tool_choice"))?;
                self.need_also("tools", "`tools` is not supported".into(), true);
                Ok(match chosen {
                    Chosen::These(tools) => Some(tools),
                    Chosen::Nothing => None,
                    Chosen::Unknown(lack) => {
                        self.need_also("tool_choice", lack, false);
                        None
                    }
                })
            }
            Err(lack) => {
                self.need_also("tools", lack, false);
                Ok(None)
            }
        }
    }

    /// Without tools, none can have to be called.
    fn no_tools(&self) -> Result<Option<Tools>, Error> {
        match self.field("tool_choice") {
            None | Some(Value::Null) => Ok(None),
            Some(choice) if choice == "auto" || choice == "none" => Ok(None),
            Some(choice) => Err(Error::invalid(
                "tool_choice",
                format!("`tool_choice` is {choice} without `tools`: send the tools too"),
            )),
        }
    }

    /// Reads how many likely tokens are wanted beside each: OpenAI's chats and Ollama have a flag and a count, older completions only a
    /// count.
    ///
    /// # Errors
    /// The count is none, or more than 20.
    pub fn logprobs(&mut self) -> Result<Option<u8>, Error> {
        let wrong = |param: &str, value: &Value| {
            Error::invalid(param, format!("`{param}` is {value}: use a number from 0 to {MOST_LOGPROBS}"))
        };
        let count = |param: &str, value: &Value| {
            let count = value.as_u64().and_then(|count| u8::try_from(count).ok());
            count.filter(|count| *count <= MOST_LOGPROBS).ok_or_else(|| wrong(param, value))
        };
        let set = |name: &str| self.field(name).filter(|value| !value.is_null());
        let top = set("top_logprobs").map(|value| count("top_logprobs", value)).transpose()?;
        let wanted = match (set("logprobs"), top) {
            (Some(Value::Bool(true)), top) => Some(top.unwrap_or(0)),
            (Some(Value::Bool(false)) | None, None | Some(0)) => None,
            (Some(Value::Bool(false)) | None, Some(_)) => {
                return Err(Error::invalid(
                    "top_logprobs",
                    "`top_logprobs` is set without `logprobs`: set `logprobs` to true",
                ));
            }
            (Some(value), _) => Some(count("logprobs", value)?),
        };
        for name in ["logprobs", "top_logprobs"] {
            if self.field(name).is_some_and(|value| !check::is_default(value)) {
                self.need_also(name, format!("`{name}` is not supported"), true);
            }
        }
        Ok(wanted)
    }

    /// Reads whether the model is to reason: Ollama's `think`, which may say how much, and what servers of OpenAI's API have for it.
    ///
    /// # Errors
    /// A field holds something else.
    pub fn think(&mut self) -> Result<Option<bool>, Error> {
        let wrong =
            |param: &str, value: &Value, use_: &str| Error::invalid(param, format!("`{param}` is {value}: use {use_}"));
        let think = match self.extras.api {
            Api::Ollama => match self.field("think") {
                None | Some(Value::Null) => None,
                Some(Value::Bool(think)) => Some(*think),
                Some(Value::String(much)) if ["low", "medium", "high", "max"].contains(&much.as_str()) => Some(true),
                Some(other) => return Err(wrong("think", other, "true, false, \"low\", \"medium\" or \"high\"")),
            },
            Api::OpenAi => {
                let of_template = match self.field("chat_template_kwargs").map(|kwargs| &kwargs["enable_thinking"]) {
                    None | Some(Value::Null) => None,
                    Some(Value::Bool(think)) => Some(*think),
                    Some(other) => {
                        return Err(wrong("chat_template_kwargs.enable_thinking", other, "true or false"));
                    }
                };
                let is_none = self.field("reasoning_effort").is_some_and(|effort| effort == "none");
                of_template.or(is_none.then_some(false))
            }
        };
        if think == Some(true) && self.extras.api == Api::Ollama {
            self.need_also("think", "`think` is not supported".into(), true);
        }
        Ok(think)
    }

    /// Reads the calls in a message, and who may be asked with them.
    pub fn calls(&mut self, param: &str, written: &Value) -> Vec<ToolCall> {
        let calls = tools::calls(written);
        self.need_also(param, format!("`{param}` is not supported"), calls.is_some());
        calls.unwrap_or_default()
    }

    /// Something is lost wherever it is asked.
    pub fn degrade(&mut self, name: &str) {
        self.extras.degrades.push(name.to_owned());
    }

    /// All that is set, but for what is needed and these, is lost where it is not understood.
    pub fn degrades_without(&mut self, harmless: &'static [&'static str]) {
        self.harmless = Some(harmless);
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
            self.kept.push(name.to_owned());
        }
    }

    /// Of Ollama's options, all but those that are read; those in `degrading` change the answer.
    pub fn options(&mut self, options: Map<String, Value>, read: &[&str], degrading: &[&str]) {
        self.extras.options = options;
        self.extras.options.retain(|name, _| !read.contains(&name.as_str()));
        let set = degrading.iter().filter(|name| self.extras.options.contains_key(**name));
        self.extras.degrades = set.map(|name| (*name).to_owned()).collect();
    }

    /// Has a host answer whole where speech is wanted so: pieces of a file cannot be put together here, and in a stream there are other
    /// formats.
    pub fn speech_is_wanted_whole(&mut self) {
        if self.field("audio").is_some_and(|audio| !check::is_default(audio)) {
            self.extras.fields.insert("stream".into(), false.into());
            self.kept.push("stream".into());
        }
    }

    /// Marks Ollama's prompt as one that stands as `prompt`.
    pub fn generate(&mut self) {
        self.extras.is_generate = true;
    }

    /// What there is; with nothing in it, it still says which API the client speaks.
    pub fn finish(mut self) -> Box<Extras> {
        if let Some(harmless) = self.harmless {
            // Last, when all needs are known.
            let Extras { fields, needs, .. } = &self.extras;
            let is_needed = |name: &str| needs.iter().any(|need| need.param == name) || harmless.contains(&name);
            let lost = fields.iter().filter(|(name, value)| !check::is_default(value) && !is_needed(name));
            // What is read is kept for hosts, and not lost here.
            let lost: Vec<_> = lost.map(|(name, _)| name.clone()).filter(|name| !self.kept.contains(name)).collect();
            self.extras.degrades.extend(lost);
        }
        Box::new(self.extras)
    }
}
