//! Kinds of places that serve a model.

pub mod local;
pub mod remote;

use std::pin::Pin;

use futures_util::Stream;
use sarai_core::{Error, Event};

/// One answer as it streams. It owns all that the request holds, and gives it back when it is dropped.
pub type EventStream = Pin<Box<dyn Stream<Item = Result<Event, Error>> + Send>>;
