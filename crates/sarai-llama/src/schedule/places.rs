//! Which place a prompt takes, how much of it is there already, and what is given up for it.
//!
//! Where prefixes can be shared, the sequence that holds most of a prompt is shared or gone on with; elsewhere a place is continued if little
//! of what it holds is lost. What is on disk is brought back where it is longer.

use crate::cells::{Cells, Sharing, Wanted};
use crate::schedule::Scheduler;
use crate::sequence::Sequence;
use crate::unit::{Unit, common};

/// A sequence is continued in its place, rather than shared, if it has no more than this beyond the shared tokens.
const SHORT_TAIL: usize = 2;

/// A place is continued if no more than this part of what it holds is lost by it.
const SMALL_LOSS: usize = 4;

/// What is kept on disk is brought back if it is by so much longer than what the cache has.
const WORTH_RESTORING: usize = 32;

/// What is kept may cost one in so many of what computing it again would.
pub(super) const DEAR: f64 = 3.0;

/// How many idle sequences may hold a cell, on average: llama.cpp lists them, in memory of its own.
const MOST_OWNERS: usize = 4;

impl<W> Scheduler<W> {
    /// A place for a prompt, and how much of the prompt it holds. The last token is always computed, since its logits are
    /// needed.
    pub(super) fn place(&mut self, prompt: &[Unit], cells: &mut impl Cells) -> (usize, usize) {
        let wanted = Wanted {
            prompt: &prompt[..prompt.len().saturating_sub(1)],
            whole: self.limits.sharing != Sharing::Prefixes,
        };
        let (place, kept) = match (self.restored(wanted, cells), self.limits.sharing) {
            (Some(restored), _) => restored,
            (None, Sharing::Prefixes) => self.shared(wanted.prompt, cells),
            (None, _) => self.continued(wanted.prompt, cells),
        };
        self.uses += 1;
        let sequence = &mut self.sequences[place];
        sequence.last_used = self.uses;
        sequence.last_row = self.rows;
        sequence.cached.clear();
        sequence.cached.extend_from_slice(&prompt[..kept]);
        (place, kept)
    }

    /// The free place that a prompt goes on from, cut down to that; else an empty one; else the one whose use is longest ago.
    fn continued(&self, prompt: &[Unit], cells: &mut impl Cells) -> (usize, usize) {
        let (place, kept) = self.best_place(prompt, cells);
        let keep = self.sequences[place].position(kept);
        (place, if cells.cut(place, keep) { kept } else { 0 })
    }

    /// The same, before anything is cut: where, and how much of the prompt it has then.
    fn best_place(&self, prompt: &[Unit], cells: &impl Cells) -> (usize, usize) {
        let may_cut = matches!(self.limits.sharing, Sharing::Own { may_cut: true } | Sharing::Whole { may_cut: true });
        let kept = |place: usize, one: &Sequence<W>| {
            let kept = common(&one.cached, prompt);
            // At its end a sequence can always be gone on with, whatever its window still has.
            let is_of_use = kept == one.cached.len() || (may_cut && cells.holds(place, one.position(kept)));
            if is_of_use { kept } else { 0 }
        };
        let free: Vec<_> =
            self.free_places().map(|(place, one)| (place, kept(place, one), one.cached.len(), one.last_used)).collect();
        // What would be lost of it is little: it is the same conversation.
        let goes_on = |(_, kept, held, _): &&(usize, usize, usize, u64)| *kept > 0 && held - kept <= held / SMALL_LOSS;
        let best = free.iter().filter(goes_on).max_by_key(|(_, kept, _, last_used)| (*kept, u64::MAX - last_used));
        let unused = || free.iter().min_by_key(|(_, _, held, last_used)| (*held > 0, *last_used));
        best.or_else(unused).map(|(place, kept, _, _)| (*place, *kept)).unwrap_or_default()
    }

    /// A place that shares with the sequence that holds most of a prompt.
    fn shared(&mut self, prompt: &[Unit], cells: &mut impl Cells) -> (usize, usize) {
        let sources = self.sequences.iter().enumerate();
        let sources = sources.map(|(index, one)| (index, common(&one.cached, prompt), one.last_used));
        let usable =
            sources.filter(|(index, kept, _)| *kept > 0 && cells.holds(*index, self.sequences[*index].position(*kept)));
        match usable.max_by_key(|(_, kept, last_used)| (*kept, *last_used)) {
            Some((source, kept, _)) => self.share_into_place(source, kept, cells),
            None => (self.empty_place(None, cells).0, 0),
        }
    }

