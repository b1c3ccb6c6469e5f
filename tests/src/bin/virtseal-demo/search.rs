//! Looks for what a guest wrote in the files of its host.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::Path;

use anyhow::{Context, Result};

const CHUNK_BYTES: usize = 1 << 20;

/// What a search went through and found.
#[derive(Default)]
pub(crate) struct Searched {
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    /// What was found, each as `TEXT in PATH`.
    pub(crate) found: BTreeSet<String>,
}

impl Searched {
    /// Searches the file, or all files below the directory, for `texts`: as they are and as UEFI writes text, in UTF-16.
    ///
    /// # Errors
    /// When a file can't be read, other than by being gone meanwhile.
    pub(crate) fn through(path: &Path, texts: &[&str]) -> Result<Self> {
        let needles: Vec<_> = texts
            .iter()
            .flat_map(|text| {
                let utf16 = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
                [(*text, text.as_bytes().to_vec()), (*text, utf16)]
            })
            .collect();
        let mut searched = Self::default();
        searched.visit(path, &needles)?;
        Ok(searched)
    }

    fn visit(&mut self, path: &Path, needles: &[(&str, Vec<u8>)]) -> Result<()> {
        let kind = match fs::symlink_metadata(path) {
            Ok(metadata) => metadata.file_type(),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        if kind.is_dir() {
            for entry in fs::read_dir(path)? {
                self.visit(&entry?.path(), needles)?;
            }
        } else if kind.is_file() {
            self.read(path, needles)
                .with_context(|| format!("{} can't be searched", path.display()))?;
        }
        Ok(())
    }

    fn read(&mut self, path: &Path, needles: &[(&str, Vec<u8>)]) -> Result<()> {
        let overlap = needles.iter().map(|(_, bytes)| bytes.len()).max().unwrap_or(1) - 1;
        let mut file = File::open(path)?;
        let mut window = Vec::with_capacity(CHUNK_BYTES + overlap);
        self.files += 1;
        loop {
            let read = file.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut window)?;
            if read == 0 {
                return Ok(());
            }
            self.bytes += read as u64;
            for (text, bytes) in needles {
                if contains(&window, bytes) {
                    self.found.insert(format!("{text} in {}", path.display()));
                }
            }
            window.drain(..window.len().saturating_sub(overlap));
        }
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    let Some(first) = needle.first() else {
        return false;
    };
    let mut rest = haystack;
    while let Some(at) = rest.iter().position(|byte| byte == first) {
        if rest[at..].starts_with(needle) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_across_chunks_in_both_encodings_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let mut bytes = vec![b'm'; CHUNK_BYTES - 3];
        bytes.extend(b"marker-1");
        bytes.extend("marker-2".encode_utf16().flat_map(u16::to_le_bytes));
        fs::create_dir(directory.path().join("below")).unwrap();
        fs::write(directory.path().join("below/file"), &bytes).unwrap();
        let searched = Searched::through(directory.path(), &["marker-1", "marker-2", "marker-3"]).unwrap();
        assert_eq!((searched.files, searched.bytes), (1, bytes.len() as u64));
        let path = directory.path().join("below/file");
        let expected = ["marker-1", "marker-2"].map(|text| format!("{text} in {}", path.display()));
        assert_eq!(searched.found, BTreeSet::from(expected));
    }
}
