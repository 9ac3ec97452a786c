//! Pictures and sound, made by llama.cpp's `mtmd` into what a model reads between its tokens.
//!
//! It happens on a thread of its own, so that answers go on meanwhile, with one piece after the other, so that memory is taken for one
//! at a time. What was encoded is kept by its content, as far as there is room, and known by a number: equal numbers are
//! equal content, so that the prefix cache knows a picture again.

mod decode;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Scope;
use std::time::{Duration, Instant};

use llama_cpp_4::chat::ChatParams;
use llama_cpp_4::model::{AddBos, LlamaModel, Special};
use llama_cpp_4::mtmd::{
    MtmdBitmap, MtmdContext, MtmdContextParams, MtmdInputChunk, MtmdInputChunkType, MtmdInputChunks, MtmdInputPart,
};
use llama_cpp_4::token::LlamaToken;
use sarai_core::frame::{LoadSpec, Projector};
use sarai_core::{Error, Media, MediaKind, MediaSource};
use sha2::{Digest, Sha256};

use crate::channel::Incoming;
use crate::log;
use crate::prompt::internal;
use crate::unit::Unit;

/// How much the thread gives way to those that compute answers.
const NICENESS: i32 = 10;

/// A part of a prompt that a template has made.
pub enum Part {
    /// Text, and whether it is a person's, in which nothing is special.
    Text(String, bool),
    /// A piece of media.
    Media(Media),
}

/// A piece of media as the model reads it.
pub struct Piece {
    /// What it is known by.
    number: u32,
    /// One after the other, what stands in the place of a token's embedding.
    embedding: Vec<f32>,
    /// For each of them, the positions: one, or four with a rotation that knows lines and columns. The first piece's is 0.
    places: Vec<[i32; 4]>,
    /// By how much the positions go on behind it.
    advance: u32,
    /// Whether its parts attend to each other both ways.
    is_non_causal: bool,
}

impl Piece {
    /// What stands in the place of a token's embedding, and its place counted from the piece's own.
    pub fn part(&self, index: usize) -> (&[f32], [i32; 4]) {
        let width = self.embedding.len() / self.places.len();
        (&self.embedding[index * width..(index + 1) * width], self.places[index])
    }

    /// How many tokens' places it takes.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether its parts attend to each other both ways.
    pub fn is_non_causal(&self) -> bool {
        self.is_non_causal
    }

    fn units(&self) -> impl Iterator<Item = Unit> + '_ {
        let last = self.places.len() - 1;
        // What stands at positions of its own goes on by one with each part, a picture with lines and columns at its end.
        let is_even = self.advance as usize == self.places.len();
        (0..self.places.len()).map(move |index| Unit::Media {
            piece: self.number,
            index: u32::try_from(index).unwrap_or(u32::MAX),
            advance: match is_even {
                true => 1,
                false if index == last => self.advance,
                false => 0,
            },
            is_non_causal: self.is_non_causal,
        })
    }

    fn bytes(&self) -> usize {
        self.embedding.len() * size_of::<f32>()
    }
}

/// Pieces of one prompt, by their numbers.
pub type Pieces = HashMap<u32, Arc<Piece>>;

/// A prompt that is to be read.
pub struct Job {
    /// The generation.
    pub id: u64,
    /// The prompt, unless nobody wants it any more.
    pub parts: Arc<Mutex<Option<Vec<Part>>>>,
    /// Tokens that it may have.
    pub context_tokens: usize,
    /// The model's name.
    pub model: String,
    /// Cleared when nobody wants it any more.
    pub is_wanted: Arc<AtomicBool>,
}

impl Job {
    fn refuse_beyond_context(&self, tokens: usize) -> Result<(), Error> {
        if tokens < self.context_tokens {
            return Ok(());
        }
        Err(Error::ContextOverflow {
            model: self.model.clone(),
            prompt_tokens: u32::try_from(tokens).unwrap_or(u32::MAX),
            context_tokens: u32::try_from(self.context_tokens).unwrap_or(u32::MAX),
        })
    }
}

