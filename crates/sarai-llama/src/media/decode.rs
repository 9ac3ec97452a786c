//! Files of pictures and sound, made into pixels and samples by libraries without unsafe code of ours, within limits that are
//! checked before memory is taken.

use std::io::Cursor;

use image::error::{ImageError, LimitErrorKind};
use image::{ImageReader, Limits, RgbImage};
use rubato::audioadapter_buffers::direct::InterleavedSlice;
use rubato::{Async, FixedAsync, Resampler, SincInterpolationParameters, WindowFunction};
use sarai_core::media::MOST_PIXELS;
use symphonia::core::codecs::audio::AudioDecoderOptions;
use symphonia::core::errors::Error as SoundError;
use symphonia::core::formats::probe::Hint;
use symphonia::core::formats::{FormatOptions, TrackType};
use symphonia::core::io::MediaSourceStream;
use symphonia::core::meta::MetadataOptions;

/// Pixels that each side must have.
pub const FEWEST_PIXELS: u32 = 2;
/// How much longer than the other one a side may be: what Qwen's own code allows.
pub const LONGEST_SIDE: u32 = 200;
/// What a decoder may take for itself beside the pixels.
const DECODER_BYTES: u64 = 12 * MOST_PIXELS;

/// What it may take to find out the size.
const HEADER_BYTES: u64 = 8 << 20;

/// Length of a piece of sound at most.
pub const MOST_SECONDS: u32 = 300;
/// Samples per second that a piece of sound may have.
const RATES: std::ops::RangeInclusive<u32> = 4_000..=192_000;
/// What is shorter goes on with silence: a hundredth of a second.
const FEWEST_SAMPLES: usize = 160;
/// Samples of one channel at most, before they are brought to the model's rate.
const MOST_SAMPLES: usize = MOST_SECONDS as usize * 48_000;

/// The pixels of a picture, three bytes each; those behind transparent ones are white.
///
/// # Errors
/// It is broken, of an unknown kind, or of a size that no model takes; the text says which, and what to do.
pub fn picture(bytes: &[u8]) -> Result<RgbImage, String> {
    const KINDS: &str = "send a PNG, JPEG, GIF, WebP or BMP file";
    let reader = || {
        ImageReader::new(Cursor::new(bytes))
            .with_guessed_format()
            .map_err(|error| format!("cannot be read ({error}): {KINDS}"))
    };
    let broken = |error: ImageError| match error {
        ImageError::Limits(error) if !matches!(error.kind(), LimitErrorKind::Unsupported { .. }) => {
            format!("is too large to be decoded: scale it down to {MOST_PIXELS} pixels or fewer")
        }
        error => format!("cannot be read ({error}): {KINDS}"),
    };
    let limited = |bytes: u64| {
        let mut reader = reader()?;
        let mut limits = Limits::no_limits();
        limits.max_alloc = Some(bytes);
        reader.limits(limits);
        Ok::<_, String>(reader)
    };
    // What stands before the pixels may be compressed a thousand times.
    let (width, height) = limited(HEADER_BYTES)?.into_dimensions().map_err(broken)?;
    if u64::from(width) * u64::from(height) > MOST_PIXELS {
        return Err(format!("is {width} x {height} pixels: scale it down to {MOST_PIXELS} pixels or fewer"));
    }
    let (short, long) = (width.min(height), width.max(height));
    if short < FEWEST_PIXELS {
        return Err(format!("is {width} x {height} pixels: each side needs {FEWEST_PIXELS} or more"));
    }
    if long / short > LONGEST_SIDE {
        return Err(format!(
            "is {width} x {height} pixels: no side may be more than {LONGEST_SIDE} times as long as the other"
        ));
    }
    let decoded = limited(DECODER_BYTES)?.decode().map_err(broken)?;
    Ok(if decoded.color().has_alpha() { over_white(&decoded.into_rgba8()) } else { decoded.into_rgb8() })
}

/// The picture in front of white paper.
fn over_white(picture: &image::RgbaImage) -> RgbImage {
    let mix = |color: u8, alpha: u8| {
        let mixed = (u32::from(color) * u32::from(alpha) + 255 * (255 - u32::from(alpha)) + 127) / 255;
        u8::try_from(mixed).unwrap_or(u8::MAX)
    };
    RgbImage::from_fn(picture.width(), picture.height(), |x, y| {
        let [red, green, blue, alpha] = picture.get_pixel(x, y).0;
        image::Rgb([mix(red, alpha), mix(green, alpha), mix(blue, alpha)])
    })
}

