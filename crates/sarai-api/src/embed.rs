//! Vectors and scores of texts, in both APIs: `/v1/embeddings`, `/v1/rerank`, `/api/embed`, `/api/embeddings`.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sarai_core::{Api, EmbedRequest, Error, Extras, Input, KeepAlive, MOST_INPUTS, Timings, Usage};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::extras::Rest;
use crate::json::Object;
use crate::ollama::keep_alive;
use crate::sampling::float;
use crate::{Served, check, json as wire, whole};

/// A parsed request.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed {
    /// The name as the client wrote it.
    pub model: String,
    /// Of what vectors or scores are wanted.
    pub request: EmbedRequest,
    /// How long the model stays.
    pub keep_alive: Option<KeepAlive>,
    /// Only so many numbers of each vector.
    pub dimensions: Option<usize>,
    /// Whether more of them than there are mean all.
    pub takes_fewer: bool,
    /// Vectors as base64 of their bytes.
    pub is_base64: bool,
    /// The best so many scores.
    pub top: Option<usize>,
    /// Whether scored texts are sent back.
    pub returns_documents: bool,
    /// Whether scores are wanted as Text Embeddings Inference has them.
    pub is_tei: bool,
    /// What nobody here reads: it goes, as it is, to hosts that speak the same API.
    pub extras: Option<Box<Extras>>,
}

impl Parsed {
    /// Of one text, with nothing else said.
    #[must_use]
    pub fn of_text(text: &str) -> Self {
        Self::new(String::new(), vec![Input::Text(text.to_owned())])
    }

    fn new(model: String, inputs: Vec<Input>) -> Self {
        let request = EmbedRequest::new(inputs);
        let (keep_alive, dimensions, top) = (None, None, None);
        Self {
            model,
            request,
            keep_alive,
            dimensions,
            takes_fewer: false,
            is_base64: false,
            top,
            returns_documents: false,
            is_tei: false,
            extras: None,
        }
    }
}

/// Vectors or scores that were made.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Embedded {
    /// In the order of the inputs.
    pub vectors: Vec<Vec<f32>>,
    /// Tokens.
    pub usage: Usage,
    /// Time.
    pub timings: Timings,
}

impl Embedded {
    /// Keeps the first numbers of each vector, brought to the length 1 again.
    ///
    /// # Errors
    /// There are not so many.
    pub fn shorten(&mut self, parsed: &Parsed) -> Result<(), Error> {
        let Some(wanted) = parsed.dimensions else { return Ok(()) };
        for vector in &mut self.vectors {
            if wanted > vector.len() && parsed.takes_fewer {
                continue;
            }
            if wanted > vector.len() {
                let message = format!("`dimensions` is {wanted}: use a number from 1 to {}", vector.len());
                return Err(Error::invalid("dimensions", message));
            }
            vector.truncate(wanted);
            let length = vector.iter().map(|value| value * value).sum::<f32>().sqrt();
            if length > 0.0 {
                vector.iter_mut().for_each(|value| *value /= length);
            }
        }
        Ok(())
    }
}

/// Texts and tokens, as OpenAI's API has them.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a text, an array of texts, an array of tokens, or an array of those")]
pub(crate) enum Inputs {
    Text(String),
    Tokens(Vec<i32>),
    Many(Vec<OneInput>),
}

/// One of several; texts and tokens may stand side by side.
#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum OneInput {
    Text(String),
    Tokens(Vec<i32>),
}

impl Inputs {
    fn read(self, param: &str) -> Result<Vec<Input>, Error> {
        checked(param, self.all(), Empty::Refused)
    }

    pub(crate) fn all(self) -> Vec<Input> {
        let one = |one: OneInput| match one {
            OneInput::Text(text) => Input::Text(text),
            OneInput::Tokens(tokens) => Input::Tokens(tokens),
        };
        match self {
            Self::Text(text) => vec![Input::Text(text)],
            // An array with nothing in it is none of texts either.
            Self::Tokens(tokens) if tokens.is_empty() => Vec::new(),
            Self::Tokens(tokens) => vec![Input::Tokens(tokens)],
            Self::Many(all) => all.into_iter().map(one).collect(),
        }
    }
}

