//! Tools and forms of answers on real local models, through both APIs.

use crate::support::{Answer, Sarai, chat, qwen, sketch, smollm2};
use futures_util::StreamExt;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

fn models() -> String {
    format!(
        "models:\n  coder: {{ backend: gguf_native, gguf_path: {}, context_length: 2048, parallel: 2 }}\n  plain: {{ backend: gguf_native, gguf_path: {}, context_length: 1024 }}\n",
        qwen(),
        smollm2()
    )
}

fn tools() -> Value {
    let city = json!({ "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] });
    json!([
        { "type": "function", "function": { "name": "get_weather", "description": "The weather of a city", "parameters": city } },
        { "type": "function", "function": { "name": "get_time", "description": "The time of a city", "parameters": city } },
    ])
}

async fn ask(sarai: &Sarai, more: Value) -> Answer {
    let mut body: Value = serde_json::from_str(&chat("coder", "What is the weather in Oslo?", json!({}))).unwrap();
    let fields = json!({ "tools": tools(), "temperature": 0, "max_tokens": 100 });
    for fields in [fields, more] {
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    }
    sarai.post("/v1/chat/completions", body.to_string()).await
}

/// The calls of an answer, whole or put together from its deltas: names and arguments.
fn calls(answer: &Answer) -> Vec<(String, Value)> {
    assert_eq!(answer.status, 200, "{}", answer.text);
    let mut calls: Vec<(String, String)> = Vec::new();
    let mut add = |parts: &Value| {
        for part in parts.as_array().into_iter().flatten() {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let function = &part["function"];
            match part["id"].as_str() {
                Some(id) => {
                    assert!(id.starts_with("call_") && part["type"] == "function", "{part}");
                    calls.push((text(&function["name"]), text(&function["arguments"])));
                }
                None => calls[usize::try_from(part["index"].as_u64().unwrap()).unwrap()]
                    .1
                    .push_str(&text(&function["arguments"])),
            }
        }
    };
    match answer.text.starts_with('{') {
        true => add(&answer.json()["choices"][0]["message"]["tool_calls"]),
        false => answer.sse().iter().for_each(|event| add(&event["choices"][0]["delta"]["tool_calls"])),
    }
    let read = |arguments: &str| serde_json::from_str(arguments).unwrap_or_else(|_| panic!("{}", answer.text));
    calls.into_iter().map(|(name, arguments)| (name, read(&arguments))).collect()
}

/// Qwen2.5-Coder-0.5B writes its calls as bare JSON, without its template's marks.
#[tokio::test]
async fn a_model_decides_must_call_must_call_this_one_or_may_not() {
    let sarai = Sarai::start(&models());
    for stream in [false, true] {
        for (choice, wanted) in [
            (json!("auto"), "get_weather"),
            (json!("required"), "get_weather"),
            (json!({ "type": "function", "function": { "name": "get_time" } }), "get_time"),
        ] {
            let answer = ask(&sarai, json!({ "tool_choice": choice, "stream": stream })).await;
            let calls = calls(&answer);
            assert_eq!((calls.len(), calls[0].0.as_str()), (1, wanted), "{choice}: {}", answer.text);
            assert_eq!(calls[0].1["city"], "Oslo", "{choice}");
            assert!(answer.text.contains("\"finish_reason\":\"tool_calls\""), "{}", answer.text);
            assert_eq!(answer.header("x-sarai-degraded"), None, "nothing is lost of tools here");
        }
        let answer = ask(&sarai, json!({ "tool_choice": "none", "stream": stream, "max_tokens": 8 })).await;
        assert!(calls(&answer).is_empty(), "{}", answer.text);
    }
    // Whatever it would rather say, and however it is sampled.
    for seed in 0..6 {
        let more = json!({ "tool_choice": "required", "parallel_tool_calls": false, "temperature": 1.5, "seed": seed });
        let calls = calls(&ask(&sarai, more).await);
        assert!(calls.len() == 1 && calls[0].1["city"].is_string(), "{calls:?}");
    }
    let wrong = ask(&sarai, json!({ "tool_choice": { "type": "function", "function": { "name": "nobody" } } })).await;
    assert_eq!((wrong.status, &wrong.json()["error"]["param"]), (400, &json!("tool_choice")), "{}", wrong.text);
    assert!(wrong.text.contains("get_time"), "it says which there are: {}", wrong.text);
    for choice in
        [json!("required"), json!({ "type": "function", "function": { "name": "get_time" } }), json!("whatever")]
    {
        let without = ask(&sarai, json!({ "tools": [], "tool_choice": choice })).await;
        assert_eq!((without.status, &without.json()["error"]["param"]), (400, &json!("tool_choice")), "{choice}");
    }
}

/// Bounds and patterns too, of all tools, each by its own definitions.
#[tokio::test]
async fn arguments_of_a_call_that_must_be_made_keep_their_schema() {
    let sarai = Sarai::start(&models());
    let tool = |name: &str, days: i64, code: &str| {
        let place = json!({ "type": "object", "properties": { "code": { "type": "string", "pattern": code } }, "required": ["code"] });
        let days = json!({ "type": "integer", "minimum": days });
        let parameters = json!({
            "type": "object", "properties": { "days": days, "place": { "$ref": "#/$defs/Place" } },
            "required": ["days", "place"], "$defs": { "Place": place },
        });
        json!({ "type": "function", "function": { "name": name, "strict": true, "parameters": parameters } })
    };
    let tools = json!([tool("forecast", 1_900, "^[0-9]{5}$"), tool("history", 20, "^[A-Z]{3}$")]);
    for (name, least, is_of) in [
        (
            "forecast",
            1_900,
            (|code: &str| code.len() == 5 && code.bytes().all(|byte| byte.is_ascii_digit())) as fn(&str) -> bool,
        ),
        ("history", 20, |code: &str| code.len() == 3 && code.bytes().all(|byte| byte.is_ascii_uppercase())),
    ] {
        for seed in 0..2 {
            let choice = json!({ "type": "function", "function": { "name": name } });
            let more = json!({ "tools": tools, "tool_choice": choice, "temperature": 1.2, "seed": seed });
            let answer = ask(&sarai, more).await;
            let calls = calls(&answer);
            let (called, arguments) = &calls[0];
            assert_eq!(called, name);
            assert!(arguments["days"].as_i64().unwrap() >= least, "{arguments}");
            assert!(is_of(arguments["place"]["code"].as_str().unwrap()), "{arguments}");
            assert_eq!(answer.header("x-sarai-degraded"), None);
        }
    }
    let more = json!({ "tools": tools, "tool_choice": "required", "parallel_tool_calls": false, "temperature": 1.2, "seed": 5 });
    for (name, arguments) in calls(&ask(&sarai, more).await) {
        assert_eq!(arguments["place"]["code"].as_str().unwrap().len(), if name == "forecast" { 5 } else { 3 });
    }
    // What llama.cpp itself reads of none of them.
    let odd = json!({
        "type": "object", "required": ["x", "next"], "additionalProperties": false,
        "properties": { "x": { "$ref": "#/$defs/a~1b" }, "next": { "type": "array", "items": { "$ref": "#" }, "maxItems": 0 }, "z": true },
        "$defs": { "a/b": { "type": "array", "prefixItems": [{ "const": 7 }], "items": false } },
    });
    let odd = json!([{ "type": "function", "function": { "name": "odd", "parameters": odd } }]);
    let called =
        calls(&ask(&sarai, json!({ "tools": odd, "tool_choice": "required", "parallel_tool_calls": false })).await);
    assert_eq!((&called[0].1["x"], &called[0].1["next"]), (&json!([7]), &json!([])), "{called:?}");
    let unique = json!({ "type": "object", "properties": { "x": { "type": "array", "uniqueItems": true } } });
    let strict = |parameters: &Value, is_strict: bool| json!([{ "type": "function", "function": { "name": "f", "strict": is_strict, "parameters": parameters } }]);
    let told = async |parameters: &Value, is_strict: bool| {
        ask(&sarai, json!({ "tools": strict(parameters, is_strict), "max_tokens": 1 }))
            .await
            .header("x-sarai-degraded")
            .map(str::to_owned)
    };
    assert_eq!((told(&unique, true).await, told(&unique, false).await), (None, None), "it is checked when it is there");
    // Which nobody can check.
    let odd = json!({ "type": "object", "properties": { "x": { "type": "string", "format": "isbn" } } });
    assert_eq!((told(&odd, true).await.as_deref(), told(&odd, false).await), (Some("tools:format"), None));
    let body = chat("coder", "Hi", json!({ "tools": strict(&odd, true), "max_tokens": 1 }));
    let url = format!("{}/v1/chat/completions", sarai.url);
    let refused = sarai.client.post(url).header("x-sarai-strict", "true").body(body).send().await.unwrap();
    let refused = Answer::of(refused).await;
    assert!(refused.status == 503 && refused.text.contains("tools:format"), "{}", refused.text);
    let broken = json!({ "type": "object", "properties": { "x": { "$ref": "#/nowhere" } } });
    let tools = json!([tools[0], { "type": "function", "function": { "name": "f", "parameters": broken } }]);
    let answer = ask(&sarai, json!({ "tools": tools })).await;
    assert!(answer.status == 400 && answer.text.contains("`tools[1].function.parameters`"), "{}", answer.text);
    assert!(answer.text.contains("#/properties/x"), "{}", answer.text);
}

/// One that recites (`scripts/sensing_models.py`) calls two tools in one answer, and writes arguments in several tokens.
#[tokio::test]
async fn several_calls_of_one_answer_come_in_order_their_arguments_as_they_are_written() {
    let file = sketch("sensing/reciting/calls.gguf");
    let sarai = Sarai::start(&format!("models:\n  coder: {{ backend: gguf_native, gguf_path: {file} }}\n"));
    let (oslo, rome) = (json!({ "city": "Oslo" }), json!({ "city": "Rome" }));
    let both = [("get_weather".to_owned(), oslo.clone()), ("get_time".to_owned(), rome.clone())];
    for stream in [false, true] {
        let answer = ask(&sarai, json!({ "stream": stream })).await;
        assert_eq!(calls(&answer), both, "{}", answer.text);
        assert!(answer.text.contains("Let me see.") && answer.text.contains("\"finish_reason\":\"tool_calls\""));
        if stream {
            let has_call = |event: &&Value| event["choices"][0]["delta"]["tool_calls"][0]["index"] == 0;
            let events = answer.sse();
            assert!(events.iter().filter(has_call).count() >= 3, "the arguments came at once: {}", answer.text);
        }
    }
    let one = ask(&sarai, json!({ "parallel_tool_calls": false })).await;
    assert_eq!(calls(&one), both[..1], "{}", one.text);
    let body = json!({ "model": "coder", "stream": false, "tools": tools(), "messages": [{ "role": "user", "content": "Hi" }] });
    let whole = sarai.post("/api/chat", body.to_string()).await.json();
    let called = whole["message"]["tool_calls"].as_array().unwrap();
    let called: Vec<_> =
        called.iter().map(|call| (&call["function"]["name"], &call["function"]["arguments"])).collect();
    assert_eq!(called, [(&json!("get_weather"), &oslo), (&json!("get_time"), &rome)], "{whole}");
}

/// What a stop text cuts is no call, and the answer does not say that it is.
#[tokio::test]
async fn a_stop_text_within_a_call_leaves_no_call() {
    let file = sketch("sensing/reciting/calls.gguf");
    let sarai = Sarai::start(&format!("models:\n  coder: {{ backend: gguf_native, gguf_path: {file} }}\n"));
    for (stop, whole) in [("lo\"", 0), ("Ro", 1)] {
        let answer = ask(&sarai, json!({ "stop": [stop] })).await;
        assert_eq!(calls(&answer).len(), whole, "{}", answer.text);
        assert_eq!(answer.json()["choices"][0]["finish_reason"], "stop", "{}", answer.text);
        let streamed = ask(&sarai, json!({ "stop": [stop], "stream": true })).await;
        assert!(streamed.text.contains("\"finish_reason\":\"stop\""), "{}", streamed.text);
        let body = json!({
            "model": "coder", "stream": false, "tools": tools(), "messages": [{ "role": "user", "content": "Hi" }],
            "options": { "stop": [stop] },
        });
        let answer = sarai.post("/api/chat", body.to_string()).await.json();
        assert_eq!(answer["message"]["tool_calls"].as_array().map_or(0, Vec::len), whole, "{answer}");
    }
}

/// llama.cpp alone would need seconds for each of their tokens.
#[tokio::test]
async fn one_of_thousands_of_values_is_chosen() {
    let sarai = Sarai::start(&models());
    let values: Vec<String> = (0..5_000).map(|number| format!("article {number} of the catalogue")).collect();
    let schema = json!({ "type": "object", "properties": { "x": { "enum": values } }, "required": ["x"] });
    let fields = json!({ "json_schema": schema, "temperature": 1.0, "seed": 3, "max_tokens": 40 });
    let answer = sarai.post("/v1/chat/completions", chat("coder", "Choose one.", fields)).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let chosen: Value =
        serde_json::from_str(answer.json()["choices"][0]["message"]["content"].as_str().unwrap()).unwrap();
    assert!(values.iter().any(|value| chosen["x"] == *value), "{chosen}");
}

/// One that recites calls without the marks of its template, so that no grammar begins.
#[tokio::test]
async fn a_strict_call_without_marks_keeps_its_schema_or_is_not_passed_on_streamed_too() {
    let file = sketch("sensing/reciting/bare.gguf");
    let sarai = Sarai::start(&format!("models:\n  coder: {{ backend: gguf_native, gguf_path: {file} }}\n"));
    let tools = |city: &str, strict: bool| {
        let parameters =
            json!({ "type": "object", "properties": { "city": { "enum": [city] } }, "required": ["city"] });
        json!([{ "type": "function", "function": { "name": "get_weather", "strict": strict, "parameters": parameters } }])
    };
    for stream in [false, true] {
        let oslo = [("get_weather".to_owned(), json!({ "city": "Oslo" }))];
        for fits in [tools("Oslo", true), tools("Rome", false)] {
            assert_eq!(calls(&ask(&sarai, json!({ "stream": stream, "tools": fits })).await), oslo);
        }
        let broken = ask(&sarai, json!({ "stream": stream, "tools": tools("Rome", true) })).await;
        assert!(broken.status == 400 && broken.text.contains("json_validate_failed"), "{}", broken.text);
    }
}

/// A check that takes longer than it may: what was not checked is named, or refused.
#[tokio::test]
async fn what_could_not_be_checked_is_named_as_not_followed() {
    let sarai = Sarai::start(&models());
    let mut defs = json!({ "a40": { "type": "integer" } });
    for at in 0..40 {
        let next = json!({ "$ref": format!("#/$defs/a{}", at + 1) });
        defs[format!("a{at}")] = json!({ "allOf": [next, next] });
    }
    let endless = json!({ "type": "integer", "not": { "$ref": "#/$defs/a0" }, "$defs": defs });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "it", "schema": endless } });
    let body = chat("coder", "A number.", json!({ "response_format": format, "temperature": 0 }));
    let url = format!("{}/v1/chat/completions", sarai.url);
    let named = Answer::of(sarai.client.post(&url).body(body.clone()).send().await.unwrap()).await;
    assert_eq!((named.status, named.header("x-sarai-degraded")), (200, Some("schema:not")), "{}", named.text);
    let refused = sarai.client.post(&url).header("x-sarai-strict", "true").body(body).send().await.unwrap();
    let refused = Answer::of(refused).await;
    assert!(refused.status == 503 && refused.text.contains("schema:not"), "{}", refused.text);
}

