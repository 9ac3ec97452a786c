//! How many cores this process may use: by its affinity, and by the processor time that its control groups grant.

use std::path::Path;

/// Cores, whole and in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cores {
    /// Those that are there all the time, one at least.
    pub whole: usize,
    /// With one that is there part of the time.
    pub begun: usize,
}

/// How long bulk rests after each step, in units of it, beside what somebody waits for: it computes for a tenth of the time.
const BULK_RESTS: u32 = 9;

/// What a worker has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Does {
    /// Nothing now.
    Nothing,
    /// What nobody waits for.
    Bulk,
    /// What somebody waits for.
    Awaited,
}

/// What of the cores a worker has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Threads that compute.
    pub threads: u32,
    /// So many times as long as each step took it rests after it.
    pub rests: u32,
}

impl Cores {
    /// Deals the cores out to workers, of which each has so many threads at most. Two that use all cores collapse together, so whole ones are
    /// dealt out, one at least; who is alone has the core that is there part of the time too. What a limit leaves over goes to the others.
    /// Bulk has a core from time to time while somebody waits for others. Who does nothing has what it would begin with.
    pub fn deal(self, workers: &[(Does, Option<u32>)]) -> Vec<Share> {
        let is_awaited = workers.iter().any(|(does, _)| *does == Does::Awaited);
        let shares = |does: Does| does == Does::Awaited || (does == Does::Bulk && !is_awaited);
        let sharing: Vec<usize> = (0..workers.len()).filter(|index| shares(workers[*index].0)).collect();
        let most = |index: usize| workers[index].1.map_or(usize::MAX, |most| most.max(1) as usize);
        let mut threads: Vec<usize> = (0..workers.len())
            .map(|index| match sharing.len() {
                0 => self.begun.min(most(index)),
                others => (self.whole / (others + 1)).clamp(1, most(index)),
            })
            .collect();
        match sharing[..] {
            [alone] => threads[alone] = self.begun.min(most(alone)),
            _ => {
                sharing.iter().for_each(|&index| threads[index] = 1);
                let mut left = self.whole.saturating_sub(sharing.len());
                while left > 0 && sharing.iter().any(|&index| threads[index] < most(index)) {
                    for &index in &sharing {
                        if left > 0 && threads[index] < most(index) {
                            threads[index] += 1;
                            left -= 1;
                        }
                    }
                }
            }
        }
        let share = |(index, (does, _)): (usize, &(Does, Option<u32>))| match *does == Does::Bulk && !shares(*does) {
            true => Share { threads: 1, rests: BULK_RESTS },
            false => Share { threads: u32::try_from(threads[index]).unwrap_or(u32::MAX), rests: 0 },
        };
        workers.iter().enumerate().map(share).collect()
    }

    /// Of this process.
    pub fn now() -> Self {
        let affinity = rustix::thread::sched_getaffinity(None).map_or(1, |set| set.count().max(1));
        let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Self::of(affinity as usize, quota(&groups, Path::new("/sys/fs/cgroup")))
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few cores")]
    fn of(affinity: usize, quota: Option<f64>) -> Self {
        let quota = quota.unwrap_or(f64::INFINITY);
        // A quota that falls short of a core by a hundredth is one.
        let whole = ((quota + 0.01).floor() as usize).clamp(1, affinity);
        let begun = ((quota - 0.01).ceil() as usize).clamp(whole, affinity);
        Self { whole, begun }
    }
}

/// Cores' worth of time that the tightest group grants, if any limits it.
fn quota(groups: &str, root: &Path) -> Option<f64> {
    let mut least: Option<f64> = None;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let mounted = match controllers {
            "" => root.to_owned(),
            names if names.split(',').any(|name| name == "cpu") => root.join(names),
            _ => continue,
        };
        for group in Path::new(path).ancestors() {
            let folder = mounted.join(group.strip_prefix("/").unwrap_or(group));
            least = [least, granted(&folder)].into_iter().flatten().reduce(f64::min);
        }
    }
    least
}

