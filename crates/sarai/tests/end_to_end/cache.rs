//! What was computed once is not computed again: prefixes that requests share, and conversations of a worker that went.

use std::path::PathBuf;
use std::process::Command;

use crate::support::{Sarai, gemma, qwen, smollm2};
use futures_util::future::join_all;
use serde_json::{Value, json};

fn config(file: &str, parallel: u32, more: &str) -> String {
    format!(
        "memory: {{ max_ram_gb: 4{more} }}\nmodels:\n  m: {{ backend: gguf_native, gguf_path: {file}, context_length: 2048, parallel: {parallel} }}\n"
    )
}

fn words(from: usize, count: usize) -> String {
    (from..from + count)
        .map(|n| format!("item {n} is {};", ["red", "blue", "small", "old"][n % 4]))
        .collect::<Vec<_>>()
        .join(" ")
}

/// The text, and how many tokens of the prompt were and were not in the cache.
async fn complete(sarai: &Sarai, prompt: &str, tokens: u32) -> (String, u64, u64) {
    let body = json!({ "model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "seed": 1 });
    let answer = sarai.post("/v1/completions", body.to_string()).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let answer = answer.json();
    let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let computed = answer["usage"]["prompt_tokens"].as_u64().unwrap() - cached;
    (answer["choices"][0]["text"].as_str().unwrap().to_owned(), cached, computed)
}

async fn unload(sarai: &Sarai) {
    let answer = sarai.post("/api/generate", json!({ "model": "m", "keep_alive": 0 }).to_string()).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    sarai.until("no worker", |ps| ps["workers"].as_array().is_some_and(Vec::is_empty)).await;
}

/// The files of what is parked.
fn parked(sarai: &Sarai, extension: &str) -> Vec<PathBuf> {
    let folders = std::fs::read_dir(sarai.folder.path().join("state/park")).into_iter().flatten().flatten();
    let files = folders.flat_map(|folder| std::fs::read_dir(folder.path()).unwrap().flatten());
    files.map(|file| file.path()).filter(|path| path.extension().is_some_and(|it| it == extension)).collect()
}

#[tokio::test]
async fn requests_that_arrive_together_compute_a_common_beginning_once_and_answer_as_alone() {
    let sarai = Sarai::start(&config(&smollm2(), 4, ""));
    let shared = words(0, 40);
    // What follows is certain enough that the order of sums in a batch does not decide it.
    let count = |n: usize| (10 * n..10 * n + 6).map(|n| format!("{n}, ")).collect::<String>();
    let prompts: Vec<_> = (1..11).map(|n| format!("{shared} We count: {}", count(n).trim_end())).collect();
    let together = join_all(prompts.iter().map(|prompt| complete(&sarai, prompt, 10))).await;
    let computed: u64 = together.iter().map(|answer| answer.2).sum();
    let (_, cached, own) = complete(&sarai, &prompts[0], 1).await;
    let whole = cached + own;
    assert!(computed < whole + 10 * 32, "{computed} of ten times {whole}");
    let alone = Sarai::start(&config(&smollm2(), 1, ""));
    for (prompt, (text, ..)) in prompts.iter().zip(&together) {
        assert_eq!(&complete(&alone, prompt, 10).await.0, text);
    }
}

/// Clients that leave while prompts are being shared and computed, and while answers run, change nothing for those that stay.
#[tokio::test]
async fn answers_beside_clients_that_leave_are_those_given_alone() {
    let sarai = Sarai::start(&config(&smollm2(), 3, ""));
    let shared = words(0, 30);
    let count = |n: usize| (10 * n..10 * n + 6).map(|n| format!("{n}, ")).collect::<String>();
    let prompts: Vec<_> = (1..9).map(|n| format!("{shared} We count: {}", count(n).trim_end())).collect();
    let asked = prompts.iter().enumerate().map(|(n, prompt)| {
        let sarai = &sarai;
        async move {
            if n % 2 == 0 {
                return Some(complete(sarai, prompt, 10).await.0);
            }
            // It leaves before the first token, or after a few.
            let body = json!({ "model": "m", "prompt": prompt, "max_tokens": 500, "temperature": 0, "stream": true });
            let asked = sarai.client.post(format!("{}/v1/completions", sarai.url)).body(body.to_string()).send();
            let leaves_within = std::time::Duration::from_millis(150 * n as u64);
            let read = async { drop(asked.await.unwrap().bytes().await) };
            let _ = tokio::time::timeout(leaves_within, read).await;
            None
        }
    });
    let answers = join_all(asked).await;
    let alone = Sarai::start(&config(&smollm2(), 1, ""));
    for (prompt, text) in prompts.iter().zip(answers) {
        if let Some(text) = text {
            assert_eq!(complete(&alone, prompt, 10).await.0, text);
        }
    }
    sarai.until("all places are free", |ps| ps["requests"]["in_flight"] == 0).await;
    for prompt in &prompts[..4] {
        assert_eq!(
            complete(&sarai, prompt, 10).await.0,
            complete(&alone, prompt, 10).await.0,
            "what they left in the cache is right"
        );
    }
}

#[tokio::test]
async fn more_conversations_than_places_go_on_without_computing_their_past_again() {
    let sarai = Sarai::start(&config(&smollm2(), 2, ""));
    let mut prompts: Vec<_> = (0..6).map(|n| format!("{} {}", ["Alpha", "Beta"][n % 2], words(1000 * n, 20))).collect();
    for prompt in &mut prompts {
        let (text, ..) = complete(&sarai, prompt, 8).await;
        *prompt += &text;
    }
    for prompt in &prompts {
        let (_, cached, computed) = complete(&sarai, &format!("{prompt} and"), 4).await;
        // Where the answer's tokens are not those that its text is made of, they are computed again.
        assert!(computed <= 12 && cached > 100, "{computed} computed, {cached} cached");
    }
}

#[tokio::test]
async fn a_conversation_of_a_worker_that_went_comes_back_from_disk_and_goes_on_as_if_it_had_stayed() {
    for (file, parallel) in [(smollm2(), 2), (gemma(), 1), (qwen(), 1)] {
        let sarai = Sarai::start(&config(&file, parallel, ""));
        let stays = Sarai::start(&config(&file, 1, ", park_mb: 0"));
        let first = words(0, 40);
        let (text, ..) = complete(&sarai, &first, 8).await;
        assert_eq!(complete(&stays, &first, 8).await.0, text);
        unload(&sarai).await;
        assert_eq!((parked(&sarai, "kv").len(), parked(&sarai, "json").len()), (1, 1), "{file}");
        let next = format!("{first}{text} and after that");
        let (text, cached, computed) = complete(&sarai, &next, 12).await;
        assert!(computed < 20, "{file}: {computed} computed, {cached} cached");
        assert_eq!(complete(&stays, &next, 12).await.0, text, "{file}");
        assert_eq!(parked(&sarai, "kv").len(), 0, "what came back is not parked any more");
        unload(&stays).await;
        assert!(parked(&stays, "kv").is_empty(), "park_mb: 0");
    }
}

/// A worker that is ended with its server parks what it has, and is given the time for it.
#[tokio::test]
async fn conversations_are_there_again_when_the_server_was_stopped_and_is_started_again() {
    let state = tempfile::tempdir().unwrap();
    let variables = [("SARAI_STATE_DIR", state.path().to_str().unwrap())];
    let start = || Sarai::start_with_env(&config(&smollm2(), 2, ""), &variables);
    let (first, second) = (words(0, 40), words(1000, 40));
    let sarai = start();
    for prompt in [&first, &second] {
        complete(&sarai, prompt, 8).await;
    }
    drop(sarai);
    let sarai = start();
    for prompt in [first, second] {
        let (_, cached, computed) = complete(&sarai, &prompt, 1).await;
        assert!(computed == 1 && cached > 200, "{computed} computed, {cached} cached");
    }
}

/// A disk of its own, which is given back.
struct Disk(tempfile::TempDir);

impl Disk {
    fn of(size: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
            .arg(folder.path())
            .status();
        assert!(mount.unwrap().success(), "a disk of its own needs root");
        Self(folder)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn what_a_full_disk_has_no_room_for_is_computed_again() {
    let disk = Disk::of("4m");
    let sarai =
        Sarai::start_with_env(&config(&smollm2(), 1, ""), &[("SARAI_STATE_DIR", disk.0.path().to_str().unwrap())]);
    let prompt = words(0, 60);
    let (text, ..) = complete(&sarai, &prompt, 8).await;
    for _ in 0..2 {
        unload(&sarai).await;
        let (again, cached, _) = complete(&sarai, &prompt, 8).await;
        assert_eq!((again, cached), (text.clone(), 0), "nothing was kept of it");
    }
    // A short one has room, since nothing is left of the long one.
    let short = words(0, 16);
    let (text, ..) = complete(&sarai, &short, 4).await;
    unload(&sarai).await;
    let (again, cached, _) = complete(&sarai, &short, 4).await;
    assert!(again == text && cached > 50, "{cached} cached");
}

#[tokio::test]
async fn all_conversations_of_a_worker_that_went_come_back_also_those_beyond_its_places() {
    let sarai = Sarai::start(&config(&smollm2(), 1, ""));
    let prompts: Vec<_> = (0..3).map(|n| words(1000 * n, 40)).collect();
    for prompt in &prompts {
        complete(&sarai, prompt, 4).await;
    }
    for _ in 0..2 {
        unload(&sarai).await;
        assert_eq!(parked(&sarai, "kv").len(), 3);
        for prompt in &prompts {
            let (_, cached, computed) = complete(&sarai, prompt, 4).await;
            assert!(computed == 1 && cached > 200, "{computed} computed, {cached} cached");
        }
    }
}

#[tokio::test]
async fn a_context_that_grows_leaves_what_is_parked() {
    let sarai = Sarai::start(&config(&smollm2(), 1, ""));
    let prompt = words(0, 40);
    complete(&sarai, &prompt, 4).await;
    unload(&sarai).await;
    let body =
        json!({ "model": "m", "prompt": "Hello", "stream": false, "options": { "num_ctx": 4096, "num_predict": 1 } });
    assert_eq!(sarai.post("/api/generate", body.to_string()).await.status, 200);
    let (_, cached, computed) = complete(&sarai, &prompt, 4).await;
    assert!(computed == 1 && cached > 200, "{computed} computed, {cached} cached");
}

/// A cell behind a sliding window that two sequences held could not be taken back.
#[tokio::test]
async fn requests_with_a_common_beginning_longer_than_the_sliding_window_are_all_answered() {
    let sarai = Sarai::start(&config(&gemma(), 2, ""));
    let shared = words(0, 190);
    let prompts = [format!("{shared} and one"), format!("{shared} and two"), format!("{shared} and three")];
    let together = join_all(prompts.iter().map(|prompt| complete(&sarai, prompt, 40))).await;
    assert!(together.iter().all(|answer| answer.1 + answer.2 > 1300), "{together:?}");
}

#[tokio::test]
async fn what_is_damaged_or_of_something_else_is_computed_again_and_goes() {
    let sarai = Sarai::start(&config(&smollm2(), 1, ""));
    let prompt = words(0, 30);
    let (text, _, whole) = complete(&sarai, &prompt, 8).await;
    let damages: [fn(&Sarai); 4] = [
        |sarai| {
            let state = &parked(sarai, "kv")[0];
            let mut bytes = std::fs::read(state).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(state, bytes).unwrap();
        },
        |sarai| std::fs::write(&parked(sarai, "kv")[0], "short").unwrap(),
        |sarai| {
            let note = &parked(sarai, "json")[0];
            let mut text: Value = serde_json::from_slice(&std::fs::read(note).unwrap()).unwrap();
            text["key"] = "another file".into();
            std::fs::write(note, text.to_string()).unwrap();
        },
        |sarai| std::fs::write(&parked(sarai, "json")[0], "{ no json").unwrap(),
    ];
    for damage in damages {
        unload(&sarai).await;
        damage(&sarai);
        let (again, cached, computed) = complete(&sarai, &prompt, 8).await;
        assert_eq!((again.as_str(), cached, computed), (text.as_str(), 0, whole));
        assert!(parked(&sarai, "kv").is_empty() && parked(&sarai, "json").is_empty());
    }
}

/// What a worker wrote with other settings, or before its file was changed, is not what this one would compute.
#[tokio::test]
async fn what_was_parked_with_other_settings_or_before_its_file_changed_goes_with_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    std::fs::copy(smollm2(), &file).unwrap();
    let (state, log) = (folder.path().join("state"), folder.path().join("log"));
    let start = |more: &str| {
        let config = format!(
            "models:\n  m: {{ backend: gguf_native, gguf_path: {}, context_length: 1024{more} }}\n",
            file.display()
        );
        let said = std::fs::File::create(&log).unwrap();
        Sarai::launch(&[], &config, said.into(), &[("SARAI_STATE_DIR", state.to_str().unwrap())])
    };
    let prompt = words(0, 30);
    let park = async |more: &str| {
        let sarai = start(more);
        complete(&sarai, &prompt, 4).await;
        unload(&sarai).await;
    };
    let cached = async |more: &str| complete(&start(more), &prompt, 4).await.1;
    park("").await;
    assert!(cached("").await > 100, "as it was, it comes back");
    let own = ", deterministic: true, parallel: 3";
    for (before, after) in
        [("", ", kv_type: q8_0"), (", flash_attention: false", ""), (own, ", deterministic: true, parallel: 2")]
    {
        park(before).await;
        assert_eq!(cached(after).await, 0, "{before} and then {after}");
        let said = std::fs::read_to_string(&log).unwrap();
        assert!(said.contains("is not of this file, version and settings") && said.contains("WARN"), "{said}");
    }
    park("").await;
    assert!(std::process::Command::new("touch").arg(&file).status().unwrap().success());
    assert_eq!(cached("").await, 0, "the file was changed");
}

#[tokio::test]
async fn what_is_parked_stays_within_its_room_on_disk() {
    let sarai = Sarai::start(&config(&smollm2(), 1, ", park_mb: 8"));
    for round in 0..3 {
        for n in 0..3 {
            complete(&sarai, &words(1000 * (3 * round + n), 25), 1).await;
        }
        unload(&sarai).await;
        let bytes: u64 = parked(&sarai, "kv").iter().map(|path| path.metadata().unwrap().len()).sum();
        assert!(bytes > 3 << 20 && bytes <= 8 << 20, "{bytes} bytes");
    }
    // One that is larger than all of the room is not parked, and its user is told what it would take.
    let log = sarai.folder.path().join("log");
    let small = config(&smollm2(), 1, ", park_mb: 1");
    let other = Sarai::start_with(&small, std::fs::File::create(&log).unwrap().into());
    complete(&other, &words(0, 60), 1).await;
    unload(&other).await;
    let said = std::fs::read_to_string(&log).unwrap();
    assert!(said.contains("is not parked: it takes") && said.contains("`park_mb` is 1"), "{said}");
    assert!(parked(&other, "kv").is_empty());
    drop(other);
    // What was said to a model that has not been configured for a day goes.
    let state = sarai.folder.path().join("state");
    let start = || Sarai::start_with_env(&config(&qwen(), 1, ""), &[("SARAI_STATE_DIR", state.to_str().unwrap())]);
    drop(start());
    let folder = parked(&sarai, "kv")[0].parent().unwrap().to_owned();
    let touched = std::process::Command::new("touch").args(["-d", "25 hours ago"]).arg(folder).status().unwrap();
    assert!(touched.success());
    let other = start();
    other.until("nothing is parked", |_| parked(&sarai, "kv").is_empty()).await;
}

/// With a sliding window, each has a place of its own; what all prompts begin with is no reason to give one up.
#[tokio::test]
async fn two_conversations_by_turns_are_both_gone_on_with() {
    let sarai = Sarai::start(&config(&gemma(), 2, ""));
    let begin = "A list. ";
    let mut told = [10, 500].map(|from| format!("{begin}{}", words(from, 12)));
    for turn in 0..3 {
        for one in &mut told {
            let (text, cached, computed) = complete(&sarai, one, 6).await;
            assert!(turn == 0 || cached > 3 * computed, "{turn}: {cached} cached, {computed} computed");
            *one = format!("{one}{text} more;");
        }
    }
}
