//! A control group of either version that a test makes below its own, and gives back. Needs root, as CI has it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub struct Group {
    path: PathBuf,
    /// Of the first version.
    pub v1: bool,
}

impl Group {
    pub fn new(controller: &str, name: &str) -> Self {
        let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        let v1_root = Path::new("/sys/fs/cgroup").join(controller);
        let v1 = v1_root.is_dir();
        let (root, wanted) = if v1 { (v1_root, controller) } else { (PathBuf::from("/sys/fs/cgroup"), "") };
        let own = groups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            (fields.next()?.split(',').any(|found| found == wanted)).then(|| fields.next())?
        });
        let own = root.join(own.unwrap().trim_start_matches('/'));
        let parent = if own.is_dir() { own } else { root };
        if !v1 {
            // It may be there already, or be for others to give.
            let _ = std::fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"));
        }
        let path = parent.join(format!("sarai-test-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).expect("a control group cannot be made: these tests need root");
        Self { path, v1 }
    }

    /// Where the numbers of its processes are written.
    pub fn processes(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    pub fn write(&self, file: &str, value: impl std::fmt::Display) {
        std::fs::write(self.path.join(file), value.to_string()).unwrap();
    }

    pub fn read(&self, file: &str) -> String {
        std::fs::read_to_string(self.path.join(file)).unwrap()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while std::fs::remove_dir(&self.path).is_err() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}
