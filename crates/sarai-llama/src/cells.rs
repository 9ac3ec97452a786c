//! What the scheduler asks of the memory of a context: cells that sequences share where they hold the same tokens.

use std::ops::Range;

use llama_cpp_4::context::LlamaContext;
use llama_cpp_4::model::LlamaModel;

use crate::park::Parking;
use crate::unit::Unit;

/// A prompt that what was kept may begin.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The prompt, but for its last token.
    pub prompt: &'a [Unit],
    /// Whether only what the prompt goes on from is of use, and not a part of it.
    pub whole: bool,
}

/// What is kept elsewhere of a prompt.
#[derive(Clone, Copy, Debug, Default)]
pub struct Parked {
    /// Its first so many tokens.
    pub shared: usize,
    /// So many tokens in all, which come back together.
    pub held: usize,
}

/// The cells of all sequences.
pub trait Cells {
    /// Lets a sequence use the cells that another one holds at these positions; `usize::MAX` is to the end.
    fn share(&mut self, from: usize, to: usize, positions: Range<usize>);

    /// Cuts a sequence down to what is before the position `keep`. False where its state cannot be cut: it is empty then.
    fn cut(&mut self, sequence: usize, keep: usize) -> bool;

    /// Whether all that the next token needs of what is before the position `keep` of a sequence is there: a sliding window
    /// that has moved on has lost some of it.
    fn holds(&self, sequence: usize, keep: usize) -> bool;

    /// What is kept elsewhere of a prompt.
    fn parked(&self, _wanted: Wanted<'_>) -> Parked {
        Parked::default()
    }

    /// Brings that back into an empty sequence: all that it holds then, or nothing where there is no room for it.
    fn restore(&mut self, _sequence: usize, _wanted: Wanted<'_>) -> Option<Vec<Unit>> {
        None
    }

    /// Gives up what could not be brought back though nothing else is kept.
    fn discard(&mut self, _wanted: Wanted<'_>) {}
}

/// The cells of a context of llama.cpp.
pub struct ContextCells<'a, 'model> {
    /// The context.
    pub context: &'a mut LlamaContext<'model>,
    /// Positions that a sliding window covers; 0 if the model has none.
    pub window: usize,
    /// What is kept on disk.
    pub parking: Option<&'a mut Parking>,
}

impl Cells for ContextCells<'_, '_> {
    fn share(&mut self, from: usize, to: usize, positions: Range<usize>) {
        let (from, to) = (i32::try_from(from).unwrap_or(-1), i32::try_from(to).unwrap_or(-1));
        let at = |position: usize| u32::try_from(position).ok();
        // It refuses only positions beyond 2^31.
        let _ = self.context.copy_kv_cache_seq(from, to, at(positions.start), at(positions.end));
    }

    fn cut(&mut self, sequence: usize, keep: usize) -> bool {
        let (sequence, from) = (u32::try_from(sequence).ok(), u32::try_from(keep).ok());
        let is_cut = keep > 0 && self.context.clear_kv_cache_seq(sequence, from, None).unwrap_or(false);
        if !is_cut {
            let _ = self.context.clear_kv_cache_seq(sequence, None, None);
        }
        is_cut || keep == 0
    }

    fn holds(&self, sequence: usize, keep: usize) -> bool {
        if self.window == 0 || keep == 0 {
            return true;
        }
        let first = self.context.memory_seq_pos_min(i32::try_from(sequence).unwrap_or(-1));
        // The token at `keep` is one of those that it covers.
        usize::try_from(first).is_ok_and(|first| first <= (keep + 1).saturating_sub(self.window))
    }

    fn parked(&self, wanted: Wanted<'_>) -> Parked {
        self.parking.as_ref().map_or_else(Parked::default, |parking| parking.holds(wanted))
    }

    fn restore(&mut self, sequence: usize, wanted: Wanted<'_>) -> Option<Vec<Unit>> {
        self.parking.as_mut()?.restore(self.context, sequence, wanted)
    }

    fn discard(&mut self, wanted: Wanted<'_>) {
        self.parking.iter_mut().for_each(|parking| parking.discard(wanted));
    }
}

/// How sequences of a model may share what they computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Any prefix, by any sequence.
    Prefixes,
    /// A recurrent state stands for all tokens at once: it is continued, and never cut or shared. A sliding window loses what
    /// it has passed, and llama.cpp takes such a cell back only from a sequence that has it alone: it is continued, or cut where
    /// its window still reaches.
    Whole {
        /// Whether it can be cut.
        may_cut: bool,
    },
    /// Each sequence has cells of its own, and takes them in the same order whatever else is computed.
    Own {
        /// Whether a sequence can be cut: a recurrent state cannot, and a sliding window, which goes round in its cells, would go on in
        /// others.
        may_cut: bool,
    },
}

impl Sharing {
    /// What the model allows, and whether attention must add up in the same order each time.
    pub fn of(model: &LlamaModel, deterministic: bool) -> Self {
        let has_state = model.is_recurrent() || model.is_hybrid();
        let is_whole = has_state || model.n_swa() > 0;
        match deterministic {
            true => Self::Own { may_cut: !is_whole },
            false if is_whole => Self::Whole { may_cut: !has_state },
            false => Self::Prefixes,
        }
    }

    /// Whether each sequence has cells of its own.
    pub fn has_own_cells(self) -> bool {
        matches!(self, Self::Own { .. })
    }

    /// How many sequences there are, those included that are computed at once. llama.cpp computes only so many of them, and
    /// takes memory for those; each of the others is only a number, whose cells nobody else needs.
    pub fn sequences(self, parallel: usize) -> usize {
        const MOST: usize = 256;
        match self {
            Self::Prefixes => (parallel + 64).min(MOST),
            Self::Whole { .. } | Self::Own { .. } => parallel,
        }
    }
}
