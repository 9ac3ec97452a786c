//! What a client saw, and whether it was the truth.

use serde_json::Value;

use super::upstream::{Fault, PIECES, text};

/// How a client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// OpenAI's API, streamed.
    OpenAiSse,
    /// Ollama's API, streamed.
    OllamaNdjson,
    /// OpenAI's API, whole.
    Plain,
}

impl Shape {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::OpenAiSse, Self::OllamaNdjson, Self::Plain];

    /// As it stands in the table.
    pub const fn name(self) -> &'static str {
        match self {
            Self::OpenAiSse => "OpenAI SSE",
            Self::OllamaNdjson => "Ollama NDJSON",
            Self::Plain => "plain",
        }
    }
}

/// What came to the client.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// The HTTP status; 0 without a response.
    pub status: u16,
    /// The body as it came.
    pub body: String,
    /// Who is said to have served it first.
    pub served_by: String,
}

/// What a cell of the table says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A whole answer by whoever is named.
    Served(String),
    /// A whole answer that went on elsewhere, by whoever is named.
    Resumed(String),
    /// A whole answer that says what it lacks.
    Degraded(String),
    /// No whole answer, and it was said so.
    HonestFailure(String),
    /// No whole answer, and the connection just broke off.
    Broken,
    /// It looks whole and is not, or holds what no model said.
    Lie(String),
}

impl Verdict {
    /// Whether a client could trust what it saw.
    pub const fn is_honest(&self) -> bool {
        !matches!(self, Self::Lie(_) | Self::Broken)
    }

    /// As it stands in the table.
    pub fn text(&self) -> String {
        match self {
            Self::Served(by) => format!("served by {by}"),
            Self::Resumed(by) => format!("resumed by {by}"),
            Self::Degraded(what) => format!("degraded: {what}"),
            Self::HonestFailure(code) => format!("honest failure: {code}"),
            Self::Broken => "BROKEN OFF".into(),
            Self::Lie(why) => format!("LIE: {why}"),
        }
    }
}

/// A body taken apart.
#[derive(Default)]
struct Parts {
    text: String,
    finish: Option<String>,
    is_ended: bool,
    error: Option<String>,
    extension: Value,
}

