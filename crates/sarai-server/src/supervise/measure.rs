//! What a process really holds, from `/proc/<pid>/smaps_rollup`.

use sarai_core::Bytes;

/// Resident memory of one process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Memory that no file backs.
    pub anonymous: Bytes,
    /// Its share of the file pages in memory: the mapped weights.
    pub file: Bytes,
}

impl Memory {
    /// Both together.
    pub fn total(self) -> Bytes {
        self.anonymous + self.file
    }
}

/// Measures a process; `None` once it is gone.
pub fn measure(pid: u32) -> Option<Memory> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    parse(&text)
}

fn parse(text: &str) -> Option<Memory> {
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse::<u64>().ok()
    };
    Some(Memory { anonymous: Bytes(kib("Anonymous:")? << 10), file: Bytes(kib("Pss_File:")? << 10) })
}

/// The most that this machine, or the control group that this process runs in, can hold.
pub fn machine_limit() -> Option<Bytes> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let total = read("/proc/meminfo").and_then(|text| mem_total(&text));
    let groups = read("/proc/self/cgroup").unwrap_or_default();
    let limits = limit_files(&groups).into_iter().filter_map(|file| read(&file)?.trim().parse().ok().map(Bytes));
    total.into_iter().chain(limits).min()
}

fn mem_total(meminfo: &str) -> Option<Bytes> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| Bytes(kib << 10))
}

/// The limit files of a process's memory control group and of every group above it, for both versions.
fn limit_files(groups: &str) -> Vec<String> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        files.extend(std::path::Path::new(path).ancestors().map(|group| {
            let group = group.to_string_lossy();
            format!("{root}{}/{file}", group.trim_end_matches('/'))
        }));
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_every_control_group_above_counts_in_both_versions() {
        assert_eq!(
            limit_files("0::/a/b\n"),
            ["/sys/fs/cgroup/a/b/memory.max", "/sys/fs/cgroup/a/memory.max", "/sys/fs/cgroup/memory.max"]
        );
        assert_eq!(limit_files("3:cpu:/\n4:memory:/x\n")[0], "/sys/fs/cgroup/memory/x/memory.limit_in_bytes");
        assert_eq!(mem_total("MemTotal:       1024 kB\n"), Some(Bytes::mib(1)));
        assert!(machine_limit().is_some());
    }

    #[test]
    fn anonymous_and_file_pages_are_told_apart() {
        let text = "Rss: 1752 kB\nPss_File:             240 kB\nAnonymous:            112 kB\nAnonHugePages: 0 kB\n";
        assert_eq!(parse(text), Some(Memory { anonymous: Bytes(112 << 10), file: Bytes(240 << 10) }));
    }

    #[test]
    fn a_process_that_is_gone_has_no_measure() {
        assert_eq!(measure(u32::MAX), None);
    }
}
