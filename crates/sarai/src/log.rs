//! The log on standard error: for people on a terminal, JSON elsewhere. One that cannot be written is lost,
//! and the server goes on.

use std::io::{IsTerminal, Write};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt;

/// Starts logging; `SARAI_LOG` filters, `info` by default.
pub fn start() {
    let filter = EnvFilter::try_from_env("SARAI_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = fmt().with_env_filter(filter).with_writer(std::io::stderr).log_internal_errors(false);
    let terminal = std::io::stderr().is_terminal();
    let _ = if terminal { log.with_target(false).try_init() } else { log.json().flatten_event(true).try_init() };
}

/// Tells the person at the terminal.
pub fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Prints to standard output; false when nobody reads it any more.
pub fn print(text: &str) -> bool {
    let mut out = std::io::stdout();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok()
}
