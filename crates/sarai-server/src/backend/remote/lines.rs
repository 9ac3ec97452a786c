//! The stream of a host, line by line: it is complete only with its own final mark, and nothing that is no line of its API is passed on.
//!
//! How long a line and an answer may be is bounded here; how long they may take is not (`dispatch`), but for what follows their end.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt, Stream, StreamExt, stream};
use sarai_api::openai::remote::SseReader;
use sarai_api::{RemoteLine, ollama};
use sarai_core::{Error, Event, RemoteCause};

use super::MAX_WHOLE_BYTES;
use super::refusal::{is_about_ability, is_about_length};
use crate::backend::EventStream;

/// The longest line that a host may send, in bytes: Ollama's last one may have all tokens of a context as numbers.
const MAX_LINE_BYTES: usize = 2 << 20;
/// More than any model says: an answer that is wanted whole is kept, and what is out of a stream is remembered.
const MAX_ANSWER_BYTES: usize = 128 << 20;
/// How long the end of a body may follow its end mark.
const END_OF_BODY: Duration = Duration::from_secs(1);

type Chunks = std::pin::Pin<Box<dyn Stream<Item = Result<Bytes, reqwest::Error>> + Send>>;

/// Reads one kind of line.
pub(super) enum Reader {
    Ndjson,
    Sse(SseReader),
    /// It was asked to stream and answers whole: the body is one line, whatever line ends it has.
    Whole(SseReader),
}

impl Reader {
    fn line(&mut self, line: &[u8]) -> Result<RemoteLine, RemoteCause> {
        match self {
            Self::Ndjson => ollama::parse_line(line),
            Self::Sse(reader) => reader.line(line),
            Self::Whole(reader) => reader.whole(line),
        }
    }

    /// Whether it has reported that the request is wrong.
    fn says_that_the_request_is_wrong(&self) -> bool {
        match self {
            Self::Ndjson => false,
            Self::Sse(reader) | Self::Whole(reader) => reader.is_the_clients,
        }
    }

    /// The end of a body that came without a further mark.
    fn end(&self) -> Option<Event> {
        match self {
            Self::Ndjson => None,
            Self::Sse(reader) | Self::Whole(reader) => reader.end(),
        }
    }
}

struct Lines {
    host: String,
    reader: Reader,
    chunks: Chunks,
    buffer: BytesMut,
    /// Bytes that have come.
    read: usize,
    waiting: VecDeque<Event>,
    /// Whether any of the answer is out.
    has_begun: bool,
    finished: bool,
}

/// The events of a host's stream. One that ends before its end mark ends with an error.
pub(super) fn events(
    reader: Reader,
    host: String,
    chunks: impl Stream<Item = Result<Bytes, reqwest::Error>> + Send + 'static,
) -> EventStream {
    let lines = Lines {
        host,
        reader,
        chunks: Box::pin(chunks),
        buffer: BytesMut::new(),
        read: 0,
        waiting: VecDeque::new(),
        has_begun: false,
        finished: false,
    };
    Box::pin(stream::unfold(lines, |mut lines| async move {
        let event = lines.next().await?;
        lines.finished |= event.is_err() || matches!(event, Ok(Event::Done { .. }));
        if matches!(event, Ok(Event::Done { .. })) {
            lines.read_to_the_end();
        }
        Some((event, lines))
    }))
}

impl Lines {
    /// Reads what follows the end mark, which is nothing: only then can the connection serve the next request.
    fn read_to_the_end(&mut self) {
        let mut chunks = std::mem::replace(&mut self.chunks, Box::pin(stream::empty()));
        let mut rest = Box::pin(async move { while chunks.next().await.is_some() {} });
        // It is there, or once the connection's task had its turn, which it mostly has before who asks next: nobody waits for it.
        if (&mut rest).now_or_never().is_none() {
            tokio::spawn(tokio::time::timeout(END_OF_BODY, rest));
        }
    }

