//! Continuous batching over the sequences of one model.
//!
//! It computes the steps that the scheduler chooses, and sends what comes of them. Commands are taken between steps: a
//! cancelled generation stops within one.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::Context as _;
use llama_cpp_4::chat::{ChatParams, ChatTemplates};
use llama_cpp_4::context::LlamaContext;
use llama_cpp_4::llama_backend::LlamaBackend;
use llama_cpp_4::llama_batch::LlamaBatch;
use llama_cpp_4::llama_batch_ext::{EmbeddingRows, LlamaBatchExt, LlamaProcessType};
use llama_cpp_4::model::{LlamaModel, Special};
use llama_cpp_4::token::LlamaToken;
use llama_cpp_4::{DecodeError, ProcessError};
use sarai_core::frame::{FromWorker, LoadSpec, Purpose, ToWorker};
use sarai_core::{Error, Event, FinishReason, GenerateRequest, Prompt, TokenLogprob};

use crate::answer::{AnswerText, Pushed};
use crate::cells::{Cells, ContextCells, Sharing};
use crate::channel::{FrameWriter, Inbox, Incoming};
use crate::chat::Parts;
use crate::media::{Encoded, Job, Part, Pieces, Senses};
use crate::model::{self, Allocation};
use crate::park::Parking;
use crate::prompt::{self, Rendered, Rendering};
use crate::sampler::{self, Sampler};
use crate::schedule::{Limits, Row, Scheduler, Step};
use crate::sequence::Waiting;
use crate::trial::Tried;
use crate::unit::Unit;
use crate::{embed, log, logprobs, media};

/// What attention takes on one thread to pass over a cell that is not the token's own, for one head of one layer
/// (SmolLM2-135M with 7,000 such cells: 12.3 instead of 10.1 ms a token on two threads).
const FOREIGN_CELL_SECONDS: f64 = 2e-9;

/// What writes an answer.
struct Writer {
    /// Chooses its tokens.
    sampler: Sampler,
    /// Its text, as far as it is held back.
    answer: AnswerText,
    /// Its parts, where it is more than text.
    parts: Option<Parts>,
    /// What its prompt shows and lets hear, until that was computed.
    pieces: Pieces,
    /// How likely the tokens were whose text is not passed on yet, and how many others are told of.
    likely: Option<(usize, Vec<TokenLogprob>)>,
}

impl Writer {
    /// What is passed on of more text.
    fn events(&mut self, text: String) -> Vec<Event> {
        match &mut self.parts {
            _ if text.is_empty() => Vec::new(),
            Some(parts) => parts.push(&text),
            None => {
                let likely = self.likely_of(&text).map(Event::Logprobs);
                likely.into_iter().chain([Event::Text(text)]).collect()
            }
        }
    }

    /// Of the tokens that this text is made of; those of a text that ended the answer are left.
    fn likely_of(&mut self, text: &str) -> Option<Vec<TokenLogprob>> {
        let (_, waiting) = self.likely.as_mut()?;
        let mut bytes = 0;
        let ends_within = |token: &&TokenLogprob| {
            bytes += token.bytes.len();
            bytes <= text.len().max(1)
        };
        let count = waiting.iter().take_while(ends_within).count();
        Some(waiting.drain(..count).collect())
    }

    /// Whether a special token is part of the text.
    fn shown(&self, token: LlamaToken) -> Special {
        match &self.parts {
            Some(parts) if parts.preserved.contains(&token) => Special::Tokenize,
            _ => Special::Plaintext,
        }
    }
}

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
    // What sees and hears reads the model, on a thread of its own.
    std::thread::scope(|scope| {
        let open = |projector| Senses::open(projector, spec, &loaded, scope, inbox.sender.clone());
        let senses = spec.projector.as_ref().map(open).transpose()?;
        serve(spec, &backend, &loaded, &templates, senses.as_ref(), &inbox.receiver, frames)
    })
}

