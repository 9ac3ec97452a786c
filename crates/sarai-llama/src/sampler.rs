//! Choosing the tokens of an answer, by llama.cpp's own samplers and grammars.

use std::collections::HashSet;

use llama_cpp_4::chat::ChatParams;
use llama_cpp_4::common_sampler::{CommonSampler, CommonSamplerParams, CommonSamplerType, GrammarSource};
use llama_cpp_4::context::LlamaContext;
use llama_cpp_4::model::{AddBos, LlamaModel, Special};
use llama_cpp_4::sampling::LlamaSampler;
use llama_cpp_4::token::LlamaToken;
use llama_cpp_4::token::data::LlamaTokenData;
use llama_cpp_4::token::data_array::LlamaTokenDataArray;
use sarai_core::{Error, Format, GenerateRequest, Samplers, Sampling};
use serde::Deserialize;

use crate::prompt::internal;
use crate::schema;

/// Both APIs' -100 bans a token; for llama.cpp that is minus infinity, which JSON frames cannot carry.
const BANNED: f32 = -100.0;

/// Chooses the tokens of one answer.
pub struct Sampler {
    chain: CommonSampler,
    /// The grammar once more: where nothing is left that it allows, llama.cpp chooses something else, and ends the process at
    /// the token after that.
    guard: Option<LlamaSampler>,
    /// Whether calls follow a grammar.
    has_calls: bool,
    has_bans: bool,
    /// The client's field that says the form of the answer.
    form: String,
}

impl Sampler {
    /// Whether the answer follows a grammar, all of it or its calls.
    pub fn follows_form(&self) -> bool {
        self.guard.is_some() || self.has_calls
    }

    /// Of one generation, whose template may have said what form its calls have.
    ///
    /// # Errors
    /// The schema or the grammar is none that llama.cpp can follow, or a token does not exist.
    pub fn new(
        model: &LlamaModel,
        context_tokens: usize,
        request: &GenerateRequest,
        form: Option<&ChatParams>,
    ) -> Result<Self, Error> {
        let mut params = CommonSamplerParams::new();
        set_scalars(&mut params, context_tokens, &request.sampling);
        set_further(&mut params, &request.sampling.further)?;
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
        // A form ends with itself, and calls end an answer.
        if request.sampling.ignore_eos && !request.has_form() {
            for end in (0..model.n_vocab()).map(LlamaToken).filter(|token| model.is_eog_token(*token)) {
                params.add_logit_bias(end, f32::NEG_INFINITY).map_err(internal)?;
            }
        }
        let calls = form.filter(|form| !form.grammar.is_empty());
        let param = form_param(request);
        let bad = |error: &dyn std::fmt::Display| cannot(param, error);
        let has_bans = request.sampling.logit_bias.iter().any(|(_, bias)| *bias <= BANNED);
        let grammar = match calls {
            Some(_) if has_bans => {
                return Err(Error::invalid(
                    "logit_bias",
                    "`logit_bias` bans tokens that calls of tools may need: leave one of both out",
                ));
            }
            Some(form) => {
                set_calls(&mut params, model, form)?;
                None
            }
            None => {
                let grammar = grammar(request, None)?;
                if let Some(grammar) = &grammar {
                    params.set_grammar(grammar, GrammarSource::User, false).map_err(|error| bad(&error))?;
                }
                grammar
            }
        };
        let chain = CommonSampler::new(model, &mut params).map_err(|error| bad(&error))?;
        let guard = grammar.map(|grammar| LlamaSampler::try_grammar(model, &grammar, "root"));
        let guard = guard.transpose().map_err(|error| bad(&error))?;
        Ok(Self { chain, guard, has_calls: calls.is_some(), has_bans, form: param.to_owned() })
    }

    /// Takes a token of the prompt into account.
    pub fn saw(&mut self, token: LlamaToken) {
        self.chain.accept(token, false);
    }

    /// Chooses the next token by the logits of this row.
    ///
    /// # Errors
    /// There is none that the grammar allows.
    pub fn choose(
        &mut self,
        model: &LlamaModel,
        context: &mut LlamaContext<'_>,
        row: i32,
    ) -> Result<LlamaToken, Error> {
        let token = self.chain.sample(context, row, false).map_err(internal)?;
        let (has_bans, form) = (self.has_bans, &self.form);
        let stuck = || match has_bans {
            true => {
                Error::invalid("logit_bias", "no token is left that the form of the answer allows: ban fewer tokens")
            }
            false => {
                Error::invalid(form, format!("no token of this model goes on in the form of `{form}`: ask for another"))
            }
        };
        if let Some(guard) = &mut self.guard {
            let mut one = LlamaTokenDataArray::new(vec![LlamaTokenData::new(token, 1.0, 0.0)], false);
            guard.apply(&mut one);
            if one.data.first().is_none_or(|data| data.logit().is_infinite()) {
                return Err(stuck());
            }
        }
        if model.is_eog_token(token) {
            // Grammars take no end.
            return Ok(token);
        }
        if let Some(guard) = &mut self.guard {
            guard.try_accept(token).map_err(|_| stuck())?;
        }
        self.chain.accept(token, true);
        if self.chain.last() == token { Ok(token) } else { Err(stuck()) }
    }
}