/// A prompt that was read.
pub struct Read {
    /// The generation.
    pub id: u64,
    /// What became of it.
    pub outcome: Result<Encoded, Error>,
}

/// A prompt as the model reads it.
#[derive(Default)]
pub struct Encoded {
    /// The whole of it.
    pub units: Vec<Unit>,
    /// What it shows and lets hear.
    pub pieces: Pieces,
    /// How long that took to be encoded; nothing if it was known.
    pub took: Duration,
}

/// Where prompts with pictures and sound are handed in.
pub struct Senses {
    jobs: Sender<Job>,
}

impl Senses {
    /// Loads the projector, and starts its thread; what was read comes into the inbox.
    ///
    /// # Errors
    /// llama.cpp cannot load it, or it is not of this model.
    pub fn open<'scope>(
        projector: &Projector,
        spec: &LoadSpec,
        model: &'scope LlamaModel,
        scope: &'scope Scope<'scope, '_>,
        inbox: SyncSender<Incoming>,
    ) -> Result<Self, String> {
        let Projector { path, most_tokens, kept } = projector;
        let params = MtmdContextParams::default()
            .use_gpu(false)
            .print_timings(false)
            // Else what the projector says itself.
            .image_max_tokens(most_tokens.and_then(|most| i32::try_from(most).ok()).unwrap_or(-1))
            .n_threads(i32::try_from(spec.threads).unwrap_or(1));
        let context = MtmdContext::init_from_file(path, model, params)
            .map_err(|_| format!("llama.cpp cannot load the projector {} for this model", path.display()))?;
        let rate = u32::try_from(context.audio_sample_rate()).ok();
        let (jobs, waiting) = channel();
        let reader = Reader {
            context,
            model,
            rate,
            numbers: HashMap::new(),
            kept: Vec::new(),
            room: kept.0,
            width: width_of(model),
        };
        std::thread::Builder::new()
            .name("media".into())
            .spawn_scoped(scope, move || reader.run(&waiting, &inbox))
            .map_err(|error| error.to_string())?;
        Ok(Self { jobs })
    }

    /// Has a prompt read.
    pub fn read(&self, job: Job) {
        // The thread ends only when this end is gone.
        let _ = self.jobs.send(job);
    }
}

fn width_of(model: &LlamaModel) -> usize {
    usize::try_from(model.n_embd_inp()).unwrap_or_default().max(1)
}

/// The parts of a rendered prompt, in which a mark with its number stands for each of the media.
///
/// # Errors
/// The template has left one out, or said it twice.
pub fn parts_of(chat: &ChatParams, mark: &str, media: Vec<Media>) -> Result<Vec<Part>, Error> {
    let mut media: Vec<_> = media.into_iter().map(Some).collect();
    let mut parts = Vec::new();
    let mut cut = |text: &str, is_input: bool| {
        for (index, text) in text.split(mark).enumerate() {
            let marked = text.split_once('>').filter(|_| index > 0);
            let (number, text) = marked.map_or((None, text), |(number, rest)| (number.parse::<usize>().ok(), rest));
            if let Some(media) = number.and_then(|number| media.get_mut(number)?.take()) {
                parts.push(Part::Media(media));
            }
            if !text.is_empty() {
                parts.push(Part::Text(text.to_owned(), is_input));
            }
        }
    };
    match chat.prompt_parts.as_slice() {
        [] => cut(&chat.prompt, false),
        parts => parts.iter().for_each(|part| cut(&part.text, part.is_input)),
    }
    match media.into_iter().flatten().next() {
        None => Ok(parts),
        Some(media) => {
            let message =
                format!("the model's chat template leaves `{}` out: put it into the last message", media.param);
            Err(Error::invalid(&media.param, message))
        }
    }
}

