//! Connections: taken as they come, served until their clients leave or the server drains.
//!
//! HTTP/1 alone, by hyper's own connection: one that first looks for HTTP/2, as axum's does, keeps 8 KiB more for each stream.

use std::pin::Pin;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::Door;

/// Time for others to close files, where no more can be opened.
const REST: Duration = Duration::from_secs(1);
/// How long a connection may say nothing between two requests, or take for the head of one; nginx's usual time.
const IDLE: Duration = Duration::from_secs(75);

/// When it is to end.
pub type Stop = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Serves until `stop` completes; then takes no more, and waits for those that are served.
///
/// # Cancel safety
/// Dropped, it cuts all connections.
pub async fn serve(listener: TcpListener, door: Door, mut stop: Stop) {
    let (graceful, mut connections) = (GracefulShutdown::new(), JoinSet::new());
    loop {
        let socket = tokio::select! {
            socket = next(&listener) => socket,
            Some(_) = connections.join_next() => continue,
            () = &mut stop => break,
        };
        // Tokens are small packets: each must leave at once.
        let _ = socket.set_nodelay(true);
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(IDLE);
        let connection = http.serve_connection(TokioIo::new(socket), door.clone());
        let connection = graceful.watch(connection);
        connections.spawn(async move {
            // A client that breaks off is no matter of ours.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended");
            }
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

async fn next(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((socket, _)) => return socket,
            Err(error) if is_of_the_client(&error) => {}
            Err(error) => {
                tracing::error!(%error, "no connection can be taken");
                tokio::time::sleep(REST).await;
            }
        }
    }
}

fn is_of_the_client(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}
