//! The names that KEKs were to get at their servers, noted before each was asked for: a name that is here is never given
//! again, and a KEK whose creation got no answer is found by it.

use std::collections::HashSet;

use rusqlite::params;

use super::rows::{self, Named, collect};
use super::{Keystore, KeystoreError, now};
use crate::model::envelope::{Envelope, KekId, ProviderId, VmId};
use crate::provider::KekScope;

/// The name of a KEK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KekNameRecord {
    /// The name, which no other KEK of the provider ever had.
    pub name: String,
    /// The KEK; `None` while its server has not said so.
    pub kek: Option<KekId>,
}

/// Whom a KEK serves, as a column.
fn scope_text(scope: &KekScope) -> String {
    match scope {
        KekScope::Vm(vm) => vm.to_string(),
        KekScope::Provider => String::new(),
    }
}

impl Keystore {
    /// Notes that a KEK called `name` will be asked for.
    ///
    /// # Errors
    /// Also when the name was noted before.
    pub fn plan_kek_name(
        &self,
        provider: ProviderId,
        scope: &KekScope,
        name: &str,
    ) -> Result<(), KeystoreError> {
        self.write(|transaction| {
            transaction.execute(
                "INSERT INTO kek_names (provider, name, scope, kek, since) VALUES (?1, ?2, ?3, NULL, ?4)",
                params![provider.to_string(), name, scope_text(scope), now()],
            )?;
            Ok(())
        })
    }

    /// Notes which KEK bears a name.
    pub fn note_kek_of_name(
        &self,
        provider: ProviderId,
        name: &str,
        kek: &KekId,
    ) -> Result<(), KeystoreError> {
        self.write(|transaction| {
            transaction.execute(
                "UPDATE kek_names SET kek = ?3 WHERE provider = ?1 AND name = ?2",
                params![provider.to_string(), name, kek.0],
            )?;
            Ok(())
        })
    }

    /// Notes that no KEK bears a name, nor ever will.
    pub fn forget_kek_name(&self, provider: ProviderId, name: &str) -> Result<(), KeystoreError> {
        self.write(|transaction| {
            transaction.execute(
                "DELETE FROM kek_names WHERE provider = ?1 AND name = ?2 AND kek IS NULL",
                params![provider.to_string(), name],
            )?;
            Ok(())
        })
    }

    /// The names for `scope`, the latest first.
    pub fn kek_names(
        &self,
        provider: ProviderId,
        scope: &KekScope,
    ) -> Result<Vec<KekNameRecord>, KeystoreError> {
        self.read(|connection| {
            let sql =
                "SELECT name, kek FROM kek_names WHERE provider = ?1 AND scope = ?2 ORDER BY rowid DESC";
            let values = params![provider.to_string(), scope_text(scope)];
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

    /// Whether a job has taken `kek` out of use, for whichever VM.
    pub fn is_retired(&self, provider: ProviderId, kek: &KekId) -> Result<bool, KeystoreError> {
        Ok(self.retired_of(provider)?.contains(kek))
    }

    /// The KEKs of `provider` that jobs have taken out of use. A row that does not tell its provider counts for each of them: what
    /// was taken out of use must not come back.
    pub fn retired_of(&self, provider: ProviderId) -> Result<HashSet<KekId>, KeystoreError> {
        self.read(|connection| {
            let sql = "SELECT provider, kek FROM retired_keks";
            let rows = collect(connection, sql, [], Named("retired KEK", "kek"), |row| {
                let of = rows::text(row, "provider").and_then(|id| id.parse::<ProviderId>().ok());
                let kek = rows::text(row, "kek").map(KekId);
                Ok(kek.filter(|_| of.is_none_or(|of| of == provider)))
            })?;
            Ok(rows.sound.into_iter().flatten().collect())
        })
    }

    /// The KEKs of `provider` that the envelopes of `vm`, or of all VMs, have stanzas of now.
    pub fn keks_of_envelopes(
        &self,
        provider: ProviderId,
        vm: Option<VmId>,
    ) -> Result<Vec<KekId>, KeystoreError> {
        let records = match vm {
            Some(vm) => self.envelopes_of(vm)?,
            None => self.envelopes()?,
        };
        let stanzas = records.sound.into_iter().flat_map(|record| {
            let Envelope { stanzas, .. } = record.envelope;
            stanzas
        });
        let mut keks: Vec<_> = stanzas
            .filter(|stanza| stanza.provider == provider)
            .map(|stanza| stanza.kek)
            .collect();
        keks.sort_by(|a, b| a.0.cmp(&b.0));
        keks.dedup();
        Ok(keks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_planned_once_and_finds_its_kek() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        let (provider, vm) = (ProviderId::random(), VmId::random());
        let scopes = [KekScope::Vm(vm), KekScope::Provider];
        for (scope, name) in scopes.iter().zip(["a", "b"]) {
            keystore.plan_kek_name(provider, scope, name).unwrap();
            assert!(keystore.plan_kek_name(provider, scope, name).is_err());
        }
        let kek = KekId("7".into());
        keystore.note_kek_of_name(provider, "a", &kek).unwrap();
        let record = KekNameRecord {
            name: "a".into(),
            kek: Some(kek),
        };
        assert_eq!(keystore.kek_names(provider, &scopes[0]).unwrap(), [record]);
        assert_eq!(keystore.kek_names(provider, &scopes[1]).unwrap()[0].kek, None);
        assert!(
            keystore
                .kek_names(ProviderId::random(), &scopes[0])
                .unwrap()
                .is_empty()
        );
    }
}
