//! Vectors and scores: texts are read whole, several side by side in one step, and nothing is kept of them.
//!
//! Requests take turns, one text each, so that a long list does not keep a short one waiting.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::Instant;

use llama_cpp_4::context::LlamaContext;
use llama_cpp_4::llama_batch::LlamaBatch;
use llama_cpp_4::model::{AddBos, LlamaModel, Special};
use llama_cpp_4::token::LlamaToken;
use sarai_core::frame::{FromWorker, LoadSpec, Purpose, ToWorker};
use sarai_core::{EmbedRequest, Error, Event, FinishReason, Input, Lane, Timings, Usage};

use crate::channel::{FrameWriter, Incoming};
use crate::prompt::known;
use crate::rest::Rest;
use crate::{log, model, pages};

/// Tokens that one step reads, unless a single text is longer: each token attends to all of a step.
const STEP: usize = 512;

/// One request.
struct Job {
    id: u64,
    /// Texts that are not read yet, with their places in the request.
    left: VecDeque<(usize, Vec<LlamaToken>)>,
    tokens: usize,
    lane: Lane,
    since: Instant,
    began: Option<Instant>,
}

/// Requests, whose turn it is first, and steps that were made.
#[derive(Default)]
struct Jobs {
    all: VecDeque<Job>,
    steps: u32,
}

/// Bulk takes part in every so manieth step while there is something else to compute, as where answers are computed.
const BULK_EVERY: u32 = 4;

/// Serves until the server is gone.
pub fn serve(
    spec: &LoadSpec,
    model: &LlamaModel,
    mut context: LlamaContext<'_>,
    commands: &Receiver<Incoming>,
    frames: &mut FrameWriter,
) {
    let most = (model::sequence_tokens(spec) as usize).min(spec.context_tokens as usize);
    let reader = Reader { name: &spec.model, model, most, purpose: spec.purpose };
    let (mut jobs, mut rest) = (Jobs::default(), Rest::default());
    loop {
        let command = match (jobs.all.is_empty(), rest.left()) {
            (true, _) => commands.recv().map_err(|_| TryRecvError::Disconnected),
            (false, None) => commands.try_recv(),
            (false, Some(left)) => commands.recv_timeout(left).map_err(|error| match error {
                RecvTimeoutError::Timeout => TryRecvError::Empty,
                RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
            }),
        };
        let outcome = match command {
            Ok(Incoming::Command(ToWorker::Leave)) | Err(TryRecvError::Disconnected) => return,
            Err(TryRecvError::Empty) => {
                let began = Instant::now();
                let outcome = step(&mut context, spec, &mut jobs, frames);
                rest.after(began.elapsed());
                outcome
            }
            // It sees and hears nothing.
            Ok(Incoming::Read(_) | Incoming::Tried(..)) => Ok(()),
            Ok(Incoming::Command(ToWorker::Share { threads, rests })) => {
                let threads = i32::try_from(threads.max(1)).unwrap_or(1);
                context.set_n_threads(threads, threads);
                rest.set(rests);
                Ok(())
            }
            Ok(Incoming::Command(command)) => obey(command, &reader, &spec.path, &mut jobs.all, frames),
        };
        if let Err(error) = outcome.and_then(|()| frames.flush()) {
            return log::warn(&format!("the worker ends: {error:#}"));
        }
    }
}

fn obey(
    command: ToWorker,
    reader: &Reader<'_>,
    path: &std::path::Path,
    jobs: &mut VecDeque<Job>,
    frames: &mut FrameWriter,
) -> anyhow::Result<()> {
    match command {
        ToWorker::Embed { id, request } => match reader.job(id, *request) {
            Ok(job) => jobs.push_back(job),
            Err(error) => frames.queue(&FromWorker::Failed { id, error })?,
        },
        ToWorker::Cancel { id } => jobs.retain(|job| job.id != id),
        ToWorker::Generate { id, .. } => {
            let error = Error::invalid("model", "it makes vectors and does not answer: use a model of role chat");
            frames.queue(&FromWorker::Failed { id, error })?;
        }
        ToWorker::Trim => pages::trim(path),
        ToWorker::Resize { .. } | ToWorker::Load(_) | ToWorker::Leave | ToWorker::Share { .. } => {
            anyhow::bail!("a worker that makes vectors has the size that it was loaded with")
        }
    }
    Ok(())
}

