//! A request made into tokens and a sampler, by llama.cpp's own templates, grammars and sampling.

use llama_cpp_4::chat::{ChatApplyParams, ChatTemplates, ReasoningFormat};
use llama_cpp_4::common_sampler::{CommonSampler, CommonSamplerParams, GrammarSource};
use llama_cpp_4::model::{AddBos, LlamaModel, Special};
use llama_cpp_4::token::LlamaToken;
use sarai_core::{Error, Format, GenerateRequest, Message, Prompt, Sampling};

/// Both APIs' -100 bans a token; for llama.cpp that is minus infinity, which JSON frames cannot carry.
const BANNED: f32 = -100.0;

/// A prompt in tokens.
pub struct Rendered {
    /// The prompt, never empty, and the beginning of the answer where it was given elsewhere.
    pub tokens: Vec<LlamaToken>,
    /// How many of them are the answer's.
    pub given: usize,
}

/// Renders and tokenises the prompt, and the beginning of the answer.
///
/// # Errors
/// The template refuses the messages, or the text cannot be tokenised.
pub fn render(model: &LlamaModel, templates: &ChatTemplates, request: &GenerateRequest) -> Result<Rendered, Error> {
    let mut tokens = match &request.prompt {
        Prompt::Raw(text) => {
            model.str_to_token_with_special(text, AddBos::Always, Special::Tokenize).map_err(internal)?
        }
        Prompt::Chat(messages) => {
            let chat = templates.apply(&chat_params(messages)).map_err(|error| {
                Error::invalid("messages", format!("the model's chat template refuses the messages: {error}"))
            })?;
            chat.tokenize_prompt(model, AddBos::Always).map_err(internal)?
        }
    };
    if tokens.is_empty() {
        return Err(Error::invalid("prompt", "the prompt is empty: send at least one token of text"));
    }
    let given = given_tokens(model, &request.given)?;
    tokens.extend(&given);
    Ok(Rendered { tokens, given: given.len() })
}

/// Text that goes on in the middle of a line. Some vocabularies put a space before whatever they are handed: there, it is
/// tokenised behind a line break, which is taken off again.
fn given_tokens(model: &LlamaModel, given: &str) -> Result<Vec<LlamaToken>, Error> {
    let tokens =
        |text: &str| model.str_to_token_with_special(text, AddBos::Never, Special::Plaintext).map_err(internal);
    let piece = |token: &LlamaToken| model.token_to_raw_bytes(*token, Special::Plaintext).unwrap_or_default();
    if given.is_empty() {
        return Ok(Vec::new());
    }
    let plain = tokens(given)?;
    let has_space = plain.first().is_some_and(|first| piece(first).starts_with(b" "));
    if given.starts_with(' ') || !has_space {
        return Ok(plain);
    }
    let behind = tokens(&format!("\n{given}"))?;
    let at = behind.iter().position(|token| piece(token) == b"\n");
    Ok(at.map_or(plain, |at| behind[at + 1..].to_vec()))
}

fn chat_params(messages: &[Message]) -> ChatApplyParams {
    let messages: Vec<_> = messages
        .iter()
        .map(|message| serde_json::json!({ "role": message.role.as_str(), "content": message.content }))
        .collect();
    ChatApplyParams::new(serde_json::Value::from(messages).to_string()).with_reasoning_format(ReasoningFormat::None)
}

fn schema_of(format: &Format) -> Option<String> {
    match format {
        Format::Text => None,
        Format::Json => Some(r#"{"type":"object"}"#.to_owned()),
        Format::Schema(schema) => Some(schema.clone()),
    }
}

/// Builds the sampler chain of one generation.
///
/// # Errors
/// The schema is not one that llama.cpp can make a grammar of.
pub fn sampler(model: &LlamaModel, context_tokens: usize, request: &GenerateRequest) -> Result<CommonSampler, Error> {
    let mut params = CommonSamplerParams::new();
    set_scalars(&mut params, context_tokens, &request.sampling);
    for &(token, bias) in &request.sampling.logit_bias {
        if token < 0 || token >= model.n_vocab() {
            return Err(Error::invalid(
                "logit_bias",
                format!("`{token}` is no token of this model: use ids from 0 to {}", model.n_vocab() - 1),
            ));
        }
        params
            .add_logit_bias(LlamaToken(token), if bias <= BANNED { f32::NEG_INFINITY } else { bias })
            .map_err(internal)?;
    }
    set_grammar(&mut params, &request.format)?;
    CommonSampler::new(model, &mut params)
        .map_err(|error| Error::invalid("format", format!("llama.cpp cannot make a grammar of the schema: {error}")))
}

fn set_scalars(params: &mut CommonSamplerParams, context_tokens: usize, sampling: &Sampling) {
    let mut scalars = params.scalars();
    let set = |to: &mut f32, from: Option<f32>| *to = from.unwrap_or(*to);
    set(&mut scalars.temp, sampling.temperature);
    set(&mut scalars.top_p, sampling.top_p);
    set(&mut scalars.min_p, sampling.min_p);
    set(&mut scalars.typ_p, sampling.typical_p);
    set(&mut scalars.penalty_repeat, sampling.repeat_penalty);
    set(&mut scalars.penalty_freq, sampling.frequency_penalty);
    set(&mut scalars.penalty_present, sampling.presence_penalty);
    scalars.top_k = sampling.top_k.unwrap_or(scalars.top_k);
    // The samplers take -1 for nothing; both APIs mean the whole context by it.
    let last_n = sampling.repeat_last_n.unwrap_or(scalars.penalty_last_n);
    scalars.penalty_last_n = if last_n < 0 { i32::try_from(context_tokens).unwrap_or(i32::MAX) } else { last_n };
    scalars.seed = sampling.seed.unwrap_or(scalars.seed);
    scalars.no_perf = true;
    params.set_scalars(&scalars);
}

/// The grammar is made of the schema alone: the templates' own ones let a fence of backticks through.
fn set_grammar(params: &mut CommonSamplerParams, format: &Format) -> Result<(), Error> {
    let Some(schema) = schema_of(format) else { return Ok(()) };
    let bad = |error| Error::invalid("format", format!("llama.cpp cannot make a grammar of the schema: {error}"));
    let grammar = llama_cpp_4::chat::json_schema_to_grammar(&schema, false).map_err(bad)?;
    params.set_grammar(&grammar, GrammarSource::User, false).map_err(bad)
}

fn internal(error: impl std::fmt::Display) -> Error {
    Error::Internal(error.to_string())
}
