//! `sarai serve`: both APIs until a signal.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use sarai_server::Server;
use sarai_server::config::{self, Environment};
use tokio::signal::unix::{SignalKind, signal};

use crate::args::ServeArgs;
use crate::{Failure, command, log};

/// This very binary, even when the file at its path has been replaced since.
pub const THIS_BINARY: &str = "/proc/self/exe";

/// Serves until Ctrl-C or SIGTERM; a second signal ends it at once.
pub fn run(args: &ServeArgs) -> Result<ExitCode, Failure> {
    log::start();
    let mut config = config::load(&args.config.config, &Environment::of_process()).map_err(Failure::misused)?;
    if let Some(listen) = args.listen {
        config.server.listen = listen;
    }
    let first_model = config.models.first().map(|model| model.name.clone()).unwrap_or_default();
    command::runtime()?.block_on(async {
        let file = Some(args.config.config.clone());
        let server = Server::start(config, PathBuf::from(THIS_BINARY), file).await.map_err(Failure::failed)?;
        let address = server.address().map_err(Failure::failed)?;
        tracing::info!(%address, "listening");
        greet(&address.to_string(), &first_model);
        sarai_llama::release_start();
        let mut terminate = signal(SignalKind::terminate()).map_err(Failure::failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::failed)?;
        let stop = async move {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            tracing::info!("stopping: running answers may finish; signal again to end now");
            tokio::spawn(async move {
                tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
                // Workers end by themselves when our end of their socket closes.
                std::process::exit(130);
            });
        };
        server.serve(stop).await;
        Ok(())
    })?;
    Ok(ExitCode::SUCCESS)
}

fn greet(address: &str, model: &str) {
    let stop = if std::io::stdin().is_terminal() { "Ctrl-C" } else { "SIGTERM or Ctrl-C" };
    log::print(&format!(
        "sarai is ready\n\
         \x20 OpenAI API   http://{address}/v1\n\
         \x20 Ollama API   http://{address}/api\n\
         \x20 try          curl -N http://{address}/v1/chat/completions -H 'content-type: application/json' \\\n\
         \x20                -d '{{\"model\":\"{model}\",\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"Name three colours.\"}}]}}'\n\
         \x20 state        sarai ps --url http://{address}\n\
         \x20 stop         {stop}\n"
    ));
}
