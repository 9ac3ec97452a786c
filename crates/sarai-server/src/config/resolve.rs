//! The configuration as meant: every default filled in, the environment applied, engines shared by file.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sarai_api::ollama::keep_alive;
use sarai_core::frame::Park;
use sarai_core::{Api, Bytes, Deadlines, KeepAlive, KvType};
use sarai_plan::estimate::DRAFT_TOKENS;
use sarai_plan::ledger::EngineId;
use sarai_plan::{Companions, Repack, Settings, Strategy};

use super::Mistake;
use super::access::Access;
use super::engine::{Engine, folder_name};
use super::env::{Environment, variable_name};
use super::file::{Backend, File, WrittenModel};
use super::hosts::{self, WrittenHost};
use super::model::{Deployment, Model, ModelRole, Remote};
use crate::machine::cores::Cores;

/// Where Ollama listens unless told otherwise.
const DEFAULT_OLLAMA_URL: &str = "http://127.0.0.1:11434";

/// A server without a GPU answers two at a time best.
const DEFAULT_OUTSTANDING: usize = 2;

/// llama.cpp computes so many sequences of a file at most.
const MOST_SEQUENCES: u32 = 256;
/// Some pictures must be computed in one step, beside an answer of every other sequence: those of Gemma 3 are 256 tokens.
const PICTURE_STEP: u32 = 320;

/// The whole configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The server itself.
    pub server: ServerConfig,
    /// Memory and models at once.
    pub memory: MemoryConfig,
    /// Pictures that are only named.
    pub media: MediaConfig,
    /// Public models, in the order of the file.
    pub models: Vec<Model>,
    /// One per GGUF file, by [`EngineId`].
    pub engines: Vec<Engine>,
    /// Files of hosts that it was read from.
    pub host_files: Vec<PathBuf>,
}

/// Limits of the server.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerConfig {
    /// Address of both APIs.
    pub listen: SocketAddr,
    /// Requests that are answered at the same time.
    pub max_in_flight: usize,
    /// Requests that wait beyond that; further ones are shed.
    pub max_queued: usize,
    /// The largest body in bytes.
    pub max_body_bytes: usize,
    /// How long a request waits for a permit.
    pub queue: Duration,
    /// How long running answers may go on after SIGTERM.
    pub drain: Duration,
    /// How long a client may leave its answer unread.
    pub stall: Duration,
    /// How often a client is told of a load that its stream waits for, and how long it waits before that.
    pub heartbeat: Duration,
    /// Where what was learned is kept.
    pub state_dir: PathBuf,
    /// Who may ask.
    pub access: Access,
}

/// Limits of memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryConfig {
    /// `max_ram_gb`.
    pub max_ram: Bytes,
    /// Local LLMs resident at the same time.
    pub max_concurrent_llms: usize,
    /// When idle models are unloaded.
    pub strategy: Strategy,
}

/// What is fetched of pictures that a request only names.
#[derive(Clone, Debug, PartialEq)]
pub struct MediaConfig {
    /// Whether servers on the internet are asked.
    pub http: bool,
    /// Files below these are read.
    pub folders: Vec<PathBuf>,
    /// All that is fetched for one request.
    pub max_bytes: usize,
    /// How long that may take.
    pub limit: Duration,
}

