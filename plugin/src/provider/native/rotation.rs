//! A new root key beside the earlier ones, which go on unwrapping.

use std::sync::{Arc, PoisonError};

use super::document::RootKeys;
use super::{NativeError, NativeProvider, encrypted_row};
use crate::host::tpm::{Tpm, TpmError};
use crate::provider::{KeyProvider, ProviderError};
use crate::secret::SecretBytes;
use crate::store::{Change, NativeRoot};

impl NativeProvider {
    /// Adds a root key, encrypted together with all earlier ones by the same `passphrase`. From then on nothing is wrapped
    /// until a backup of it is confirmed; what was wrapped before still opens. Returns the new generation; where the
    /// newest one was never backed up there is nothing to retire, and it stays.
    #[cfg(test)]
    pub(crate) fn rotate(&self, passphrase: &SecretBytes) -> Result<u32, NativeError> {
        self.rotate_and(passphrase, |row, _| {
            self.rows.add_root(row, None)?;
            Ok(())
        })?;
        Ok(self.generation())
    }

    /// The same, and `tpm` opens the new root keys from the same commit on, if it opened the earlier ones; with `pin` where
    /// it needs one. What it says of that comes back; its refusal is no reason not to rotate, but for that of a PIN which
    /// somebody has typed for this.
    pub(crate) fn rotate_with_tpm(
        &self,
        passphrase: &SecretBytes,
        tpm: &Tpm,
        pin: Option<&Arc<SecretBytes>>,
    ) -> Result<Result<Change, NativeError>, NativeError> {
        let rotated = self.rotate_and(passphrase, |row, roots| {
            let renewal = match self.rows.bound_roots()? {
                None => Ok(None),
                Some(record) => self.renewal(tpm, record, roots, pin).map(Some),
            };
            if let Err(NativeError::Tpm(TpmError::WrongPin { .. })) = &renewal {
                return Err(renewal.err().expect("it was just seen"));
            }
            let renewed = self
                .rows
                .add_root(row, renewal.as_ref().ok().and_then(Option::as_ref))?;
            Ok(renewal.map(|_| renewed))
        })?;
        Ok(rotated.unwrap_or_else(|| self.renew_tpm(tpm, pin)))
    }

    /// What `commit` says that puts the new row into the keystore; `None` where there is nothing to retire.
    fn rotate_and<T>(
        &self,
        passphrase: &SecretBytes,
        commit: impl FnOnce(&NativeRoot, &RootKeys) -> Result<T, NativeError>,
    ) -> Result<Option<T>, NativeError> {
        let began = self.newest();
        let locks = self.locks();
        let mut roots = self
            .decrypted(&began.encrypted, passphrase)
            .map_err(|error| match error {
                ProviderError::WrongCredential => NativeError::WrongPassphrase,
                error => NativeError::Decrypt(error),
            })?;
        if !began.backed_up {
            return Ok(None);
        }
        if roots.len() >= RootKeys::MOST {
            return Err(NativeError::TooManyGenerations);
        }
        roots.grow().map_err(NativeError::Memory)?;
        let row = encrypted_row(&roots, &self.name, passphrase, None)?;
        // Two at once: the second finds its row taken, and nothing has changed.
        let committed = commit(&row, &roots)?;
        *self.newest.write().unwrap_or_else(PoisonError::into_inner) = row.into();
        if self.roots().is_ok() {
            // A lock meanwhile wins.
            let _ = self.hold(roots, locks);
        }
        Ok(Some(committed))
    }
}
