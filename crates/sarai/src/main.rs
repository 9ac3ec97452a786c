//! sarai: several language models at once on one small machine, under a memory budget.

mod args;
mod command;
mod log;

use std::process::ExitCode;

use clap::Parser;

use args::{Args, Command};

fn main() -> ExitCode {
    let args = Args::parse();
    let outcome = match args.command {
        Command::Worker { kind } => return command::worker::run(&kind),
        Command::Serve(serve) => command::serve::run(&serve),
        Command::Check(check) => command::check::run(&check),
        Command::Drill(drill) => command::drill::run(&drill),
        Command::Plan(plan) => command::plan::run(&plan),
        Command::Load(load) => command::load::load(&load),
        Command::Unload(unload) => command::load::unload(&unload),
        Command::Ps(ps) => command::ps::run(&ps),
        Command::Run(run) => command::run::run(&run),
    };
    outcome.unwrap_or_else(|failure| {
        log::complain(&format!("sarai: {:#}", failure.error));
        failure.code
    })
}

/// A command that failed, with its exit code.
pub struct Failure {
    code: ExitCode,
    error: anyhow::Error,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

impl Failure {
    /// 1: it went wrong while it ran.
    pub fn failed(error: impl Into<anyhow::Error>) -> Self {
        Self { code: ExitCode::from(1), error: error.into() }
    }

    /// 2: the command line or the configuration is wrong.
    pub fn misused(error: impl Into<anyhow::Error>) -> Self {
        Self { code: ExitCode::from(2), error: error.into() }
    }

    /// 3: no server answers.
    pub fn no_server(error: impl Into<anyhow::Error>) -> Self {
        Self { code: ExitCode::from(3), error: error.into() }
    }
}
