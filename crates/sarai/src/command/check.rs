//! `sarai check`: every mistake of a configuration at once.

use std::process::ExitCode;

use sarai_server::config::{self, Deployment, Environment};

use crate::args::CheckArgs;
use crate::{Failure, log};

/// Checks, and says what the configuration means.
pub fn run(args: &CheckArgs) -> Result<ExitCode, Failure> {
    let config = config::load(&args.config.config, &Environment::of_process()).map_err(Failure::misused)?;
    let mut text = format!("{}: no mistakes\n", args.config.config.display());
    for model in &config.models {
        let places = model.deployments.iter().map(|deployment| match deployment {
            Deployment::Remote(remote) => format!("{} on {}", remote.model_name, remote.url),
            Deployment::Process { engine, .. } => {
                let process = config.engines[engine.0].process.as_ref();
                process.map(|process| process.command.join(" ")).unwrap_or_default()
            }
            Deployment::Local { engine, .. } => {
                let path = &config.engines[engine.0].path;
                let missing = if path.exists() { "" } else { " (not there yet)" };
                format!("{}{missing}", path.display())
            }
        });
        text.push_str(&format!("  {}: {}\n", model.name, places.collect::<Vec<_>>().join(", then ")));
    }
    log::print(&text);
    Ok(ExitCode::SUCCESS)
}
