//! What a provider keeps on disk beside its keystore row: `providers/ID/` in the state directory, 0700, files 0600.
//!
//! Each file is replaced whole: written beside itself, synced, renamed, and the directory synced. What a virtseald that was killed
//! in between has left is cleared away when the provider is next opened: no second copy of a private key stays.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::host::file_error::FileError;
use crate::model::envelope::ProviderId;
use crate::secret::{SecretBytes, Transient};
use crate::store::Change;

/// The most bytes of one of the files.
const MAX_BYTES: usize = 1 << 20;

/// The files of one provider.
#[derive(Debug)]
pub(crate) struct Files {
    dir: PathBuf,
}

impl Files {
    pub(crate) fn of(state_dir: &Path, id: ProviderId) -> Self {
        let dir = state_dir.join("providers").join(id.to_string());
        Self { dir }
    }

    #[cfg(test)]
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// All of them, and the directory.
    pub(crate) fn remove(&self) -> Result<(), FilesError> {
        let removed = match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            removed => removed,
        };
        let synced = removed.and_then(|()| match self.dir.parent() {
            Some(parent) => File::open(parent)?.sync_all(),
            None => Ok(()),
        });
        Ok(synced.map_err(FileError::of("remove", &self.dir))?)
    }

    /// One of them.
    pub(crate) fn remove_file(&self, file: &str) -> Result<Change, FilesError> {
        let path = self.dir.join(file);
        let removed = match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Change::Unchanged),
            removed => removed.and_then(|()| File::open(&self.dir)?.sync_all()),
        };
        removed.map_err(FileError::of("remove", &path))?;
        Ok(Change::Changed)
    }

    /// Those that begin with `stem`, which no other kind's does.
    pub(crate) fn named(&self, stem: &str) -> Result<Vec<String>, FilesError> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries,
        };
        let names = entries.and_then(|entries| {
            let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
            names.collect::<io::Result<Vec<_>>>()
        });
        let mut names = names.map_err(FileError::of("read", &self.dir))?;
        names.retain(|name| name.starts_with(stem));
        Ok(names)
    }

    /// When one of them was replaced last, where that can be told.
    pub(crate) fn written(&self, file: &str) -> Option<SystemTime> {
        fs::metadata(self.dir.join(file)).ok()?.modified().ok()
    }

    /// Clears away those of `files` that did not get their name.
    pub(crate) fn settle(&self, files: &[&str]) {
        for file in files {
            let staged = staged(&self.dir.join(file));
            match fs::remove_file(&staged) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!("{} stays: {error}", staged.display());
                }
                _ => {}
            }
        }
    }

    pub(crate) fn read<T: DeserializeOwned>(&self, file: &str) -> Result<Option<T>, FilesError> {
        let path = self.dir.join(file);
        let opened = match File::open(&path) {
            Ok(opened) => opened,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(FileError::of("read", &path)(error).into()),
        };
        // Sized by the file, for secret memory is scarce.
        let length = opened.metadata().map_err(FileError::of("read", &path))?.len();
        let limit = usize::try_from(length).unwrap_or(usize::MAX).min(MAX_BYTES);
        let bytes = SecretBytes::read_from(opened, limit).map_err(FileError::of("read", &path))?;
        serde_json::from_slice(bytes.expose())
            .map(Some)
            .map_err(|source| FilesError::Damaged { path, source })
    }

    pub(crate) fn write(&self, file: &str, value: &impl Serialize) -> Result<(), FilesError> {
        let path = self.dir.join(file);
        let text = serde_json::to_vec_pretty(value).map(Transient::new);
        let text = text.map_err(|source| FilesError::Damaged {
            path: path.clone(),
            source,
        })?;
        let replaced = self.replace(&path, &text);
        if replaced.is_err() {
            // Half a file, with a key in it. Gone, if it has its name already.
            let _ = fs::remove_file(staged(&path));
        }
        Ok(replaced.map_err(FileError::of("write", &path))?)
    }

    fn replace(&self, path: &Path, text: &[u8]) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let staged = staged(path);
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&staged)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(&staged, path)?;
        // The directory and, the first time, the entries that lead to it.
        for dir in self.dir.ancestors().take(3) {
            File::open(dir)?.sync_all()?;
        }
        Ok(())
    }
}

/// The name of a file at `path` that is not whole yet.
fn staged(path: &Path) -> PathBuf {
    path.with_extension("new")
}

/// Why a file can't be read or written.
#[derive(Debug, Error)]
pub(crate) enum FilesError {
    /// A file or a directory can't be used.
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{} is damaged", path.display())]
    Damaged {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}
