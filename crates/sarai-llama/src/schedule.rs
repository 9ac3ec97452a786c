//! What each step computes: which generations run, what they share of the cache, and which tokens are next.
//!
//! It decides, and computes nothing: the same calls give the same steps. A running answer takes one token of each step;
//! prompts take what the pace allows beside answers, half of it the oldest and the rest the shortest, so that a long
//! prompt freezes neither running answers nor short prompts; but short ones that came together begin together. What is bulk
//! takes part in every fourth step beside what is not.
//!
//! The cache is a pool of cells. What ended stays in it until somebody needs the cells, the least recently used first, and
//! whoever begins with the same tokens shares them, also while they are still being computed.

mod places;

use std::collections::{HashSet, VecDeque};

use crate::cells::{Cells, Sharing};
use crate::pace::Pace;
use crate::sequence::{Generation, Sequence, Waiting};
use crate::unit::{Unit, common, positions};
use sarai_core::Lane;

/// A prompt waits for another one to compute what both begin with if it is longer than this.
const WORTH_WAITING: usize = 4;
/// An answer of so many tokens has only just begun.
const JUST_BEGUN: u32 = 4;
/// Prompts that take less than so many seconds, all together, are computed at once beside answers that have only just begun, if they were
/// there before.
const SOON: f64 = 2.0;

/// Bulk takes part in one of so many steps while there is something else to compute.
const BULK_EVERY: u64 = 4;

/// So many others may begin before bulk that came earlier.
const MOST_BEFORE_BULK: usize = 8;

/// Sizes that a load has decided.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Generations that run at once.
    pub parallel: usize,
    /// Cells of all sequences together.
    pub cells: usize,
    /// Tokens that one step can hold.
    pub step_tokens: usize,
    /// Tokens that an answer may draft at most.
    pub draft_tokens: usize,
    /// How sequences may share.
    pub sharing: Sharing,
    /// Seconds that each token of a step takes longer for each cell that another sequence holds.
    pub seconds_per_foreign_cell: f64,
}

/// One token of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The token, or the part of a piece of media.
    pub unit: Unit,
    /// The position of the token, or of the piece's first part.
    pub position: usize,
    /// Its sequence.
    pub sequence: usize,
    /// Whether the next token is chosen from its logits.
    pub has_output: bool,
}

/// What a step computes.
#[derive(Debug, Default)]
pub struct Step {
    /// Its tokens.
    pub rows: Vec<Row>,
    /// How many of them are the answers', drafts included.
    pub answers: usize,
    /// How many are drafts.
    pub drafted: usize,
    /// Whether it computes a piece of media whose parts attend to each other both ways: beside answers, that is all of it.
    pub is_non_causal: bool,
}

/// Whose turn a step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lanes {
    /// What somebody waits for.
    Interactive,
    /// All, and half of the room for prompts is the oldest bulk's.
    BulkFirst,
    /// All alike.
    Both,
}

impl Lanes {
    fn hold<W>(self, sequence: &Sequence<W>) -> bool {
        self != Self::Interactive || !sequence.is_bulk()
    }
}

/// The generations of one context. `W` is what writes an answer.
pub struct Scheduler<W> {
    limits: Limits,
    /// Places for generations, and what is kept of those that ended.
    pub sequences: Vec<Sequence<W>>,
    /// Generations that wait for a place or for cells; the oldest first.
    waiting: VecDeque<Waiting<W>>,
    /// What steps take.
    pub pace: Pace,
    uses: u64,
    /// Tokens that were computed.
    rows: u64,
    /// Steps that were chosen.
    steps: u64,
    /// Steps that were computed beside bulk.
    awaited_steps: u64,
    /// How many have begun before bulk that came earlier, since bulk began last.
    before_bulk: usize,
    /// Whether the last step held a piece of media that attends to itself both ways.
    was_alone: bool,
}

