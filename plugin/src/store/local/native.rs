//! The root keys of native providers, each encrypted by its passphrase, and what this host's TPM opens besides: one row a provider
//! at the most.

use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, params};

use crate::model::envelope::ProviderId;
use crate::model::problem::chain;
use crate::store::error::StoreError;
use crate::store::host_records::{BoundRoots, NativeRoot, TpmRenewal};
use crate::store::records::Change;
use crate::store::sqlite::database::{Database, now};
use crate::store::sqlite::fault::StoreFault;
use crate::store::sqlite::rows;

/// The rows of one native provider.
#[derive(Clone, Debug)]
pub(crate) struct NativeRows {
    pub(super) database: Arc<Database>,
    pub(super) provider: ProviderId,
}

impl NativeRows {
    /// The newest encrypted root key.
    pub(crate) fn root(&self) -> Result<Option<NativeRoot>, StoreError> {
        self.database.read(|connection| {
            let sql = "SELECT generation, sealed, backed_up_at FROM native_roots WHERE provider = ?1
                 ORDER BY generation DESC LIMIT 1";
            let named = format!("the root key of provider {}", self.provider);
            rows::one(connection, sql, [self.provider.to_string()], &named, |row| {
                Ok(NativeRoot {
                    generation: row.get(0)?,
                    encrypted: row.get(1)?,
                    backed_up_at: row.get(2)?,
                })
            })
        })
    }

    /// Adds the next root key, and in the same commit what the TPM opens, if there is a `renewal`: a host that dies is never left
    /// with a root key that its TPM does not have. Says whether that is so; it is not where the renewal is for a row that has
    /// changed or gone meanwhile.
    ///
    /// # Errors
    /// [`StoreError::UnknownProvider`], and when it has a root key of this generation or a later one.
    pub(crate) fn add_root(
        &self,
        root: &NativeRoot,
        renewal: Option<&TpmRenewal>,
    ) -> Result<Change, StoreError> {
        let renewed = self.database.write(|transaction| {
            let newest = newest_generation(transaction, self.provider)?;
            if root.generation != newest + 1 {
                return Err(StoreError::Inconsistent {
                    row: format!("of the root keys of provider {}", self.provider),
                    why: format!("generation {} can't follow {newest}", root.generation),
                }
                .into());
            }
            insert_root(transaction, self.provider, root)?;
            match renewal {
                Some(renewal) => renew(transaction, self.provider, renewal),
                None => Ok(Change::Unchanged),
            }
        })?;
        // The root key is there, whatever becomes of the earlier row's page.
        if let Err(error) = self.database.forget_deleted_rows() {
            tracing::warn!("the write-ahead log is not emptied: {}", chain(&error));
        }
        Ok(renewed)
    }

    /// Notes that a backup of that root key was written and synced, now.
    ///
    /// # Errors
    /// [`StoreError::UnknownProvider`] when there is no such root key.
    pub(crate) fn mark_backed_up(&self, generation: u32) -> Result<(), StoreError> {
        self.database.write(|transaction| {
            let rows = transaction.execute(
                "UPDATE native_roots SET backed_up_at = ?3 WHERE provider = ?1 AND generation = ?2",
                params![self.provider.to_string(), generation, now()],
            )?;
            if rows == 0 {
                return Err(StoreError::UnknownProvider(self.provider).into());
            }
            Ok(())
        })
    }

    /// Puts `bound` in the place of the one there is, if any: that one may ask for less, and opens nothing any more.
    ///
    /// # Errors
    /// [`StoreError::UnknownProvider`], and when a later root key has come meanwhile: it would be missing.
    pub(crate) fn put_bound_roots(&self, bound: &BoundRoots) -> Result<(), StoreError> {
        self.database.write(|transaction| {
            check_newest(transaction, self.provider, bound)?;
            transaction.execute(
                "INSERT OR REPLACE INTO tpm_seals (provider, generation, sealed_key, roots, enrolled)
                 VALUES (?1, ?2, ?3, ?4, ?5)",
                params![
                    self.provider.to_string(),
                    bound.generation,
                    bound.bound_key,
                    bound.roots,
                    now()
                ],
            )?;
            Ok(())
        })?;
        self.database.forget_deleted_rows().map(drop)
    }

    /// Puts a renewed row in the place of the one that it was made from; one that was replaced or removed meanwhile stays so.
    pub(crate) fn renew_bound_roots(&self, renewal: &TpmRenewal) -> Result<Change, StoreError> {
        let renewed = self
            .database
            .write(|transaction| renew(transaction, self.provider, renewal))?;
        self.database.forget_deleted_rows()?;
        Ok(renewed)
    }

