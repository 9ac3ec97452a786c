//! Clients of one API on hosts of the other.

use crate::support::Sarai;
use crate::support::host::{Host, Step, last_line, line, ok, ollama, openai};
use serde_json::{Value, json};

fn on_host(url: &str, backend: &str) -> String {
    format!("models:\n  solar: {{ backend: {backend}, url: \"{url}\", model_name: m }}\n")
}

/// An agent's turn, from a client of each API to a host of the other: the call, its result, and the answer.
#[tokio::test]
async fn tools_are_called_across_the_apis_streamed_and_whole() {
    let tools = json!([{ "type": "function", "function": { "name": "weather", "parameters": { "type": "object" } } }]);
    let arguments = json!({ "city": "Bern" });
    let has_result =
        |body: &Value| body["messages"].as_array().unwrap().iter().any(|message| message["role"] == "tool");

    let call = json!({ "function": { "name": "weather", "arguments": arguments } });
    let calling = json!({ "model": "m", "message": { "role": "assistant", "content": "", "thinking": "hm", "tool_calls": [call] }, "done": false });
    let host = Host::start(move |_, body| match has_result(body) {
        true => ollama(&["It ", "rains."]),
        false => vec![Step::Send(format!("{}{calling}\n{}", ok("application/x-ndjson"), last_line(json!({}))))],
    });
    let sarai = Sarai::start(&on_host(&host.url, "ollama_http"));
    for stream in [false, true] {
        let mut messages = json!([{ "role": "user", "content": "How is it in Bern?" }]);
        let body =
            |messages: &Value| json!({ "model": "solar", "stream": stream, "tools": tools, "messages": messages });
        let answer = sarai.post("/v1/chat/completions", body(&messages).to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let choices: Vec<Value> = match stream {
            true => answer.sse().iter().map(|chunk| chunk["choices"][0].clone()).collect(),
            false => vec![answer.json()["choices"][0].clone()],
        };
        let of = |choice: &Value| if stream { choice["delta"].clone() } else { choice["message"].clone() };
        let called = choices.iter().find_map(|choice| of(choice)["tool_calls"].as_array().cloned()).unwrap();
        assert_eq!(called[0]["function"]["name"], "weather");
        let said: Value = serde_json::from_str(called[0]["function"]["arguments"].as_str().unwrap()).unwrap();
        assert_eq!(said, arguments);
        assert!(choices.iter().any(|choice| of(choice)["reasoning_content"] == "hm"), "{choices:?}");
        assert!(choices.iter().any(|choice| choice["finish_reason"] == "tool_calls"), "{choices:?}");
        let mut called = called[0].clone();
        called.as_object_mut().unwrap().remove("index");
        let turns = messages.as_array_mut().unwrap();
        turns.push(json!({ "role": "assistant", "content": null, "tool_calls": [called] }));
        turns.push(json!({ "role": "tool", "tool_call_id": called["id"], "content": "rain" }));
        let answer = sarai.post("/v1/chat/completions", body(&messages).to_string()).await;
        assert!(answer.text.contains("rains."), "{}", answer.text);
    }
    let asked = &host.asked()[1].body;
    assert_eq!((&asked["tools"], &asked["messages"][2]["tool_name"]), (&tools, &json!("weather")));
    assert_eq!(asked["messages"][1]["tool_calls"][0]["function"]["arguments"], arguments);

    let piece =
        |delta: Value, finish: Value| json!({ "choices": [{ "index": 0, "delta": delta, "finish_reason": finish }] });
    let begun = json!({ "tool_calls": [{ "index": 0, "id": "a7", "type": "function", "function": { "name": "weather", "arguments": "{\"city\"" } }] });
    let more = json!({ "tool_calls": [{ "index": 0, "function": { "arguments": ":\"Bern\"}" } }] });
    let chunks = [piece(begun, Value::Null), piece(more, Value::Null), piece(json!({}), json!("tool_calls"))];
    let host = Host::start(move |_, body| match has_result(body) {
        true => openai(&[piece(json!({ "content": "It rains." }), json!("stop"))]),
        false => openai(&chunks),
    });
    let sarai = Sarai::start(&on_host(&host.url, "openai_http"));
    for stream in [false, true] {
        let mut messages = json!([{ "role": "user", "content": "How is it in Bern?" }]);
        let body =
            |messages: &Value| json!({ "model": "solar", "stream": stream, "tools": tools, "messages": messages });
        let answer = sarai.post("/api/chat", body(&messages).to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let lines = answer.lines();
        let called = lines.iter().find_map(|line| line["message"]["tool_calls"].as_array()).unwrap();
        assert_eq!(
            (&called[0]["function"]["name"], &called[0]["function"]["arguments"]),
            (&json!("weather"), &arguments)
        );
        let turns = messages.as_array_mut().unwrap();
        turns
            .push(json!({ "role": "assistant", "content": "", "tool_calls": [{ "function": called[0]["function"] }] }));
        turns.push(json!({ "role": "tool", "tool_name": "weather", "content": "rain" }));
        let answer = sarai.post("/api/chat", body(&messages).to_string()).await;
        assert!(answer.text.contains("rains."), "{}", answer.text);
    }
    let asked = &host.asked()[1].body;
    let id = &asked["messages"][1]["tool_calls"][0]["id"];
    assert_eq!((id.is_string(), id), (true, &asked["messages"][2]["tool_call_id"]));
}

/// Also where the client has said nothing that is not read here.
#[tokio::test]
async fn reasoning_is_told_across_the_apis_in_a_plain_chat() {
    let thought =
        json!({ "model": "m", "message": { "role": "assistant", "content": "", "thinking": "hm" }, "done": false });
    let end = format!("{}{}", line("Yes."), last_line(json!({})));
    let host = Host::start(move |_, _| vec![Step::Send(format!("{}{thought}\n{end}", ok("application/x-ndjson")))]);
    let sarai = Sarai::start(&on_host(&host.url, "ollama_http"));
    let body = |stream: bool| {
        json!({ "model": "solar", "stream": stream, "messages": [{ "role": "user", "content": "Is it?" }] }).to_string()
    };
    let whole = sarai.post("/v1/chat/completions", body(false)).await.json();
    let message = &whole["choices"][0]["message"];
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("hm"), &json!("Yes.")), "{whole}");
    let streamed = sarai.post("/v1/chat/completions", body(true)).await;
    assert!(streamed.text.contains("\"reasoning_content\":\"hm\"") && streamed.said() == "Yes.", "{}", streamed.text);

    let piece =
        |delta: Value, finish: Value| json!({ "choices": [{ "index": 0, "delta": delta, "finish_reason": finish }] });
    let chunks = [
        piece(json!({ "role": "assistant", "content": "", "reasoning_content": "hm" }), Value::Null),
        piece(json!({ "content": "Yes." }), Value::Null),
        piece(json!({}), json!("stop")),
    ];
    let host = Host::start(move |_, _| openai(&chunks));
    let sarai = Sarai::start(&on_host(&format!("{}/v1", host.url), "openai_http"));
    let whole = sarai.post("/api/chat", body(false)).await.json();
    assert_eq!(
        (&whole["message"]["thinking"], &whole["message"]["content"]),
        (&json!("hm"), &json!("Yes.")),
        "{whole}"
    );
    let streamed = sarai.post("/api/chat", body(true)).await;
    assert!(streamed.lines().iter().any(|line| line["message"]["thinking"] == "hm"), "{}", streamed.text);
}
