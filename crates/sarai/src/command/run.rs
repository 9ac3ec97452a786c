//! `sarai run`: one answer, or a conversation.

use std::io::{BufRead, IsTerminal, Read};
use std::process::ExitCode;

use futures_util::StreamExt;
use serde_json::{Value, json};

use super::client::Server;
use crate::args::RunArgs;
use crate::{Failure, command, log};

/// Asks once if there is a prompt, else converses until the end of input.
pub fn run(args: &RunArgs) -> Result<ExitCode, Failure> {
    let server = Server::at(&args.server)?;
    let runtime = command::runtime()?;
    let mut messages = Vec::new();
    let ask =
        |messages: &mut Vec<Value>, prompt: &str| runtime.block_on(answer(&server, &args.model, messages, prompt));
    if !args.prompt.is_empty() {
        ask(&mut messages, &args.prompt.join(" "))?;
    } else if std::io::stdin().is_terminal() {
        log::complain("Ask, and end with Ctrl-D.");
        loop {
            log::print(">>> ");
            let mut line = String::new();
            if std::io::stdin().lock().read_line(&mut line).map_err(Failure::failed)? == 0 {
                break;
            }
            if line.trim().is_empty() {
                continue;
            }
            // The conversation goes on after an answer that failed, as if it had not been asked.
            let turns = messages.len();
            if let Err(failure) = ask(&mut messages, line.trim()) {
                messages.truncate(turns);
                log::complain(&format!("sarai: {:#}", failure.error));
            }
        }
    } else {
        let mut prompt = String::new();
        std::io::stdin().read_to_string(&mut prompt).map_err(Failure::failed)?;
        ask(&mut messages, prompt.trim())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Streams the answer to the terminal and adds both turns to the conversation.
async fn answer(server: &Server, model: &str, messages: &mut Vec<Value>, prompt: &str) -> Result<(), Failure> {
    messages.push(json!({ "role": "user", "content": prompt }));
    let body = json!({ "model": model, "messages": messages });
    let response = server.post("/api/chat", &body).await?;
    let mut chunks = response.bytes_stream();
    let (mut buffer, mut answer) = (Vec::new(), String::new());
    while let Some(chunk) = chunks.next().await {
        buffer.extend_from_slice(&chunk.map_err(Failure::failed)?);
        while let Some(end) = buffer.iter().position(|&byte| byte == b'\n') {
            let line: Value = serde_json::from_slice(&buffer[..end]).map_err(Failure::failed)?;
            buffer.drain(..=end);
            if let Some(error) = line["error"].as_str() {
                log::print("\n");
                return Err(Failure::failed(anyhow::anyhow!(error.to_owned())));
            }
            if let Some(percent) = line["sarai"]["loading_percent"].as_u64() {
                log::complain(&format!("loading, {percent} %"));
            }
            let text = line["message"]["content"].as_str().unwrap_or_default();
            answer.push_str(text);
            if !log::print(text) {
                return Ok(());
            }
            if line["done"] == true {
                log::print("\n");
                messages.push(json!({ "role": "assistant", "content": answer }));
                if let Some(reason) = line["sarai"]["fallback_reason"].as_str() {
                    log::complain(&format!(
                        "(served by {}: {reason})",
                        line["sarai"]["served_by"].as_str().unwrap_or_default()
                    ));
                }
                return Ok(());
            }
        }
    }
    Err(Failure::failed(anyhow::anyhow!("the server cut its answer")))
}
