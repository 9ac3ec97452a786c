//! Pages of mapped files and of the heap that can be had again: given back.

use std::ops::Range;
use std::path::Path;

use sarai_core::frame::LoadSpec;
use sarai_core::split;

/// Gives back the pages of the file that loading read and nothing reads again: those of tensors that were copied. They
/// stay in the page cache as long as nobody needs the memory.
pub fn release_idle(spec: &LoadSpec) {
    for &(from, to) in &spec.idle {
        advise_mapping(&spec.path, from..to, rustix::mm::Advice::LinuxDontNeed);
    }
}

/// Pages out the mapped weights of an idle worker and returns free heap to the system.
pub fn trim(path: &Path) {
    advise_mapping(path, 0..u64::MAX, rustix::mm::Advice::LinuxPageOut);
    trim_heap();
}

/// Gives back the pages of this program and its libraries that its start has read: nothing does so again for most of them, and the
/// others come back from the page cache.
pub fn release_start() {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    for (path, mapping) in only_read(&smaps) {
        advise(path, (mapping.start, mapping.end), rustix::mm::Advice::LinuxDontNeed);
    }
}

/// Mappings of files that are as the files are: what was written to is not, addresses that the loader has filled in among it.
fn only_read(smaps: &str) -> impl Iterator<Item = (&Path, Mapping)> {
    let is_head = |line: &str| line.split(' ').next().is_some_and(|word| word.contains('-') && !word.contains(':'));
    let mut of = None;
    smaps.lines().filter_map(move |line| {
        if is_head(line) {
            let permissions = line.split(' ').nth(1).unwrap_or_default();
            of = mapping(line).filter(|_| permissions.starts_with('r') && !permissions.contains('w'));
            return None;
        }
        let written = line.strip_prefix("Anonymous:")?.split_whitespace().next()?;
        of.take().filter(|_| written == "0")
    })
}

/// Returns to the system what freed contexts leave behind in the allocator.
#[expect(unsafe_code, reason = "glibc's malloc_trim")]
pub fn trim_heap() {
    // SAFETY: takes a number, and locks the allocator itself.
    unsafe { libc::malloc_trim(0) };
}

fn advise_mapping(path: &Path, bytes: Range<u64>, advice: rustix::mm::Advice) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    // Of a split file, all parts are mapped.
    for part in split::parts(path) {
        let part = std::fs::canonicalize(&part).unwrap_or(part);
        for mapping in mappings_of(&maps, &part.to_string_lossy()) {
            let Some((start, end)) = mapping.addresses_of(&bytes) else { continue };
            advise(&part, (start, end), advice);
        }
    }
}

#[expect(unsafe_code, reason = "madvise takes addresses")]
fn advise(path: &Path, (start, end): (usize, usize), advice: rustix::mm::Advice) {
    let address = std::ptr::with_exposed_provenance_mut(start);
    // SAFETY: the range is a file mapping that is only read, so dropping its pages loses nothing: they come back from the file.
    if let Err(error) = unsafe { rustix::mm::madvise(address, end - start, advice) } {
        crate::log::warn(&format!("madvise on {}: {error}", path.display()));
    }
}

/// A piece of a file that is mapped.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: usize,
    end: usize,
    /// Where in the file it begins.
    offset: u64,
}

impl Mapping {
    /// The addresses of these bytes of the file, as far as they are in this piece.
    fn addresses_of(&self, bytes: &Range<u64>) -> Option<(usize, usize)> {
        let at = |byte: u64| {
            self.start.saturating_add(usize::try_from(byte.saturating_sub(self.offset)).unwrap_or(usize::MAX))
        };
        let (start, end) = (at(bytes.start), at(bytes.end).min(self.end));
        (start < end).then_some((start, end))
    }
}

/// Where a file is mapped.
fn mappings_of<'a>(maps: &'a str, name: &'a str) -> impl Iterator<Item = Mapping> + 'a {
    maps.lines().filter_map(mapping).filter(move |(path, _)| *path == Path::new(name)).map(|(_, mapping)| mapping)
}

/// A line of `/proc/self/maps`, if it is of a file.
fn mapping(line: &str) -> Option<(&Path, Mapping)> {
    let path = Path::new(&line[line.find('/')?..]);
    let mut fields = line.split_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    let offset = u64::from_str_radix(fields.nth(1)?, 16).ok()?;
    Some((path, Mapping { start: address(start)?, end: address(end)?, offset }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_to_is_not_given_back() {
        let smaps = "55f0-55f8 r--p 00000000 fe:00 9                    /usr/bin/sarai\nSize:   4 kB\nAnonymous:             0 kB\nVmFlags: rd mr\n\
                     55f8-5600 r--p 00008000 fe:00 9                    /usr/bin/sarai\nAnonymous:            12 kB\n\
                     5600-5608 rw-p 00010000 fe:00 9                    /usr/bin/sarai\nAnonymous:             0 kB\n\
                     5608-5610 r-xp 00000000 00:00 0                    [vdso]\nAnonymous:             0 kB\n\
                     5610-5618 ---p 00000000 fe:00 9                    /lib/libc.so.6\nAnonymous:             0 kB\n\
                     5618-5620 r-xp 00010000 fe:00 9                    /lib/libc.so.6\nAnonymous:             0 kB\n";
        let given_back: Vec<_> =
            only_read(smaps).map(|(path, mapping)| (path.display().to_string(), mapping.start)).collect();
        assert_eq!(given_back, [("/usr/bin/sarai".to_owned(), 0x55f0), ("/lib/libc.so.6".to_owned(), 0x5618)]);
        // This program goes on with what it needs.
        release_start();
        assert!(only_read(&std::fs::read_to_string("/proc/self/smaps").unwrap_or_default()).count() > 2);
    }

    #[test]
    fn the_pieces_of_a_mapped_file_are_found() {
        let maps = "7f00-7f10 r--s 00000010 08:01 5  /models/a b.gguf\n7f20-7f30 rw-p 00000000 00:00 0\n\
                    7f40-7f50 r--s 00000000 08:01 6  /m/s-00001-of-00002.gguf\n7f60-7f70 r--s 0 08:01 7  /m/s-00002-of-00002.gguf\n";
        let one: Vec<_> = mappings_of(maps, "/models/a b.gguf").collect();
        assert_eq!(one, [Mapping { start: 0x7f00, end: 0x7f10, offset: 0x10 }]);
        assert_eq!(mappings_of(maps, "/m/s-00002-of-00002.gguf").count(), 1);
    }

    #[test]
    fn bytes_of_a_file_become_addresses_within_the_piece() {
        let piece = Mapping { start: 0x1000, end: 0x2000, offset: 0x500 };
        assert_eq!(piece.addresses_of(&(0x600..0x700)), Some((0x1100, 0x1200)));
        assert_eq!(piece.addresses_of(&(0..u64::MAX)), Some((0x1000, 0x2000)));
        assert_eq!(piece.addresses_of(&(0..0x500)), None);
        assert_eq!(piece.addresses_of(&(0x5000..0x6000)), None);
    }
}
