//! What a user is told when a native provider can't be made, backed up or restored.

use super::{NativeError, NativeProvider};
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem, chain};
use crate::provider::{Addition, ProviderError};

impl NativeProvider {
    /// Makes one whose passphrase is the credential of `new`; takes seconds, by the nature of passphrases.
    pub(in crate::provider) fn add(new: &Addition<'_>) -> Result<Self, Problem> {
        let name = new.name.as_str();
        let passphrase = new.credential.ok_or(ProviderError::WrongCredential);
        let passphrase = passphrase.map_err(|error| NativeError::Decrypt(error).problem(name))?;
        Self::create(new.table, new.name, passphrase).map_err(|error| error.problem(name))
    }
}

impl NativeError {
    /// For the user of the provider called `name`.
    pub(crate) fn problem(&self, name: &str) -> Problem {
        let (code, next) = match self {
            Self::Keystore(error) => return error.into(),
            Self::WrongPassphrase => (
                Code::Locked,
                Some(Advice::RotateProvider(name.to_owned()).note("with the passphrase that unlocks it")),
            ),
            Self::Locked => (Code::Locked, Some(Advice::UnlockProvider(name.to_owned()))),
            Self::BackupIsEncrypted | Self::Backup(_) => (
                Code::Failed,
                Some(Advice::RestoreProvider(name.to_owned()).note("with the passphrase of the backup")),
            ),
            _ => (Code::Failed, None),
        };
        let joint = match self {
            Self::Locked | Self::Encrypt(_) | Self::Backup(_) | Self::Document(_) => "",
            _ => ":",
        };
        Problem::new(code, format!("provider '{name}'{joint} {}", chain(self))).advised(next)
    }
}
