//! Continuous batching over the sequences of one model.
//!
//! It computes the steps that the scheduler chooses, and sends what comes of them. Commands are taken between steps: a
//! cancelled generation stops within one.

mod step;
mod writer;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use llama_cpp_4::chat::{ChatParams, ChatTemplates};
use llama_cpp_4::context::LlamaContext;
use llama_cpp_4::llama_backend::LlamaBackend;
use llama_cpp_4::llama_batch::LlamaBatch;
use llama_cpp_4::llama_batch_ext::LlamaBatchExt;
use llama_cpp_4::model::LlamaModel;
use llama_cpp_4::token::LlamaToken;
use sarai_core::frame::{FromWorker, LoadSpec, Purpose, ToWorker};
use sarai_core::{Error, GenerateRequest, Prompt};

use crate::answer::AnswerText;
use crate::cells::{Cells, ContextCells, Sharing};
use crate::channel::{FrameWriter, Inbox, Incoming};
use crate::chat::Parts;
use crate::drafter::{self, Drafter};
use crate::media::{Encoded, Job, Part, Senses, Source};
use crate::model::{self, Allocation};
use crate::park::Parking;
use crate::prompt::{self, Rendered, Rendering};
use crate::rest::Rest;
use crate::sampler::{self, Sampler};
use crate::schedule::{Limits, Scheduler};
use crate::sequence::Waiting;
use crate::trial::{Trials, Untried};
use crate::unit::Unit;
use crate::{embed, log, media, pages, trial};
use writer::{Told, Writer};

/// What attention takes on one thread to pass over a cell that is not the token's own, for one head of one layer
/// (SmolLM2-135M with 7,000 such cells: 12.3 instead of 10.1 ms a token on two threads).
const FOREIGN_CELL_SECONDS: f64 = 2e-9;

/// Loads the model, reports it, and computes until the server is gone.
///
/// # Errors
/// The model cannot be loaded; the text says why.
pub fn run(spec: &LoadSpec, inbox: &Inbox, frames: &mut FrameWriter) -> Result<(), String> {
    log::capture_llama();
    let backend = LlamaBackend::init().map_err(|error| error.to_string())?;
    let tell = |percent| {
        // Whoever is not there any more need not be told.
        let _ = frames.send(&FromWorker::Loading(percent));
    };
    let loaded = model::load(spec, Allocation::Real, tell)?;
    let templates = ChatTemplates::from_model(&loaded, None).map_err(|error| error.to_string())?;
    let draft = spec.draft.as_ref().map(|path| drafter::load(spec, path, &loaded)).transpose()?;
    // What sees and hears reads the model, on a thread of its own.
    std::thread::scope(|scope| {
        let open = |projector| Senses::open(projector, spec, &loaded, scope, inbox.sender.clone());
        let senses = spec.projector.as_ref().map(open).transpose()?;
        let models = Models { model: &loaded, templates: &templates, senses: senses.as_ref(), draft: draft.as_ref() };
        serve(spec, &backend, models, inbox, frames)
    })
}

/// What is loaded once, and outlives contexts.
#[derive(Clone, Copy)]
struct Models<'model> {
    model: &'model LlamaModel,
    templates: &'model ChatTemplates,
    senses: Option<&'model Senses>,
    draft: Option<&'model LlamaModel>,
}

impl<'model> Models<'model> {
    /// The context of the model, and who follows its answers.
    fn contexts(&self, spec: &LoadSpec, backend: &LlamaBackend) -> Result<Contexts<'model>, String> {
        let context = model::context(spec, backend, self.model)?;
        let drafter = self.draft.map(|draft| Drafter::new(spec, backend, draft, self.model)).transpose()?;
        Ok(Contexts { context, drafter })
    }
}

/// What is made anew when another length is wanted.
struct Contexts<'model> {
    context: LlamaContext<'model>,
    drafter: Option<Drafter<'model>>,
}

