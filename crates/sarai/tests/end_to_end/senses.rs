//! Pictures and sound, on small models of the true architectures (`scripts/sensing_models.py`): fitted ones that name what they sense, and
//! random ones whose answers are those of llama.cpp's own server.

use crate::support::host::{Host, openai};
use crate::support::media::{BLUE, GREEN, RED, audio_part, base64, image_part, picture, png, text_part, wav};
use crate::support::{Ollama, Reading, Sarai, chat, sketch, smollm2};
use futures_util::future::join_all;
use image::ImageFormat;
use serde_json::{Value, json};

/// What there is of each: the text model, its projector, and whether that hears.
const PAIRS: [(&str, &str, bool); 3] =
    [("gemma3", "gemma3", false), ("qwen2vl", "qwen2vl", false), ("omni", "qwen2vl", true)];

fn file(kind: &str, name: &str) -> String {
    sketch(&format!("sensing/{kind}/{name}.gguf"))
}

/// All three models, and one that has no senses.
fn models(kind: &str, more: &str) -> String {
    let model = |(name, text, _): &(&str, &str, bool)| {
        let (model, projector) = (file(kind, text), file(kind, &format!("mmproj-{name}")));
        format!(
            "  {name}: {{ backend: gguf_native, gguf_path: {model}, mmproj_path: {projector}, context_length: 2048, parallel: 4 }}\n"
        )
    };
    let models: String = PAIRS.iter().map(model).collect();
    format!(
        "memory: {{ max_concurrent_llms: 4 }}\n{more}models:\n{models}  blind: {{ backend: gguf_native, gguf_path: {} }}\n",
        smollm2()
    )
}

fn body(model: &str, parts: &[Value], more: Value) -> String {
    let mut body = json!({ "model": model, "messages": [{ "role": "user", "content": parts }], "temperature": 0, "max_tokens": 12 });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body.to_string()
}

async fn answer(sarai: &Sarai, model: &str, parts: &[Value]) -> Value {
    let answer = sarai.post("/v1/chat/completions", body(model, parts, json!({}))).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()
}

/// A small picture with a colour profile that is half a gigabyte of zeros.
fn profile_bomb() -> Vec<u8> {
    let good = png(64, 64, RED);
    let deflated = {
        let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
        for _ in 0..480 {
            std::io::Write::write_all(&mut encoder, &vec![0; 1 << 20]).unwrap();
        }
        encoder.finish().unwrap()
    };
    let content = [b"iCCPx\0\0".as_slice(), &deflated].concat();
    let length = u32::try_from(content.len() - 4).unwrap().to_be_bytes();
    let checksum = crc32fast::hash(&content).to_be_bytes();
    // Behind the signature and the head.
    [&good[..33], &length, &content, &checksum, &good[33..]].concat()
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("{answer}"))
}

#[tokio::test]
async fn what_is_shown_and_heard_is_named_in_both_apis_streamed_and_whole() {
    let sarai = Sarai::start(&models("fitted", ""));
    for (model, _, hears) in PAIRS {
        for (name, colour) in [("red", RED), ("green", GREEN), ("blue", BLUE)] {
            for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP] {
                let file = picture(70, 50, colour, format);
                let named = answer(&sarai, model, &[text_part("which"), image_part(&file)]).await;
                assert_eq!(
                    (text(&named), &named["choices"][0]["finish_reason"]),
                    (name, &json!("stop")),
                    "{model} {format:?}"
                );
            }
            let parts = [image_part(&png(90, 60, colour)), text_part("which")];
            let streamed = sarai.post("/v1/chat/completions", body(model, &parts, json!({ "stream": true }))).await;
            let deltas = streamed.sse();
            let said: String =
                deltas.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
            assert_eq!(said, name, "{model}: {}", streamed.text);

            let image = base64(&png(64, 64, colour));
            let message = json!({ "role": "user", "content": "which", "images": [image] });
            for (path, key, stream, asked) in [
                ("/api/chat", "/message/content", false, json!({ "messages": [message] })),
                ("/api/chat", "/message/content", true, json!({ "messages": [message] })),
                ("/api/generate", "/response", false, json!({ "prompt": "which", "images": [image] })),
            ] {
                let mut body =
                    json!({ "model": model, "stream": stream, "options": { "temperature": 0, "num_predict": 12 } });
                body.as_object_mut().unwrap().extend(asked.as_object().unwrap().clone());
                let answer = sarai.post(path, body.to_string()).await;
                let said: String = answer.lines().iter().filter_map(|line| line.pointer(key)?.as_str()).collect();
                assert_eq!((answer.status, said.as_str()), (200, name), "{model} {path}: {}", answer.text);
            }
        }
        if hears {
            for (name, hertz, rate) in
                [("low", 250.0, 16_000), ("high", 6000.0, 16_000), ("low", 250.0, 44_100), ("high", 6000.0, 48_000)]
            {
                let heard = answer(&sarai, model, &[text_part("which"), audio_part(&wav(hertz, 0.5, rate))]).await;
                assert_eq!(text(&heard), name, "{hertz} Hz at {rate}");
            }
        }
    }
}

