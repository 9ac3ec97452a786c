//! Pauses between steps, while the work of others comes first.

use std::time::{Duration, Instant};

/// No pause is longer, however long a step was: what others need the cores for changes.
const LONGEST: Duration = Duration::from_secs(2);

/// How long a worker rests after a step.
#[derive(Debug, Default)]
pub struct Rest {
    times: u32,
    until: Option<Instant>,
}

impl Rest {
    /// So many times as long as each step took, from now on; with none, a pause is over at once.
    pub fn set(&mut self, times: u32) {
        self.times = times;
        if times == 0 {
            self.until = None;
        }
    }

    /// A step took so long.
    pub fn after(&mut self, step: Duration) {
        if self.times > 0 {
            self.until = Some(Instant::now() + step.saturating_mul(self.times).min(LONGEST));
        }
    }

    /// What is left of the pause, if there is one.
    pub fn left(&mut self) -> Option<Duration> {
        let left = self.until?.checked_duration_since(Instant::now()).filter(|left| !left.is_zero());
        if left.is_none() {
            self.until = None;
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rests_for_a_few_times_its_step_and_no_longer_than_it_should() {
        let mut rest = Rest::default();
        rest.after(Duration::from_secs(9));
        assert!(rest.left().is_none(), "nobody comes first");
        rest.set(9);
        rest.after(Duration::from_millis(100));
        let left = rest.left();
        assert!(left > Some(Duration::from_millis(400)) && left <= Some(Duration::from_millis(900)), "{left:?}");
        rest.after(Duration::from_secs(60));
        assert!(rest.left() <= Some(LONGEST) && rest.left().is_some());
        rest.set(0);
        assert!(rest.left().is_none(), "nobody comes first any more");
    }
}
