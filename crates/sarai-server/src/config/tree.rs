//! Typed reading of a YAML tree, where each mistake is noted with its line and reading goes on.

use std::time::Duration;

use saphyr::{MarkedYamlOwned, ScalarOwned, YamlDataOwned};

use super::Mistake;

/// One mapping of the file.
pub struct Section<'a> {
    /// Its path, such as `models.solar`; empty at the top.
    pub path: String,
    /// Its line.
    pub line: usize,
    entries: Vec<(&'a str, usize, &'a MarkedYamlOwned)>,
    read: Vec<&'static str>,
}

impl<'a> Section<'a> {
    /// Takes a node for a mapping; an empty node is an empty mapping.
    pub fn of(path: &str, node: &'a MarkedYamlOwned, mistakes: &mut Vec<Mistake>) -> Self {
        let line = node.span.start.line();
        let mut section = Self { path: path.to_owned(), line, entries: Vec::new(), read: Vec::new() };
        match &node.data {
            YamlDataOwned::Mapping(mapping) => {
                for (key, value) in mapping {
                    match &key.data {
                        YamlDataOwned::Value(ScalarOwned::String(name)) => {
                            section.entries.push((name, key.span.start.line(), value));
                        }
                        _ => mistakes.push(section.mistake_at(
                            key.span.start.line(),
                            "?",
                            "this key is not a text: put it in quotes",
                        )),
                    }
                }
            }
            YamlDataOwned::Value(ScalarOwned::Null) => {}
            _ => mistakes.push(Mistake {
                line: Some(line),
                key: path.to_owned(),
                message: "is not a mapping: write `key: value` lines below it".into(),
            }),
        }
        section
    }