#[tokio::test]
async fn answers_are_those_of_llama_cpps_server_alone_in_company_and_out_of_the_cache() {
    let sarai = Sarai::start(&models("random", ""));
    let cases: Vec<Value> = serde_json::from_str(include_str!("../../../../tests/senses_reference.json")).unwrap();
    assert!(cases.len() >= 17);
    let ask = |case: &Value| {
        let body = json!({ "model": case["model"], "messages": case["messages"], "temperature": 0, "max_tokens": 12 });
        sarai.post("/v1/chat/completions", body.to_string())
    };
    let check = |case: &Value, answer: &Value, how: &str| {
        // The other server leaves out a letter of which the last bytes are missing.
        let whole = |text: &str| text.trim_end_matches('\u{fffd}').to_owned();
        let found = (&answer["usage"]["prompt_tokens"], whole(text(answer)));
        let wanted = (&case["prompt_tokens"], whole(case["text"].as_str().unwrap()));
        assert_eq!(found, wanted, "{how}: {} {answer}", case["model"]);
    };
    for case in &cases {
        check(case, &ask(case).await.json(), "alone");
    }
    for case in &cases {
        ask(case).await;
        let answer = ask(case).await.json();
        check(case, &answer, "again");
        let (cached, prompt) = (&answer["usage"]["prompt_tokens_details"]["cached_tokens"], &case["prompt_tokens"]);
        // But for its last token; Gemma's window keeps no more than it covers.
        if case["model"] != "gemma3" {
            assert_eq!(cached.as_u64().unwrap() + 1, prompt.as_u64().unwrap(), "{answer}");
        }
    }
    let answers = join_all(cases.iter().map(ask)).await;
    for (case, answer) in cases.iter().zip(answers) {
        check(case, &answer.json(), "in company");
    }
}

#[tokio::test]
async fn a_picture_that_is_known_is_not_encoded_again() {
    let sarai = Sarai::start(&models("fitted", ""));
    for (model, ..) in PAIRS {
        let picture = image_part(&png(90, 60, GREEN));
        let encoded = |answer: &Value| answer["sarai"]["timings_ms"]["encode"].as_f64();
        let first = answer(&sarai, model, &[text_part("which"), picture.clone()]).await;
        assert!(encoded(&first).is_some_and(|ms| ms > 0.0), "{model}: {first}");
        // Elsewhere in the prompt, so that the prefix cache does not have it.
        let again = answer(&sarai, model, &[text_part("tell me which"), picture]).await;
        assert_eq!((encoded(&again), text(&again)), (None, "green"), "{model}: {again}");
        let other = answer(&sarai, model, &[text_part("which"), image_part(&png(90, 60, BLUE))]).await;
        assert!(encoded(&other).is_some(), "{model}: {other}");
    }
}