fn serve(
    spec: &LoadSpec,
    backend: &LlamaBackend,
    loaded: &LlamaModel,
    templates: &ChatTemplates,
    senses: Option<&Senses>,
    incoming: &Receiver<Incoming>,
    frames: &mut FrameWriter,
) -> Result<(), String> {
    let mut spec = spec.clone();
    let mut context = model::context(&spec, backend, loaded)?;
    model::release_idle(&spec);
    send(frames, &FromWorker::Loaded(model::info(&spec, &context)))?;
    if spec.purpose != Purpose::Answers {
        embed::serve(&spec, loaded, context, incoming, frames);
        return Ok(());
    }
    loop {
        let mut engine = Engine::new(&spec, loaded, templates, senses, context);
        let Outcome::Resize(context_tokens) = engine.serve(incoming, frames) else { return Ok(()) };
        // The old context goes first: both at once were never planned.
        drop(engine);
        let wanted = LoadSpec { context_tokens, ..spec.clone() };
        let (made, failure) = match model::context(&wanted, backend, loaded) {
            Ok(made) => {
                spec = wanted;
                (made, None)
            }
            Err(failure) => (model::context(&spec, backend, loaded)?, Some(failure)),
        };
        context = made;
        model::trim_heap();
        send(frames, &FromWorker::Resized(model::info(&spec, &context), failure))?;
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
    parts: Arc<Mutex<Option<Vec<Part>>>>,
    /// Cleared when nobody wants it any more.
    is_wanted: Arc<AtomicBool>,
}

struct Engine<'model> {
    name: String,
    model: &'model LlamaModel,
    templates: &'model ChatTemplates,
    context: LlamaContext<'model>,
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
    resize: Option<u32>,
    leaves: bool,
    tried: Tried,
}

fn cells<'a, 'model>(
    context: &'a mut LlamaContext<'model>,
    model: &LlamaModel,
    parking: &'a mut Option<Parking>,
) -> ContextCells<'a, 'model> {
    ContextCells { context, window: model::window(model), parking: parking.as_mut() }
}

