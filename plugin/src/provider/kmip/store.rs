//! What a KMIP provider keeps on disk beside its keystore row: `providers/ID/` in the state directory, 0700, files
//! 0600.
//!
//! Each file is replaced whole: written beside itself, synced, renamed, and the directory synced.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use super::certificate::Fingerprint;
use super::identity::{SigningRequest, StoredIdentity};
use crate::envelope::ProviderId;
use crate::secret::{SecretBytes, Transient};

/// The most bytes of one of the files.
const MOST_BYTES: usize = 1 << 20;

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

    pub(super) fn identity(&self) -> Result<Option<StoredIdentity>, StoreError> {
        self.read(Self::IDENTITY)
    }

    pub(super) fn request(&self) -> Result<Option<SigningRequest>, StoreError> {
        self.read(Self::REQUEST)
    }

    pub(super) fn trust(&self) -> Result<Option<ServerTrust>, StoreError> {
        self.read(Self::TRUST)
    }

    pub(super) fn put_identity(&self, identity: &StoredIdentity) -> Result<(), StoreError> {
        self.write(Self::IDENTITY, identity)
    }

    pub(super) fn put_request(&self, request: &SigningRequest) -> Result<(), StoreError> {
        self.write(Self::REQUEST, request)
    }

    /// The request was answered.
    pub(super) fn remove_request(&self) -> Result<(), StoreError> {
        let path = self.dir.join(Self::REQUEST);
        let removed = fs::remove_file(&path).and_then(|()| File::open(&self.dir)?.sync_all());
        removed.map_err(StoreError::io("remove", &path))
    }

    /// All of them, and the directory.
    pub(super) fn remove(&self) -> Result<(), StoreError> {
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::io("remove", &self.dir)(error))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn put_trust(&self, trust: &ServerTrust) -> Result<(), StoreError> {
        self.write(Self::TRUST, trust)
    }

    fn read<T: DeserializeOwned>(&self, file: &str) -> Result<Option<T>, StoreError> {
        let path = self.dir.join(file);
        let opened = match File::open(&path) {
            Ok(opened) => opened,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io("read", &path)(error)),
        };
        // Sized by the file, for secret memory is scarce.
        let length = opened.metadata().map_err(StoreError::io("read", &path))?.len();
        let limit = usize::try_from(length).unwrap_or(usize::MAX).min(MOST_BYTES);
        let bytes = SecretBytes::read_from(opened, limit).map_err(StoreError::io("read", &path))?;
        serde_json::from_slice(bytes.expose())
            .map(Some)
            .map_err(|source| StoreError::Damaged { path, source })
    }

    fn write(&self, file: &str, value: &impl Serialize) -> Result<(), StoreError> {
        let path = self.dir.join(file);
        let text = serde_json::to_vec_pretty(value).map(Transient::new);
        let text = text.map_err(|source| StoreError::Damaged {
            path: path.clone(),
            source,
        })?;
        self.replace(&path, &text).map_err(StoreError::io("write", &path))
    }

    fn replace(&self, path: &Path, text: &[u8]) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let new = path.with_extension("new");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        // The directory and, the first time, the entries that lead to it.
        for dir in self.dir.ancestors().take(3) {
            File::open(dir)?.sync_all()?;
        }
        Ok(())
    }
}

/// Why a file can't be read or written.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The system refuses.
    #[error("can't {doing} {}", path.display())]
    Io {
        /// read, write or remove.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
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

impl StoreError {
    fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }
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
            assert!(matches!(store.trust(), Err(StoreError::Damaged { .. })), "{text}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }
}
