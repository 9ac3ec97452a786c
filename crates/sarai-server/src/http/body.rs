//! Reading a request body, bounded.

use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::extract::Request;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use sarai_core::Error;
use tokio::sync::SemaphorePermit;

use super::App;

/// What a too large body is read on for, so that its client gets to read the answer.
const DRAINED_BYTES: usize = 256 << 20;

/// Such a body is read whatever others there are.
const SMALL_BYTES: usize = 64 << 10;

/// Reads the body up to the limit; each piece must come within the stall deadline.
///
/// # Errors
/// It is larger, or the client stopped sending.
pub async fn read(request: Request<Body>, app: &App) -> Result<Bytes, Error> {
    let limit_bytes = app.max_body_bytes;
    // Given back with the body's end: requests that were read have a bound of their own.
    let mut held: Option<SemaphorePermit<'_>> = None;
    let mut has_room = true;
    let mut chunks = request.into_body().into_data_stream();
    let mut body = BytesMut::new();
    let mut total = 0;
    while let Some(chunk) = next_in_time(&mut chunks, app.stall).await? {
        let chunk = chunk.map_err(|error| Error::InvalidRequest {
            message: format!("the body could not be read to its end ({error}): send all of it"),
            param: None,
        })?;
        total += chunk.len();
        if total <= limit_bytes {
            let kib = u32::try_from(chunk.len().div_ceil(1 << 10)).unwrap_or(u32::MAX);
            match (app.bodies.try_acquire_many(kib), &mut held) {
                (Ok(more), Some(held)) => held.merge(more),
                (Ok(more), held) => *held = Some(more),
                // It is read on all the same, so that its client gets to read the answer.
                (Err(_), _) if total > SMALL_BYTES => has_room = false,
                (Err(_), _) => {}
            }
            body.extend_from_slice(&chunk);
        }
        if total > limit_bytes || !has_room {
            (body, held) = (BytesMut::new(), None);
        }
        if total > DRAINED_BYTES {
            break;
        }
    }
    match total > limit_bytes {
        true => Err(Error::BodyTooLarge { limit_bytes }),
        false if !has_room => Err(app.gateway.admission.overloaded()),
        false => Ok(body.freeze()),
    }
}

type Piece = Option<Result<Bytes, axum::Error>>;

async fn next_in_time(chunks: &mut BodyDataStream, limit: Duration) -> Result<Piece, Error> {
    tokio::time::timeout(limit, chunks.next()).await.map_err(|_| Error::InvalidRequest {
        message: format!(
            "no more of the body came within {} s (server.stall_seconds): send all of it",
            limit.as_secs()
        ),
        param: None,
    })
}
