//! Rows of key providers, and the sealed root keys of native ones.

use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};

use super::{
    Change, Keystore, KeystoreError, Rows, UnixTime,
    error::StoreFault,
    now, parse_id, persisted_keks,
    rows::{self, Named, collect},
    tpm_seals::{self, TpmRenewal},
};
use crate::model::envelope::ProviderId;
use crate::model::problem::chain;

/// A key provider as this host knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProviderRecord {
    /// Who it is, on every host.
    pub id: ProviderId,
    /// What the admin calls it; unique on this host.
    pub name: String,
    /// Its kind, `native` for one; kept as text, for a later virtseal may have written it.
    pub kind: String,
    /// Whether new envelopes are wrapped by it unless told otherwise.
    pub is_default: bool,
    /// When it was added.
    pub created: UnixTime,
    /// What its kind needs to know; an empty object for `native`.
    pub settings: serde_json::Value,
}

/// A native provider's root key, sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NativeRoot {
    /// Counts the root keys of one provider, from 1.
    pub generation: u32,
    /// The age file that holds it.
    pub sealed: Vec<u8>,
    /// When a backup was confirmed; never, if `None`.
    pub backed_up_at: Option<UnixTime>,
}

/// What is remembered of a provider that was deleted here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeletedProvider {
    /// Who it was.
    pub id: ProviderId,
    /// What it was called.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// When it was deleted.
    pub deleted: UnixTime,
}

const COLUMNS: &str = "id, name, kind, is_default, created, settings";

impl Keystore {
    /// Adds a provider of any kind. The first one becomes the default.
    ///
    /// # Errors
    /// [`KeystoreError::ProviderNameTaken`] and [`KeystoreError::ProviderExists`].
    pub fn insert_provider(
        &self,
        id: ProviderId,
        name: &str,
        kind: &str,
        settings: &serde_json::Value,
    ) -> Result<ProviderRecord, KeystoreError> {
        self.write(|transaction| insert(transaction, id, name, kind, settings))
    }

    /// Adds a native provider together with its sealed root key.
    ///
    /// # Errors
    /// As [`Keystore::insert_provider`].
    pub fn insert_native_root(
        &self,
        id: ProviderId,
        name: &str,
        root: &NativeRoot,
    ) -> Result<ProviderRecord, KeystoreError> {
        self.write(|transaction| {
            let record = insert(transaction, id, name, "native", &serde_json::json!({}))?;
            insert_root(transaction, id, root)?;
            Ok(record)
        })
    }

    /// Adds the next root key of a native provider.
    ///
    /// # Errors
    /// [`KeystoreError::UnknownProvider`], and when it has a root key of this generation or a later one.
    pub fn insert_native_generation(&self, id: ProviderId, root: &NativeRoot) -> Result<(), KeystoreError> {
        self.insert_generation(id, root, |_| Ok(Change::Unchanged))
            .map(drop)
    }

    /// The same, and in the same commit what the TPM opens: a host that dies is never left with a root key that its TPM does
    /// not have. Says whether that is so; it is not where `renewal` is for a row that has changed or gone meanwhile.
    ///
    /// # Errors
    /// As [`Keystore::insert_native_generation`].
    pub fn insert_native_generation_for_tpm(
        &self,
        id: ProviderId,
        root: &NativeRoot,
        renewal: &TpmRenewal,
    ) -> Result<Change, KeystoreError> {
        let renewed =
            self.insert_generation(id, root, |transaction| tpm_seals::renew(transaction, id, renewal))?;
        // The root key is there, whatever becomes of the earlier row's page.
        if let Err(error) = self.forget_deleted_rows() {
            tracing::warn!("the write-ahead log is not emptied: {}", chain(&error));
        }
        Ok(renewed)
    }

    fn insert_generation(
        &self,
        id: ProviderId,
        root: &NativeRoot,
        with: impl FnOnce(&Transaction) -> Result<Change, StoreFault>,
    ) -> Result<Change, KeystoreError> {
        self.write(|transaction| {
            let newest = newest_generation(transaction, id)?;
            if root.generation != newest + 1 {
                return Err(KeystoreError::Inconsistent {
                    row: format!("of the root keys of provider {id}"),
                    why: format!("generation {} can't follow {newest}", root.generation),
                }
                .into());
            }
            insert_root(transaction, id, root)?;
            with(transaction)
        })
    }

