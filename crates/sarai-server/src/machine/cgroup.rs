//! The memory control groups that this process runs in, version 1 or 2: what they allow, hold and killed.

use std::path::{Path, PathBuf};

use sarai_core::Bytes;

/// Where groups are mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// Limits above this are none: version 1 writes a huge number.
const NO_LIMIT: u64 = 1 << 60;

/// The own group and every group above it, the own first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Groups {
    folders: Vec<PathBuf>,
    version: Version,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Version {
    One,
    #[default]
    Two,
}

/// What a group holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Memory that cannot be had back, of the group and all below it: anonymous, in-memory files, the kernel's.
    pub anonymous: Bytes,
    /// The most it may hold.
    pub limit: Option<Bytes>,
}

impl Groups {
    /// The groups of this process.
    pub fn of_this_process() -> Self {
        let text = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let groups = Self::parse(&text, Path::new(ROOT));
        let folders = groups.folders.into_iter().filter(|folder| folder.is_dir()).collect();
        Self { folders, ..groups }
    }

    fn parse(text: &str, root: &Path) -> Self {
        let mut unified = Self::default();
        for line in text.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            let below = |root: &Path| -> Vec<PathBuf> {
                Path::new(path).ancestors().map(|group| root.join(group.strip_prefix("/").unwrap_or(group))).collect()
            };
            if controllers.split(',').any(|name| name == "memory") {
                return Self { folders: below(&root.join("memory")), version: Version::One };
            }
            if controllers.is_empty() {
                unified = Self { folders: below(root), version: Version::Two };
            }
        }
        unified
    }

    /// The least limit of all groups.
    pub fn limit(&self) -> Option<Bytes> {
        self.folders.iter().filter_map(|folder| self.limit_of(folder)).min()
    }

    fn limit_of(&self, folder: &Path) -> Option<Bytes> {
        let file = match self.version {
            Version::One => "memory.limit_in_bytes",
            Version::Two => "memory.max",
        };
        read(folder, file)?.trim().parse().ok().filter(|&limit| limit < NO_LIMIT).map(Bytes)
    }

    /// What the group with the least room holds.
    pub fn tightest(&self) -> Option<Usage> {
        let usage = |folder: &PathBuf| {
            let limit = self.limit_of(folder)?;
            // Files in memory (tmpfs) and the kernel's own cannot be given back either.
            let (anonymous, others): (_, &[&str]) = match self.version {
                Version::One => ("total_rss", &["total_shmem"]),
                Version::Two => ("anon", &["shmem", "pagetables", "kernel_stack", "slab_unreclaimable"]),
            };
            let stat = read(folder, "memory.stat")?;
            let others = others.iter().filter_map(|field| field_of(&stat, field)).sum::<u64>();
            let anonymous = Bytes(field_of(&stat, anonymous)?) + Bytes(others);
            Some((limit.less(anonymous), Usage { anonymous, limit: Some(limit) }))
        };
        self.folders.iter().filter_map(usage).min_by_key(|(room, _)| *room).map(|(_, usage)| usage)
    }

    /// How many processes the kernel killed in the own group for want of memory. Workers run in it too.
    pub fn kills(&self) -> Option<u64> {
        let file = match self.version {
            Version::One => "memory.oom_control",
            Version::Two => "memory.events",
        };
        let of_group = self.folders.first().and_then(|folder| field_of(&read(folder, file)?, "oom_kill"));
        // The root of version 2 has no such file: there, what the kernel killed anywhere counts.
        of_group.or_else(|| field_of(&read(Path::new("/proc"), "vmstat")?, "oom_kill"))
    }

    /// The pressure file of the own group, where the version has one.
    pub fn pressure(&self) -> Option<PathBuf> {
        let file = self.folders.first()?.join("memory.pressure");
        file.exists().then_some(file)
    }
}

fn read(folder: &Path, file: &str) -> Option<String> {
    std::fs::read_to_string(folder.join(file)).ok()
}

/// `name value` of a flat keyed file.
fn field_of(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(root: &Path, path: &str, files: &[(&str, &str)]) {
        let folder = root.join(path);
        std::fs::create_dir_all(&folder).unwrap_or_default();
        for (file, text) in files {
            std::fs::write(folder.join(file), text).unwrap_or_default();
        }
    }

    #[test]
    fn version_1_is_read_from_the_memory_controller_and_every_group_above_counts() {
        let root = std::env::temp_dir().join(format!("sarai-cgroup-1-{}", std::process::id()));
        group(&root, "memory", &[("memory.limit_in_bytes", "9223372036854771712\n")]);
        group(&root, "memory/a", &[("memory.limit_in_bytes", "3000\n"), ("memory.stat", "rss 1\ntotal_rss 500\n")]);
        let own = [
            ("memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"),
        ];
        group(&root, "memory/a/b", &own);
        let groups = Groups::parse("3:cpu:/\n4:memory:/a/b\n0::/\n", &root);
        assert_eq!(groups.limit(), Some(Bytes(3000)));
        assert_eq!(groups.tightest(), Some(Usage { anonymous: Bytes(500), limit: Some(Bytes(3000)) }));
        assert_eq!(groups.kills(), Some(7));
        let _ = std::fs::remove_dir_all(root);
    }

    #[test]
    fn version_2_is_read_from_the_unified_tree() {
        let root = std::env::temp_dir().join(format!("sarai-cgroup-2-{}", std::process::id()));
        group(&root, "", &[]);
        let own = [
            ("memory.max", "max\n"),
            ("memory.stat", "anon 10\nfile 20\n"),
            ("memory.events", "low 0\nmax 3\noom 2\noom_kill 1\noom_group_kill 0\n"),
        ];
        group(&root, "s", &own);
        let groups = Groups::parse("0::/s\n", &root);
        assert_eq!((groups.limit(), groups.tightest()), (None, None));
        assert_eq!(groups.kills(), Some(1));
        group(&root, "s", &[("memory.max", "2048\n")]);
        assert_eq!(groups.tightest(), Some(Usage { anonymous: Bytes(10), limit: Some(Bytes(2048)) }));
        let _ = std::fs::remove_dir_all(root);
    }
}