/// What may stand among several texts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Empty {
    Refused,
    /// Its marks are tokens too.
    Allowed,
}

fn checked(param: &str, inputs: Vec<Input>, empty: Empty) -> Result<Vec<Input>, Error> {
    let wrong = |message: String| Err(Error::invalid(param, message));
    if inputs.is_empty() {
        return wrong(format!("`{param}` is empty: send at least one text"));
    }
    if inputs.len() > MOST_INPUTS {
        return wrong(format!("`{param}` has {} texts: send at most {MOST_INPUTS} at a time", inputs.len()));
    }
    for (index, input) in inputs.iter().enumerate() {
        let at = format!("{param}[{index}]");
        match input {
            Input::Text(text) if text.is_empty() && empty == Empty::Refused => {
                return wrong(format!("`{at}` is an empty text: send at least one character"));
            }
            Input::Text(text) => drop(check::text(&at, text.clone())?),
            Input::Tokens(tokens) if tokens.is_empty() => {
                return wrong(format!("`{at}` has no tokens: send at least one"));
            }
            Input::Tokens(_) => {}
        }
    }
    Ok(inputs)
}

/// What a body holds beyond these fields.
fn extras_of(api: Api, body: &[u8], read: &[&str]) -> Result<Option<Box<Extras>>, Error> {
    let mut rest = Rest::of(api, body, read)?;
    rest.degrades_without(&["user", "options", "keep_alive"]);
    Ok(Some(rest.finish()))
}

/// How many numbers of each vector are wanted.
fn dimensions(written: Option<i64>) -> Result<Option<usize>, Error> {
    let wrong = |n: i64| Error::invalid("dimensions", format!("`dimensions` is {n}: use a number from 1 on"));
    written.map(|n| usize::try_from(n).ok().filter(|&n| n > 0).ok_or_else(|| wrong(n))).transpose()
}

#[derive(Deserialize)]
struct OpenAiBody {
    model: Option<String>,
    input: Inputs,
    encoding_format: Option<String>,
    dimensions: Option<i64>,
    truncate: Option<bool>,
}

/// Reads the body of `/v1/embeddings`. Texts that are too long are cut if `truncate` says so.
///
/// # Errors
/// [`Error::InvalidRequest`] with the field's name.
pub fn parse_openai(body: &[u8]) -> Result<Parsed, Error> {
    let extras = extras_of(Api::OpenAi, body, &["model", "input", "encoding_format", "dimensions", "truncate"])?;
    let body: OpenAiBody = wire::parse(body)?;
    let is_base64 = match body.encoding_format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            let message = format!("`encoding_format` is `{other}`: use float or base64");
            return Err(Error::invalid("encoding_format", message));
        }
    };
    let mut parsed = Parsed::new(body.model.unwrap_or_default(), body.input.read("input")?);
    parsed.request.truncate = body.truncate.unwrap_or(false);
    Ok(Parsed { dimensions: dimensions(body.dimensions)?, is_base64, extras, ..parsed })
}

/// The answer of `/v1/embeddings`.
#[must_use]
pub fn openai(model: &str, is_base64: bool, embedded: &Embedded, served: &Served) -> Value {
    let vector = |values: &Vec<f32>| match is_base64 {
        true => STANDARD.encode(values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>()).into(),
        false => numbers(values),
    };
    let rows = embedded.vectors.iter().enumerate();
    let rows =
        rows.map(|(index, values)| json!({ "object": "embedding", "index": index, "embedding": vector(values) }));
    let tokens = embedded.usage.prompt_tokens;
    json!({
        "object": "list", "data": rows.collect::<Vec<_>>(), "model": model,
        "usage": { "prompt_tokens": tokens, "total_tokens": tokens },
        "sarai": crate::openai::extension(served, &embedded.timings),
    })
}

#[derive(Deserialize)]
struct OllamaBody {
    model: String,
    input: Option<Inputs>,
    truncate: Option<bool>,
    dimensions: Option<i64>,
    keep_alive: Option<Value>,
    options: Option<Object<Options>>,
}

#[derive(Deserialize)]
struct Options {
    #[serde(default, deserialize_with = "whole::deserialize")]
    num_ctx: Option<i64>,
}