#[tokio::test]
async fn ollamas_clients_get_calls_whole_and_send_results_back() {
    let sarai = Sarai::start(&models());
    let question = json!({ "role": "user", "content": "What is the weather in Oslo?" });
    for stream in [false, true] {
        let body = json!({ "model": "coder", "messages": [question], "tools": tools(), "stream": stream, "options": { "temperature": 0 } });
        let answer = sarai.post("/api/chat", body.to_string()).await;
        let lines = answer.lines();
        let call = lines
            .iter()
            .find_map(|line| line["message"]["tool_calls"].get(0))
            .unwrap_or_else(|| panic!("{}", answer.text));
        assert_eq!(
            (&call["function"]["name"], &call["function"]["arguments"]["city"]),
            (&json!("get_weather"), &json!("Oslo"))
        );
        assert_eq!(
            (&lines.last().unwrap()["done"], &lines.last().unwrap()["done_reason"]),
            (&json!(true), &json!("stop"))
        );
        let messages = json!([
            question,
            { "role": "assistant", "content": "", "tool_calls": [call] },
            { "role": "tool", "tool_name": "get_weather", "content": "{\"temperature\": -3}" },
        ]);
        let prompt_tokens = async |messages: Value| {
            let body = json!({ "model": "coder", "messages": messages, "tools": tools(), "stream": false, "options": { "num_predict": 1 } });
            sarai.post("/api/chat", body.to_string()).await.json()["prompt_eval_count"].as_i64().unwrap()
        };
        // The template shows the model its call and the result.
        let (asked, told) = (prompt_tokens(json!([question])).await, prompt_tokens(messages).await);
        assert!(told > asked + 30, "{asked} {told}");
    }
    let shown = |model: &str| sarai.post("/api/show", json!({ "model": model }).to_string());
    assert_eq!(shown("coder").await.json()["capabilities"], json!(["completion", "tools", "insert"]));
    assert_eq!(shown("plain").await.json()["capabilities"], json!(["completion"]));
}

