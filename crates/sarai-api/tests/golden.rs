//! Every wire shape, against a golden file. `UPDATE_GOLDEN=1 cargo test -p sarai-api` writes them anew.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use sarai_api::ollama::{self, End, LineWriter, ModelFacts, OllamaRequest};
use sarai_api::openai::{self, ChunkWriter};
use sarai_api::{Served, Whole, translate};
use sarai_core::{Api, Event, Extra, FinishReason, GenerateRequest, Message, Prompt, Role, Sampling, Timings, Usage};
use serde_json::{Value, json};

fn golden(name: &str, value: &Value) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.json"));
    let written = format!("{value:#}\n");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &written).unwrap();
    }
    let wanted = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(written, wanted, "{name}");
}

fn served() -> Served {
    Served {
        by: "solar@gguf_native".into(),
        is_local: true,
        fallback_reason: Some("solar@ollama_http(h): host h cannot be reached (refused)".into()),
        degraded: vec!["logit_bias".into()],
        resumed: Vec::new(),
    }
}

const USAGE: Usage = Usage { prompt_tokens: 12, cached_tokens: 4, completion_tokens: 3 };

fn timings() -> Timings {
    let ms = Duration::from_millis;
    Timings { queue: ms(1), load: ms(20), encode: ms(0), prefill: ms(300), decode: ms(4000), ..Timings::default() }
}

fn whole_answer(extra: Option<Extra>) -> Whole {
    let text = extra.as_ref().map_or_else(|| "Hello".into(), |extra| extra.text.clone());
    let (finish, usage, timings) = (FinishReason::Stop, USAGE, timings());
    Whole {
        text,
        reasoning: String::new(),
        tool_calls: Vec::new(),
        logprobs: Vec::new(),
        finish,
        usage,
        timings,
        extra: extra.map(Box::new),
        context: Vec::new(),
    }
}

#[test]
fn openai_answers_and_chunks() {
    for (name, kind) in [("chat", openai::Kind::Chat), ("completion", openai::Kind::Completion)] {
        let writer = ChunkWriter {
            kind,
            id: "id-1".into(),
            created: 1_700_000_000,
            model: "solar".into(),
            include_usage: true,
            index: 0,
            is_local: true,
        };
        let whole = whole_answer(None);
        let whole = writer.whole(whole, &served());
        golden(&format!("openai_{name}"), &whole);
        let chunks = [
            writer.role(),
            Some(writer.text("Hel")),
            Some(writer.finish(FinishReason::Length, &USAGE, &timings(), &served())),
            writer.usage(&USAGE, Some(&timings()), &serde_json::Value::Null),
        ];
        for text in ["Hel", "\"quoted\"\n", "\u{1}"] {
            assert_eq!(writer.around_text().with(text.into()), writer.text(text).to_string());
        }
        golden(&format!("openai_{name}_chunks"), &Value::from(chunks.into_iter().flatten().collect::<Vec<_>>()));
    }
    let resumed = sarai_api::Resumed { by: "solar@gguf_native".into(), reason: "host h cut the stream".into() };
    let resumed = Served { resumed: vec![resumed], ..served() };
    let writer = ChunkWriter {
        kind: openai::Kind::Chat,
        id: "id-1".into(),
        created: 1_700_000_000,
        model: "solar".into(),
        include_usage: false,
        index: 0,
        is_local: true,
    };
    golden("openai_chat_resumed", &writer.finish(FinishReason::Stop, &USAGE, &timings(), &resumed));
    golden("openai_models", &openai::models(vec![openai::model("solar", 0)]));
    golden("openai_error", &openai::error_body("no", "invalid_request_error", Some("n"), None));
}

#[test]
fn ollama_lines_and_lists() {
    let now = UNIX_EPOCH + Duration::from_nanos(1_700_000_000_123_456_789);
    for (name, kind) in [("chat", ollama::Kind::Chat), ("generate", ollama::Kind::Generate)] {
        let writer = LineWriter { kind, model: "solar".into() };
        let end = End {
            finish: FinishReason::Stop,
            usage: &USAGE,
            timings: &timings(),
            served: &served(),
            context: Value::Null,
        };
        let lines = [writer.text(now, "Hel"), writer.done(now, "", end), writer.without_text(now, "load")];
        golden(&format!("ollama_{name}_lines"), &Value::from(lines.to_vec()));
    }
    let facts = ModelFacts {
        name: "lfm2".into(),
        size: 98,
        digest: "ab".into(),
        family: "llama".into(),
        parameter_size: "135.0M".into(),
        quantization: "Q4_1".into(),
        modified: Some(now),
    };
    let purpose = sarai_core::Purpose::Answers;
    let abilities = ollama::Abilities { purpose, senses: &[], template: "{{ x }}", fills_in: true };
    golden(
        "ollama_lists",
        &json!([
            ollama::list_entry(&facts),
            ollama::process_entry(&facts, 200, 4096, None, json!({ "pid": 7 })),
            ollama::show(&facts, &abilities, json!({ "general.architecture": "llama" })),
        ]),
    );
    golden("ollama_error", &ollama::error_body("no", Some(json!({ "free_bytes": 1 }))));
}

