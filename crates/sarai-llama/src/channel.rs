//! The worker's end of the socket pair: a thread that reads frames, and a writer that batches them.

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use sarai_core::frame::{self, FromWorker, HEADER_BYTES, ToWorker};

use crate::{media, trial};

/// Commands that wait for the engine at most. The server sends at most two per sequence at a time.
const WAITING_COMMANDS: usize = 1024;

/// What an engine waits for.
pub enum Incoming {
    /// A command of the server.
    Command(ToWorker),
    /// A prompt whose pictures and sound were read.
    Read(media::Read),
    /// What has become of the form of an answer, by its number.
    Tried(u64, trial::Ended),
}

/// Where what comes for the engine is put, and where it finds it.
pub struct Inbox {
    /// For others in this process.
    pub sender: SyncSender<Incoming>,
    /// For the engine.
    pub receiver: Receiver<Incoming>,
}

/// Starts reading the server's commands.
pub fn open(socket: OwnedFd) -> anyhow::Result<(Inbox, FrameWriter)> {
    let socket = UnixStream::from(socket);
    socket.set_nonblocking(false)?;
    let reader = socket.try_clone()?;
    let (sender, receiver) = sync_channel(WAITING_COMMANDS);
    let commands = sender.clone();
    std::thread::Builder::new().name("frames".into()).spawn(move || {
        let _ = read_all(reader, &commands);
        // The server is gone or sends nonsense: there is nobody to compute for, not even for this step. An exit
        // would run C++ destructors beside the threads that compute.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    })?;
    Ok((Inbox { sender, receiver }, FrameWriter { socket, buffer: Vec::new() }))
}

fn read_all(mut socket: UnixStream, sender: &SyncSender<Incoming>) -> anyhow::Result<()> {
    let mut header = [0; HEADER_BYTES];
    loop {
        socket.read_exact(&mut header)?;
        let mut body = vec![0; frame::body_length(header)?];
        socket.read_exact(&mut body)?;
        sender.send(Incoming::Command(frame::decode(&body)?))?;
    }
}

/// Writes frames; those of one step leave in one system call.
pub struct FrameWriter {
    socket: UnixStream,
    buffer: Vec<u8>,
}

impl FrameWriter {
    /// Adds a frame to the step.
    pub fn queue(&mut self, frame: &FromWorker) -> anyhow::Result<()> {
        Ok(frame::encode(frame, &mut self.buffer)?)
    }

    /// Sends what was added.
    pub fn flush(&mut self) -> anyhow::Result<()> {
        self.socket.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }

    /// Sends one frame at once.
    pub fn send(&mut self, frame: &FromWorker) -> anyhow::Result<()> {
        self.queue(frame)?;
        self.flush()
    }
}
