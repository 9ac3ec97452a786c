//! Pictures and sound, made by llama.cpp's `mtmd` into what a model reads between its tokens.
//!
//! It happens on a thread of its own, so that answers go on meanwhile, with one piece after the other, so that memory is taken for one
//! at a time. What was encoded is kept by its content, as far as there is room, and known by a number: equal numbers are
//! equal content, so that the prefix cache knows a picture again.

mod decode;
mod piece;

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::Scope;
use std::time::{Duration, Instant};

use llama_cpp_4::chat::ChatParams;
use llama_cpp_4::model::{AddBos, LlamaModel, Special};
use llama_cpp_4::mtmd::{MtmdBitmap, MtmdContext, MtmdContextParams, MtmdInputChunk, MtmdInputChunks, MtmdInputPart};
use llama_cpp_4::token::LlamaToken;
use sarai_core::frame::{LoadSpec, Projector};
use sarai_core::{Error, Media, MediaKind, MediaSource};
use sha2::{Digest, Sha256};

use crate::channel::Incoming;
use crate::log;
use crate::model::pool_tokens;
use crate::prompt::internal;
use crate::unit::Unit;
pub use piece::Pieces;
use piece::{Content, Cut, Cuts, Piece, Shape, Store};

/// How much the thread gives way to those that compute answers.
const NICENESS: i32 = 10;

/// A part of a prompt that a template has made.
pub enum Part {
    /// Text, and whether it is a person's, in which nothing is special.
    Text(String, bool),
    /// A piece of media.
    Media(Arc<Media>),
    /// One that was read before, and must be encoded now.
    Lacking(Lack),
}

/// What a piece is of that is known, and not encoded.
#[derive(Clone)]
pub struct Lack {
    /// The file.
    pub media: Arc<Media>,
    /// What it was cut into.
    cuts: Cuts,
}

/// What a prompt is read from; whoever lets go of it does not want it read any more.
pub type Source = Arc<Mutex<Vec<Part>>>;

/// A prompt that is to be read.
pub struct Job {
    /// The generation.
    pub id: u64,
    /// The prompt, as long as somebody wants it.
    pub source: Weak<Mutex<Vec<Part>>>,
    /// Tokens that it may have.
    pub context_tokens: usize,
    /// The model's name.
    pub model: String,
}

impl Job {
    fn is_wanted(&self) -> bool {
        self.source.strong_count() > 0
    }

    fn take_parts(&self) -> Vec<Part> {
        let source = self.source.upgrade();
        source
            .map(|source| std::mem::take(&mut *source.lock().unwrap_or_else(PoisonError::into_inner)))
            .unwrap_or_default()
    }

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
    /// What it shows and lets hear, as far as that is encoded.
    pub pieces: Pieces,
    /// What the other pieces are of, by their numbers.
    pub lacks: HashMap<u32, Lack>,
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
        let reader =
            Reader { context, model, rate, store: Store::new(kept.0, pool_tokens(spec)), width: width_of(model) };
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
                parts.push(Part::Media(Arc::new(media)));
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

struct Reader<'model> {
    context: MtmdContext,
    model: &'model LlamaModel,
    /// Samples per second that it hears.
    rate: Option<u32>,
    store: Store,
    /// Values in the place of a token's embedding.
    width: usize,
}

