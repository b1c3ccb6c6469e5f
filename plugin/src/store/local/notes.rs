//! Notes of this host: how long its audit log was, which VMs were saved to a file, and which run with QEMU's master key on a disk.

use rusqlite::params;

use super::host::HostStore;
use crate::model::envelope::{Envelope, VmId};
use crate::store::damage::Rows;
use crate::store::error::StoreError;
use crate::store::host_records::{AuditAnchor, SavedState};
use crate::store::sqlite::database::{now, parse_id};
use crate::store::sqlite::rows::{self, Named, collect};

impl HostStore {
    /// How long the audit log was when this was last noted; `None` before the first time.
    pub(crate) fn audit_anchor(&self) -> Result<Option<AuditAnchor>, StoreError> {
        self.0.read(|connection| {
            let sql = "SELECT seq, hash FROM audit_anchor";
            rows::one(connection, sql, [], "the length of the audit log", |row| {
                Ok(AuditAnchor {
                    seq: row.get(0)?,
                    hash: row.get(1)?,
                })
            })
        })
    }

    /// Notes how long the audit log is. Only what is on disk there may be noted.
    pub(crate) fn set_audit_anchor(&self, anchor: AuditAnchor) -> Result<(), StoreError> {
        self.0.write(|transaction| {
            transaction
                .prepare_cached("INSERT OR REPLACE INTO audit_anchor (one, seq, hash) VALUES (1, ?1, ?2)")?
                .execute(params![anchor.seq, anchor.hash])?;
            Ok(())
        })
    }

    /// Notes that `vm` was saved to a file, unless that is known.
    pub(crate) fn note_saved(&self, vm: VmId, envelopes: &[Envelope]) -> Result<(), StoreError> {
        let texts = saved_texts(envelopes);
        self.0.write(|transaction| {
            transaction.execute(
                "INSERT OR IGNORE INTO saved_states (vm, since, envelopes) VALUES (?1, ?2, ?3)",
                params![vm.to_string(), now(), texts],
            )?;
            Ok(())
        })
    }

    /// The VM runs again: whatever file it was saved to is the past.
    pub(crate) fn forget_saved(&self, vm: VmId) -> Result<(), StoreError> {
        self.forget_note("saved_states", vm)
    }

    /// Notes that `vm` is started with QEMU's master key on a disk, and why.
    pub(crate) fn note_master_key_on_disk(&self, vm: VmId, why: &str) -> Result<(), StoreError> {
        self.0.write(|transaction| {
            transaction.execute(
                "INSERT OR REPLACE INTO master_keys_on_disk (vm, why) VALUES (?1, ?2)",
                params![vm.to_string(), why],
            )?;
            Ok(())
        })
    }

    /// The VM has ended, or its key is kept off the disks now.
    pub(crate) fn forget_master_key_on_disk(&self, vm: VmId) -> Result<(), StoreError> {
        self.forget_note("master_keys_on_disk", vm)
    }

    /// The VMs whose master key is on a disk while they run, each with the reason.
    pub(crate) fn master_keys_on_disk(&self) -> Result<Rows<(VmId, String)>, StoreError> {
        self.0.read(|connection| {
            let sql = "SELECT vm, why FROM master_keys_on_disk ORDER BY vm";
            let named = Named("the note about the master key of VM", "vm");
            collect(connection, sql, [], named, |row| {
                Ok((parse_id("VM", &row.get::<_, String>(0)?)?, row.get(1)?))
            })
        })
    }

    /// Reads first: most VMs have none, and a write is synced.
    fn forget_note(&self, table: &'static str, vm: VmId) -> Result<(), StoreError> {
        let is_noted = self.0.read(|connection| {
            let mut noted = connection.prepare_cached(&format!("SELECT 1 FROM {table} WHERE vm = ?1"))?;
            Ok(noted.exists([vm.to_string()])?)
        })?;
        if !is_noted {
            return Ok(());
        }
        self.0.write(|transaction| {
            transaction.execute(&format!("DELETE FROM {table} WHERE vm = ?1"), [vm.to_string()])?;
            Ok(())
        })
    }

