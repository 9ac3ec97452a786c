//! `POST /v1/chat/completions` and `POST /v1/completions`, from the wire to the core.

use std::collections::BTreeMap;

use sarai_core::{
    Api, Error, Format, GenerateRequest, Input, Lane, Media, MediaKind, Message, Prompt, Residence, ResultOf, Role,
};
use serde::Deserialize;
use serde_json::Value;

use crate::embed::Inputs;
use crate::extras::{Rest, SAMPLING};
use crate::json::Object;
use crate::media::media_source;
use crate::sampling::WireSampling;
use crate::{Delivery, Parsed, check, json};

/// The fields of both endpoints. A body is read once for these, once for the
/// sampling and once for the endpoint's own: flattening one struct into
/// the other would lose the names of fields in errors.
#[derive(Deserialize)]
struct Common {
    model: Option<String>,
    stream: Option<bool>,
    stream_options: Option<Object<StreamOptions>>,
    logit_bias: Option<LogitBias>,
    n_predict: Option<i64>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    n: Option<u32>,
    response_format: Option<ResponseFormat>,
    best_of: Option<u32>,
}

#[derive(Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// Token ids and what is added to their logits, as OpenAI has them, or in llama.cpp's pairs, where `false` bans.
#[derive(Deserialize)]
#[serde(untagged, expecting = "an object of token ids and numbers, or an array of pairs of them")]
enum LogitBias {
    Object(BTreeMap<String, Bias>),
    Pairs(Vec<(i32, Bias)>),
}

#[derive(Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Bias {
    Number(f32),
    Allowed(bool),
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ResponseFormat {
    Text,
    JsonObject {
        schema: Option<Value>,
    },
    /// llama.cpp's server reads the schema without what is around it, too.
    JsonSchema {
        json_schema: Option<JsonSchema>,
        schema: Option<Value>,
    },
}

#[derive(Deserialize)]
struct JsonSchema {
    schema: Option<Value>,
}

#[derive(Deserialize)]
struct ChatBody {
    messages: Vec<Object<ChatMessage>>,
}