/// Neither lost nor answered blind.
#[tokio::test]
async fn a_model_without_tools_refuses_them() {
    let sarai = Sarai::start(&models());
    let body = chat("plain", "Hello.", json!({ "tools": tools() }));
    let answer = sarai.post("/v1/chat/completions", body).await;
    assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("tools")), "{}", answer.text);
    assert!(sarai.worker_pids().await.is_empty(), "known from the file");
}

#[tokio::test]
async fn an_answer_follows_a_grammar_and_what_is_none_is_a_400_that_says_where() {
    let sarai = Sarai::start(&models());
    let ask = async |more: Value| sarai.post("/v1/chat/completions", chat("coder", "Is the sky blue?", more)).await;
    let answer = ask(json!({ "grammar": "root ::= \"certainly\" | \"never\"" })).await;
    let said = answer.json()["choices"][0]["message"]["content"].clone();
    assert!(said == "certainly" || said == "never", "{}", answer.text);
    let schema = json!({ "type": "object", "properties": { "n": { "type": "integer", "minimum": 3, "maximum": 5 } }, "required": ["n"], "additionalProperties": false });
    let answer = ask(json!({ "json_schema": schema })).await;
    let said = answer.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let n = serde_json::from_str::<Value>(&said).unwrap()["n"].as_i64().unwrap();
    assert!((3..=5).contains(&n), "{said}");
    let missing = json!({ "type": "object", "properties": { "x": { "$ref": "#/nowhere" } } });
    let workers = sarai.worker_pids().await;
    let list = |most: u64| json!({ "type": "array", "items": { "$ref": "#/$defs/x" }, "maxItems": most });
    let doubles = json!({ "$defs": { "x": { "anyOf": [list(7), list(8), { "type": "null" }] } }, "$ref": "#/$defs/x" });
    for (more, says) in [
        (json!({ "grammar": "root ::= \"open" }), "unexpected end of input"),
        (json!({ "grammar": "root ::= a\na ::= \"x\" )" }), "expecting newline or end in line 2, column 11"),
        (json!({ "grammar": "root ::= b" }), "Undefined rule identifier 'b'"),
        (
            json!({ "json_schema": { "type": "array", "items": { "type": "string", "pattern": "^(a$" } } }),
            "#/items: invalid pattern ^(a$",
        ),
        (json!({ "json_schema": missing }), "#/properties/x"),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "a", "schema": missing } } }),
            "grammar of `response_format`: ",
        ),
        (json!({ "grammar": "root ::= \"a\"", "json_schema": schema }), "both"),
        // Refers to itself without end; ends the process; takes for ever.
        (json!({ "grammar": "root ::= ws root \"+\" \"b\" | \"b\"\nws ::= \" \"*" }), "cannot"),
        (json!({ "grammar": "root ::= \"a\" x\nx ::= y x\ny ::= z\nz ::= \"\"" }), "cannot"),
        (json!({ "json_schema": { "type": "string", "pattern": "^((a{0,2000}){0,2000}){0,2000}$" } }), "cannot"),
        // The same behind more than a token of text, and what doubles with each token.
        (json!({ "grammar": "root ::= \"zqxjkvbwpzqxjkvbwp\" x\nx ::= y x\ny ::= z\nz ::= \"\"" }), "cannot"),
        (
            json!({ "grammar": "root ::= \"zqxjkvbwpzqxjkvbwp\" r\nr ::= ws r \"+\" \"b\" | \"b\"\nws ::= \" \"*" }),
            "cannot",
        ),
        (json!({ "grammar": "root ::= x\nx ::= \"a\" x \"b\" | \"a\" x \"c\" | \"a\"" }), "cannot"),
        (json!({ "json_schema": doubles }), "cannot"),
    ] {
        let answer = ask(more.clone()).await;
        assert!(answer.status == 400 && answer.text.contains(says), "{more}: {} {}", answer.status, answer.text);
        let param = answer.json()["error"]["param"].as_str().unwrap().to_owned();
        assert!(more.get(&param).is_some(), "{more}: {}", answer.text);
    }
    assert_eq!(sarai.worker_pids().await, workers, "the same worker");
    let body = json!({ "model": "coder", "messages": [{ "role": "user", "content": "Hi" }], "format": missing });
    let answer = sarai.post("/api/chat", body.to_string()).await;
    assert!(answer.status == 400 && answer.text.contains("grammar of `format`"), "{}", answer.text);
}