    /// All providers, by name.
    pub fn providers(&self) -> Result<Rows<ProviderRecord>, KeystoreError> {
        self.read(|connection| {
            let sql = format!("SELECT {COLUMNS} FROM providers ORDER BY name");
            collect(connection, &sql, [], Named("key provider", "name"), record_of)
        })
    }

    /// Makes `id` the default in place of the one that was.
    ///
    /// # Errors
    /// [`KeystoreError::UnknownProvider`]; the default stays what it was.
    pub fn set_default_provider(&self, id: ProviderId) -> Result<Change, KeystoreError> {
        self.write(|transaction| {
            let record =
                find(transaction, "id = ?1", &id.to_string())?.ok_or(KeystoreError::UnknownProvider(id))?;
            if record.is_default {
                return Ok(Change::Unchanged);
            }
            transaction.execute("UPDATE providers SET is_default = 0 WHERE is_default = 1", [])?;
            transaction.execute(
                "UPDATE providers SET is_default = 1 WHERE id = ?1",
                [id.to_string()],
            )?;
            Ok(Change::Changed)
        })
    }

    /// The newest sealed root key of a native provider.
    pub fn native_root(&self, provider: ProviderId) -> Result<Option<NativeRoot>, KeystoreError> {
        self.read(|connection| {
            let sql = "SELECT generation, sealed, backed_up_at FROM native_roots WHERE provider = ?1
                 ORDER BY generation DESC LIMIT 1";
            let named = format!("the root key of provider {provider}");
            rows::one(connection, sql, [provider.to_string()], &named, |row| {
                Ok(NativeRoot {
                    generation: row.get(0)?,
                    sealed: row.get(1)?,
                    backed_up_at: row.get(2)?,
                })
            })
        })
    }

    /// Removes a provider with its sealed root keys, and remembers its name.
    ///
    /// # Errors
    /// [`KeystoreError::UnknownProvider`].
    pub fn delete_provider(&self, id: ProviderId) -> Result<(), KeystoreError> {
        self.write(|transaction| {
            let record =
                find(transaction, "id = ?1", &id.to_string())?.ok_or(KeystoreError::UnknownProvider(id))?;
            transaction.execute(
                "INSERT OR REPLACE INTO deleted_providers (id, name, kind, deleted) VALUES (?1, ?2, ?3, ?4)",
                params![id.to_string(), record.name, record.kind, now()],
            )?;
            tpm_seals::delete(transaction, id)?;
            persisted_keks::delete(transaction, id)?;
            transaction.execute("DELETE FROM native_roots WHERE provider = ?1", [id.to_string()])?;
            transaction.execute("DELETE FROM providers WHERE id = ?1", [id.to_string()])?;
            Ok(())
        })?;
        // It is deleted: who heard otherwise would go on using root keys that the next start does not find.
        if let Err(error) = self.forget_deleted_rows() {
            tracing::warn!(
                "traces of provider {id} stay in the write-ahead log: {}",
                chain(&error)
            );
        }
        Ok(())
    }

    /// The providers that were deleted here and did not come back.
    pub fn deleted_providers(&self) -> Result<Rows<DeletedProvider>, KeystoreError> {
        self.read(|connection| {
            let sql = "SELECT id, name, kind, deleted FROM deleted_providers ORDER BY name";
            collect(
                connection,
                sql,
                [],
                Named("deleted key provider", "name"),
                |row| {
                    Ok(DeletedProvider {
                        id: parse_id("deleted key provider", &row.get::<_, String>(0)?)?,
                        name: row.get(1)?,
                        kind: row.get(2)?,
                        deleted: row.get(3)?,
                    })
                },
            )
        })
    }

