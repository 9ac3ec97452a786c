//! The sampling parameters, which both APIs spell the same.

use sarai_core::{Error, Samplers, Sampling};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::check::range;
use crate::whole;

/// As they stand in an OpenAI body, or in Ollama's `options`.
#[derive(Default, Deserialize)]
pub struct WireSampling {
    temperature: Option<f32>,
    top_p: Option<f32>,
    #[serde(default, deserialize_with = "whole::deserialize")]
    top_k: Option<i32>,
    min_p: Option<f32>,
    typical_p: Option<f32>,
    #[serde(default, deserialize_with = "whole::deserialize")]
    seed: Option<i64>,
    repeat_penalty: Option<f32>,
    #[serde(default, deserialize_with = "whole::deserialize")]
    repeat_last_n: Option<i32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    ignore_eos: Option<bool>,
    stop: Option<Stop>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a string or an array of strings")]
enum Stop {
    One(String),
    Many(Vec<String>),
}

impl WireSampling {
    /// Makes 1 of a factor for repetition that is none, as LiteLLM writes OpenAI's `frequency_penalty`, of which 0 is no penalty; whether
    /// repetition was to be rewarded, which no factor says.
    pub fn is_to_repeat(&mut self) -> bool {
        let Some(penalty) = self.repeat_penalty.filter(|penalty| *penalty <= 0.0) else { return false };
        self.repeat_penalty = Some(1.0);
        penalty < 0.0
    }

    /// Checks the ranges, with the API's own limit of the temperature; returns the sampling, without logit bias, and the stop texts.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] with the field's name.
    pub fn meant(self, hottest: f32) -> Result<(Sampling, Vec<String>), Error> {
        let sampling = Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            typical_p: self.typical_p,
            seed: seed(self.seed),
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: Vec::new(),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            further: Samplers::default(),
        };
        range("temperature", sampling.temperature, 0.0, hottest)?;
        check(&sampling)?;
        let stop = match self.stop {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop],
            Some(Stop::Many(stops)) => stops,
        };
        Ok((sampling, few(stop)?))
    }
}

/// Stop texts at most, and bytes of each: all are looked for at every token.
const MOST_STOPS: usize = 64;
const LONGEST_STOP: usize = 1024;

fn few(stop: Vec<String>) -> Result<Vec<String>, Error> {
    let wrong = |message: String| Err(Error::invalid("stop", message));
    if stop.len() > MOST_STOPS {
        return wrong(format!("`stop` has {} texts: use at most {MOST_STOPS}", stop.len()));
    }
    match stop.iter().find(|text| text.len() > LONGEST_STOP) {
        Some(text) => wrong(format!("`stop` has a text of {} bytes: use at most {LONGEST_STOP}", text.len())),
        None => Ok(stop),
    }
}

fn check(sampling: &Sampling) -> Result<(), Error> {
    range("top_p", sampling.top_p, 0.0, 1.0)?;
    range("min_p", sampling.min_p, 0.0, 1.0)?;
    range("typical_p", sampling.typical_p, 0.0, 1.0)?;
    range("repeat_penalty", sampling.repeat_penalty, f32::MIN_POSITIVE, 100.0)?;
    range("presence_penalty", sampling.presence_penalty, -2.0, 2.0)?;
    range("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)?;
    match sampling.repeat_last_n.filter(|&n| n < -1) {
        None => Ok(()),
        Some(n) => Err(Error::invalid(
            "repeat_last_n",
            format!("`repeat_last_n` is {n}: use -1 for the whole context, or 0 and more"),
        )),
    }
}

/// Any integer is a seed; a negative one means random.
fn seed(seed: Option<i64>) -> Option<u32> {
    let seed = seed.filter(|&seed| seed >= 0)?;
    u32::try_from(seed % i64::from(u32::MAX)).ok()
}

/// Sampling and stop texts as both APIs write them towards a host; what is not set is left to it.
pub fn to_wire(sampling: &Sampling, stop: &[String]) -> Map<String, Value> {
    let options = [
        ("temperature", sampling.temperature.map(float)),
        ("top_p", sampling.top_p.map(float)),
        ("top_k", sampling.top_k.map(Value::from)),
        ("min_p", sampling.min_p.map(float)),
        ("typical_p", sampling.typical_p.map(float)),
        ("seed", sampling.seed.map(Value::from)),
        ("repeat_penalty", sampling.repeat_penalty.map(float)),
        ("repeat_last_n", sampling.repeat_last_n.map(Value::from)),
        ("presence_penalty", sampling.presence_penalty.map(float)),
        ("frequency_penalty", sampling.frequency_penalty.map(float)),
        ("stop", (!stop.is_empty()).then(|| stop.into())),
    ];
    options.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
}

/// A float as the client wrote it: 0.7, not the 0.699999988079071 that widening an f32 gives.
pub fn float(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}