#[derive(Deserialize)]
struct OldOllamaBody {
    model: String,
    prompt: Option<String>,
    keep_alive: Option<Value>,
}

fn keep(value: Option<&Value>) -> Result<Option<KeepAlive>, Error> {
    value.filter(|value| !value.is_null()).map(keep_alive::parse).transpose()
}

/// Reads the body of `/api/embed`. Texts that are too long are cut, unless `truncate` is false. Without a text, the model is only to be loaded.
///
/// # Errors
/// [`Error::InvalidRequest`] with the field's name.
pub fn parse_ollama(body: &[u8]) -> Result<Parsed, Error> {
    let extras = extras_of(Api::Ollama, body, &["model", "input", "truncate", "dimensions", "keep_alive"])?;
    let body: OllamaBody = wire::parse(body)?;
    let is_nothing = matches!(&body.input, Some(Inputs::Text(text)) if text.is_empty());
    let inputs = body.input.map(Inputs::all).unwrap_or_default();
    let inputs = if is_nothing || inputs.is_empty() { Vec::new() } else { checked("input", inputs, Empty::Allowed)? };
    let mut parsed = Parsed::new(body.model, inputs);
    parsed.request.truncate = body.truncate.unwrap_or(true);
    let num_ctx = body.options.and_then(|Object(options)| options.num_ctx);
    parsed.request.context_tokens = num_ctx.map(|tokens| u32::try_from(tokens.max(0)).unwrap_or(u32::MAX));
    Ok(Parsed {
        // To Ollama, 0 is not set, and more than there are is all.
        dimensions: dimensions(body.dimensions.filter(|n| *n != 0))?,
        takes_fewer: true,
        keep_alive: keep(body.keep_alive.as_ref())?,
        extras,
        ..parsed
    })
}

/// Reads the body of the older `/api/embeddings`.
///
/// # Errors
/// [`Error::InvalidRequest`] with the field's name.
pub fn parse_ollama_old(body: &[u8]) -> Result<Parsed, Error> {
    let body: OldOllamaBody = wire::parse(body)?;
    let inputs = match body.prompt.filter(|prompt| !prompt.is_empty()) {
        Some(prompt) => checked("prompt", vec![Input::Text(prompt)], Empty::Refused)?,
        None => Vec::new(),
    };
    let mut parsed = Parsed::new(body.model, inputs);
    parsed.request.truncate = true;
    Ok(Parsed { keep_alive: keep(body.keep_alive.as_ref())?, ..parsed })
}

/// The answer of `/api/embed`.
#[must_use]
pub fn ollama(model: &str, embedded: &Embedded, served: &Served) -> Value {
    let ns = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    let Embedded { vectors, usage, timings } = embedded;
    json!({
        "model": model, "embeddings": vectors.iter().map(|vector| numbers(vector)).collect::<Vec<_>>(),
        "total_duration": ns(timings.queue + timings.load + timings.prefill), "load_duration": ns(timings.load),
        "prompt_eval_count": usage.prompt_tokens, "sarai": crate::openai::extension(served, timings),
    })
}

/// The answer of the older `/api/embeddings`.
#[must_use]
pub fn ollama_old(embedded: &Embedded) -> Value {
    json!({ "embedding": numbers(embedded.vectors.first().map_or(&[][..], Vec::as_slice)) })
}

/// A vector in as few digits as tell its numbers apart.
fn numbers(vector: &[f32]) -> Value {
    vector.iter().map(|number| float(*number)).collect()
}

#[derive(Deserialize)]
struct RerankBody {
    model: Option<String>,
    query: String,
    documents: Option<Vec<Document>>,
    /// As Text Embeddings Inference calls them.
    texts: Option<Vec<Document>>,
    top_n: Option<i64>,
    return_documents: Option<bool>,
    return_text: Option<bool>,
    truncate: Option<bool>,
}

const READ_OF_RERANK: [&str; 8] =
    ["model", "query", "documents", "texts", "top_n", "return_documents", "return_text", "truncate"];

#[derive(Deserialize)]
#[serde(untagged, expecting = "a text or an object with a `text`")]
enum Document {
    Text(String),
    Object { text: String },
}