    /// Notes that a backup of that root key was written and synced, now.
    ///
    /// # Errors
    /// [`KeystoreError::UnknownProvider`] when there is no such root key.
    pub fn mark_backed_up(&self, provider: ProviderId, generation: u32) -> Result<(), KeystoreError> {
        self.write(|transaction| {
            let rows = transaction.execute(
                "UPDATE native_roots SET backed_up_at = ?3 WHERE provider = ?1 AND generation = ?2",
                params![provider.to_string(), generation, now()],
            )?;
            if rows == 0 {
                return Err(KeystoreError::UnknownProvider(provider).into());
            }
            Ok(())
        })
    }
}

fn insert(
    connection: &Connection,
    id: ProviderId,
    name: &str,
    kind: &str,
    settings: &serde_json::Value,
) -> Result<ProviderRecord, StoreFault> {
    if find(connection, "name = ?1", name)?.is_some() {
        return Err(KeystoreError::ProviderNameTaken(name.to_owned()).into());
    }
    if let Some(known) = find(connection, "id = ?1", &id.to_string())? {
        return Err(KeystoreError::ProviderExists { id, name: known.name }.into());
    }
    connection.execute("DELETE FROM deleted_providers WHERE id = ?1", [id.to_string()])?;
    let others: i64 = connection.query_row("SELECT count(*) FROM providers", [], |row| row.get(0))?;
    let record = ProviderRecord {
        id,
        name: name.to_owned(),
        kind: kind.to_owned(),
        is_default: others == 0,
        created: now(),
        settings: settings.clone(),
    };
    connection.execute(
        &format!("INSERT INTO providers ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6)"),
        params![
            id.to_string(),
            name,
            kind,
            record.is_default,
            record.created,
            settings.to_string()
        ],
    )?;
    Ok(record)
}

fn insert_root(connection: &Connection, provider: ProviderId, root: &NativeRoot) -> Result<(), StoreFault> {
    connection.execute(
        "INSERT INTO native_roots (provider, generation, sealed, backed_up_at) VALUES (?1, ?2, ?3, ?4)",
        params![
            provider.to_string(),
            root.generation,
            root.sealed,
            root.backed_up_at
        ],
    )?;
    Ok(())
}

/// Of the root keys of a native provider.
pub(super) fn newest_generation(connection: &Connection, provider: ProviderId) -> Result<u32, StoreFault> {
    let newest: Option<u32> = connection.query_row(
        "SELECT max(generation) FROM native_roots WHERE provider = ?1",
        [provider.to_string()],
        |row| row.get(0),
    )?;
    newest.ok_or_else(|| KeystoreError::UnknownProvider(provider).into())
}

fn find(connection: &Connection, condition: &str, value: &str) -> Result<Option<ProviderRecord>, StoreFault> {
    connection
        .prepare(&format!("SELECT {COLUMNS} FROM providers WHERE {condition}"))?
        .query_row([value], |row| Ok(record_of(row)))
        .optional()?
        .transpose()
}