/// The samples of a piece of sound: one channel, so many in a second.
///
/// # Errors
/// It is broken, of an unknown kind, or too long; the text says which, and what to do.
pub fn sound(bytes: Vec<u8>, rate: u32) -> Result<Vec<f32>, String> {
    let (samples, found) = decode_sound(bytes).map_err(|failure| match failure {
        Failure::Broken(error) => format!("cannot be read ({error}): send a WAV, MP3 or FLAC file"),
        Failure::Rate(rate) => {
            format!("has {rate} samples a second: use {} to {}", RATES.start(), RATES.end())
        }
        Failure::TooLong => {
            format!("is too long: send {MOST_SECONDS} seconds or fewer, at 48,000 samples a second or fewer")
        }
        Failure::Empty => "has no sound in it: send a WAV, MP3 or FLAC file".to_owned(),
    })?;
    let mut samples = match found == rate {
        true => samples,
        false => resampled(&samples, found, rate)
            .map_err(|error| format!("cannot be brought to {rate} samples a second ({error})"))?,
    };
    // llama.cpp ends the process at a single sample, and makes of very loud ones what is no number.
    samples.resize(samples.len().max(FEWEST_SAMPLES), 0.0);
    samples.iter_mut().for_each(|sample| *sample = sample.clamp(-1.0, 1.0));
    Ok(samples)
}

enum Failure {
    Broken(SoundError),
    Rate(u32),
    TooLong,
    Empty,
}

/// The mean of the channels, and how many samples there are in a second.
fn decode_sound(bytes: Vec<u8>) -> Result<(Vec<f32>, u32), Failure> {
    let stream = MediaSourceStream::new(Box::new(Cursor::new(bytes)), Default::default());
    let mut format = symphonia::default::get_probe()
        .probe(&Hint::new(), stream, FormatOptions::default(), MetadataOptions::default())
        .map_err(Failure::Broken)?;
    let track = format.default_track(TrackType::Audio).ok_or(Failure::Empty)?;
    let id = track.id;
    let params = track.codec_params.as_ref().and_then(|params| params.audio()).ok_or(Failure::Empty)?;
    let mut decoder = symphonia::default::get_codecs()
        .make_audio_decoder(params, &AudioDecoderOptions::default())
        .map_err(Failure::Broken)?;
    let (mut samples, mut rate, mut interleaved) = (Vec::new(), None, Vec::new());
    let mut damaged = None;
    // What breaks off is heard as far as it goes.
    while let Ok(Some(packet)) = format.next_packet() {
        if packet.track_id != id {
            continue;
        }
        let buffer = match decoder.decode(&packet) {
            Ok(buffer) => buffer,
            Err(error @ SoundError::DecodeError(_)) => {
                damaged = Some(error);
                continue;
            }
            Err(error) => return Err(Failure::Broken(error)),
        };
        let found = buffer.spec().rate();
        if !RATES.contains(&found) || rate.is_some_and(|rate| rate != found) {
            return Err(Failure::Rate(found));
        }
        rate = Some(found);
        let channels = buffer.spec().channels().count().max(1);
        interleaved.resize(buffer.samples_interleaved(), 0.0_f32);
        buffer.copy_to_slice_interleaved(&mut interleaved);
        let most = MOST_SAMPLES.min((MOST_SECONDS * found) as usize);
        if samples.len() + interleaved.len() / channels > most {
            return Err(Failure::TooLong);
        }
        #[expect(clippy::cast_precision_loss, reason = "a few channels")]
        let mean = |frame: &[f32]| frame.iter().sum::<f32>() / channels as f32;
        samples.extend(interleaved.chunks_exact(channels).map(mean));
    }
    match (rate, damaged) {
        (Some(rate), _) if samples.iter().all(|sample| sample.is_finite()) && !samples.is_empty() => {
            Ok((samples, rate))
        }
        (_, Some(error)) => Err(Failure::Broken(error)),
        _ => Err(Failure::Empty),
    }
}

