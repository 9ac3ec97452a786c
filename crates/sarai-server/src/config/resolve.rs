//! The configuration as meant: every default filled in, the environment applied, engines shared by file.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sarai_api::ollama::keep_alive;
use sarai_core::{Bytes, Deadlines, KeepAlive, KvType};
use sarai_plan::ledger::EngineId;
use sarai_plan::{Repack, Settings, Strategy};

use super::Mistake;
use super::env::{Environment, variable_name};
use super::file::{Backend, File, WrittenModel};
use super::model::{Api, Deployment, Model, ModelRole, Remote};

/// Where Ollama listens unless told otherwise.
const DEFAULT_OLLAMA_URL: &str = "http://127.0.0.1:11434";

/// A server without a GPU answers two at a time best.
const DEFAULT_OUTSTANDING: usize = 2;

/// The whole configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The server itself.
    pub server: ServerConfig,
    /// Memory and models at once.
    pub memory: MemoryConfig,
    /// Public models, in the order of the file.
    pub models: Vec<Model>,
    /// One per GGUF file, by [`EngineId`].
    pub engines: Vec<Engine>,
}

/// Limits of the server.
#[derive(Clone, Debug)]
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
    /// Where what was learned is kept.
    pub state_dir: PathBuf,
}

/// Limits of memory.
#[derive(Clone, Copy, Debug)]
pub struct MemoryConfig {
    /// `max_ram_gb`.
    pub max_ram: Bytes,
    /// Local LLMs resident at the same time.
    pub max_concurrent_llms: usize,
    /// When idle models are unloaded.
    pub strategy: Strategy,
}

/// A GGUF file and how it is loaded; models that name the same file share it.
#[derive(Clone, Debug)]
pub struct Engine {
    /// The models that share it.
    pub label: String,
    /// The file.
    pub path: PathBuf,
    /// The projector that the model sees or hears through. It is planned for, and not loaded in this version.
    pub projector: Option<PathBuf>,
    /// Sizes; sequences of sharing models add up, the longest context counts.
    pub settings: Settings,
    /// Threads at most; all cores if not set.
    pub threads: Option<u32>,
    /// Whether it counts against `max_concurrent_llms`.
    pub is_llm: bool,
    /// Whether it may go to make room.
    pub evictable: bool,
    /// Loaded at start.
    pub resident: bool,
    /// How long it stays while nobody uses it; the longest of the sharing models.
    pub keep_alive: KeepAlive,
    /// The longest of the sharing models.
    pub load_deadline: Duration,
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
        state_dir: state_dir(environment, file.state_dir, folder),
    };
    let max_concurrent_llms = env_number(environment, "MAX_CONCURRENT_LLMS", mistakes);
    let memory = MemoryConfig {
        max_ram: Bytes::gib(file.max_ram_gb.unwrap_or(12.0)),
        max_concurrent_llms: max_concurrent_llms.unwrap_or_else(|| or(file.max_concurrent_llms, 2)),
        strategy: file.strategy.unwrap_or_default(),
    };
    let mut config = Config { server, memory, models: Vec::new(), engines: Vec::new() };
    check_names(&file.models, mistakes);
    check_fallbacks(&file.models, mistakes);
    for written in &file.models {
        let model = Resolver { written, folder, environment }.model(&mut config.engines, mistakes);
        config.models.push(model);
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
    std::thread::available_parallelism().map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(1))
}

/// `SARAI_STATE_DIR`, the file's, or what the XDG base directories say.
fn state_dir(environment: &Environment, written: Option<String>, folder: &Path) -> PathBuf {
    if let Some(path) = environment.get("SARAI_STATE_DIR") {
        return PathBuf::from(path);
    }
    let standard = || environment.expand("${XDG_STATE_HOME:-~/.local/state}/sarai").into();
    written.map_or_else(standard, |path| folder.join(path))
}

