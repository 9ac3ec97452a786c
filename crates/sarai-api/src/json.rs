//! Reading a request body, with errors that name the field.

use std::fmt;
use std::marker::PhantomData;

use sarai_core::Error;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::Value;

/// A struct that must stand as an object: serde would take an array of its fields' values as well.
pub struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(ObjectVisitor(PhantomData))
    }
}

struct ObjectVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
    type Value = Object<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(Object)
    }
}

/// Reads a part of a body.
///
/// # Errors
/// It has not this shape; the error names the path of the field.
pub fn read<T: DeserializeOwned>(value: Value) -> Result<T, Error> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        Error::invalid(&path, format!("`{path}`: {}", error.into_inner()))
    })
}

/// Parses a body.
///
/// # Errors
/// It is not UTF-8 JSON of this shape; the error names the path of the field.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    let text = std::str::from_utf8(body).map_err(|error| Error::InvalidRequest {
        message: format!("the body is not valid UTF-8 at byte {}: send JSON in UTF-8", error.valid_up_to()),
        param: None,
    })?;
    // Following the path of each field takes as long as reading it: that is for those that are wrong.
    if let Ok(Object(value)) = serde_json::from_str(text) {
        return Ok(value);
    }
    let mut json = serde_json::Deserializer::from_str(text);
    let Object(value) = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        if inner.is_data() && path != "." {
            Error::invalid(&path, format!("`{path}`: {inner}"))
        } else {
            Error::InvalidRequest { message: format!("the body is not the JSON expected here: {inner}"), param: None }
        }
    })?;
    json.end().map_err(|error| Error::InvalidRequest {
        message: format!("the body goes on after its JSON value: {error}"),
        param: None,
    })?;
    Ok(value)
}
