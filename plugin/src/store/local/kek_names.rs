//! The names that KEKs were to get at their servers, noted before each was asked for: a name that is here is never given
//! again, and a KEK whose creation got no answer is found by it.

use std::collections::HashSet;
use std::sync::Arc;

use rusqlite::params;

use crate::model::envelope::{Envelope, KekId, ProviderId, VmId};
use crate::model::kek::KekScope;
use crate::store::error::StoreError;
use crate::store::host_records::KekNameRecord;
use crate::store::shared::EnvelopeStore;
use crate::store::sqlite::database::{Database, now};
use crate::store::sqlite::rows::{Named, collect};

/// Whom a KEK serves, as a column.
fn scope_text(scope: &KekScope) -> String {
    match scope {
        KekScope::Vm(vm) => vm.to_string(),
        KekScope::Provider => String::new(),
    }
}

/// The names of one provider's KEKs, and which of its KEKs are in use.
#[derive(Clone, Debug)]
pub(crate) struct KekNames {
    pub(super) database: Arc<Database>,
    pub(super) shared: Arc<dyn EnvelopeStore>,
    pub(super) provider: ProviderId,
}

impl KekNames {
    /// Notes that a KEK called `name` will be asked for.
    ///
    /// # Errors
    /// Also when the name was noted before.
    pub(crate) fn plan(&self, scope: &KekScope, name: &str) -> Result<(), StoreError> {
        self.database.write(|transaction| {
            transaction.execute(
                "INSERT INTO kek_names (provider, name, scope, kek, since) VALUES (?1, ?2, ?3, NULL, ?4)",
                params![self.provider.to_string(), name, scope_text(scope), now()],
            )?;
            Ok(())
        })
    }

    /// Notes which KEK bears a name.
    pub(crate) fn note_kek(&self, name: &str, kek: &KekId) -> Result<(), StoreError> {
        self.database.write(|transaction| {
            transaction.execute(
                "UPDATE kek_names SET kek = ?3 WHERE provider = ?1 AND name = ?2",
                params![self.provider.to_string(), name, kek.0],
            )?;
            Ok(())
        })
    }

    /// Notes that no KEK bears a name, nor ever will.
    pub(crate) fn forget(&self, name: &str) -> Result<(), StoreError> {
        self.database.write(|transaction| {
            transaction.execute(
                "DELETE FROM kek_names WHERE provider = ?1 AND name = ?2 AND kek IS NULL",
                params![self.provider.to_string(), name],
            )?;
            Ok(())
        })
    }

    /// The names for `scope`, the latest first.
    pub(crate) fn of_scope(&self, scope: &KekScope) -> Result<Vec<KekNameRecord>, StoreError> {
        self.database.read(|connection| {
            let sql =
                "SELECT name, kek FROM kek_names WHERE provider = ?1 AND scope = ?2 ORDER BY rowid DESC";
            let values = params![self.provider.to_string(), scope_text(scope)];
            let names = collect(connection, sql, values, Named("a KEK called", "name"), |row| {
                Ok(KekNameRecord {
                    name: row.get(0)?,
                    kek: row.get::<_, Option<String>>(1)?.map(KekId),
                })
            })?;
            // What is next to be called how depends on it, for this scope alone.
            Ok(names.whole()?)
        })
    }

    /// The KEKs of the provider that the envelopes of `vm`, or of all VMs, have stanzas of now.
    pub(crate) fn keks_of_envelopes(&self, vm: Option<VmId>) -> Result<Vec<KekId>, StoreError> {
        let records = match vm {
            Some(vm) => self.shared.envelopes_of(vm)?,
            None => self.shared.envelopes()?,
        };
        let stanzas = records.sound.into_iter().flat_map(|record| {
            let Envelope { stanzas, .. } = record.envelope;
            stanzas
        });
        let mut keks: Vec<_> = stanzas
            .filter(|stanza| stanza.provider == self.provider)
            .map(|stanza| stanza.kek)
            .collect();
        keks.sort_by(|a, b| a.0.cmp(&b.0));
        keks.dedup();
        Ok(keks)
    }

    /// The KEKs of the provider that jobs have taken out of use, for whichever VM.
    pub(crate) fn retired(&self) -> Result<HashSet<KekId>, StoreError> {
        self.shared.retired_of(self.provider)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Stores;

    #[test]
    fn a_name_is_planned_once_and_finds_its_kek() {
        let dir = tempfile::tempdir().unwrap();
        let stores = Stores::open(dir.path()).unwrap();
        let names = stores.providers().kek_names(ProviderId::random());
        let scopes = [KekScope::Vm(VmId::random()), KekScope::Provider];
        for (scope, name) in scopes.iter().zip(["a", "b"]) {
            names.plan(scope, name).unwrap();
            assert!(names.plan(scope, name).is_err());
        }
        let kek = KekId("7".into());
        names.note_kek("a", &kek).unwrap();
        let record = KekNameRecord {
            name: "a".into(),
            kek: Some(kek),
        };
        assert_eq!(names.of_scope(&scopes[0]).unwrap(), [record]);
        assert_eq!(names.of_scope(&scopes[1]).unwrap()[0].kek, None);
        let others = stores.providers().kek_names(ProviderId::random());
        assert!(others.of_scope(&scopes[0]).unwrap().is_empty());
    }
}