/// Reads the body of `/v1/rerank`. Texts that are too long are cut if `truncate` says so.
///
/// # Errors
/// [`Error::InvalidRequest`] with the field's name.
pub fn parse_rerank(body: &[u8]) -> Result<Parsed, Error> {
    let extras = extras_of(Api::OpenAi, body, &READ_OF_RERANK)?;
    let body: RerankBody = wire::parse(body)?;
    let (param, documents) = match (body.documents, body.texts) {
        (Some(documents), _) => ("documents", documents),
        (None, Some(texts)) => ("texts", texts),
        (None, None) => return Err(Error::invalid("documents", "`documents` is missing: send the texts to score")),
    };
    let texts = documents.into_iter().map(|document| match document {
        Document::Text(text) | Document::Object { text } => Input::Text(text),
    });
    let top = match body.top_n {
        None => None,
        Some(n) => Some(
            usize::try_from(n)
                .ok()
                .filter(|&n| n > 0)
                .ok_or_else(|| Error::invalid("top_n", format!("`top_n` is {n}: use a number from 1 on")))?,
        ),
    };
    let mut parsed = Parsed::new(body.model.unwrap_or_default(), checked(param, texts.collect(), Empty::Allowed)?);
    parsed.request.query = Some(check::text("query", body.query)?);
    parsed.request.truncate = body.truncate.unwrap_or(false);
    let returns_documents = body.return_documents.or(body.return_text).unwrap_or(false);
    Ok(Parsed { top, returns_documents, is_tei: param == "texts", extras, ..parsed })
}

/// The answer of `/v1/rerank`: the best first; as Text Embeddings Inference has it, where the texts were called `texts`.
#[must_use]
pub fn rerank(parsed: &Parsed, embedded: &Embedded, served: &Served) -> Value {
    let score = |values: &Vec<f32>| values.first().copied().unwrap_or(f32::NEG_INFINITY);
    let mut scores: Vec<(usize, f32)> = embedded.vectors.iter().map(score).enumerate().collect();
    scores.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    scores.truncate(parsed.top.unwrap_or(usize::MAX));
    let row = |(index, score): (usize, f32)| {
        let name = if parsed.is_tei { "score" } else { "relevance_score" };
        let mut row = json!({ "index": index, name: score });
        match parsed.request.inputs.get(index).filter(|_| parsed.returns_documents) {
            Some(Input::Text(text)) if parsed.is_tei => row["text"] = text.as_str().into(),
            Some(Input::Text(text)) => row["document"] = json!({ "text": text }),
            _ => {}
        }
        row
    };
    if parsed.is_tei {
        return scores.into_iter().map(row).collect();
    }
    let tokens = embedded.usage.prompt_tokens;
    json!({
        "model": parsed.model, "object": "list", "usage": { "prompt_tokens": tokens, "total_tokens": tokens },
        "results": scores.into_iter().map(row).collect::<Vec<_>>(),
        "sarai": crate::openai::extension(served, &embedded.timings),
    })
}

/// The path and the body that ask a host of this API for vectors.
#[must_use]
pub fn remote_request(api: Api, model: &str, parsed: &Parsed) -> (&'static str, Value) {
    let Parsed { request, keep_alive, extras, .. } = parsed;
    let input = |input: &Input| match input {
        Input::Text(text) => text.as_str().into(),
        Input::Tokens(tokens) => json!(tokens),
    };
    let inputs: Vec<Value> = request.inputs.iter().map(input).collect();
    let mut body = json!({ "model": model, "input": inputs });
    for (name, value) in extras.iter().filter(|extras| extras.api == api).flat_map(|extras| &extras.fields) {
        body[name] = value.clone();
    }
    match api {
        Api::Ollama => {
            body["truncate"] = request.truncate.into();
            if let Some(time) = keep_alive {
                body["keep_alive"] = keep_alive::to_wire(*time);
            }
            ("/api/embed", body)
        }
        Api::OpenAi => {
            body["encoding_format"] = "float".into();
            ("/embeddings", body)
        }
    }
}