/// Decides everything that the file leaves open.
pub fn resolve(file: File, folder: &Path, environment: &Environment, mistakes: &mut Vec<Mistake>) -> Config {
    let (listen, line) = file.listen.unwrap_or(("127.0.0.1:11435".into(), 0));
    let listen = listen.parse().unwrap_or_else(|_| {
        let message = format!("`{listen}` is not an address: use one such as 127.0.0.1:11435");
        mistakes.push(Mistake { line: Some(line), key: "server.listen".into(), message });
        SocketAddr::from(([127, 0, 0, 1], 11435))
    });
    if let Some(url) = environment.get("OLLAMA_BASE_URL").filter(|url| !is_url(url)) {
        let message = format!("`{url}` is not a URL: use one such as {DEFAULT_OLLAMA_URL}, or unset the variable");
        mistakes.push(Mistake { line: None, key: "OLLAMA_BASE_URL".into(), message });
    }
    if let Some(error) = environment.broken() {
        let message = format!("cannot be read ({error}): write NAME=value lines");
        mistakes.push(Mistake { line: None, key: ".env".into(), message });
    }
    let or = |value: Option<u32>, default: usize| value.map_or(default, |value| value as usize);
    let server = ServerConfig {
        listen,
        max_in_flight: or(file.max_in_flight, 32),
        max_queued: or(file.max_queued, 256),
        max_body_bytes: or(file.max_body_mb, 32) << 20,
        queue: file.queue.unwrap_or(Duration::from_secs(300)),
        drain: file.drain.unwrap_or(Duration::from_secs(15)),
        stall: file.stall.unwrap_or(Duration::from_secs(60)),
        // More often, nobody needs to hear of it.
        heartbeat: file.heartbeat.unwrap_or(Duration::from_secs(10)).max(Duration::from_millis(50)),
        state_dir: state_dir(environment, file.state_dir, folder),
        access: Access { keys: file.api_keys, origins: file.cors_origins },
    };
    if server.access.keys.iter().any(|key| key.trim().is_empty()) {
        let message = "has an empty key: fill it in, or leave it out";
        mistakes.push(Mistake { line: None, key: "server.api_keys".into(), message: message.into() });
    }
    let max_concurrent_llms = env_number(environment, "MAX_CONCURRENT_LLMS", mistakes);
    let memory = MemoryConfig {
        max_ram: Bytes::gib(file.max_ram_gb.unwrap_or(12.0)),
        max_concurrent_llms: max_concurrent_llms.unwrap_or_else(|| or(file.max_concurrent_llms, 2)),
        strategy: file.strategy.unwrap_or_default(),
    };
    let media = MediaConfig {
        http: file.media_http,
        folders: file.media_folders.iter().map(|path| folder.join(path)).collect(),
        max_bytes: or(file.media_mb, 20) << 20,
        limit: file.media_limit.unwrap_or(Duration::from_secs(10)),
    };
    let files = file.models.iter().filter_map(|model| model.hosts_file.as_ref());
    let host_files = files.map(|path| folder.join(path)).collect();
    let mut config = Config { server, memory, media, models: Vec::new(), engines: Vec::new(), host_files };
    check_names(&file.models, mistakes);
    check_fallbacks(&file.models, mistakes);
    for written in &file.models {
        let model = Resolver { written, folder, environment }.model(&mut config.engines, mistakes);
        config.models.push(model);
    }
    let most_bytes = Bytes::mib(u64::from(file.park_mb.unwrap_or(256)));
    let parks = config.server.state_dir.join("park");
    for engine in config.engines.iter_mut().filter(|engine| engine.process.is_none() && most_bytes > Bytes::ZERO) {
        let folder = parks.join(folder_name(&engine.path, engine.with(), engine.settings.deterministic));
        engine.park = Some(Park { folder, most_bytes });
    }
    config
}

/// What repacking does on this CPU.
pub fn machine_repack() -> Repack {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        return Repack::Wide;
    }
    Repack::Narrow
}

/// Cores that this process may use.
pub fn machine_threads() -> u32 {
    u32::try_from(Cores::now().whole).unwrap_or(1)
}

/// `SARAI_STATE_DIR`, the file's, or what the XDG base directories say.
fn state_dir(environment: &Environment, written: Option<String>, folder: &Path) -> PathBuf {
    if let Some(path) = environment.get("SARAI_STATE_DIR") {
        return PathBuf::from(path);
    }
    let standard = || environment.expand("${XDG_STATE_HOME:-~/.local/state}/sarai").into();
    written.map_or_else(standard, |path| folder.join(path))
}

/// Whether a text is the address of a host.
pub fn is_url(text: &str) -> bool {
    let http = text.starts_with("http://") || text.starts_with("https://");
    http && reqwest::Url::parse(text).is_ok()
}

fn env_number(environment: &Environment, name: &str, mistakes: &mut Vec<Mistake>) -> Option<usize> {
    let text = environment.get(name)?;
    let number = text.parse().ok().filter(|&n| n >= 1);
    if number.is_none() {
        let message = format!("`{text}` is not a whole number from 1: correct or unset the variable");
        mistakes.push(Mistake { line: None, key: name.into(), message });
    }
    number
}

fn env_flag(environment: &Environment, name: &str, mistakes: &mut Vec<Mistake>) -> Option<bool> {
    let text = environment.get(name)?;
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Some(true),
        "0" | "false" | "no" | "off" => Some(false),
        _ => {
            let message = format!("`{text}` is not true or false: correct or unset the variable");
            mistakes.push(Mistake { line: None, key: name.into(), message });
            None
        }
    }
}

