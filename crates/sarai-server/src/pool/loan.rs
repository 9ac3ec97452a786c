//! Memory that is lent for as long as answers follow forms, or are checked, and booked meanwhile: what an engine is lent in its claim, and the
//! validator's as the server's own. It is in the plan of no model, which it would make wrong for as long as nobody asks for a form.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use sarai_core::{Bytes, form_bytes};
use sarai_plan::EngineId;
use tokio::sync::oneshot;

use super::{Message, Pool};

/// How much less a form has where nothing is free: most take less than the rest, and that much is within what plans are too high by.
const DISPENSABLE: Bytes = Bytes::mib(10);

/// Who borrows. Further ones of the same kind share what the first was lent: a worker tries one form at a time, and follows one at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Borrower {
    /// Answers of an engine that follow forms.
    Forms(EngineId),
    /// The validator.
    Validator,
}

#[derive(Clone, Copy, Debug)]
struct Lent {
    borrowers: usize,
    /// So much may be taken.
    limit: Bytes,
    /// Of which so much was free.
    booked: Bytes,
    /// When the last one gave it back.
    ended: Option<Instant>,
}

/// For so long what was given back may be part of a measure: it was taken before, or the allocator still has it.
const FELT: Duration = Duration::from_secs(5);

/// What is lent now.
#[derive(Debug, Default)]
pub(super) struct Loans(HashMap<Borrower, Lent>);

impl Loans {
    /// Lends what is free to somebody whose model knows so many tokens; returns how much may be taken. Where others have been lent less, since
    /// less was free, they may take more from now on.
    pub fn lend(&mut self, borrower: Borrower, tokens: u64, free: Bytes) -> Bytes {
        let most = form_bytes(tokens);
        let lent = self.0.entry(borrower).or_insert(Lent {
            borrowers: 0,
            limit: Bytes::ZERO,
            booked: Bytes::ZERO,
            ended: None,
        });
        let own = if lent.borrowers > 0 { lent.booked } else { Bytes::ZERO };
        lent.booked = most.min(own + free);
        lent.limit = lent.booked.max(most.less(DISPENSABLE));
        lent.borrowers += 1;
        lent.limit
    }

    /// One of those who borrowed needs it no more.
    pub fn give_back(&mut self, borrower: Borrower) {
        if let Some(lent) = self.0.get_mut(&borrower) {
            lent.borrowers = lent.borrowers.saturating_sub(1);
            lent.ended = (lent.borrowers == 0).then(Instant::now);
        }
    }

    /// What is booked for a borrower.
    pub fn booked(&self, borrower: Borrower) -> Bytes {
        self.0.get(&borrower).filter(|lent| lent.borrowers > 0).map_or(Bytes::ZERO, |lent| lent.booked)
    }

    /// What a measure may show of it, now or a moment ago.
    pub fn lately(&self, borrower: Borrower) -> Bytes {
        let is_felt = |lent: &&Lent| lent.borrowers > 0 || lent.ended.is_some_and(|ended| ended.elapsed() < FELT);
        self.0.get(&borrower).filter(is_felt).map_or(Bytes::ZERO, |lent| lent.limit)
    }
}

/// A loan; given back on drop.
#[derive(Debug)]
pub struct Loan {
    /// So much may be taken.
    pub bytes: Bytes,
    borrower: Borrower,
    pool: Pool,
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.pool.send(Message::GivenBack(self.borrower));
    }
}

impl Pool {
    /// Lends what forms or the validator take at most, or what is free of it.
    ///
    /// # Cancel safety
    /// A loan that nobody waits for any more is given back.
    pub async fn lend(&self, borrower: Borrower) -> Option<Loan> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Lend(borrower, reply));
        answer.await.ok()
    }

    pub(super) fn loan(&self, borrower: Borrower, bytes: Bytes) -> Loan {
        Loan { bytes, borrower, pool: self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sarai_core::FORM_BYTES;

    #[test]
    fn borrowers_of_a_kind_share_a_loan_and_the_last_one_gives_it_back() {
        let mut loans = Loans::default();
        let (forms, other) = (Borrower::Forms(EngineId(0)), Borrower::Forms(EngineId(1)));
        let all = form_bytes(150_000);
        assert!(all > FORM_BYTES + Bytes::mib(25));
        assert_eq!(loans.lend(forms, 150_000, Bytes::gib(1.0)), all);
        assert_eq!(loans.lend(forms, 150_000, Bytes::ZERO), all, "shared");
        assert_eq!(loans.lend(Borrower::Validator, 0, Bytes::mib(9)), Bytes::mib(9), "what is free");
        // Of what is not there, nothing is booked, until it is there.
        assert_eq!(loans.lend(other, 0, Bytes::ZERO), FORM_BYTES.less(DISPENSABLE));
        assert_eq!(loans.booked(other), Bytes::ZERO);
        assert_eq!(loans.lend(other, 0, Bytes::gib(1.0)), FORM_BYTES);
        assert_eq!(loans.booked(other), FORM_BYTES);
        loans.give_back(forms);
        assert_eq!(loans.booked(forms), all);
        for borrower in [forms, Borrower::Validator, other, other] {
            loans.give_back(borrower);
        }
        for borrower in [forms, Borrower::Validator, other] {
            assert_eq!(loans.booked(borrower), Bytes::ZERO);
        }
        assert_eq!(loans.lately(forms), all, "a measure may show it yet");
        assert_eq!(loans.lend(other, 0, Bytes::mib(12)), Bytes::mib(12), "what it had is not its own any more");
    }
}
