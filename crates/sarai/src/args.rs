//! The command line as it is written.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use sarai_core::{Bytes, KvType};

/// Several language models at once on one small machine, under a memory budget.
#[derive(Debug, Parser)]
#[command(
    version,
    about,
    after_help = "\
Start with `sarai check`, then `sarai serve`, then in another terminal `sarai run MODEL 'a question'`.

Environment (over the file; also from a `.env` in the working directory):
  <NAME>_PREFER_HTTP   true or false: try the remote of model NAME first, or its local file first
  <NAME>_MODEL_NAME    what the remote host calls model NAME
  OLLAMA_BASE_URL      the Ollama host of all ollama_http models
  MAX_CONCURRENT_LLMS  local LLMs that may be resident at the same time
  SARAI_CONFIG, SARAI_URL, SARAI_API_KEY, SARAI_LOG   as --config, --url, and a log filter such as `debug`

Exit codes: 0 done, 1 failed, 2 wrong command line or configuration, 3 no server answers"
)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve both APIs until Ctrl-C or SIGTERM
    Serve(ServeArgs),
    /// Check a configuration and report every mistake in it
    Check(CheckArgs),
    /// Say what a GGUF file takes; without one, what the whole configuration takes, also when hosts fail
    Plan(PlanArgs),
    /// Play every fault of a remote host against a configuration, and show what clients would see
    Drill(DrillArgs),
    /// Have a model loaded, and wait until it is
    Load(ModelArgs),
    /// Have a model unloaded once it is idle
    Unload(ModelArgs),
    /// Show every model: its state, its memory, and why it is not available
    Ps(PsArgs),
    /// Ask a model and stream its answer; without a prompt, converse
    Run(RunArgs),
    /// Compute for a server (started by it)
    #[command(hide = true)]
    Worker {
        /// What kind of engine.
        #[command(subcommand)]
        kind: WorkerKind,
    },
}

/// Kinds of workers.
#[derive(Debug, Subcommand)]
pub enum WorkerKind {
    /// llama.cpp
    Llama {
        /// Shown by `ps` of the system.
        label: Option<String>,
    },
    /// llama.cpp, as a dry run
    Probe {
        /// Shown by `ps` of the system.
        label: Option<String>,
    },
    /// a command, with all that it starts
    Shepherd {
        /// Shown by `ps` of the system.
        label: String,
        /// The command.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// a validator of JSON schemas
    Validate {
        /// Shown by `ps` of the system.
        label: Option<String>,
    },
    /// nothing: the kernel may take it in the server's place
    Spare {
        /// Shown by `ps` of the system.
        label: Option<String>,
    },
}

/// Which configuration.
#[derive(Debug, clap::Args)]
pub struct ConfigArgs {
    /// The configuration file
    #[arg(long, short, value_name = "FILE", env = "SARAI_CONFIG", default_value = "config/sarai.yaml")]
    pub config: PathBuf,
}

/// Arguments of `serve`.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// Which configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Listen here instead of server.listen; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<std::net::SocketAddr>,
}

/// Arguments of `check`.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// Which configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// Which server.
#[derive(Debug, clap::Args)]
pub struct UrlArgs {
    /// The server
    #[arg(long, env = "SARAI_URL", default_value = "http://127.0.0.1:11435")]
    pub url: String,
    /// One of its keys, if it asks for them
    #[arg(long, env = "SARAI_API_KEY", hide_env_values = true, value_name = "KEY")]
    pub api_key: Option<String>,
}

/// Arguments of `plan`.
#[derive(Debug, clap::Args)]
pub struct PlanArgs {
    /// GGUF files; of a split one, the first part
    pub files: Vec<PathBuf>,
    /// Which configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Tokens that one sequence can hold
    #[arg(long, value_name = "TOKENS", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(16..=16_777_216))]
    pub ctx: u32,
    /// Sequences computed at the same time
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub parallel: u32,
    /// All sequences together hold what one may hold
    #[arg(long)]
    pub shared_context: bool,
    /// Type of the KV cache: f16, q8_0 or q4_0
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = parse_kv)]
    pub kv: KvType,
    /// Tokens that one step computes at most
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=8192))]
    pub ubatch: u32,
    /// Compute attention without its full matrix
    #[arg(long, value_name = "on|off", default_value = "on", value_parser = parse_switch, action = clap::ArgAction::Set)]
    pub flash_attn: bool,
    /// The projector that the model sees or hears through
    #[arg(long, value_name = "FILE")]
    pub mmproj: Option<PathBuf>,
    /// A smaller model of the same vocabulary that drafts for it
    #[arg(long, value_name = "FILE")]
    pub draft: Option<PathBuf>,
    /// Copy eligible weights into the layout that computes fastest
    #[arg(long, value_name = "on|off", default_value = "on", value_parser = parse_switch, action = clap::ArgAction::Set)]
    pub repack: bool,
    /// Compute each answer with the same numbers whatever is computed beside it
    #[arg(long, conflicts_with = "shared_context")]
    pub deterministic: bool,
    /// Plan for a machine with so much memory, such as 16GiB, instead of this one
    #[arg(long, value_name = "SIZE")]
    pub ram: Option<Bytes>,
    /// Ask llama.cpp too, by a dry run (always done where the formula does not know the architecture)
    #[arg(long)]
    pub probe: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

fn parse_kv(text: &str) -> Result<KvType, String> {
    let known = KvType::ALL.into_iter().find(|kv| kv.name() == text);
    known.ok_or_else(|| format!("`{text}` is no type of cache: use f16, q8_0 or q4_0"))
}

fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "on" | "true" | "1" => Ok(true),
        "off" | "false" | "0" => Ok(false),
        _ => Err(format!("`{text}` is not on or off")),
    }
}

/// Arguments of `drill`.
#[derive(Debug, clap::Args)]
pub struct DrillArgs {
    /// Which configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// The model whose host fails; the first that has a host, if not named
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Deadline of the first token during the drill
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0, value_parser = parse_seconds)]
    pub first_token_seconds: f64,
    /// Deadline between two tokens during the drill
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0, value_parser = parse_seconds)]
    pub gap_seconds: f64,
    /// Tokens that each request asks for
    #[arg(long, value_name = "TOKENS", default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub max_tokens: u32,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds: &f64| (0.1..=3600.0).contains(seconds));
    seconds.ok_or_else(|| format!("`{text}` is no number of seconds from 0.1 to 3600"))
}

/// Arguments of `load` and `unload`.
#[derive(Debug, clap::Args)]
pub struct ModelArgs {
    /// The model's name
    pub model: String,
    /// Which server.
    #[command(flatten)]
    pub server: UrlArgs,
}

/// Arguments of `ps`.
#[derive(Debug, clap::Args)]
pub struct PsArgs {
    /// Which server.
    #[command(flatten)]
    pub server: UrlArgs,
    /// Print the server's JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// The model's name
    pub model: String,
    /// The prompt; without one, a conversation on a terminal, or all of standard input
    pub prompt: Vec<String>,
    /// Which server.
    #[command(flatten)]
    pub server: UrlArgs,
}