/// Nine pictures of which eight fit what is kept of encoded ones.
#[tokio::test]
async fn a_conversation_with_more_pictures_than_are_kept_has_none_encoded_again_while_the_cache_has_it() {
    let long = models("fitted", "").replace("context_length: 2048, parallel: 4", "context_length: 12000, parallel: 1");
    let sarai = Sarai::start(&long);
    // Each of another size, and of the largest number of tokens.
    let pictures = (0..9).map(|n| image_part(&png(1600 + 32 * n, 1600 + 32 * n, GREEN)));
    let mut messages =
        vec![json!({ "role": "user", "content": pictures.chain([text_part("which")]).collect::<Vec<_>>() })];
    let ask = async |messages: &[Value]| {
        let body = json!({ "model": "qwen2vl", "messages": messages, "temperature": 0, "max_tokens": 12 });
        let answer = sarai.post("/v1/chat/completions", body.to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let answer = answer.json();
        assert_eq!(text(&answer), "green", "{answer}");
        (answer["sarai"]["timings_ms"]["encode"].as_f64(), answer["usage"].clone())
    };
    let (encoded, usage) = ask(&messages).await;
    assert!(encoded.is_some(), "all of them are new");
    let prompt = usage["prompt_tokens"].as_u64().unwrap();
    assert!(prompt > 8_000, "{usage}");
    messages
        .extend([json!({ "role": "assistant", "content": "green" }), json!({ "role": "user", "content": "which" })]);
    let (encoded, usage) = ask(&messages).await;
    let cached = &usage["prompt_tokens_details"]["cached_tokens"];
    assert!(encoded.is_none() && cached.as_u64() > Some(prompt - 20), "{encoded:?} {usage}");
    // One that needs the cells.
    let long = answer(&sarai, "qwen2vl", &[text_part(&"tell me more ".repeat(600))]).await;
    assert!(long["usage"]["prompt_tokens"].as_u64() > Some(3_000), "{long}");
    let (encoded, usage) = ask(&messages).await;
    let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert!(encoded.is_some() && cached < Some(100), "neither kept nor in the cache: {usage}");
    let (encoded, _) = ask(&messages).await;
    assert!(encoded.is_none(), "in the cache again");
}

/// The context has grown since the model was loaded: one prompt has more pictures than are known.
#[tokio::test]
async fn a_picture_that_is_forgotten_while_its_prompt_waits_is_encoded_all_the_same() {
    let small = models("fitted", "").replace("context_length: 2048, parallel: 4", "context_length: 9600, parallel: 1");
    let sarai = Sarai::start(&small);
    let pictures =
        |sides: &[u32], colour| sides.iter().map(|&side| base64(&png(side, side, colour))).collect::<Vec<_>>();
    let ask = async |text: &str, images: Vec<String>, context: u32| {
        let body = json!({
            "model": "qwen2vl", "stream": false, "options": { "num_ctx": context, "num_predict": 4, "temperature": 0 },
            // What comes first is another prefix, so that the cache does not have the pictures.
            "messages": [
                { "role": "user", "content": text },
                { "role": "assistant", "content": "red" },
                { "role": "user", "content": "which", "images": images },
            ],
        });
        let answer = sarai.post("/api/chat", body.to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()["message"]["content"].as_str().unwrap().to_owned()
    };
    assert_eq!(ask("one", pictures(&[64], GREEN), 9_600).await, "green");
    let sides: Vec<u32> = (0..9).map(|n| 1600 + 32 * n).collect();
    assert_eq!(ask("two", pictures(&sides, GREEN), 16_000).await, "green");
    // The first of these is known, and not kept; the others push it out.
    let newer: Vec<u32> = (0..9).map(|n| 1616 + 32 * n).collect();
    let images = [pictures(&sides[..1], GREEN), pictures(&newer, GREEN)].concat();
    assert_eq!(ask("three", images, 16_000).await, "green");
}

/// Tokens of a story.
const STORY: usize = 1200;

/// A long answer of `omni`.
async fn story(sarai: &Sarai) -> Reading {
    let more =
        json!({ "stream": true, "max_tokens": STORY, "ignore_eos": true, "stream_options": { "include_usage": true } });
    let body = body("omni", &[text_part("A story")], more);
    Reading::begin(sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).body(body)).await
}

#[tokio::test]
async fn what_cannot_be_read_is_refused_with_its_field_and_hurts_nobody() {
    let sarai = Sarai::start(&models("fitted", ""));
    let red = image_part(&png(64, 64, RED));
    assert_eq!(text(&answer(&sarai, "omni", std::slice::from_ref(&red)).await), "red");
    let workers = sarai.worker_pids().await;
    let good = png(64, 64, RED);
    let mut claims = good.clone();
    claims[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]);
    let beside_all = story(&sarai).await;
    let picture = |bytes: &[u8]| image_part(bytes);
    let url = |url: &str| json!({ "type": "image_url", "image_url": { "url": url } });
    for (part, says) in [
        (picture(&png(1, 1, RED)), "1 x 1 pixels"),
        (picture(&png(1, 300, RED)), "1 x 300 pixels"),
        (picture(&png(2, 500, RED)), "200 times as long"),
        (picture(&png(4097, 3072, RED)), "4097 x 3072"),
        (picture(&claims), "cannot be read"),
        (picture(&good[..good.len() / 2]), "cannot be read"),
        (picture(b"GIF89a"), "cannot be read"),
        (picture(b"<html>"), "PNG, JPEG, GIF, WebP or BMP"),
        (picture(&wav(300.0, 0.1, 16_000)), "PNG, JPEG, GIF, WebP or BMP"),
        (audio_part(&good), "WAV, MP3 or FLAC"),
        (audio_part(&wav(300.0, 0.0, 16_000)), "WAV, MP3 or FLAC"),
        (audio_part(&wav(300.0, 301.0, 8_000)), "300 seconds"),
        (url("data:image/png;base64,"), "is empty"),
        (url("data:image/png;base64,a*"), "is not base64"),
        (url("data:image/png,hello"), "no data URL in base64"),
        (url("ftp://example.org/a.png"), "begins with `ftp:`"),
        (url("http://127.0.0.1/a.png"), "media.http"),
        (url("file:///etc/passwd"), "media.folders"),
        (json!({ "type": "image_url" }), "has no `url`"),
        (json!({ "type": "video_url", "video_url": { "url": "data:video/mp4;base64,aGk=" } }), "not supported"),
    ] {
        let refused =
            sarai.post("/v1/chat/completions", body("omni", &[text_part("x"), part.clone()], json!({}))).await;
        let shown: String = part.to_string().chars().take(120).collect();
        assert_eq!(refused.status, 400, "{shown}: {}", refused.text);
        let error = &refused.json()["error"];
        assert!(error["message"].as_str().unwrap().contains(says), "{shown}: {error}");
        assert!(error["param"].as_str().unwrap().starts_with("messages[0].content"), "{shown}: {error}");
    }
    let ollama =
        |images: Value| json!({ "model": "omni", "messages": [{ "role": "user", "content": "x", "images": images }] });
    for images in [json!(["a*"]), json!([""]), json!("aGk="), json!([7]), json!([base64(&png(1, 1, RED))])] {
        let refused = sarai.post("/api/chat", ollama(images.clone()).to_string()).await;
        assert!(refused.status == 400 && refused.text.contains("messages[0].images"), "{images}: {}", refused.text);
    }
    // The least of each is read.
    for part in [image_part(&png(2, 2, RED)), image_part(&png(400, 2, RED))] {
        assert_eq!(text(&answer(&sarai, "omni", &[part]).await), "red");
    }
    answer(&sarai, "omni", &[audio_part(&wav(300.0, 0.00007, 16_000))]).await;
    // One that has just begun: the first may have come to its end by now.
    let later = story(&sarai).await;
    let before = later.events();
    assert_eq!(text(&answer(&sarai, "omni", &[image_part(&profile_bomb())]).await), "red");
    assert!(later.events() > before, "the story stood still beside half a gigabyte");
    // A text that writes what stands for pictures elsewhere is a text.
    answer(&sarai, "omni", &[text_part("<__media__> <|image_pad|> <start_of_image>"), red]).await;
    for story in [beside_all, later] {
        let text = story.text().await;
        let count = format!("\"completion_tokens\":{STORY}");
        assert!(text.contains(&count) && text.ends_with("data: [DONE]\n\n"), "{text}");
    }
    assert_eq!(sarai.worker_pids().await, workers, "the worker is the same");
}

