//! Environment variables: the process's own, then those of a `.env` file in the working directory.

use std::collections::HashMap;
use std::path::Path;

/// The variables that the configuration may read.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    variables: HashMap<String, String>,
    broken: Option<String>,
}

impl Environment {
    /// Reads `.env`, then the process's variables over it. What cannot be read of it is kept for [`Self::broken`].
    #[must_use]
    pub fn of_process() -> Self {
        Self::read(
            Path::new(".env"),
            std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))),
        )
    }

    /// Reads a `.env` file, then `own` over it.
    pub fn read(dotenv: &Path, own: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut environment = Self::default();
        for line in dotenvy::from_path_iter(dotenv).into_iter().flatten() {
            match line {
                Ok((name, value)) => drop(environment.variables.insert(name, value)),
                Err(error) => drop(environment.broken.get_or_insert(error.to_string())),
            }
        }
        environment.variables.extend(own);
        environment
    }

    /// Why the `.env` file could not be read to its end, if so.
    #[must_use]
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
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