impl<'model> Engine<'model> {
    fn new(
        spec: &LoadSpec,
        model: &'model LlamaModel,
        templates: &'model ChatTemplates,
        senses: Option<&'model Senses>,
        context: LlamaContext<'model>,
    ) -> Self {
        let limits = Limits {
            parallel: spec.parallel as usize,
            cells: context.n_ctx() as usize,
            step_tokens: model::step_tokens(spec) as usize,
            draft_tokens: spec.draft_tokens as usize,
            sharing: Sharing::of(model),
            seconds_per_foreign_cell: FOREIGN_CELL_SECONDS * f64::from(model.n_head()) * f64::from(model.n_layer())
                / f64::from(spec.threads.max(1)),
        };
        Self {
            name: spec.model.clone(),
            model,
            templates,
            context_tokens: model::sequence_tokens(spec) as usize,
            context,
            batch: LlamaBatch::new(limits.step_tokens, 1),
            mixed: None,
            senses,
            reading: HashMap::new(),
            scheduler: Scheduler::new(limits),
            path: spec.path.clone(),
            parking: Parking::open(spec, model),
            resize: None,
            leaves: false,
            tried: Tried::default(),
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

    /// Takes all that is there, and waits for something while nothing runs; false when the server is gone.
    fn take_incoming(&mut self, incoming: &Receiver<Incoming>, frames: &mut FrameWriter) -> bool {
        loop {
            let next = if self.scheduler.is_idle() {
                match incoming.recv() {
                    Ok(next) => next,
                    Err(_) => return false,
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
            ToWorker::Generate { id, context_tokens, request } => match self.begin(id, context_tokens, *request) {
                Ok(()) => Ok(()),
                Err(error) => frames.send(&FromWorker::Failed { id, error }),
            },
            ToWorker::Cancel { id } => {
                self.scheduler.cancel(id);
                if let Some(asked) = self.reading.remove(&id) {
                    asked.is_wanted.store(false, Ordering::Relaxed);
                    // What waits for its turn gives its memory back at once.
                    asked.parts.lock().unwrap_or_else(PoisonError::into_inner).take();
                }
                Ok(())
            }
            ToWorker::Threads(threads) => {
                let threads = i32::try_from(threads.max(1)).unwrap_or(1);
                self.context.set_n_threads(threads, threads);
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
                model::trim(&self.path);
                Ok(())
            }
            ToWorker::Embed { id, .. } => {
                let message = "it answers and makes no vectors: use a model of role embedding";
                frames.send(&FromWorker::Failed { id, error: Error::invalid("model", message) })
            }
            ToWorker::Load(_) => anyhow::bail!("a worker loads once"),
        }
    }

    /// Renders a request, and lets it wait for its turn, once its pictures and sound are read.
    fn begin(&mut self, id: u64, context_tokens: u32, mut request: GenerateRequest) -> Result<(), Error> {
        let since = Instant::now();
        let Rendered { prompt, prefill, given, form } = prompt::render(self.model, self.templates, &request)?;
        // It is rendered: its files are in the parts now.
        request.prompt = Prompt::Raw(String::new());
        let context_tokens = self.context_tokens.min(context_tokens as usize);
        let is_wanted = Arc::new(AtomicBool::new(true));
        let asked =
            Asked { id, context_tokens, since, request, prefill, given, form, parts: Arc::default(), is_wanted };
        match (prompt, self.senses) {
            (Rendering::Tokens(tokens), _) => {
                let units = tokens.into_iter().map(Unit::Text).collect();
                self.admit(asked, Encoded { units, ..Encoded::default() })
            }
            (Rendering::Parts(parts), Some(senses)) => {
                *asked.parts.lock().unwrap_or_else(PoisonError::into_inner) = Some(parts);
                let (model, parts) = (self.name.clone(), Arc::clone(&asked.parts));
                senses.read(Job { id, parts, context_tokens, model, is_wanted: Arc::clone(&asked.is_wanted) });
                self.reading.insert(id, asked);
                Ok(())
            }
            (Rendering::Parts(_), None) => {
                Err(Error::invalid("messages", "the model neither sees nor hears: ask one that does"))
            }
        }
    }

    fn take_read(&mut self, read: media::Read, frames: &mut FrameWriter) -> anyhow::Result<()> {
        let media::Read { id, outcome } = read;
        let Some(asked) = self.reading.remove(&id) else { return Ok(()) };
        match outcome.and_then(|encoded| self.admit(asked, encoded)) {
            Ok(()) => Ok(()),
            Err(error) => frames.send(&FromWorker::Failed { id, error }),
        }
    }

    /// Lets a generation wait for its turn.
    fn admit(&mut self, asked: Asked, encoded: Encoded) -> Result<(), Error> {
        let Asked { id, context_tokens, since, request, prefill, given, form, .. } = asked;
        let Encoded { units: mut prompt, pieces, took: encode } = encoded;
        prompt.extend(prefill.iter().chain(&given).copied().map(Unit::Text));
        if prompt.len() >= context_tokens {
            return Err(Error::ContextOverflow {
                model: self.name.clone(),
                prompt_tokens: u32::try_from(prompt.len()).unwrap_or(u32::MAX),
                context_tokens: u32::try_from(context_tokens).unwrap_or(u32::MAX),
            });
        }
        self.refuse_what_no_step_holds(&pieces)?;
        let mut sampler = Sampler::new(self.model, context_tokens, &request, form.as_ref(), &mut self.tried)?;
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
        let writer = Writer { sampler, answer, parts, pieces, likely };
        let given = given.len();
        self.scheduler.push(Waiting { id, prompt, given, max_tokens, context_tokens, since, encode, writer });
        Ok(())
    }

    /// What attends to itself both ways is computed in one step, beside an answer of every other sequence.
    fn refuse_what_no_step_holds(&self, pieces: &Pieces) -> Result<(), Error> {
        let most = self.scheduler.step_tokens() - self.scheduler.parallel();
        let whole = pieces.values().filter(|piece| piece.is_non_causal()).map(|piece| piece.len());
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

    fn step(&mut self, frames: &mut FrameWriter) -> anyhow::Result<()> {
        let mut cells = cells(&mut self.context, self.model, &mut self.parking);
        self.scheduler.begin_waiting(&mut cells);
        self.scheduler.give_up_dear(&mut cells);
        let step = self.scheduler.fill(&mut cells);
        if step.rows.is_empty() {
            return Ok(());
        }
        let began = Instant::now();
        if let Err(reason) = self.compute(&step) {
            return self.fail_all(frames, &reason);
        }
        self.scheduler.pace.observe(step.answers, step.rows.len() - step.answers, began.elapsed());
        for index in 0..self.scheduler.sequences.len() {
            self.advance(index, frames)?;
        }
        Ok(())
    }

    /// Computes a step; what is kept of ended generations makes room for it, where there is no other.
    fn compute(&mut self, step: &Step) -> Result<(), String> {
        let is_text = step.rows.iter().all(|row| row.unit.text().is_some());
        match is_text {
            true => self.fill_batch(step).map_err(|error| error.to_string())?,
            false => self.fill_mixed(step).map_err(|error| error.to_string())?,
        }
        if step.is_non_causal {
            self.context.set_causal_attn(false);
        }
        let outcome = loop {
            let (is_full, outcome) = match (&mut self.mixed, is_text) {
                (Some(mixed), false) => {
                    let outcome = self.context.process(mixed, LlamaProcessType::Decode);
                    (matches!(outcome, Err(ProcessError::NoKvCacheSlot)), outcome.map_err(|error| error.to_string()))
                }
                _ => {
                    let outcome = self.context.decode(&mut self.batch);
                    (matches!(outcome, Err(DecodeError::NoKvCacheSlot)), outcome.map_err(|error| error.to_string()))
                }
            };
            let mut cells = cells(&mut self.context, self.model, &mut self.parking);
            if !(is_full && self.scheduler.evict(&mut cells)) {
                break outcome;
            }
        };
        if step.is_non_causal {
            self.context.set_causal_attn(true);
        }
        outcome
    }

    fn fill_batch(&mut self, step: &Step) -> anyhow::Result<()> {
        self.batch.clear();
        for Row { unit, position, sequence, has_output } in &step.rows {
            let Some(token) = unit.text() else { continue };
            let (position, sequence) = (i32::try_from(*position)?, i32::try_from(*sequence)?);
            self.batch.add(token, position, &[sequence], *has_output)?;
        }
        Ok(())
    }

    /// Tokens, and what stands in their place.
    fn fill_mixed(&mut self, step: &Step) -> anyhow::Result<()> {
        let batch = match &mut self.mixed {
            Some(batch) => batch,
            none => none.insert(LlamaBatchExt::new(&self.context)?),
        };
        batch.clear();
        for Row { unit, position, sequence: at, has_output } in &step.rows {
            let (position, sequence) = (i32::try_from(*position)?, i32::try_from(*at)?);
            match unit {
                Unit::Text(token) => {
                    let entry = batch.add_token(*token, sequence)?;
                    batch.set_pos(entry, position)?;
                    batch.set_output(entry, *has_output)?;
                }
                Unit::Media { piece, index, .. } => {
                    let generation = self.scheduler.sequences[*at].generation.as_ref();
                    let piece = generation.and_then(|generation| generation.asked.writer.pieces.get(piece));
                    let (embedding, place) = piece.context("a piece of media is gone")?.part(*index as usize);
                    let entry = batch.add_embedding(EmbeddingRows::row(embedding), sequence)?;
                    let place = place.map(|at| position + at);
                    batch.set_positions(entry, &place[..batch.n_pos_per_embd()])?;
                }
            }
        }
        Ok(())
    }

    /// Goes on with one sequence by the tokens that this step has brought: one, and those of its draft that were right.
    fn advance(&mut self, index: usize, frames: &mut FrameWriter) -> anyhow::Result<()> {
        let sequence = &self.scheduler.sequences[index];
        let Some(generation) = &sequence.generation else { return Ok(()) };
        let Some(first) = generation.output_row else { return Ok(()) };
        let drafted = generation.drafted;
        let draft = sequence.cached[sequence.cached.len() - drafted..].to_vec();
        let mut accepted = 0;
        loop {
            let row = first + i32::try_from(accepted)?;
            let token = self.advance_by_one(index, row, drafted - accepted, frames)?;
            match (token, draft.get(accepted)) {
                (Some(token), Some(token_of_draft)) if token_of_draft.text() == Some(token) => accepted += 1,
                _ => break,
            }
        }
        let mut cells = cells(&mut self.context, self.model, &mut self.parking);
        self.scheduler.reject(index, drafted - accepted, &mut cells);
        let most = self.scheduler.draft_room(index);
        let sequence = &mut self.scheduler.sequences[index];
        if let Some(generation) = &mut sequence.generation
            && let Some(next) = generation.next
        {
            generation.acceptance.learn(accepted, drafted);
            generation.draft = generation.acceptance.draft(&sequence.cached, next, most);
        }
        Ok(())
    }

    /// Samples the next token of one sequence, sends its text, and ends the generation where it ends; `ahead` drafted tokens are in the
    /// cache that may be wrong. Returns the token if it goes on.
    fn advance_by_one(
        &mut self,
        index: usize,
        row: i32,
        ahead: usize,
        frames: &mut FrameWriter,
    ) -> anyhow::Result<Option<LlamaToken>> {
        let sequence = &mut self.scheduler.sequences[index];
        let in_cache = sequence.cached.len() - ahead;
        let Some(generation) = &mut sequence.generation else { return Ok(None) };
        generation.first_token.get_or_insert_with(Instant::now);
        generation.asked.writer.pieces = Pieces::new();
        if let Some(finish) = generation.limit(0).filter(|_| generation.generated == 0) {
            // No token is wanted, or all that are were given elsewhere.
            return self.end(index, finish, frames).map(|()| None);
        }
        let token = match generation.asked.writer.sampler.choose(self.model, &mut self.context, row) {
            Ok(token) => token,
            Err(error) => {
                let id = generation.asked.id;
                sequence.generation = None;
                return frames.queue(&FromWorker::Failed { id, error }).map(|()| None);
            }
        };
        generation.generated += 1;
        if self.model.is_eog_token(token) {
            return self.end(index, FinishReason::Stop, frames).map(|()| None);
        }
        if let Some((alternatives, waiting)) = &mut generation.asked.writer.likely {
            let logits = self.context.get_logits_ith(row);
            waiting.push(logprobs::of(self.model, logits, token, *alternatives));
        }
        let shown = generation.asked.writer.shown(token);
        let piece = self.model.token_to_raw_bytes(token, shown).unwrap_or_default();
        match generation.asked.writer.answer.push(&piece) {
            Pushed::Stopped(text) => {
                return self.end_with(index, FinishReason::Stop, text, frames).map(|()| None);
            }
            Pushed::Text(text) => {
                for event in generation.asked.writer.events(text) {
                    frames.queue(&FromWorker::Event { id: generation.asked.id, event })?;
                }
            }
        }
        generation.next = Some(token);
        let is_complete = generation.asked.writer.parts.as_ref().is_some_and(Parts::is_complete);
        match is_complete.then_some(FinishReason::Stop).or_else(|| generation.limit(in_cache)) {
            Some(finish) => self.end(index, finish, frames).map(|()| None),
            None => Ok(Some(token)),
        }
    }

    /// Ends a generation that no stop text ended: what was held back is part of the answer.
    fn end(&mut self, index: usize, finish: FinishReason, frames: &mut FrameWriter) -> anyhow::Result<()> {
        let Some(generation) = &mut self.scheduler.sequences[index].generation else { return Ok(()) };
        let rest = std::mem::replace(&mut generation.asked.writer.answer, AnswerText::new(&[])).finish();
        self.end_with(index, finish, rest, frames)
    }

    fn end_with(
        &mut self,
        index: usize,
        finish: FinishReason,
        text: String,
        frames: &mut FrameWriter,
    ) -> anyhow::Result<()> {
        let Some(mut generation) = self.scheduler.sequences[index].generation.take() else { return Ok(()) };
        let (id, writer) = (generation.asked.id, &mut generation.asked.writer);
        let mut events = writer.events(text);
        let mut finish = finish;
        if let Some(parts) = &mut writer.parts {
            let (rest, why) = parts.finish(finish);
            events.extend(rest);
            finish = why;
        }
        for event in events {
            frames.queue(&FromWorker::Event { id, event })?;
        }
        let event = Event::Done { finish, usage: generation.usage(), timings: generation.timings() };
        frames.queue(&FromWorker::Event { id, event })
    }

    /// A step that llama.cpp could not compute fails all that took part, and leaves an empty cache.
    fn fail_all(&mut self, frames: &mut FrameWriter, reason: &str) -> anyhow::Result<()> {
        let mut cells = cells(&mut self.context, self.model, &mut self.parking);
        for generation in self.scheduler.take_all(&mut cells) {
            let error = Error::Internal(format!("llama.cpp could not compute a step: {reason}"));
            frames.queue(&FromWorker::Failed { id: generation.asked.id, error })?;
        }
        self.context.clear_kv_cache();
        Ok(())
    }
}