#[derive(Deserialize)]
struct ChatMessage {
    role: String,
    content: Option<Content>,
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a string or an array of content parts")]
enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

#[derive(Deserialize)]
struct ContentPart {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

#[derive(Deserialize)]
struct CompletionBody {
    prompt: Inputs,
    suffix: Option<String>,
}

/// Reads the body of a chat completion.
///
/// # Errors
/// [`Error::InvalidRequest`] with the field's name.
pub fn parse_chat(body: &[u8]) -> Result<Parsed, Error> {
    let common: Common = json::parse(body)?;
    let sampling: WireSampling = json::parse(body)?;
    let chat: ChatBody = json::parse(body)?;
    if chat.messages.is_empty() {
        return Err(Error::invalid("messages", "`messages` is empty: send at least one message"));
    }
    let mut rest = rest_of(body)?;
    // What an answer goes on from is one text, without breaks between its parts.
    let goes_on = rest.field(CONTINUE) == Some(&Value::Bool(true));
    let last = chat.messages.len() - 1;
    let mut reading = Reading { rest: &mut rest, is_more: false, between_texts: "\n" };
    let messages = chat.messages.into_iter().enumerate();
    let messages = messages.map(|(index, Object(message))| {
        reading.between_texts = if goes_on && index == last { "" } else { "\n" };
        reading.message(index, message)
    });
    let mut messages = messages.collect::<Result<Vec<_>, _>>()?;
    let is_more = reading.is_more;
    let prefill = prefill(&mut rest, &mut messages)?;
    if is_more || prefill.is_some() {
        rest.keep("messages");
    }
    refuse_many_copies("n", body, common.n.unwrap_or(1) as usize)?;
    let mut parsed = common.finish(sampling, Prompt::Chat(messages), rest)?;
    if let Some(prefill) = prefill {
        if parsed.request.tools.is_some() || parsed.request.format.is_constrained() {
            let message = format!("`{CONTINUE}` is set beside `tools` or a form of the answer: use one of them");
            return Err(Error::invalid(CONTINUE, message));
        }
        for request in [&mut parsed.request].into_iter().chain(&mut parsed.others) {
            request.prefill.clone_from(&prefill);
        }
    }
    Ok(parsed)
}

/// What all answers to one request may hold of it together: each has its own copy.
const MOST_COPIED_BYTES: usize = 64 << 20;

fn refuse_many_copies(param: &str, body: &[u8], answers: usize) -> Result<(), Error> {
    match body.len().saturating_mul(answers) <= MOST_COPIED_BYTES || answers == 1 {
        true => Ok(()),
        false => {
            let message =
                format!("`{param}` asks for {answers} answers to {} bytes: send several requests", body.len());
            Err(Error::invalid(param, message))
        }
    }
}

/// As vLLM and Transformers have it.
const CONTINUE: &str = "continue_final_message";

/// Takes the last message, where the answer is to go on from it.
fn prefill(rest: &mut Rest, messages: &mut Vec<Message>) -> Result<Option<String>, Error> {
    match rest.field(CONTINUE) {
        None | Some(Value::Null | Value::Bool(false)) => return Ok(None),
        Some(Value::Bool(true)) => {}
        Some(other) => return Err(Error::invalid(CONTINUE, format!("`{CONTINUE}` is {other}: use true or false"))),
    }
    if rest.field("add_generation_prompt") == Some(&Value::Bool(true)) {
        let message = format!("`{CONTINUE}` and `add_generation_prompt` are both true: use one of them");
        return Err(Error::invalid(CONTINUE, message));
    }
    let is_text = |message: &Message| {
        message.role == Role::Assistant && message.tool_calls.is_empty() && message.media.is_empty()
    };
    let Some(last) = messages.pop_if(|message| is_text(message)) else {
        let message =
            format!("`{CONTINUE}` is true, and the last message is none of the assistant's text: end with one");
        return Err(Error::invalid(CONTINUE, message));
    };
    rest.need_also(CONTINUE, format!("`{CONTINUE}` is not supported"), true);
    Ok(Some(last.content))
}

/// Fields that are read here; all others are left to hosts.
const READ: [&str; 11] = [
    "model",
    "n_predict",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "best_of",
    "response_format",
    "messages",
    "prompt",
];

/// Fields that change what is asked for.
const NEEDS: [&str; 11] = [
    "functions",
    "audio",
    "echo",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "regex",
    "ebnf",
    "stop_token_ids",
];
/// Fields that do not change the answer, or only together with others.
const HARMLESS: [&str; 14] = [
    "add_generation_prompt",
    "continue_final_message",
    "user",
    "metadata",
    "store",
    "service_tier",
    "prompt_cache_key",
    "safety_identifier",
    "cache_prompt",
    "keep_alive",
    "priority",
    "tool_choice",
    "function_call",
    "parallel_tool_calls",
];

/// Fields of llama.cpp's server that say the form of the answer.
const FORMS: [&str; 2] = ["grammar", "json_schema"];

fn rest_of(body: &[u8]) -> Result<Rest, Error> {
    let mut rest = Rest::of(Api::OpenAi, body, &[&READ[..], &SAMPLING[..]].concat())?;
    rest.need(&NEEDS);
    for form in FORMS {
        if rest.field(form).is_some_and(|value| !check::is_default(value)) {
            rest.need_also(form, format!("`{form}` is not supported"), true);
        }
    }
    rest.degrades_without(&HARMLESS);
    if rest.field("reasoning_effort").is_some_and(|effort| effort == "none") {
        rest.follow("reasoning_effort");
    }
    // What is read of these is not all that they may say.
    ["response_format", "stream_options", "max_completion_tokens"].iter().for_each(|name| rest.keep(name));
    Ok(rest)
}

/// Reads the body of a text completion.
///
/// # Errors
/// [`Error::InvalidRequest`] with the field's name.
pub fn parse_completion(body: &[u8]) -> Result<Parsed, Error> {
    let common: Common = json::parse(body)?;
    let sampling: WireSampling = json::parse(body)?;
    let completion: CompletionBody = json::parse(body)?;
    let prompts = completion.prompt.all().into_iter().map(|prompt| match prompt {
        Input::Text(prompt) => check::text("prompt", prompt).map(Prompt::Raw),
        Input::Tokens(prompt) => Ok(Prompt::Tokens(prompt)),
    });
    let mut prompts = prompts.collect::<Result<Vec<_>, _>>()?.into_iter();
    refuse_many_copies("n", body, common.n.unwrap_or(1) as usize * prompts.len().max(1))?;
    let Some(first) = prompts.next() else {
        return Err(Error::invalid("prompt", "`prompt` is empty: send at least one prompt"));
    };
    let suffix = completion.suffix.filter(|suffix| !suffix.is_empty());
    let suffix = suffix.map(|suffix| check::text("suffix", suffix)).transpose()?;
    let mut rest = rest_of(body)?;
    if matches!(first, Prompt::Tokens(_)) || prompts.as_slice().iter().any(|one| matches!(one, Prompt::Tokens(_))) {
        rest.need_also("prompt", "a `prompt` of tokens is not supported".into(), true);
        if suffix.is_some() {
            return Err(Error::invalid("suffix", "`suffix` is set, and `prompt` has tokens: send the prompt as text"));
        }
    }
    if suffix.is_some() {
        rest.need_also("suffix", "`suffix` is not supported".into(), true);
    }
    let mut parsed = common.finish(sampling, first, rest)?;
    for request in [&mut parsed.request].into_iter().chain(&mut parsed.others) {
        request.suffix.clone_from(&suffix);
    }
    // OpenAI's documented default for this endpoint.
    let max_tokens = *parsed.request.max_tokens.get_or_insert(16);
    parsed.others.iter_mut().for_each(|other| other.max_tokens = Some(max_tokens));
    // So many answers to each prompt, one prompt after the other.
    let answers: Vec<_> = [&parsed.request].into_iter().chain(&parsed.others).cloned().collect();
    if answers.len() * (1 + prompts.len()) > MOST_CHOICES as usize {
        let message = format!("`prompt` and `n` ask for more than {MOST_CHOICES} answers: send fewer");
        return Err(Error::invalid("prompt", message));
    }
    for prompt in prompts {
        parsed.others.extend(answers.iter().map(|answer| GenerateRequest { prompt: prompt.clone(), ..answer.clone() }));
    }
    Ok(parsed)
}

/// Answers to one request at most, as OpenAI has it.
const MOST_CHOICES: u32 = 128;

/// Reads messages; what they hold beyond text is noted.
struct Reading<'a> {
    rest: &'a mut Rest,
    /// Whether they must reach a host as they were sent.
    is_more: bool,
    /// What stands between two texts of a message.
    between_texts: &'static str,
}

impl Reading<'_> {
    fn message(&mut self, index: usize, message: ChatMessage) -> Result<Message, Error> {
        let at = format!("messages[{index}]");
        let role = check::role(&format!("{at}.role"), &message.role)?;
        let more: Vec<_> = message.rest.iter().filter(|(_, value)| !check::is_default(value)).collect();
        self.is_more |= !more.is_empty();
        let mut tool_calls = Vec::new();
        for name in ["tool_calls", "function_call"] {
            let Some((_, value)) = more.iter().find(|(key, _)| *key == name) else { continue };
            let param = format!("{at}.{name}");
            match name {
                "tool_calls" => tool_calls = self.rest.calls(&param, value),
                _ => self.rest.need_also(&param, format!("`{param}` is not supported"), false),
            }
        }
        let text = |name: &str| message.rest.get(name).and_then(Value::as_str).map(str::to_owned);
        let result_of = (role == Role::Tool).then(|| ResultOf { id: text("tool_call_id"), name: text("name") });
        let (content, media) = match message.content {
            None => (String::new(), Vec::new()),
            Some(Content::Text(text)) => (text, Vec::new()),
            Some(Content::Parts(parts)) => self.parts(&at, parts)?,
        };
        let content = check::text(&format!("{at}.content"), content)?;
        // As llama.cpp's server and vLLM call it.
        let reasoning = text("reasoning_content").or_else(|| text("reasoning")).unwrap_or_default();
        let reasoning = check::text(&format!("{at}.reasoning_content"), reasoning)?;
        Ok(Message { role, content, media, tool_calls, result_of, reasoning })
    }

