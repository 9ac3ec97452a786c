//! A host that misbehaves on demand, in Ollama's or OpenAI's API.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use sarai_core::Api;

/// Pieces of the whole answer.
pub const PIECES: usize = 12;
/// After so many pieces come the faults in the middle.
const MIDDLE: usize = 5;
/// How long headers or pieces take where they are slow.
const SLOW_HEADERS: Duration = Duration::from_millis(900);
const SLOW_PIECE: Duration = Duration::from_millis(150);
/// Longer than any line may be.
const HUGE_BYTES: usize = 3 << 20;

/// What a host does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Nothing.
    None,
    /// Nothing listens.
    Refuse,
    /// Status 500.
    Status500,
    /// Status 503, with `Retry-After`.
    Status503,
    /// Status 404: it lacks the model.
    Missing,
    /// It takes the request and says nothing.
    Hang,
    /// Its headers take a while; then all is well.
    SlowHeaders,
    /// All is well, but each piece takes a while.
    VerySlow,
    /// A 200 that is a page.
    WrongType,
    /// A 200 without a body.
    Empty,
    /// The connection is reset after so many pieces.
    Cut(usize),
    /// The body ends cleanly after so many pieces, without the end mark.
    EndsEarly(usize),
    /// Silence after so many pieces.
    Stall(usize),
    /// A line that is no JSON.
    Garbage(usize),
    /// Half a line, then a clean end.
    HalfJson(usize),
    /// A line of megabytes.
    HugeLine(usize),
    /// The host reports an error inside its stream.
    Reports(usize),
}

impl Fault {
    /// The whole matrix.
    pub const ALL: [Self; 22] = [
        Self::None,
        Self::Refuse,
        Self::Status500,
        Self::Status503,
        Self::Missing,
        Self::Hang,
        Self::SlowHeaders,
        Self::VerySlow,
        Self::WrongType,
        Self::Empty,
        Self::Cut(0),
        Self::Cut(1),
        Self::Cut(MIDDLE),
        Self::EndsEarly(0),
        Self::EndsEarly(MIDDLE),
        Self::Stall(0),
        Self::Stall(MIDDLE),
        Self::Garbage(0),
        Self::Garbage(MIDDLE),
        Self::HalfJson(MIDDLE),
        Self::HugeLine(MIDDLE),
        Self::Reports(MIDDLE),
    ];

    /// As it stands in the table.
    pub fn name(self) -> String {
        let after = |what: &str, n: usize| format!("{what} after {n}");
        match self {
            Self::None => "none".into(),
            Self::Refuse => "refuse".into(),
            Self::Status500 => "status 500".into(),
            Self::Status503 => "status 503 + Retry-After".into(),
            Self::Missing => "model missing (404)".into(),
            Self::Hang => "hang before headers".into(),
            Self::SlowHeaders => "slow headers".into(),
            Self::VerySlow => "very slow".into(),
            Self::WrongType => "a page instead".into(),
            Self::Empty => "empty body".into(),
            Self::Cut(n) => after("cut", n),
            Self::EndsEarly(n) => after("clean end", n),
            Self::Stall(n) => after("stall", n),
            Self::Garbage(n) => after("garbage line", n),
            Self::HalfJson(n) => after("half a line", n),
            Self::HugeLine(n) => after("huge line", n),
            Self::Reports(n) => after("error event", n),
        }
    }

    /// Pieces that come before the fault; all where there is none.
    pub const fn pieces(self) -> usize {
        match self {
            Self::None | Self::SlowHeaders | Self::VerySlow => PIECES,
            Self::Cut(n)
            | Self::EndsEarly(n)
            | Self::Stall(n)
            | Self::Garbage(n)
            | Self::HalfJson(n)
            | Self::HugeLine(n)
            | Self::Reports(n) => n,
            _ => 0,
        }
    }
}

/// The first pieces of the answer that every host here gives.
pub fn text(pieces: usize) -> String {
    (0..pieces).map(piece).collect()
}

fn piece(n: usize) -> String {
    format!("drill{n} ")
}

/// A host that listens; it ends when it is dropped.
#[derive(Debug)]
pub struct Upstream {
    /// Its base URL.
    pub url: String,
    serving: Option<JoinHandle<()>>,
}

impl Drop for Upstream {
    fn drop(&mut self) {
        if let Some(serving) = &self.serving {
            serving.abort();
        }
    }
}

impl Upstream {
    /// Listens on a free port.
    ///
    /// # Errors
    /// There is none.
    pub async fn start(api: Api, fault: Fault) -> std::io::Result<Self> {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
        let base = match api {
            Api::Ollama => "",
            Api::OpenAi => "/v1",
        };
        let url = format!("http://{}{base}", listener.local_addr()?);
        let serving = (fault != Fault::Refuse).then(|| {
            tokio::spawn(async move {
                // A set, so that its connections end with it.
                let mut connections = tokio::task::JoinSet::new();
                while let Ok((socket, _)) = listener.accept().await {
                    connections.spawn(serve(socket, api, fault));
                    while connections.try_join_next().is_some() {}
                }
            })
        });
        Ok(Self { url, serving })
    }
}

