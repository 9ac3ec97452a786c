//! What a client asks for, free of any wire format.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::borrow::Cow;

use crate::media::Media;
use crate::memory::KeepAlive;
use crate::tool::{ToolCall, Tools};
use crate::units::Bytes;

/// Who says a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions to the model (`developer` counts as this).
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool.
    Tool,
}

impl Role {
    /// The name that chat templates and both APIs use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// The text of it.
    pub content: String,
    /// What it shows or lets hear, in the order of the text.
    #[serde(default)]
    pub media: Vec<Media>,
    /// Tools that the model called in it.
    #[serde(default)]
    pub tool_calls: Vec<ToolCall>,
    /// Of a tool's result: whose it is.
    #[serde(default)]
    pub result_of: Option<ResultOf>,
    /// What the model thought before it said this, for templates that show it.
    #[serde(default)]
    pub reasoning: String,
}

/// Which call a message is the result of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResultOf {
    /// The call.
    pub id: Option<String>,
    /// The tool.
    pub name: Option<String>,
}

impl Message {
    /// A message of text.
    #[must_use]
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        let content = content.into();
        Self { role, content, media: Vec::new(), tool_calls: Vec::new(), result_of: None, reasoning: String::new() }
    }
}

/// What the model continues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prompt {
    /// A conversation, rendered by the model's own chat template.
    Chat(Vec<Message>),
    /// Text that reaches the model as it stands, without a template.
    Raw(String),
    /// The same, in the model's own tokens.
    Tokens(Vec<i32>),
}

/// The form that the answer must have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Any text.
    #[default]
    Text,
    /// Any JSON object.
    Json,
    /// JSON that this JSON schema accepts; as text, so that its nesting adds nothing to a frame's.
    Schema(String),
    /// What this grammar, in llama.cpp's GBNF, accepts.
    Gbnf(String),
}

impl Format {
    /// Whether the answer is constrained by a grammar.
    #[must_use]
    pub fn is_constrained(&self) -> bool {
        *self != Self::Text
    }
}

/// How tokens are chosen; `None` leaves the choice to the model's configuration, then to the engine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 is greedy; 0 or more.
    pub temperature: Option<f32>,
    /// Nucleus: the smallest set of tokens with this probability; 0 to 1, 1 is off.
    pub top_p: Option<f32>,
    /// Only the so many likeliest tokens; 0 is off.
    pub top_k: Option<i32>,
    /// Only tokens at least this likely relative to the likeliest; 0 to 1, 0 is off.
    pub min_p: Option<f32>,
    /// Locally typical sampling; 0 to 1, 1 is off.
    pub typical_p: Option<f32>,
    /// Seed of the random choice; `None` draws one.
    pub seed: Option<u32>,
    /// Factor on the logits of recent tokens; above 0, 1 is off.
    pub repeat_penalty: Option<f32>,
    /// How many recent tokens the penalties look at; -1 is the whole context, 0 is none.
    pub repeat_last_n: Option<i32>,
    /// Taken from the logit of every token that occurred; -2 to 2, 0 is off.
    pub presence_penalty: Option<f32>,
    /// Taken from a token's logit once per occurrence; -2 to 2, 0 is off.
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of these token ids; -100 bans, 100 forces.
    pub logit_bias: Vec<(i32, f32)>,
    /// Whether the answer goes on where the model would end it, as llama.cpp's server has it.
    pub ignore_eos: bool,
    /// llama.cpp's further samplers.
    pub further: Samplers,
}

/// llama.cpp's further samplers, by the names that its server has for them; `None` is off, or llama.cpp's own value beside one that is on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Samplers {
    /// Tokens that each sampler leaves at least.
    pub min_keep: Option<u32>,
    /// Only tokens within so many standard deviations of the likeliest one's logit.
    pub top_n_sigma: Option<f32>,
    /// How likely it is that the likeliest tokens are left out; 0 to 1.
    pub xtc_probability: Option<f32>,
    /// From which likelihood on they are; 0 to 1, above 0.5 is off.
    pub xtc_threshold: Option<f32>,
    /// How far the temperature moves with the entropy.
    pub dynatemp_range: Option<f32>,
    /// In which power of it.
    pub dynatemp_exponent: Option<f32>,
    /// Version of Mirostat, 1 or 2; then nothing else counts but the temperature.
    pub mirostat: Option<u8>,
    /// The perplexity that it aims for.
    pub mirostat_tau: Option<f32>,
    /// How fast it follows.
    pub mirostat_eta: Option<f32>,
    /// Which samplers there are, in their order.
    pub samplers: Option<Vec<String>>,
}