fn record_of(row: &Row) -> Result<ProviderRecord, StoreFault> {
    let name: String = row.get("name")?;
    let inconsistent = |why: &str| KeystoreError::Inconsistent {
        row: format!("of key provider {name:?}"),
        why: why.to_owned(),
    };
    let id = row
        .get::<_, String>("id")?
        .parse()
        .map_err(|_| inconsistent("its id is not a UUID"))?;
    let settings = serde_json::from_str(&row.get::<_, String>("settings")?)
        .map_err(|_| inconsistent("its settings are not JSON"))?;
    Ok(ProviderRecord {
        id,
        kind: row.get("kind")?,
        is_default: row.get("is_default")?,
        created: row.get("created")?,
        settings,
        name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> NativeRoot {
        NativeRoot {
            generation: 1,
            sealed: b"age".to_vec(),
            backed_up_at: None,
        }
    }

    fn defaults(keystore: &Keystore) -> Vec<String> {
        let providers = keystore.providers().unwrap().whole().unwrap();
        let defaults = providers.into_iter().filter(|record| record.is_default);
        defaults.map(|record| record.name).collect()
    }

    #[test]
    fn there_is_exactly_one_default_from_the_first_on() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        assert!(defaults(&keystore).is_empty());
        let (one, two) = (ProviderId::random(), ProviderId::random());
        keystore.insert_native_root(one, "one", &root()).unwrap();
        keystore.insert_native_root(two, "two", &root()).unwrap();
        assert_eq!(defaults(&keystore), ["one"]);
        assert_eq!(keystore.set_default_provider(two).unwrap(), Change::Changed);
        assert_eq!(keystore.set_default_provider(two).unwrap(), Change::Unchanged);
        assert_eq!(defaults(&keystore), ["two"]);
        assert!(keystore.set_default_provider(ProviderId::random()).is_err());
        assert_eq!(defaults(&keystore), ["two"]);
    }

    /// The log is as a virtseald leaves it that is killed once the deletion is committed.
    #[test]
    fn what_was_deleted_goes_from_the_log_of_a_killed_virtseald() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        let id = ProviderId::random();
        let sealed = b"a root key, sealed by its passphrase";
        let root = NativeRoot {
            sealed: sealed.to_vec(),
            ..root()
        };
        keystore.insert_native_root(id, "one", &root).unwrap();
        let log = dir.path().join("keystore.db-wal");
        let has_it = |bytes: &[u8]| bytes.windows(sealed.len()).any(|window| window == sealed);
        let before = std::fs::read(&log).unwrap();
        assert!(has_it(&before));
        keystore
            .write(|transaction| {
                transaction.execute("DELETE FROM native_roots", [])?;
                Ok(())
            })
            .unwrap();
        let killed = tempfile::tempdir().unwrap();
        for file in ["keystore.db", "keystore.db-wal"] {
            std::fs::copy(dir.path().join(file), killed.path().join(file)).unwrap();
        }
        let log = killed.path().join("keystore.db-wal");
        assert!(has_it(&std::fs::read(&log).unwrap()));
        let opened = Keystore::open(killed.path()).unwrap();
        assert!(!has_it(&std::fs::read(&log).unwrap()));
        assert!(!has_it(&std::fs::read(opened.path()).unwrap()));
    }

    #[test]
    fn names_and_ids_are_taken_once() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        let id = ProviderId::random();
        keystore.insert_native_root(id, "main", &root()).unwrap();
        assert!(matches!(
            keystore.insert_native_root(ProviderId::random(), "main", &root()),
            Err(KeystoreError::ProviderNameTaken(_))
        ));
        let error = keystore.insert_native_root(id, "other", &root()).unwrap_err();
        assert!(matches!(&error, KeystoreError::ProviderExists { name, .. } if name == "main"));
        assert_eq!(keystore.providers().unwrap().whole().unwrap().len(), 1);
    }

    #[test]
    fn unknown_kinds_and_their_settings_survive() {
        let dir = tempfile::tempdir().unwrap();
        let settings = serde_json::json!({"endpoint": "kms.example:5696"});
        let id = ProviderId::random();
        {
            let keystore = Keystore::open(dir.path()).unwrap();
            keystore.insert_provider(id, "hsm", "kmip", &settings).unwrap();
        }
        let keystore = Keystore::open(dir.path()).unwrap();
        let record = keystore.providers().unwrap().whole().unwrap().remove(0);
        assert_eq!((record.kind.as_str(), record.settings), ("kmip", settings));
        let changed = serde_json::json!({"endpoint": "other.example:5696"});
        keystore.set_kek_cache(id, &changed, None).unwrap();
        assert_eq!(
            keystore.providers().unwrap().whole().unwrap()[0].settings,
            changed
        );
        assert_eq!(keystore.native_root(id).unwrap(), None);
    }

    #[test]
    fn backup_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        let id = ProviderId::random();
        keystore.insert_native_root(id, "main", &root()).unwrap();
        assert_eq!(keystore.native_root(id).unwrap(), Some(root()));
        assert!(keystore.mark_backed_up(id, 2).is_err());
        keystore.mark_backed_up(id, 1).unwrap();
        assert!(keystore.native_root(id).unwrap().unwrap().backed_up_at.is_some());
    }
}
