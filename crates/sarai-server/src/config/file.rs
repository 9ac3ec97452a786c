//! The configuration as written: every key that exists, with its range, and nothing decided yet.

use std::collections::BTreeMap;
use std::time::Duration;

use saphyr::{LoadableYamlNode, MarkedYamlOwned};
use sarai_core::{KvType, Sampling};
use sarai_plan::Strategy;

use super::hosts::{self, WrittenHost};
use super::model::{ModelRole, Resume};
use super::process::{self, WrittenProcess};
use super::tree::Section;
use super::{Environment, Mistake};

/// The whole file.
#[derive(Default)]
pub struct File {
    pub listen: Option<(String, usize)>,
    pub max_in_flight: Option<u32>,
    pub max_queued: Option<u32>,
    pub max_body_mb: Option<u32>,
    pub queue: Option<Duration>,
    pub drain: Option<Duration>,
    pub stall: Option<Duration>,
    pub heartbeat: Option<Duration>,
    pub state_dir: Option<String>,
    pub api_keys: Vec<String>,
    pub cors_origins: Vec<String>,
    pub max_ram_gb: Option<f64>,
    pub max_concurrent_llms: Option<u32>,
    pub strategy: Option<Strategy>,
    pub park_mb: Option<u32>,
    pub media_http: bool,
    pub media_folders: Vec<String>,
    pub media_mb: Option<u32>,
    pub media_limit: Option<Duration>,
    pub models: Vec<WrittenModel>,
}

/// Where a model is served first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    OllamaHttp,
    OpenAiHttp,
    GgufNative,
    Process,
    Builtin,
}

impl Backend {
    /// Whether it is another machine's.
    pub fn is_remote(self) -> bool {
        matches!(self, Self::OllamaHttp | Self::OpenAiHttp)
    }
}

/// One entry under `models:`.
pub struct WrittenModel {
    pub name: String,
    pub lines: BTreeMap<&'static str, usize>,
    pub line: usize,
    pub backend: Option<Backend>,
    pub fallback: Option<Backend>,
    pub hosts: Vec<WrittenHost>,
    pub hosts_file: Option<String>,
    pub dns: bool,
    pub managed_lb: bool,
    pub wan: bool,
    pub model_name: Option<String>,
    pub gguf_path: Option<String>,
    pub mmproj_path: Option<String>,
    pub draft_path: Option<String>,
    pub role: Option<ModelRole>,
    pub aliases: Vec<String>,
    pub context_length: Option<u32>,
    pub parallel: Option<u32>,
    pub shared_context: Option<bool>,
    pub threads: Option<u32>,
    pub ubatch: Option<u32>,
    pub draft_tokens: Option<u32>,
    pub kv: Option<KvType>,
    pub flash_attention: Option<bool>,
    pub repack: Option<bool>,
    pub deterministic: Option<bool>,
    pub keep_alive: Option<String>,
    pub pinned: bool,
    pub resident: bool,
    pub sampling: Sampling,
    pub connect: Option<Duration>,
    pub model_queue: Option<Duration>,
    pub load: Option<Duration>,
    pub first_token: Option<Duration>,
    pub gap: Option<Duration>,
    pub request: Option<Duration>,
    pub api_key: Option<String>,
    pub max_outstanding: Option<u32>,
    pub fallback_models: Vec<String>,
    pub resume: Option<Resume>,
    pub process: WrittenProcess,
}

impl WrittenModel {
    /// The line of a key, or of the model where the key is not written.
    pub fn line_of(&self, key: &str) -> usize {
        self.lines.get(key).copied().unwrap_or(self.line)
    }
}

/// Reads the text; `None` only if it is no YAML mapping at all.
pub fn read(text: &str, environment: &Environment, mistakes: &mut Vec<Mistake>) -> Option<File> {
    let documents = match MarkedYamlOwned::load_from_str(text) {
        Ok(documents) => documents,
        Err(error) => {
            let message = format!("is not YAML: {}", error.info());
            mistakes.push(Mistake { line: Some(error.marker().line()), key: "file".into(), message });
            return None;
        }
    };
    let Some(root) = documents.first() else {
        mistakes.push(Mistake {
            line: None,
            key: "models".into(),
            message: "the file is empty: name at least one model".into(),
        });
        return None;
    };
    let mut top = Section::of("", root, mistakes);
    let mut file = File::default();
    if let Some(server) = top.section("server", mistakes) {
        read_server(&mut file, server, environment, mistakes);
    }
    if let Some(memory) = top.section("memory", mistakes) {
        read_memory(&mut file, memory, mistakes);
    }
    if let Some(media) = top.section("media", mistakes) {
        read_media(&mut file, media, environment, mistakes);
    }
    match top.section("models", mistakes) {
        None => mistakes.push(top.mistake("models", "is missing: name at least one model below `models:`")),
        Some(models) => {
            for (name, line, node) in models.entries() {
                let section = Section::of(&format!("models.{name}"), node, mistakes);
                file.models.push(read_model(name, line, section, environment, mistakes));
            }
        }
    }
    top.finish(mistakes);
    Some(file)
}