impl Sampling {
    /// Fills what the request leaves open from the model's configuration.
    #[must_use]
    pub fn or(self, defaults: &Self) -> Self {
        Self {
            temperature: self.temperature.or(defaults.temperature),
            top_p: self.top_p.or(defaults.top_p),
            top_k: self.top_k.or(defaults.top_k),
            min_p: self.min_p.or(defaults.min_p),
            typical_p: self.typical_p.or(defaults.typical_p),
            seed: self.seed.or(defaults.seed),
            repeat_penalty: self.repeat_penalty.or(defaults.repeat_penalty),
            repeat_last_n: self.repeat_last_n.or(defaults.repeat_last_n),
            presence_penalty: self.presence_penalty.or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.or(defaults.frequency_penalty),
            logit_bias: if self.logit_bias.is_empty() { defaults.logit_bias.clone() } else { self.logit_bias },
            ignore_eos: self.ignore_eos || defaults.ignore_eos,
            further: self.further,
        }
    }
}

/// How a model is to be resident for a request; `None` leaves it to the configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Residence {
    /// Tokens that prompt and answer may have together.
    pub context_tokens: Option<u32>,
    /// How long the model stays after it.
    pub keep_alive: Option<KeepAlive>,
}

/// Who goes first where not all can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lane {
    /// Somebody waits for the answer.
    #[default]
    Interactive,
    /// It may take its time: what interactive requests leave, but never nothing.
    Bulk,
}

/// The two APIs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Api {
    /// Ollama's.
    Ollama,
    /// OpenAI's.
    OpenAi,
}

/// What a client asked for in its own API and nobody here reads: it goes, as it is, to hosts that speak the same API.
#[derive(Clone, Debug, PartialEq)]
pub struct Extras {
    /// The API.
    pub api: Api,
    /// Fields of the body.
    pub fields: Map<String, Value>,
    /// Fields of Ollama's `options`.
    pub options: Map<String, Value>,
    /// Whether Ollama's prompt stands as `prompt` and not as messages.
    pub is_generate: bool,
    /// Those without which an answer would be a wrong one.
    pub needs: Vec<Need>,
    /// Those without which it is a degraded one.
    pub degrades: Vec<String>,
}

/// What a deployment must be able to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// The field that asks for it.
    pub param: String,
    /// In words that begin a sentence: "`tools` is not supported".
    pub lack: String,
    /// Whether it is in core's words: a worker that has the ability can, and hosts of the other API are told in theirs.
    pub at_worker: bool,
}

/// One generation, ready for any backend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerateRequest {
    /// What the model continues.
    pub prompt: Prompt,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// The longest answer in tokens; `None` is as far as the context reaches.
    pub max_tokens: Option<u32>,
    /// The form that the answer must have.
    pub format: Format,
    /// The client's field that says so, to be named where it cannot be followed.
    pub format_param: Cow<'static, str>,
    /// Tools that may be called.
    #[serde(default)]
    pub tools: Option<Tools>,
    /// Whether the model reasons before it answers, where it can; `None` leaves it to its template.
    #[serde(default)]
    pub think: Option<bool>,
    /// What else the model's chat template is to know: a JSON object, as text.
    #[serde(default)]
    pub template_values: Option<String>,
    /// Whether it is told how likely each token was, and how many others that were likely.
    #[serde(default)]
    pub logprobs: Option<u8>,
    /// How the model is to be resident.
    #[serde(default)]
    pub residence: Residence,
    /// Whether it may take its time.
    #[serde(default)]
    pub lane: Lane,
    /// The beginning of the answer as the client wants it: part of the prompt, and of the text that is not sent again.
    #[serde(default)]
    pub prefill: String,
    /// The beginning of the answer, where it was given elsewhere and broke off: only what follows it is generated, and
    /// its tokens count as generated ones.
    #[serde(default)]
    pub given: String,
    /// What follows the place that a raw prompt's answer is to fill.
    #[serde(default)]
    pub suffix: Option<String>,
    /// Whether a prompt that is too long for its context is cut: the oldest messages go, or the middle of a single one.
    #[serde(default)]
    pub truncate: bool,
    /// Tokens of what was said before a prompt that is a single turn, as the answer to it has told them.
    #[serde(default)]
    pub context: Vec<i32>,
    /// Whether the answer tells the tokens of all that was said.
    #[serde(default)]
    pub tells_context: bool,
    /// What only hosts of the client's API can follow; workers do not see it.
    #[serde(skip)]
    pub extras: Option<Box<Extras>>,
}

