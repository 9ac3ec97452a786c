//! Pictures and sound to ask with.

use std::io::Cursor;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::{DynamicImage, ImageFormat, Rgb, RgbImage};
use serde_json::{Value, json};

pub const RED: [u8; 3] = [250, 10, 10];
pub const GREEN: [u8; 3] = [10, 250, 10];
pub const BLUE: [u8; 3] = [10, 10, 250];

/// A picture of one colour, as a file.
pub fn picture(width: u32, height: u32, colour: [u8; 3], format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    let picture = DynamicImage::from(RgbImage::from_pixel(width, height, Rgb(colour)));
    picture.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

pub fn png(width: u32, height: u32, colour: [u8; 3]) -> Vec<u8> {
    picture(width, height, colour, ImageFormat::Png)
}

/// A tone as a WAV file.
pub fn wav(hertz: f32, seconds: f32, rate: u32) -> Vec<u8> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "short tones"
    )]
    let samples: Vec<u8> = (0..(seconds * rate as f32) as usize)
        .flat_map(|at| {
            let sample = (at as f32 * hertz * std::f32::consts::TAU / rate as f32).sin() * 12_000.0;
            (sample as i16).to_le_bytes()
        })
        .collect();
    let length = |bytes: usize| u32::try_from(bytes).unwrap().to_le_bytes();
    let mut file = Vec::new();
    file.extend(b"RIFF");
    file.extend(length(36 + samples.len()));
    file.extend(b"WAVEfmt ");
    file.extend(16_u32.to_le_bytes());
    file.extend([1, 0, 1, 0]);
    file.extend(rate.to_le_bytes());
    file.extend((2 * rate).to_le_bytes());
    file.extend([2, 0, 16, 0]);
    file.extend(b"data");
    file.extend(length(samples.len()));
    file.extend(samples);
    file
}

pub fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// A file as OpenAI's clients send a picture.
pub fn image_part(bytes: &[u8]) -> Value {
    json!({ "type": "image_url", "image_url": { "url": format!("data:image/png;base64,{}", base64(bytes)) } })
}

/// A file as OpenAI's clients send sound.
pub fn audio_part(bytes: &[u8]) -> Value {
    json!({ "type": "input_audio", "input_audio": { "data": base64(bytes), "format": "wav" } })
}

pub fn text_part(text: &str) -> Value {
    json!({ "type": "text", "text": text })
}