fn is_url(text: &str) -> bool {
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
        };
        let mut deployments = Vec::new();
        for backend in self.order(mistakes) {
            match backend {
                Backend::OllamaHttp => deployments.extend(self.remotes(Api::Ollama, mistakes)),
                Backend::OpenAiHttp => deployments.extend(self.remotes(Api::OpenAi, mistakes)),
                Backend::GgufNative => deployments.extend(self.local(engines, &deadlines, mistakes)),
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
        let name = format!("{}_MODEL_NAME", variable_name(&written.name));
        let model_name = self.environment.get(&name).map(str::to_owned).or_else(|| written.model_name.clone());
        let model_name = model_name.unwrap_or_else(|| written.name.clone());
        let urls = match self.environment.get("OLLAMA_BASE_URL").filter(|_| api == Api::Ollama) {
            Some(url) => vec![url.to_owned()],
            None if written.urls.is_empty() && api == Api::Ollama => vec![DEFAULT_OLLAMA_URL.to_owned()],
            None => written.urls.clone(),
        };
        if urls.is_empty() {
            let message = "is missing: name the server that `openai_http` asks, such as http://192.168.1.50:8000/v1";
            mistakes.push(self.mistake("url", message));
        }
        for url in written.urls.iter().filter(|url| !is_url(url)) {
            let key = if written.lines.contains_key("url") { "url" } else { "urls" };
            mistakes.push(self.mistake(key, format!("`{url}` is not a URL: use one such as {DEFAULT_OLLAMA_URL}")));
        }
        let deployment = |url: String| {
            Deployment::Remote(Remote {
                api,
                url: url.trim_end_matches('/').to_owned(),
                model_name: model_name.clone(),
                context_tokens: written.context_length,
                api_key: written.api_key.clone(),
                max_outstanding: written.max_outstanding.map_or(DEFAULT_OUTSTANDING, |most| most as usize),
            })
        };
        urls.into_iter().map(deployment).collect()
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
        let settings = Settings {
            context_tokens: written.context_length.unwrap_or(defaults.context_tokens),
            parallel: written.parallel.unwrap_or(defaults.parallel),
            shared_context: written.shared_context.unwrap_or(defaults.shared_context),
            ubatch_tokens: written.ubatch.unwrap_or(defaults.ubatch_tokens),
            kv: written.kv.unwrap_or(defaults.kv),
            flash_attention: written.flash_attention.unwrap_or(defaults.flash_attention),
            repack: if written.repack.unwrap_or(true) { machine_repack() } else { Repack::Off },
            threads: written.threads.unwrap_or_else(machine_threads),
        };
        if settings.kv != KvType::F16 && !settings.flash_attention {
            let message =
                format!("`{}` needs flash attention: remove flash_attention: false, or use f16", settings.kv.name());
            mistakes.push(self.mistake("kv_type", message));
        }
        let evictable = !written.pinned && !written.resident;
        let keep_alive = self.keep_alive(mistakes);
        let projector = written.mmproj_path.as_ref().map(|path| self.folder.join(path));
        if let Some(index) = engines.iter().position(|engine| is_same_file(&engine.path, &path)) {
            let engine = &mut engines[index];
            engine.label = format!("{}+{}", engine.label, written.name);
            engine.settings.context_tokens = engine.settings.context_tokens.max(settings.context_tokens);
            engine.settings.parallel += settings.parallel;
            engine.settings.shared_context |= settings.shared_context;
            engine.settings.ubatch_tokens = engine.settings.ubatch_tokens.max(settings.ubatch_tokens);
            // Of two types, the one that loses less.
            engine.settings.kv = engine.settings.kv.min(settings.kv);
            engine.settings.flash_attention |= settings.flash_attention;
            if settings.repack == Repack::Off {
                engine.settings.repack = Repack::Off;
            }
            engine.threads = engine.threads.max(written.threads);
            engine.is_llm |= is_llm;
            engine.projector = engine.projector.take().or_else(|| projector.clone());
            engine.evictable &= evictable;
            engine.resident |= written.resident;
            engine.keep_alive = longer(engine.keep_alive, keep_alive);
            engine.load_deadline = engine.load_deadline.max(deadlines.load);
            return Some(Deployment::Local { engine: EngineId(index), context_tokens: settings.context_tokens });
        }
        engines.push(Engine {
            label: written.name.clone(),
            path,
            projector,
            settings,
            threads: written.threads,
            is_llm,
            evictable,
            resident: written.resident,
            keep_alive,
            load_deadline: deadlines.load,
        });
        Some(Deployment::Local { engine: EngineId(engines.len() - 1), context_tokens: settings.context_tokens })
    }
}

/// Whether two paths name one file, through links too.
fn is_same_file(a: &Path, b: &Path) -> bool {
    a == b || a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}

/// For ever is longer than any time.
fn longer(a: KeepAlive, b: KeepAlive) -> KeepAlive {
    match (a, b) {
        (KeepAlive::For(a), KeepAlive::For(b)) => KeepAlive::For(a.max(b)),
        _ => KeepAlive::Forever,
    }
}