/// The texts of one step, each job's in its turn, until the next one does not fit; whose turn it is comes first in the next step.
fn next_texts(Jobs { all: jobs, steps }: &mut Jobs, most: usize, step: usize) -> Vec<(u64, usize, Vec<LlamaToken>)> {
    let mut texts: Vec<(u64, usize, Vec<LlamaToken>)> = Vec::new();
    let mut tokens = 0;
    let is_waited_for = |job: &Job| !job.left.is_empty() && job.lane == Lane::Interactive;
    let with_bulk = steps.is_multiple_of(BULK_EVERY) || !jobs.iter().any(is_waited_for);
    *steps = steps.wrapping_add(1);
    let may_come = |job: &Job| !job.left.is_empty() && (with_bulk || job.lane == Lane::Interactive);
    while texts.len() < most && jobs.iter().any(may_come) {
        let Some(mut job) = jobs.pop_front() else { break };
        if !may_come(&job) {
            jobs.push_back(job);
            continue;
        }
        if let Some((index, text)) = job.left.pop_front() {
            if !texts.is_empty() && tokens + text.len() > step {
                job.left.push_front((index, text));
                jobs.push_front(job);
                break;
            }
            job.began.get_or_insert_with(Instant::now);
            tokens += text.len();
            texts.push((job.id, index, text));
        }
        jobs.push_back(job);
    }
    texts
}

/// Reads as many texts as one step holds.
fn step(
    context: &mut LlamaContext<'_>,
    spec: &LoadSpec,
    jobs: &mut Jobs,
    frames: &mut FrameWriter,
) -> anyhow::Result<()> {
    // The mean of a text's tokens adds up in another order where others stand beside them.
    let most = if spec.deterministic { 1 } else { spec.parallel as usize };
    let texts = next_texts(jobs, most, STEP.min(model::step_tokens(spec) as usize));
    let jobs = &mut jobs.all;
    if !texts.is_empty() {
        let mut batch = LlamaBatch::new(texts.iter().map(|(.., text)| text.len()).sum(), 1);
        for (sequence, (.., text)) in texts.iter().enumerate() {
            batch.add_sequence(text, i32::try_from(sequence)?, true)?;
        }
        context.clear_kv_cache();
        if let Err(error) = context.decode(&mut batch) {
            let failed = |id| FromWorker::Failed {
                id,
                error: Error::Internal(format!("llama.cpp could not compute a step: {error}")),
            };
            for id in texts.iter().map(|(id, ..)| *id) {
                jobs.retain(|job| job.id != id);
                frames.queue(&failed(id))?;
            }
            return Ok(());
        }
        for (sequence, (id, index, _)) in texts.iter().enumerate() {
            let Ok(values) = context.embeddings_seq_ith(i32::try_from(sequence)?) else {
                jobs.retain(|job| job.id != *id);
                let error = Error::Internal("llama.cpp made no vector of a text".into());
                frames.queue(&FromWorker::Failed { id: *id, error })?;
                continue;
            };
            let mut values = values.to_vec();
            match spec.purpose {
                Purpose::Scores => values.truncate(1),
                _ => normalise(&mut values),
            }
            frames.queue(&FromWorker::Event { id: *id, event: Event::Vector { index: *index, values } })?;
        }
    }
    for job in jobs.iter().filter(|job| job.left.is_empty()) {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let usage = Usage { prompt_tokens: count(job.tokens), ..Usage::default() };
        let began = job.began.unwrap_or(job.since);
        let timings = Timings { queue: began - job.since, prefill: began.elapsed(), ..Timings::default() };
        let event = Event::Done { finish: FinishReason::Stop, usage, timings };
        frames.queue(&FromWorker::Event { id: job.id, event })?;
    }
    jobs.retain(|job| !job.left.is_empty());
    Ok(())
}