fn resampled(samples: &[f32], from: u32, to: u32) -> Result<Vec<f32>, String> {
    let parameters = SincInterpolationParameters::new(128, WindowFunction::BlackmanHarris2);
    let ratio = f64::from(to) / f64::from(from);
    let mut resampler = Async::<f32>::new_sinc(ratio, 1.0, &parameters, 1024, 1, FixedAsync::Input)
        .map_err(|error| error.to_string())?;
    let input = InterleavedSlice::new(samples, 1, samples.len()).map_err(|error| error.to_string())?;
    let resampled = resampler.process_all(&input, samples.len(), None).map_err(|error| error.to_string())?;
    Ok(resampled.take_data())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use image::{DynamicImage, ImageFormat, Rgb, Rgba, RgbaImage};
    use proptest::prelude::*;

    use super::*;

    fn file(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    fn plain(width: u32, height: u32) -> DynamicImage {
        RgbImage::from_pixel(width, height, Rgb([200, 30, 60])).into()
    }

    /// A WAV file of 16 bits.
    fn wav(rate: u32, channels: u16, samples: &[i16]) -> Vec<u8> {
        let data: Vec<u8> = samples.iter().flat_map(|sample| sample.to_le_bytes()).collect();
        let mut bytes = Vec::new();
        let length = |bytes: usize| u32::try_from(bytes).unwrap().to_le_bytes();
        bytes.extend(b"RIFF");
        bytes.extend(length(36 + data.len()));
        bytes.extend(b"WAVEfmt ");
        bytes.extend(16_u32.to_le_bytes());
        bytes.extend(1_u16.to_le_bytes());
        bytes.extend(channels.to_le_bytes());
        bytes.extend(rate.to_le_bytes());
        bytes.extend((rate * u32::from(channels) * 2).to_le_bytes());
        bytes.extend((channels * 2).to_le_bytes());
        bytes.extend(16_u16.to_le_bytes());
        bytes.extend(b"data");
        bytes.extend(length(data.len()));
        bytes.extend(data);
        bytes
    }

    /// A tone, as samples of 16 bits.
    fn tone(hertz: f32, rate: u32, count: usize) -> Vec<i16> {
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "short sounds")]
        let sample = |at: usize| ((at as f32 * hertz * std::f32::consts::TAU / rate as f32).sin() * 16_000.0) as i16;
        (0..count).map(sample).collect()
    }

    #[test]
    fn pictures_of_every_kind_have_their_pixels() {
        for format in [ImageFormat::Png, ImageFormat::Bmp, ImageFormat::Gif, ImageFormat::WebP, ImageFormat::Jpeg] {
            let decoded = picture(&file(&plain(20, 10), format)).unwrap();
            let [red, green, blue] = decoded.get_pixel(3, 3).0;
            assert_eq!(decoded.dimensions(), (20, 10), "{format:?}");
            let near = red.abs_diff(200) < 4 && green.abs_diff(30) < 4 && blue.abs_diff(60) < 4;
            assert!(near, "{format:?}: {red} {green} {blue}");
        }
    }

    #[test]
    fn what_is_transparent_is_white() {
        let image = RgbaImage::from_pixel(4, 4, Rgba([0, 0, 0, 0]));
        assert_eq!(picture(&file(&image.into(), ImageFormat::Png)).unwrap().get_pixel(0, 0).0, [255; 3]);
    }

    #[test]
    fn sizes_are_limited_at_their_edges() {
        let sized = |width, height| picture(&file(&plain(width, height), ImageFormat::Png)).map(|it| it.dimensions());
        assert_eq!(sized(4096, 3072), Ok((4096, 3072)));
        assert!(sized(4097, 3072).unwrap_err().contains("4097 x 3072"));
        assert_eq!(sized(2, 2), Ok((2, 2)));
        assert!(sized(1, 2).unwrap_err().contains("each side needs 2"));
        assert_eq!(sized(400, 2), Ok((400, 2)));
        assert!(sized(402, 2).unwrap_err().contains("200 times"));
    }

    #[test]
    fn a_picture_that_claims_to_be_huge_takes_no_memory() {
        let mut bytes = file(&plain(8, 8), ImageFormat::Png);
        // Width and height stand behind the signature and the head of the first chunk; its checksum follows.
        bytes[16..24].copy_from_slice(&[0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff]);
        let checksum = crc32fast::hash(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&checksum.to_be_bytes());
        assert!(picture(&bytes).unwrap_err().contains("65535 x 65535"));
    }

    #[test]
    fn sound_is_brought_to_the_rate_of_the_model() {
        let samples = tone(440.0, 16_000, 16_000);
        let same = sound(wav(16_000, 1, &samples), 16_000).unwrap();
        let exact: Vec<f32> = samples.iter().map(|&sample| f32::from(sample) / 32_768.0).collect();
        assert_eq!(same, exact, "what has the rate already is not touched");
        let stereo: Vec<i16> = tone(440.0, 48_000, 48_000).into_iter().flat_map(|sample| [sample, sample]).collect();
        let resampled = sound(wav(48_000, 2, &stereo), 16_000).unwrap();
        assert!(resampled.len().abs_diff(16_000) < 10, "{} samples", resampled.len());
        let furthest = resampled.iter().zip(&exact).skip(200).take(15_000).map(|(one, other)| (one - other).abs());
        let furthest = furthest.fold(0.0, f32::max);
        // Less than the tone changes in one sample.
        assert!(furthest < 0.08, "{furthest}");
    }

    /// Half a second at 440 Hz, as libsndfile writes it.
    #[test]
    fn flac_and_mp3_are_the_sound_that_was_put_in() {
        let exact = tone(440.0, 16_000, 8_000);
        let flac = sound(include_bytes!("../../tests/sounds/tone.flac").to_vec(), 16_000).unwrap();
        assert_eq!(flac.len(), exact.len());
        let furthest = flac.iter().zip(&exact).map(|(one, other)| (one - f32::from(*other) / 32_768.0).abs());
        assert!(furthest.fold(0.0, f32::max) < 0.02, "it is as loud, and goes up and down with it");
        let mp3 = sound(include_bytes!("../../tests/sounds/tone.mp3").to_vec(), 16_000).unwrap();
        assert!(mp3.len().abs_diff(8_000) < 3_000, "{} samples: encoders add silence", mp3.len());
        let middle = &mp3[3_000..7_000];
        let crossings = middle.windows(2).filter(|two| two[0] < 0.0 && two[1] >= 0.0).count();
        assert!(crossings.abs_diff(110) <= 1, "{crossings} times up in a quarter of a second");
    }

    #[test]
    fn sound_is_limited_at_its_edges() {
        let silent = |seconds: u32| sound(wav(4_000, 1, &vec![0; (seconds * 4_000) as usize]), 16_000);
        assert!(silent(300).is_ok());
        assert!(silent(301).unwrap_err().contains("300 seconds"));
        assert!(sound(wav(3_999, 1, &[0; 99]), 16_000).unwrap_err().contains("3999 samples a second"));
        assert!(sound(wav(192_000, 1, &[0; 99]), 16_000).is_ok());
        assert!(sound(wav(192_001, 1, &[0; 99]), 16_000).unwrap_err().contains("192001 samples a second"));
        assert!(sound(wav(4_000, 1, &[0; 99]), 16_000).is_ok());
        assert!(sound(wav(3_999, 1, &[0; 99]), 16_000).unwrap_err().contains("3999 samples a second"));
        // 75 seconds at the highest rate are as many samples as 300 at that of most files.
        let fast = |more: usize| sound(wav(192_000, 1, &vec![0; MOST_SAMPLES + more]), 16_000);
        assert_eq!(fast(0).map(|samples| samples.len().abs_diff(75 * 16_000) < 10), Ok(true));
        assert!(fast(1).unwrap_err().contains("48,000 samples a second or fewer"));
        assert!(sound(wav(16_000, 1, &[]), 16_000).is_err());
        assert_eq!(sound(wav(16_000, 1, &[16_384]), 16_000).unwrap()[..2], [0.5, 0.0]);
        assert!(sound(b"RIFF\0\0".to_vec(), 16_000).unwrap_err().contains("WAV, MP3 or FLAC"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// Files that are broken somewhere, or are anything, end with pixels and samples or with a reason.
        #[test]
        fn broken_files_are_refused_and_never_a_panic(
            kind in 0_usize..6,
            cut in 0_usize..2000,
            changes in prop::collection::vec((0_usize..2000, any::<u8>()), 0..12),
            anything in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let formats = [ImageFormat::Png, ImageFormat::Bmp, ImageFormat::Gif, ImageFormat::WebP, ImageFormat::Jpeg];
            let mut bytes = match formats.get(kind) {
                Some(format) => file(&plain(17, 9), *format),
                None => wav(8_000, 2, &tone(300.0, 8_000, 700)),
            };
            for (at, byte) in changes {
                let length = bytes.len();
                bytes[at % length] = byte;
            }
            bytes.truncate(bytes.len().saturating_sub(cut % bytes.len().max(1)));
            for bytes in [bytes, anything] {
                if let Ok(picture) = picture(&bytes) {
                    prop_assert!(u64::from(picture.width()) * u64::from(picture.height()) <= MOST_PIXELS);
                }
                if let Ok(samples) = sound(bytes, 16_000) {
                    prop_assert!(!samples.is_empty());
                }
            }
        }
    }
}