#[tokio::test]
async fn a_model_that_lacks_the_sense_is_never_asked() {
    let more = format!("  careful: {{ backend: gguf_native, gguf_path: {}, fallback_models: [qwen2vl] }}\n", smollm2());
    let sarai = Sarai::start(&format!("{}{more}", models("fitted", "")));
    let (red, low) = (image_part(&png(64, 64, RED)), audio_part(&wav(200.0, 0.3, 16_000)));
    for (model, part) in [("blind", &red), ("blind", &low), ("gemma3", &low), ("qwen2vl", &low)] {
        let refused = sarai.post("/v1/chat/completions", body(model, std::slice::from_ref(part), json!({}))).await;
        let error = &refused.json()["error"];
        assert_eq!(
            (refused.status, &error["param"]),
            (400, &json!("messages[0].content[0]")),
            "{model}: {}",
            refused.text
        );
    }
    let asked = sarai.post("/v1/chat/completions", body("careful", &[red], json!({}))).await;
    assert_eq!(text(&asked.json()), "red");
    assert_eq!(asked.header("x-sarai-served-by"), Some("qwen2vl@gguf_native"));
    for (model, capabilities) in [
        ("blind", json!(["completion"])),
        ("gemma3", json!(["completion", "vision"])),
        ("omni", json!(["completion", "vision", "audio"])),
    ] {
        let shown = sarai.post("/api/show", json!({ "model": model }).to_string()).await.json();
        assert_eq!(shown["capabilities"], capabilities, "{model}");
    }
    // Another sarai reads it in the list, and what is loaded.
    let list = sarai.get("/v1/models").await.json();
    let listed =
        |name: &str| list["data"].as_array().unwrap().iter().find(|model| model["id"] == name).unwrap().clone();
    for (model, senses) in [("careful", json!(["text", "image"])), ("omni", json!(["text", "image", "audio"]))] {
        assert_eq!(listed(model)["architecture"]["input_modalities"], senses, "{list}");
    }
    assert_eq!(listed("qwen2vl")["status"]["value"], "loaded", "{list}");
    assert_eq!(listed("omni")["status"]["value"], "unloaded", "{list}");
    let second = format!("models:\n  blind: {{ backend: openai_http, url: \"{}/v1\" }}\n", sarai.url);
    let second = Sarai::start(&second);
    let refused = second.post("/v1/chat/completions", body("blind", &[image_part(&png(8, 8, RED))], json!({}))).await;
    assert_eq!(refused.status, 400, "it is not asked: {}", refused.text);
}

