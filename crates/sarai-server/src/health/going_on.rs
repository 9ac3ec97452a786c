//! Whether a host goes on with a raw prompt from its last letter. It is asked once, before that is trusted: one that opens a new turn with it, or
//! that changes the prompt in any way, says something else.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use sarai_core::{Deadlines, Error, Event, GenerateRequest, Prompt, Sampling};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use super::{Health, key};
use crate::backend::remote::{self, Hosts};
use crate::config::Remote;

/// What nearly every model knows how to go on with.
const PROMPT: &str = "1 2 3 4 5 6 7 8";
/// Tokens of each answer; the first one is cut in the middle.
const TOKENS: u32 = 16;
/// How long both answers may take: a client's stream stands still meanwhile.
const WITHIN: Duration = Duration::from_secs(10);
/// A host that did is asked again after this: another server may answer there by then.
const PROVEN_LASTS: Duration = Duration::from_secs(3_600);
/// And one that did not after this.
const REFUSED_LASTS: Duration = Duration::from_secs(300);

/// And one that could not be asked, after this.
const FAILURE_LASTS: Duration = Duration::from_secs(20);

/// What came of it, and until when that counts.
#[derive(Clone, Copy)]
pub struct Proof {
    goes_on: bool,
    until: Instant,
}

/// What is known of a deployment; held while it is asked.
pub type Proven = Arc<Mutex<Option<Proof>>>;

impl Health {
    /// Whether a raw prompt with the beginning of an answer behind it is gone on with there.
    pub async fn goes_on_with_prompts(&self, remote: &Remote, deadlines: &Deadlines) -> bool {
        let proven = Arc::clone(self.table.lock().going_on.entry(key(remote)).or_default());
        // Many streams break off with their host: one of them asks, for all.
        let asked = async {
            let mut proven = proven.lock().await;
            if let Some(proof) = proven.filter(|proof| proof.until > Instant::now()) {
                return proof.goes_on;
            }
            let outcome = timeout(WITHIN, prove(&self.table.hosts, remote, deadlines)).await;
            let lasts = match &outcome {
                Ok(Ok(true)) => PROVEN_LASTS,
                Ok(Ok(false)) => {
                    tracing::warn!(
                        deployment = ?remote,
                        "it does not go on with raw prompts from their last letter: they are asked for again instead"
                    );
                    REFUSED_LASTS
                }
                // One that fails says so to whoever asks it for more.
                _ => FAILURE_LASTS,
            };
            let goes_on = matches!(outcome, Ok(Ok(true)));
            *proven = Some(Proof { goes_on, until: Instant::now() + lasts });
            goes_on
        };
        timeout(WITHIN * 2, asked).await.unwrap_or(false)
    }
}

/// Asks for an answer, and once more for its second half.
async fn prove(hosts: &Hosts, remote: &Remote, deadlines: &Deadlines) -> Result<bool, Error> {
    let whole = said(hosts, remote, deadlines, PROMPT.to_owned()).await?;
    // Between words, as tokens part them: a host may send all of it in one piece.
    let words: Vec<_> = whole.split_inclusive(' ').collect();
    let (given, _) = words.split_at(words.len() / 2);
    let given = given.concat();
    let given = given.trim_end();
    let rest = &whole[given.len()..];
    if given.is_empty() || rest.trim().is_empty() {
        return Ok(false);
    }
    let further = said(hosts, remote, deadlines, format!("{PROMPT}{given}")).await?;
    Ok(!further.trim().is_empty() && (rest.starts_with(&further) || further.starts_with(rest)))
}

/// The answer to a raw prompt.
async fn said(hosts: &Hosts, remote: &Remote, deadlines: &Deadlines, prompt: String) -> Result<String, Error> {
    let request = GenerateRequest {
        sampling: Sampling { temperature: Some(0.0), ..Sampling::default() },
        max_tokens: Some(TOKENS),
        ..GenerateRequest::new(Prompt::Raw(prompt))
    };
    let place = remote::Place { remote, context_tokens: remote.context_tokens, connect: deadlines.connect };
    let mut events = hosts.open(&place, &request).await?;
    let mut said = String::new();
    while let Some(event) = events.next().await {
        match event? {
            Event::Text(text) => said.push_str(&text),
            Event::Extra(extra) => said.push_str(&extra.text),
            _ => {}
        }
    }
    Ok(said)
}
