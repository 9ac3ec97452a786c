//! `POST /api/chat`, `/api/generate` and `/api/show`, from the wire to the core.

use sarai_core::{
    Api, Error, Format, GenerateRequest, KeepAlive, Lane, Media, MediaKind, Message, Prompt, Residence, ResultOf, Role,
};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::keep_alive;
use crate::extras::{Rest, SAMPLING};
use crate::json::Object;
use crate::sampling::WireSampling;
use crate::{Delivery, Parsed, check, json, media, whole};

/// No real model has a longer context.
const MAX_CONTEXT: u32 = 16_777_216;

/// What a body of `/api/chat` or `/api/generate` asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum OllamaRequest {
    /// An answer.
    Generate(Box<Parsed>),
    /// Only to have the model loaded: the prompt or the messages are empty.
    Load {
        /// The name as the client wrote it.
        model: String,
        /// How it is to be resident.
        residence: Residence,
    },
    /// To have it unloaded: as `Load`, with `keep_alive: 0`.
    Unload {
        /// The name as the client wrote it.
        model: String,
    },
}

/// The fields of both endpoints; see OpenAI's for why they are read apart.
#[derive(Deserialize)]
struct Common {
    model: String,
    stream: Option<bool>,
    format: Option<Value>,
    options: Option<Object<Options>>,
    keep_alive: Option<Value>,
    truncate: Option<bool>,
}

#[derive(Default, Deserialize)]
struct Options {
    #[serde(default, deserialize_with = "whole::deserialize")]
    num_predict: Option<i64>,
    #[serde(default, deserialize_with = "whole::deserialize")]
    num_ctx: Option<i64>,
}

/// The sampling, which stands among the options.
#[derive(Deserialize)]
struct SamplingBody {
    options: Option<Object<WireSampling>>,
}

#[derive(Deserialize)]
struct ChatBody {
    messages: Option<Vec<Object<WireMessage>>>,
}

