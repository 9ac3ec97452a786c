//! A command that serves a model on this machine, as written and as meant.

use sarai_core::Bytes;

use super::tree::Section;
use super::{Environment, Mistake};

/// Where a command has its port put.
pub const PORT: &str = "${PORT}";
/// What most servers of OpenAI's API answer once they are ready.
const READY_PATH: &str = "/v1/models";

/// A command that serves OpenAI's API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// The program and its arguments; `${PORT}` in them is the port.
    pub command: Vec<String>,
    /// Where it listens; any free port if not set.
    pub port: Option<u16>,
    /// What answers with a status of 2xx once it is ready.
    pub ready_path: String,
    /// Variables that it gets beside ours.
    pub env: Vec<(String, String)>,
    /// What it takes, until that was measured.
    pub memory: Bytes,
    /// Requests that it answers at the same time.
    pub parallel: usize,
    /// Tokens that prompt and answer may have together.
    pub context_tokens: u32,
}

/// What stands in the file.
#[derive(Default)]
pub struct WrittenProcess {
    pub command: Vec<String>,
    pub port: Option<u16>,
    pub ready_path: Option<String>,
    pub env: Vec<(String, String)>,
    pub memory_gb: Option<f64>,
}

/// Reads the keys of a process.
pub fn read(model: &mut Section<'_>, environment: &Environment, mistakes: &mut Vec<Mistake>) -> WrittenProcess {
    let expand = |text: &str| text.split(PORT).map(|part| environment.expand(part)).collect::<Vec<_>>().join(PORT);
    let mut command = model.texts("command", mistakes);
    if let [line] = command.as_slice() {
        match shell_words::split(line) {
            Ok(words) => command = words,
            Err(error) => mistakes.push(model.mistake("command", format!("`{line}`: {error}: close the quotes"))),
        }
    }
    let mut env = Vec::new();
    if let Some(section) = model.section("env", mistakes) {
        for (name, line, node) in section.entries() {
            match super::tree::text_of(node) {
                Some(value) => env.push((name.to_owned(), environment.expand(&value))),
                None => mistakes.push(Mistake {
                    line: Some(line),
                    key: format!("{}.{name}", section.path),
                    message: "is not a text: put the value in quotes".into(),
                }),
            }
        }
    }
    WrittenProcess {
        command: command.iter().map(|word| expand(word)).collect(),
        port: model.count("port", 1, 65_535, mistakes).and_then(|port| u16::try_from(port).ok()),
        ready_path: model.text("ready_path", mistakes),
        env,
        memory_gb: model.number("memory_gb", 0.001, 100_000.0, mistakes),
    }
}

impl WrittenProcess {
    /// With every default filled in.
    ///
    /// # Errors
    /// The key that is wrong, and what would be right.
    pub fn resolve(
        &self,
        parallel: Option<u32>,
        context_tokens: Option<u32>,
    ) -> Result<Process, (&'static str, String)> {
        if self.command.is_empty() {
            return Err(("command", "is missing: write the command that starts the server, such as `llama-server -m model.gguf --port ${PORT}`".into()));
        }
        let is_told = self.port.is_some() || self.command.iter().any(|word| word.contains(PORT));
        if !is_told && !self.env.iter().any(|(_, value)| value.contains(PORT)) {
            return Err((
                "command",
                "does not say where it listens: put `${PORT}` into it, or name its port with `port`".into(),
            ));
        }
        let Some(gb) = self.memory_gb else {
            return Err((
                "memory_gb",
                "is missing: write what the process takes at the most, such as `memory_gb: 2.5`".into(),
            ));
        };
        let ready_path = self.ready_path.clone().unwrap_or_else(|| READY_PATH.to_owned());
        if !ready_path.starts_with('/') {
            return Err(("ready_path", format!("`{ready_path}` is not a path: begin it with /")));
        }
        Ok(Process {
            command: self.command.clone(),
            port: self.port,
            ready_path,
            env: self.env.clone(),
            memory: Bytes::gib(gb),
            parallel: parallel.unwrap_or(1) as usize,
            context_tokens: context_tokens.unwrap_or(4096),
        })
    }
}