/// A text of which a vector is wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Input {
    /// As people write it.
    Text(String),
    /// As the model's own tokens.
    Tokens(Vec<i32>),
}

/// Texts that one request for vectors or scores may have, as OpenAI has it.
pub const MOST_INPUTS: usize = 2048;
/// Memory that compiling a form may take at most, or checking an answer: 1,000 properties with patterns take half of it.
pub const FORM_BYTES: Bytes = Bytes::mib(16);

/// Memory that following a form may take at most, with a vocabulary of so many tokens: llama.cpp writes all of them down wherever a token is
/// refused (165 bytes each with SmolLM2).
#[must_use]
pub fn form_bytes(tokens: u64) -> Bytes {
    FORM_BYTES + Bytes(192) * tokens
}

/// Vectors that are wanted, or scores.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EmbedRequest {
    /// Of what.
    pub inputs: Vec<Input>,
    /// The question that each of them may answer; then scores are wanted.
    pub query: Option<String>,
    /// Whether what is too long is cut, and not refused.
    pub truncate: bool,
    /// Whether they may take their time.
    #[serde(default)]
    pub lane: Lane,
    /// Tokens that each may have, if fewer than the model can take.
    #[serde(default)]
    pub context_tokens: Option<u32>,
}

impl EmbedRequest {
    /// A request for the vectors of these.
    #[must_use]
    pub const fn new(inputs: Vec<Input>) -> Self {
        Self { inputs, query: None, truncate: false, lane: Lane::Interactive, context_tokens: None }
    }
}

/// How hard a model reasons, by the name that templates and OpenAI's API have for it.
pub const REASONING_EFFORT: &str = "reasoning_effort";

impl GenerateRequest {
    /// Whether it says how hard the model is to reason.
    #[must_use]
    pub fn says_effort(&self) -> bool {
        self.template_values.as_ref().is_some_and(|values| values.contains(REASONING_EFFORT))
    }

    /// A request for all that a model says to a prompt, as it is configured.
    #[must_use]
    pub fn new(prompt: Prompt) -> Self {
        Self {
            prompt,
            sampling: Sampling::default(),
            stop: Vec::new(),
            max_tokens: None,
            format: Format::Text,
            format_param: "format".into(),
            tools: None,
            think: None,
            template_values: None,
            logprobs: None,
            residence: Residence::default(),
            lane: Lane::default(),
            prefill: String::new(),
            given: String::new(),
            suffix: None,
            truncate: false,
            context: Vec::new(),
            tells_context: false,
            extras: None,
        }
    }

    /// All that its messages show or let hear.
    pub fn media(&self) -> impl Iterator<Item = &Media> {
        let messages = match &self.prompt {
            Prompt::Chat(messages) => messages.as_slice(),
            Prompt::Raw(_) | Prompt::Tokens(_) => &[],
        };
        messages.iter().flat_map(|message| &message.media)
    }

    /// Whether tools may be called in the answer: hosts hold calls back until they are whole.
    #[must_use]
    pub fn may_call(&self) -> bool {
        let is_forbidden = || {
            let choice = self.extras.as_ref().and_then(|extras| extras.fields.get("tool_choice"));
            choice.is_some_and(|choice| choice == "none")
        };
        self.tools.is_some() || (self.needs().iter().any(|need| need.param.starts_with("tool")) && !is_forbidden())
    }

    /// Whether the answer has to follow a grammar, all of it or its calls.
    #[must_use]
    pub fn has_form(&self) -> bool {
        self.format.is_constrained() || self.tools.is_some()
    }

    /// What must be followed, or the answer would be a wrong one.
    #[must_use]
    pub fn needs(&self) -> &[Need] {
        self.extras.as_ref().map_or(&[], |extras| &extras.needs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_overrides_the_defaults_of_its_model_one_by_one() {
        let defaults = Sampling { temperature: Some(0.3), top_k: Some(20), ..Sampling::default() };
        let asked = Sampling { temperature: Some(0.0), seed: Some(7), ..Sampling::default() };
        let meant = asked.or(&defaults);
        assert_eq!((meant.temperature, meant.top_k, meant.seed), (Some(0.0), Some(20), Some(7)));
    }
}