fn check_names(models: &[WrittenModel], mistakes: &mut Vec<Mistake>) {
    let mut seen: HashMap<&str, &str> = HashMap::new();
    for model in models {
        let aliases = model.aliases.iter().map(|alias| (alias, ".aliases", model.line_of("aliases")));
        for (name, key, line) in [(&model.name, "", model.line)].into_iter().chain(aliases) {
            if let Some(other) = seen.insert(name, &model.name) {
                let message = format!("the name `{name}` belongs to `{other}` already: choose another");
                mistakes.push(Mistake { line: Some(line), key: format!("models.{}{key}", model.name), message });
            }
        }
    }
    if models.is_empty() {
        mistakes.push(Mistake {
            line: None,
            key: "models".into(),
            message: "no model is named: add one below `models:`".into(),
        });
    }
}

fn check_fallbacks(models: &[WrittenModel], mistakes: &mut Vec<Mistake>) {
    for model in models {
        for name in &model.fallback_models {
            let found = models.iter().any(|other| other.name == *name && other.name != model.name);
            if !found {
                let message = format!("`{name}` is no other model of this file: name one below `models:`");
                let key = format!("models.{}.fallback_models", model.name);
                mistakes.push(Mistake { line: Some(model.line_of("fallback_models")), key, message });
            }
        }
    }
}

struct Resolver<'a> {
    written: &'a WrittenModel,
    folder: &'a Path,
    environment: &'a Environment,
}

