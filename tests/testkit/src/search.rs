//! Searching for key material wherever it could be: files, the arguments and environments of processes, core images.
//!
//! A search that finds nothing proves something only if it can find: each story plants a needle in each kind of place too.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use memchr::memmem::Finder;

/// What is searched for, each with a name that can be shown.
#[derive(Default)]
pub struct Needles(Vec<(String, Finder<'static>)>);

/// Where a needle was found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Which needle, never its bytes.
    pub needle: String,
    /// The file, or the process.
    pub at: String,
}

impl Needles {
    /// Adds `text` as it is.
    #[must_use]
    pub fn text(mut self, name: &str, text: &[u8]) -> Self {
        self.0.push((name.to_owned(), Finder::new(text).into_owned()));
        self
    }

    /// Adds a key in every form in which it could show: its bytes, their hex in either case, base64 of bytes and hex.
    #[must_use]
    pub fn key(self, name: &str, key: &[u8]) -> Self {
        let (lower, upper) = (hex::encode(key), hex::encode_upper(key));
        self.text(&format!("{name} (bytes)"), key)
            .text(&format!("{name} (hex)"), lower.as_bytes())
            .text(&format!("{name} (HEX)"), upper.as_bytes())
            .text(&format!("{name} (base64)"), unpadded(key).as_bytes())
            .text(
                &format!("{name} (base64 of hex)"),
                unpadded(lower.as_bytes()).as_bytes(),
            )
    }

    /// The names of the needles in `bytes`.
    pub fn in_bytes(&self, bytes: &[u8]) -> Vec<String> {
        let found = self.0.iter().filter(|(_, finder)| finder.find(bytes).is_some());
        found.map(|(name, _)| name.clone()).collect()
    }

    /// The places in the file at `path`. One that is gone holds nothing.
    ///
    /// # Errors
    /// It can't be read.
    pub fn in_file(&self, path: &Path) -> Result<BTreeSet<Place>> {
        let bytes = match fs::read(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            read => read.with_context(|| format!("{} can't be read", path.display()))?,
        };
        Ok(self.at(&path.display().to_string(), &bytes))
    }

    /// The places in all regular files below `directory`, across mounts, except those that `skip` names. Also says how
    /// many files were read.
    ///
    /// # Errors
    /// One of them can't be read.
    pub fn in_tree(
        &self,
        directory: &Path,
        skip: &dyn Fn(&Path) -> bool,
    ) -> Result<(BTreeSet<Place>, usize)> {
        let (mut places, mut files, mut seen) = (BTreeSet::new(), 0, BTreeSet::new());
        let mut left: Vec<PathBuf> = vec![directory.to_owned()];
        while let Some(path) = left.pop() {
            let Ok(found) = fs::symlink_metadata(&path) else {
                continue;
            };
            if skip(&path) || !seen.insert((found.dev(), found.ino())) {
                continue;
            }
            if found.is_dir() {
                // Another's temporary directory may be gone by now.
                let entries = fs::read_dir(&path).into_iter().flatten();
                left.extend(entries.filter_map(Result::ok).map(|entry| entry.path()));
            } else if found.is_file() {
                files += 1;
                places.extend(self.in_file(&path)?);
            }
        }
        Ok((places, files))
    }

    /// The places in the arguments and the environment of every process in `proc`, a mounted procfs.
    pub fn in_processes(&self, proc: &Path) -> BTreeSet<Place> {
        let mut places = BTreeSet::new();
        let entries = fs::read_dir(proc).into_iter().flatten().filter_map(Result::ok);
        for entry in entries {
            let pid = entry.file_name().to_string_lossy().into_owned();
            if pid.parse::<u32>().is_err() {
                continue;
            }
            for part in ["cmdline", "environ"] {
                // It may have ended meanwhile.
                let bytes = fs::read(entry.path().join(part)).unwrap_or_default();
                places.extend(self.at(&format!("{part} of process {pid}"), &bytes));
            }
        }
        places
    }

    fn at(&self, at: &str, bytes: &[u8]) -> BTreeSet<Place> {
        let found = self.in_bytes(bytes).into_iter();
        found
            .map(|needle| Place {
                needle,
                at: at.to_owned(),
            })
            .collect()
    }
}

/// Base64 of `bytes` as far as it does not depend on what comes after them.
fn unpadded(bytes: &[u8]) -> String {
    STANDARD.encode(&bytes[..bytes.len() / 3 * 3])
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &[u8] = b"0123456789abcdef0123456789ABCDEF";

    #[test]
    fn every_form_of_a_key_is_found() {
        let needles = Needles::default().key("k", KEY);
        let hex = hex::encode(KEY);
        let forms = [
            (KEY.to_vec(), "k (bytes)"),
            (hex.clone().into_bytes(), "k (hex)"),
            (hex::encode_upper(KEY).into_bytes(), "k (HEX)"),
            (STANDARD.encode(KEY).into_bytes(), "k (base64)"),
            (STANDARD.encode(&hex).into_bytes(), "k (base64 of hex)"),
        ];
        for (form, name) in forms {
            let hay = [b"before ", &form[..], b" after"].concat();
            assert!(needles.in_bytes(&hay).contains(&name.to_owned()), "{name}");
        }
        assert!(needles.in_bytes(&KEY[1..]).is_empty());
    }

    #[test]
    fn trees_are_searched_to_their_ends() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("a/b");
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("file"), [b"x", KEY, b"y"].concat()).unwrap();
        let needles = Needles::default().key("k", KEY);
        let (places, files) = needles.in_tree(directory.path(), &|_| false).unwrap();
        assert_eq!((places.len(), files), (1, 1));
        let skipped = needles
            .in_tree(directory.path(), &|path| path.ends_with("b"))
            .unwrap();
        assert_eq!(skipped, (BTreeSet::new(), 0));
    }
}