fn read_server(file: &mut File, mut server: Section<'_>, environment: &Environment, mistakes: &mut Vec<Mistake>) {
    file.listen = server.text("listen", mistakes).map(|listen| (listen, server.line_of("listen")));
    file.max_in_flight = server.count("max_in_flight", 1, 10_000, mistakes);
    file.max_queued = server.count("max_queued", 0, 100_000, mistakes);
    file.max_body_mb = server.count("max_body_mb", 1, 128, mistakes);
    file.queue = server.seconds("queue_seconds", mistakes);
    file.drain = server.seconds("drain_seconds", mistakes);
    file.stall = server.seconds("stall_seconds", mistakes);
    file.heartbeat = server.seconds("heartbeat_seconds", mistakes);
    file.state_dir = server.text("state_dir", mistakes).map(|path| environment.expand(&path));
    file.api_keys = server.texts("api_keys", mistakes).iter().map(|key| environment.expand(key)).collect();
    file.cors_origins = server.texts("cors_origins", mistakes);
    server.finish(mistakes);
}

fn read_memory(file: &mut File, mut memory: Section<'_>, mistakes: &mut Vec<Mistake>) {
    file.max_ram_gb = memory.number("max_ram_gb", 0.05, 100_000.0, mistakes);
    file.max_concurrent_llms = memory.count("max_concurrent_llms", 1, 1000, mistakes);
    let strategies = [("hybrid_http_gguf", Strategy::HybridHttpGguf), ("evict_lru", Strategy::EvictLru)];
    file.strategy = memory.word("strategy", &strategies, mistakes);
    file.park_mb = memory.count("park_mb", 0, 1_000_000, mistakes);
    memory.finish(mistakes);
}

fn read_media(file: &mut File, mut media: Section<'_>, environment: &Environment, mistakes: &mut Vec<Mistake>) {
    file.media_http = media.flag("http", mistakes).unwrap_or(false);
    file.media_folders = media.texts("folders", mistakes).iter().map(|path| environment.expand(path)).collect();
    file.media_mb = media.count("max_mb", 1, 1024, mistakes);
    file.media_limit = media.seconds("seconds", mistakes);
    media.finish(mistakes);
}

