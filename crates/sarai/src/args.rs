//! The command line as it is written.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

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
  SARAI_CONFIG, SARAI_URL, SARAI_LOG   as --config, --url, and a log filter such as `debug`

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