    /// What the TPM opens, if anything.
    pub(crate) fn bound_roots(&self) -> Result<Option<BoundRoots>, StoreError> {
        self.database.read(|connection| {
            let bound = connection
                .prepare_cached(
                    "SELECT generation, sealed_key, roots, enrolled FROM tpm_seals WHERE provider = ?1",
                )?
                .query_row([self.provider.to_string()], |row| {
                    Ok(BoundRoots {
                        generation: row.get(0)?,
                        bound_key: row.get(1)?,
                        roots: row.get(2)?,
                        enrolled: row.get(3)?,
                    })
                })
                .optional()?;
            Ok(bound)
        })
    }

    /// Removes it: the TPM opens the provider no more, not from old pages of this file either.
    pub(crate) fn delete_bound_roots(&self) -> Result<Change, StoreError> {
        let change = self.database.write(|transaction| {
            let sql = "DELETE FROM tpm_seals WHERE provider = ?1";
            Ok(Change::of_rows(
                transaction.execute(sql, [self.provider.to_string()])?,
            ))
        })?;
        self.database.forget_deleted_rows()?;
        Ok(change)
    }
}

fn renew(
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
            before.bound_key,
            after.generation,
            after.bound_key,
            after.roots,
            now()
        ],
    )?;
    Ok(Change::of_rows(rows))
}

fn check_newest(connection: &Connection, provider: ProviderId, bound: &BoundRoots) -> Result<(), StoreFault> {
    let newest = newest_generation(connection, provider)?;
    if bound.generation == newest {
        return Ok(());
    }
    Err(StoreError::Inconsistent {
        row: format!("of the TPM for provider {provider}"),
        why: format!("it has root key {}, and {newest} is the newest", bound.generation),
    }
    .into())
}

pub(super) fn insert_root(
    connection: &Connection,
    provider: ProviderId,
    root: &NativeRoot,
) -> Result<(), StoreFault> {
    connection.execute(
        "INSERT INTO native_roots (provider, generation, sealed, backed_up_at) VALUES (?1, ?2, ?3, ?4)",
        params![
            provider.to_string(),
            root.generation,
            root.encrypted,
            root.backed_up_at
        ],
    )?;
    Ok(())
}

/// Of the root keys of a native provider.
fn newest_generation(connection: &Connection, provider: ProviderId) -> Result<u32, StoreFault> {
    let newest: Option<u32> = connection.query_row(
        "SELECT max(generation) FROM native_roots WHERE provider = ?1",
        [provider.to_string()],
        |row| row.get(0),
    )?;
    newest.ok_or_else(|| StoreError::UnknownProvider(provider).into())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::store::NativeRoot;
    use crate::store::Stores;

    fn root(generation: u32) -> NativeRoot {
        NativeRoot {
            generation,
            encrypted: b"age".to_vec(),
            backed_up_at: None,
        }
    }

    fn bound(generation: u32) -> BoundRoots {
        BoundRoots {
            generation,
            bound_key: b"blob".to_vec(),
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
        let stores = Stores::open(dir.path()).unwrap();
        let id = ProviderId::random();
        assert!(matches!(
            stores.host_store.native(id).put_bound_roots(&bound(1)),
            Err(StoreError::UnknownProvider(_))
        ));
        stores.providers().insert_native(id, "main", &root(1)).unwrap();
        assert_eq!(stores.host_store.native(id).bound_roots().unwrap(), None);
        assert!(stores.host_store.native(id).put_bound_roots(&bound(2)).is_err());
        stores.host_store.native(id).put_bound_roots(&bound(1)).unwrap();
        stores.host_store.native(id).add_root(&root(2), None).unwrap();
        assert!(stores.host_store.native(id).put_bound_roots(&bound(1)).is_err());
        let roots = b"stricter".to_vec();
        stores
            .host_store
            .native(id)
            .put_bound_roots(&BoundRoots { roots, ..bound(2) })
            .unwrap();
        assert!(!is_on_disk(dir.path(), b"ciphertext"));
        assert!(is_on_disk(dir.path(), b"stricter"));
        let found = stores.host_store.native(id).bound_roots().unwrap().unwrap();
        assert_eq!(found.generation, 2);
        assert!(found.enrolled > 0);

        assert_eq!(
            stores.host_store.native(id).delete_bound_roots().unwrap(),
            Change::Changed
        );
        assert_eq!(
            stores.host_store.native(id).delete_bound_roots().unwrap(),
            Change::Unchanged
        );
        assert!(!is_on_disk(dir.path(), b"stricter"));
        assert!(stores.host_store.native(id).root().unwrap().is_some());
    }

    #[test]
    fn it_goes_with_its_provider() {
        let dir = tempfile::tempdir().unwrap();
        let stores = Stores::open(dir.path()).unwrap();
        let id = ProviderId::random();
        stores.providers().insert_native(id, "main", &root(1)).unwrap();
        stores.host_store.native(id).put_bound_roots(&bound(1)).unwrap();
        stores
            .keystore
            .delete_provider(id, crate::store::IfNeeded::Goes)
            .unwrap();
        assert_eq!(stores.host_store.native(id).bound_roots().unwrap(), None);
    }
}