    /// The VMs that were saved to a file and have not run since.
    pub(crate) fn saved_states(&self) -> Result<Rows<SavedState>, StoreError> {
        self.0.read(|connection| {
            let sql = "SELECT vm, since, envelopes FROM saved_states ORDER BY vm";
            let named = Named("the saved state of VM", "vm");
            collect(connection, sql, [], named, |row| {
                let vm: String = row.get(0)?;
                let inconsistent = |_| StoreError::Inconsistent {
                    row: format!("of the saved state of VM {vm}"),
                    why: "its envelopes can't be read".to_owned(),
                };
                let texts: Vec<String> =
                    serde_json::from_str(&row.get::<_, String>(2)?).map_err(inconsistent)?;
                let envelopes = texts.iter().map(|text| Envelope::from_json(text));
                Ok(SavedState {
                    vm: parse_id("VM", &vm)?,
                    since: row.get(1)?,
                    envelopes: envelopes
                        .collect::<Result<_, _>>()
                        .map_err(|_| StoreError::Inconsistent {
                            row: format!("of the saved state of VM {vm}"),
                            why: "an envelope of it can't be read".to_owned(),
                        })?,
                })
            })
        })
    }

    /// Takes back what was known of a saved VM; what is known by now stays.
    pub(crate) fn bring_back_saved(&self, saved: &SavedState) -> Result<(), StoreError> {
        self.insert_saved(saved)
    }

    fn insert_saved(&self, saved: &SavedState) -> Result<(), StoreError> {
        self.0.write(|transaction| {
            transaction.execute(
                "INSERT OR IGNORE INTO saved_states (vm, since, envelopes) VALUES (?1, ?2, ?3)",
                params![saved.vm.to_string(), saved.since, saved_texts(&saved.envelopes)],
            )?;
            Ok(())
        })
    }
}

/// As they are in the row of a saved state.
fn saved_texts(envelopes: &[Envelope]) -> String {
    let texts: Vec<_> = envelopes.iter().map(Envelope::to_json).collect();
    serde_json::to_string(&texts).expect("texts are JSON")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Stores;

    #[test]
    fn the_anchor_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let stores = Stores::open(dir.path()).unwrap();
        assert_eq!(stores.host_store.audit_anchor().unwrap(), None);
        for seq in [3, 7] {
            let anchor = AuditAnchor { seq, hash: [9; 32] };
            stores.host_store.set_audit_anchor(anchor).unwrap();
            assert_eq!(stores.host_store.audit_anchor().unwrap(), Some(anchor));
        }
    }

    #[test]
    fn a_saved_vm_is_known_until_it_runs() {
        let dir = tempfile::tempdir().unwrap();
        let stores = Stores::open(dir.path()).unwrap();
        let vm = VmId::random();
        stores.host_store.note_saved(vm, &[]).unwrap();
        stores.host_store.note_saved(vm, &[]).unwrap();
        assert_eq!(
            stores.host_store.saved_states().unwrap().whole().unwrap()[0].vm,
            vm
        );
        stores.host_store.forget_saved(VmId::random()).unwrap();
        stores.host_store.forget_saved(vm).unwrap();
        assert_eq!(stores.host_store.saved_states().unwrap().whole().unwrap(), []);
    }

    #[test]
    fn a_master_key_on_a_disk_is_known_until_the_vm_ends() {
        let dir = tempfile::tempdir().unwrap();
        let store = Stores::open(dir.path()).unwrap().host_store;
        let vm = VmId::random();
        for why in ["no tmpfs", "no directory"] {
            store.note_master_key_on_disk(vm, why).unwrap();
            let known = store.master_keys_on_disk().unwrap().whole().unwrap();
            assert_eq!(known, [(vm, why.to_owned())]);
        }
        store.forget_master_key_on_disk(VmId::random()).unwrap();
        store.forget_master_key_on_disk(vm).unwrap();
        assert_eq!(store.master_keys_on_disk().unwrap().whole().unwrap(), []);
    }
}
