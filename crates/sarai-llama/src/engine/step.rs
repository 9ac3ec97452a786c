//! One step: it is computed as the scheduler has chosen it, and what comes of it is sent.

use std::time::Instant;

use anyhow::Context as _;
use llama_cpp_4::llama_batch_ext::{EmbeddingRows, LlamaBatchExt, LlamaProcessType};
use llama_cpp_4::token::LlamaToken;
use llama_cpp_4::{DecodeError, ProcessError};
use sarai_core::frame::FromWorker;
use sarai_core::{Error, Event, FinishReason};

use super::{Engine, cells};
use crate::answer::{AnswerText, Pushed};
use crate::channel::FrameWriter;
use crate::chat::Parts;
use crate::drafter::Followed;
use crate::logprobs;
use crate::media::Pieces;
use crate::pages;
use crate::prompt::given_tokens;
use crate::schedule::{Row, Step};
use crate::unit::Unit;

/// A draft model follows by so many tokens in each step at least, and else by as many as the step had.
const LEAST_FOLLOWED: usize = 32;

impl Engine<'_> {
    pub(super) fn step(&mut self, frames: &mut FrameWriter) -> anyhow::Result<()> {
        let mut cells = cells(&mut self.context, self.model, &mut self.parking);
        self.scheduler.begin_waiting(&mut cells);
        self.scheduler.give_up_dear(&mut cells);
        let step = self.scheduler.fill(&mut cells);
        self.have_encoded();
        if step.rows.is_empty() {
            self.is_stuck = true;
            return Ok(());
        }
        let began = Instant::now();
        if let Err(reason) = self.compute(&step) {
            return self.fail_all(frames, &reason);
        }
        let took = began.elapsed();
        self.scheduler.pace.observe(step.answers, step.rows.len() - step.answers, took);
        for index in 0..self.scheduler.sequences.len() {
            self.advance(index, frames)?;
        }
        // Nobody waits for a draft, or for what is tidied up, to see what is there.
        frames.flush()?;
        self.give_back_after_forms();
        let drafting = Instant::now();
        self.draft(step.rows.len());
        self.rest.after(took + drafting.elapsed());
        Ok(())
    }

    /// What following a form took is given back with the last answer that does: it was lent, and is in no plan.
    pub(super) fn give_back_after_forms(&mut self) {
        let follows = self.scheduler.running().any(|generation| generation.asked.writer.sampler.follows_form());
        if std::mem::replace(&mut self.follows_forms, follows) && !follows {
            pages::trim_heap();
        }
    }

    /// Has the draft model follow what this step has computed, and guess what answers go on with whose text does not repeat.
    fn draft(&mut self, computed: usize) {
        let Some(drafter) = &mut self.drafter else { return };
        let mut followed = Vec::new();
        for (place, sequence) in self.scheduler.sequences.iter().enumerate() {
            let Some(generation) = &sequence.generation else { continue };
            let room = self.scheduler.draft_room(place);
            let most = match generation.next {
                _ if room == 0 || generation.acceptance.is_paused() || !generation.draft.is_empty() => continue,
                // Bulk that had no part in this step has its next token already.
                Some(_) if generation.output_row.is_none() => continue,
                Some(_) => room,
                None => 0,
            };
            let text = sequence.cached.iter().map(|unit| unit.text());
            if let Some(tokens) = text.chain(generation.next.map(Some)).collect() {
                followed.push(Followed { place, tokens, most });
            }
        }
        if followed.is_empty() {
            return;
        }
        let drafts = drafter.draft(&followed, computed.max(LEAST_FOLLOWED));
        for (Followed { place, .. }, draft) in followed.into_iter().zip(drafts) {
            if let Some(generation) = &mut self.scheduler.sequences[place].generation {
                generation.draft = draft;
            }
        }
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
            generation.count_draft(accepted, drafted);
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
            generation.asked.writer.told.iter_mut().for_each(|told| told.push(token, &[]));
            return self.end(index, FinishReason::Stop, frames).map(|()| None);
        }
        if let Some((alternatives, waiting)) = &mut generation.asked.writer.likely {
            let logits = self.context.get_logits_ith(row);
            waiting.push(logprobs::of(self.model, logits, token, *alternatives));
        }
        let shown = generation.asked.writer.shown(token);
        let piece = self.model.token_to_raw_bytes(token, shown).unwrap_or_default();
        generation.asked.writer.told.iter_mut().for_each(|told| told.push(token, &piece));
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
        let (rest, finish) = writer.finish(finish);
        events.extend(rest);
        if let Some(told) = &writer.told {
            let prompt: Option<Vec<_>> = generation.asked.prompt.iter().map(|unit| unit.text()).collect();
            let (tokens, rest) = told.passed_on();
            // What cannot be tokenised, such as a NUL, is no reason to end all answers.
            let rest = given_tokens(self.model, rest).unwrap_or_default();
            // What stands for a picture is no token.
            events.extend(prompt.map(|prompt| {
                Event::Context(prompt.into_iter().chain(tokens).chain(rest).map(|token| token.0).collect())
            }));
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
