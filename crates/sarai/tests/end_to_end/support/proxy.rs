//! A proxy before a host: it passes bytes on, and harms the answers to chats.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What it does to an answer after so many of its bytes.
#[derive(Clone, Copy, Debug)]
pub enum Harm {
    Cut,
    Stall,
    Garbage,
    /// All is well, byte by byte for a while.
    Crumbs,
    /// All is well, but late.
    Late,
    /// Between two chunks, as the host has sent them.
    Between(Between),
    /// Something else instead of the answer.
    Instead(&'static str),
    /// A line that does not end.
    HugeLine,
}

#[derive(Clone, Copy, Debug)]
pub enum Between {
    /// All is well, but slow.
    Slow,
    /// The transport ends as it should, the answer does not.
    CleanEnd,
    /// A chunk of its own, and then a clean end.
    Last(&'static str),
}

impl Harm {
    pub fn is_harmless(self) -> bool {
        matches!(self, Self::Crumbs | Self::Late | Self::Between(Between::Slow))
    }
}

/// The address of a proxy before this host.
pub fn harming(to: &str, harm: Harm, after: usize) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let to = to.strip_prefix("http://").unwrap().to_owned();
    std::thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let Ok(host) = TcpStream::connect(&to) else { continue };
            let is_chat = Arc::new(AtomicBool::new(false));
            let (asks, there, sees_chat) =
                (client.try_clone().unwrap(), host.try_clone().unwrap(), Arc::clone(&is_chat));
            std::thread::spawn(move || pass_requests(asks, there, &sees_chat));
            std::thread::spawn(move || drop(harm_answers(host, client, &is_chat, harm, after)));
        }
    });
    url
}

fn pass_requests(mut client: TcpStream, mut host: TcpStream, is_chat: &AtomicBool) {
    let mut buffer = [0; 65536];
    while let Ok(read @ 1..) = client.read(&mut buffer) {
        if buffer.starts_with(b"POST /api/chat") {
            is_chat.store(true, Ordering::SeqCst);
        }
        if host.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    let _ = host.shutdown(Shutdown::Both);
}

fn harm_answers(
    mut host: TcpStream,
    mut client: TcpStream,
    is_chat: &AtomicBool,
    harm: Harm,
    after: usize,
) -> std::io::Result<()> {
    let (mut buffer, mut passed) = ([0; 65536], 0);
    loop {
        let read = host.read(&mut buffer)?;
        if read == 0 {
            return client.shutdown(Shutdown::Write);
        }
        if !is_chat.load(Ordering::SeqCst) {
            client.write_all(&buffer[..read])?;
            continue;
        }
        if let Harm::Between(between) = harm
            && passed + read > after
        {
            client.write_all(&buffer[..read])?;
            match between {
                Between::Slow => {
                    std::thread::sleep(Duration::from_millis(150));
                    continue;
                }
                Between::CleanEnd => {}
                Between::Last(text) => client.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes())?,
            }
            client.write_all(b"0\r\n\r\n")?;
            return client.shutdown(Shutdown::Both);
        }
        let until = read.min(after.saturating_sub(passed));
        client.write_all(&buffer[..until])?;
        passed += until;
        if until == read {
            continue;
        }
        match harm {
            Harm::Between(_) => {}
            Harm::Cut => return client.shutdown(Shutdown::Both),
            Harm::Stall => {
                // Until the other side has had enough of it.
                while host.read(&mut buffer)? > 0 {}
                return Ok(());
            }
            Harm::Garbage => client.write_all(b"\x01\x02 }{ garbage\n")?,
            Harm::Crumbs => {
                for byte in &buffer[until..read] {
                    client.write_all(std::slice::from_ref(byte))?;
                }
                continue;
            }
            Harm::Late => {
                if passed == after {
                    std::thread::sleep(Duration::from_millis(700));
                    passed += 1;
                }
            }
            Harm::Instead(answer) => {
                client.write_all(answer.as_bytes())?;
                return client.shutdown(Shutdown::Both);
            }
            Harm::HugeLine => {
                client.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\n\r\n")?;
                loop {
                    client.write_all(&[b'x'; 65536])?;
                }
            }
        }
        client.write_all(&buffer[until..read])?;
    }
}