    /// The text of the parts, and what stands between it. As llama.cpp has it, lines are broken between two texts alone.
    fn parts(&mut self, at: &str, parts: Vec<ContentPart>) -> Result<(String, Vec<Media>), Error> {
        let (mut content, mut media) = (String::new(), Vec::new());
        let mut is_behind_media = false;
        for (index, part) in parts.into_iter().enumerate() {
            let param = format!("{at}.content[{index}]");
            if let Some(kind) = media_kind(&part.kind) {
                self.is_more = true;
                let source = media_source(&format!("{param}.{}", part.kind), kind, part.rest.get(&part.kind))?;
                self.rest.need_also(
                    &param,
                    format!("`{param}`, a part of type `{}`, is not supported", part.kind),
                    true,
                );
                media.push(Media { kind, source, at: content.len(), param });
                is_behind_media = true;
            } else if let Some(text) = self.text_of(at, part) {
                if !is_behind_media && !content.is_empty() {
                    content.push_str(self.between_texts);
                }
                content.push_str(&text);
                is_behind_media = false;
            }
        }
        Ok((content, media))
    }

    fn text_of(&mut self, at: &str, part: ContentPart) -> Option<String> {
        self.is_more |= !part.rest.is_empty();
        if matches!(part.kind.as_str(), "text" | "input_text") && part.text.is_some() {
            return part.text;
        }
        self.is_more = true;
        let lack = format!("`{at}.content` has a part of type `{}`, which is not supported", part.kind);
        self.rest.need_also(&format!("{at}.content"), lack, false);
        None
    }
}