fn serve(
    spec: &LoadSpec,
    backend: &LlamaBackend,
    models: Models<'_>,
    inbox: &Inbox,
    frames: &mut FrameWriter,
) -> Result<(), String> {
    let mut spec = spec.clone();
    let mut contexts = models.contexts(&spec, backend)?;
    pages::release_idle(&spec);
    send(frames, &FromWorker::Loaded(model::info(&spec, &contexts.context)))?;
    if spec.purpose != Purpose::Answers {
        embed::serve(&spec, models.model, contexts.context, &inbox.receiver, frames);
        return Ok(());
    }
    loop {
        let mut engine = Engine::new(&spec, models, contexts, &inbox.sender);
        let Outcome::Resize(context_tokens) = engine.serve(&inbox.receiver, frames) else { return Ok(()) };
        // The old context goes first: both at once were never planned.
        drop(engine);
        let wanted = LoadSpec { context_tokens, ..spec.clone() };
        let (made, failure) = match models.contexts(&wanted, backend) {
            Ok(made) => {
                spec = wanted;
                (made, None)
            }
            Err(failure) => (models.contexts(&spec, backend)?, Some(failure)),
        };
        contexts = made;
        pages::trim_heap();
        send(frames, &FromWorker::Resized(model::info(&spec, &contexts.context), failure))?;
    }
}

fn send(frames: &mut FrameWriter, frame: &FromWorker) -> Result<(), String> {
    frames.send(frame).map_err(|error| error.to_string())
}

/// Why an engine stops serving.
enum Outcome {
    /// The server is gone.
    End,
    /// So many tokens per sequence are wanted.
    Resize(u32),
}

/// A request whose prompt is known, but for its pictures and sound.
struct Asked {
    id: u64,
    /// Tokens that prompt and answer may have together.
    context_tokens: usize,
    since: Instant,
    request: GenerateRequest,
    prefill: Vec<LlamaToken>,
    given: Vec<LlamaToken>,
    form: Option<ChatParams>,
    /// Its prompt, until that is read.
    source: Source,
}

struct Engine<'model> {
    name: String,
    model: &'model LlamaModel,
    templates: &'model ChatTemplates,
    context: LlamaContext<'model>,
    drafter: Option<Drafter<'model>>,
    context_tokens: usize,
    batch: LlamaBatch,
    /// For steps with pictures or sound.
    mixed: Option<LlamaBatchExt>,
    senses: Option<&'model Senses>,
    /// Prompts that are being read.
    reading: HashMap<u64, Asked>,
    scheduler: Scheduler<Writer>,
    path: PathBuf,
    parking: Option<Parking>,
    /// Whether all that runs waits for something to be encoded.
    is_stuck: bool,
    rest: Rest,
    resize: Option<u32>,
    leaves: bool,
    trials: Trials,
    /// Whether an answer follows a form.
    follows_forms: bool,
}

fn cells<'a, 'model>(
    context: &'a mut LlamaContext<'model>,
    model: &LlamaModel,
    parking: &'a mut Option<Parking>,
) -> ContextCells<'a, 'model> {
    ContextCells { context, window: model::window(model), parking: parking.as_mut() }
}

impl<'model> Engine<'model> {
    fn new(spec: &LoadSpec, models: Models<'model>, contexts: Contexts<'model>, inbox: &SyncSender<Incoming>) -> Self {
        let (Models { model, templates, senses, .. }, Contexts { context, drafter }) = (models, contexts);
        let limits = Limits {
            parallel: spec.parallel as usize,
            cells: context.n_ctx() as usize,
            step_tokens: model::step_tokens(spec) as usize,
            draft_tokens: spec.draft_tokens as usize,
            sharing: Sharing::of(model, spec.deterministic),
            seconds_per_foreign_cell: FOREIGN_CELL_SECONDS * f64::from(model.n_head()) * f64::from(spec.whole_layers)
                / f64::from(spec.threads.max(1)),
        };
        Self {
            name: spec.model.clone(),
            model,
            templates,
            context_tokens: model::sequence_tokens(spec) as usize,
            context,
            drafter,
            batch: LlamaBatch::new(limits.step_tokens, 1),
            mixed: None,
            senses,
            reading: HashMap::new(),
            scheduler: Scheduler::new(limits),
            path: spec.path.clone(),
            parking: Parking::open(spec, model),
            is_stuck: false,
            rest: Rest::default(),
            resize: None,
            leaves: false,
            trials: Trials::new(inbox.clone()),
            follows_forms: false,
        }
    }