/// Judges one cell; `faulty` is the deployment whose host has the fault.
pub fn judge(shape: Shape, fault: Fault, faulty: &str, seen: &Seen) -> Verdict {
    let parts = match take_apart(shape, seen) {
        Ok(parts) => parts,
        Err(line) => return Verdict::Lie(format!("`{line}` is not of this API")),
    };
    if let Some(error) = parts.error {
        let is_stream = shape != Shape::Plain && seen.status == 200;
        return match is_stream && (parts.is_ended || parts.finish.is_some()) {
            true => Verdict::Lie("it ends cleanly, and with an error too".into()),
            false => Verdict::HonestFailure(error),
        };
    }
    if !parts.is_ended || parts.finish.is_none() {
        return Verdict::Broken;
    }
    if seen.status != 200 {
        return Verdict::Lie(format!("status {} with an answer", seen.status));
    }
    let (whole, before) = (text(PIECES), text(fault.pieces()));
    let resumed = parts.extension["resumed"].as_array().and_then(|resumed| resumed.last()?["by"].as_str());
    if let Some(by) = resumed {
        let rest = parts.text.strip_prefix(before.as_str());
        if rest.is_none_or(|rest| rest.trim_start().starts_with(text(2).trim_end())) {
            return Verdict::Lie(format!("resumed, but it reads `{}`", shortened(&parts.text)));
        }
        if by.contains("_http(") && parts.text != whole {
            return Verdict::Lie(format!("resumed by a host that is well, but it reads `{}`", shortened(&parts.text)));
        }
        return Verdict::Resumed(by.to_owned());
    }
    let is_from_host = parts.text.contains("drill0 ");
    if (is_from_host || seen.served_by == faulty) && parts.text != whole {
        return Verdict::Lie(format!("it ends cleanly with `{}`", shortened(&parts.text)));
    }
    let degraded = parts.extension["degraded"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let degraded: Vec<_> = degraded.collect();
    if degraded.is_empty() { Verdict::Served(seen.served_by.clone()) } else { Verdict::Degraded(degraded.join(", ")) }
}

fn shortened(text: &str) -> String {
    let end: String = text.chars().rev().take(30).collect();
    end.chars().rev().collect()
}

/// # Errors
/// A line that does not belong to the API.
fn take_apart(shape: Shape, seen: &Seen) -> Result<Parts, String> {
    let mut parts = Parts::default();
    if shape == Shape::Plain || seen.status != 200 {
        if seen.body.is_empty() {
            return Ok(parts);
        }
        let body: Value = serde_json::from_str(&seen.body).map_err(|_| shortened(&seen.body))?;
        parts.error = error_of(&body);
        parts.text = body["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned();
        parts.finish = body["choices"][0]["finish_reason"].as_str().map(str::to_owned);
        parts.is_ended = true;
        parts.extension = body["sarai"].clone();
        return Ok(parts);
    }
    for line in seen.body.lines().filter(|line| !line.is_empty()) {
        let json = match shape {
            Shape::OllamaNdjson => line,
            _ if line.starts_with(':') => continue,
            _ => line.strip_prefix("data: ").ok_or_else(|| shortened(line))?,
        };
        if json == "[DONE]" {
            parts.is_ended = true;
            continue;
        }
        let value: Value = serde_json::from_str(json).map_err(|_| shortened(line))?;
        parts.error = parts.error.or_else(|| error_of(&value));
        let (text, finish) = match shape {
            Shape::OllamaNdjson => (&value["message"]["content"], &value["done_reason"]),
            _ => (&value["choices"][0]["delta"]["content"], &value["choices"][0]["finish_reason"]),
        };
        parts.text.push_str(text.as_str().unwrap_or_default());
        parts.finish = finish.as_str().map(str::to_owned).or(parts.finish);
        parts.is_ended |= value["done"] == true;
        if value["sarai"].is_object() {
            parts.extension = value["sarai"].clone();
        }
    }
    Ok(parts)
}

fn error_of(value: &Value) -> Option<String> {
    let error = value.get("error").filter(|error| !error.is_null())?;
    let said = error["code"].as_str().or(error["message"].as_str()).or(error.as_str());
    Some(said.unwrap_or("an error").chars().take(60).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "solar@ollama_http(h)";

    fn seen(body: &str) -> Seen {
        Seen { status: 200, body: body.to_owned(), served_by: HOST.to_owned() }
    }

    fn line(text: &str) -> String {
        format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}},\"finish_reason\":null}}]}}\n\n")
    }

    const STOP: &str =
        "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}],\"sarai\":{}}\n\ndata: [DONE]\n\n";

    #[test]
    fn a_cut_answer_that_ends_with_stop_is_a_lie_and_a_whole_one_is_served() {
        let cut = format!("{}{STOP}", line(&text(3)));
        assert!(matches!(judge(Shape::OpenAiSse, Fault::Cut(3), HOST, &seen(&cut)), Verdict::Lie(_)));
        let whole = format!("{}{STOP}", line(&text(PIECES)));
        assert_eq!(judge(Shape::OpenAiSse, Fault::None, HOST, &seen(&whole)), Verdict::Served(HOST.into()));
    }

    #[test]
    fn garbage_that_was_passed_on_is_a_lie_and_an_error_event_is_honest() {
        let garbage = format!("{}<html>\n{STOP}", line(&text(3)));
        assert!(matches!(judge(Shape::OpenAiSse, Fault::Garbage(3), HOST, &seen(&garbage)), Verdict::Lie(_)));
        let error = format!("{}data: {{\"error\":{{\"code\":\"cut\"}}}}\n\n", line(&text(3)));
        assert_eq!(judge(Shape::OpenAiSse, Fault::Cut(3), HOST, &seen(&error)), Verdict::HonestFailure("cut".into()));
        assert_eq!(judge(Shape::OpenAiSse, Fault::Cut(3), HOST, &seen(&line(&text(3)))), Verdict::Broken);
    }

    #[test]
    fn a_resumed_answer_must_begin_with_what_was_out() {
        let end = STOP.replace("{}}\n", "{\"resumed\":[{\"by\":\"solar@gguf_native\",\"reason\":\"cut\"}]}}\n");
        let good = format!("{}{}{end}", line(&text(3)), line("and more"));
        let verdict = judge(Shape::OpenAiSse, Fault::Cut(3), HOST, &seen(&good));
        assert_eq!(verdict, Verdict::Resumed("solar@gguf_native".into()));
        let doubled = format!("{}{}{end}", line(&text(3)), line(&text(3)));
        assert!(matches!(judge(Shape::OpenAiSse, Fault::Cut(3), HOST, &seen(&doubled)), Verdict::Lie(_)));
    }
}