    /// A place that holds what was kept on disk of a prompt, and how much of it that is; if it is longer than what the cache
    /// has, there is room for it, and it can be trusted.
    fn restored(&mut self, wanted: Wanted<'_>, cells: &mut impl Cells) -> Option<(usize, usize)> {
        let known = match self.limits.sharing {
            Sharing::Prefixes => {
                self.sequences.iter().map(|one| common(&one.cached, wanted.prompt)).max().unwrap_or_default()
            }
            _ => self.best_place(wanted.prompt, cells).1,
        };
        let parked = cells.parked(wanted);
        // What is computed now keeps its cells, whatever is given up for it.
        let computed = self.sequences.iter().filter(|one| one.generation.is_some()).map(|one| one.cached.len());
        let has_room = parked.held + computed.sum::<usize>() <= self.limits.cells;
        let all = self.sequences.iter().map(|one| one.cached.len()).sum::<usize>();
        // What others have kept is given up only for a conversation that goes on, and not for its first words.
        let gives_up = parked.held + all > self.limits.cells;
        let is_little = gives_up && (parked.shared - known.min(parked.shared)) * 2 < parked.held;
        if parked.shared <= known + WORTH_RESTORING || !has_room || is_little {
            return None;
        }
        let (place, _) = self.empty_place(None, cells);
        let tokens = loop {
            match cells.restore(place, wanted) {
                Some(tokens) if tokens.is_empty() => return None,
                Some(tokens) => break tokens,
                None if self.evict(cells) => {}
                None => {
                    // Nothing is kept any more that could be in its way; it would be all given up for it again.
                    if self.running().next().is_none() {
                        cells.discard(wanted);
                    }
                    return None;
                }
            }
        };
        let kept = common(&tokens, wanted.prompt);
        self.sequences[place].cached = tokens;
        match self.limits.sharing {
            // What follows the common part is of use to others yet.
            Sharing::Prefixes => Some(self.share_into_place(place, kept, cells)),
            _ => Some((place, kept)),
        }
    }

    /// A place that holds the first `kept` tokens of a source, which may be the place itself.
    fn share_into_place(&mut self, source: usize, kept: usize, cells: &mut impl Cells) -> (usize, usize) {
        self.uses += 1;
        self.sequences[source].last_used = self.uses;
        self.sequences[source].last_row = self.rows;
        let is_idle = self.sequences[source].generation.is_none();
        let is_continued = is_idle && self.sequences[source].cached.len() - kept <= SHORT_TAIL;
        if is_continued && source < self.limits.parallel {
            let keep = self.sequences[source].position(kept);
            return (source, if cells.cut(source, keep) { kept } else { 0 });
        }
        let (place, moved) = self.empty_place(Some(source), cells);
        let source = moved.unwrap_or(source);
        if source == place {
            // There was nowhere to keep it.
            return (place, 0);
        }
        cells.share(source, place, 0..self.sequences[source].position(kept));
        if is_continued {
            self.forget(source, cells);
        }
        (place, kept)
    }

    /// The first sequences are those that llama.cpp computes; the others only keep what ended.
    fn free_places(&self) -> impl Iterator<Item = (usize, &Sequence<W>)> {
        let places = self.sequences.iter().enumerate().take(self.limits.parallel);
        places.filter(|(_, sequence)| sequence.generation.is_none())
    }

    /// A free place that holds nothing: what it held is kept elsewhere. Also where the source is now, if it was that.
    fn empty_place(&mut self, source: Option<usize>, cells: &mut impl Cells) -> (usize, Option<usize>) {
        let unused = |(_, sequence): &(usize, &Sequence<W>)| (!sequence.cached.is_empty(), sequence.last_used);
        let place = self.free_places().min_by_key(unused).map(|(place, _)| place).unwrap_or_default();
        if self.sequences[place].cached.is_empty() {
            return (place, None);
        }
        let kept = self.sequences.iter().enumerate().skip(self.limits.parallel);
        let kept = kept.filter(|(index, _)| Some(*index) != source).min_by_key(unused).map(|(index, _)| index);
        if let Some(kept) = kept {
            self.forget(kept, cells);
            // All of it: what broke off within a picture has no position behind it.
            cells.share(place, kept, 0..usize::MAX);
            self.sequences.swap(place, kept);
        }
        self.forget(place, cells);
        (place, kept.filter(|_| source == Some(place)))
    }

    fn forget(&mut self, index: usize, cells: &mut impl Cells) {
        cells.cut(index, 0);
        self.sequences[index].cached.clear();
    }

    /// Gives up the cells of the idle sequence that was used least recently; false where there is none.
    pub fn evict(&mut self, cells: &mut impl Cells) -> bool {
        let kept = |(_, sequence): &(usize, &Sequence<W>)| sequence.generation.is_none() && !sequence.cached.is_empty();
        let oldest = self.sequences.iter().enumerate().filter(kept).min_by_key(|(_, sequence)| sequence.last_used);
        let Some(oldest) = oldest.map(|(index, _)| index) else { return false };
        self.forget(oldest, cells);
        true
    }

    fn kept_tokens(&self) -> usize {
        let kept = self.sequences.iter().filter(|sequence| sequence.generation.is_none());
        kept.map(|sequence| sequence.cached.len()).sum()
    }

    /// Gives up idle sequences whose cells have by now cost a good part of the time, in the attention of all others, that it would
    /// take to compute them again.
    pub fn give_up_dear(&mut self, cells: &mut impl Cells) {
        while self.kept_tokens() > MOST_OWNERS * self.limits.cells {
            self.evict(cells);
        }
        if self.limits.sharing.has_own_cells() {
            return;
        }
        let seconds = DEAR * self.limits.seconds_per_foreign_cell;
        let Some(most) = self.pace.prompt_tokens_worth(seconds) else { return };
        for index in 0..self.sequences.len() {
            let sequence = &self.sequences[index];
            let is_kept = sequence.generation.is_none() && !sequence.cached.is_empty();
            if is_kept && self.rows - sequence.last_row > most {
                self.forget(index, cells);
            }
        }
    }
}
