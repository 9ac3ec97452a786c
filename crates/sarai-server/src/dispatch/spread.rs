//! Which of the hosts that share a load is asked first: what a request is expected to cost there.

use std::hash::{DefaultHasher, Hash, Hasher};

use sarai_api::embed;
use sarai_core::{GenerateRequest, Input, Lane, Prompt, Residence};

use super::candidates::{Candidate, Tier};
use crate::config::Remote;
use crate::health::{Expected, Health, Known};

/// How much of a prompt decides which host is preferred: conversations that begin alike go to the same one, whose
/// cache then has the beginning.
const PREFIX_BYTES: usize = 2048;

/// What a request asks for, as far as it can be told before it is asked.
#[derive(Clone, Debug)]
pub struct Work<'a> {
    prompt_tokens: u32,
    answer_tokens: u32,
    /// What is at the beginning.
    begins: Vec<&'a str>,
    /// How the model is to be there.
    pub residence: Residence,
    /// Whether it may take its time.
    pub lane: Lane,
    /// Whether it is vectors that are wanted.
    pub is_of_vectors: bool,
    /// Whether tools may be called.
    pub may_call: bool,
}

impl<'a> Work<'a> {
    /// That of an answer.
    pub fn of(request: &'a GenerateRequest) -> Self {
        let begins = match &request.prompt {
            Prompt::Raw(text) => vec![text.as_str()],
            Prompt::Tokens(_) => Vec::new(),
            Prompt::Chat(messages) => messages.iter().take(2).map(|message| message.content.as_str()).collect(),
        };
        let answer_tokens = request.max_tokens.map_or(USUAL_ANSWER, |most| most.min(USUAL_ANSWER));
        Self {
            prompt_tokens: prompt_tokens(request),
            answer_tokens,
            begins,
            residence: request.residence,
            lane: request.lane,
            is_of_vectors: false,
            may_call: request.may_call(),
        }
    }

    /// That of vectors.
    pub fn of_vectors(parsed: &'a embed::Parsed) -> Self {
        let tokens = |input: &Input| match input {
            Input::Text(text) => text.len() / BYTES_PER_TOKEN,
            Input::Tokens(tokens) => tokens.len(),
        };
        let prompt_tokens = parsed.request.inputs.iter().map(tokens).sum::<usize>();
        let begins = parsed.request.inputs.iter().take(1).filter_map(|input| match input {
            Input::Text(text) => Some(text.as_str()),
            Input::Tokens(_) => None,
        });
        Self {
            prompt_tokens: u32::try_from(prompt_tokens).unwrap_or(u32::MAX),
            answer_tokens: 0,
            begins: begins.collect(),
            residence: Residence { context_tokens: None, keep_alive: parsed.keep_alive },
            lane: parsed.request.lane,
            is_of_vectors: true,
            may_call: false,
        }
    }

    /// What this would meet at a host, and what is known of it.
    pub fn expected(&self, health: &Health, remote: &Remote) -> (Expected, Known) {
        let (expected, known) = health.expected(remote, self.prompt_tokens, self.answer_tokens);
        let held_tokens = if self.may_call { self.answer_tokens } else { 0 };
        (Expected { held_tokens, ..expected }, known)
    }

    /// The same, after a look at a host of which it is not known whether it has the model loaded. One that does not even answer that
    /// has no load to excuse it.
    pub async fn expected_now(&self, health: &Health, remote: &Remote) -> (Expected, Known) {
        let is_there = health.look_now(remote).await;
        let (mut expected, known) = self.expected(health, remote);
        expected.is_resident |= !is_there;
        (expected, known)
    }

    fn hash_beginning(&self, hasher: &mut impl Hasher) {
        let mut left = PREFIX_BYTES;
        for text in &self.begins {
            let bytes = &text.as_bytes()[..text.len().min(left)];
            hasher.write(bytes);
            left -= bytes.len();
        }
    }
}