    async fn next(&mut self) -> Option<Result<Event, Error>> {
        if self.finished {
            return None;
        }
        let step = self.step().await;
        self.has_begun |= matches!(step, Ok(Event::Text(_) | Event::Extra(_)));
        Some(step.map_err(|cause| {
            let cause = match cause {
                RemoteCause::Reported(message) if !self.has_begun && is_about_ability(&message) => {
                    RemoteCause::Unable(message)
                }
                RemoteCause::Reported(message)
                    if !self.has_begun
                        && self.reader.says_that_the_request_is_wrong()
                        && !is_about_length(&message) =>
                {
                    let message = format!("host {} refuses the request: {message}", self.host);
                    return Error::InvalidRequest { message, param: None };
                }
                // Some refuse a prompt in a stream of their own, with status 200.
                RemoteCause::Reported(message) if !self.has_begun && is_about_length(&message) => {
                    RemoteCause::TooLong(message)
                }
                cause => cause,
            };
            Error::Remote { host: self.host.clone(), cause }
        }))
    }

    async fn step(&mut self) -> Result<Event, RemoteCause> {
        if let Some(event) = self.waiting.pop_front() {
            return Ok(event);
        }
        if let Some(event) = self.buffered()? {
            return Ok(event);
        }
        let next = match self.reader.end() {
            None => self.chunks.next().await,
            // Only its usage may follow.
            Some(_) => tokio::time::timeout(END_OF_BODY, self.chunks.next()).await.unwrap_or(None),
        };
        match next {
            Some(Ok(chunk)) => {
                self.buffer.extend_from_slice(&chunk);
                self.read += chunk.len();
                if self.read > MAX_ANSWER_BYTES && matches!(self.reader, Reader::Ndjson | Reader::Sse(_)) {
                    return Err(RemoteCause::Garbled(format!("an answer of more than {MAX_ANSWER_BYTES} bytes")));
                }
                // Heartbeats, or half a line: it lives.
                Ok(self.buffered()?.unwrap_or(Event::Alive))
            }
            // What is left without a line end may be garbage, such as an HTML page: say which it is. Or it is all there was.
            Some(Err(_)) => {
                let is_half_a_line = [&b"{"[..], b"data:"].iter().any(|begins| self.buffer.starts_with(begins));
                match self.rest() {
                    Ok(rest) => rest.ok_or(RemoteCause::Cut),
                    Err(RemoteCause::Garbled(_)) if is_half_a_line => self.reader.end().ok_or(RemoteCause::Cut),
                    Err(cause) => self.reader.end().ok_or(cause),
                }
            }
            None => self.rest().and_then(|end| end.ok_or(RemoteCause::Cut)),
        }
    }

    /// The next event of what has come.
    fn buffered(&mut self) -> Result<Option<Event>, RemoteCause> {
        let line_end = |buffer: &BytesMut| buffer.iter().position(|&byte| byte == b'\n');
        while let Some(at) = line_end(&self.buffer).filter(|_| !matches!(self.reader, Reader::Whole(_))) {
            let line = self.buffer.split_to(at + 1);
            let RemoteLine { step, end } = match self.reader.line(&line) {
                // It has ended: what follows is of no account.
                Err(cause) => return self.reader.end().map(Some).ok_or(cause),
                Ok(read) => read,
            };
            self.waiting.extend(step.into_iter().chain(end));
            if let Some(event) = self.waiting.pop_front() {
                return Ok(Some(event));
            }
        }
        let (most, what) = match self.reader {
            Reader::Whole(_) => (MAX_WHOLE_BYTES, "an answer"),
            _ => (MAX_LINE_BYTES, "a line"),
        };
        match self.buffer.len() > most {
            true => Err(RemoteCause::Garbled(format!("{what} of more than {most} bytes"))),
            false => Ok(None),
        }
    }

    /// The end, if what came without a further line makes one.
    fn rest(&mut self) -> Result<Option<Event>, RemoteCause> {
        let rest = self.buffer.split();
        let RemoteLine { step, end } = self.reader.line(&rest)?;
        let Some(end) = end.or_else(|| self.reader.end()) else { return Ok(None) };
        self.waiting.extend(step.into_iter().chain([end]));
        Ok(self.waiting.pop_front())
    }
}
