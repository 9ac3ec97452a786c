//! Continuous batching over the sequences of one model.
//!
//! Each step computes one token of every running answer, then as much of the waiting prompts as its token
//! budget allows, so that a long prompt does not freeze running answers or short prompts. Commands are taken
//! between steps: a cancelled generation stops within one.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use llama_cpp_4::chat::ChatTemplates;
use llama_cpp_4::context::LlamaContext;
use llama_cpp_4::llama_backend::LlamaBackend;
use llama_cpp_4::llama_batch::LlamaBatch;
use llama_cpp_4::model::{LlamaModel, Special};
use llama_cpp_4::token::LlamaToken;
use sarai_core::frame::{FromWorker, LoadSpec, LoadedInfo, ToWorker};
use sarai_core::{Error, Event, FinishReason, GenerateRequest};

use crate::answer::{AnswerText, Pushed};
use crate::channel::FrameWriter;
use crate::log;
use crate::model::{self, Allocation, step_tokens};
use crate::prompt::{self, Rendered};
use crate::sequence::{Generation, Sequence};

/// Prompt tokens per step while other answers run: bounds the gap between their tokens. Half as many make the gaps half as
/// long, and a long prompt a quarter slower to compute (Gemma-270M: 490 instead of 660 tokens/s on two cores).
const PROMPT_TOKENS_BESIDE_ANSWERS: usize = 128;

/// Loads the model, reports it, and computes until the server is gone.
///
/// # Errors
/// The model cannot be loaded; the text says why.
pub fn run(spec: &LoadSpec, commands: &Receiver<ToWorker>, frames: &mut FrameWriter) -> Result<(), String> {
    log::capture_llama();
    let backend = LlamaBackend::init().map_err(|error| error.to_string())?;
    let loaded = model::load(spec, Allocation::Real)?;
    let templates = ChatTemplates::from_model(&loaded, None).map_err(|error| error.to_string())?;
    let mut spec = spec.clone();
    let mut context = model::context(&spec, &backend, &loaded)?;
    model::release_idle(&spec);
    send(frames, &FromWorker::Loaded(info(&context)))?;
    loop {
        let mut engine = Engine::new(&spec, &loaded, &templates, context);
        let Outcome::Resize(context_tokens) = engine.serve(commands, frames) else { return Ok(()) };
        // The old context goes first: both at once were never planned.
        drop(engine);
        let wanted = LoadSpec { context_tokens, ..spec.clone() };
        let (made, failure) = match model::context(&wanted, &backend, &loaded) {
            Ok(made) => {
                spec = wanted;
                (made, None)
            }
            Err(failure) => (model::context(&spec, &backend, &loaded)?, Some(failure)),
        };
        context = made;
        model::trim_heap();
        send(frames, &FromWorker::Resized(info(&context), failure))?;
    }
}

fn info(context: &LlamaContext<'_>) -> LoadedInfo {
    LoadedInfo { context_tokens: context.n_ctx_seq(), memory: model::memory(context) }
}

fn send(frames: &mut FrameWriter, frame: &FromWorker) -> Result<(), String> {
    frames.send(frame).map_err(|error| error.to_string())
}

/// A generation that has not begun.
struct Waiting {
    id: u64,
    request: GenerateRequest,
    prompt: Rendered,
    context_tokens: usize,
    since: Instant,
}

impl Waiting {
    /// Cells that it may need.
    fn reserves(&self) -> usize {
        let answer = self.request.max_tokens.map_or(usize::MAX, |most| most as usize);
        let answer = answer.max(self.prompt.given);
        (self.prompt.tokens.len() - self.prompt.given).saturating_add(answer).min(self.context_tokens)
    }
}

/// Why an engine stops serving.
enum Outcome {
    /// The server is gone.
    End,
    /// So many tokens per sequence are wanted.
    Resize(u32),
}

