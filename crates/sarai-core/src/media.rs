//! What a message shows or lets hear.

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::{Deserialize, Serialize};

/// Pixels of a picture at most: 4096 x 3072, as telephones make them. The plan of memory counts on this limit and the next ones.
pub const MOST_PIXELS: u64 = 4096 * 3072;
/// What a picture may become where a model takes pictures in their own size. One that is up to 200 times as long as it is wide stays
/// below, since a single line of tokens is the least.
pub const MOST_PICTURE_TOKENS: u32 = 1024;

/// Which sense a model needs for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MediaKind {
    /// A picture.
    Image,
    /// A piece of sound.
    Audio,
}

impl MediaKind {
    /// For people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Audio => "audio",
        }
    }

    /// What a model is called that has the sense, as Ollama lists it.
    #[must_use]
    pub const fn capability(self) -> &'static str {
        match self {
            Self::Image => "vision",
            Self::Audio => "audio",
        }
    }
}

/// Where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MediaSource {
    /// Here, as the client sent it: a file in base64.
    Base64(String),
    /// Elsewhere.
    Url(String),
}

/// One picture, or one piece of sound.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Media {
    /// Which of them.
    pub kind: MediaKind,
    /// Where it is.
    pub source: MediaSource,
    /// How many bytes of the message's text stand before it.
    pub at: usize,
    /// The field that it came in, for errors.
    pub param: String,
}

/// Padding is not everybody's habit.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The bytes that a text in base64 stands for; line breaks in it are overlooked.
#[must_use]
pub fn from_base64(text: &str) -> Option<Vec<u8>> {
    if !text.bytes().any(|byte| byte.is_ascii_whitespace()) {
        return BASE64.decode(text).ok();
    }
    let compact: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    BASE64.decode(compact).ok()
}

/// Bytes as text in base64.
#[must_use]
pub fn to_base64(bytes: &[u8]) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::{from_base64, to_base64};

    #[test]
    fn base64_may_lack_its_padding_and_have_line_breaks() {
        assert_eq!(to_base64(b"hi"), "aGk=");
        for text in ["aGk=", "aGk", "aG\nk=\r\n"] {
            assert_eq!(from_base64(text).as_deref(), Some(&b"hi"[..]), "{text:?}");
        }
        assert_eq!(from_base64("a*k="), None);
    }
}
