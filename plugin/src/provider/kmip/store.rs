//! What a KMIP provider keeps on disk beside its keystore row: who it is to its servers, which request waits, whom it trusts.

use std::fmt;
use std::path::Path;

use openssl::pkey::{HasPublic, PKey};
use openssl::x509::X509;
use serde::Serialize;

use super::identity::{SigningRequest, StoredIdentity};
use crate::model::envelope::ProviderId;
use crate::model::problem::chain;
use crate::provider::toolbox::certificate::{CertificateFacts, Fingerprint};
use crate::provider::toolbox::files::Files;
use crate::provider::toolbox::tls::Trust;
use crate::store::Change;

pub(crate) use crate::provider::toolbox::files::FilesError;

/// By what a server is known to be the right one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ServerTrust {
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

impl fmt::Display for ServerTrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ca(pem) => {
                let found = X509::stack_from_pem(pem.as_bytes()).unwrap_or_default();
                let names = found.iter().filter_map(|one| CertificateFacts::of(one).ok());
                let names: Vec<_> = names.map(|facts| facts.subject).collect();
                write!(
                    f,
                    "servers whose certificate was signed by {}",
                    names.join(" or ")
                )
            }
            Self::Pins(pins) => {
                let pins: Vec<_> = pins.iter().map(ToString::to_string).collect();
                write!(f, "the certificate with SHA-256 {}", pins.join(" or "))
            }
        }
    }
}

/// The files of one provider.
#[derive(Debug)]
pub(super) struct Store {
    files: Files,
}

impl Store {
    const IDENTITY: &str = "identity.json";
    const REQUEST: &str = "request.json";
    const TRUST: &str = "trust.json";

    pub(super) fn new(state_dir: &Path, id: ProviderId) -> Self {
        Self {
            files: Files::of(state_dir, id),
        }
    }

    pub(super) fn identity(&self) -> Result<Option<StoredIdentity>, FilesError> {
        self.files.read(Self::IDENTITY)
    }

    /// The last one that waits for its certificate, with those before it.
    pub(super) fn request(&self) -> Result<Option<SigningRequest>, FilesError> {
        self.files.read(Self::REQUEST)
    }

    pub(super) fn trust(&self) -> Result<Option<ServerTrust>, FilesError> {
        self.files.read(Self::TRUST)
    }

    pub(super) fn put_identity(&self, identity: &StoredIdentity) -> Result<(), FilesError> {
        self.files.write(Self::IDENTITY, identity)
    }

    pub(super) fn put_request(&self, request: &SigningRequest) -> Result<(), FilesError> {
        self.files.write(Self::REQUEST, request)
    }

    /// Its key has its certificate: no second copy of it stays here, nor of those before it.
    pub(super) fn remove_answered<T: HasPublic>(&self, key: &PKey<T>) -> Result<(), FilesError> {
        let Some(mut request) = self.request()? else {
            return Ok(());
        };
        if request.is_for(key) {
            return self.files.remove_file(Self::REQUEST).map(drop);
        }
        match request.forget_from(key) {
            Change::Changed => self.put_request(&request),
            Change::Unchanged => Ok(()),
        }
    }

    /// Clears away what a virtseald that was killed has left: files that did not get their name, and requests whose key is the
    /// identity's by now, sealed perhaps.
    pub(super) fn settle(&self) {
        self.files.settle(&[Self::IDENTITY, Self::REQUEST, Self::TRUST]);
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

    pub(super) fn put_trust(&self, trust: &ServerTrust) -> Result<(), FilesError> {
        self.files.write(Self::TRUST, trust)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
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
        assert_eq!(mode(store.files.dir()), 0o700);
        assert_eq!(mode(&store.files.dir().join(Store::TRUST)), 0o600);
        assert_eq!(fs::read_dir(store.files.dir()).unwrap().count(), 1);
        store.files.remove().unwrap();
        store.files.remove().unwrap();
        assert!(!store.files.dir().exists() && store.trust().unwrap().is_none());
    }

    #[test]
    fn damaged_files_are_errors_and_stay() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), ProviderId::random());
        store.put_trust(&ServerTrust::Ca("x".into())).unwrap();
        let path = store.files.dir().join(Store::TRUST);
        for text in ["", "{}", "{\"pins\":[\"AB\"]}", "[[[["] {
            fs::write(&path, text).unwrap();
            assert!(matches!(store.trust(), Err(FilesError::Damaged { .. })), "{text}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }
}
