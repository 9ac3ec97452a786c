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
    fn a_process_that_is_gone_has_no_measure() {
        assert_eq!(measure(u32::MAX), None);
    }
}