impl Reader<'_> {
    fn run(mut self, waiting: &Receiver<Job>, inbox: &SyncSender<Incoming>) {
        while let Ok(job) = waiting.recv() {
            if !job.is_wanted() {
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
                // It cannot be had where there are too many already.
                let reading = std::thread::Builder::new().spawn_scoped(scope, read);
                reading.map(std::thread::ScopedJoinHandle::join)
            });
            let failed = || Error::Internal("reading pictures or sound failed".into());
            let outcome = read.map_err(|_| failed()).and_then(|read| read.unwrap_or_else(|_| Err(failed())));
            if inbox.send(Incoming::Read(Read { id, outcome })).is_err() {
                return;
            }
        }
    }

    fn read(&mut self, job: Job) -> Result<Encoded, Error> {
        let mut read = Encoded::default();
        let mut bos = AddBos::Always;
        for part in job.take_parts() {
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
                Part::Lacking(lack) => self.read_lack(&lack, &mut read, &job)?,
            }
            bos = AddBos::Never;
            job.refuse_beyond_context(read.units.len())?;
        }
        Ok(read)
    }

    /// Reads one piece of media: the marks around it, and what it is cut into.
    fn read_media(&mut self, media: Arc<Media>, read: &mut Encoded, job: &Job) -> Result<(), Error> {
        let bytes = file_of(&media)?;
        let content = Content { kind: media.kind, sha256: Sha256::digest(&bytes).into() };
        let cuts = match self.store.cuts(&content) {
            Some(cuts) => {
                self.recall(&media, &cuts, read);
                cuts
            }
            None => {
                let chunks = self.chunks(&media, bytes)?;
                // Before any of it is encoded, which takes long.
                job.refuse_beyond_context(read.units.len() + chunks.n_tokens())?;
                let cuts = self.cut(&chunks);
                self.encode(&chunks, &cuts, read, job)?;
                self.store.know(content, Arc::clone(&cuts));
                cuts
            }
        };
        read.units.extend(cuts.iter().flat_map(Cut::units));
        Ok(())
    }

    /// The pieces of a content that was read before, as far as they are kept encoded: what was computed of the others may be in the cache
    /// of keys and values.
    fn recall(&mut self, media: &Arc<Media>, cuts: &Cuts, read: &mut Encoded) {
        for shape in cuts.iter().filter_map(Cut::shape) {
            match self.store.encoded(shape.number) {
                Some(piece) => drop(read.pieces.insert(shape.number, piece)),
                None => {
                    let lack = Lack { media: Arc::clone(media), cuts: Arc::clone(cuts) };
                    read.lacks.insert(shape.number, lack);
                }
            }
        }
    }

    /// Has what is lacking encoded, under the numbers that the prompt knows it by.
    fn read_lack(&mut self, lack: &Lack, read: &mut Encoded, job: &Job) -> Result<(), Error> {
        let chunks = self.chunks(&lack.media, file_of(&lack.media)?)?;
        self.encode(&chunks, &lack.cuts, read, job)
    }

    /// What llama.cpp cuts a file into.
    fn chunks(&self, media: &Media, bytes: Vec<u8>) -> Result<MtmdInputChunks, Error> {
        let bitmap = match (media.kind, self.rate) {
            (MediaKind::Image, _) if self.context.supports_vision() => {
                let picture = decode::picture(&bytes).map_err(|why| refused(media, &why))?;
                MtmdBitmap::from_rgb(picture.width(), picture.height(), picture.as_raw())
            }
            (MediaKind::Audio, Some(rate)) => {
                let samples = decode::sound(bytes, rate).map_err(|why| refused(media, &why))?;
                MtmdBitmap::from_audio(&samples)
            }
            _ => return Err(refused(media, "cannot be sensed by this model: ask another one")),
        };
        let bitmap = bitmap.map_err(internal)?;
        let mut chunks = MtmdInputChunks::new();
        self.context
            .tokenize_from_parts(&[MtmdInputPart::Bitmap(&bitmap)], false, &mut chunks)
            .map_err(|error| refused(media, &format!("cannot be read by this model ({error}): send another one")))?;
        Ok(chunks)
    }

    fn cut(&mut self, chunks: &MtmdInputChunks) -> Cuts {
        let mut cuts = Vec::new();
        for chunk in chunks.iter() {
            match chunk.text_tokens() {
                Some(tokens) => cuts.extend(tokens.iter().map(|&token| Cut::Mark(LlamaToken(token)))),
                None => {
                    let is_non_causal = self.context.decode_use_non_causal(&chunk);
                    cuts.push(Cut::Piece(Arc::new(Shape::of(&chunk, self.store.number(), is_non_causal))));
                }
            }
        }
        cuts.into()
    }

    /// Encodes those pieces that are not kept.
    fn encode(&mut self, chunks: &MtmdInputChunks, cuts: &[Cut], read: &mut Encoded, job: &Job) -> Result<(), Error> {
        let pieces = chunks.iter().filter(|chunk| chunk.text_tokens().is_none());
        for (chunk, shape) in pieces.zip(cuts.iter().filter_map(Cut::shape)) {
            if !job.is_wanted() {
                return Err(Error::Internal("nobody wants it any more".into()));
            }
            let piece = match self.store.encoded(shape.number) {
                Some(piece) => piece,
                None => {
                    let since = Instant::now();
                    let piece = self.encode_chunk(&chunk, shape)?;
                    read.took += since.elapsed();
                    piece
                }
            };
            read.pieces.insert(shape.number, piece);
        }
        Ok(())
    }

    fn encode_chunk(&mut self, chunk: &MtmdInputChunk<'_>, shape: &Arc<Shape>) -> Result<Arc<Piece>, Error> {
        self.context.encode_chunk(self.model, chunk).map_err(internal)?;
        let embedding = self.context.output_embd().to_vec();
        if !embedding.iter().all(|value| value.is_finite()) {
            // In the cache it would spoil the answers of others too.
            return Err(Error::Internal("what was encoded has values that are no numbers".into()));
        }
        let count = embedding.len();
        let piece = Piece::new(Arc::clone(shape), embedding, self.width)
            .ok_or_else(|| Error::Internal(format!("{count} values were encoded for {} tokens", shape.len())))?;
        let piece = Arc::new(piece);
        self.store.keep(&piece);
        Ok(piece)
    }
}

fn file_of(media: &Media) -> Result<Vec<u8>, Error> {
    let MediaSource::Base64(text) = &media.source else {
        return Err(Error::Internal("a piece of media was not fetched".into()));
    };
    sarai_core::media::from_base64(text).ok_or_else(|| refused(media, "is not base64: encode the file"))
}

fn refused(media: &Media, why: &str) -> Error {
    Error::invalid(&media.param, format!("the {} of `{}` {why}", media.kind.name(), media.param))
}

/// Lets those that compute answers have the cores when both want them. The threads that encode inherit it.
fn give_way() {
    // On Linux, none is the calling thread.
    if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
        log::warn(&format!("pictures are encoded at the priority of answers: {error}"));
    }
}