/// What a kept piece is known by: its content, and which of the pieces it is that the content was cut into.
type Key = ([u8; 32], usize);

struct Reader<'model> {
    context: MtmdContext,
    model: &'model LlamaModel,
    /// Samples per second that it hears.
    rate: Option<u32>,
    /// What content is known by, also when it is not kept any more: the prefix cache may have it.
    numbers: HashMap<Key, u32>,
    /// The one used last is the last.
    kept: Vec<(Key, Arc<Piece>)>,
    /// Bytes that may be kept.
    room: u64,
    width: usize,
}

impl Reader<'_> {
    fn run(mut self, waiting: &Receiver<Job>, inbox: &SyncSender<Incoming>) {
        while let Ok(job) = waiting.recv() {
            if !job.is_wanted.load(Ordering::Relaxed) {
                continue;
            }
            let id = job.id;
            // OpenMP's threads live as long as the one that they were made for, and as long as there are more of them than cores,
            // none waits for the others without sleeping: answers would be slower by a third ever after.
            let reader = &mut self;
            let read = std::thread::scope(|scope| {
                let read = move || {
                    give_way();
                    reader.read(job)
                };
                scope.spawn(read).join()
            });
            let outcome = read.unwrap_or_else(|_| Err(Error::Internal("reading pictures or sound failed".into())));
            if inbox.send(Incoming::Read(Read { id, outcome })).is_err() {
                return;
            }
        }
    }

    fn read(&mut self, job: Job) -> Result<Encoded, Error> {
        let mut read = Encoded::default();
        let mut bos = AddBos::Always;
        let parts = job.parts.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default();
        for part in parts {
            match part {
                Part::Text(text, is_input) => {
                    let special = if is_input { Special::Plaintext } else { Special::Tokenize };
                    let tokens = self.model.str_to_token_with_special(&text, bos, special).map_err(internal)?;
                    read.units.extend(tokens.into_iter().map(Unit::Text));
                }
                Part::Media(media) => {
                    if bos == AddBos::Always && self.model.add_bos_token() {
                        read.units.push(Unit::Text(self.model.token_bos()));
                    }
                    self.read_media(media, &mut read, &job)?;
                }
            }
            bos = AddBos::Never;
            job.refuse_beyond_context(read.units.len())?;
        }
        match read.units.last() {
            Some(Unit::Text(_)) => Ok(read),
            _ => Err(Error::invalid("messages", "the prompt ends with a picture or sound: put text behind it")),
        }
    }

    /// Reads one piece of media: the marks around it, and what it is cut into.
    fn read_media(&mut self, media: Media, read: &mut Encoded, job: &Job) -> Result<(), Error> {
        let refused = |media: &Media, why: &str| {
            Error::invalid(&media.param, format!("the {} of `{}` {why}", media.kind.name(), media.param))
        };
        let MediaSource::Base64(text) = &media.source else {
            return Err(Error::Internal("a piece of media was not fetched".into()));
        };
        let bytes =
            sarai_core::media::from_base64(text).ok_or_else(|| refused(&media, "is not base64: encode the file"))?;
        let content: [u8; 32] = Sha256::digest(&bytes).into();
        let bitmap = match (media.kind, self.rate) {
            (MediaKind::Image, _) if self.context.supports_vision() => {
                let picture = decode::picture(&bytes).map_err(|why| refused(&media, &why))?;
                MtmdBitmap::from_rgb(picture.width(), picture.height(), picture.as_raw())
            }
            (MediaKind::Audio, Some(rate)) => {
                let samples = decode::sound(bytes, rate).map_err(|why| refused(&media, &why))?;
                MtmdBitmap::from_audio(&samples)
            }
            _ => return Err(refused(&media, "cannot be sensed by this model: ask another one")),
        };
        let bitmap = bitmap.map_err(internal)?;
        let mut chunks = MtmdInputChunks::new();
        self.context
            .tokenize_from_parts(&[MtmdInputPart::Bitmap(&bitmap)], false, &mut chunks)
            .map_err(|error| refused(&media, &format!("cannot be read by this model ({error}): send another one")))?;
        drop(bitmap);
        // Before any of it is encoded, which takes long.
        job.refuse_beyond_context(read.units.len() + chunks.n_tokens())?;
        for (index, chunk) in chunks.iter().enumerate() {
            if let Some(tokens) = chunk.text_tokens() {
                read.units.extend(tokens.iter().map(|&token| Unit::Text(LlamaToken(token))));
                continue;
            }
            if !job.is_wanted.load(Ordering::Relaxed) {
                return Err(Error::Internal("nobody wants it any more".into()));
            }
            let piece = self.piece((content, index), &chunk, &mut read.took)?;
            read.units.extend(piece.units());
            read.pieces.insert(piece.number, piece);
        }
        Ok(())
    }

    /// A piece as it was kept, or encoded anew, and how much longer that took.
    fn piece(&mut self, key: Key, chunk: &MtmdInputChunk<'_>, took: &mut Duration) -> Result<Arc<Piece>, Error> {
        if let Some(at) = self.kept.iter().position(|(kept, _)| *kept == key) {
            let found = self.kept.remove(at);
            let piece = Arc::clone(&found.1);
            self.kept.push(found);
            return Ok(piece);
        }
        let since = Instant::now();
        self.context.encode_chunk(self.model, chunk).map_err(internal)?;
        *took += since.elapsed();
        let count = chunk.n_tokens();
        let embedding = self.context.output_embd().to_vec();
        if count == 0 || embedding.len() != count * self.width {
            return Err(Error::Internal(format!("{} values were encoded for {count} tokens", embedding.len())));
        }
        if !embedding.iter().all(|value| value.is_finite()) {
            // In the cache it would spoil the answers of others too.
            return Err(Error::Internal("what was encoded has values that are no numbers".into()));
        }
        let next = u32::try_from(self.numbers.len()).unwrap_or(u32::MAX);
        let piece = Arc::new(Piece {
            number: *self.numbers.entry(key).or_insert(next),
            embedding,
            places: places(chunk),
            advance: u32::try_from(chunk.n_pos()).unwrap_or_default(),
            is_non_causal: self.context.decode_use_non_causal(chunk),
        });
        self.keep(key, Arc::clone(&piece));
        Ok(piece)
    }

    /// Keeps a piece; those that were not used for longest go.
    fn keep(&mut self, key: Key, piece: Arc<Piece>) {
        let mut room = usize::try_from(self.room).unwrap_or(usize::MAX);
        self.kept.push((key, piece));
        let fits = |(_, piece): &&(Key, Arc<Piece>)| {
            let bytes = piece.bytes();
            let has_room = bytes <= room;
            room = room.saturating_sub(bytes);
            has_room
        };
        let stay = self.kept.iter().rev().take_while(fits).count();
        self.kept.drain(..self.kept.len() - stay);
    }
}

/// Of a picture, lines and columns; sound goes on by one in all of them.
fn places(chunk: &MtmdInputChunk<'_>) -> Vec<[i32; 4]> {
    let number = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    match chunk.image_tokens().filter(|_| chunk.chunk_type() == MtmdInputChunkType::Image) {
        Some(image) => {
            let positions = image.decoder_positions(0);
            positions.into_iter().map(|at| [number(at.t), number(at.y), number(at.x), number(at.z)]).collect()
        }
        None => (0..chunk.n_tokens()).map(|index| [i32::try_from(index).unwrap_or(i32::MAX); 4]).collect(),
    }
}

/// Lets those that compute answers have the cores when both want them. The threads that encode inherit it.
fn give_way() {
    // On Linux, none is the calling thread.
    if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
        log::warn(&format!("pictures are encoded at the priority of answers: {error}"));
    }
}
