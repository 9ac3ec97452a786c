//! Pictures and sound in a request, as both APIs write them.

use sarai_core::media::from_base64;
use sarai_core::{Error, MediaKind, MediaSource};
use serde_json::Value;

/// What an OpenAI part holds: `{"url": …}`, `{"data": …, "format": …}`, or only the text of it.
///
/// # Errors
/// It is none of them, or what it holds is not base64; the text names the field.
pub fn media_source(param: &str, kind: MediaKind, written: Option<&Value>) -> Result<MediaSource, Error> {
    let key = match kind {
        MediaKind::Image => "url",
        MediaKind::Audio => "data",
    };
    let text = written.and_then(|value| value.as_str().or_else(|| value.get(key)?.as_str()));
    let Some(text) = text else {
        return Err(Error::invalid(param, format!("`{param}` has no `{key}`: send {{\"{key}\": …}}")));
    };
    let param = format!("{param}.{key}");
    match text.split_once(':') {
        Some(("data", rest)) => match rest.split_once(";base64,") {
            Some((_, data)) => base64(&param, data),
            None => {
                Err(Error::invalid(&param, format!("`{param}` is no data URL in base64: use data:image/png;base64,…")))
            }
        },
        Some(("http" | "https" | "file", _)) if kind == MediaKind::Image => Ok(MediaSource::Url(text.to_owned())),
        Some((scheme, _)) if kind == MediaKind::Image => Err(Error::invalid(
            &param,
            format!(
                "`{param}` begins with `{}:`: use a data URL in base64",
                scheme.chars().take(20).collect::<String>()
            ),
        )),
        _ => base64(&param, text),
    }
}

/// Whether a file in base64 is one of sound, by its first bytes: WAV, MP3 or FLAC.
pub fn is_sound(text: &str) -> bool {
    // A picture in WebP begins as WAV does.
    const LETTERS: usize = 16;
    let Some(first) = text.get(..LETTERS).and_then(from_base64) else { return false };
    match first[..] {
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'A', b'V', b'E'] => true,
        [b'f', b'L', b'a', b'C', ..] | [b'I', b'D', b'3', ..] => true,
        [0xff, second, ..] => second & 0xe0 == 0xe0,
        _ => false,
    }
}

/// A file in base64.
///
/// # Errors
/// It is not base64, or empty; the text names the field.
pub fn base64(param: &str, text: &str) -> Result<MediaSource, Error> {
    match from_base64(text) {
        Some(bytes) if !bytes.is_empty() => Ok(MediaSource::Base64(text.to_owned())),
        Some(_) => Err(Error::invalid(param, format!("`{param}` is empty: send a file in base64"))),
        None => Err(Error::invalid(param, format!("`{param}` is not base64: send a file in base64"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sound_is_told_from_pictures_by_its_first_bytes() {
        use base64::Engine;
        let is_it = |bytes: &[u8]| is_sound(&base64::engine::general_purpose::STANDARD.encode(bytes));
        for sound in [
            &b"RIFF\0\0\0\0WAVEfmt "[..],
            b"fLaC\0\0\0\x22\0\0\0\0",
            b"ID3\x04\0\0\0\0\0\0\0\0",
            b"\xff\xfb\x90\x64\0\0\0\0\0\0\0\0",
        ] {
            assert!(is_it(sound), "{sound:?}");
        }
        for picture in
            [&b"RIFF\0\0\0\0WEBPVP8 "[..], b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01", b"\x89PNG\r\n\x1a\n\0\0\0\r", b"short"]
        {
            assert!(!is_it(picture), "{picture:?}");
        }
    }

    #[test]
    fn media_are_read_in_every_way_that_clients_write_them() {
        let here = Ok(MediaSource::Base64("aGk=".into()));
        let read = |kind, value| media_source("p", kind, Some(&value));
        assert_eq!(read(MediaKind::Image, json!({ "url": "data:image/png;base64,aGk=", "detail": "low" })), here);
        assert_eq!(read(MediaKind::Image, json!("data:;base64,aGk=")), here);
        assert_eq!(read(MediaKind::Image, json!({ "url": "aGk=" })), here);
        assert_eq!(read(MediaKind::Audio, json!({ "data": "aGk=", "format": "wav" })), here);
        let url = "https://example.org/a.png";
        assert_eq!(read(MediaKind::Image, json!({ "url": url })), Ok(MediaSource::Url(url.into())));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_field() {
        for (kind, value, says) in [
            (MediaKind::Image, json!({}), "`p` has no `url`"),
            (MediaKind::Image, json!({ "url": "data:image/png,hi" }), "`p.url` is no data URL in base64"),
            (MediaKind::Image, json!({ "url": "data:image/png;base64,*" }), "`p.url` is not base64"),
            (MediaKind::Image, json!({ "url": "ftp://x/y" }), "`p.url` begins with `ftp:`"),
            (MediaKind::Image, json!({ "url": "" }), "`p.url` is empty"),
            (MediaKind::Audio, json!({ "data": 5 }), "`p` has no `data`"),
            (MediaKind::Audio, json!({ "data": "https://x/y.wav" }), "`p.data` is not base64"),
        ] {
            let error = media_source("p", kind, Some(&value)).map_err(|error| error.to_string());
            assert!(error.as_ref().is_err_and(|error| error.contains(says)), "{value}: {error:?}");
        }
    }
}