#[tokio::test]
async fn json_mode_gives_an_object_in_both_apis() {
    let sarai = Sarai::start(&models());
    let ask = "Describe a cat with the keys name, age and colour, in JSON.";
    let body = chat("coder", ask, json!({ "response_format": { "type": "json_object" }, "max_tokens": 200 }));
    let openai = sarai.post("/v1/chat/completions", body).await.json();
    let body = json!({
        "model": "coder", "format": "json", "stream": false, "options": { "num_predict": 200, "temperature": 0 },
        "messages": [{ "role": "user", "content": ask }],
    });
    let ollama = sarai.post("/api/chat", body.to_string()).await.json();
    let (openai, choice) = (&openai["choices"][0]["message"]["content"], &openai["choices"][0]["finish_reason"]);
    assert_eq!((choice, &ollama["done_reason"]), (&json!("stop"), &json!("stop")), "{openai} {ollama}");
    for text in [openai, &ollama["message"]["content"]] {
        let object: Value = serde_json::from_str(text.as_str().unwrap()).unwrap();
        assert!(object.as_object().is_some_and(|object| !object.is_empty()), "{text}");
    }
}

/// What was said token by token, and how likely the tokens were that could have been.
fn likely(answer: &Answer) -> Vec<(String, f64, Value)> {
    let tokens = answer.json()["choices"][0]["logprobs"]["content"].clone();
    let one = |token: &Value| {
        let said = token["token"].as_str().unwrap().to_owned();
        (said, token["logprob"].as_f64().unwrap(), token["top_logprobs"].clone())
    };
    tokens.as_array().unwrap().iter().map(one).collect()
}