struct Engine<'model> {
    name: String,
    model: &'model LlamaModel,
    templates: &'model ChatTemplates,
    context: LlamaContext<'model>,
    context_tokens: usize,
    ubatch_tokens: usize,
    batch: LlamaBatch,
    sequences: Vec<Sequence>,
    /// Generations that wait for cells, where sequences share them; the oldest first.
    waiting: VecDeque<Waiting>,
    /// Whether all sequences together hold what one may hold.
    shared: bool,
    uses: u64,
    path: PathBuf,
    resize: Option<u32>,
}

impl<'model> Engine<'model> {
    fn new(
        spec: &LoadSpec,
        model: &'model LlamaModel,
        templates: &'model ChatTemplates,
        context: LlamaContext<'model>,
    ) -> Self {
        let ubatch_tokens = step_tokens(spec) as usize;
        Self {
            name: spec.model.clone(),
            model,
            templates,
            context_tokens: context.n_ctx_seq() as usize,
            context,
            ubatch_tokens,
            batch: LlamaBatch::new(ubatch_tokens, 1),
            sequences: (0..spec.parallel).map(|_| Sequence::default()).collect(),
            waiting: VecDeque::new(),
            shared: spec.shared_context,
            uses: 0,
            path: spec.path.clone(),
            resize: None,
        }
    }

