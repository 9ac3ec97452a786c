//! What may take its time, beside what somebody waits for.

use crate::support::{Answer, Reading, Sarai, chat, smollm2};
use serde_json::json;

#[tokio::test]
async fn bulk_gives_way_within_a_model_and_beside_another_and_comes_to_its_end() {
    let copy = tempfile::tempdir().unwrap();
    // Another file, so that it is another worker.
    let other = copy.path().join("other.gguf");
    std::fs::copy(smollm2(), &other).unwrap();
    let model = |name: &str, file: &str| {
        format!("  {name}: {{ backend: gguf_native, gguf_path: {file}, context_length: 1024, parallel: 2 }}\n")
    };
    let sarai = Sarai::start(&format!(
        "memory: {{ max_concurrent_llms: 2 }}\nmodels:\n{}{}",
        model("one", &smollm2()),
        model("two", &other.display().to_string())
    ));
    for model in ["one", "two"] {
        assert_eq!(sarai.post("/v1/chat/completions", chat(model, "Hi", json!({ "max_tokens": 1 }))).await.status, 200);
    }
    let story = |model: &str, tokens: u32| {
        chat(model, "A story.", json!({ "stream": true, "max_tokens": tokens, "ignore_eos": true }))
    };
    let begin = async |lane: &str, body: String| {
        let request = sarai.client.post(format!("{}/v1/chat/completions", sarai.url)).header("x-sarai-lane", lane);
        Reading::begin(request.body(body)).await
    };
    for (bulk, other) in [("one", "one"), ("one", "two")] {
        let bulk_story = begin("bulk", story(bulk, 200)).await;
        let awaited = begin("interactive", story(other, 80)).await;
        let before = bulk_story.events();
        let text = awaited.text().await;
        let (beside, of) = (bulk_story.events() - before, text.matches("data: {").count());
        assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
        assert!(beside > 0, "{bulk} beside {other}: bulk stood still");
        assert!(beside * 2 < of, "{bulk} beside {other}: bulk had {beside} of {of}");
        let text = bulk_story.text().await;
        assert!(text.contains("\"finish_reason\":\"length\"") && text.ends_with("data: [DONE]\n\n"), "{text}");
    }
    let flex = chat("one", "Hi", json!({ "max_tokens": 2, "service_tier": "flex" }));
    assert_eq!(sarai.post("/v1/chat/completions", flex).await.status, 200);
    let wrong = sarai.client.post(format!("{}/api/chat", sarai.url)).header("x-sarai-lane", "slow");
    let wrong = Answer::of(wrong.body(chat("one", "Hi", json!({}))).send().await.unwrap()).await;
    assert!(
        wrong.status == 400 && wrong.text.contains("x-sarai-lane is `slow`: use bulk or interactive"),
        "{}",
        wrong.text
    );
}