#[test]
fn requests_of_both_apis_mean_the_same() {
    let openai = openai::parse_chat(
        json!({
            "model": "solar", "stream": true, "stream_options": { "include_usage": true }, "temperature": 0.5, "top_p": 0.9,
            "seed": 7, "presence_penalty": 1, "frequency_penalty": -1, "stop": "END", "max_completion_tokens": 9,
            "messages": [{ "role": "developer", "content": "Be brief." }, { "role": "user", "content": [{ "type": "text", "text": "Hi" }] }],
        })
        .to_string()
        .as_bytes(),
    )
    .unwrap();
    let ollama = ollama::parse_chat(
        json!({
            "model": "solar",
            "options": { "temperature": 0.5, "top_p": 0.9, "seed": 7, "presence_penalty": 1, "frequency_penalty": -1, "stop": ["END"], "num_predict": 9 },
            "messages": [{ "role": "system", "content": "Be brief." }, { "role": "user", "content": "Hi" }],
        })
        .to_string()
        .as_bytes(),
    )
    .unwrap();
    let OllamaRequest::Generate(mut ollama) = ollama else { panic!("{ollama:?}") };
    let mut openai = openai;
    // What stands only there is kept for hosts that speak the same API, and means nothing else.
    for (request, api) in
        [(&mut openai.request, sarai_core::Api::OpenAi), (&mut ollama.request, sarai_core::Api::Ollama)]
    {
        let kept = request.extras.take().unwrap();
        assert!(kept.api == api && kept.needs.is_empty() && kept.degrades.is_empty(), "{kept:?}");
    }
    // Each is told of mistakes in its own words.
    let param = std::mem::replace(&mut openai.request.format_param, ollama.request.format_param.clone());
    assert_eq!((&*param, &*ollama.request.format_param), ("response_format", "format"));
    // Only Ollama cuts what is too long.
    assert!(std::mem::take(&mut ollama.request.truncate));
    assert_eq!(openai.request, ollama.request);
    assert!(openai.delivery.stream && ollama.delivery.stream, "Ollama streams unless told not to");
}