/// Version 2 writes `150000 100000` or `max 100000` into one file, version 1 the two numbers into two, -1 for no limit.
fn granted(folder: &Path) -> Option<f64> {
    let read = |file: &str| std::fs::read_to_string(folder.join(file)).ok();
    let text =
        read("cpu.max").or_else(|| Some(format!("{} {}", read("cpu.cfs_quota_us")?, read("cpu.cfs_period_us")?)))?;
    let mut numbers = text.split_whitespace().map(|number| number.parse::<f64>().ok());
    let (quota, period) = (numbers.next()??, numbers.next()??);
    (quota > 0.0 && period > 0.0).then_some(quota / period)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_group_of_either_version_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let path = root.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("a/cpu.max", "300000 100000\n");
        write("a/b/cpu.max", "max 100000\n");
        assert_eq!(quota("0::/a/b\n", root.path()), Some(3.0));
        write("a/b/cpu.max", "150000 100000\n");
        assert_eq!(quota("0::/a/b\n", root.path()), Some(1.5));
        write("cpu,cpuacct/c/cpu.cfs_quota_us", "50000\n");
        write("cpu,cpuacct/c/cpu.cfs_period_us", "100000\n");
        assert_eq!(quota("4:cpu,cpuacct:/c\n7:memory:/x\n", root.path()), Some(0.5));
        write("cpu,cpuacct/c/cpu.cfs_quota_us", "-1\n");
        assert_eq!(quota("4:cpu,cpuacct:/c\n", root.path()), None);
    }

    fn dealt(whole: usize, begun: usize, workers: &[(Does, Option<u32>)]) -> Vec<(u32, u32)> {
        Cores { whole, begun }.deal(workers).into_iter().map(|share| (share.threads, share.rests)).collect()
    }

    #[test]
    fn who_is_alone_has_all_cores_and_several_share_them() {
        use Does::{Awaited, Nothing};
        assert_eq!(dealt(2, 2, &[(Awaited, None), (Nothing, None)]), [(2, 0), (1, 0)]);
        assert_eq!(dealt(1, 2, &[(Awaited, None)]), [(2, 0)], "a quota of 1.5");
        assert_eq!(dealt(1, 2, &[(Awaited, None), (Awaited, None)]), [(1, 0), (1, 0)]);
        assert_eq!(dealt(2, 2, &[(Awaited, None), (Awaited, None)]), [(1, 0), (1, 0)]);
        assert_eq!(dealt(2, 2, &[(Awaited, None); 3]), [(1, 0); 3], "one at least");
        assert_eq!(dealt(8, 8, &[(Awaited, None); 3]), [(3, 0), (3, 0), (2, 0)]);
    }

    #[test]
    fn what_a_limit_leaves_over_is_the_others() {
        use Does::Awaited;
        assert_eq!(dealt(8, 8, &[(Awaited, Some(1)), (Awaited, None)]), [(1, 0), (7, 0)]);
        assert_eq!(dealt(8, 8, &[(Awaited, Some(2)), (Awaited, Some(3))]), [(2, 0), (3, 0)]);
        assert_eq!(dealt(8, 8, &[(Awaited, Some(3))]), [(3, 0)]);
    }

    #[test]
    fn bulk_rests_while_somebody_waits_for_others_and_shares_otherwise() {
        use Does::{Awaited, Bulk};
        assert_eq!(dealt(4, 4, &[(Bulk, None), (Awaited, None)]), [(1, 9), (4, 0)]);
        assert_eq!(dealt(4, 4, &[(Bulk, None), (Bulk, None)]), [(2, 0), (2, 0)]);
    }

    proptest::proptest! {
        #[test]
        fn there_are_never_more_threads_than_cores_but_for_one_of_each(
            whole in 1_usize..17,
            workers in proptest::collection::vec((0..3_usize, proptest::option::of(1_u32..9)), 1..9),
        ) {
            let does = [Does::Nothing, Does::Bulk, Does::Awaited];
            let workers: Vec<_> = workers.into_iter().map(|(n, most)| (does[n], most)).collect();
            let shares = Cores { whole, begun: whole }.deal(&workers);
            let computing = |index: &usize| workers[*index].0 != Does::Nothing && shares[*index].rests == 0;
            let computing: Vec<_> = (0..workers.len()).filter(computing).collect();
            let threads: u32 = computing.iter().map(|&index| shares[index].threads).sum();
            proptest::prop_assert!(threads as usize <= whole.max(computing.len()));
            // No core is left idle that somebody could use.
            let could = computing.iter().any(|&index| workers[index].1.is_none_or(|most| shares[index].threads < most));
            proptest::prop_assert!(threads as usize >= whole || !could);
            for (share, (_, most)) in shares.iter().zip(&workers) {
                proptest::prop_assert!(share.threads >= 1 && most.is_none_or(|most| share.threads <= most));
            }
        }
    }

    #[test]
    fn a_core_that_is_there_in_part_is_begun_and_not_whole() {
        let of = |affinity, quota| {
            let Cores { whole, begun } = Cores::of(affinity, quota);
            (whole, begun)
        };
        assert_eq!(of(8, None), (8, 8));
        assert_eq!(of(8, Some(1.5)), (1, 2));
        assert_eq!(of(8, Some(2.0)), (2, 2));
        assert_eq!(of(8, Some(0.3)), (1, 1));
        assert_eq!(of(2, Some(3.5)), (2, 2));
        assert!(Cores::now().whole >= 1);
    }
}