impl<W> Scheduler<W> {
    /// An empty cache of these sizes.
    pub fn new(limits: Limits) -> Self {
        let sequences = limits.sharing.sequences(limits.parallel);
        Self {
            limits,
            sequences: (0..sequences).map(|_| Sequence::default()).collect(),
            waiting: VecDeque::new(),
            pace: Pace::default(),
            uses: 0,
            rows: 0,
            steps: 0,
            awaited_steps: 0,
            before_bulk: 0,
            was_alone: false,
        }
    }

    /// Tokens that one step can hold.
    pub fn step_tokens(&self) -> usize {
        self.limits.step_tokens
    }

    /// Generations that run at once, in the first of the sequences.
    pub fn parallel(&self) -> usize {
        self.limits.parallel
    }

    /// Whether nothing runs and nothing waits.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running().next().is_none()
    }

    /// What runs.
    pub fn running(&self) -> impl Iterator<Item = &Generation<W>> {
        self.sequences.iter().filter_map(|sequence| sequence.generation.as_ref())
    }

    /// Lets a generation wait for its turn.
    pub fn push(&mut self, waiting: Waiting<W>) {
        self.waiting.push_back(waiting);
    }

    /// Forgets a generation, wherever it is.
    pub fn cancel(&mut self, id: u64) {
        self.waiting.retain(|waiting| waiting.id != id);
        for sequence in &mut self.sequences {
            sequence.generation.take_if(|generation| generation.asked.id == id);
        }
    }

    /// Whether a generation runs whose prompt is not computed yet.
    pub fn reads(&self, id: u64) -> bool {
        let reading = self.sequences.iter().filter(|sequence| sequence.prompt_left() > 0);
        reading.filter_map(|sequence| sequence.generation.as_ref()).any(|generation| generation.asked.id == id)
    }

    /// Takes all that runs, after a step that could not be computed: the cache is empty then.
    pub fn take_all(&mut self, cells: &mut impl Cells) -> Vec<Generation<W>> {
        for (index, sequence) in self.sequences.iter_mut().enumerate() {
            cells.cut(index, 0);
            sequence.cached.clear();
        }
        self.sequences.iter_mut().filter_map(|sequence| sequence.generation.take()).collect()
    }

    /// Begins what waits, in the order of arrival, as far as there are places, and cells for all that may be needed.
    pub fn begin_waiting(&mut self, cells: &mut impl Cells) {
        while let Some(index) = self.next_waiting() {
            let next = &self.waiting[index];
            let reserved: usize = self.running().map(|generation| generation.asked.reserves()).sum();
            let is_full = self.running().count() >= self.limits.parallel;
            if is_full || reserved + next.reserves() > self.limits.cells {
                return;
            }
            if let Some(mut waiting) = self.waiting.remove(index) {
                self.before_bulk = if index > 0 { self.before_bulk + 1 } else { 0 };
                let (index, cached) = self.place(&waiting.prompt, cells);
                let left: HashSet<_> = waiting.prompt[cached..].iter().filter_map(|unit| unit.piece()).collect();
                waiting.lacks.retain(|piece| left.contains(piece));
                self.sequences[index].generation = Some(Generation::new(waiting, cached, self.steps));
            }
        }
    }

    /// The oldest that is not bulk; the oldest of all if many have begun before it.
    fn next_waiting(&self) -> Option<usize> {
        let first = self.waiting.iter().position(|waiting| waiting.lane != Lane::Bulk);
        let first = first.filter(|_| self.before_bulk < MOST_BEFORE_BULK).unwrap_or(0);
        (!self.waiting.is_empty()).then_some(first)
    }

    /// Chooses the next step's tokens; they count as cached from here on.
    pub fn fill(&mut self, cells: &mut impl Cells) -> Step {
        let mut step = Step::default();
        for generation in self.sequences.iter_mut().filter_map(|sequence| sequence.generation.as_mut()) {
            (generation.output_row, generation.drafted) = (None, 0);
        }
        match self.alone() {
            Some(index) => {
                self.add_prompt(index, 0, &mut step);
            }
            None => self.add_lanes(&mut step, cells),
        }
        self.was_alone = step.is_non_causal;
        self.rows += step.rows.len() as u64;
        self.steps += 1;
        for sequence in self.sequences.iter_mut().filter(|sequence| sequence.generation.is_some()) {
            sequence.last_row = self.rows;
        }
        step
    }

    /// A prompt whose next piece of media takes a step of its own: llama.cpp computes sequences that have cells of their own in
    /// parts of the same length, and the piece must not be parted.
    fn alone(&self) -> Option<usize> {
        let has_own = self.limits.sharing.has_own_cells();
        // Answers go on between two of them.
        let may = has_own && !(self.was_alone && self.running().any(|generation| generation.next.is_some()));
        let is_next = |one: &Sequence<W>| !one.is_stuck() && one.next_of_prompt().is_some_and(Unit::is_non_causal);
        let next = self.sequences.iter().enumerate().filter(|(_, one)| may && is_next(one));
        next.min_by_key(|(_, one)| one.age()).map(|(index, _)| index)
    }

    /// What is not bulk; in every fourth step, and where there is nothing else, bulk too.
    fn add_lanes(&mut self, step: &mut Step, cells: &mut impl Cells) {
        let computes = |one: &Sequence<W>| {
            let has_next = one.generation.as_ref().is_some_and(|generation| generation.next.is_some());
            has_next || (one.prompt_left() > 0 && !one.is_stuck())
        };
        let mut computing = self.sequences.iter().filter(|one| computes(one));
        let lanes = match computing.clone().any(Sequence::is_bulk) && computing.any(|one| !one.is_bulk()) {
            false => Lanes::Both,
            true => {
                self.awaited_steps += 1;
                if self.awaited_steps.is_multiple_of(BULK_EVERY) { Lanes::BulkFirst } else { Lanes::Interactive }
            }
        };
        self.add_answers_and_prompts(lanes, step, cells);
        if step.rows.is_empty() && lanes == Lanes::Interactive {
            self.add_answers_and_prompts(Lanes::Both, step, cells);
        }
    }

    fn add_answers_and_prompts(&mut self, lanes: Lanes, step: &mut Step, cells: &mut impl Cells) {
        self.add_answers(lanes, step);
        self.share_what_has_grown(cells);
        let is_ready = |&index: &usize| {
            let sequence = &self.sequences[index];
            lanes.hold(sequence) && sequence.prompt_left() > 0 && !sequence.is_stuck() && !self.waits_for_another(index)
        };
        let mut prompts: Vec<_> = (0..self.sequences.len()).filter(is_ready).collect();
        let mut room = self.room(step, &prompts);
        prompts.sort_by_key(|&index| {
            let one = &self.sequences[index];
            (lanes == Lanes::BulkFirst && !one.is_bulk(), one.age())
        });
        if let Some(&oldest) = prompts.first() {
            room = room.saturating_sub(self.add_prompt(oldest, room.div_ceil(2), step));
        }
        prompts.sort_by_key(|&index| {
            let one = &self.sequences[index];
            (lanes == Lanes::BulkFirst && one.is_bulk(), one.prompt_left())
        });
        for index in prompts {
            room = room.saturating_sub(self.add_prompt(index, room, step));
        }
    }

    /// How many tokens of prompts a step takes that has its answers already.
    fn room(&self, step: &Step, prompts: &[usize]) -> usize {
        let room = self.limits.step_tokens - step.answers;
        match step.answers == 0 || self.begin_together(step, prompts) {
            true => room,
            false => room.min(self.pace.prompt_tokens_beside_answers()),
        }
    }

    /// Whether those who answer have only just begun, and the others were there before and have soon begun too: who came together does not
    /// enter one after the other beside the first of them.
    fn begin_together(&self, step: &Step, prompts: &[usize]) -> bool {
        let left = prompts.iter().map(|&index| self.sequences[index].prompt_left()).sum();
        let is_soon = self.pace.prompt_seconds(left).is_some_and(|seconds| seconds < SOON);
        let of = |index: usize| self.sequences[index].generation.as_ref();
        let mut answering = step.rows.iter().filter_map(|row| of(row.sequence));
        let mut reading = prompts.iter().filter_map(|&index| of(index));
        let first = answering.clone().filter_map(|one| one.answers_since).min();
        let is_awaited = |one: &Generation<W>| one.asked.lane != Lane::Bulk;
        is_soon
            && answering.all(|one| one.generated <= JUST_BEGUN && is_awaited(one))
            && reading.all(|one| first.is_none_or(|first| one.began <= first) && is_awaited(one))
    }

    fn add_answers(&mut self, lanes: Lanes, step: &mut Step) {
        // Beside what attends to itself both ways, a draft would see what follows it.
        let may_draft =
            !self.sequences.iter().any(|one| !one.is_stuck() && one.next_of_prompt().is_some_and(Unit::is_non_causal));
        for (index, sequence) in self.sequences.iter_mut().enumerate().filter(|(_, sequence)| lanes.hold(sequence)) {
            let Some(generation) = &mut sequence.generation else { continue };
            if let Some(token) = generation.next.take() {
                generation.answers_since.get_or_insert(self.steps);
                generation.output_row = i32::try_from(step.rows.len()).ok();
                let mut draft = std::mem::take(&mut generation.draft);
                draft.truncate(if may_draft { draft.len() } else { 0 });
                generation.drafted = draft.len();
                step.drafted += draft.len();
                let position = positions(&sequence.cached);
                for (ahead, token) in [token].into_iter().chain(draft).enumerate() {
                    let position = position + ahead;
                    step.rows.push(Row { unit: token.into(), position, sequence: index, has_output: true });
                    sequence.cached.push(token.into());
                    step.answers += 1;
                }
            }
        }
    }

    /// How many tokens an answer may draft for the next step: no more than it is granted, than fit beside the other answers, and than it
    /// may become long.
    pub fn draft_room(&self, index: usize) -> usize {
        let Some(generation) = &self.sequences[index].generation else { return 0 };
        let left = |most: usize, done: usize| most.saturating_sub(done + 2);
        let in_context = left(generation.asked.context_tokens, self.sequences[index].cached.len());
        let in_answer = left(generation.asked.max_tokens as usize, generation.usage().completion_tokens as usize);
        let beside = (self.limits.step_tokens / 4 / self.limits.parallel).saturating_sub(1);
        let granted = match self.limits.sharing {
            Sharing::Prefixes | Sharing::Own { may_cut: true } => self.limits.draft_tokens,
            Sharing::Whole { .. } | Sharing::Own { may_cut: false } => 0,
        };
        granted.min(beside).min(in_context).min(in_answer)
    }

    /// Takes back the last tokens of a draft, which were wrong.
    pub fn reject(&mut self, index: usize, wrong: usize, cells: &mut impl Cells) {
        let sequence = &mut self.sequences[index];
        sequence.cached.truncate(sequence.cached.len() - wrong);
        if wrong > 0 {
            cells.cut(index, positions(&sequence.cached));
        }
    }

    /// Adds so many units of a prompt at most, or a piece of media that must be computed at once; returns how many.
    fn add_prompt(&mut self, index: usize, room: usize, step: &mut Step) -> usize {
        let sequence = &mut self.sequences[index];
        let Some(generation) = &mut sequence.generation else { return 0 };
        let prompt = &generation.asked.prompt;
        let done = sequence.cached.len();
        let ahead = &prompt[done..];
        let added = match ahead.first() {
            _ if step.is_non_causal => 0,
            Some(unit) if unit.is_non_causal() => {
                let is_of_it =
                    |(at, unit): &(usize, &Unit)| matches!(unit, Unit::Media { index, .. } if *index as usize == *at);
                let length = ahead.iter().enumerate().take_while(is_of_it).count();
                let may_be_beside = step.rows.is_empty() || !self.limits.sharing.has_own_cells();
                step.is_non_causal = may_be_beside && step.rows.len() == step.answers && step.drafted == 0;
                if step.is_non_causal { length } else { 0 }
            }
            _ => {
                let is_next = |unit: &&Unit| !unit.is_non_causal() && !generation.asked.lacks(Some(**unit));
                ahead.iter().take(room).take_while(is_next).count()
            }
        };
        let until = done + added;
        // Within a piece of media, positions are counted from where it begins.
        let begins = |at: usize| match prompt[at] {
            Unit::Media { index, .. } => at - index as usize,
            Unit::Text(_) => at,
        };
        let mut from = if added == 0 { done } else { begins(done) };
        let mut position = positions(&prompt[..from]);
        for at in done..until {
            position += positions(&prompt[from..begins(at)]);
            from = begins(at);
            let has_output = at + 1 == prompt.len();
            if has_output {
                generation.output_row = i32::try_from(step.rows.len()).ok();
            }
            step.rows.push(Row { unit: prompt[at], position, sequence: index, has_output });
        }
        sequence.cached.extend_from_slice(&prompt[done..until]);
        added
    }

    /// Prompts take over what others have computed of them meanwhile.
    fn share_what_has_grown(&mut self, cells: &mut impl Cells) {
        if self.limits.sharing != Sharing::Prefixes {
            return;
        }
        for index in 0..self.sequences.len() {
            let sequence = &self.sequences[index];
            let Some(generation) = sequence.generation.as_ref().filter(|_| sequence.prompt_left() > 1) else {
                continue;
            };
            let prompt = &generation.asked.prompt;
            let done = sequence.cached.len();
            if prompt[done].is_inside() {
                // Its positions are counted from where the piece of media begins, which is there already.
                continue;
            }
            // What is not computed yet cannot be shared: an answer's token of this very step is the last one there.
            let grown = |other: &Sequence<W>| {
                let computed = other.cached.len() - other.in_step();
                common(&other.cached[..computed], prompt).min(prompt.len() - 1)
            };
            let others = self.sequences.iter().enumerate().filter(|(other, _)| *other != index);
            let others = others.map(|(other, sequence)| (other, grown(sequence)));
            let best =
                others.filter(|(other, grown)| *grown > done && cells.holds(*other, positions(&prompt[..*grown])));
            let Some((other, grown)) = best.max_by_key(|(_, grown)| *grown) else { continue };
            cells.share(other, index, positions(&prompt[..done])..positions(&prompt[..grown]));
            let sequence = &mut self.sequences[index];
            if let Some(generation) = &mut sequence.generation {
                sequence.cached.extend_from_slice(&generation.asked.prompt[done..grown]);
                generation.cached += grown - done;
            }
        }
    }

    /// Whether an older prompt will have computed more of this one.
    fn waits_for_another(&self, index: usize) -> bool {
        let sequence = &self.sequences[index];
        let Some(generation) = &sequence.generation else { return false };
        let prompt = &generation.asked.prompt;
        let keeps_waiting = |other: &Sequence<W>| other.is_bulk() && !sequence.is_bulk();
        let will_have = |other: &Sequence<W>| match &other.generation {
            Some(older) if older.asked.id < generation.asked.id && other.prompt_left() > 0 && !keeps_waiting(other) => {
                let both = common(&older.asked.prompt, prompt).min(prompt.len() - 1);
                if other.cached.len() < both { both } else { 0 }
            }
            _ => 0,
        };
        let is_shared = self.limits.sharing == Sharing::Prefixes;
        is_shared && self.sequences.iter().any(|other| will_have(other) > sequence.cached.len() + WORTH_WAITING)
    }
}

#[cfg(test)]
mod tests;