/// What parts of this type are, if they are media.
fn media_kind(kind: &str) -> Option<MediaKind> {
    match kind {
        "image_url" => Some(MediaKind::Image),
        "input_audio" => Some(MediaKind::Audio),
        _ => None,
    }
}

impl Common {
    fn finish(self, sampling: WireSampling, prompt: Prompt, mut rest: Rest) -> Result<Parsed, Error> {
        let choices = self.choices()?;
        let said = form_of(&rest)?;
        let (format, format_param) = match said {
            Some(said) => said,
            None => (format_of(self.response_format)?, "response_format"),
        };
        let is_chat = matches!(prompt, Prompt::Chat(_));
        let has_tools = rest.field("tools").is_some_and(|tools| !check::is_default(tools));
        if has_tools && matches!(format, Format::Gbnf(_)) {
            return Err(Error::invalid("grammar", "`grammar` and `tools` are both set: use one of them"));
        }
        let (mut sampling, stop) = sampling.meant(2.0)?;
        sampling.logit_bias = self.logit_bias.map(logit_bias).transpose()?.unwrap_or_default();
        sampling.further = rest.samplers()?;
        rest.follow("ignore_eos");
        // As llama.cpp's server has it, its own name counts before the others.
        let named = [
            ("n_predict", self.n_predict),
            ("max_completion_tokens", self.max_completion_tokens),
            ("max_tokens", self.max_tokens),
        ];
        let max_tokens = match named.into_iter().find_map(|(name, tokens)| Some((name, tokens?))) {
            None => None,
            // llama.cpp's and Ollama's: as far as the context reaches.
            Some((_, -1 | -2)) => None,
            Some((name, n)) => Some(u32::try_from(n).ok().filter(|&n| n > 0).ok_or_else(|| {
                Error::invalid(name, format!("`{name}` is {n}: use a number from 1 to {}", u32::MAX))
            })?),
        };
        if self.stream != Some(true) {
            rest.speech_is_wanted_whole();
        }
        let request = GenerateRequest {
            prompt,
            sampling,
            stop,
            max_tokens,
            format,
            format_param: format_param.into(),
            tools: rest.tools(is_chat)?,
            think: rest.think()?,
            template_values: rest.template_values(is_chat)?,
            logprobs: rest.logprobs()?,
            residence: Residence::default(),
            lane: lane_of(&rest),
            prefill: String::new(),
            given: String::new(),
            suffix: None,
            truncate: false,
            context: Vec::new(),
            tells_context: false,
            extras: Some(rest.finish()),
        };
        let include_usage = self.stream_options.and_then(|Object(options)| options.include_usage).unwrap_or(false);
        let delivery = Delivery { stream: self.stream.unwrap_or(false), include_usage };
        // With a seed, each has its own: the same one would give the same text.
        let other = |number| {
            let mut other = request.clone();
            other.sampling.seed = other.sampling.seed.map(|seed| seed.wrapping_add(number));
            other
        };
        let others = (1..choices).map(other).collect();
        Ok(Parsed { model: self.model.unwrap_or_default(), request, others, delivery })
    }

