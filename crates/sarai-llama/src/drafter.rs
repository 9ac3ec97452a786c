//! A draft model: a smaller one of the same vocabulary follows each answer, and computes what it may go on with, token by token for as
//! long as it is sure. The model itself computes all of that in one step, and what it would have said otherwise is taken back, so a draft
//! changes how long an answer takes and nothing of what it says.
//!
//! The bindings drive heads that are trained with a model (MTP, EAGLE), and no models of their own.

use std::path::Path;

use llama_cpp_4::DecodeError;
use llama_cpp_4::context::LlamaContext;
use llama_cpp_4::llama_backend::LlamaBackend;
use llama_cpp_4::llama_batch::LlamaBatch;
use llama_cpp_4::model::LlamaModel;
use llama_cpp_4::token::LlamaToken;
use sarai_core::frame::LoadSpec;

use crate::cells::{Cells, ContextCells};
use crate::log;
use crate::model::{self, Allocation};

/// A token is drafted if it is at least so likely, as in llama.cpp's own server.
const SURE: f32 = 0.75;
/// The first tokens of a vocabulary are marks, which files name in their own ways.
const MARKS: i32 = 5;

/// Loads a draft model.
///
/// # Errors
/// It cannot be loaded, or its tokens are not those of the model.
pub fn load(spec: &LoadSpec, path: &Path, model: &LlamaModel) -> Result<LlamaModel, String> {
    // How it computes changes nothing of an answer.
    let own = LoadSpec { path: path.to_owned(), deterministic: false, ..spec.clone() };
    let draft = model::load(&own, Allocation::Copied, |_| {})?;
    let text = |model: &LlamaModel, token| model.token_get_text(token).map(str::to_owned).unwrap_or_default();
    let differs = |token: &LlamaToken| text(&draft, *token) != text(model, *token);
    let same = (MARKS..draft.n_vocab().min(model.n_vocab())).map(LlamaToken);
    match same.into_iter().find(differs) {
        None => Ok(draft),
        Some(token) => Err(format!(
            "{} cannot draft for it: token {} is `{}` there and `{}` here: name a smaller model of the same family as `draft_path`",
            path.display(),
            token.0,
            text(&draft, token),
            text(model, token)
        )),
    }
}

/// An answer that is followed.
#[derive(Debug)]
pub struct Followed {
    /// Its place.
    pub place: usize,
    /// All of its tokens: of the prompt, of the answer, and the next one.
    pub tokens: Vec<LlamaToken>,
    /// So many are guessed at most; none where the prompt is still being read.
    pub most: usize,
}

/// Follows the answers of a model.
pub struct Drafter<'model> {
    model: &'model LlamaModel,
    context: LlamaContext<'model>,
    batch: LlamaBatch,
    step_tokens: usize,
    /// Tokens that it was trained to follow at most, or has room for.
    most_tokens: usize,
    /// Tokens that the model knows.
    known: i32,
    /// What the cells of each place hold.
    held: Vec<Vec<LlamaToken>>,
}

impl<'model> Drafter<'model> {
    /// One with a place for each of the model's.
    ///
    /// # Errors
    /// llama.cpp cannot make its context.
    pub fn new(
        spec: &LoadSpec,
        backend: &LlamaBackend,
        draft: &'model LlamaModel,
        model: &LlamaModel,
    ) -> Result<Self, String> {
        let own = LoadSpec { draft_tokens: 0, deterministic: false, ..spec.clone() };
        let context = model::context(&own, backend, draft)?;
        let step_tokens = model::step_tokens(&own) as usize;
        Ok(Self {
            model: draft,
            context,
            batch: LlamaBatch::new(step_tokens, 1),
            step_tokens,
            most_tokens: model::sequence_tokens(&own).min(draft.n_ctx_train()) as usize,
            known: model.n_vocab().min(draft.n_vocab()),
            held: vec![Vec::new(); spec.parallel as usize],
        })
    }

    /// How many threads compute it.
    pub fn set_threads(&mut self, threads: i32) {
        self.context.set_n_threads(threads, threads);
    }

    /// Follows answers by so many tokens in all, and guesses what those go on with that it has caught up with.
    pub fn draft(&mut self, followed: &[Followed], room: usize) -> Vec<Vec<LlamaToken>> {
        let mut drafts = vec![Vec::new(); followed.len()];
        if let Err(error) = self.try_draft(followed, room, &mut drafts) {
            log::warn(&format!("a draft could not be computed: {error}"));
            (0..self.held.len()).for_each(|place| {
                self.keep(place, 0);
            });
            drafts.iter_mut().for_each(Vec::clear);
        }
        drafts
    }

