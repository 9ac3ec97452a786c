//! A request made into tokens, by llama.cpp's own templates.

use llama_cpp_4::chat::{
    ChatApplyParams, ChatError, ChatParams, ChatTemplates, ReasoningFormat, ToolChoice as LlamaToolChoice,
};
use llama_cpp_4::model::{AddBos, LlamaModel, Special};
use llama_cpp_4::token::LlamaToken;
use sarai_core::{Error, GenerateRequest, Media, Message, Prompt, Role, ToolChoice, Tools};
use serde_json::{Value, json};

use crate::media::{Part, parts_of};
use crate::sampler::schema_of;
use crate::schema::{Words, broken_tool};

/// A request as the model is to read it.
pub struct Rendered {
    /// The prompt, never empty.
    pub prompt: Rendering,
    /// The beginning of the answer as the client wants it, which belongs to the prompt.
    pub prefill: Vec<LlamaToken>,
    /// The beginning of the answer, where it was given elsewhere.
    pub given: Vec<LlamaToken>,
    /// What the template says of the answer, where it is more than text: how calls and reasoning are marked.
    pub form: Option<ChatParams>,
}

/// A prompt without the beginning of its answer.
pub enum Rendering {
    /// Text alone.
    Tokens(Vec<LlamaToken>),
    /// Text around pictures and sound.
    Parts(Vec<Part>),
}

/// Renders the prompt, and tokenises it as far as it is text.
///
/// # Errors
/// The template refuses the messages, or the text cannot be tokenised.
pub fn render(model: &LlamaModel, templates: &ChatTemplates, request: &GenerateRequest) -> Result<Rendered, Error> {
    let mut form = None;
    let prompt = match &request.prompt {
        Prompt::Raw(text) => Rendering::Tokens(match &request.suffix {
            Some(suffix) => around(model, text, suffix)?,
            None => model.str_to_token_with_special(text, AddBos::Always, Special::Tokenize).map_err(internal)?,
        }),
        Prompt::Tokens(tokens) => Rendering::Tokens(known(model, "prompt", tokens)?),
        Prompt::Chat(messages) if !request.context.is_empty() => {
            let (tokens, chat) = behind(model, templates, messages, request)?;
            form = form_of(request, chat);
            Rendering::Tokens(tokens)
        }
        Prompt::Chat(messages) => {
            // Nobody can know it, so nobody writes it into a message.
            let mark = format!("<media {:032x} ", rand::random::<u128>());
            let chat = apply(templates, messages, &mark, request).or_else(|error| match merged(messages) {
                // Some templates want roles to alternate: said in one turn, it is the same.
                Some(merged) => apply(templates, &merged, &mark, request).map_err(|_| error),
                None => Err(error),
            })?;
            let media: Vec<_> = request.media().cloned().collect();
            let rendering = match media.is_empty() {
                true => Rendering::Tokens(chat.tokenize_prompt(model, AddBos::Always).map_err(internal)?),
                false => Rendering::Parts(parts_of(&chat, &mark, media)?),
            };
            form = form_of(request, chat);
            rendering
        }
    };
    if matches!(&prompt, Rendering::Tokens(tokens) if tokens.is_empty()) {
        return Err(Error::invalid("prompt", "the prompt is empty: send at least one token of text"));
    }
    // In one piece: together they may be other tokens than each for itself.
    let mut prefill = given_tokens(model, &request.prefill)?;
    let mut given = given_tokens(model, &request.given)?;
    if !request.prefill.is_empty() && !request.given.is_empty() {
        let both = given_tokens(model, &format!("{}{}", request.prefill, request.given))?;
        let at = prefill.len().min(both.len());
        given = both[at..].to_vec();
        prefill = both[..at].to_vec();
    }
    Ok(Rendered { prompt, prefill, given, form })
}

/// What the template says of the answer, where it is more than text.
fn form_of(request: &GenerateRequest, chat: ChatParams) -> Option<ChatParams> {
    let reasons = !chat.thinking_start_tag.is_empty() && !request.format.is_constrained();
    // What goes on in the middle of an answer is not taken apart anew.
    let is_new = request.given.is_empty() && request.prefill.is_empty();
    (is_new && (request.tools.is_some() || reasons)).then_some(chat)
}

/// What a system and a user say, said by the user; `None` if it is anything else.
fn in_one_turn(messages: &[Message]) -> Option<Message> {
    match messages {
        [system, user] if system.role == Role::System && user.role == Role::User => {
            Some(Message::new(Role::User, format!("{}\n\n{}", system.content, user.content)))
        }
        _ => None,
    }
}