#[derive(Deserialize)]
struct WireMessage {
    role: String,
    content: Option<String>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// All options, those that nobody here reads too.
#[derive(Deserialize)]
struct AllOptions {
    options: Option<Map<String, Value>>,
}

/// Fields that are read here; all others are left to hosts.
const READ: [&str; 11] = [
    "model",
    "stream",
    "format",
    "options",
    "keep_alive",
    "messages",
    "prompt",
    "system",
    "raw",
    "truncate",
    "context",
];
const READ_OPTIONS: [&str; 2] = ["num_predict", "num_ctx"];
/// Fields that change what is asked for.
const NEEDS: [&str; 1] = ["template"];
/// Options that change the answer, if not what it is an answer to.
const DEGRADING: [&str; 3] = ["num_keep", "tfs_z", "logit_bias"];

fn rest_of(body: &[u8]) -> Result<Rest, Error> {
    let mut rest = Rest::of(Api::Ollama, body, &READ)?;
    rest.need(&NEEDS);
    let all: AllOptions = json::parse(body)?;
    let read: Vec<_> = READ_OPTIONS.iter().chain(&SAMPLING).copied().filter(|name| !DEGRADING.contains(name)).collect();
    rest.options(all.options.unwrap_or_default(), &read, &DEGRADING);
    Ok(rest)
}

#[derive(Deserialize)]
struct GenerateBody {
    prompt: Option<String>,
    system: Option<String>,
    raw: Option<bool>,
    suffix: Option<String>,
    context: Option<Vec<i32>>,
}

#[derive(Deserialize)]
struct ShowBody {
    model: Option<String>,
    name: Option<String>,
}

/// Reads the body of `/api/chat`.
///
/// # Errors
/// [`Error::InvalidRequest`] with the field's name.
pub fn parse_chat(body: &[u8]) -> Result<OllamaRequest, Error> {
    let common: Common = json::parse(body)?;
    let chat: ChatBody = json::parse(body)?;
    let messages = chat.messages.unwrap_or_default();
    if messages.is_empty() {
        return common.load_or_unload();
    }
    let mut rest = rest_of(body)?;
    let mut is_more = false;
    let messages = messages.into_iter().enumerate().map(|(index, Object(message))| {
        let at = format!("messages[{index}]");
        is_more |= message.rest.values().any(|value| !check::is_default(value));
        let media = images(&mut rest, &format!("{at}.images"), message.rest.get("images"))?;
        let tool_calls = message.rest.get("tool_calls").filter(|calls| !check::is_default(calls));
        let tool_calls = tool_calls.map(|calls| rest.calls(&format!("{at}.tool_calls"), calls)).unwrap_or_default();
        let role = check::role(&format!("{at}.role"), &message.role)?;
        let text = |name: &str| message.rest.get(name).and_then(Value::as_str).map(str::to_owned);
        let result_of = (role == Role::Tool).then(|| ResultOf { id: text("tool_call_id"), name: text("tool_name") });
        let content = check::text(&at, message.content.unwrap_or_default())?;
        let reasoning = check::text(&format!("{at}.thinking"), text("thinking").unwrap_or_default())?;
        Ok(Message { role, content, media, tool_calls, result_of, reasoning })
    });
    let prompt = Prompt::Chat(messages.collect::<Result<_, Error>>()?);
    if is_more {
        rest.keep("messages");
    }
    common.finish(body, prompt, rest, true)
}

/// Pictures and sound, which Ollama puts before the text, in one list.
fn images(rest: &mut Rest, param: &str, written: Option<&Value>) -> Result<Vec<Media>, Error> {
    let Some(written) = written.filter(|written| !check::is_default(written)) else { return Ok(Vec::new()) };
    let wrong = || Error::invalid(param, format!("`{param}` is no array of texts: send files in base64"));
    let read = |(index, image): (usize, &Value)| {
        let param = format!("{param}[{index}]");
        let source = media::base64(&param, image.as_str().ok_or_else(wrong)?)?;
        let is_sound = image.as_str().is_some_and(media::is_sound);
        let kind = if is_sound { MediaKind::Audio } else { MediaKind::Image };
        Ok(Media { kind, source, at: 0, param })
    };
    let media = written.as_array().ok_or_else(wrong)?.iter().enumerate().map(read).collect::<Result<_, Error>>()?;
    rest.need_also(param, format!("`{param}` is not supported"), true);
    Ok(media)
}

/// Reads the body of `/api/generate`.
///
/// # Errors
/// [`Error::InvalidRequest`] with the field's name.
pub fn parse_generate(body: &[u8]) -> Result<OllamaRequest, Error> {
    let common: Common = json::parse(body)?;
    let generate: GenerateBody = json::parse(body)?;
    let prompt = check::text("prompt", generate.prompt.unwrap_or_default())?;
    if prompt.is_empty() {
        return common.load_or_unload();
    }
    let mut rest = rest_of(body)?;
    let is_raw = generate.raw == Some(true);
    let written = rest.field("images").cloned();
    let media = images(&mut rest, "images", written.as_ref())?;
    if is_raw && !media.is_empty() {
        rest.need_also("images", "`images` with `raw` is not supported".into(), false);
    }
    let suffix = generate.suffix.filter(|suffix| !suffix.is_empty());
    let suffix = suffix.map(|suffix| check::text("suffix", suffix)).transpose()?;
    if suffix.is_some() {
        if !media.is_empty() {
            return Err(Error::invalid("suffix", "`suffix` and `images` are both set: use one of them"));
        }
        rest.need_also("suffix", "`suffix` is not supported".into(), true);
    }
    let context = generate.context.unwrap_or_default();
    if !context.is_empty() {
        // Beside pictures, or around a place to be filled, only a host knows what to make of it.
        let is_plain = media.is_empty() && suffix.is_none();
        rest.need_also("context", "`context` is not supported".into(), is_plain);
    }
    if rest.is_needy() || !is_raw {
        // A host tells its context only there. A raw prompt is sent so that what was said already may be put behind it.
        rest.generate();
        ["prompt", "system", "raw", "context"].iter().for_each(|name| rest.keep(name));
    }
    let has_system = generate.system.as_ref().is_some_and(|system| !system.is_empty());
    for (name, is_set) in [("system", has_system), ("context", !context.is_empty())] {
        if is_raw && is_set {
            let message = format!("raw mode does not support template, system, or context: leave `{name}` out");
            return Err(Error::invalid("raw", message));
        }
    }
    let prompt = if is_raw || suffix.is_some() {
        Prompt::Raw(prompt)
    } else {
        let system = generate.system.filter(|system| !system.is_empty());
        let system = system.map(|content| Message::new(Role::System, content));
        let user = Message { media, ..Message::new(Role::User, prompt) };
        Prompt::Chat(system.into_iter().chain([user]).collect())
    };
    let mut asked = common.finish(body, prompt, rest, false)?;
    if let OllamaRequest::Generate(parsed) = &mut asked {
        parsed.request.tells_context = matches!(parsed.request.prompt, Prompt::Chat(_));
        parsed.request.suffix = suffix;
        parsed.request.context = context;
    }
    Ok(asked)
}

/// Reads the model's name from a body such as `/api/show`'s.
///
/// # Errors
/// [`Error::InvalidRequest`] if there is none.
pub fn parse_model_name(body: &[u8]) -> Result<String, Error> {
    let body: ShowBody = json::parse(body)?;
    // Ollama's own client sends both, one of them empty.
    let name = [body.model, body.name].into_iter().flatten().find(|name| !name.is_empty());
    name.ok_or_else(|| Error::invalid("model", "`model` is missing: name the model"))
}

impl Common {
    fn load_or_unload(self) -> Result<OllamaRequest, Error> {
        let residence = self.residence()?;
        Ok(match residence.keep_alive {
            Some(KeepAlive::For(0)) => OllamaRequest::Unload { model: self.model },
            _ => OllamaRequest::Load { model: self.model, residence },
        })
    }