/// How long a prompt is, as far as can be told without its model: pictures and tools are read too.
pub fn prompt_tokens(request: &GenerateRequest) -> u32 {
    let bytes = match &request.prompt {
        Prompt::Raw(text) => text.len(),
        Prompt::Tokens(tokens) => tokens.len() * BYTES_PER_TOKEN,
        Prompt::Chat(messages) => messages.iter().map(|message| message.content.len()).sum(),
    };
    let tools = request.tools.as_ref().map_or(0, |tools| tools.definitions.len());
    let media = request.media().count().saturating_mul(MEDIA_TOKENS);
    let tokens = (bytes + tools) / BYTES_PER_TOKEN + request.context.len();
    let tokens = tokens.saturating_add(media).saturating_add(16);
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

/// A low guess of what a token is, so that a deadline is not too short.
const BYTES_PER_TOKEN: usize = 3;
/// What a picture or a piece of sound is, in tokens of text: a high guess, with its encoding.
const MEDIA_TOKENS: usize = 1024;
/// Tokens of an answer whose end is not known.
const USUAL_ANSWER: u32 = 256;

/// Costs that differ by less are equal: a host is not changed for them.
const ABOUT_EQUAL: f64 = 1.3;
/// And those that differ by so many seconds: nobody notices.
const UNNOTICED: f64 = 0.05;
/// What an answer takes where nothing is known, in seconds; and a load.
const UNKNOWN_SERVICE: f64 = 1.0;
const UNKNOWN_LOAD: f64 = 5.0;

/// Orders hosts that share the load by what an answer would cost there: the work they have, how fast they are, whether the
/// model is loaded, and their weight. Among equals, each beginning of a conversation prefers its own host (weighted
/// rendezvous hashing), so that few move when one comes or goes.
pub fn spread(tier: &mut Tier, work: &Work<'_>, health: &Health) {
    if tier.len() < 2 {
        return;
    }
    let mut costs: Vec<(f64, f64)> = tier.iter().map(|one| (0.0, affinity(one, work))).collect();
    let expected: Vec<_> = tier.iter().map(|one| one.remote().map(|remote| work.expected(health, remote))).collect();
    // Of a host that was never asked nothing is known: it counts as the fastest, until it was.
    let service = |expected: &Option<(Expected, Known)>| {
        let (expected, known) = expected.as_ref()?;
        known.pace.service(Expected { is_resident: true, ..*expected }).map(|time| time.as_secs_f64())
    };
    let fastest = expected.iter().filter_map(service).fold(f64::INFINITY, f64::min);
    let fastest = if fastest.is_finite() { fastest } else { UNKNOWN_SERVICE };
    for ((cost, _), (one, outlook)) in costs.iter_mut().zip(tier.iter().zip(&expected)) {
        let (Some(remote), Some((expected, known))) = (one.remote(), outlook) else { continue };
        let each = service(outlook).unwrap_or(fastest).max(0.001);
        let load = match known.is_loaded {
            Some(false) => {
                let absent = known.pace.service(Expected { is_resident: false, ..*expected });
                absent.map_or(UNKNOWN_LOAD, |absent| (absent.as_secs_f64() - each).max(UNKNOWN_LOAD.min(each)))
            }
            _ => 0.0,
        };
        #[expect(clippy::cast_precision_loss, reason = "requests at one host are few")]
        let before = known.outstanding as f64 / f64::from(remote.weight);
        *cost = each * (1.0 + before) + load;
    }
    let least = costs.iter().map(|(cost, _)| *cost).fold(f64::INFINITY, f64::min);
    let mut order: Vec<_> = std::mem::take(tier).into_iter().zip(costs).collect();
    order.sort_by(|(_, (a, a_likes)), (_, (b, b_likes))| {
        let is_equal = |cost: f64| cost <= (least * ABOUT_EQUAL).max(least + UNNOTICED);
        match (is_equal(*a), is_equal(*b)) {
            (true, true) => b_likes.total_cmp(a_likes),
            (true, false) => std::cmp::Ordering::Less,
            (false, true) => std::cmp::Ordering::Greater,
            (false, false) => a.total_cmp(b),
        }
    });
    tier.extend(order.into_iter().map(|(one, _)| one));
}

/// How much a beginning of a conversation likes a candidate's host.
fn affinity(one: &Candidate, work: &Work<'_>) -> f64 {
    let Some(remote) = one.remote() else { return 0.0 };
    let mut hasher = DefaultHasher::new();
    remote.url.hash(&mut hasher);
    work.hash_beginning(&mut hasher);
    #[expect(clippy::cast_precision_loss, reason = "the upper bits are random enough")]
    let uniform = ((hasher.finish() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    f64::from(remote.weight) / -uniform.ln()
}