    fn serve(&mut self, incoming: &Receiver<Incoming>, frames: &mut FrameWriter) -> Outcome {
        loop {
            if !self.take_incoming(incoming, frames) {
                return Outcome::End;
            }
            if self.leaves {
                self.park();
                return Outcome::End;
            }
            if let Some(context_tokens) = self.resize {
                return Outcome::Resize(context_tokens);
            }
            if let Err(error) = self.step(frames).and_then(|()| frames.flush()) {
                log::warn(&format!("the worker ends: {error:#}"));
                return Outcome::End;
            }
        }
    }

    /// Takes all that is there, and waits for something while nothing can be computed; false when the server is gone.
    fn take_incoming(&mut self, incoming: &Receiver<Incoming>, frames: &mut FrameWriter) -> bool {
        loop {
            let next = if self.scheduler.is_idle() || std::mem::take(&mut self.is_stuck) {
                // The last one may have been cancelled.
                self.give_back_after_forms();
                match incoming.recv() {
                    Ok(next) => next,
                    Err(_) => return false,
                }
            } else if let Some(left) = self.rest.left() {
                match incoming.recv_timeout(left) {
                    Ok(next) => next,
                    Err(RecvTimeoutError::Timeout) => return true,
                    Err(RecvTimeoutError::Disconnected) => return false,
                }
            } else {
                match incoming.try_recv() {
                    Ok(next) => next,
                    Err(TryRecvError::Empty) => return true,
                    Err(TryRecvError::Disconnected) => return false,
                }
            };
            let taken = match next {
                Incoming::Command(command) => self.obey(command, frames),
                Incoming::Read(read) => self.take_read(read, frames),
                Incoming::Tried(form, ended) => self.take_tried(form, ended, frames),
            };
            if taken.is_err() {
                return false;
            }
            if self.resize.is_some() || self.leaves {
                return true;
            }
        }
    }

    fn obey(&mut self, command: ToWorker, frames: &mut FrameWriter) -> anyhow::Result<()> {
        match command {
            ToWorker::Generate { id, context_tokens, form_bytes, request } => {
                let asked = Untried { id, context_tokens, form_bytes, since: Instant::now(), request: *request };
                self.begin(asked, frames)
            }
            ToWorker::Cancel { id } => {
                self.scheduler.cancel(id);
                self.reading.remove(&id);
                self.trials.cancel(id);
                Ok(())
            }
            ToWorker::Share { threads, rests } => {
                let threads = i32::try_from(threads.max(1)).unwrap_or(1);
                self.context.set_n_threads(threads, threads);
                self.drafter.iter_mut().for_each(|drafter| drafter.set_threads(threads));
                self.rest.set(rests);
                Ok(())
            }
            ToWorker::Resize { context_tokens } => {
                anyhow::ensure!(self.scheduler.is_idle(), "a context is resized only while nothing is generated");
                self.resize = Some(context_tokens);
                Ok(())
            }
            ToWorker::Leave => {
                self.leaves = true;
                Ok(())
            }
            ToWorker::Trim => {
                pages::trim(&self.path);
                Ok(())
            }
            ToWorker::Embed { id, .. } => {
                let message = "it answers and makes no vectors: use a model of role embedding";
                frames.send(&FromWorker::Failed { id, error: Error::invalid("model", message) })
            }
            ToWorker::Load(_) => anyhow::bail!("a worker loads once"),
        }
    }

    /// Begins with a request, once the form of its answer was tried.
    fn begin(&mut self, asked: Untried, frames: &mut FrameWriter) -> anyhow::Result<()> {
        match self.trials.allows(&asked.request) {
            Ok(false) => {
                self.trials.push(asked);
                self.trials.begin(self.model, self.templates);
                Ok(())
            }
            allowed => self.go_on(asked, allowed.map(drop), frames),
        }
    }

    /// Renders a request, or tells why it cannot be followed.
    fn go_on(&mut self, asked: Untried, allowed: Result<(), Error>, frames: &mut FrameWriter) -> anyhow::Result<()> {
        let id = asked.id;
        match allowed.and_then(|()| self.render(asked)) {
            Ok(()) => Ok(()),
            Err(error) => frames.send(&FromWorker::Failed { id, error }),
        }
    }

