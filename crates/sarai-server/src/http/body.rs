//! Reading a request body, bounded.

use axum::body::Body;
use axum::extract::Request;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use sarai_core::Error;

/// What a too large body is read on for, so that its client gets to read the answer.
const DRAINED_BYTES: usize = 256 << 20;

/// Reads the body up to a limit.
///
/// # Errors
/// It is larger, or the client stopped sending.
pub async fn read(request: Request<Body>, limit_bytes: usize) -> Result<Bytes, Error> {
    let mut chunks = request.into_body().into_data_stream();
    let mut body = BytesMut::new();
    let mut total = 0;
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| Error::InvalidRequest {
            message: format!("the body could not be read to its end ({error}): send all of it"),
            param: None,
        })?;
        total += chunk.len();
        if total <= limit_bytes {
            body.extend_from_slice(&chunk);
        } else {
            body.clear();
        }
        if total > DRAINED_BYTES {
            break;
        }
    }
    if total > limit_bytes { Err(Error::BodyTooLarge { limit_bytes }) } else { Ok(body.freeze()) }
}