fn read_model(
    name: &str,
    line: usize,
    mut model: Section<'_>,
    environment: &Environment,
    mistakes: &mut Vec<Mistake>,
) -> WrittenModel {
    let local = ("gguf_native", Backend::GgufNative);
    let remote = ("ollama_http", Backend::OllamaHttp);
    let openai = ("openai_http", Backend::OpenAiHttp);
    let process = ("process", Backend::Process);
    let roles = [("chat", ModelRole::Chat), ("embedding", ModelRole::Embedding), ("router", ModelRole::Router)];
    let backend = model.word("backend", &[remote, openai, local, process, ("builtin", Backend::Builtin)], mistakes);
    if model.written_at("backend").is_none() {
        mistakes
            .push(model.mistake("backend", "is missing: use `ollama_http`, `openai_http`, `gguf_native` or `process`"));
    }
    let keys = [
        "url",
        "urls",
        "hosts_file",
        "dns",
        "managed_lb",
        "max_outstanding",
        "aliases",
        "gguf_path",
        "kv_type",
        "deterministic",
        "keep_alive",
        "fallback_models",
        "command",
        "memory_gb",
        "ready_path",
    ]
    .into_iter();
    let lines = keys.filter_map(|key| Some((key, model.written_at(key)?))).collect();
    let fallback = model.word("fallback", &[local, remote, openai, process], mistakes);
    let hosts = hosts::read(&mut model, environment, mistakes);
    let mut written = WrittenModel {
        name: name.to_owned(),
        lines,
        line,
        backend,
        fallback,
        hosts,
        hosts_file: model.text("hosts_file", mistakes).map(|path| environment.expand(&path)),
        dns: model.flag("dns", mistakes).unwrap_or(false),
        managed_lb: model.flag("managed_lb", mistakes).unwrap_or(false),
        wan: model.flag("wan", mistakes).unwrap_or(false),
        model_name: model.text("model_name", mistakes),
        gguf_path: model.text("gguf_path", mistakes).map(|path| environment.expand(&path)),
        mmproj_path: model.text("mmproj_path", mistakes).map(|path| environment.expand(&path)),
        draft_path: model.text("draft_path", mistakes).map(|path| environment.expand(&path)),
        role: model.word("role", &roles, mistakes),
        aliases: model.texts("aliases", mistakes),
        context_length: model.count("context_length", 16, 16_777_216, mistakes),
        parallel: model.count("parallel", 1, 64, mistakes),
        shared_context: model.flag("shared_context", mistakes),
        threads: model.count("threads", 1, 1024, mistakes),
        ubatch: model.count("ubatch", 1, 8192, mistakes),
        draft_tokens: model.count("draft_tokens", 0, 32, mistakes),
        kv: model.word("kv_type", &KvType::ALL.map(|kv| (kv.name(), kv)), mistakes),
        flash_attention: model.flag("flash_attention", mistakes),
        repack: model.flag("repack", mistakes),
        deterministic: model.flag("deterministic", mistakes),
        keep_alive: model.text("keep_alive", mistakes),
        pinned: model.flag("pinned", mistakes).unwrap_or(false),
        resident: model.flag("resident", mistakes).unwrap_or(false),
        sampling: model
            .section("sampling", mistakes)
            .map(|section| read_sampling(section, mistakes))
            .unwrap_or_default(),
        connect: None,
        model_queue: None,
        load: None,
        first_token: None,
        gap: None,
        request: None,
        api_key: model.text("api_key", mistakes).map(|key| environment.expand(&key)),
        max_outstanding: model.count("max_outstanding", 1, 10_000, mistakes),
        fallback_models: model.texts("fallback_models", mistakes),
        resume: model.word("resume", &Resume::ALL.map(|resume| (resume.name(), resume)), mistakes),
        process: process::read(&mut model, environment, mistakes),
    };
    if let Some(mut deadlines) = model.section("deadlines", mistakes) {
        written.connect = deadlines.seconds("connect_seconds", mistakes);
        written.model_queue = deadlines.seconds("queue_seconds", mistakes);
        written.load = deadlines.seconds("load_seconds", mistakes);
        written.first_token = deadlines.seconds("first_token_seconds", mistakes);
        written.gap = deadlines.seconds("gap_seconds", mistakes);
        written.request = deadlines.seconds("request_seconds", mistakes);
        deadlines.finish(mistakes);
    }
    model.finish(mistakes);
    written
}

#[expect(clippy::cast_possible_truncation, reason = "sampling parameters are f32 in the engine")]
fn read_sampling(mut section: Section<'_>, mistakes: &mut Vec<Mistake>) -> Sampling {
    let sampling = Sampling {
        temperature: section.number("temperature", 0.0, 100.0, mistakes).map(|n| n as f32),
        top_p: section.number("top_p", 0.0, 1.0, mistakes).map(|n| n as f32),
        top_k: section.int("top_k", 0, i64::from(i32::MAX), mistakes).and_then(|n| i32::try_from(n).ok()),
        min_p: section.number("min_p", 0.0, 1.0, mistakes).map(|n| n as f32),
        typical_p: section.number("typical_p", 0.0, 1.0, mistakes).map(|n| n as f32),
        seed: section.count("seed", 0, u32::MAX - 1, mistakes),
        repeat_penalty: section.number("repeat_penalty", 0.01, 100.0, mistakes).map(|n| n as f32),
        repeat_last_n: section
            .int("repeat_last_n", -1, i64::from(i32::MAX), mistakes)
            .and_then(|n| i32::try_from(n).ok()),
        presence_penalty: section.number("presence_penalty", -2.0, 2.0, mistakes).map(|n| n as f32),
        frequency_penalty: section.number("frequency_penalty", -2.0, 2.0, mistakes).map(|n| n as f32),
        ..Sampling::default()
    };
    section.finish(mistakes);
    sampling
}