    /// Goes on with those whose form was tried.
    fn take_tried(&mut self, form: u64, ended: trial::Ended, frames: &mut FrameWriter) -> anyhow::Result<()> {
        for (asked, allowed) in self.trials.end(form, ended) {
            self.go_on(asked, allowed, frames)?;
        }
        self.trials.begin(self.model, self.templates);
        Ok(())
    }

    /// Renders a request, and lets it wait for its turn, once its pictures and sound are read.
    fn render(&mut self, asked: Untried) -> Result<(), Error> {
        let Untried { id, context_tokens, since, mut request, .. } = asked;
        let context_tokens = self.context_tokens.min(context_tokens as usize);
        let rendered = prompt::render_within(self.model, self.templates, &request, context_tokens)?;
        let Rendered { prompt, prefill, given, form } = rendered;
        // It is rendered: its files are in the parts now.
        request.prompt = Prompt::Raw(String::new());
        let mut asked = Asked { id, context_tokens, since, request, prefill, given, form, source: Source::default() };
        match (prompt, self.senses) {
            (Rendering::Tokens(tokens), _) => {
                let units = tokens.into_iter().map(Unit::Text).collect();
                self.admit(asked, Encoded { units, ..Encoded::default() })
            }
            (Rendering::Parts(parts), Some(_)) => {
                asked.source = self.read(id, context_tokens, parts);
                self.reading.insert(id, asked);
                Ok(())
            }
            (Rendering::Parts(_), None) => {
                Err(Error::invalid("messages", "the model neither sees nor hears: ask one that does"))
            }
        }
    }

    /// Has parts of a prompt read; that ends if nobody holds on to what is returned.
    fn read(&self, id: u64, context_tokens: usize, parts: Vec<Part>) -> Source {
        let source = Source::new(Mutex::new(parts));
        if let Some(senses) = self.senses {
            let model = self.name.clone();
            senses.read(Job { id, source: Arc::downgrade(&source), context_tokens, model });
        }
        source
    }

    fn take_read(&mut self, read: media::Read, frames: &mut FrameWriter) -> anyhow::Result<()> {
        let media::Read { id, outcome } = read;
        let taken = match self.reading.remove(&id) {
            Some(asked) => outcome.and_then(|encoded| self.admit(asked, encoded)),
            None if self.scheduler.reads(id) => outcome.map(|encoded| self.supply(id, encoded)),
            // Nobody wants it any more.
            None => return Ok(()),
        };
        match taken {
            Ok(()) => Ok(()),
            Err(error) => {
                self.scheduler.cancel(id);
                frames.send(&FromWorker::Failed { id, error })
            }
        }
    }

    /// Has the pieces encoded that a generation lacks which has begun: neither are they kept, nor is what was computed of them.
    fn have_encoded(&mut self) {
        for index in 0..self.scheduler.sequences.len() {
            let Some(generation) = &mut self.scheduler.sequences[index].generation else { continue };
            let Waiting { id, context_tokens, lacks, writer, .. } = &mut generation.asked;
            let mut lacking: Vec<_> =
                std::mem::take(&mut writer.lacking).into_iter().filter(|(piece, _)| lacks.contains(piece)).collect();
            lacking.sort_by_key(|(piece, _)| *piece);
            // All pieces of one file are encoded together.
            lacking.dedup_by(|(_, one), (_, other)| Arc::ptr_eq(&one.media, &other.media));
            if lacking.is_empty() {
                continue;
            }
            let (id, context_tokens) = (*id, *context_tokens);
            let parts = lacking.into_iter().map(|(_, lack)| Part::Lacking(lack)).collect();
            let source = self.read(id, context_tokens, parts);
            if let Some(generation) = &mut self.scheduler.sequences[index].generation {
                generation.asked.writer.source = source;
            }
        }
    }

    /// Goes on with a generation whose lacking pieces are there.
    fn supply(&mut self, id: u64, encoded: Encoded) {
        let running = self.scheduler.sequences.iter_mut().filter(|sequence| sequence.prompt_left() > 0);
        let mut asked = running.filter_map(|sequence| Some(&mut sequence.generation.as_mut()?.asked));
        if let Some(asked) = asked.find(|asked| asked.id == id) {
            asked.encode += encoded.took;
            asked.lacks.clear();
            asked.writer.pieces.extend(encoded.pieces);
        }
    }