/// The grammar of a request's form. That of calls is the template's; that of an answer is made of the schema alone: the templates' own
/// ones let a fence of backticks through.
///
/// # Errors
/// llama.cpp cannot make one of the schema.
pub fn grammar(request: &GenerateRequest, form: Option<&ChatParams>) -> Result<Option<String>, Error> {
    match (form, &request.format) {
        (Some(form), _) if !form.grammar.is_empty() => Ok(Some(form.grammar.clone())),
        (_, Format::Gbnf(grammar)) => Ok(Some(grammar.clone())),
        (_, format) => schema_of(format)
            .map(|schema| schema::grammar(&schema))
            .transpose()
            .map_err(|error| cannot(form_param(request), &error)),
    }
}

/// The client's field that says the form of the answer.
pub fn form_param(request: &GenerateRequest) -> &str {
    if request.tools.is_some() { "tools" } else { &request.format_param }
}

/// A form that llama.cpp has no grammar for.
pub fn cannot(param: &str, error: &dyn std::fmt::Display) -> Error {
    Error::invalid(param, format!("llama.cpp cannot make a grammar of `{param}`: {error}"))
}

#[derive(Deserialize)]
struct Trigger {
    #[serde(rename = "type")]
    kind: String,
    value: String,
    #[serde(default)]
    token: i32,
}

/// The only token of a text, if it is one.
fn only_token(model: &LlamaModel, text: &str) -> Option<LlamaToken> {
    let tokens = tokens(model, text);
    (tokens.len() == 1).then(|| tokens[0])
}

fn tokens(model: &LlamaModel, text: &str) -> Vec<LlamaToken> {
    model.str_to_token_with_special(text, AddBos::Never, Special::Tokenize).unwrap_or_default()
}

/// Special tokens that the parser of calls has to see.
pub fn preserved(model: &LlamaModel, form: &ChatParams) -> HashSet<LlamaToken> {
    let words: Vec<String> = serde_json::from_str(&form.preserved_tokens_json).unwrap_or_default();
    words.iter().filter_map(|word| only_token(model, word)).collect()
}

/// Further texts that end an answer of this form.
pub fn stops(form: &ChatParams) -> Vec<String> {
    serde_json::from_str(&form.additional_stops_json).unwrap_or_default()
}