/// Grammars and calls beside it, of other requests, choose nothing for an answer. Where it is not asked to be deterministic, how many
/// sequences a step has changes how llama.cpp rounds (`make bench-engine ENGINE="same"`): of two tokens that are as likely, either may
/// come.
#[tokio::test]
async fn greedy_text_is_the_same_alone_and_beside_answers_that_follow_a_form() {
    for (more, furthest) in [("parallel: 4", 0.5), ("parallel: 4, deterministic: true", 0.0)] {
        is_beside_forms(&Sarai::start(&models().replace("parallel: 2", more)), furthest).await;
    }
}

/// How far behind the chosen token another one may be that comes instead.
async fn is_beside_forms(sarai: &Sarai, furthest: f64) {
    let word = json!({ "type": "object", "properties": { "word": { "type": "string" } }, "required": ["word"] });
    let schema = json!({ "type": "array", "items": word, "minItems": 12 });
    let form = json!({ "type": "json_schema", "json_schema": { "name": "words", "schema": schema } });
    let more = |more: Value| {
        let mut fields = json!({ "max_tokens": 60, "logprobs": true, "top_logprobs": 5 });
        fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        fields
    };
    let bodies = [
        chat("coder", "Write a poem about the sea.", more(json!({}))),
        chat("coder", "List words of the sea.", more(json!({ "response_format": form }))),
    ];
    let called =
        chat("coder", "The weather in Oslo?", json!({ "max_tokens": 60, "tools": tools(), "tool_choice": "required" }));
    let post = async |body: &String| sarai.post("/v1/chat/completions", body.clone()).await;
    let alone = [likely(&post(&bodies[0]).await), likely(&post(&bodies[1]).await)];
    assert!(alone[1][0].0.starts_with('[') && alone.iter().all(|tokens| tokens.len() == 60));
    let (poem, list, call) = tokio::join!(post(&bodies[0]), post(&bodies[1]), post(&called));
    assert_eq!(calls(&call)[0].0, "get_weather");
    for (alone, company) in alone.iter().zip([likely(&poem), likely(&list)]) {
        let other = alone.iter().zip(&company).find(|(one, other)| one.0 != other.0);
        let Some(((said, most, might), (other, ..))) = other else { continue };
        let as_likely = might.as_array().unwrap().iter().find(|one| one["token"] == other.as_str());
        let behind = as_likely.map(|one| most - one["logprob"].as_f64().unwrap());
        assert!(behind.is_some_and(|behind| behind < furthest), "`{other}` for `{said}`: {behind:?}");
    }
}

