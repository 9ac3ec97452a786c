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

impl Cores {
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
