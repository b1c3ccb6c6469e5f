//! Rows of native providers that this host's TPM opens besides their passphrase: one each at the most.

use rusqlite::{Connection, OptionalExtension, params};

use super::{
    Change, Keystore, KeystoreError, UnixTime, error::StoreFault, now, providers::newest_generation,
};
use crate::model::envelope::ProviderId;

/// The root keys of a native provider, encrypted under a key that the TPM has sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TpmSeal {
    /// The newest root key in it.
    pub generation: u32,
    /// What the TPM opens.
    pub sealed_key: Vec<u8>,
    /// What the key in it opens.
    pub roots: Vec<u8>,
    /// When it was made; [`Keystore::put_tpm_seal`] sets it.
    pub enrolled: UnixTime,
}

/// What takes the place of one row, and of no other.
pub struct TpmRenewal {
    /// The row that was read.
    pub before: TpmSeal,
    /// What it is to be.
    pub after: TpmSeal,
}

impl Keystore {
    /// Puts `seal` in the place of the one there is, if any: that one may ask for less, and opens nothing any more.
    ///
    /// # Errors
    /// [`KeystoreError::UnknownProvider`], and when a later root key has come meanwhile: it would be missing.
    pub fn put_tpm_seal(&self, provider: ProviderId, seal: &TpmSeal) -> Result<(), KeystoreError> {
        self.write(|transaction| {
            check_newest(transaction, provider, seal)?;
            transaction.execute(
                "INSERT OR REPLACE INTO tpm_seals (provider, generation, sealed_key, roots, enrolled)
                 VALUES (?1, ?2, ?3, ?4, ?5)",
                params![
                    provider.to_string(),
                    seal.generation,
                    seal.sealed_key,
                    seal.roots,
                    now()
                ],
            )?;
            Ok(())
        })?;
        self.forget_deleted_rows().map(drop)
    }

    /// Puts a renewed row in the place of the one that it was made from; one that was replaced or removed meanwhile stays so.
    ///
    /// # Errors
    /// As [`Keystore::put_tpm_seal`].
    pub fn renew_tpm_seal(
        &self,
        provider: ProviderId,
        renewal: &TpmRenewal,
    ) -> Result<Change, KeystoreError> {
        let renewed = self.write(|transaction| renew(transaction, provider, renewal))?;
        self.forget_deleted_rows()?;
        Ok(renewed)
    }

    /// The one of `provider`.
    pub fn tpm_seal(&self, provider: ProviderId) -> Result<Option<TpmSeal>, KeystoreError> {
        self.read(|connection| {
            let seal = connection
                .prepare_cached(
                    "SELECT generation, sealed_key, roots, enrolled FROM tpm_seals WHERE provider = ?1",
                )?
                .query_row([provider.to_string()], |row| {
                    Ok(TpmSeal {
                        generation: row.get(0)?,
                        sealed_key: row.get(1)?,
                        roots: row.get(2)?,
                        enrolled: row.get(3)?,
                    })
                })
                .optional()?;
            Ok(seal)
        })
    }

    /// Removes it: the TPM opens `provider` no more, not from old pages of this file either.
    pub fn delete_tpm_seal(&self, provider: ProviderId) -> Result<Change, KeystoreError> {
        let change = self.write(|transaction| Ok(Change::of_rows(delete(transaction, provider)?)))?;
        self.forget_deleted_rows()?;
        Ok(change)
    }
}

pub(super) fn renew(
    connection: &Connection,
    provider: ProviderId,
    TpmRenewal { before, after }: &TpmRenewal,
) -> Result<Change, StoreFault> {
    check_newest(connection, provider, after)?;
    let rows = connection.execute(
        "UPDATE tpm_seals SET generation = ?3, sealed_key = ?4, roots = ?5, enrolled = ?6
         WHERE provider = ?1 AND sealed_key = ?2",
        params![
            provider.to_string(),
            before.sealed_key,
            after.generation,
            after.sealed_key,
            after.roots,
            now()
        ],
    )?;
    Ok(Change::of_rows(rows))
}

fn check_newest(connection: &Connection, provider: ProviderId, seal: &TpmSeal) -> Result<(), StoreFault> {
    let newest = newest_generation(connection, provider)?;
    if seal.generation == newest {
        return Ok(());
    }
    Err(KeystoreError::Inconsistent {
        row: format!("of the TPM for provider {provider}"),
        why: format!("it has root key {}, and {newest} is the newest", seal.generation),
    }
    .into())
}

pub(super) fn delete(connection: &Connection, provider: ProviderId) -> Result<usize, StoreFault> {
    Ok(connection.execute(
        "DELETE FROM tpm_seals WHERE provider = ?1",
        [provider.to_string()],
    )?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::store::NativeRoot;

    fn root(generation: u32) -> NativeRoot {
        NativeRoot {
            generation,
            sealed: b"age".to_vec(),
            backed_up_at: None,
        }
    }

    fn seal(generation: u32) -> TpmSeal {
        TpmSeal {
            generation,
            sealed_key: b"blob".to_vec(),
            roots: b"ciphertext of the root keys".to_vec(),
            enrolled: 0,
        }
    }

    fn is_on_disk(dir: &Path, text: &[u8]) -> bool {
        std::fs::read_dir(dir).unwrap().any(|file| {
            let bytes = std::fs::read(file.unwrap().path()).unwrap();
            bytes.windows(text.len()).any(|window| window == text)
        })
    }

    #[test]
    fn there_is_one_at_the_most_and_it_goes_without_a_trace() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        let id = ProviderId::random();
        assert!(matches!(
            keystore.put_tpm_seal(id, &seal(1)),
            Err(KeystoreError::UnknownProvider(_))
        ));
        keystore.insert_native_root(id, "main", &root(1)).unwrap();
        assert_eq!(keystore.tpm_seal(id).unwrap(), None);
        assert!(keystore.put_tpm_seal(id, &seal(2)).is_err());
        keystore.put_tpm_seal(id, &seal(1)).unwrap();
        keystore.insert_native_generation(id, &root(2)).unwrap();
        assert!(keystore.put_tpm_seal(id, &seal(1)).is_err());
        let roots = b"stricter".to_vec();
        keystore.put_tpm_seal(id, &TpmSeal { roots, ..seal(2) }).unwrap();
        assert!(!is_on_disk(dir.path(), b"ciphertext"));
        assert!(is_on_disk(dir.path(), b"stricter"));
        let found = keystore.tpm_seal(id).unwrap().unwrap();
        assert_eq!(found.generation, 2);
        assert!(found.enrolled > 0);

        assert_eq!(keystore.delete_tpm_seal(id).unwrap(), Change::Changed);
        assert_eq!(keystore.delete_tpm_seal(id).unwrap(), Change::Unchanged);
        assert!(!is_on_disk(dir.path(), b"stricter"));
        assert!(keystore.native_root(id).unwrap().is_some());
    }

    #[test]
    fn it_goes_with_its_provider() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        let id = ProviderId::random();
        keystore.insert_native_root(id, "main", &root(1)).unwrap();
        keystore.put_tpm_seal(id, &seal(1)).unwrap();
        keystore.delete_provider(id).unwrap();
        assert_eq!(keystore.tpm_seal(id).unwrap(), None);
    }
}