/// To the length 1, as both APIs have it.
fn normalise(values: &mut [f32]) {
    let length = values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        #[expect(clippy::cast_possible_truncation, reason = "it was one")]
        values.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
    }
}

/// Makes tokens of inputs.
struct Reader<'a> {
    name: &'a str,
    model: &'a LlamaModel,
    /// Tokens of a text at most.
    most: usize,
    purpose: Purpose,
}

impl Reader<'_> {
    fn job(&self, id: u64, request: EmbedRequest) -> Result<Job, Error> {
        let EmbedRequest { inputs, query, truncate, lane, context_tokens } = request;
        let most = self.most.min(context_tokens.map_or(usize::MAX, |tokens| tokens as usize));
        match (self.purpose, &query) {
            (Purpose::Scores, None) => {
                return Err(Error::invalid("model", format!("`{}` scores texts: use /v1/rerank", self.name)));
            }
            (Purpose::Vectors, Some(_)) => {
                return Err(Error::invalid("model", format!("`{}` makes vectors: use /v1/embeddings", self.name)));
            }
            _ => {}
        }
        let texts = inputs.into_iter().enumerate().map(|(index, input)| {
            let tokens = match &query {
                None => self.text(input)?,
                Some(query) => self.pair(query, input)?,
            };
            Ok((index, self.within(tokens, most, truncate)?))
        });
        let left = texts.collect::<Result<VecDeque<_>, Error>>()?;
        let tokens = left.iter().map(|(_, text)| text.len()).sum();
        Ok(Job { id, left, tokens, lane, since: Instant::now(), began: None })
    }

    fn tokens(&self, text: &str, marks: AddBos, special: Special) -> Result<Vec<LlamaToken>, Error> {
        let tokens = self.model.str_to_token_with_special(text, marks, special);
        tokens.map_err(|error| Error::invalid("input", format!("a text cannot be read: {error}")))
    }

    fn text(&self, input: Input) -> Result<Vec<LlamaToken>, Error> {
        let tokens = match input {
            Input::Text(text) => self.tokens(&text, AddBos::Always, Special::Tokenize)?,
            Input::Tokens(tokens) => known(self.model, "input", &tokens)?,
        };
        if tokens.is_empty() {
            return Err(Error::invalid("input", "a text is empty: send at least one token"));
        }
        Ok(tokens)
    }

    /// A question and a text that may answer it, as the model's own template has them, or as BERT's pairs are written.
    fn pair(&self, query: &str, input: Input) -> Result<Vec<LlamaToken>, Error> {
        let Input::Text(text) = input else {
            return Err(Error::invalid("documents", "documents are tokens: send texts"));
        };
        if let Ok(template) = self.model.chat_template(Some("rerank")) {
            let around: Vec<_> = template.split("{query}").map(|part| part.replace("{document}", &text)).collect();
            let filled = around.join(query);
            return self.tokens(&filled, AddBos::Never, Special::Tokenize);
        }
        // What a pair is framed by is seen by what an empty text is.
        let frame = self.tokens("", AddBos::Always, Special::Tokenize)?;
        let mut tokens = self.tokens(query, AddBos::Always, Special::Plaintext)?;
        if self.model.add_eos_token() && self.model.get_vocab().get_add_sep() {
            // RoBERTa's pairs have an end and a separator between them.
            tokens.push(self.model.token_sep());
        }
        tokens.extend(self.tokens(&text, AddBos::Never, Special::Plaintext)?);
        tokens.extend(frame.last());
        Ok(tokens)
    }

    /// Not more tokens than one text may have.
    fn within(&self, mut tokens: Vec<LlamaToken>, most: usize, truncate: bool) -> Result<Vec<LlamaToken>, Error> {
        if tokens.len() <= most {
            return Ok(tokens);
        }
        if !truncate {
            return Err(Error::TextTooLong {
                model: self.name.to_owned(),
                tokens: u32::try_from(tokens.len()).unwrap_or(u32::MAX),
                most: u32::try_from(most).unwrap_or(u32::MAX),
            });
        }
        // What a text is framed by.
        let frame = self.tokens("", AddBos::Always, Special::Tokenize)?;
        if most <= frame.len() {
            let message = format!(
                "the input after truncation exceeds maximum context length: `num_ctx` is {most}, and `{}` frames a text by {}: \
                 use more",
                self.name,
                frame.len()
            );
            return Err(Error::invalid("options.num_ctx", message));
        }
        let end = frame.last().copied();
        let has_end = end.is_some() && tokens.last().copied() == end;
        tokens.truncate(most);
        if let (true, Some(end), Some(last)) = (has_end, end, tokens.last_mut()) {
            // The mark at the end of a text stays there.
            *last = end;
        }
        Ok(tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: u64, lengths: &[usize]) -> Job {
        let left = lengths.iter().enumerate().map(|(index, &length)| (index, vec![LlamaToken(1); length]));
        Job { id, left: left.collect(), tokens: 0, lane: Lane::Interactive, since: Instant::now(), began: None }
    }

    #[test]
    fn jobs_take_turns_steps_are_bounded_and_nothing_is_lost() {
        let all = VecDeque::from([job(1, &[200; 9]), job(2, &[10]), job(3, &[900, 5]), job(4, &[])]);
        let (mut jobs, mut seen) = (Jobs { all, steps: 0 }, Vec::new());
        while jobs.all.iter().any(|job| !job.left.is_empty()) {
            let texts = next_texts(&mut jobs, 3, STEP);
            let tokens: usize = texts.iter().map(|(.., text)| text.len()).sum();
            assert!(!texts.is_empty() && texts.len() <= 3 && (tokens <= STEP || texts.len() == 1), "{tokens}");
            seen.extend(texts.into_iter().map(|(id, index, _)| (id, index)));
        }
        assert_eq!(jobs.all.len(), 4, "each is there to be told of its end");
        assert_eq!(seen[..2], [(1, 0), (2, 0)], "the short one does not wait for the long one");
        seen.sort_unstable();
        let wanted: Vec<_> = (0..9).map(|index| (1, index)).chain([(2, 0), (3, 0), (3, 1)]).collect();
        assert_eq!(seen, wanted);
    }

    #[test]
    fn bulk_takes_part_in_every_fourth_step_and_has_all_of_them_alone() {
        let bulk = Job { lane: Lane::Bulk, ..job(1, &[100; 40]) };
        let mut jobs = Jobs { all: VecDeque::from([bulk, job(2, &[100; 20])]), steps: 0 };
        let mut with_bulk = Vec::new();
        while jobs.all.iter().any(|job| job.id == 2 && !job.left.is_empty()) {
            with_bulk.push(next_texts(&mut jobs, 4, STEP).iter().any(|(id, ..)| *id == 1));
        }
        assert_eq!(with_bulk, [true, false, false, false, true, false]);
        assert_eq!(next_texts(&mut jobs, 4, STEP).iter().filter(|(id, ..)| *id == 1).count(), 4);
    }

    #[test]
    fn a_vector_is_brought_to_the_length_one_and_nothing_stays_nothing() {
        let mut values = [3.0, 4.0];
        normalise(&mut values);
        assert!((values[0] - 0.6).abs() < 1e-6 && (values[1] - 0.8).abs() < 1e-6, "{values:?}");
        let mut nothing = [0.0, 0.0];
        normalise(&mut nothing);
        assert!(nothing.iter().all(|value| value.abs() < f32::EPSILON));
    }
}
