//! Models whose GGUF is split into several files.

use std::path::{Path, PathBuf};

/// All parts of a file that may be split, itself first: `…-00001-of-00003.gguf` has two more. llama.cpp finds them by this name too.
#[must_use]
pub fn parts(first: &Path) -> Vec<PathBuf> {
    let text = first.to_string_lossy();
    let name = text.strip_suffix(".gguf").and_then(|text| text.rsplit_once("-00001-of-"));
    let numbered = name.filter(|(_, count)| count.len() == 5);
    match numbered.and_then(|(stem, count)| Some((stem, count, count.parse::<u32>().ok()?))) {
        Some((stem, count, parts @ 1..)) => {
            (1..=parts).map(|part| PathBuf::from(format!("{stem}-{part:05}-of-{count}.gguf"))).collect()
        }
        _ => vec![first.to_owned()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_parts_of_a_split_file_are_found_by_their_numbers() {
        let split = parts(Path::new("/m/big-00001-of-00003.gguf"));
        assert_eq!(split, ["1", "2", "3"].map(|n| PathBuf::from(format!("/m/big-0000{n}-of-00003.gguf"))));
        for one in
            ["/m/one.gguf", "/m/big-00001-of-00000.gguf", "/m/big-00001-of-many.gguf", "/m/big-00002-of-00003.gguf"]
        {
            assert_eq!(parts(Path::new(one)), [PathBuf::from(one)]);
        }
    }
}