async fn serve(mut socket: TcpStream, api: Api, fault: Fault) {
    if read_request(&mut socket).await.is_some() {
        // A client that has left is none of a host's business.
        let _ = answer(&mut socket, api, fault).await;
    }
}

/// Reads one request to its end.
async fn read_request(socket: &mut TcpStream) -> Option<()> {
    let mut request = Vec::new();
    let mut buffer = [0; 8192];
    loop {
        if let Some(at) = request.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&request[..at]).to_ascii_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
            if request.len() >= at + 4 + length.unwrap_or(0) {
                return Some(());
            }
        }
        let read = socket.read(&mut buffer).await.ok()?;
        if read == 0 {
            return None;
        }
        request.extend_from_slice(&buffer[..read]);
    }
}

async fn answer(socket: &mut TcpStream, api: Api, fault: Fault) -> std::io::Result<()> {
    let error = r#"{"error":"drill"}"#;
    let with_status = |status: &str, more: &str| {
        format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n{more}\r\n{error}", error.len())
    };
    match fault {
        Fault::Status500 => return socket.write_all(with_status("500 Oops", "").as_bytes()).await,
        Fault::Status503 => return socket.write_all(with_status("503 Busy", "retry-after: 30\r\n").as_bytes()).await,
        Fault::Missing => return socket.write_all(with_status("404 Not Found", "").as_bytes()).await,
        Fault::Hang => return hold(socket).await,
        Fault::WrongType => {
            let page = "<html>a page</html>";
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{page}",
                page.len()
            );
            return socket.write_all(head.as_bytes()).await;
        }
        Fault::SlowHeaders => tokio::time::sleep(SLOW_HEADERS).await,
        _ => {}
    }
    let kind = match api {
        Api::Ollama => "application/x-ndjson",
        Api::OpenAi => "text/event-stream",
    };
    let head =
        format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n");
    socket.write_all(head.as_bytes()).await?;
    for n in 0..fault.pieces() {
        chunk(socket, &line(api, n)).await?;
        if fault == Fault::VerySlow {
            tokio::time::sleep(SLOW_PIECE).await;
        }
    }
    match fault {
        Fault::None | Fault::SlowHeaders | Fault::VerySlow => chunk(socket, &end(api)).await?,
        // Without its last chunk, the body is cut.
        Fault::Cut(_) => return Ok(()),
        Fault::Stall(_) => return hold(socket).await,
        Fault::Garbage(_) => {
            chunk(socket, "\u{1}\u{2} <not json> }{\n").await?;
            chunk(socket, &end(api)).await?;
        }
        Fault::HalfJson(n) => {
            let whole = line(api, n);
            chunk(socket, &whole[..whole.len() / 2]).await?;
        }
        Fault::HugeLine(_) => {
            chunk(socket, &"x".repeat(HUGE_BYTES)).await?;
            chunk(socket, "\n").await?;
            chunk(socket, &end(api)).await?;
        }
        Fault::Reports(_) => {
            let error = r#"{"error":"the runner has ended"}"#;
            let line = match api {
                Api::Ollama => format!("{error}\n"),
                Api::OpenAi => format!("data: {error}\n\n"),
            };
            chunk(socket, &line).await?;
        }
        _ => {}
    }
    socket.write_all(b"0\r\n\r\n").await?;
    socket.shutdown().await
}

/// Says nothing until the other side gives up.
async fn hold(socket: &mut TcpStream) -> std::io::Result<()> {
    let mut buffer = [0; 64];
    while socket.read(&mut buffer).await? > 0 {}
    Ok(())
}

async fn chunk(socket: &mut TcpStream, text: &str) -> std::io::Result<()> {
    socket.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()).await
}

fn line(api: Api, n: usize) -> String {
    match api {
        Api::Ollama => {
            let message = json!({ "role": "assistant", "content": piece(n) });
            format!("{}\n", json!({ "model": "drill", "message": message, "response": piece(n), "done": false }))
        }
        Api::OpenAi => {
            let choice =
                json!({ "index": 0, "delta": { "content": piece(n) }, "text": piece(n), "finish_reason": null });
            format!("data: {}\n\n", json!({ "id": "drill", "choices": [choice] }))
        }
    }
}

fn end(api: Api) -> String {
    match api {
        Api::Ollama => {
            let done = json!({
                "model": "drill", "message": { "role": "assistant", "content": "" }, "done": true, "done_reason": "stop",
                "prompt_eval_count": 3, "eval_count": PIECES,
            });
            format!("{done}\n")
        }
        Api::OpenAi => {
            let choice = json!({ "index": 0, "delta": {}, "finish_reason": "stop" });
            let usage = json!({ "prompt_tokens": 3, "completion_tokens": PIECES });
            let mut text = format!("data: {}\n\n", json!({ "id": "drill", "choices": [choice] }));
            let _ = write!(text, "data: {}\n\ndata: [DONE]\n\n", json!({ "choices": [], "usage": usage }));
            text
        }
    }
}