    /// All entries, whatever their keys.
    pub fn entries(&self) -> impl Iterator<Item = (&'a str, usize, &'a MarkedYamlOwned)> + '_ {
        self.entries.iter().copied()
    }

    fn get(&mut self, key: &'static str) -> Option<(usize, &'a MarkedYamlOwned)> {
        self.read.push(key);
        let (_, line, node) = self.entries.iter().find(|(name, ..)| *name == key)?;
        if matches!(node.data, YamlDataOwned::Value(ScalarOwned::Null)) { None } else { Some((*line, node)) }
    }

    /// The line of a key, if it is written.
    pub fn written_at(&self, key: &str) -> Option<usize> {
        self.entries.iter().find(|(name, ..)| *name == key).map(|(_, line, _)| *line)
    }

    /// The line of a key, or of the section.
    pub fn line_of(&self, key: &str) -> usize {
        self.written_at(key).unwrap_or(self.line)
    }

    /// A mistake about a key of this section.
    pub fn mistake(&self, key: &str, message: impl Into<String>) -> Mistake {
        self.mistake_at(self.line_of(key), key, message)
    }

    fn mistake_at(&self, line: usize, key: &str, message: impl Into<String>) -> Mistake {
        let key = if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) };
        Mistake { line: Some(line), key, message: message.into() }
    }

    /// A subsection; empty where the key is not there.
    pub fn section(&mut self, key: &'static str, mistakes: &mut Vec<Mistake>) -> Option<Section<'a>> {
        let path = if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) };
        self.get(key).map(|(_, node)| Section::of(&path, node, mistakes))
    }

    fn typed<T>(
        &mut self,
        key: &'static str,
        wanted: &str,
        mistakes: &mut Vec<Mistake>,
        read: impl Fn(&MarkedYamlOwned) -> Option<T>,
    ) -> Option<T> {
        let (line, node) = self.get(key)?;
        let value = read(node);
        if value.is_none() {
            mistakes.push(self.mistake_at(line, key, format!("{} is not {wanted}", shown(node))));
        }
        value
    }

    /// A text; numbers are taken as they are written.
    pub fn text(&mut self, key: &'static str, mistakes: &mut Vec<Mistake>) -> Option<String> {
        self.typed(key, "a text", mistakes, text_of)
    }

    /// A text, or a list of texts.
    pub fn texts(&mut self, key: &'static str, mistakes: &mut Vec<Mistake>) -> Vec<String> {
        let read = |node: &MarkedYamlOwned| match &node.data {
            YamlDataOwned::Sequence(items) => items.iter().map(text_of).collect(),
            _ => text_of(node).map(|text| vec![text]),
        };
        self.typed(key, "a text or a list of texts", mistakes, read).unwrap_or_default()
    }

    /// A node, or the nodes of a list, with their lines.
    pub fn items(&mut self, key: &'static str) -> Vec<(usize, &'a MarkedYamlOwned)> {
        match self.get(key) {
            None => Vec::new(),
            Some((_, MarkedYamlOwned { data: YamlDataOwned::Sequence(items), .. })) => {
                items.iter().map(|item| (item.span.start.line(), item)).collect()
            }
            Some((line, node)) => vec![(line, node)],
        }
    }

    /// `true` or `false`.
    pub fn flag(&mut self, key: &'static str, mistakes: &mut Vec<Mistake>) -> Option<bool> {
        self.typed(key, "true or false", mistakes, |node| match &node.data {
            YamlDataOwned::Value(ScalarOwned::Boolean(value)) => Some(*value),
            _ => None,
        })
    }

    /// A whole number within a range.
    pub fn int(&mut self, key: &'static str, low: i64, high: i64, mistakes: &mut Vec<Mistake>) -> Option<i64> {
        self.typed(key, &format!("a whole number from {low} to {high}"), mistakes, |node| match &node.data {
            YamlDataOwned::Value(ScalarOwned::Integer(value)) if (low..=high).contains(value) => Some(*value),
            _ => None,
        })
    }

    /// As [`Self::int`], for counts.
    pub fn count(&mut self, key: &'static str, low: u32, high: u32, mistakes: &mut Vec<Mistake>) -> Option<u32> {
        self.int(key, low.into(), high.into(), mistakes).and_then(|value| u32::try_from(value).ok())
    }

    /// A number within a range.
    pub fn number(&mut self, key: &'static str, low: f64, high: f64, mistakes: &mut Vec<Mistake>) -> Option<f64> {
        let wanted = format!("a number from {low} to {high}");
        self.typed(key, &wanted, mistakes, |node| number_of(node).filter(|value| (low..=high).contains(value)))
    }

    /// A duration in seconds.
    pub fn seconds(&mut self, key: &'static str, mistakes: &mut Vec<Mistake>) -> Option<Duration> {
        self.number(key, 0.001, 86_400.0, mistakes).map(Duration::from_secs_f64)
    }

    /// One of a few words.
    pub fn word<T: Copy>(&mut self, key: &'static str, words: &[(&str, T)], mistakes: &mut Vec<Mistake>) -> Option<T> {
        let names: Vec<_> = words.iter().map(|(name, _)| *name).collect();
        let text = self.text(key, mistakes)?;
        let found = words.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
        if found.is_none() {
            mistakes.push(self.mistake(key, format!("`{text}` is unknown: use {}", one_of(&text, &names))));
        }
        found
    }

    /// Notes every key that nobody asked for, with the nearest that exists.
    pub fn finish(self, mistakes: &mut Vec<Mistake>) {
        for (name, line, _) in &self.entries {
            if !self.read.contains(name) {
                let message = format!("is no key here: use {}", one_of(name, &self.read));
                mistakes.push(self.mistake_at(*line, name, message));
            }
        }
    }
}

fn one_of(written: &str, names: &[&str]) -> String {
    let nearest = names.iter().max_by(|a, b| strsim::jaro(written, a).total_cmp(&strsim::jaro(written, b)));
    match nearest.filter(|name| strsim::jaro(written, name) > 0.8) {
        Some(name) => format!("`{name}`"),
        None => names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "),
    }
}

/// A text, or a number as it is written.
pub fn text_of(node: &MarkedYamlOwned) -> Option<String> {
    match &node.data {
        YamlDataOwned::Value(ScalarOwned::String(text)) => Some(text.clone()),
        YamlDataOwned::Value(ScalarOwned::Integer(value)) => Some(value.to_string()),
        YamlDataOwned::Value(ScalarOwned::FloatingPoint(value)) => Some(value.to_string()),
        _ => None,
    }
}

#[expect(clippy::cast_precision_loss, reason = "configuration numbers are small")]
fn number_of(node: &MarkedYamlOwned) -> Option<f64> {
    match &node.data {
        YamlDataOwned::Value(ScalarOwned::Integer(value)) => Some(*value as f64),
        YamlDataOwned::Value(ScalarOwned::FloatingPoint(value)) => Some(value.0),
        _ => None,
    }
}

fn shown(node: &MarkedYamlOwned) -> String {
    match &node.data {
        YamlDataOwned::Value(ScalarOwned::Boolean(value)) => format!("`{value}`"),
        YamlDataOwned::Sequence(_) => "a list".into(),
        YamlDataOwned::Mapping(_) => "a mapping".into(),
        _ => text_of(node).map_or("this value".into(), |text| format!("`{text}`")),
    }
}
