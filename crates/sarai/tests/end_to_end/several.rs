//! Several answers to one request.

use crate::support::{Answer, Sarai, chat, smollm2};
use serde_json::{Value, json};

fn config() -> String {
    format!(
        "models:\n  small: {{ backend: gguf_native, gguf_path: {}, context_length: 1024, parallel: 4 }}\n",
        smollm2()
    )
}

fn texts(answer: &Answer) -> Vec<String> {
    let body = answer.json();
    let choices = body["choices"].as_array().unwrap_or_else(|| panic!("{body}"));
    let text = |(at, choice): (usize, &Value)| {
        assert_eq!(choice["index"], at, "{body}");
        assert!(choice["finish_reason"].is_string(), "{body}");
        choice["message"]["content"].as_str().or(choice["text"].as_str()).unwrap().to_owned()
    };
    choices.iter().enumerate().map(text).collect()
}

fn streamed(answer: &Answer, count: usize) -> Vec<String> {
    let mut texts = vec![String::new(); count];
    for chunk in answer.sse() {
        for choice in chunk["choices"].as_array().into_iter().flatten() {
            let index = usize::try_from(choice["index"].as_u64().unwrap()).unwrap();
            texts[index].push_str(choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default());
        }
    }
    texts
}

#[tokio::test]
async fn each_answer_has_its_index_and_its_seed_and_the_prompt_counts_once() {
    let sarai = Sarai::start(&config());
    let ask = |more: Value| {
        let mut all = json!({ "n": 5, "max_tokens": 8, "temperature": 1, "seed": 40 });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        sarai.post("/v1/chat/completions", chat("small", "Tell me a story.", all))
    };
    let whole = ask(json!({})).await;
    let five = texts(&whole);
    let distinct: std::collections::HashSet<_> = five.iter().collect();
    assert!(five.len() == 5 && distinct.len() >= 3, "{five:?}");
    let alone = ask(json!({ "n": 1 })).await;
    assert_eq!(texts(&alone)[0], five[0], "the first one is that of a single request");
    assert_eq!(texts(&ask(json!({ "n": 1, "seed": 43 })).await)[0], five[3]);
    let usage = |answer: &Answer| answer.json()["usage"].clone();
    assert_eq!(usage(&whole)["prompt_tokens"], usage(&alone)["prompt_tokens"]);
    assert!(usage(&whole)["completion_tokens"].as_u64().unwrap() > 3 * 8, "{}", whole.text);

    let answer = ask(json!({ "stream": true, "stream_options": { "include_usage": true } })).await;
    assert_eq!(streamed(&answer, 5), five, "{}", answer.text);
    let chunks = answer.sse();
    let finished = chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"].is_string()).count();
    let roles = chunks.iter().filter(|chunk| chunk["choices"][0]["delta"]["role"] == "assistant").count();
    assert_eq!((finished, roles, answer.text.matches("[DONE]").count()), (5, 5, 1), "{}", answer.text);
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], usage(&whole)["completion_tokens"]);
    sarai.until("all is free", |ps| ps["requests"]["in_flight"] == 0).await;
}