    /// Lets a generation wait for its turn.
    fn admit(&mut self, asked: Asked, encoded: Encoded) -> Result<(), Error> {
        let Asked { id, context_tokens, since, request, prefill, given, form, .. } = asked;
        let Encoded { units: mut prompt, pieces, lacks: lacking, took: encode } = encoded;
        if prompt.last().is_some_and(|unit| unit.text().is_none()) {
            return Err(Error::invalid("messages", "the prompt ends with a picture or sound: put text behind it"));
        }
        prompt.extend(prefill.iter().chain(&given).copied().map(Unit::Text));
        if prompt.len() >= context_tokens {
            return Err(Error::ContextOverflow {
                model: self.name.clone(),
                prompt_tokens: u32::try_from(prompt.len()).unwrap_or(u32::MAX),
                context_tokens: u32::try_from(context_tokens).unwrap_or(u32::MAX),
            });
        }
        self.refuse_what_no_step_holds(&prompt)?;
        let mut sampler = Sampler::new(self.model, context_tokens, &request, form.as_ref())?;
        prompt.iter().filter_map(|unit| unit.text()).for_each(|token| sampler.saw(token));
        let mut stops = request.stop.clone();
        stops.extend(form.iter().flat_map(sampler::stops));
        let answer = AnswerText::after(&request.given, &stops);
        let max_tokens = request.max_tokens.unwrap_or(u32::MAX);
        let parts = form.map(|form| {
            let preserved = sampler::preserved(self.model, &form);
            Parts::new(form, preserved, request.tools)
        });
        let likely = request.logprobs.map(|count| (usize::from(count), Vec::new()));
        let lacks = lacking.keys().copied().collect();
        let told = request.tells_context.then(Told::default);
        let (source, unplaced) = (Source::default(), Vec::new());
        let writer = Writer { sampler, answer, parts, pieces, lacking, source, likely, unplaced, told };
        let (given, lane) = (given.len(), request.lane);
        let waiting = Waiting { id, prompt, given, lane, max_tokens, context_tokens, since, encode, lacks, writer };
        self.scheduler.push(waiting);
        Ok(())
    }

    /// What attends to itself both ways is computed in one step, beside an answer of every other sequence.
    fn refuse_what_no_step_holds(&self, prompt: &[Unit]) -> Result<(), Error> {
        let most = self.scheduler.step_tokens() - self.scheduler.parallel();
        let whole = prompt.iter().filter_map(|unit| match unit {
            Unit::Media { index, is_non_causal: true, .. } => Some(*index as usize + 1),
            _ => None,
        });
        match whole.max().filter(|length| *length > most) {
            None => Ok(()),
            Some(length) => Err(Error::Unavailable {
                model: self.name.clone(),
                reason: format!(
                    "a picture is {length} tokens, which must be computed at once, and a step holds {most}: set \
                     `ubatch` to {} or more",
                    length + self.scheduler.parallel()
                ),
            }),
        }
    }

    /// Keeps on disk what the sequences hold; a token that was chosen, and not computed, is not among it.
    fn park(&mut self) {
        let Some(parking) = &mut self.parking else { return };
        let mut kept: Vec<_> = self.scheduler.sequences.iter().enumerate().collect();
        let parallel = self.scheduler.parallel();
        kept.sort_by_key(|(index, sequence)| (*index >= parallel, std::cmp::Reverse(sequence.last_used)));
        let mut leaving = parking.begin();
        for (index, sequence) in kept {
            if index < parallel {
                leaving.add(&mut self.context, index, &sequence.cached);
            } else if !sequence.cached.is_empty() {
                // llama.cpp writes only those that it computes: one after the other takes the first one's place.
                let mut cells = ContextCells { context: &mut self.context, window: 0, parking: None };
                cells.cut(0, 0);
                cells.share(index, 0, 0..sequence.cached.len());
                leaving.add(&mut self.context, 0, &sequence.cached);
            }
        }
    }
}