    fn serve(&mut self, commands: &Receiver<ToWorker>, frames: &mut FrameWriter) -> Outcome {
        loop {
            if !self.take_commands(commands, frames) {
                return Outcome::End;
            }
            if let Some(context_tokens) = self.resize {
                return Outcome::Resize(context_tokens);
            }
            if let Err(error) =
                self.begin_waiting(frames).and_then(|()| self.step(frames)).and_then(|()| frames.flush())
            {
                log::warn(&format!("the worker ends: {error:#}"));
                return Outcome::End;
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.sequences.iter().all(|sequence| sequence.generation.is_none())
    }

    /// Takes all commands that are there, and waits for one while nothing runs; false when the server is gone.
    fn take_commands(&mut self, commands: &Receiver<ToWorker>, frames: &mut FrameWriter) -> bool {
        loop {
            let command = if self.is_idle() {
                match commands.recv() {
                    Ok(command) => command,
                    Err(_) => return false,
                }
            } else {
                match commands.try_recv() {
                    Ok(command) => command,
                    Err(TryRecvError::Empty) => return true,
                    Err(TryRecvError::Disconnected) => return false,
                }
            };
            if self.obey(command, frames).is_err() {
                return false;
            }
            if self.resize.is_some() {
                return true;
            }
        }
    }

    fn obey(&mut self, command: ToWorker, frames: &mut FrameWriter) -> anyhow::Result<()> {
        match command {
            ToWorker::Generate { id, context_tokens, request } => match self.render(id, context_tokens, *request) {
                Ok(waiting) => {
                    self.waiting.push_back(waiting);
                    Ok(())
                }
                Err(error) => frames.send(&FromWorker::Failed { id, error }),
            },
            ToWorker::Cancel { id } => {
                self.waiting.retain(|waiting| waiting.id != id);
                for sequence in &mut self.sequences {
                    sequence.generation.take_if(|generation| generation.id == id);
                }
                Ok(())
            }
            ToWorker::Threads(threads) => {
                let threads = i32::try_from(threads.max(1)).unwrap_or(1);
                self.context.set_n_threads(threads, threads);
                Ok(())
            }
            ToWorker::Resize { context_tokens } => {
                anyhow::ensure!(self.is_idle(), "a context is resized only while nothing is generated");
                self.resize = Some(context_tokens);
                Ok(())
            }
            ToWorker::Trim => {
                model::trim(&self.path);
                Ok(())
            }
            ToWorker::Load(_) => anyhow::bail!("a worker loads once"),
        }
    }

    fn render(&self, id: u64, context_tokens: u32, request: GenerateRequest) -> Result<Waiting, Error> {
        let since = Instant::now();
        let context_tokens = self.context_tokens.min(context_tokens as usize);
        let prompt = prompt::render(self.model, self.templates, &request)?;
        if prompt.tokens.len() >= context_tokens {
            return Err(Error::ContextOverflow {
                model: self.name.clone(),
                prompt_tokens: u32::try_from(prompt.tokens.len()).unwrap_or(u32::MAX),
                context_tokens: u32::try_from(context_tokens).unwrap_or(u32::MAX),
            });
        }
        Ok(Waiting { id, request, prompt, context_tokens, since })
    }

    /// Begins what waits, in the order of arrival, as far as there are cells.
    fn begin_waiting(&mut self, frames: &mut FrameWriter) -> anyhow::Result<()> {
        while let Some(waiting) = self.waiting.pop_front() {
            let id = waiting.id;
            match self.has_cells_for(&waiting) {
                Ok(true) => {}
                Ok(false) => {
                    self.waiting.push_front(waiting);
                    break;
                }
                Err(error) => {
                    frames.queue(&FromWorker::Failed { id, error })?;
                    continue;
                }
            }
            if let Err(error) = self.begin(waiting) {
                frames.queue(&FromWorker::Failed { id, error })?;
            }
        }
        Ok(())
    }

    /// Whether a generation has the cells that it may need. Where sequences share them, those of idle ones are given up
    /// for it, the least recently used first; those that running answers may still need are not.
    fn has_cells_for(&mut self, waiting: &Waiting) -> Result<bool, Error> {
        if !self.shared {
            return Ok(true);
        }
        let running = self.sequences.iter().filter_map(|sequence| sequence.generation.as_ref());
        let reserved: usize = running.map(Generation::reserves).sum();
        let needed = waiting.reserves();
        if reserved + needed > self.context_tokens {
            return Ok(false);
        }
        let chosen = self.choose_sequence(&waiting.prompt.tokens)?;
        loop {
            let idle = |(index, sequence): &(usize, &Sequence)| *index != chosen && sequence.generation.is_none();
            let idle = || self.sequences.iter().enumerate().filter(idle);
            let kept: usize = idle().map(|(_, sequence)| sequence.cached.len()).sum();
            if reserved + needed + kept <= self.context_tokens {
                return Ok(true);
            }
            let oldest = idle().filter(|(_, sequence)| !sequence.cached.is_empty());
            let Some(oldest) = oldest.min_by_key(|(_, sequence)| sequence.last_used).map(|(index, _)| index) else {
                return Ok(true);
            };
            let sequence = u32::try_from(oldest).map_err(|error| Error::Internal(error.to_string()))?;
            let cleared = self.context.clear_kv_cache_seq(Some(sequence), None, None);
            cleared.map_err(|error| Error::Internal(error.to_string()))?;
            self.sequences[oldest].cached.clear();
        }
    }

    fn begin(&mut self, waiting: Waiting) -> Result<(), Error> {
        let Waiting { id, request, prompt: Rendered { tokens, given }, context_tokens, since: started } = waiting;
        let request = &request;
        let mut sampler = prompt::sampler(self.model, context_tokens, request)?;
        for &token in &tokens {
            sampler.accept(token, false);
        }
        let index = self.choose_sequence(&tokens)?;
        let cached = self.keep_prefix(index, &tokens)?;
        self.uses += 1;
        self.sequences[index].last_used = self.uses;
        self.sequences[index].generation = Some(Generation {
            id,
            sampler,
            answer: AnswerText::after(&request.given, &request.stop),
            prompt: tokens,
            given,
            cached,
            context_tokens,
            generated: 0,
            max_tokens: request.max_tokens.unwrap_or(u32::MAX),
            next: None,
            output_row: None,
            started,
            first_token: None,
        });
        Ok(())
    }

    /// The free sequence that shares the longest prefix; among equals, the least recently used.
    fn choose_sequence(&self, prompt: &[LlamaToken]) -> Result<usize, Error> {
        let free = self.sequences.iter().enumerate().filter(|(_, sequence)| sequence.generation.is_none());
        free.max_by_key(|(_, sequence)| (sequence.shared_prefix(prompt), u64::MAX - sequence.last_used))
            .map(|(index, _)| index)
            .ok_or_else(|| Error::Internal("more generations than sequences".into()))
    }

    /// Cuts the cache of a sequence down to the prefix it shares with the prompt, less one token: the last
    /// one is always computed, since its logits are needed.
    fn keep_prefix(&mut self, index: usize, prompt: &[LlamaToken]) -> Result<usize, Error> {
        let internal = |error: &dyn std::fmt::Display| Error::Internal(error.to_string());
        let mut keep = self.sequences[index].shared_prefix(prompt).min(prompt.len() - 1);
        let sequence = u32::try_from(index).map_err(|error| internal(&error))?;
        let from = u32::try_from(keep).map_err(|error| internal(&error))?;
        let lost = self.window_has_moved_beyond(index, keep);
        let cut = self.context.clear_kv_cache_seq(Some(sequence), Some(from), None).map_err(|e| internal(&e))?;
        if lost || !cut {
            // A recurrent state, or a window that has moved on, cannot be cut: compute it all again.
            self.context.clear_kv_cache_seq(Some(sequence), None, None).map_err(|e| internal(&e))?;
            keep = 0;
        }
        self.sequences[index].cached.truncate(keep);
        Ok(keep)
    }

    /// Whether a sliding window needs cells before position `keep` that are not in the cache any more.
    fn window_has_moved_beyond(&self, index: usize, keep: usize) -> bool {
        let window = usize::try_from(self.model.n_swa()).unwrap_or(0);
        let first = i32::try_from(index).map_or(-1, |sequence| self.context.memory_seq_pos_min(sequence));
        window > 0 && keep > 0 && usize::try_from(first).is_ok_and(|first| first > keep.saturating_sub(window))
    }

    fn step(&mut self, frames: &mut FrameWriter) -> anyhow::Result<()> {
        self.fill_batch()?;
        if self.batch.n_tokens() == 0 {
            return Ok(());
        }
        if let Err(error) = self.context.decode(&mut self.batch) {
            return self.fail_all(frames, &error.to_string());
        }
        for index in 0..self.sequences.len() {
            self.advance(index, frames)?;
        }
        Ok(())
    }

    /// One token of every answer, then prompts: half of the room for the oldest, the rest for the shortest first.
    fn fill_batch(&mut self) -> anyhow::Result<()> {
        self.batch.clear();
        let answers = self.add_answers()?;
        let mut room = self.ubatch_tokens - answers;
        if answers > 0 {
            room = room.min(PROMPT_TOKENS_BESIDE_ANSWERS);
        }
        let has_prompt = |&index: &usize| self.sequences[index].prompt_left() > 0;
        let mut prompts: Vec<_> = (0..self.sequences.len()).filter(has_prompt).collect();
        prompts.sort_by_key(|&index| self.sequences[index].age());
        if let Some(&oldest) = prompts.first() {
            room -= self.add_prompt(oldest, room.div_ceil(2))?;
        }
        prompts.sort_by_key(|&index| self.sequences[index].prompt_left());
        for index in prompts {
            room -= self.add_prompt(index, room)?;
        }
        Ok(())
    }

    fn add_answers(&mut self) -> anyhow::Result<usize> {
        let mut answers = 0;
        for (index, sequence) in (0..).zip(&mut self.sequences) {
            let Some(generation) = &mut sequence.generation else { continue };
            generation.output_row = None;
            if let Some(token) = generation.next.take() {
                generation.output_row = Some(self.batch.n_tokens());
                self.batch.add(token, i32::try_from(sequence.cached.len())?, &[index], true)?;
                sequence.cached.push(token);
                answers += 1;
            }
        }
        Ok(answers)
    }

    /// Adds so many tokens of a prompt at most; returns how many.
    fn add_prompt(&mut self, index: usize, room: usize) -> anyhow::Result<usize> {
        let sequence = &mut self.sequences[index];
        let Some(generation) = &mut sequence.generation else { return Ok(0) };
        let done = sequence.cached.len();
        let until = generation.prompt.len().min(done + room);
        for position in done..until {
            let token = generation.prompt[position];
            let last = position + 1 == generation.prompt.len();
            if last {
                generation.output_row = Some(self.batch.n_tokens());
            }
            self.batch.add(token, i32::try_from(position)?, &[i32::try_from(index)?], last)?;
            sequence.cached.push(token);
        }
        Ok(until.saturating_sub(done))
    }

    /// Samples the next token of one sequence, sends its text, and ends the generation where it ends.
    fn advance(&mut self, index: usize, frames: &mut FrameWriter) -> anyhow::Result<()> {
        let sequence = &mut self.sequences[index];
        let in_cache = sequence.cached.len();
        let Some(generation) = &mut sequence.generation else { return Ok(()) };
        let Some(row) = generation.output_row else { return Ok(()) };
        generation.first_token.get_or_insert_with(Instant::now);
        if let Some(finish) = generation.limit(0).filter(|_| generation.generated == 0) {
            // No token is wanted, or all that are were given elsewhere.
            return self.end(index, finish, frames);
        }
        let token = match generation.sampler.sample(&mut self.context, row, false) {
            Ok(token) => token,
            Err(error) => {
                let id = generation.id;
                sequence.generation = None;
                return frames.queue(&FromWorker::Failed { id, error: Error::Internal(error.to_string()) });
            }
        };
        generation.sampler.accept(token, true);
        generation.generated += 1;
        if self.model.is_eog_token(token) {
            return self.end(index, FinishReason::Stop, frames);
        }
        let piece = self.model.token_to_raw_bytes(token, Special::Plaintext).unwrap_or_default();
        match generation.answer.push(&piece) {
            Pushed::Stopped(text) => return self.end_with(index, FinishReason::Stop, text, frames),
            Pushed::Text(text) if !text.is_empty() => {
                frames.queue(&FromWorker::Event { id: generation.id, event: Event::Text(text) })?;
            }
            Pushed::Text(_) => {}
        }
        generation.next = Some(token);
        match generation.limit(in_cache) {
            Some(finish) => self.end(index, finish, frames),
            None => Ok(()),
        }
    }

    /// Ends a generation that no stop text ended: what was held back is part of the answer.
    fn end(&mut self, index: usize, finish: FinishReason, frames: &mut FrameWriter) -> anyhow::Result<()> {
        let Some(generation) = &mut self.sequences[index].generation else { return Ok(()) };
        let rest = std::mem::replace(&mut generation.answer, AnswerText::new(&[])).finish();
        self.end_with(index, finish, rest, frames)
    }

    fn end_with(
        &mut self,
        index: usize,
        finish: FinishReason,
        text: String,
        frames: &mut FrameWriter,
    ) -> anyhow::Result<()> {
        let Some(generation) = self.sequences[index].generation.take() else { return Ok(()) };
        let id = generation.id;
        if !text.is_empty() {
            frames.queue(&FromWorker::Event { id, event: Event::Text(text) })?;
        }
        let event = Event::Done { finish, usage: generation.usage(), timings: generation.timings() };
        frames.queue(&FromWorker::Event { id, event })
    }

    /// A step that llama.cpp could not compute fails all that took part, and leaves an empty cache.
    fn fail_all(&mut self, frames: &mut FrameWriter, reason: &str) -> anyhow::Result<()> {
        self.context.clear_kv_cache();
        for sequence in &mut self.sequences {
            sequence.cached.clear();
            if let Some(generation) = sequence.generation.take() {
                let error = Error::Internal(format!("llama.cpp could not compute a step: {reason}"));
                frames.queue(&FromWorker::Failed { id: generation.id, error })?;
            }
        }
        Ok(())
    }
}