#[tokio::test]
async fn several_prompts_are_answered_in_their_order() {
    let sarai = Sarai::start(&config());
    let prompts = ["Red, green and", "One, two, three,", "The capital of France is"];
    let ask = |prompt: Value, more: Value| {
        let mut all = json!({ "model": "small", "prompt": prompt, "max_tokens": 4, "temperature": 0 });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        sarai.post("/v1/completions", all.to_string())
    };
    let mut alone = Vec::new();
    let mut prompt_tokens = 0;
    for prompt in prompts {
        let answer = ask(json!(prompt), json!({})).await;
        prompt_tokens += answer.json()["usage"]["prompt_tokens"].as_u64().unwrap();
        alone.push(texts(&answer).remove(0));
    }
    let all = ask(json!(prompts), json!({})).await;
    assert_eq!((texts(&all), all.json()["usage"]["prompt_tokens"].as_u64()), (alone.clone(), Some(prompt_tokens)));
    let twice = ask(json!(prompts), json!({ "n": 2, "best_of": 2 })).await;
    let doubled: Vec<_> = alone.iter().flat_map(|text| [text.clone(), text.clone()]).collect();
    assert_eq!((texts(&twice), twice.json()["usage"]["prompt_tokens"].as_u64()), (doubled, Some(prompt_tokens)));
    assert_eq!(streamed(&ask(json!(prompts), json!({ "stream": true })).await, 3), alone);
    for (more, says) in [
        (json!({ "n": 129 }), "`n` is 129"),
        (json!({ "n": 43 }), "more than 128 answers"),
        (json!({ "n": 2, "best_of": 5 }), "`best_of` is 5"),
    ] {
        let refused = ask(json!(prompts), more).await;
        assert!(refused.status == 400 && refused.text.contains(says), "{}", refused.text);
    }
    let refused = ask(json!([]), json!({})).await;
    assert!(refused.status == 400 && refused.text.contains("`prompt` is empty"), "{}", refused.text);
}

/// More answers than may run at once: they wait for each other, and none for ever.
#[tokio::test]
async fn more_answers_than_permits_come_all_the_same() {
    let sarai = Sarai::start(&format!("server: {{ max_in_flight: 2 }}\n{}", config()));
    for stream in [false, true] {
        let asked = json!({ "n": 7, "max_tokens": 3, "temperature": 0, "stream": stream });
        let answer = sarai.post("/v1/chat/completions", chat("small", "Hello.", asked)).await;
        let texts = if stream { streamed(&answer, 7) } else { texts(&answer) };
        assert!(texts.iter().all(|text| *text == texts[0] && !text.is_empty()), "{}", answer.text);
    }
}

/// The answer goes on from what the client says it begins with: the same text as that of the whole answer, cut between words: within one, it is of other
/// tokens.
#[tokio::test]
async fn an_answer_is_continued_from_what_the_client_gives() {
    let sarai = Sarai::start(&config());
    let ask = |messages: Value, more: Value| {
        let mut all = json!({ "model": "small", "messages": messages, "max_tokens": 24, "temperature": 0 });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        sarai.post("/v1/chat/completions", all.to_string())
    };
    let question = json!({ "role": "user", "content": "Name the colours of the rainbow." });
    let answer = ask(json!([question]), json!({})).await;
    let whole = texts(&answer).remove(0);
    let prompt = answer.json()["usage"]["prompt_tokens"].as_u64().unwrap();
    for cut in [whole.find(' ').unwrap(), whole[..whole.len() / 2].rfind(' ').unwrap()] {
        let (begun, rest) = whole.split_at(cut);
        let messages = json!([question, { "role": "assistant", "content": begun }]);
        let goes_on = ask(messages, json!({ "continue_final_message": true, "add_generation_prompt": false })).await;
        let said = texts(&goes_on).remove(0);
        assert!(said.starts_with(rest), "{begun:?} goes on with {said:?}, not with {rest:?}");
        let usage = &goes_on.json()["usage"];
        assert!(usage["prompt_tokens"].as_u64().unwrap() > prompt && usage["completion_tokens"] == 24, "{usage}");
    }
    let new_turn = json!([question, { "role": "assistant", "content": "Red" }]);
    let told = ask(new_turn, json!({})).await.json();
    assert!(told["usage"]["prompt_tokens"].as_u64().unwrap() > prompt + 3, "without it, a new turn begins: {told}");
    for (messages, more, says) in [
        (json!([question]), json!({}), "none of the assistant's text"),
        (json!([{ "role": "assistant", "content": "a" }]), json!({ "add_generation_prompt": true }), "both true"),
        (
            json!([question, { "role": "assistant", "content": "a" }]),
            json!({ "response_format": { "type": "json_object" } }),
            "a form",
        ),
    ] {
        let mut all = json!({ "continue_final_message": true });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let refused = ask(messages, all).await;
        assert!(refused.status == 400 && refused.text.contains(says), "{}", refused.text);
    }
}