/// What the GGUF cannot do is asked of the model that it falls back to, and only that.
#[tokio::test]
async fn a_video_and_speech_go_to_the_model_that_takes_them() {
    let host = Host::start(|_, _| {
        openai(&[json!({ "choices": [{ "delta": { "content": "a film" }, "finish_reason": "stop" }] })])
    });
    let eyes = format!(
        "models:\n  eyes: {{ backend: gguf_native, gguf_path: {}, mmproj_path: {}, context_length: 2048, fallback_models: [full] }}\n",
        file("fitted", "qwen2vl"),
        file("fitted", "mmproj-qwen2vl")
    );
    let sarai = Sarai::start(&format!("{eyes}  full: {{ backend: openai_http, url: \"{}/v1\" }}\n", host.url));
    assert_eq!(text(&answer(&sarai, "eyes", &[image_part(&png(64, 64, RED))]).await), "red");
    let film = json!({ "type": "video_url", "video_url": { "url": "data:video/mp4;base64,aGk=" } });
    let parts = [text_part("which"), film];
    let seen = sarai.post("/v1/chat/completions", body("eyes", &parts, json!({}))).await;
    assert_eq!((seen.status, text(&seen.json())), (200, "a film"), "{}", seen.text);
    assert!(seen.header("x-sarai-served-by").unwrap().starts_with("full@"));
    assert_eq!(host.asked()[0].body["messages"][0]["content"], json!(parts));
    let speech = json!({ "modalities": ["text", "audio"], "audio": { "voice": "Chelsie", "format": "wav" } });
    let spoken = sarai.post("/v1/chat/completions", body("eyes", &[text_part("which")], speech)).await;
    assert!(spoken.header("x-sarai-served-by").is_some_and(|by| by.starts_with("full@")), "{}", spoken.text);

    // A command of this machine is never told where to look, and is not started for it.
    let command = "  full: { backend: process, command: \"sleep ${PORT}\", memory_gb: 1 }\n";
    let sarai = Sarai::start(&format!("{eyes}{command}"));
    for url in ["http://127.0.0.1/film.mp4", "file:///etc/passwd", "https://example.org/film.mp4"] {
        for part in
            [json!({ "type": "video_url", "video_url": { "url": url } }), json!({ "type": "video", "video": url })]
        {
            let refused = sarai.post("/v1/chat/completions", body("eyes", &[part], json!({}))).await;
            assert_eq!(refused.status, 400, "{url}: {}", refused.text);
        }
    }
    assert!(sarai.worker_pids().await.is_empty());
}

/// A host of the client's API gets what the client sent, URLs too.
#[tokio::test]
async fn a_host_gets_pictures_as_they_were_sent() {
    let host = Host::start(|_, _| {
        openai(&[json!({ "choices": [{ "delta": { "content": "seen" }, "finish_reason": "stop" }] })])
    });
    let config = format!("models:\n  eyes: {{ backend: openai_http, url: \"{}\" }}\n", host.url);
    let sarai = Sarai::start(&config);
    let parts = [
        text_part("which"),
        json!({ "type": "image_url", "image_url": { "url": "https://example.org/a.png", "detail": "low" } }),
    ];
    let answer = sarai.post("/v1/chat/completions", body("eyes", &parts, json!({}))).await;
    assert_eq!((answer.status, text(&answer.json())), (200, "seen"), "{}", answer.text);
    assert_eq!(host.asked()[0].body["messages"][0]["content"], json!(parts));
}