    /// How many answers are wanted. Choosing the best of more is not done here.
    fn choices(&self) -> Result<u32, Error> {
        let n = self.n.unwrap_or(1);
        if !(1..=MOST_CHOICES).contains(&n) {
            return Err(Error::invalid("n", format!("`n` is {n}: use a number from 1 to {MOST_CHOICES}")));
        }
        match self.best_of {
            Some(best_of) if best_of != n => {
                let message = format!("`best_of` is {best_of}: only as many as `n` ({n}) are made, leave it out");
                Err(Error::invalid("best_of", message))
            }
            _ => Ok(n),
        }
    }
}

/// OpenAI's tier for what is slower and may wait is the lane of bulk; hosts read it for themselves.
fn lane_of(rest: &Rest) -> Lane {
    match rest.field("service_tier").and_then(Value::as_str) {
        Some("flex") => Lane::Bulk,
        _ => Lane::Interactive,
    }
}

/// The form as llama.cpp's server has it said, and in which field.
fn form_of(rest: &Rest) -> Result<Option<(Format, &'static str)>, Error> {
    let set = |name: &str| rest.field(name).filter(|value| !check::is_default(value));
    match (set("grammar"), set("json_schema")) {
        (None, None) => Ok(None),
        (Some(Value::String(grammar)), None) => {
            Ok(Some((Format::Gbnf(check::text("grammar", grammar.clone())?), "grammar")))
        }
        (Some(other), None) => Err(Error::invalid("grammar", format!("`grammar` is {other}: use a text in GBNF"))),
        (None, Some(schema)) => Ok(Some((Format::Schema(schema.to_string()), "json_schema"))),
        (Some(_), Some(_)) => {
            Err(Error::invalid("grammar", "`grammar` and `json_schema` are both set: use one of them"))
        }
    }
}

fn format_of(format: Option<ResponseFormat>) -> Result<Format, Error> {
    Ok(match format {
        None | Some(ResponseFormat::Text) => Format::Text,
        Some(ResponseFormat::JsonObject { schema: None }) => Format::Json,
        Some(ResponseFormat::JsonObject { schema: Some(schema) }) => Format::Schema(schema.to_string()),
        Some(ResponseFormat::JsonSchema { json_schema, schema }) => {
            if json_schema.is_none() && schema.is_none() {
                let message = "`response_format.json_schema` is missing: send the schema";
                return Err(Error::invalid("response_format.json_schema", message));
            }
            let schema = json_schema.and_then(|json_schema| json_schema.schema).or(schema);
            schema.map_or(Format::Json, |schema| Format::Schema(schema.to_string()))
        }
    })
}

fn logit_bias(written: LogitBias) -> Result<Vec<(i32, f32)>, Error> {
    let pairs = match written {
        LogitBias::Object(biases) => biases.into_iter().map(of_text).collect::<Result<Vec<_>, _>>()?,
        LogitBias::Pairs(pairs) => pairs,
    };
    let one = |(id, bias): (i32, Bias)| {
        let bias = match bias {
            Bias::Number(number) => number,
            Bias::Allowed(false) => -100.0,
            Bias::Allowed(true) => {
                return Err(Error::invalid("logit_bias", "`logit_bias` is true: use a number, or false"));
            }
        };
        check::range("logit_bias", Some(bias), -100.0, 100.0)?;
        Ok((id, bias))
    };
    // The same number may be written in several ways.
    let all: BTreeMap<i32, f32> = pairs.into_iter().map(one).collect::<Result<_, Error>>()?;
    Ok(all.into_iter().collect())
}

fn of_text((token, bias): (String, Bias)) -> Result<(i32, Bias), Error> {
    let unknown = |_| Error::invalid("logit_bias", format!("`logit_bias` has the key `{token}`: use token ids"));
    Ok((token.parse().map_err(unknown)?, bias))
}
