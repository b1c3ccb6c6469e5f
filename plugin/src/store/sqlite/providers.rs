//! Rows of key providers.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::database::{Database, now, parse_id};
use super::fault::StoreFault;
use super::rows::{Named, collect};
use crate::model::envelope::{ProviderId, Stanza};
use crate::model::problem::chain;
use crate::store::damage::Rows;
use crate::store::error::StoreError;
use crate::store::records::{Change, DeletedProvider, IfNeeded, ProviderRecord};
use crate::store::shared::Providers;

const COLUMNS: &str = "id, name, kind, is_default, created, settings";

impl Providers for Database {
    fn insert_provider(
        &self,
        id: ProviderId,
        name: &str,
        kind: &str,
        settings: &serde_json::Value,
    ) -> Result<ProviderRecord, StoreError> {
        self.write(|transaction| insert(transaction, id, name, kind, settings))
    }

    fn providers(&self) -> Result<Rows<ProviderRecord>, StoreError> {
        self.read(|connection| {
            let sql = format!("SELECT {COLUMNS} FROM providers ORDER BY name");
            collect(connection, &sql, [], Named("key provider", "name"), record_of)
        })
    }

    fn provider_changes(&self) -> u64 {
        self.changes().of_providers()
    }

    fn set_default_provider(&self, id: ProviderId) -> Result<Change, StoreError> {
        self.write(|transaction| {
            let record =
                find(transaction, "id = ?1", &id.to_string())?.ok_or(StoreError::UnknownProvider(id))?;
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

    fn change_provider_settings(
        &self,
        id: ProviderId,
        before: &serde_json::Value,
        after: &serde_json::Value,
    ) -> Result<Change, StoreError> {
        self.write(|transaction| {
            let record =
                find(transaction, "id = ?1", &id.to_string())?.ok_or(StoreError::UnknownProvider(id))?;
            if record.settings != *before {
                return Err(StoreError::SettingsChanged(record.name).into());
            }
            if before == after {
                return Ok(Change::Unchanged);
            }
            transaction.execute(
                "UPDATE providers SET settings = ?2 WHERE id = ?1",
                params![id.to_string(), after.to_string()],
            )?;
            Ok(Change::Changed)
        })
    }

    fn delete_provider(&self, id: ProviderId, if_needed: IfNeeded) -> Result<(), StoreError> {
        self.write(|transaction| {
            let record =
                find(transaction, "id = ?1", &id.to_string())?.ok_or(StoreError::UnknownProvider(id))?;
            // As text: a damaged row may need it too.
            let needs = "SELECT EXISTS (SELECT 1 FROM envelopes WHERE instr(json, ?1) > 0)";
            if if_needed == IfNeeded::Stays
                && transaction.query_row(needs, [id.to_string()], |row| row.get(0))?
            {
                return Err(StoreError::ProviderNeeded(id).into());
            }
            transaction.execute(
                "INSERT OR REPLACE INTO deleted_providers (id, name, kind, deleted) VALUES (?1, ?2, ?3, ?4)",
                params![id.to_string(), record.name, record.kind, now()],
            )?;
            // What is of this host first, which can't be without its provider.
            for table in ["tpm_seals", "persisted_keks", "kek_persistence", "native_roots"] {
                let sql = format!("DELETE FROM {table} WHERE provider = ?1");
                transaction.execute(&sql, [id.to_string()])?;
            }
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

    fn deleted_providers(&self) -> Result<Rows<DeletedProvider>, StoreError> {
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
}

/// For what was wrapped a moment ago.
pub(super) fn refuse_deleted<'a>(
    connection: &Connection,
    stanzas: impl IntoIterator<Item = &'a Stanza>,
) -> Result<(), StoreFault> {
    for Stanza { provider, .. } in stanzas {
        let mut deleted = connection.prepare_cached("SELECT 1 FROM deleted_providers WHERE id = ?1")?;
        if deleted.exists([provider.to_string()])? {
            return Err(StoreError::ProviderDeleted(*provider).into());
        }
    }
    Ok(())
}

pub(crate) fn insert(
    connection: &Connection,
    id: ProviderId,
    name: &str,
    kind: &str,
    settings: &serde_json::Value,
) -> Result<ProviderRecord, StoreFault> {
    if find(connection, "name = ?1", name)?.is_some() {
        return Err(StoreError::ProviderNameTaken(name.to_owned()).into());
    }
    if let Some(known) = find(connection, "id = ?1", &id.to_string())? {
        return Err(StoreError::ProviderExists { id, name: known.name }.into());
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

fn find(connection: &Connection, condition: &str, value: &str) -> Result<Option<ProviderRecord>, StoreFault> {
    connection
        .prepare(&format!("SELECT {COLUMNS} FROM providers WHERE {condition}"))?
        .query_row([value], |row| Ok(record_of(row)))
        .optional()?
        .transpose()
}

fn record_of(row: &Row) -> Result<ProviderRecord, StoreFault> {
    let name: String = row.get("name")?;
    let inconsistent = |why: &str| StoreError::Inconsistent {
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
    use crate::store::NativeRoot;
    use crate::store::Stores;

    fn root() -> NativeRoot {
        NativeRoot {
            generation: 1,
            encrypted: b"age".to_vec(),
            backed_up_at: None,
        }
    }

    /// The log is as a virtseald leaves it that is killed once the deletion is committed.
    #[test]
    fn what_was_deleted_goes_from_the_log_of_a_killed_virtseald() {
        let dir = tempfile::tempdir().unwrap();
        let stores = Stores::open(dir.path()).unwrap();
        let id = ProviderId::random();
        let encrypted = b"a root key, encrypted by its passphrase";
        let root = NativeRoot {
            encrypted: encrypted.to_vec(),
            ..root()
        };
        stores.providers().insert_native(id, "one", &root).unwrap();
        let log = dir.path().join("keystore.db-wal");
        let has_it = |bytes: &[u8]| bytes.windows(encrypted.len()).any(|window| window == encrypted);
        let before = std::fs::read(&log).unwrap();
        assert!(has_it(&before));
        Connection::open(dir.path().join("keystore.db"))
            .unwrap()
            .execute("DELETE FROM native_roots", [])
            .unwrap();
        let killed = tempfile::tempdir().unwrap();
        for file in ["keystore.db", "keystore.db-wal"] {
            std::fs::copy(dir.path().join(file), killed.path().join(file)).unwrap();
        }
        let log = killed.path().join("keystore.db-wal");
        assert!(has_it(&std::fs::read(&log).unwrap()));
        let _opened = Stores::open(killed.path()).unwrap();
        assert!(!has_it(&std::fs::read(&log).unwrap()));
        assert!(!has_it(
            &std::fs::read(killed.path().join("keystore.db")).unwrap()
        ));
    }

    #[test]
    fn unknown_kinds_and_their_settings_survive() {
        let dir = tempfile::tempdir().unwrap();
        let settings = serde_json::json!({"endpoint": "kms.example:5696"});
        let id = ProviderId::random();
        {
            let stores = Stores::open(dir.path()).unwrap();
            stores
                .keystore
                .insert_provider(id, "hsm", "kmip", &settings)
                .unwrap();
        }
        let stores = Stores::open(dir.path()).unwrap();
        let record = stores.keystore.providers().unwrap().whole().unwrap().remove(0);
        assert_eq!((record.kind.as_str(), record.settings), ("kmip", settings));
        let changed = serde_json::json!({"endpoint": "other.example:5696"});
        stores.host_store.kek_cache(id).set(&changed, None).unwrap();
        assert_eq!(
            stores.keystore.providers().unwrap().whole().unwrap()[0].settings,
            changed
        );
        assert_eq!(stores.host_store.native(id).root().unwrap(), None);
    }
}