/// A real Ollama is shown what clients of OpenAI's API send, in its own words; when it is gone, the worker sees.
#[tokio::test]
async fn a_real_ollama_sees_for_clients_of_both_apis_and_the_worker_when_it_is_gone() {
    let (model, projector) = (file("fitted", "qwen2vl"), file("fitted", "mmproj-qwen2vl"));
    let mut ollama = Ollama::start_from(&[&model, &projector]);
    let config = format!(
        "models:\n  eyes: {{ backend: ollama_http, fallback: gguf_native, url: \"{}\", model_name: solar, \
         gguf_path: {model}, mmproj_path: {projector}, context_length: 2048 }}\n",
        ollama.url
    );
    let sarai = Sarai::start(&config);
    let ask = || async {
        for (name, colour) in [("red", RED), ("green", GREEN), ("blue", BLUE)] {
            let image = png(84, 84, colour);
            let parts = [text_part("which"), image_part(&image)];
            let seen = sarai.post("/v1/chat/completions", body("eyes", &parts, json!({}))).await;
            assert_eq!(text(&seen.json()), name, "{}", seen.text);
            let message = json!({ "role": "user", "content": "which", "images": [base64(&image)] });
            let body =
                json!({ "model": "eyes", "messages": [message], "stream": false, "options": { "temperature": 0 } });
            let seen_too = sarai.post("/api/chat", body.to_string()).await;
            assert_eq!(seen_too.json()["message"]["content"], name, "{}", seen_too.text);
            assert_eq!(seen.header("x-sarai-served-by"), seen_too.header("x-sarai-served-by"));
        }
        sarai.post("/v1/chat/completions", body("eyes", &[image_part(&png(84, 84, RED))], json!({}))).await
    };
    assert!(ask().await.header("x-sarai-served-by").unwrap().starts_with("eyes@ollama_http"));
    // A URL goes to no Ollama, and why it is not fetched is said.
    let url = json!({ "type": "image_url", "image_url": { "url": "https://example.org/a.png" } });
    let refused = sarai.post("/v1/chat/completions", body("eyes", &[url], json!({}))).await;
    assert!(refused.status == 400 && refused.text.contains("media.http"), "{}", refused.text);
    ollama.kill();
    assert_eq!(ask().await.header("x-sarai-served-by"), Some("eyes@gguf_native"));
}

/// Ollama itself answers blind: a model without the sense gets a mark in its text.
#[tokio::test]
async fn a_model_that_lacks_the_sense_on_a_real_ollama_is_never_asked() {
    let ollama = Ollama::start();
    let sarai = Sarai::start(&format!(
        "{}  far: {{ backend: ollama_http, url: \"{}\", model_name: solar, fallback_models: [qwen2vl] }}\n  blinder: {{ backend: ollama_http, url: \"{1}\", model_name: solar }}\n",
        models("fitted", ""),
        ollama.url
    ));
    let image = png(84, 84, GREEN);
    let seen = sarai.post("/v1/chat/completions", body("far", &[image_part(&image)], json!({}))).await;
    assert_eq!((text(&seen.json()), seen.header("x-sarai-served-by")), ("green", Some("qwen2vl@gguf_native")));
    let message = json!({ "role": "user", "content": "which", "images": [base64(&image)] });
    let asked = json!({ "model": "blinder", "messages": [message], "stream": false });
    let refused = sarai.post("/api/chat", asked.to_string()).await;
    assert!(refused.status == 400 && refused.text.contains("`messages[0].images`"), "{}", refused.text);
}