    fn try_draft(&mut self, followed: &[Followed], room: usize, drafts: &mut [Vec<LlamaToken>]) -> Result<(), String> {
        // Of which answer the next token is guessed, and from which row of the batch.
        let mut ready = self.follow(followed, room)?;
        while !ready.is_empty() {
            let guessed: Vec<_> = ready.iter().filter_map(|&(index, row)| Some((index, self.guess(row)?))).collect();
            self.batch.clear();
            ready.clear();
            for (index, token) in guessed {
                drafts[index].push(token);
                let Followed { place, tokens, most } = &followed[index];
                if drafts[index].len() < *most && tokens.len() + drafts[index].len() < self.most_tokens {
                    ready.push((index, self.add(*place, token, true)?));
                }
            }
            if !ready.is_empty() {
                self.compute(followed)?;
            }
        }
        Ok(())
    }

    /// Computes what it lacks of the answers, as far as there is room, the shortest first; returns those that it has caught up with.
    fn follow(&mut self, followed: &[Followed], room: usize) -> Result<Vec<(usize, i32)>, String> {
        let mut room = room.min(self.step_tokens);
        let mut lacking = Vec::new();
        for (index, Followed { place, tokens, most }) in followed.iter().enumerate() {
            // Larger models of a family may have marks that their smaller ones do not know.
            if tokens.len() < self.most_tokens && tokens.iter().all(|token| token.0 < self.known) {
                let common = self.held[*place].iter().zip(tokens).take_while(|(held, token)| held == token).count();
                // Where it is wanted what follows the last one, that is computed in any case.
                let kept = self.keep(*place, common.min(tokens.len() - usize::from(*most > 0 && !tokens.is_empty())));
                lacking.push((tokens.len() - kept, index, kept));
            }
        }
        lacking.sort_unstable();
        self.batch.clear();
        let mut ready = Vec::new();
        for (_, index, kept) in lacking {
            let Followed { place, tokens, most } = &followed[index];
            let until = tokens.len().min(kept + room);
            for (at, token) in tokens.iter().enumerate().take(until).skip(kept) {
                let is_last = at + 1 == tokens.len() && *most > 0;
                let row = self.add(*place, *token, is_last)?;
                if is_last {
                    ready.push((index, row));
                }
            }
            room -= until - kept;
        }
        self.compute(followed)?;
        Ok(ready)
    }

    fn add(&mut self, place: usize, token: LlamaToken, has_output: bool) -> Result<i32, String> {
        let (row, position) = (self.batch.n_tokens(), self.held[place].len());
        let number = |n: usize| i32::try_from(n).map_err(|error| error.to_string());
        self.batch.add(token, number(position)?, &[number(place)?], has_output).map_err(|error| error.to_string())?;
        self.held[place].push(token);
        Ok(row)
    }

    /// Computes the batch; places that nobody follows make room for it, where there is no other.
    fn compute(&mut self, followed: &[Followed]) -> Result<(), String> {
        if self.batch.n_tokens() == 0 {
            return Ok(());
        }
        loop {
            match self.context.decode(&mut self.batch) {
                Ok(()) => return Ok(()),
                Err(DecodeError::NoKvCacheSlot) if self.let_go(followed) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    fn let_go(&mut self, followed: &[Followed]) -> bool {
        let is_idle = |place: &usize| followed.iter().all(|one| one.place != *place);
        let idle: Vec<_> = (0..self.held.len()).filter(is_idle).filter(|place| !self.held[*place].is_empty()).collect();
        idle.iter().for_each(|place| {
            self.keep(*place, 0);
        });
        !idle.is_empty()
    }

    /// Keeps the first tokens of a place, or none where they cannot be gone on from; returns how many.
    fn keep(&mut self, place: usize, tokens: usize) -> usize {
        let held = self.held[place].len();
        if tokens == held {
            return held;
        }
        let window = model::window(self.model);
        let mut cells = ContextCells { context: &mut self.context, window, parking: None };
        let kept = if cells.holds(place, tokens) && cells.cut(place, tokens) { tokens } else { 0 };
        if kept == 0 {
            cells.cut(place, 0);
        }
        self.held[place].truncate(kept);
        kept
    }

    /// The most likely token of a row, if it is likely enough and does not end the answer.
    fn guess(&self, row: i32) -> Option<LlamaToken> {
        let logits = self.context.get_logits_ith(row);
        let (token, most) = logits.iter().enumerate().max_by(|(_, a), (_, b)| a.total_cmp(b))?;
        let likely = 1.0 / logits.iter().map(|logit| (logit - most).exp()).sum::<f32>();
        let token = LlamaToken(i32::try_from(token).ok()?);
        let is_sure = likely >= SURE && token.0 < self.known && !self.model.is_eog_token(token);
        is_sure.then_some(token)
    }
}