/// Optional properties, each of which may be the first: llama.cpp's rules for them grow with the third power.
fn options(count: usize) -> Value {
    let properties: serde_json::Map<_, _> = (0..count).map(|n| (format!("p{n}"), json!({ "type": "null" }))).collect();
    json!({ "type": "object", "properties": properties, "additionalProperties": false })
}

/// Each takes for ever, or all memory, if it is let.
#[tokio::test]
async fn answers_go_on_while_forms_that_cannot_be_followed_are_tried() {
    let sarai = Sarai::start(&models());
    // It does not end by itself.
    let endless = json!({ "stream": true, "max_tokens": 1900, "logit_bias": { "151643": -100, "151645": -100 } });
    let body = chat("coder", "Write a story.", endless);
    let story = sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(body).send().await.unwrap();
    let mut story = story.bytes_stream();
    story.next().await.unwrap().unwrap();
    let workers = sarai.worker_pids().await;
    let tool = |schema: &Value| json!([{ "type": "function", "function": { "name": "f", "parameters": schema } }]);
    let inner = json!({ "type": "object", "properties": { "x": options(3_000) } });
    for (more, param) in [
        (json!({ "json_schema": inner }), "json_schema"),
        (json!({ "json_schema": options(10_000) }), "json_schema"),
        (json!({ "tools": tool(&options(3_000)), "tool_choice": "required" }), "tools"),
        (json!({ "grammar": "root ::= (((\"a\"{0,2000}){0,2000}){0,2000}){0,2000}" }), "grammar"),
    ] {
        let mut fields = json!({ "max_tokens": 1 });
        fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        for is_known in [false, true] {
            let mut asked = std::pin::pin!(sarai.post("/v1/chat/completions", chat("coder", "Hi", fields.clone())));
            let (began, mut told) = (Instant::now(), 0);
            let answer = loop {
                tokio::select! {
                    answer = &mut asked => break answer,
                    piece = story.next() => {
                        piece.expect("the story goes on").unwrap();
                        told += 1;
                    }
                }
            };
            let error = &answer.json()["error"];
            assert_eq!((answer.status, error["param"].as_str()), (400, Some(param)), "{}", answer.text);
            let place = if more["json_schema"] == inner { "#/properties/x)" } else { "" };
            assert!(answer.text.contains(place), "{}", answer.text);
            // Some are refused within the time of a token.
            let is_soon = began.elapsed() < Duration::from_millis(250);
            assert!(is_known || told > 0 || is_soon, "the story stood still beside `{param}`");
        }
    }
    let few = json!({ "json_schema": options(60), "max_tokens": 40 });
    let answer = sarai.post("/v1/chat/completions", chat("coder", "Hi", few)).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(sarai.worker_pids().await, workers);
}