/// Turns behind what was said before, as the template writes them behind an answer.
fn behind(
    model: &LlamaModel,
    templates: &ChatTemplates,
    messages: &[Message],
    request: &GenerateRequest,
) -> Result<(Vec<LlamaToken>, ChatParams), Error> {
    // What was said is there in tokens: one that nobody else writes stands for it.
    let answer = format!("{:032x}", rand::random::<u128>());
    let said = [Message::new(Role::User, "?"), Message::new(Role::Assistant, answer.as_str())];
    let chat =
        apply(templates, &[&said, messages].concat(), "", request).or_else(|error| match in_one_turn(messages) {
            // Some templates want those of the system first: said by the user, it is still said.
            Some(turn) => apply(templates, &[&said[..], &[turn]].concat(), "", request).map_err(|_| error),
            None => Err(error),
        })?;
    let mut tokens = known(model, "context", &request.context)?;
    // The template writes the mark of the answer's end.
    while tokens.last().is_some_and(|token| model.is_eog_token(*token)) {
        tokens.pop();
    }
    let parts: Vec<_> = match chat.prompt_parts.as_slice() {
        [] => vec![(chat.prompt.as_str(), false)],
        parts => parts.iter().map(|part| (part.text.as_str(), part.is_input)).collect(),
    };
    let lacks = || Error::invalid("context", "the model's chat template cannot go on from `context`: use /api/chat");
    let at = parts.iter().rposition(|(text, _)| text.contains(&answer)).ok_or_else(lacks)?;
    let (begun, is_input) = parts[at];
    let begun = begun.rsplit_once(&answer).map_or("", |(_, further)| further);
    for (text, is_input) in [(begun, is_input)].into_iter().chain(parts[at + 1..].iter().copied()) {
        let special = if is_input { Special::Plaintext } else { Special::Tokenize };
        tokens.extend(model.str_to_token_with_special(text, AddBos::Never, special).map_err(internal)?);
    }
    Ok((tokens, chat))
}

/// A prompt as [`render`] makes it, cut where it is too long for the context and may be: the oldest messages go first, but for those of
/// the system and the last one; then the middle of what is left.
///
/// # Errors
/// As [`render`].
pub fn render_within(
    model: &LlamaModel,
    templates: &ChatTemplates,
    request: &GenerateRequest,
    context_tokens: usize,
) -> Result<Rendered, Error> {
    let mut rendered = render(model, templates, request)?;
    // Of what is to be filled in, both sides are needed.
    if !request.truncate || request.suffix.is_some() {
        return Ok(rendered);
    }
    // An answer needs room too.
    let answer = request.max_tokens.map_or(usize::MAX, |most| most as usize).min(context_tokens / ROOM);
    let room = context_tokens.saturating_sub(answer.max(1));
    if rendered.fits(room) {
        return Ok(rendered);
    }
    if let Prompt::Chat(messages) = &request.prompt {
        let without = |dropped: usize| render(model, templates, &without_oldest(request, messages, dropped));
        let turns = turns(messages);
        // Fewer messages are fewer tokens.
        let enough = turns.partition_point(|turn| !without(*turn).is_ok_and(|rendered| rendered.fits(room)));
        if let Some(dropped) = turns.get(enough).or(turns.last()) {
            rendered = without(*dropped)?;
        }
    }
    rendered.cut(room);
    Ok(rendered)
}

/// Of a context, an answer has so much room at least where a prompt is cut: one part of so many.
const ROOM: usize = 4;
/// Tokens at the beginning of a prompt that are kept, as Ollama has it.
const KEPT: usize = 4;

/// How many of the oldest messages may go, so that the first one that is left is a user's: templates want no other, and no result
/// without its call.
fn turns(messages: &[Message]) -> Vec<usize> {
    let spoken: Vec<_> = messages.iter().filter(|message| message.role != Role::System).collect();
    (1..spoken.len()).filter(|dropped| spoken[*dropped].role == Role::User).collect()
}

/// A request without so many of its oldest messages.
fn without_oldest(request: &GenerateRequest, messages: &[Message], dropped: usize) -> GenerateRequest {
    let (last, earlier) = messages.split_last().map_or((None, &[][..]), |(last, earlier)| (Some(last), earlier));
    let mut left = dropped;
    let kept = earlier.iter().filter(|message| {
        let is_kept = message.role == Role::System || left == 0;
        left -= usize::from(!is_kept);
        is_kept
    });
    GenerateRequest { prompt: Prompt::Chat(kept.chain(last).cloned().collect()), ..request.clone() }
}

