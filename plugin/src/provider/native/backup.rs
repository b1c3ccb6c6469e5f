//! Backups of the root keys: age files that stock `age` opens, too.

use std::fmt;
use std::sync::PoisonError;

use super::document::RootKeys;
use super::{NativeError, NativeProvider, now};
use crate::crypto::age_file::{self, AgeError, Form};
use crate::provider::ProviderName;
use crate::secret::{SecretBytes, Transient};
use crate::store::ProviderTable;

/// A backup, ready to be written.
pub(crate) struct Backup {
    /// The root key that it holds, for [`NativeProvider::confirm_backup`].
    pub generation: u32,
    /// An armored age file, or the bare text if there was no passphrase.
    pub bytes: Transient,
}

impl fmt::Debug for Backup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Backup(generation {}; {} bytes)",
            self.generation,
            self.bytes.len()
        )
    }
}

impl NativeProvider {
    /// The most bytes that a backup can have.
    pub(crate) const MAX_BACKUP_BYTES: usize = age_file::MAX_BYTES;

    /// Brings a backed-up provider to this host, encrypted by `passphrase`. It counts as backed up.
    pub(crate) fn restore(
        table: &ProviderTable,
        name: &ProviderName,
        backup: &[u8],
        backup_passphrase: Option<&SecretBytes>,
        passphrase: &SecretBytes,
    ) -> Result<Self, NativeError> {
        table.refuse_taken(name.as_str(), None)?;
        let roots = read_backup(backup, backup_passphrase)?;
        table.refuse_taken(name.as_str(), Some(roots.provider))?;
        Self::record(table, name, roots, passphrase, Some(now()))
    }

    /// A backup of all root keys: an age file that stock `age -d` opens with `passphrase`, or the bare text,
    /// about which the caller warns. It was opened again before it is returned. Once it is written and synced,
    /// the caller says so with [`NativeProvider::confirm_backup`].
    ///
    /// # Errors
    /// [`NativeError::Locked`], or when the passphrase is empty.
    pub(crate) fn backup(&self, passphrase: Option<&SecretBytes>) -> Result<Backup, NativeError> {
        let roots = self.roots().map_err(|_| NativeError::Locked)?;
        let text = roots.to_text(&self.name)?;
        let bytes = match passphrase {
            None => text,
            Some(passphrase) => Transient::new(
                age_file::encrypt(&text, passphrase, Form::Armored).map_err(NativeError::Encrypt)?,
            ),
        };
        if !read_backup(&bytes, passphrase)?.are(&roots) {
            return Err(NativeError::Encrypt(AgeError::NotVerified));
        }
        Ok(Backup {
            generation: roots.newest(),
            bytes,
        })
    }

    /// Notes that a [`Backup`] was written and synced: from now on the provider wraps, unless it was rotated since.
    pub(crate) fn confirm_backup(&self, generation: u32) -> Result<(), NativeError> {
        self.rows.mark_backed_up(generation)?;
        let mut newest = self.newest.write().unwrap_or_else(PoisonError::into_inner);
        newest.backed_up |= newest.generation == generation;
        Ok(())
    }
}

fn read_backup(backup: &[u8], passphrase: Option<&SecretBytes>) -> Result<RootKeys, NativeError> {
    if backup.len() > age_file::MAX_BYTES {
        return Err(NativeError::Backup(AgeError::TooLong));
    }
    if !age_file::is_age_file(backup) {
        return Ok(RootKeys::from_text(backup)?);
    }
    let passphrase = passphrase.ok_or(NativeError::BackupIsEncrypted)?;
    let text = age_file::decrypt(backup, passphrase).map_err(NativeError::Backup)?;
    Ok(RootKeys::from_text(&text)?)
}
