//! A host that does what a test says, and remembers what it was asked. It stands beside the real ones: none of them
//! stalls, cuts or tells what it was sent on demand.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Answer, smollm2};

/// What it does, one after the other; then it closes the connection.
#[derive(Clone, Debug)]
pub enum Step {
    Send(String),
    Wait(Duration),
    /// Says nothing until the other side leaves.
    Hold,
}

/// What it was asked.
#[derive(Clone, Debug)]
pub struct Asked {
    pub head: String,
    pub body: Value,
    /// When the other side left before the answer was over.
    pub left: Option<Instant>,
    pub is_over: bool,
}

pub struct Host {
    pub url: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Host {
    /// `steps` says what to do about a request, by its number.
    pub fn start(steps: impl Fn(usize, &Value) -> Vec<Step> + Send + Sync + 'static) -> Self {
        Self::start_at("127.0.0.1:0", steps)
    }

    /// Says nothing to whoever looks at it.
    pub fn start_unseen(steps: impl Fn(usize, &Value) -> Vec<Step> + Send + Sync + 'static) -> Self {
        Self::launch("127.0.0.1:0", false, steps)
    }

    pub fn start_at(address: &str, steps: impl Fn(usize, &Value) -> Vec<Step> + Send + Sync + 'static) -> Self {
        Self::launch(address, true, steps)
    }

    fn launch(
        address: &str,
        is_seen: bool,
        steps: impl Fn(usize, &Value) -> Vec<Step> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (asked, steps) = (Arc::new(Mutex::new(Vec::new())), Arc::new(steps));
        let table = Arc::clone(&asked);
        std::thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                let (table, steps) = (Arc::clone(&table), Arc::clone(&steps));
                std::thread::spawn(move || drop(serve(socket, is_seen, &table, &*steps)));
            }
        });
        Self { url, asked }
    }

    /// All that were asked of it so far; probes of a breaker and looks are left out.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// Waits until what it was asked is as wanted.
    pub async fn until(&self, what: &str, is: impl Fn(&[Asked]) -> bool) -> Vec<Asked> {
        let began = Instant::now();
        loop {
            let asked = self.asked();
            if is(&asked) {
                return asked;
            }
            assert!(began.elapsed() < Duration::from_secs(20), "never came: {what}; {asked:?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

fn serve(
    mut socket: TcpStream,
    is_seen: bool,
    table: &Mutex<Vec<Asked>>,
    steps: &dyn Fn(usize, &Value) -> Vec<Step>,
) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut buffer = [0; 65536];
    let (head, body) = loop {
        if let Some(at) = request.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&request[..at]).into_owned();
            let length = head.to_ascii_lowercase();
            let length = length.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
            if request.len() >= at + 4 + length.unwrap_or(0) {
                break (head, request[at + 4..].to_vec());
            }
        }
        let read = socket.read(&mut buffer)?;
        if read == 0 {
            return Ok(());
        }
        request.extend_from_slice(&buffer[..read]);
    };
    if head.starts_with("GET ") && !is_seen {
        return socket.read(&mut buffer).map(drop);
    }
    if head.starts_with("GET ") {
        let list = json!({ "models": [{ "name": "m:latest" }], "data": [
            { "id": "m" },
            { "id": "reader", "architecture": { "input_modalities": ["text"] }, "status": { "value": "loaded" } },
        ] })
        .to_string();
        return socket.write_all(format!("{}{list}", ok("application/json")).as_bytes());
    }
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let is_probe = body["options"]["num_predict"] == 1 || body["max_tokens"] == 1;
    let number = {
        let mut table = table.lock().unwrap();
        if !is_probe {
            table.push(Asked { head, body: body.clone(), left: None, is_over: false });
        }
        table.len().saturating_sub(1)
    };
    let outcome = steps(number, &body).into_iter().try_for_each(|step| match step {
        Step::Send(text) => socket.write_all(text.as_bytes()),
        Step::Wait(time) => {
            std::thread::sleep(time);
            Ok(())
        }
        Step::Hold => match socket.read(&mut buffer) {
            Ok(0) => Err(std::io::ErrorKind::UnexpectedEof.into()),
            outcome => outcome.map(drop),
        },
    });
    if !is_probe {
        let asked = &mut table.lock().unwrap()[number];
        asked.is_over = outcome.is_ok();
        asked.left = outcome.is_err().then(Instant::now);
    }
    outcome
}

/// The head of an answer that ends with its connection.
pub fn ok(kind: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n")
}

/// One line of Ollama's chat.
pub fn line(text: &str) -> String {
    format!("{}\n", json!({ "model": "m", "message": { "role": "assistant", "content": text }, "done": false }))
}

/// The last one, with what else it says.
pub fn last_line(more: Value) -> String {
    let mut line = json!({
        "model": "m", "message": { "role": "assistant", "content": "" }, "done": true, "done_reason": "stop",
        "prompt_eval_count": 3, "eval_count": 3,
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        line[key] = value.clone();
    }
    format!("{line}\n")
}

/// A whole answer of Ollama's chat.
pub fn ollama(texts: &[&str]) -> Vec<Step> {
    let lines: String = texts.iter().map(|text| line(text)).collect();
    vec![Step::Send(format!("{}{lines}{}", ok("application/x-ndjson"), last_line(json!({}))))]
}

/// A whole streamed answer of OpenAI's chat, chunk by chunk.
pub fn openai(chunks: &[Value]) -> Vec<Step> {
    let events: String = chunks.iter().map(|chunk| format!("data: {chunk}\n\n")).collect();
    vec![Step::Send(format!("{}{events}data: [DONE]\n\n", ok("text/event-stream")))]
}

/// Who has answered, or nothing.
pub fn served_by(answer: &Answer) -> &str {
    answer.header("x-sarai-served-by").unwrap_or_default()
}

/// `solar` on one host, whatever else is said of it.
pub fn on_host(url: &str, more: &str) -> String {
    format!("models:\n  solar:\n    backend: ollama_http\n    url: \"{url}\"\n    model_name: m\n{more}")
}

/// With a worker of this file as its fallback.
pub fn with_worker(more: &str) -> String {
    format!("    fallback: gguf_native\n    gguf_path: {}\n    context_length: 1024\n{more}", smollm2())
}