/// llama.cpp ends the process at the token after one that its grammar refuses.
#[tokio::test]
async fn banning_all_that_a_form_allows_fails_the_request_and_not_the_worker() {
    let sarai = Sarai::start(&models());
    let all: serde_json::Map<_, _> = (0..151_000).map(|token| (token.to_string(), json!(-100))).collect();
    let before = sarai.post("/v1/chat/completions", chat("coder", "Hello.", json!({ "max_tokens": 1 }))).await;
    assert_eq!(before.status, 200);
    let pids = sarai.worker_pids().await;
    for form in [json!({ "response_format": { "type": "json_object" } }), json!({ "grammar": "root ::= \"aaaa\"" })] {
        let mut more = json!({ "logit_bias": all, "max_tokens": 20 });
        more.as_object_mut().unwrap().extend(form.as_object().unwrap().clone());
        let answer = sarai.post("/v1/chat/completions", chat("coder", "Hello.", more)).await;
        assert!([200, 400].contains(&answer.status), "{}", answer.text);
    }
    assert_eq!(sarai.worker_pids().await, pids, "the same worker");
}

/// An answer that breaks what no grammar follows is not passed on, streamed or plain: others are asked for, and if none keeps it, that is
/// said. What a schema does to the validator ends nothing else.
#[tokio::test]
async fn an_answer_that_breaks_its_schema_is_asked_for_again_or_refused() {
    let sarai = Sarai::start(&models());
    let ask = async |schema: &Value, more: Value| {
        let form = json!({ "type": "json_schema", "json_schema": { "name": "answer", "schema": schema } });
        let mut fields = json!({ "response_format": form, "temperature": 0, "max_tokens": 60 });
        fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        sarai.post("/v1/chat/completions", chat("coder", "Say a colour.", fields)).await
    };
    let colours = json!(["red", "green", "blue", "yellow"]);
    let first = ask(&json!({ "enum": colours }), json!({})).await;
    let usual: String = first.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let usual: Value = serde_json::from_str(&usual).unwrap();
    let other = json!({ "enum": colours, "not": { "const": usual } });
    for stream in [false, true] {
        let answer = ask(&other, json!({ "stream": stream })).await;
        assert_eq!((answer.status, answer.header("x-sarai-degraded")), (200, None), "{}", answer.text);
        let text = match stream {
            false => answer.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned(),
            true => answer.said(),
        };
        let said: Value = serde_json::from_str(&text).unwrap();
        assert!(said != usual && colours.as_array().unwrap().contains(&said), "{said}, and usually {usual}");
        // The grammar lets nothing else through.
        let never = ask(&json!({ "enum": ["red"], "not": { "const": "red" } }), json!({ "stream": stream })).await;
        let error = &never.json()["error"];
        assert_eq!((never.status, &error["code"]), (400, &json!("json_validate_failed")), "{}", never.text);
        assert!(error["message"].as_str().unwrap().contains("gave 4 answers"), "{}", never.text);
    }
    // Of these, the validator takes for ever: twice as long with each, or a pattern that tries all ways.
    let doubling = |depth: usize| {
        let part = |n: usize| json!({ "anyOf": [{ "$ref": format!("#/$defs/{}", n + 1) }, { "not": { "$ref": format!("#/$defs/{}", n + 1) } }] });
        let mut parts: serde_json::Map<_, _> = (0..depth).map(|n| (n.to_string(), part(n))).collect();
        parts.insert(depth.to_string(), json!({ "type": "integer" }));
        json!({ "type": "string", "maxLength": 3, "not": { "not": { "$ref": "#/$defs/0" } }, "$defs": parts })
    };
    for schema in [doubling(60), json!({ "type": "string", "maxLength": 3, "allOf": [{ "$ref": "#" }] })] {
        let answer = ask(&schema, json!({})).await;
        assert!([200, 400].contains(&answer.status), "{schema}: {}", answer.text);
    }
    assert_eq!(sarai.get("/health").await.status, 200);
}

#[test]
fn answers_to_200_schemas_validate() {
    let config = format!(
        "models:\n  plain: {{ backend: gguf_native, gguf_path: {}, context_length: 512, parallel: 8 }}\n",
        smollm2()
    );
    let sarai = Sarai::start(&config);
    let python = std::env::var("SARAI_PYTHON").expect("SARAI_PYTHON names no Python with the clients: run `make test`");
    let tests = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/clients/test_schemas.py");
    let run = std::process::Command::new(python).arg(tests).env("SARAI_URL", &sarai.url).output().unwrap();
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success() && said.contains("200 schemas"), "{said}{}", String::from_utf8_lossy(&run.stderr));
}