    fn residence(&self) -> Result<Residence, Error> {
        let keep_alive =
            self.keep_alive.as_ref().filter(|value| !value.is_null()).map(keep_alive::parse).transpose()?;
        let num_ctx = self.options.as_ref().and_then(|Object(options)| options.num_ctx);
        let context_tokens = match num_ctx {
            // Ollama's clients send 0 for "not set".
            None | Some(0) => None,
            Some(tokens) => Some(u32::try_from(tokens).ok().filter(|&n| n <= MAX_CONTEXT).ok_or_else(|| {
                let message = format!("`num_ctx` is {tokens}: use a number of tokens from 1 to {MAX_CONTEXT}");
                Error::invalid("options.num_ctx", message)
            })?),
        };
        Ok(Residence { context_tokens, keep_alive })
    }

    fn finish(self, body: &[u8], prompt: Prompt, mut rest: Rest, is_chat: bool) -> Result<OllamaRequest, Error> {
        let residence = self.residence()?;
        let options = self.options.map(|Object(options)| options).unwrap_or_default();
        let sampling: SamplingBody = json::parse(body)?;
        let mut sampling = sampling.options.map(|Object(sampling)| sampling).unwrap_or_default();
        if sampling.is_to_repeat() {
            rest.degrade("repeat_penalty");
        }
        let (mut sampling, stop) = sampling.meant(100.0)?;
        let format = format_of(self.format)?;
        sampling.further = rest.samplers()?;
        // Ollama: 0 and -1 are without limit, -2 until the context is full; all end here with the context.
        let max_tokens = options.num_predict.filter(|&n| n > 0).map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let is_templated = matches!(prompt, Prompt::Chat(_));
        let request = GenerateRequest {
            prompt,
            sampling,
            stop,
            max_tokens,
            format,
            format_param: "format".into(),
            tools: rest.tools(is_chat)?,
            think: rest.think()?,
            template_values: rest.template_values(is_templated)?,
            logprobs: rest.logprobs()?,
            residence,
            lane: Lane::default(),
            prefill: String::new(),
            given: String::new(),
            suffix: None,
            truncate: self.truncate.unwrap_or(true),
            context: Vec::new(),
            tells_context: false,
            extras: Some(rest.finish()),
        };
        let delivery = Delivery { stream: self.stream.unwrap_or(true), include_usage: true };
        Ok(OllamaRequest::Generate(Box::new(Parsed { model: self.model, request, others: Vec::new(), delivery })))
    }
}

fn format_of(format: Option<Value>) -> Result<Format, Error> {
    match format {
        None | Some(Value::Null) => Ok(Format::Text),
        Some(Value::String(text)) if text.is_empty() => Ok(Format::Text),
        Some(Value::String(text)) if text == "json" => Ok(Format::Json),
        Some(schema @ Value::Object(_)) => Ok(Format::Schema(schema.to_string())),
        Some(other) => Err(Error::invalid("format", format!("`format` is {other}: use \"json\" or a JSON schema"))),
    }
}
