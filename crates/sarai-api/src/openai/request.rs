//! `POST /v1/chat/completions` and `POST /v1/completions`, from the wire to the core.

use std::collections::BTreeMap;

use sarai_core::{Error, Format, GenerateRequest, Message, Prompt, Residence};
use serde::Deserialize;
use serde_json::Value;

use crate::json::Object;
use crate::sampling::WireSampling;
use crate::{Delivery, Parsed, check, json};

/// The fields of both endpoints. A body is read once for these, once for the
/// sampling and once for the endpoint's own: flattening one struct into
/// the other would lose the names of fields in errors.
#[derive(Deserialize)]
struct Common {
    model: String,
    stream: Option<bool>,
    stream_options: Option<Object<StreamOptions>>,
    logit_bias: Option<BTreeMap<String, f32>>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    n: Option<u32>,
    response_format: Option<ResponseFormat>,
    logprobs: Option<Value>,
    top_logprobs: Option<Value>,
    grammar: Option<Value>,
    json_schema: Option<Value>,
    tools: Option<Value>,
    functions: Option<Value>,
    audio: Option<Value>,
    echo: Option<Value>,
    suffix: Option<Value>,
    best_of: Option<u32>,
}

#[derive(Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ResponseFormat {
    Text,
    JsonObject { schema: Option<Value> },
    JsonSchema { json_schema: JsonSchema },
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
    tool_calls: Option<Value>,
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
}

#[derive(Deserialize)]
struct CompletionBody {
    prompt: OneOrMany,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a string or an array of one string")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// Reads the body of a chat completion.
///
/// # Errors
/// [`Error::InvalidRequest`] with the field's name.
pub fn parse_chat(body: &[u8]) -> Result<Parsed, Error> {
    let common: Common = json::parse(body)?;
    let sampling: WireSampling = json::parse(body)?;
    let body: ChatBody = json::parse(body)?;
    if body.messages.is_empty() {
        return Err(Error::invalid("messages", "`messages` is empty: send at least one message"));
    }
    let messages = body.messages.into_iter().enumerate().map(|(index, Object(message))| chat_message(index, message));
    common.finish(sampling, Prompt::Chat(messages.collect::<Result<_, _>>()?))
}

/// Reads the body of a text completion.
///
/// # Errors
/// [`Error::InvalidRequest`] with the field's name.
pub fn parse_completion(body: &[u8]) -> Result<Parsed, Error> {
    let common: Common = json::parse(body)?;
    let sampling: WireSampling = json::parse(body)?;
    let body: CompletionBody = json::parse(body)?;
    let prompt = match body.prompt {
        OneOrMany::One(prompt) => prompt,
        OneOrMany::Many(mut prompts) if prompts.len() == 1 => prompts.remove(0),
        OneOrMany::Many(prompts) => {
            let message = format!("`prompt` holds {} prompts: send one per request", prompts.len());
            return Err(Error::invalid("prompt", message));
        }
    };
    // OpenAI's documented default for this endpoint.
    let mut parsed = common.finish(sampling, Prompt::Raw(check::text("prompt", prompt)?))?;
    parsed.request.max_tokens.get_or_insert(16);
    Ok(parsed)
}

fn chat_message(index: usize, message: ChatMessage) -> Result<Message, Error> {
    let at = format!("messages[{index}]");
    check::unsupported(&format!("{at}.tool_calls"), &message.tool_calls)?;
    let role = check::role(&format!("{at}.role"), &message.role)?;
    let content = match message.content {
        None => String::new(),
        Some(Content::Text(text)) => text,
        Some(Content::Parts(parts)) => {
            let texts = parts.into_iter().map(|part| text_of(&at, part));
            texts.collect::<Result<Vec<_>, _>>()?.join("\n")
        }
    };
    Ok(Message { role, content: check::text(&format!("{at}.content"), content)? })
}

fn text_of(at: &str, part: ContentPart) -> Result<String, Error> {
    match (part.kind.as_str(), part.text) {
        ("text" | "input_text", Some(text)) => Ok(text),
        (kind, _) => {
            let message =
                format!("`{at}.content` has a part of type `{kind}`: the models here take parts of type text only");
            Err(Error::invalid(&format!("{at}.content"), message))
        }
    }
}

impl Common {
    fn finish(self, sampling: WireSampling, prompt: Prompt) -> Result<Parsed, Error> {
        self.refuse_unsupported()?;
        let (mut sampling, stop) = sampling.meant(2.0)?;
        sampling.logit_bias = logit_bias(self.logit_bias.unwrap_or_default())?;
        let max_tokens = match self.max_completion_tokens.or(self.max_tokens) {
            None => None,
            // llama.cpp's and Ollama's -1: as far as the context reaches.
            Some(-1) => None,
            Some(n) => Some(u32::try_from(n).ok().filter(|&n| n > 0).ok_or_else(|| {
                Error::invalid("max_tokens", format!("`max_tokens` is {n}: use a number from 1 to {}", u32::MAX))
            })?),
        };
        let request = GenerateRequest {
            prompt,
            sampling,
            stop,
            max_tokens,
            format: format_of(self.response_format),
            residence: Residence::default(),
            given: String::new(),
        };
        let include_usage = self.stream_options.and_then(|Object(options)| options.include_usage).unwrap_or(false);
        let delivery = Delivery { stream: self.stream.unwrap_or(false), include_usage };
        Ok(Parsed { model: self.model, request, delivery, ignored: Vec::new() })
    }

    fn refuse_unsupported(&self) -> Result<(), Error> {
        check::unsupported("tools", &self.tools)?;
        check::unsupported("functions", &self.functions)?;
        check::unsupported("logprobs", &self.logprobs)?;
        check::unsupported("top_logprobs", &self.top_logprobs)?;
        check::unsupported("grammar", &self.grammar)?;
        check::unsupported("json_schema", &self.json_schema)?;
        check::unsupported("audio", &self.audio)?;
        check::unsupported("echo", &self.echo)?;
        check::unsupported("suffix", &self.suffix)?;
        for (param, value) in [("n", self.n), ("best_of", self.best_of)] {
            if let Some(value) = value.filter(|&value| value != 1) {
                return Err(Error::invalid(
                    param,
                    format!("`{param}` is {value}: only 1 is supported, send several requests"),
                ));
            }
        }
        Ok(())
    }
}

fn format_of(format: Option<ResponseFormat>) -> Format {
    match format {
        None | Some(ResponseFormat::Text) => Format::Text,
        Some(ResponseFormat::JsonObject { schema: None }) => Format::Json,
        Some(ResponseFormat::JsonObject { schema: Some(schema) }) => Format::Schema(schema.to_string()),
        Some(ResponseFormat::JsonSchema { json_schema }) => {
            json_schema.schema.map_or(Format::Json, |schema| Format::Schema(schema.to_string()))
        }
    }
}

fn logit_bias(biases: BTreeMap<String, f32>) -> Result<Vec<(i32, f32)>, Error> {
    let one = |(token, bias): (String, f32)| {
        let id = token
            .parse()
            .map_err(|_| Error::invalid("logit_bias", format!("`logit_bias` has the key `{token}`: use token ids")))?;
        check::range("logit_bias", Some(bias), -100.0, 100.0)?;
        Ok((id, bias))
    };
    biases.into_iter().map(one).collect()
}
