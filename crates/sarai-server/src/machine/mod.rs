//! What this machine has and holds: processes, control groups, pressure.

pub mod cgroup;
pub mod cores;
pub mod pressure;
pub mod process;

use sarai_core::Bytes;

use cgroup::Groups;

/// Memory of the whole machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// All there is.
    pub total: Bytes,
    /// What could be had without swapping; counts the page cache as free and knows no control groups.
    pub available: Bytes,
}

impl Machine {
    /// As it is now.
    pub fn now() -> Self {
        parse(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default())
    }
}

fn parse(meminfo: &str) -> Machine {
    let kib = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(Bytes::kib)
    };
    Machine { total: kib("MemTotal:").unwrap_or_default(), available: kib("MemAvailable:").unwrap_or_default() }
}

/// The most that this machine, or the control group that this process runs in, can hold.
pub fn limit() -> Option<Bytes> {
    let total = Some(Machine::now().total).filter(|&total| total > Bytes::ZERO);
    total.into_iter().chain(Groups::of_this_process().limit()).min()
}

/// What could be had now: of the machine, and of the tightest control group.
pub fn free() -> Bytes {
    let group = Groups::of_this_process().tightest();
    let of_group = group.and_then(|usage| Some(usage.limit?.less(usage.anonymous)));
    of_group.into_iter().fold(Machine::now().available, Bytes::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_tells_what_there_is_and_what_can_be_had() {
        let machine = parse("MemTotal:       2048 kB\nMemFree: 1 kB\nMemAvailable:   1024 kB\n");
        assert_eq!(machine, Machine { total: Bytes::mib(2), available: Bytes::mib(1) });
        assert!(limit().is_some());
        assert!(free() > Bytes::ZERO);
    }
}
