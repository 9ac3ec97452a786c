//! How likely tokens were, in the forms of both APIs.

use sarai_core::TokenLogprob;
use serde_json::{Map, Value, json};

fn text(token: &TokenLogprob) -> String {
    String::from_utf8_lossy(&token.bytes).into_owned()
}

fn one(token: &TokenLogprob) -> Value {
    json!({ "token": text(token), "logprob": token.logprob, "bytes": token.bytes })
}

/// As chats of OpenAI's and answers of Ollama's have them.
pub fn of_chat(tokens: &[TokenLogprob]) -> Value {
    let with_top = |token: &TokenLogprob| {
        let mut value = one(token);
        value["top_logprobs"] = token.top.iter().map(one).collect();
        value
    };
    tokens.iter().map(with_top).collect()
}

/// As OpenAI's older completions have them; `offset` is where their text begins in the answer.
pub fn of_completion(tokens: &[TokenLogprob], mut offset: usize) -> Value {
    let mut offsets = Vec::new();
    for token in tokens {
        offsets.push(offset);
        offset += text(token).chars().count();
    }
    let top = |token: &TokenLogprob| -> Map<String, Value> {
        token.top.iter().map(|other| (text(other), other.logprob.into())).collect()
    };
    json!({
        "tokens": tokens.iter().map(text).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}