impl Resolver<'_> {
    fn mistake(&self, key: &str, message: impl Into<String>) -> Mistake {
        Mistake {
            line: Some(self.written.line_of(key)),
            key: format!("models.{}.{key}", self.written.name),
            message: message.into(),
        }
    }

    fn model(&self, engines: &mut Vec<Engine>, mistakes: &mut Vec<Mistake>) -> Model {
        let written = self.written;
        let defaults = Deadlines::default();
        let deadlines = Deadlines {
            connect: written.connect.unwrap_or(defaults.connect),
            queue: written.model_queue.unwrap_or(defaults.queue),
            load: written.load.unwrap_or(defaults.load),
            first_token: written.first_token.unwrap_or(defaults.first_token),
            gap: written.gap.unwrap_or(defaults.gap),
            request: written.request,
        };
        let mut deployments = Vec::new();
        for backend in self.order(mistakes) {
            match backend {
                Backend::OllamaHttp => deployments.extend(self.remotes(Api::Ollama, mistakes)),
                Backend::OpenAiHttp => deployments.extend(self.remotes(Api::OpenAi, mistakes)),
                Backend::GgufNative => deployments.extend(self.local(engines, &deadlines, mistakes)),
                Backend::Process => deployments.extend(self.process(engines, &deadlines, mistakes)),
                Backend::Builtin => {}
            }
        }
        Model {
            name: written.name.clone(),
            aliases: written.aliases.clone(),
            role: self.role(),
            deployments,
            sampling: written.sampling.clone(),
            deadlines,
            gap_is_set: written.gap.is_some(),
            first_token_is_set: written.first_token.is_some(),
            fallback_models: written.fallback_models.clone(),
            resume: written.resume.unwrap_or_default(),
        }
    }

    fn role(&self) -> ModelRole {
        self.written.role.unwrap_or(ModelRole::Chat)
    }

    /// The backends in the order in which they are tried; `<NAME>_PREFER_HTTP` may turn it around.
    fn order(&self, mistakes: &mut Vec<Mistake>) -> Vec<Backend> {
        let mut order: Vec<_> = self.written.backend.into_iter().chain(self.written.fallback).collect();
        order.dedup();
        let prefer_http = format!("{}_PREFER_HTTP", variable_name(&self.written.name));
        match env_flag(self.environment, &prefer_http, mistakes) {
            Some(true) => order.sort_by_key(|&backend| !backend.is_remote()),
            Some(false) => order.sort_by_key(|&backend| backend.is_remote()),
            None => {}
        }
        order
    }

    fn remotes(&self, api: Api, mistakes: &mut Vec<Mistake>) -> Vec<Deployment> {
        let written = self.written;
        let model_name = self.model_name();
        let mut hosts = match self.environment.get("OLLAMA_BASE_URL").filter(|_| api == Api::Ollama) {
            Some(url) => vec![WrittenHost { url: url.to_owned(), ..WrittenHost::default() }],
            None => self.hosts(mistakes),
        };
        if hosts.is_empty() && api == Api::Ollama && written.hosts_file.is_none() {
            hosts.push(WrittenHost { url: DEFAULT_OLLAMA_URL.to_owned(), ..WrittenHost::default() });
        }
        if hosts.is_empty() && written.hosts_file.is_none() {
            let message = "is missing: name the server that `openai_http` asks, such as http://192.168.1.50:8000/v1";
            mistakes.push(self.mistake("url", message));
        }
        if written.managed_lb && (hosts.len() > 1 || written.dns) {
            let message = "stands for one URL, behind which a cluster balances itself: name one, without dns";
            mistakes.push(self.mistake("managed_lb", message));
        }
        hosts.sort_by_key(|host| host.priority);
        let most = |host: &WrittenHost| match host.max_outstanding.or(written.max_outstanding) {
            Some(most) => Some(most as usize),
            None => (!written.managed_lb).then_some(DEFAULT_OUTSTANDING),
        };
        let deployment = |host: &WrittenHost| {
            Deployment::Remote(Remote {
                context_tokens: written.context_length,
                api_key: written.api_key.clone(),
                max_outstanding: most(host),
                weight: host.weight.unwrap_or(1),
                priority: host.priority.unwrap_or(0),
                wan: host.wan.unwrap_or(written.wan),
                managed_lb: written.managed_lb,
                dns: written.dns,
                makes_vectors: self.role() == ModelRole::Embedding,
                ..Remote::new(api, host.url.trim_end_matches('/'), model_name.clone())
            })
        };
        hosts.iter().map(deployment).collect()
    }

    /// Those of the file, and those of its file of hosts.
    fn hosts(&self, mistakes: &mut Vec<Mistake>) -> Vec<WrittenHost> {
        let written = self.written;
        let mut hosts = written.hosts.clone();
        for WrittenHost { url, line, .. } in hosts.iter().filter(|host| !is_url(&host.url)) {
            let key = if written.lines.contains_key("url") { "url" } else { "urls" };
            let message = format!("`{url}` is not a URL: use one such as {DEFAULT_OLLAMA_URL}");
            mistakes.push(Mistake { line: Some(*line), ..self.mistake(key, message) });
        }
        if let Some(path) = &written.hosts_file {
            match hosts::read_file(&self.folder.join(path)) {
                Ok(more) => hosts.extend(more),
                Err(wrong) => mistakes.extend(wrong.into_iter().map(|reason| self.mistake("hosts_file", reason))),
            }
        }
        if let Some(host) = hosts.iter().find(|host| written.dns && host.url.starts_with("https:")) {
            let url = Remote::new(Api::OpenAi, &host.url, String::new()).url;
            let message = format!("`{url}` proves its name, not its addresses: use dns with http only");
            mistakes.push(self.mistake("dns", message));
        }
        hosts
    }

    /// The name that the model has where it is served.
    fn model_name(&self) -> String {
        let name = format!("{}_MODEL_NAME", variable_name(&self.written.name));
        let set = self.environment.get(&name).map(str::to_owned).or_else(|| self.written.model_name.clone());
        set.unwrap_or_else(|| self.written.name.clone())
    }

    fn process(
        &self,
        engines: &mut Vec<Engine>,
        deadlines: &Deadlines,
        mistakes: &mut Vec<Mistake>,
    ) -> Option<Deployment> {
        let written = self.written;
        let process = match written.process.resolve(written.parallel, written.context_length) {
            Ok(process) => process,
            Err((key, message)) => {
                mistakes.push(self.mistake(key, message));
                return None;
            }
        };
        let context_tokens = process.context_tokens;
        let remote = Remote { api_key: written.api_key.clone(), ..Remote::new(Api::OpenAi, "", self.model_name()) };
        engines.push(Engine {
            label: written.name.clone(),
            path: PathBuf::from(&process.command[0]),
            projector: None,
            draft: None,
            settings: Settings { context_tokens, ..Settings::default() },
            threads: None,
            is_llm: self.role() == ModelRole::Chat,
            evictable: !written.pinned && !written.resident,
            resident: written.resident,
            keep_alive: self.keep_alive(mistakes),
            load_deadline: deadlines.load,
            park: None,
            process: Some(Arc::new(process)),
        });
        Some(Deployment::Process { engine: EngineId(engines.len() - 1), context_tokens, remote })
    }

    fn keep_alive(&self, mistakes: &mut Vec<Mistake>) -> KeepAlive {
        let Some(text) = &self.written.keep_alive else { return KeepAlive::default() };
        keep_alive::parse(&text.as_str().into()).unwrap_or_else(|error| {
            mistakes.push(self.mistake("keep_alive", error.to_string()));
            KeepAlive::default()
        })
    }

    fn local(
        &self,
        engines: &mut Vec<Engine>,
        deadlines: &Deadlines,
        mistakes: &mut Vec<Mistake>,
    ) -> Option<Deployment> {
        let written = self.written;
        let Some(path) = &written.gguf_path else {
            mistakes.push(self.mistake("gguf_path", "is missing: name the GGUF file that `gguf_native` serves"));
            return None;
        };
        let path = self.folder.join(path);
        let is_llm = self.role() == ModelRole::Chat;
        let defaults = Settings::default();
        let deterministic = written.deterministic.unwrap_or(defaults.deterministic);
        let settings = Settings {
            context_tokens: written.context_length.unwrap_or(defaults.context_tokens),
            parallel: written.parallel.unwrap_or(defaults.parallel),
            shared_context: written.shared_context.unwrap_or(defaults.shared_context),
            ubatch_tokens: written.ubatch.unwrap_or(match written.mmproj_path {
                Some(_) => defaults.ubatch_tokens.max(PICTURE_STEP),
                None => defaults.ubatch_tokens,
            }),
            draft_tokens: written.draft_tokens.unwrap_or(match written.draft_path {
                Some(_) => DRAFT_TOKENS,
                None => defaults.draft_tokens,
            }),
            kv: written.kv.unwrap_or(defaults.kv),
            flash_attention: written.flash_attention.unwrap_or(defaults.flash_attention),
            // Repacked matrices are multiplied in another way for one row than for several.
            repack: if written.repack.unwrap_or(!deterministic) { machine_repack() } else { Repack::Off },
            deterministic,
            threads: written.threads.unwrap_or_else(machine_threads),
        };
        if settings.kv != KvType::F16 && !settings.flash_attention {
            let message =
                format!("`{}` needs flash attention: remove flash_attention: false, or use f16", settings.kv.name());
            mistakes.push(self.mistake("kv_type", message));
        }
        let against = [("shared_context", written.shared_context), ("repack", written.repack)];
        for (name, _) in against.into_iter().filter(|(_, set)| deterministic && *set == Some(true)) {
            let message = format!("cannot be kept beside `{name}: true`: remove one of them");
            mistakes.push(self.mistake("deterministic", message));
        }
        let evictable = !written.pinned && !written.resident;
        let keep_alive = self.keep_alive(mistakes);
        let projector = written.mmproj_path.as_ref().map(|path| self.folder.join(path));
        let draft = written.draft_path.as_ref().map(|path| self.folder.join(path));
        if draft.is_some() && written.draft_tokens == Some(0) {
            mistakes.push(self.mistake("draft_tokens", "is 0 beside a `draft_path`: remove one of them"));
        }
        let with = Companions { projector: projector.as_deref(), draft: draft.as_deref() };
        if let Some(index) = engines.iter().position(|engine| engine.may_share(&path, with, deterministic)) {
            let engine = &mut engines[index];
            engine.label = format!("{}+{}", engine.label, written.name);
            engine.settings.context_tokens = engine.settings.context_tokens.max(settings.context_tokens);
            engine.settings.parallel = (engine.settings.parallel + settings.parallel).min(MOST_SEQUENCES);
            engine.settings.shared_context |= settings.shared_context;
            engine.settings.ubatch_tokens = engine.settings.ubatch_tokens.max(settings.ubatch_tokens);
            engine.settings.draft_tokens = engine.settings.draft_tokens.max(settings.draft_tokens);
            // Of two types, the one that loses less.
            engine.settings.kv = engine.settings.kv.min(settings.kv);
            engine.settings.flash_attention |= settings.flash_attention;
            if settings.repack == Repack::Off {
                engine.settings.repack = Repack::Off;
            }
            engine.threads = engine.threads.max(written.threads);
            engine.is_llm |= is_llm;
            engine.projector = engine.projector.take().or(projector);
            engine.draft = engine.draft.take().or(draft);
            engine.evictable &= evictable;
            engine.resident |= written.resident;
            engine.keep_alive = longer(engine.keep_alive, keep_alive);
            engine.load_deadline = engine.load_deadline.max(deadlines.load);
            return Some(Deployment::Local { engine: EngineId(index), context_tokens: settings.context_tokens });
        }
        engines.push(Engine {
            label: written.name.clone(),
            path,
            process: None,
            projector,
            draft,
            settings,
            threads: written.threads,
            is_llm,
            evictable,
            resident: written.resident,
            keep_alive,
            load_deadline: deadlines.load,
            park: None,
        });
        Some(Deployment::Local { engine: EngineId(engines.len() - 1), context_tokens: settings.context_tokens })
    }
}

/// For ever is longer than any time.
fn longer(a: KeepAlive, b: KeepAlive) -> KeepAlive {
    match (a, b) {
        (KeepAlive::For(a), KeepAlive::For(b)) => KeepAlive::For(a.max(b)),
        _ => KeepAlive::Forever,
    }
}
