//! KEKs that a provider's cache keeps across a reboot, and what opens them: ciphertext under a key that takes the host's
//! TPM and the `salt` here to derive.
//!
//! The salt is new with each purge, so that what was there before opens no more, wherever a copy of it may be.

use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, params};

use crate::model::envelope::{KekId, ProviderId};
use crate::store::error::StoreError;
use crate::store::host_records::{CachedKek, KekEnrollment};
use crate::store::records::Change;
use crate::store::sqlite::database::Database;
use crate::store::sqlite::fault::StoreFault;
use crate::store::sqlite::rows::{Named, collect};

/// The rows of one provider's cache.
#[derive(Clone, Debug)]
pub(crate) struct KekCacheRows {
    pub(super) database: Arc<Database>,
    pub(super) provider: ProviderId,
}

impl KekCacheRows {
    /// Changes the settings of the provider, and how its KEKs are kept across a reboot: not at all, if `None`. Those that were
    /// kept are gone.
    pub(crate) fn set(
        &self,
        settings: &serde_json::Value,
        enrollment: Option<&KekEnrollment>,
    ) -> Result<(), StoreError> {
        let id = self.provider.to_string();
        self.database.write(|transaction| {
            delete_all(transaction, self.provider)?;
            let rows = transaction.execute(
                "UPDATE providers SET settings = ?2 WHERE id = ?1",
                params![id, settings.to_string()],
            )?;
            if rows == 0 {
                return Err(StoreError::UnknownProvider(self.provider).into());
            }
            if let Some(KekEnrollment {
                bound,
                salt,
                seconds,
                enrolled,
            }) = enrollment
            {
                let seconds = i64::try_from(*seconds).unwrap_or(i64::MAX);
                transaction.execute(
                    "INSERT INTO kek_persistence (provider, sealed, salt, seconds, enrolled)
                     VALUES (?1, ?2, ?3, ?4, ?5)",
                    params![id, bound, salt, seconds, enrolled],
                )?;
            }
            Ok(())
        })?;
        self.database.forget_deleted_rows().map(drop)
    }

    /// How the KEKs of the provider are kept.
    pub(crate) fn enrollment(&self) -> Result<Option<KekEnrollment>, StoreError> {
        self.database.read(|connection| {
            let found = connection
                .prepare("SELECT sealed, salt, seconds, enrolled FROM kek_persistence WHERE provider = ?1")?
                .query_row([self.provider.to_string()], |row| {
                    Ok(KekEnrollment {
                        bound: row.get(0)?,
                        salt: row.get(1)?,
                        seconds: row.get::<_, i64>(2)?.unsigned_abs(),
                        enrolled: row.get(3)?,
                    })
                })
                .optional()?;
            Ok(found)
        })
    }

    /// Keeps `keks` in the place of what is kept of them, and no more than `most` of the provider, the latest. Nothing
    /// happens unless `salt` is still the one: a purge came first then.
    pub(crate) fn put(&self, salt: &[u8], keks: &[CachedKek], most: usize) -> Result<Change, StoreError> {
        let id = self.provider.to_string();
        self.database.write(|transaction| {
            let current: Option<Vec<u8>> = transaction
                .query_row(
                    "SELECT salt FROM kek_persistence WHERE provider = ?1",
                    [&id],
                    |row| row.get(0),
                )
                .optional()?;
            if current.as_deref() != Some(salt) {
                return Ok(Change::Unchanged);
            }
            for CachedKek {
                kek,
                fetched,
                expires,
                body,
            } in keks
            {
                transaction.execute(
                    "INSERT OR REPLACE INTO persisted_keks (provider, kek, fetched, expires, body)
                     VALUES (?1, ?2, ?3, ?4, ?5)",
                    params![id, kek.0, fetched, expires, body],
                )?;
            }
            transaction.execute(
                "DELETE FROM persisted_keks WHERE provider = ?1 AND kek NOT IN
                 (SELECT kek FROM persisted_keks WHERE provider = ?1 ORDER BY fetched DESC, kek LIMIT ?2)",
                params![id, i64::try_from(most).unwrap_or(i64::MAX)],
            )?;
            Ok(Change::Changed)
        })
    }

    /// All that are kept of the provider, also those that have expired.
    pub(crate) fn all(&self) -> Result<Vec<CachedKek>, StoreError> {
        self.database.read(|connection| {
            let sql =
                "SELECT kek, fetched, expires, body FROM persisted_keks WHERE provider = ?1 ORDER BY kek";
            let named = Named("a cached KEK", "kek");
            let rows = collect(connection, sql, [self.provider.to_string()], named, |row| {
                Ok(CachedKek {
                    kek: KekId(row.get(0)?),
                    fetched: row.get(1)?,
                    expires: row.get(2)?,
                    body: row.get(3)?,
                })
            })?;
            // It is a cache: its server has what a damaged row had.
            Ok(rows.sound)
        })
    }

    /// Removes these, from old pages of the file too.
    pub(crate) fn delete(&self, keks: &[KekId]) -> Result<(), StoreError> {
        self.database.write(|transaction| {
            for kek in keks {
                transaction.execute(
                    "DELETE FROM persisted_keks WHERE provider = ?1 AND kek = ?2",
                    params![self.provider.to_string(), kek.0],
                )?;
            }
            Ok(())
        })?;
        self.database.forget_deleted_rows().map(drop)
    }