#[tokio::test]
async fn pictures_in_files_are_read_where_the_configuration_allows_it() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("blue.png"), png(64, 64, BLUE)).unwrap();
    let more = format!("media: {{ folders: [{}] }}\n", folder.path().display());
    let sarai = Sarai::start(&models("fitted", &more));
    let url = |name: &str| {
        let url = format!("file://{}/{name}", folder.path().display());
        json!({ "type": "image_url", "image_url": { "url": url } })
    };
    assert_eq!(text(&answer(&sarai, "qwen2vl", &[url("blue.png")]).await), "blue");
    let refused = sarai.post("/v1/chat/completions", body("qwen2vl", &[url("../x.png")], json!({}))).await;
    assert_eq!((refused.status, refused.text.contains("media.folders")), (400, true), "{}", refused.text);
    // Below the folder, as llama.cpp's server has it.
    let below = |name: &str| json!({ "type": "image_url", "image_url": { "url": format!("file://{name}") } });
    std::fs::create_dir(folder.path().join("Some")).unwrap();
    std::fs::write(folder.path().join("Some/red.png"), png(64, 64, RED)).unwrap();
    assert_eq!(text(&answer(&sarai, "qwen2vl", &[below("Some/red.png")]).await), "red");
    for name in ["../x.png", "Some/../../x.png", "none.png", "Some"] {
        let refused = sarai.post("/v1/chat/completions", body("qwen2vl", &[below(name)], json!({}))).await;
        assert_eq!(refused.status, 400, "{name}: {}", refused.text);
    }
}

#[expect(deprecated, reason = "the newer one is unsafe, for file descriptors, which are not unshared here")]
/// A server with a public address, in a network of this thread alone: nothing of it leaves the machine.
fn public_server(picture: Vec<u8>) -> std::net::SocketAddr {
    rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).expect("a network of its own needs root");
    for ip in [&["link", "set", "lo", "up"][..], &["addr", "add", "9.9.9.9/32", "dev", "lo"]] {
        assert!(std::process::Command::new("ip").args(ip).status().unwrap().success(), "ip {ip:?}");
    }
    let listener = std::net::TcpListener::bind("9.9.9.9:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let inward = format!("http://127.0.0.1:{}/blue.png", address.port());
    let to = |url: String| axum::routing::get(async || axum::response::Redirect::temporary(&url.leak()[..]));
    let pages = axum::Router::new()
        .route("/blue.png", axum::routing::get(async || picture))
        .route("/once", to("/blue.png".into()))
        .route("/four", to("/three".into()))
        .route("/three", to("/two".into()))
        .route("/two", to("/once".into()))
        .route("/inward", to(inward))
        .route("/elsewhere", to("file:///etc/passwd".into()))
        .route("/large", axum::routing::get(async || vec![0; (1 << 20) + 1]))
        .route("/page", axum::routing::get(async || "<html>hello</html>"))
        .route("/late", axum::routing::get(async || std::future::pending::<String>().await));
    tokio::spawn(async move { axum::serve(tokio::net::TcpListener::from_std(listener).unwrap(), pages).await });
    address
}

/// Pictures that are only named are fetched where the configuration allows it, and from nowhere inside.
#[test]
fn pictures_on_the_internet_are_fetched_where_the_configuration_allows_it() {
    let in_its_network = || async {
        let address = public_server(png(64, 64, BLUE));
        let more = "media: { http: true, max_mb: 1, seconds: 2 }\n";
        let sarai = Sarai::start(&models("fitted", more));
        let named = |url: String| json!({ "type": "image_url", "image_url": { "url": url } });
        let there = |path: &str| named(format!("http://{address}/{path}"));
        for path in ["blue.png", "once", "two", "three"] {
            assert_eq!(text(&answer(&sarai, "qwen2vl", &[there(path)]).await), "blue", "{path}");
        }
        for (part, says) in [
            (there("four"), "redirected too often"),
            (there("inward"), "127.0.0.1, a private address"),
            (there("elsewhere"), "307"),
            (there("large"), "larger than 1 MiB"),
            (there("nothing"), "404"),
            (there("page"), "PNG, JPEG, GIF, WebP or BMP"),
            (there("late"), "2 s (media.seconds)"),
            (named(format!("http://127.0.0.1:{}/blue.png", address.port())), "a private address"),
            (named(format!("http://[::ffff:127.0.0.1]:{}/blue.png", address.port())), "a private address"),
            (named(format!("http://localhost:{}/blue.png", address.port())), "a private address"),
            (named("http://169.254.169.254/latest/meta-data".into()), "a private address"),
        ] {
            let refused =
                sarai.post("/v1/chat/completions", body("qwen2vl", std::slice::from_ref(&part), json!({}))).await;
            let error = &refused.json()["error"];
            let is_said = error["message"].as_str().unwrap().contains(says);
            assert!(refused.status == 400 && is_said, "{part}: {}", refused.text);
            assert_eq!(error["param"], "messages[0].content[0]", "{part}");
        }
        assert_eq!(text(&answer(&sarai, "qwen2vl", &[there("blue.png")]).await), "blue");
    };
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // A thread of its own, since the network goes with it.
    std::thread::spawn(move || runtime().block_on(in_its_network())).join().unwrap();
}