impl Rendered {
    /// Whether all that is text in the prompt, and no more, has so much room.
    fn fits(&self, room: usize) -> bool {
        match &self.prompt {
            Rendering::Tokens(tokens) => tokens.len() + self.prefill.len() + self.given.len() <= room,
            // How long pictures are is not known yet.
            Rendering::Parts(_) => true,
        }
    }

    /// Takes out the middle of a prompt that has not so much room.
    fn cut(&mut self, room: usize) {
        let room = room.saturating_sub(self.prefill.len() + self.given.len());
        if let Rendering::Tokens(tokens) = &mut self.prompt
            && (1..tokens.len()).contains(&room)
        {
            let kept = KEPT.min(room / 2);
            tokens.drain(kept..tokens.len() - (room - kept));
        }
    }
}

/// Tokens that a client has made itself.
///
/// # Errors
/// The model has no such token.
pub fn known(model: &LlamaModel, param: &str, tokens: &[i32]) -> Result<Vec<LlamaToken>, Error> {
    let there_are = model.n_vocab();
    match tokens.iter().find(|token| !(0..there_are).contains(*token)) {
        Some(token) => {
            let message = format!("`{token}` is no token of this model: use ids from 0 to {}", there_are - 1);
            Err(Error::invalid(param, message))
        }
        None => Ok(tokens.iter().copied().map(LlamaToken).collect()),
    }
}

/// The text around a place that is to be filled, as llama.cpp's server has it.
fn around(model: &LlamaModel, prefix: &str, suffix: &str) -> Result<Vec<LlamaToken>, Error> {
    let marks = [model.token_fim_pre(), model.token_fim_suf(), model.token_fim_mid()];
    if marks.iter().any(|mark| mark.0 < 0) {
        // The server knows its name.
        return Err(Error::Unsupported { model: String::new(), ability: "insert (`suffix`)".to_owned() });
    }
    let tokens = |text: &str, bos| model.str_to_token_with_special(text, bos, Special::Plaintext).map_err(internal);
    let begin = model.str_to_token_with_special("", AddBos::Always, Special::Plaintext).map_err(internal)?;
    let [pre, suf, mid] = marks.map(|mark| vec![mark]);
    Ok([begin, pre, tokens(prefix, AddBos::Never)?, suf, tokens(suffix, AddBos::Never)?, mid].concat())
}

