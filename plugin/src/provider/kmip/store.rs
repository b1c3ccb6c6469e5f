//! What a KMIP provider keeps on disk beside its keystore row: `providers/ID/` in the state directory, 0700, files
//! 0600.
//!
//! Each file is replaced whole: written beside itself, synced, renamed, and the directory synced. What a virtseald that was killed
//! in between has left is cleared away when the provider is next opened: no second copy of a private key stays.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use openssl::pkey::{HasPublic, PKey};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use super::identity::{SigningRequest, StoredIdentity};
use crate::host::file_error::FileError;
use crate::model::envelope::ProviderId;
use crate::model::problem::chain;
use crate::provider::toolbox::certificate::Fingerprint;
use crate::provider::toolbox::tls::Trust;
use crate::secret::{SecretBytes, Transient};
use crate::store::Change;

/// The most bytes of one of the files.
const MAX_BYTES: usize = 1 << 20;

/// By what a server is known to be the right one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServerTrust {
    /// Its certificate was signed by one of these (PEM) and bears the endpoint's name. Revocation lists (PEM) among them
    /// are heeded.
    Ca(String),
    /// Its certificate is one of these.
    Pins(Vec<Fingerprint>),
}

impl From<&ServerTrust> for Trust {
    fn from(trust: &ServerTrust) -> Self {
        match trust {
            ServerTrust::Ca(pem) => Self::Authorities(pem.as_bytes().to_vec()),
            ServerTrust::Pins(pins) => Self::Pins(pins.clone()),
        }
    }
}

/// The files of one provider.
#[derive(Debug)]
pub(super) struct Store {
    dir: PathBuf,
}

impl Store {
    const IDENTITY: &str = "identity.json";
    const REQUEST: &str = "request.json";
    const TRUST: &str = "trust.json";

    pub(super) fn new(state_dir: &Path, id: ProviderId) -> Self {
        let dir = state_dir.join("providers").join(id.to_string());
        Self { dir }
    }

    pub(super) fn identity(&self) -> Result<Option<StoredIdentity>, FilesError> {
        self.read(Self::IDENTITY)
    }

    /// The last one that waits for its certificate, with those before it.
    pub(super) fn request(&self) -> Result<Option<SigningRequest>, FilesError> {
        self.read(Self::REQUEST)
    }

    pub(super) fn trust(&self) -> Result<Option<ServerTrust>, FilesError> {
        self.read(Self::TRUST)
    }

    pub(super) fn put_identity(&self, identity: &StoredIdentity) -> Result<(), FilesError> {
        self.write(Self::IDENTITY, identity)
    }

    pub(super) fn put_request(&self, request: &SigningRequest) -> Result<(), FilesError> {
        self.write(Self::REQUEST, request)
    }

    /// Its key has its certificate: no second copy of it stays here, nor of those before it.
    pub(super) fn remove_answered<T: HasPublic>(&self, key: &PKey<T>) -> Result<(), FilesError> {
        let Some(mut request) = self.request()? else {
            return Ok(());
        };
        if request.is_for(key) {
            let path = self.dir.join(Self::REQUEST);
            let removed = fs::remove_file(&path).and_then(|()| File::open(&self.dir)?.sync_all());
            return Ok(removed.map_err(FileError::of("remove", &path))?);
        }
        match request.forget_from(key) {
            Change::Changed => self.put_request(&request),
            Change::Unchanged => Ok(()),
        }
    }

    /// Clears away what a virtseald that was killed has left: files that did not get their name, and requests whose key is the
    /// identity's by now, sealed perhaps.
    pub(super) fn settle(&self) {
        for file in [Self::IDENTITY, Self::REQUEST, Self::TRUST] {
            let staged = staged(&self.dir.join(file));
            match fs::remove_file(&staged) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!("{} stays: {error}", staged.display());
                }
                _ => {}
            }
        }
        let identity = self.identity();
        let answered = identity.and_then(|identity| match identity.and_then(|found| found.public_key()) {
            Some(key) => self.remove_answered(&key),
            None => Ok(()),
        });
        if let Err(error) = answered {
            // Whoever needs the file is told what is wrong with it.
            tracing::warn!("{}", chain(&error));
        }
    }

    /// All of them, and the directory.
    pub(super) fn remove(&self) -> Result<(), FilesError> {
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

    pub(super) fn put_trust(&self, trust: &ServerTrust) -> Result<(), FilesError> {
        self.write(Self::TRUST, trust)
    }

    fn read<T: DeserializeOwned>(&self, file: &str) -> Result<Option<T>, FilesError> {
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

    fn write(&self, file: &str, value: &impl Serialize) -> Result<(), FilesError> {
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
pub enum FilesError {
    /// A file or a directory can't be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not what this version writes.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn files_are_private_and_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), ProviderId::random());
        assert!(store.trust().unwrap().is_none());
        for text in ["one", "two"] {
            let trust = ServerTrust::Ca(text.into());
            store.put_trust(&trust).unwrap();
            assert_eq!(store.trust().unwrap(), Some(trust));
        }
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&store.dir), 0o700);
        assert_eq!(mode(&store.dir.join(Store::TRUST)), 0o600);
        assert_eq!(fs::read_dir(&store.dir).unwrap().count(), 1);
        store.remove().unwrap();
        store.remove().unwrap();
        assert!(!store.dir.exists() && store.trust().unwrap().is_none());
    }

    #[test]
    fn damaged_files_are_errors_and_stay() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), ProviderId::random());
        store.put_trust(&ServerTrust::Ca("x".into())).unwrap();
        let path = store.dir.join(Store::TRUST);
        for text in ["", "{}", "{\"pins\":[\"AB\"]}", "[[[["] {
            fs::write(&path, text).unwrap();
            assert!(matches!(store.trust(), Err(FilesError::Damaged { .. })), "{text}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }
}
