//! Looks for what a guest wrote in the files of its host.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use virtseal_testkit::{Needles, Place};

/// What a search went through and found.
pub(crate) struct Searched {
    pub(crate) files: usize,
    pub(crate) bytes: u64,
    pub(crate) places: BTreeSet<Place>,
}

impl Searched {
    /// Searches the file, or all files below the directory, for `texts`: as they are and as UEFI writes text, in UTF-16.
    ///
    /// # Errors
    /// When a file can't be read, other than by being gone meanwhile.
    pub(crate) fn through(path: &Path, texts: &[&str]) -> Result<Self> {
        let needles = texts.iter().fold(Needles::default(), |needles, text| {
            let utf16: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
            needles.text(text, text.as_bytes()).text(text, &utf16)
        });
        let (places, files) = needles.in_tree(path, &|_| false)?;
        let bytes = bytes_below(path).with_context(|| path.display().to_string())?;
        Ok(Self { files, bytes, places })
    }
}

fn bytes_below(path: &Path) -> std::io::Result<u64> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => Ok(found.len()),
        Ok(found) if found.is_dir() => fs::read_dir(path)?.map(|entry| bytes_below(&entry?.path())).sum(),
        // Gone meanwhile, or nothing that holds bytes.
        _ => Ok(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_both_encodings_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("below/file");
        let mut bytes = b"xxmarker-1".to_vec();
        bytes.extend("marker-2".encode_utf16().flat_map(u16::to_le_bytes));
        fs::create_dir(directory.path().join("below")).unwrap();
        fs::write(&file, &bytes).unwrap();
        for path in [directory.path(), &file] {
            let searched = Searched::through(path, &["marker-1", "marker-2", "marker-3"]).unwrap();
            assert_eq!((searched.files, searched.bytes), (1, bytes.len() as u64));
            let found: Vec<_> = searched
                .places
                .iter()
                .map(|place| place.needle.as_str())
                .collect();
            assert_eq!(found, ["marker-1", "marker-2"]);
        }
    }
}
