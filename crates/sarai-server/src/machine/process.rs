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

/// As [`measure`], at once however large the process is, but with whole file pages instead of shares of them.
pub fn glance(pid: u32) -> Option<Memory> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let mut pages = text.split_whitespace().skip(1).map_while(|field| field.parse::<u64>().ok());
    let (resident, shared) = (pages.next()?, pages.next()?);
    let bytes = |pages: u64| Bytes(pages * rustix::param::page_size() as u64);
    Some(Memory { anonymous: bytes(resident.saturating_sub(shared)), file: bytes(shared) })
}

fn parse(text: &str) -> Option<Memory> {
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse::<u64>().ok()
    };
    Some(Memory { anonymous: Bytes(kib("Anonymous:")? << 10), file: Bytes(kib("Pss_File:")? << 10) })
}

/// A process and all that descend from it, itself first.
pub fn tree(pid: u32) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parents: Vec<(u32, u32)> = numbers.filter_map(|child| Some((child, parent(child)?))).collect();
    let mut pids = vec![pid];
    let mut next = 0;
    while next < pids.len() {
        let of = pids[next];
        pids.extend(parents.iter().filter(|(_, parent)| *parent == of).map(|(child, _)| child));
        next += 1;
    }
    pids
}

fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in brackets, and may have any character in it.
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

/// All processes of a tree together, by whatever measures one.
pub fn of_tree(pid: u32, one: impl Fn(u32) -> Option<Memory>) -> Option<Memory> {
    let all = tree(pid).into_iter().filter_map(one);
    all.reduce(|a, b| Memory { anonymous: a.anonymous + b.anonymous, file: a.file + b.file })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anonymous_and_file_pages_are_told_apart() {
        let text = "Rss: 1752 kB\nPss_File:             240 kB\nAnonymous:            112 kB\nAnonHugePages: 0 kB\n";
        assert_eq!(parse(text), Some(Memory { anonymous: Bytes(112 << 10), file: Bytes(240 << 10) }));
    }

    #[test]
    fn a_glance_sees_what_a_measure_sees() {
        let (glance, measure) = (glance(std::process::id()), measure(std::process::id()));
        let (glance, measure) = (glance.unwrap_or_default(), measure.unwrap_or_default());
        assert!(glance.anonymous.as_mib() > 0.5 * measure.anonymous.as_mib(), "{glance:?} {measure:?}");
        assert!(glance.anonymous.as_mib() < 2.0 * measure.anonymous.as_mib() + 1.0, "{glance:?} {measure:?}");
    }

    #[test]
    #[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
    fn a_tree_has_the_children_of_the_children_too() {
        let mut shell = std::process::Command::new("sh");
        let mut child =
            shell.args(["-c", "sh -c 'read x; :' ; :"]).stdin(std::process::Stdio::piped()).spawn().unwrap();
        let began = std::time::Instant::now();
        while tree(std::process::id()).len() < 3 {
            assert!(began.elapsed().as_secs() < 10, "the shell has a shell of its own");
            std::thread::yield_now();
        }
        assert_eq!(tree(std::process::id())[..2], [std::process::id(), child.id()]);
        let alone = glance(child.id()).unwrap();
        assert!(of_tree(child.id(), glance).unwrap().total() > alone.total());
        drop(child.stdin.take());
        child.wait().unwrap();
        assert_eq!(of_tree(child.id(), glance), None);
    }

    #[test]
    fn a_process_that_is_gone_has_no_measure() {
        assert_eq!(measure(u32::MAX), None);
    }
}
