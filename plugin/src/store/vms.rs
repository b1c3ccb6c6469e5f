//! Rows of the VMs that have sealed objects.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{
    Change, Keystore, KeystoreError, Rows, UnixTime,
    error::StoreFault,
    forgetting, now, parse_id,
    rows::{self, Named, collect},
};
use crate::model::envelope::VmId;
use crate::model::problem::chain;

/// A VM that has, or had, sealed objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmRecord {
    /// The domain's UUID.
    pub vm: VmId,
    /// Its name when it was last seen.
    pub name: String,
    /// When the first of its objects was sealed here.
    pub sealed_at: UnixTime,
    /// Whether its encrypted vTPM state was ever seen. From then on a missing state file is a loss: swtpm
    /// would answer it with a new, empty TPM.
    pub vtpm_seen: bool,
}

/// What a VM that is known counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Sealed: the hook lets it start by its metadata alone.
    Sealed,
    /// Plain again.
    Plain,
}

impl Keystore {
    /// Notes that `vm` is sealed, and its name now. A damaged row is mended by that: its vTPM may have been seen, so it was.
    pub fn remember_vm(&self, vm: VmId, name: &str) -> Result<Change, KeystoreError> {
        self.write(|transaction| {
            if find_vm(transaction, vm).is_err() {
                transaction.execute(
                    "UPDATE vms SET name = ?2, sealed_at = ?3, vtpm_seen = 1 WHERE uuid = ?1",
                    params![vm.to_string(), name, now()],
                )?;
            }
            let plain = transaction.execute("DELETE FROM plain_vms WHERE uuid = ?1", [vm.to_string()])?;
            let rows = transaction.execute(
                "INSERT INTO vms (uuid, name, sealed_at, vtpm_seen) VALUES (?1, ?2, ?3, 0)
                 ON CONFLICT (uuid) DO UPDATE SET name = excluded.name WHERE name <> excluded.name",
                params![vm.to_string(), name, now()],
            )?;
            Ok(Change::of_rows(rows + plain))
        })
    }

    /// Notes that `vm` is plain again: from then on the hook lets it start without virtseal's metadata.
    pub fn note_plain(&self, vm: VmId) -> Result<Change, KeystoreError> {
        self.write(|transaction| {
            let rows = transaction.execute(
                "INSERT OR IGNORE INTO plain_vms (uuid, since) VALUES (?1, ?2)",
                params![vm.to_string(), now()],
            )?;
            Ok(Change::of_rows(rows))
        })
    }

    /// Whether `vm` is sealed, as far as this host knows.
    pub fn is_sealed(&self, vm: VmId) -> Result<bool, KeystoreError> {
        self.read(|connection| {
            let sql = "SELECT 1 FROM vms WHERE uuid = ?1 AND uuid NOT IN (SELECT uuid FROM plain_vms)";
            Ok(connection.prepare_cached(sql)?.exists([vm.to_string()])?)
        })
    }

    /// What `vm` counts as; `None` for one that is not known.
    pub fn mark(&self, vm: VmId) -> Result<Option<Mark>, KeystoreError> {
        self.read(|connection| {
            let sql = "SELECT uuid IN (SELECT uuid FROM plain_vms) FROM vms WHERE uuid = ?1";
            let plain = connection
                .prepare_cached(sql)?
                .query_row([vm.to_string()], |row| row.get(0))
                .optional()?;
            Ok(plain.map(|is_plain: bool| match is_plain {
                true => Mark::Plain,
                false => Mark::Sealed,
            }))
        })
    }

    /// Notes that the encrypted vTPM state of `vm` was seen on disk.
    ///
    /// # Errors
    /// [`KeystoreError::UnknownVm`] before [`Keystore::remember_vm`].
    pub fn set_vtpm_seen(&self, vm: VmId) -> Result<Change, KeystoreError> {
        self.write(|transaction| {
            let rows = transaction.execute(
                "UPDATE vms SET vtpm_seen = 1 WHERE uuid = ?1 AND vtpm_seen = 0",
                [vm.to_string()],
            )?;
            if rows == 0 && find_vm(transaction, vm)?.is_none() {
                return Err(KeystoreError::UnknownVm(vm).into());
            }
            Ok(Change::of_rows(rows))
        })
    }

    /// Removes a VM and its envelopes with everything that is known of them. Whoever calls this means to lose the keys.
    /// Returns how many envelopes there were, and whether the write-ahead log is free of them too.
    pub fn shred_vm(&self, vm: VmId) -> Result<(usize, bool), KeystoreError> {
        let removed = self.write(|transaction| forgetting::remove(transaction, vm))?;
        let emptied = self.forget_deleted_rows().unwrap_or_else(|error| {
            tracing::warn!(
                "envelopes of VM {vm} stay in the write-ahead log: {}",
                chain(&error)
            );
            false
        });
        Ok((removed, emptied))
    }

    /// The VM called `vm`.
    pub fn vm(&self, vm: VmId) -> Result<Option<VmRecord>, KeystoreError> {
        self.read(|connection| find_vm(connection, vm))
    }

    /// Whether the encrypted vTPM state of `vm` was ever seen on disk. A damaged row tells nothing against it.
    pub fn vtpm_was_seen(&self, vm: VmId) -> Result<bool, KeystoreError> {
        match self.vm(vm) {
            Err(error) if error.is_of_row() => Ok(true),
            known => Ok(known?.is_some_and(|record| record.vtpm_seen)),
        }
    }

    /// All VMs, by name.
    pub fn vms(&self) -> Result<Rows<VmRecord>, KeystoreError> {
        self.read(|connection| {
            let sql = "SELECT uuid, name, sealed_at, vtpm_seen FROM vms ORDER BY name, uuid";
            collect(connection, sql, [], Named("VM", "uuid"), vm_of)
        })
    }
}

fn find_vm(connection: &Connection, vm: VmId) -> Result<Option<VmRecord>, StoreFault> {
    let sql = "SELECT uuid, name, sealed_at, vtpm_seen FROM vms WHERE uuid = ?1";
    rows::one(connection, sql, [vm.to_string()], &format!("VM {vm}"), vm_of)
}

fn vm_of(row: &Row) -> Result<VmRecord, StoreFault> {
    Ok(VmRecord {
        vm: parse_id("VM", &row.get::<_, String>("uuid")?)?,
        name: row.get("name")?,
        sealed_at: row.get("sealed_at")?,
        vtpm_seen: row.get("vtpm_seen")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vm_keeps_its_seal_date_and_follows_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        let vm = VmId::random();
        assert!(matches!(
            keystore.set_vtpm_seen(vm),
            Err(KeystoreError::UnknownVm(_))
        ));
        assert_eq!(keystore.remember_vm(vm, "web01").unwrap(), Change::Changed);
        assert_eq!(keystore.remember_vm(vm, "web01").unwrap(), Change::Unchanged);
        keystore.set_vtpm_seen(vm).unwrap();
        assert_eq!(keystore.set_vtpm_seen(vm).unwrap(), Change::Unchanged);
        assert_eq!(keystore.remember_vm(vm, "web02").unwrap(), Change::Changed);
        let vms = keystore.vms().unwrap().whole().unwrap();
        assert_eq!(vms.len(), 1);
        assert!(vms[0].vtpm_seen && vms[0].name == "web02");
    }
}
