//! Faults through a proxy in front of a real Ollama, before its first line, in the middle of a line, and later.

use crate::support::host::{on_host, with_worker};
use crate::support::proxy::{Between, Harm, harming};
use crate::support::{Ollama, Sarai, chat};
use serde_json::json;

/// What comes instead of an answer, and never anything of it.
const INSTEAD: [&str; 6] = [
    "HTTP/1.1 500 Oops\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
    "HTTP/1.1 503 Busy\r\nconnection: close\r\nretry-after: 1\r\ncontent-length: 4\r\n\r\nbusy",
    "HTTP/1.1 404 Gone\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: 27\r\n\r\n{\"error\":\"model not found\"}",
    "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/html\r\ncontent-length: 15\r\n\r\n<html>Hi</html>",
    "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: application/x-ndjson\r\ncontent-length: 26\r\n\r\n{\"message\":{\"content\":\"Hal",
    "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: application/x-ndjson\r\ncontent-length: 0\r\n\r\n",
];

/// What comes amid an answer, as a chunk.
const HALF_A_LINE: &str = "{\"model\":\"solar\",\"message\":{\"content\":\" fi";
const AN_ERROR: &str = "{\"error\":\"an error was encountered while running the model\"}\n";

#[tokio::test]
async fn whatever_a_proxy_does_to_a_real_ollama_the_client_sees_one_whole_answer() {
    let mut ollama = Ollama::start();
    let config = |url: &str, is_harmless: bool| {
        // Where nothing is lost, a machine that has other things to do is no reason to go on elsewhere.
        let [gap, first] = if is_harmless { [20, 20] } else { [2, 4] };
        let deadlines = format!("    deadlines: {{ gap_seconds: {gap}, first_token_seconds: {first} }}\n");
        on_host(url, &with_worker(&deadlines)).replace("model_name: m", "model_name: solar")
    };
    let body = chat("solar", "Count from one to twenty.", json!({ "stream": true, "max_tokens": 24 }));
    let plain = chat("solar", "Count from one to twenty.", json!({ "max_tokens": 24 }));
    let messages = json!([{ "role": "user", "content": "Count from one to twenty." }]);
    let in_ollamas =
        json!({ "model": "solar", "messages": messages, "options": { "num_predict": 24, "temperature": 0 } })
            .to_string();
    let direct = Sarai::start(&config(&ollama.url, true));
    let whole = direct.post("/v1/chat/completions", body.clone()).await.said();
    drop(direct);
    let amid = [Harm::Cut, Harm::Stall, Harm::Garbage, Harm::Crumbs];
    let amid = amid.into_iter().flat_map(|harm| [40, 900].map(|after| (harm, after)));
    let between = [Between::Slow, Between::CleanEnd, Between::Last(HALF_A_LINE), Between::Last(AN_ERROR)];
    let between = between.map(|harm| (Harm::Between(harm), 900));
    let first = INSTEAD.map(Harm::Instead).into_iter().chain([Harm::Late, Harm::HugeLine]);
    for (harm, after) in amid.chain(between).chain(first.map(|harm| (harm, 0))) {
        ollama.revive().await;
        let sarai = Sarai::start(&config(&harming(&ollama.url, harm, after), harm.is_harmless()));
        let streamed = sarai.post("/v1/chat/completions", body.clone()).await;
        let what = format!("{harm:?} after {after} bytes: {}", streamed.text);
        assert_eq!(streamed.status, 200, "{what}");
        assert!(streamed.text.ends_with("data: [DONE]\n\n"), "{what}");
        let said = streamed.said();
        // What the host said stands at the beginning, and the rest follows once.
        let common = said.chars().zip(whole.chars()).take_while(|(a, b)| a == b).count();
        let end = streamed.sse().into_iter().find(|event| event["sarai"].is_object()).unwrap();
        // Before its first token, the worker answers alone, in words of its own.
        let began_there = end["sarai"]["fallback_reason"].is_null();
        assert!((common >= 4 || !began_there) && said.len() > 20, "{said:?} for {whole:?}; {what}");
        let is_moved = end["sarai"]["resumed"].is_array() || !end["sarai"]["fallback_reason"].is_null();
        assert_eq!(is_moved, !harm.is_harmless(), "{what}");
        if after > 40 && !matches!(harm, Harm::Between(_)) {
            // Whole, it is the same wherever in the answer it happens.
            continue;
        }
        if after > 40 {
            // In Ollama's API.
            let lines = sarai.post("/api/chat", in_ollamas.clone()).await.lines();
            let said: String = lines.iter().filter_map(|line| line["message"]["content"].as_str()).collect();
            let ends = lines.iter().filter(|line| line["done"] == true).count();
            let end = lines.last().unwrap();
            // A worker that goes on may come to an end of its own.
            assert!(
                ends == 1 && ["length", "stop"].contains(&end["done_reason"].as_str().unwrap()),
                "{harm:?}: {lines:?}"
            );
            assert!(said.len() > 10, "{harm:?}: {said:?}");
            continue;
        }
        let whole = sarai.post("/v1/chat/completions", plain.clone()).await;
        assert_eq!(whole.status, 200, "{harm:?} {after}: {}", whole.text);
        assert!(whole.json()["choices"][0]["message"]["content"].as_str().unwrap().len() > 20);
    }
}