/// The grammar of a call that must be made, without the text that llama.cpp lets stand before it: a small model that does not
/// know its own template's marks would write text for ever.
fn without_preface(grammar: &str) -> String {
    let is_preface = |word: &&str| {
        let number = word.strip_prefix("until-").and_then(|word| word.strip_suffix('?'));
        number.is_some_and(|number| number.parse::<u32>().is_ok())
    };
    let lines = grammar.lines().map(|line| match line.starts_with("root ::=") {
        true => line.split(' ').filter(|word| !is_preface(word)).collect::<Vec<_>>().join(" "),
        false => line.to_owned(),
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// The grammar of calls: from the beginning where one must be made, else from the mark on that begins one, and never within
/// reasoning.
fn set_calls(params: &mut CommonSamplerParams, model: &LlamaModel, form: &ChatParams) -> Result<(), Error> {
    let triggers: Vec<Trigger> = serde_json::from_str(&form.grammar_triggers_json).unwrap_or_default();
    if form.grammar_lazy && triggers.is_empty() {
        return Ok(());
    }
    let bad = |error: &dyn std::fmt::Display| {
        Error::invalid("tools", format!("llama.cpp cannot make a grammar of the tools: {error}"))
    };
    let grammar = if form.grammar_lazy { form.grammar.clone() } else { without_preface(&form.grammar) };
    params.set_grammar(&grammar, GrammarSource::ToolCalls, form.grammar_lazy).map_err(|error| bad(&error))?;
    let preserved = preserved(model, form);
    for Trigger { kind, value, token } in triggers {
        let single = only_token(model, &value).filter(|token| kind == "word" && preserved.contains(token));
        let (kind, token) = single.map_or((kind.as_str(), LlamaToken(token)), |token| ("token", token));
        params.add_grammar_trigger(kind, &value, token).map_err(|error| bad(&error))?;
    }
    params.set_generation_prompt(form.generation_prompt()).map_err(internal)?;
    let ends: Vec<String> = serde_json::from_str(&form.thinking_end_tags_json).unwrap_or_default();
    if !form.thinking_start_tag.is_empty() && !ends.is_empty() {
        let ends: Vec<_> = ends.iter().map(|end| tokens(model, end)).collect();
        let start = tokens(model, &form.thinking_start_tag);
        params.set_reasoning_budget(&start, &ends, &ends[0], "").map_err(internal)?;
    }
    Ok(())
}

/// The schema of a form of JSON.
pub fn schema_of(format: &Format) -> Option<String> {
    match format {
        Format::Text | Format::Gbnf(_) => None,
        Format::Json => Some(r#"{"type":"object"}"#.to_owned()),
        Format::Schema(schema) => Some(schema.clone()),
    }
}

/// Which samplers there are.
fn set_further(params: &mut CommonSamplerParams, further: &Samplers) -> Result<(), Error> {
    if let Some(names) = &further.samplers {
        let kinds = names.iter().filter_map(|name| KINDS.iter().find(|kind| kind.name().is_ok_and(|one| one == *name)));
        params.set_samplers(&kinds.copied().collect::<Vec<_>>()).map_err(internal)?;
    }
    Ok(())
}

/// Samplers that a request may name.
const KINDS: [CommonSamplerType; 8] = [
    CommonSamplerType::TopK,
    CommonSamplerType::TypicalP,
    CommonSamplerType::TopP,
    CommonSamplerType::TopNSigma,
    CommonSamplerType::MinP,
    CommonSamplerType::Temperature,
    CommonSamplerType::Xtc,
    CommonSamplerType::Penalties,
];

/// Less likely ones are not left out for being likely.
const LEAST_THRESHOLD: f32 = 1e-6;
/// What is colder is greedy.
const LEAST_TEMPERATURE: f32 = 1e-4;

fn set_scalars(params: &mut CommonSamplerParams, context_tokens: usize, sampling: &Sampling) {
    let mut scalars = params.scalars();
    let set = |to: &mut f32, from: Option<f32>| *to = from.unwrap_or(*to);
    // A logit divided by less is no number.
    set(&mut scalars.temp, sampling.temperature.map(|heat| if heat < LEAST_TEMPERATURE { 0.0 } else { heat }));
    set(&mut scalars.top_p, sampling.top_p);
    set(&mut scalars.min_p, sampling.min_p);
    set(&mut scalars.typ_p, sampling.typical_p);
    set(&mut scalars.penalty_repeat, sampling.repeat_penalty);
    set(&mut scalars.penalty_freq, sampling.frequency_penalty);
    set(&mut scalars.penalty_present, sampling.presence_penalty);
    scalars.top_k = sampling.top_k.unwrap_or(scalars.top_k);
    let further = &sampling.further;
    set(&mut scalars.top_n_sigma, further.top_n_sigma);
    set(&mut scalars.xtc_probability, further.xtc_probability);
    // At 0 it would take tokens away that are none, such as those that a form does not allow.
    set(&mut scalars.xtc_threshold, further.xtc_threshold.map(|threshold| threshold.max(LEAST_THRESHOLD)));
    set(&mut scalars.dynatemp_range, further.dynatemp_range);
    set(&mut scalars.dynatemp_exponent, further.dynatemp_exponent);
    set(&mut scalars.mirostat_tau, further.mirostat_tau);
    set(&mut scalars.mirostat_eta, further.mirostat_eta);
    let number = |number: Option<u32>, or: i32| number.map_or(or, |number| i32::try_from(number).unwrap_or(i32::MAX));
    scalars.min_keep = number(further.min_keep, scalars.min_keep);
    scalars.mirostat = number(further.mirostat.map(u32::from), scalars.mirostat);
    // The samplers take -1 for nothing; both APIs mean the whole context by it.
    let last_n = sampling.repeat_last_n.unwrap_or(scalars.penalty_last_n);
    // Nobody has more tokens behind him than the context holds, and llama.cpp allocates as many as it is told.
    let most = i32::try_from(context_tokens).unwrap_or(i32::MAX);
    scalars.penalty_last_n = if last_n < 0 { most } else { last_n.min(most) };
    scalars.seed = sampling.seed.unwrap_or(scalars.seed);
    scalars.no_perf = true;
    params.set_scalars(&scalars);
}

#[cfg(test)]
mod tests {
    use super::without_preface;

    #[test]
    fn a_call_that_must_be_made_is_made_at_once() {
        let grammar = "root ::= \"a\" space until-161? tool-calls\nuntil-161 ::= | [<] until-161\nx ::= until-161?";
        let wanted = "root ::= \"a\" space tool-calls\nuntil-161 ::= | [<] until-161\nx ::= until-161?";
        assert_eq!(without_preface(grammar), wanted);
    }
}
