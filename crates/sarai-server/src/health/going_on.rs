//! Whether a host goes on with a raw prompt from its last letter. It is asked once, before that is trusted: one that opens a new turn with it, or
//! that changes the prompt in any way, says something else.

use std::time::Duration;

use futures_util::StreamExt;
use sarai_core::{Deadlines, Error, Event, GenerateRequest, Prompt, Sampling};
use tokio::time::{Instant, timeout};

use super::{Health, key};
use crate::backend::remote::{self, Hosts};
use crate::config::Remote;

/// What nearly every model knows how to go on with.
const PROMPT: &str = "1 2 3 4 5 6 7 8";
/// Tokens of the answer that is cut in the middle.
const TOKENS: u32 = 12;
/// How long both answers may take: a client's stream stands still meanwhile.
const WITHIN: Duration = Duration::from_secs(10);
/// A host that did not go on is asked again after this.
const REFUSED_LASTS: Duration = Duration::from_secs(300);

/// What came of it, and when.
#[derive(Clone, Copy)]
pub struct Proof {
    goes_on: bool,
    at: Instant,
}

impl Health {
    /// Whether a raw prompt with the beginning of an answer behind it is gone on with there.
    pub async fn goes_on_with_prompts(&self, remote: &Remote, deadlines: &Deadlines) -> bool {
        let known = self.table.lock().going_on.get(&key(remote)).copied();
        if let Some(proof) = known.filter(|proof| proof.goes_on || proof.at.elapsed() < REFUSED_LASTS) {
            return proof.goes_on;
        }
        let proven = timeout(WITHIN, prove(&self.table.hosts, remote, deadlines)).await;
        // One that fails says so to whoever asks it for more.
        let Ok(Ok(goes_on)) = proven else { return false };
        if !goes_on {
            tracing::warn!(deployment = ?remote, "it does not go on with raw prompts from their last letter: they are asked for again instead");
        }
        self.table.lock().going_on.insert(key(remote), Proof { goes_on, at: Instant::now() });
        goes_on
    }
}

/// Asks for an answer, and once more for its second half.
async fn prove(hosts: &Hosts, remote: &Remote, deadlines: &Deadlines) -> Result<bool, Error> {
    let whole = said(hosts, remote, deadlines, PROMPT.to_owned(), TOKENS).await?;
    let (given, rest) = whole.split_at(whole.len() / 2);
    let left = TOKENS.saturating_sub(u32::try_from(given.len()).unwrap_or(TOKENS));
    let (given, rest) = (given.concat(), rest.concat());
    let further = said(hosts, remote, deadlines, format!("{PROMPT}{given}"), left).await?.concat();
    Ok(!rest.trim().is_empty()
        && !further.trim().is_empty()
        && (rest.starts_with(&further) || further.starts_with(&rest)))
}

/// The pieces of an answer to a raw prompt.
async fn said(
    hosts: &Hosts,
    remote: &Remote,
    deadlines: &Deadlines,
    prompt: String,
    tokens: u32,
) -> Result<Vec<String>, Error> {
    let request = GenerateRequest {
        sampling: Sampling { temperature: Some(0.0), ..Sampling::default() },
        max_tokens: Some(tokens),
        ..GenerateRequest::new(Prompt::Raw(prompt))
    };
    let place = remote::Place { remote, context_tokens: remote.context_tokens, connect: deadlines.connect };
    let mut events = hosts.open(&place, &request).await?;
    let mut pieces = Vec::new();
    while let Some(event) = events.next().await {
        match event? {
            Event::Text(text) => pieces.push(text),
            Event::Extra(extra) if !extra.text.is_empty() => pieces.push(extra.text),
            _ => {}
        }
    }
    Ok(pieces)
}
