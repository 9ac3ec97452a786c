//! Whether memory is short: by the kernel's own stall accounting (PSI), and by what is left.
//!
//! It is polled: triggers need a privilege for short windows, and a second is soon enough for what follows.

use std::path::Path;

use sarai_core::Bytes;

use super::{Machine, cgroup::Groups};

/// Percent of the last ten seconds in which everything stood still for memory, from which it is short.
const STALLED: f64 = 20.0;
/// And below which it is not any more.
const RECOVERED: f64 = 5.0;
/// What must be left of the machine, as a share: a thirty-second.
const LEFT: u64 = 32;
/// And of the control group. The budget keeps a fiftieth.
const LEFT_OF_GROUP: u64 = 100;
/// Stalls of the whole machine are ours only if so little of it, or of our group, is left; else somebody else's group is too
/// small for what is in it.
const TIGHT: u64 = 8;
const TIGHT_GROUP: u64 = 4;

/// What the kernel says.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Reading {
    /// Percent of the last ten seconds, of the group if it tells, else of the machine.
    pub full_avg10: f64,
    /// Whether it is the group that tells.
    pub is_own: bool,
    /// What the machine can still give.
    pub available: Bytes,
    /// What the machine has.
    pub total: Bytes,
    /// What the tightest control group has left, and its limit.
    pub group: Option<(Bytes, Bytes)>,
}

impl Reading {
    /// As it is now.
    pub fn now(groups: &Groups) -> Self {
        let file = groups.pressure();
        let text = std::fs::read_to_string(file.as_deref().unwrap_or(Path::new("/proc/pressure/memory")));
        let machine = Machine::now();
        Self {
            full_avg10: text.ok().and_then(|text| full_avg10(&text)).unwrap_or(0.0),
            is_own: file.is_some(),
            available: machine.available,
            total: machine.total,
            group: groups.tightest().and_then(|usage| Some((usage.limit?.less(usage.anonymous), usage.limit?))),
        }
    }

    fn may_be_ours(self) -> bool {
        let group_is_tight = self.group.is_some_and(|(left, limit)| left < Bytes(limit.0 / TIGHT_GROUP));
        self.is_own || group_is_tight || self.available < Bytes(self.total.0 / TIGHT)
    }

    /// Whether memory is short, given whether it was.
    pub fn is_short(self, was: bool) -> bool {
        let stalled = self.full_avg10 >= if was { RECOVERED } else { STALLED };
        let group_is_full = self.group.is_some_and(|(left, limit)| left < Bytes(limit.0 / LEFT_OF_GROUP));
        (stalled && self.may_be_ours()) || group_is_full || self.available < Bytes(self.total.0 / LEFT)
    }
}

fn full_avg10(text: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix("full "))?;
    line.split_whitespace().find_map(|field| field.strip_prefix("avg10=")?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stalls_are_read_and_end_later_than_they_begin() {
        let text = "some avg10=50.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=12.34 avg60=0.00 avg300=0.00 total=0\n";
        assert_eq!(full_avg10(text), Some(12.34));
        let reading = Reading {
            full_avg10: 12.34,
            is_own: true,
            available: Bytes::mib(512),
            total: Bytes::mib(1024),
            group: None,
        };
        assert!(!reading.is_short(false) && reading.is_short(true));
        assert!(Reading { available: Bytes::mib(8), ..reading }.is_short(false));
        assert!(Reading { group: Some((Bytes::mib(2), Bytes::mib(500))), ..reading }.is_short(false));
    }

    #[test]
    fn the_stalls_of_somebody_elses_group_are_not_ours() {
        let stalled = Reading {
            full_avg10: 90.0,
            is_own: false,
            available: Bytes::mib(512),
            total: Bytes::mib(1024),
            group: Some((Bytes::mib(300), Bytes::mib(500))),
        };
        assert!(!stalled.is_short(false));
        assert!(Reading { is_own: true, ..stalled }.is_short(false));
        assert!(Reading { group: Some((Bytes::mib(100), Bytes::mib(500))), ..stalled }.is_short(false));
        assert!(Reading { available: Bytes::mib(100), ..stalled }.is_short(false));
    }
}