/// The largest picture, the longest sound, and a picture whose colour profile is half a gigabyte: at no moment is there more than planned.
#[tokio::test]
async fn the_largest_that_is_taken_stays_within_the_plan() {
    let sarai = Sarai::start(&models("fitted", "").replace("context_length: 2048", "context_length: 9000"));
    let largest = image::DynamicImage::from(image::RgbaImage::from_fn(4096, 3072, |x, y| {
        image::Rgba([250, (x % 7) as u8, (y % 7) as u8, 255])
    }));
    let mut file = std::io::Cursor::new(Vec::new());
    image::DynamicImage::from(largest.to_rgba16()).write_to(&mut file, ImageFormat::Png).unwrap();
    assert_eq!(text(&answer(&sarai, "omni", &[image_part(&file.into_inner())]).await), "red");
    assert_eq!(text(&answer(&sarai, "omni", &[image_part(&profile_bomb())]).await), "red");
    assert_eq!(text(&answer(&sarai, "omni", &[audio_part(&wav(6000.0, 299.0, 32_000))]).await), "high");
    let ps = sarai.ps().await;
    let worker = &ps["workers"][0];
    let status = std::fs::read_to_string(format!("/proc/{}/status", worker["pid"])).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak = 1024 * peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
    // The peak counts the binary's pages whole, which others share.
    let (planned, shared) = (worker["planned_bytes"].as_u64().unwrap(), 64 << 20);
    assert!(peak <= planned + shared, "{peak} of {planned}: {worker}");
}

/// Beside pictures, text goes on; and what was planned is not exceeded.
#[tokio::test]
async fn pictures_of_several_clients_and_text_are_answered_side_by_side_within_the_plan() {
    let sarai = Sarai::start(&models("fitted", ""));
    let colours = [("red", RED), ("green", GREEN), ("blue", BLUE)];
    let asked = (0..24_u32).map(|n| {
        let (name, colour) = colours[n as usize % 3];
        // Each of another size, so that none is known already.
        let parts = [text_part(&format!("number {n}")), image_part(&png(300 + 16 * n, 700 - 16 * n, colour))];
        let (model, _, _) = PAIRS[n as usize % 2 + 1];
        let sarai = &sarai;
        async move { assert_eq!(text(&answer(sarai, model, &parts).await), name, "{n}") }
    });
    let talking = sarai.post("/v1/chat/completions", chat("omni", "tell me more", json!({ "max_tokens": 60 })));
    let (_, talked) = tokio::join!(join_all(asked), talking);
    assert_eq!(talked.status, 200, "{}", talked.text);
    let ps = sarai.ps().await;
    for worker in ps["workers"].as_array().unwrap() {
        let (planned, held) = (&worker["planned_bytes"], &worker["anonymous_bytes"]);
        assert!(held.as_u64().unwrap() <= planned.as_u64().unwrap(), "{worker}");
    }
}

#[tokio::test]
async fn a_host_of_openais_api_that_says_what_it_senses_is_not_asked_blind() {
    let chunks =
        [json!({ "id": "x", "choices": [{ "index": 0, "delta": { "content": "red" }, "finish_reason": "stop" }] })];
    let host = Host::start(move |_, _| openai(&chunks));
    let at = |name: &str| format!("{{ backend: openai_http, url: \"{}/v1\", model_name: {name} }}", host.url);
    let sarai = Sarai::start(&format!("models:\n  reads: {}\n  silent: {}\n", at("reader"), at("m")));
    let red = image_part(&png(64, 64, RED));
    let refused = sarai.post("/v1/chat/completions", body("reads", std::slice::from_ref(&red), json!({}))).await;
    let error = &refused.json()["error"];
    assert_eq!((refused.status, &error["param"]), (400, &json!("messages[0].content[0]")), "{}", refused.text);
    assert!(host.asked().is_empty(), "{:?}", host.asked());
    assert_eq!(text(&answer(&sarai, "silent", &[red]).await), "red", "one that does not say it is believed");
}