/// As other clients write it.
#[test]
fn the_same_in_other_words_is_the_same() {
    let openai = |more: Value| {
        let mut body = json!({ "model": "m", "messages": [{ "role": "User", "content": "x" }] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        openai::parse_chat(body.to_string().as_bytes()).unwrap().request
    };
    assert_eq!(openai(json!({ "n_predict": 3, "max_tokens": 9 })).max_tokens, Some(3));
    let schema = json!({ "type": "json_schema", "schema": { "type": "integer" } });
    let around = json!({ "type": "json_schema", "json_schema": { "schema": { "type": "integer" } } });
    assert_eq!(
        openai(json!({ "response_format": schema })).format,
        openai(json!({ "response_format": around })).format
    );
    let bias = |bias: Value| openai(json!({ "logit_bias": bias })).sampling.logit_bias;
    assert_eq!(bias(json!([[5, 1.5], [7, false]])), bias(json!({ "5": 1.5, "7": -100 })));
    assert_eq!(bias(json!([])), []);
    let untyped = json!([{ "function": { "name": "f", "parameters": { "type": "object" } } }]);
    let typed = json!([{ "type": "function", "function": { "name": "f", "parameters": { "type": "object" } } }]);
    let names = |tools: Value| openai(json!({ "tools": tools })).tools.unwrap().names;
    assert_eq!(names(untyped), names(typed));
    let ollama = |options: Value| {
        let body = json!({ "model": "m", "messages": [{ "role": "user", "content": "x" }], "options": options });
        match ollama::parse_chat(body.to_string().as_bytes()).unwrap() {
            OllamaRequest::Generate(parsed) => parsed.request,
            other => panic!("{other:?}"),
        }
    };
    let floats = json!({ "num_ctx": 4096.0, "num_predict": 8.0, "seed": 3.0, "top_k": 40.0, "repeat_last_n": -1.0 });
    let whole = json!({ "num_ctx": 4096, "num_predict": 8, "seed": 3, "top_k": 40, "repeat_last_n": -1 });
    assert_eq!(ollama(floats), ollama(whole));
}

#[test]
fn further_samplers_are_read_checked_and_reach_hosts_of_the_same_api_and_say_nothing_where_they_are_off() {
    let parse = |more: Value| {
        let mut body = json!({ "model": "m", "messages": [{ "role": "user", "content": "x" }] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        openai::parse_chat(body.to_string().as_bytes()).map(|parsed| parsed.request)
    };
    let degrades = |request: &GenerateRequest| request.extras.as_ref().unwrap().degrades.clone();
    let set = json!({ "mirostat": 2.0, "mirostat_tau": 4.5, "samplers": ["top-k", "magic", "temp", "top_k"] });
    let request = parse(set.clone()).unwrap();
    assert_eq!(degrades(&request), [""; 0]);
    let further = &request.sampling.further;
    assert_eq!((further.mirostat, further.mirostat_tau), (Some(2), Some(4.5)));
    assert_eq!(further.samplers.as_deref(), Some(&["top_k".to_owned(), "temperature".to_owned()][..]));
    let sent = openai::remote::request("m", &request).1;
    for (name, value) in set.as_object().unwrap() {
        assert_eq!(&sent[name], value, "{name}");
    }
    let across = ollama::chat_request("m", None, &request).1;
    assert_eq!((&across["mirostat"], &across["options"]["mirostat"]), (&Value::Null, &Value::Null));
    let lost = translate::not_asked_across(&request.sampling);
    assert_eq!(lost, ["mirostat", "mirostat_tau", "samplers"]);
    let off = json!({
        "mirostat": 0, "mirostat_eta": 0.1, "dry_multiplier": 0, "dry_base": 1.75, "dry_penalty_last_n": -1, "xtc_probability": 0,
        "xtc_threshold": 0.1, "dynatemp_range": 0.0, "dynatemp_exponent": 1.0, "top_n_sigma": -1.0, "min_keep": 0.0,
    });
    let quiet = parse(off).unwrap();
    assert_eq!((&quiet.sampling, degrades(&quiet).len()), (&parse(json!({})).unwrap().sampling, 0));
    assert_eq!(degrades(&parse(json!({ "dry_multiplier": 0.8 })).unwrap()), ["dry_multiplier"]);
    for (wrong, says) in [
        (json!({ "mirostat": 3 }), "`mirostat` is 3: use 0, 1 or 2"),
        (json!({ "xtc_probability": 1.5 }), "`xtc_probability` is 1.5: use a number from 0 to 1"),
        (json!({ "mirostat": 1, "mirostat_tau": "much" }), "`mirostat_tau`"),
        (json!({ "response_format": { "type": "json_schema" } }), "`response_format.json_schema` is missing"),
        (json!({ "logit_bias": [[1, true]] }), "`logit_bias` is true"),
        (json!({ "n_predict": 0 }), "`n_predict` is 0"),
    ] {
        let error = parse(wrong.clone()).unwrap_err().to_string();
        assert!(error.contains(says), "{wrong}: {error}");
    }
}

#[test]
fn errors_name_the_field_and_the_value() {
    let error = |body: Value| openai::parse_chat(body.to_string().as_bytes()).unwrap_err().to_string();
    let with = |key: &str, value: Value| {
        let mut body = json!({ "model": "m", "messages": [{ "role": "user", "content": "x" }] });
        body[key] = value;
        error(body)
    };
    assert!(with("temperature", json!("hot")).contains("`temperature`: invalid type: string \"hot\""));
    assert!(with("top_p", json!(2)).contains("`top_p` is 2: use a number from 0 to 1"));
    assert!(with("logit_bias", json!({ "x": 1 })).contains("key `x`"));
}

#[test]
fn a_request_to_an_ollama_host_sets_only_what_was_asked_for() {
    let request = GenerateRequest {
        sampling: Sampling { temperature: Some(0.7), ..Sampling::default() },
        ..GenerateRequest::new(Prompt::Chat(vec![Message::new(Role::User, "Hi")]))
    };
    let (path, body) = ollama::chat_request("solar", None, &request);
    assert_eq!(path, "/api/chat");
    golden("ollama_remote_request", &body);
    let residence =
        sarai_core::Residence { context_tokens: Some(8192), keep_alive: Some(sarai_core::KeepAlive::Forever) };
    let (_, body) = ollama::chat_request("solar", Some(2048), &GenerateRequest { residence, ..request.clone() });
    assert_eq!((&body["options"]["num_ctx"], &body["keep_alive"]), (&json!(8192), &json!(-1)));
    let (path, body) = openai::remote::request("solar", &request);
    golden("openai_remote_chat", &json!({ "path": path, "body": body }));
    let raw = GenerateRequest { prompt: Prompt::Raw("The sky".into()), max_tokens: Some(4), ..request };
    assert_eq!(ollama::chat_request("solar", Some(2048), &raw).0, "/api/generate");
}

#[test]
fn lines_of_an_ollama_host_become_events() {
    use ollama::parse_line;
    let done = br#"{"message":{"content":"!"},"done":true,"done_reason":"length","eval_count":3,"prompt_eval_count":12,"load_duration":20000000}"#;
    let read = parse_line(done).unwrap();
    let Some(Event::Done { finish, usage, timings }) = read.end else { panic!() };
    assert_eq!(read.step, Some(Event::Text("!".into())));
    assert_eq!((finish, usage.completion_tokens, timings.load), (FinishReason::Length, 3, Duration::from_millis(20)));
    assert!(
        parse_line(b"<html>").is_err()
            && parse_line(br#"{"error":"x"}"#).is_err()
            && parse_line(br#"{"ok":1}"#).is_err()
    );
    assert_eq!(parse_line(b"  \n"), Ok(sarai_api::RemoteLine::default()));
}

#[test]
fn what_nobody_here_reads_reaches_a_host_of_the_same_api_and_needs_are_told() {
    let body = json!({
        "model": "m", "user": "u", "tools": [{ "type": "function" }], "temperature": 0.5, "stream": true,
        "messages": [
            { "role": "user", "content": [{ "type": "text", "text": "Look:" }, { "type": "image_url", "image_url": { "url": "data:image/png;base64,aGk=" } }] },
            { "role": "assistant", "content": null, "tool_calls": [{ "id": "1" }] },
            { "role": "tool", "content": "3", "tool_call_id": "1" },
        ],
    });
    let request = openai::parse_chat(body.to_string().as_bytes()).unwrap().request;
    let params: Vec<_> = request.needs().iter().map(|need| need.param.as_str()).collect();
    assert_eq!(params, ["messages[0].content[1]", "messages[1].tool_calls", "tools"]);
    let (_, sent) = openai::remote::request("there", &request);
    for key in ["user", "tools", "messages", "temperature"] {
        assert_eq!(sent[key], body[key], "{key}");
    }
    assert_eq!((&sent["model"], &sent["stream"]), (&json!("there"), &json!(true)));
    let (_, other) = ollama::chat_request("there", None, &request);
    assert_eq!((&other["tools"], &other["user"]), (&Value::Null, &Value::Null), "it speaks another API");

    let body = json!({ "model": "m", "prompt": "Look:", "images": ["aGk="], "options": { "mirostat": 1, "num_predict": 5, "new": 2 }, "new": true });
    let OllamaRequest::Generate(parsed) = ollama::parse_generate(body.to_string().as_bytes()).unwrap() else {
        panic!()
    };
    let (path, sent) = ollama::chat_request("there", None, &parsed.request);
    assert_eq!(
        (path, &sent["prompt"], &sent["images"], &sent["new"]),
        ("/api/generate", &body["prompt"], &body["images"], &body["new"])
    );
    assert_eq!((&sent["options"]["mirostat"], &sent["options"]["new"]), (&json!(1), &json!(2)));
    assert_eq!(parsed.request.extras.unwrap().degrades, [""; 0], "workers know it");
}

#[test]
fn what_a_host_says_beyond_text_reaches_clients_of_the_same_api() {
    let mut reader = openai::remote::SseReader::default();
    let chunk = br#"data: {"id":"1","object":"o","created":1,"model":"x","system_fingerprint":"fp","choices":[{"index":0,"delta":{"role":"assistant","content":"Hi","reasoning_content":"hm","tool_calls":[{"index":0,"id":"c"}]},"logprobs":{"content":[]},"finish_reason":null}]}"#;
    let Some(Event::Extra(extra)) = reader.line(chunk).unwrap().step else { panic!() };
    let writer = ChunkWriter {
        kind: openai::Kind::Chat,
        id: "id-1".into(),
        created: 1_700_000_000,
        model: "solar".into(),
        include_usage: false,
        index: 0,
        is_local: true,
    };
    golden(
        "openai_chat_extra",
        &json!([writer.extra((*extra).clone()), writer.whole(whole_answer(Some(*extra)), &served())]),
    );
    let again = br#"data: {"system_fingerprint":"fp","choices":[{"delta":{"content":"!"}}]}"#;
    assert_eq!(reader.line(again).unwrap().step, Some(Event::Text("!".into())), "said already");

    let line = br#"{"model":"x","created_at":"t","message":{"role":"assistant","content":"","thinking":"hm","tool_calls":[{"function":{"name":"f"}}]},"new":1,"done":false}"#;
    let Some(Event::Extra(extra)) = ollama::parse_line(line).unwrap().step else { panic!() };
    let lines = LineWriter { kind: ollama::Kind::Chat, model: "solar".into() };
    let now = UNIX_EPOCH + Duration::from_nanos(1_700_000_000_123_456_789);
    golden(
        "ollama_chat_extra",
        &json!([lines.extra(now, (*extra).clone()), lines.whole(now, whole_answer(Some((*extra).clone())), &served())]),
    );
    assert_eq!(extra.api, Api::Ollama);
    assert_eq!(writer.extra(*extra), None, "it has no text, and the client speaks another API");
}