    /// Removes all of them, and has those that come later encrypted otherwise.
    pub(crate) fn purge(&self, salt: &[u8]) -> Result<(), StoreError> {
        let id = self.provider.to_string();
        self.database.write(|transaction| {
            transaction.execute("DELETE FROM persisted_keks WHERE provider = ?1", [&id])?;
            transaction.execute(
                "UPDATE kek_persistence SET salt = ?2 WHERE provider = ?1",
                params![id, salt],
            )?;
            Ok(())
        })?;
        self.database.forget_deleted_rows().map(drop)
    }
}

/// Everything of `provider`.
fn delete_all(connection: &Connection, provider: ProviderId) -> Result<(), StoreFault> {
    for table in ["persisted_keks", "kek_persistence"] {
        connection.execute(
            &format!("DELETE FROM {table} WHERE provider = ?1"),
            [provider.to_string()],
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::store::{Stores, UnixTime};

    fn enrollment(salt: &[u8]) -> KekEnrollment {
        KekEnrollment {
            bound: b"bound to the TPM".to_vec(),
            salt: salt.to_vec(),
            seconds: 3600,
            enrolled: 7,
        }
    }

    fn row(kek: &str, fetched: UnixTime) -> CachedKek {
        CachedKek {
            kek: KekId(kek.to_owned()),
            fetched,
            expires: fetched + 3600,
            body: format!("ciphertext of {kek}").into_bytes(),
        }
    }

    fn with_provider(dir: &Path) -> (Stores, ProviderId) {
        let stores = Stores::open(dir).unwrap();
        let id = ProviderId::random();
        stores
            .keystore
            .insert_provider(id, "kms", "kmip", &serde_json::json!({}))
            .unwrap();
        (stores, id)
    }

    fn names(stores: &Stores, id: ProviderId) -> Vec<String> {
        let rows = stores.host_store.kek_cache(id).all().unwrap();
        rows.into_iter().map(|row| row.kek.0).collect()
    }

    fn is_on_disk(dir: &Path, text: &[u8]) -> bool {
        std::fs::read_dir(dir).unwrap().any(|file| {
            let bytes = std::fs::read(file.unwrap().path()).unwrap();
            bytes.windows(text.len()).any(|window| window == text)
        })
    }

    #[test]
    fn rows_come_and_go_with_their_salt() {
        let dir = tempfile::tempdir().unwrap();
        let (stores, id) = with_provider(dir.path());
        let settings = serde_json::json!({"cache": "24h"});
        let put =
            |salt: &[u8], rows: &[CachedKek]| stores.host_store.kek_cache(id).put(salt, rows, 3).unwrap();
        assert_eq!(
            put(b"one", &[row("a", 1)]),
            Change::Unchanged,
            "nobody asked for it"
        );
        stores
            .host_store
            .kek_cache(id)
            .set(&settings, Some(&enrollment(b"one")))
            .unwrap();
        assert_eq!(
            stores.host_store.kek_cache(id).enrollment().unwrap(),
            Some(enrollment(b"one"))
        );
        assert_eq!(
            stores.keystore.providers().unwrap().whole().unwrap()[0].settings,
            settings
        );

        let rows = [row("a", 1), row("b", 3), row("c", 2), row("d", 4)];
        assert_eq!(put(b"one", &rows), Change::Changed);
        assert_eq!(names(&stores, id), ["b", "c", "d"], "the oldest goes");
        assert_eq!(put(b"one", &[row("b", 9)]), Change::Changed);
        assert!(
            stores
                .host_store
                .kek_cache(id)
                .all()
                .unwrap()
                .contains(&row("b", 9))
        );
        stores
            .host_store
            .kek_cache(id)
            .delete(&[KekId("c".to_owned()), KekId("none".to_owned())])
            .unwrap();
        assert_eq!(names(&stores, id), ["b", "d"]);
        assert!(!is_on_disk(dir.path(), b"ciphertext of c"));

        stores.host_store.kek_cache(id).purge(b"two").unwrap();
        assert!(names(&stores, id).is_empty() && !is_on_disk(dir.path(), b"ciphertext"));
        assert_eq!(put(b"one", &rows), Change::Unchanged, "a purge came first");
        assert_eq!(put(b"two", &rows), Change::Changed);
        stores.host_store.kek_cache(id).set(&settings, None).unwrap();
        assert!(
            names(&stores, id).is_empty() && stores.host_store.kek_cache(id).enrollment().unwrap().is_none()
        );
        assert!(!is_on_disk(dir.path(), b"ciphertext") && !is_on_disk(dir.path(), b"bound to"));
    }

    #[test]
    fn they_go_with_their_provider() {
        let dir = tempfile::tempdir().unwrap();
        let (stores, id) = with_provider(dir.path());
        let settings = serde_json::json!({});
        stores
            .host_store
            .kek_cache(id)
            .set(&settings, Some(&enrollment(b"one")))
            .unwrap();
        stores
            .host_store
            .kek_cache(id)
            .put(b"one", &[row("a", 1)], 9)
            .unwrap();
        stores
            .keystore
            .delete_provider(id, crate::store::IfNeeded::Goes)
            .unwrap();
        assert!(
            names(&stores, id).is_empty() && stores.host_store.kek_cache(id).enrollment().unwrap().is_none()
        );
        assert!(
            stores
                .host_store
                .kek_cache(id)
                .set(&settings, Some(&enrollment(b"one")))
                .is_err()
        );
    }
}