/// Reads a host's answer to that; `None` if it is none.
#[must_use]
pub fn read_remote(api: Api, body: &Value, count: usize) -> Option<Embedded> {
    let vector = |value: &Value| -> Option<Vec<f32>> {
        #[expect(clippy::cast_possible_truncation, reason = "vectors are single numbers")]
        value.as_array()?.iter().map(|number| number.as_f64().map(|number| number as f32)).collect()
    };
    let (vectors, tokens): (Option<Vec<_>>, _) = match api {
        Api::Ollama => (body["embeddings"].as_array()?.iter().map(vector).collect(), &body["prompt_eval_count"]),
        Api::OpenAi => {
            let mut rows: Vec<&Map<String, Value>> =
                body["data"].as_array()?.iter().filter_map(Value::as_object).collect();
            rows.sort_by_key(|row| row.get("index").and_then(Value::as_u64));
            let vectors = rows.into_iter().map(|row| vector(row.get("embedding")?)).collect();
            (vectors, &body["usage"]["prompt_tokens"])
        }
    };
    let vectors =
        vectors.filter(|vectors| vectors.len() == count && vectors.iter().all(|vector| !vector.is_empty()))?;
    let prompt_tokens = tokens.as_u64().and_then(|tokens| u32::try_from(tokens).ok()).unwrap_or(0);
    Some(Embedded { vectors, usage: Usage { prompt_tokens, ..Usage::default() }, timings: Timings::default() })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_texts_or_tokens_one_or_many() {
        let read = |input: Value| {
            parse_openai(json!({ "model": "m", "input": input }).to_string().as_bytes())
                .map(|parsed| parsed.request.inputs)
        };
        assert_eq!(read(json!("a")).unwrap(), [Input::Text("a".into())]);
        assert_eq!(read(json!(["a", "b"])).unwrap().len(), 2);
        assert_eq!(read(json!(["a", [1, 2]])).unwrap(), [Input::Text("a".into()), Input::Tokens(vec![1, 2])]);
        assert_eq!(read(json!([1, 2])).unwrap(), [Input::Tokens(vec![1, 2])]);
        assert_eq!(read(json!([[1], [2, 3]])).unwrap(), [Input::Tokens(vec![1]), Input::Tokens(vec![2, 3])]);
        for wrong in [
            json!([]),
            json!(""),
            json!(["a", ""]),
            json!([[]]),
            json!(vec!["a"; 2049]),
            json!("a\0"),
            json!(7),
            json!([1, "a"]),
        ] {
            let error = read(wrong.clone()).unwrap_err();
            assert!(error.to_string().contains("input"), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_shortened_vector_has_the_length_one_again() {
        let mut embedded = Embedded { vectors: vec![vec![0.6, 0.8, 0.0]], ..Embedded::default() };
        let openai = |dimensions: i64| {
            parse_openai(json!({ "model": "m", "input": "a", "dimensions": dimensions }).to_string().as_bytes())
                .unwrap()
        };
        embedded.shorten(&openai(1)).unwrap();
        assert_eq!(embedded.vectors, [[1.0]]);
        assert!(embedded.shorten(&openai(2)).is_err());
        let ollama = |dimensions: i64| {
            parse_ollama(json!({ "model": "m", "input": "a", "dimensions": dimensions }).to_string().as_bytes())
                .unwrap()
        };
        [0, 2].into_iter().for_each(|all| embedded.shorten(&ollama(all)).unwrap());
        assert_eq!(embedded.vectors, [[1.0]]);
    }

    #[test]
    fn a_hosts_vectors_are_read_in_their_order_and_none_may_be_missing() {
        let body = json!({ "data": [{ "index": 1, "embedding": [2] }, { "index": 0, "embedding": [1] }], "usage": { "prompt_tokens": 5 } });
        let read = read_remote(Api::OpenAi, &body, 2).unwrap();
        assert_eq!((read.vectors, read.usage.prompt_tokens), (vec![vec![1.0], vec![2.0]], 5));
        assert_eq!(read_remote(Api::OpenAi, &body, 3), None);
        assert_eq!(read_remote(Api::Ollama, &json!({ "embeddings": [[1, "x"]] }), 1), None);
    }
}
