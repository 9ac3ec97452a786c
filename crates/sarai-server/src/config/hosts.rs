//! Hosts as written: in the configuration, as a text or a mapping; or in a file of their own, one a line.

use std::path::Path;

use super::Environment;
use super::Mistake;
use super::tree::Section;

/// One host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WrittenHost {
    pub url: String,
    /// Where it is written, in whichever file.
    pub line: usize,
    pub weight: Option<u32>,
    pub priority: Option<u32>,
    pub max_outstanding: Option<u32>,
    pub wan: Option<bool>,
}

const MOST_WEIGHT: u32 = 1_000;
const MOST_PRIORITY: u32 = 1_000;
const MOST_OUTSTANDING: u32 = 100_000;

/// Reads what stands at `url` and `urls`.
pub fn read(model: &mut Section<'_>, environment: &Environment, mistakes: &mut Vec<Mistake>) -> Vec<WrittenHost> {
    let mut hosts = Vec::new();
    for key in ["url", "urls"] {
        for (line, node) in model.items(key) {
            if let Some(url) = super::tree::text_of(node) {
                hosts.push(WrittenHost { url: environment.expand(&url), line, ..WrittenHost::default() });
                continue;
            }
            let mut host = Section::of(&format!("{}.{key}", model.path), node, mistakes);
            let url = host.text("url", mistakes);
            if url.is_none() {
                mistakes.push(host.mistake("url", "is missing: write the address of the host"));
            }
            hosts.push(WrittenHost {
                url: environment.expand(&url.unwrap_or_default()),
                line,
                weight: host.count("weight", 1, MOST_WEIGHT, mistakes),
                priority: host.count("priority", 0, MOST_PRIORITY, mistakes),
                max_outstanding: host.count("max_outstanding", 1, MOST_OUTSTANDING, mistakes),
                wan: host.flag("wan", mistakes),
            });
            host.finish(mistakes);
        }
    }
    hosts
}

/// Reads a file of hosts: `URL`, and after it `weight=2`, `priority=1`, `max_outstanding=4`, `wan=true`; `#` begins a
/// comment.
///
/// # Errors
/// Each line that is not so, and the file if it cannot be read.
pub fn read_file(path: &Path) -> Result<Vec<WrittenHost>, Vec<String>> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| vec![format!("{} cannot be read ({error}): write one host a line", path.display())])?;
    let (mut hosts, mut wrong) = (Vec::new(), Vec::new());
    for (index, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_whitespace();
        let Some(url) = words.next() else { continue };
        let mut host = WrittenHost { url: url.to_owned(), line: index + 1, ..WrittenHost::default() };
        match words.try_for_each(|word| host.set(word)) {
            Ok(()) if super::resolve::is_url(url) => hosts.push(host),
            Ok(()) => wrong.push(format!("{}:{}: `{url}` is not a URL", path.display(), index + 1)),
            Err(reason) => wrong.push(format!("{}:{}: {reason}", path.display(), index + 1)),
        }
    }
    if wrong.is_empty() { Ok(hosts) } else { Err(wrong) }
}

impl WrittenHost {
    fn set(&mut self, word: &str) -> Result<(), String> {
        let (key, value) = word.split_once('=').ok_or_else(|| format!("`{word}` is not key=value"))?;
        let count = |low, high| {
            let number = value.parse().ok().filter(|n| (low..=high).contains(n));
            number.map(Some).ok_or_else(|| format!("`{word}`: use a whole number from {low} to {high}"))
        };
        match key {
            "weight" => self.weight = count(1, MOST_WEIGHT)?,
            "priority" => self.priority = count(0, MOST_PRIORITY)?,
            "max_outstanding" => self.max_outstanding = count(1, MOST_OUTSTANDING)?,
            "wan" => self.wan = Some(value.parse().map_err(|_| format!("`{word}`: use true or false"))?),
            _ => return Err(format!("`{key}` is unknown: use weight, priority, max_outstanding or wan")),
        }
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Vec<WrittenHost>, Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hosts");
        std::fs::write(&path, text).unwrap();
        read_file(&path)
    }

    #[test]
    fn a_file_of_hosts_has_one_a_line() {
        let hosts = read_text("# ours\nhttp://a:11434\n\nhttp://b:11434 weight=3 wan=true # far\n").unwrap();
        assert_eq!((hosts[0].url.as_str(), hosts[0].line, hosts[0].weight), ("http://a:11434", 2, None));
        assert_eq!((hosts[1].line, hosts[1].weight, hosts[1].wan), (4, Some(3), Some(true)));
    }

    #[test]
    fn every_wrong_line_is_told() {
        let wrong = read_text("a:1\nhttp://b weight=0\nhttp://c speed=1\nhttp://d weight\n").unwrap_err();
        assert_eq!(wrong.len(), 4, "{wrong:?}");
        assert!(wrong[1].contains(":2: `weight=0`: use a whole number from 1 to 1000"), "{}", wrong[1]);
    }
}
