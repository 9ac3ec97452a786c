//! Environment variables: the process's own, then those of a `.env` file in the working directory.

use std::collections::HashMap;
use std::path::Path;

/// The variables that the configuration may read.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    variables: HashMap<String, String>,
}

impl Environment {
    /// Reads `.env`, then the process's variables over it. An unreadable `.env` counts as empty.
    #[must_use]
    pub fn of_process() -> Self {
        Self::read(
            Path::new(".env"),
            std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))),
        )
    }

    /// Reads a `.env` file, then `own` over it.
    pub fn read(dotenv: &Path, own: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut variables: HashMap<_, _> =
            dotenvy::from_path_iter(dotenv).into_iter().flatten().filter_map(Result::ok).collect();
        variables.extend(own);
        Self { variables }
    }

    /// A variable; an empty one counts as not set.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Replaces `~/`, `${NAME}` and `${NAME:-default}`.
    #[must_use]
    pub fn expand(&self, text: &str) -> String {
        let mut out = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("${") {
            let Some((inside, behind)) = after.split_once('}') else { break };
            let (name, default) = inside.split_once(":-").unwrap_or((inside, ""));
            out.push_str(before);
            out.push_str(self.get(name).unwrap_or(default));
            rest = behind;
        }
        out.push_str(rest);
        match (out.strip_prefix("~/"), self.get("HOME")) {
            (Some(path), Some(home)) => format!("{home}/{path}"),
            _ => out,
        }
    }
}

/// `my-model.v2` becomes `MY_MODEL_V2`.
#[must_use]
pub fn variable_name(model: &str) -> String {
    model.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect()
}