/// Text that goes on in the middle of a line. Some vocabularies put a space before whatever they are handed: there, it is
/// tokenised behind a line break, which is taken off again.
pub fn given_tokens(model: &LlamaModel, given: &str) -> Result<Vec<LlamaToken>, Error> {
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

/// Applies the template to the messages and tools. The model is shown the tools as they are; the grammar of their calls is made of
/// the words that llama.cpp knows.
fn apply(
    templates: &ChatTemplates,
    messages: &[Message],
    mark: &str,
    request: &GenerateRequest,
) -> Result<ChatParams, Error> {
    let params = chat_params(messages, mark, request);
    let Some(tools) = &request.tools else {
        return templates.apply(&params).map_err(|error| refused("messages", &error));
    };
    let shown = shown(tools);
    let mut words = Words::default();
    let params = match schema_of(&request.format).and_then(|schema| serde_json::from_str(&schema).ok()) {
        Some(schema) => params.with_json_schema(words.of(&schema).to_string()),
        None => params,
    };
    let written = words.of_tools(&shown);
    let with = |tools: &str| templates.apply(&params.clone().with_tools(tools.to_owned()));
    // What llama.cpp cannot read of them is put in other words for the model too.
    let chat = with(&shown).or_else(|error| match Words::for_reading().of_tools(&shown) {
        Some(readable) => with(&readable),
        None => Err(error),
    });
    let refuses = |error: ChatError| match templates.apply(&params).err() {
        // It is not about the tools.
        Some(error) => refused("messages", &error),
        None => match broken_tool(&shown) {
            Some(why) => Error::invalid("tools", format!("cannot make calls of the `tools`: {why}")),
            None => refused("tools", &error),
        },
    };
    let mut chat = chat.map_err(refuses)?;
    if let Some(written) = written.filter(|_| !chat.grammar.is_empty()) {
        chat.grammar = with(&written).map_err(refuses)?.grammar;
    }
    chat.grammar = words.put_in(&chat.grammar);
    Ok(chat)
}

/// With what one says in several turns, one after the other, in one; `None` if nobody does.
fn merged(messages: &[Message]) -> Option<Vec<Message>> {
    let may = |one: &Message| one.role != Role::Tool && one.tool_calls.is_empty() && one.reasoning.is_empty();
    let mut merged: Vec<Message> = Vec::new();
    for message in messages {
        match merged.last_mut().filter(|last| last.role == message.role && may(last) && may(message)) {
            Some(last) => {
                last.content.push_str("\n\n");
                let at = last.content.len();
                last.content.push_str(&message.content);
                last.media.extend(message.media.iter().map(|media| Media { at: media.at + at, ..media.clone() }));
            }
            None => merged.push(message.clone()),
        }
    }
    (merged.len() < messages.len()).then_some(merged)
}

/// What a template says of what it refuses; it may repeat all of it.
fn refused(param: &str, error: &ChatError) -> Error {
    let why: String = error.to_string().chars().take(TOLD).collect();
    Error::invalid(param, format!("the model's chat template refuses the `{param}`: {why}"))
}

/// Characters of what a template says that are told.
const TOLD: usize = 400;

/// All but the tools themselves.
fn chat_params(messages: &[Message], mark: &str, request: &GenerateRequest) -> ChatApplyParams {
    let mut marks = 0;
    let messages: Value = messages.iter().map(|one| message(one, mark, &mut marks)).collect();
    let mut params = ChatApplyParams::new(messages.to_string());
    if let Some(values) = &request.template_values {
        params = params.with_template_kwargs(written_out(values));
    }
    let Some(tools) = &request.tools else {
        // What must have a form of its own does not begin with reasoning.
        let is_constrained = request.format.is_constrained();
        let format = if is_constrained { ReasoningFormat::None } else { ReasoningFormat::Auto };
        let thinks = !is_constrained && request.prefill.is_empty() && request.think.unwrap_or(true);
        return params.with_reasoning_format(format).with_enable_thinking(thinks);
    };
    let choice = match tools.choice {
        ToolChoice::Auto => LlamaToolChoice::Auto,
        ToolChoice::Required | ToolChoice::Named(_) => LlamaToolChoice::Required,
    };
    params
        .with_reasoning_format(ReasoningFormat::Auto)
        .with_enable_thinking(request.think.unwrap_or(true))
        .with_tool_choice(choice)
        .with_parallel_tool_calls(tools.parallel.unwrap_or(true))
}

/// Values for a template, each as the text of its JSON: the bindings hand texts on as they are.
fn written_out(values: &str) -> String {
    let values: serde_json::Map<String, Value> = serde_json::from_str(values).unwrap_or_default();
    let values = values.into_iter().map(|(name, value)| (name, Value::String(value.to_string())));
    Value::Object(values.collect()).to_string()
}

/// The definitions that the model is shown: all, or the one that it must call.
fn shown(tools: &Tools) -> String {
    let ToolChoice::Named(wanted) = &tools.choice else { return tools.definitions.clone() };
    let all: Vec<Value> = serde_json::from_str(&tools.definitions).unwrap_or_default();
    all.into_iter().filter(|tool| tool["function"]["name"] == *wanted).collect::<Value>().to_string()
}

/// A message as templates know it, with a numbered mark for each of its media.
fn message(message: &Message, mark: &str, marks: &mut usize) -> Value {
    let mut content = message.content.clone();
    for (number, media) in message.media.iter().enumerate().rev() {
        content.insert_str(media.at, &format!("{mark}{}>", *marks + number));
    }
    *marks += message.media.len();
    let mut value = json!({ "role": message.role.as_str(), "content": content });
    if !message.tool_calls.is_empty() {
        let call = |call: &sarai_core::ToolCall| json!({ "id": call.id, "type": "function", "function": { "name": call.name, "arguments": call.arguments } });
        value["tool_calls"] = message.tool_calls.iter().map(call).collect();
    }
    if !message.reasoning.is_empty() {
        value["reasoning_content"] = message.reasoning.as_str().into();
    }
    if let Some(result_of) = &message.result_of {
        for (key, said) in [("tool_call_id", &result_of.id), ("name", &result_of.name)] {
            if let Some(said) = said {
                value[key] = said.as_str().into();
            }
        }
    }
    value
}

pub fn internal(error: impl std::fmt::Display) -> Error {
    Error::Internal(error.to_string())
}
