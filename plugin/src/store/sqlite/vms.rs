//! Rows of the VMs that have sealed objects.

use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};

use super::database::{Database, now, parse_id};
use super::fault::StoreFault;
use super::rows::{self, Named, collect};
use super::{envelopes, keks};
use crate::model::envelope::VmId;
use crate::model::problem::chain;
use crate::store::damage::Rows;
use crate::store::error::StoreError;
use crate::store::records::{Change, EnvelopeRecord, Mark, RetiredKek, ShreddedRows, Traces, VmRecord};
use crate::store::shared::Vms;

impl Vms for Database {
    fn remember_vm(&self, vm: VmId, name: &str) -> Result<Change, StoreError> {
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

    fn note_plain(&self, vm: VmId) -> Result<Change, StoreError> {
        self.write(|transaction| {
            let rows = transaction.execute(
                "INSERT OR IGNORE INTO plain_vms (uuid, since) VALUES (?1, ?2)",
                params![vm.to_string(), now()],
            )?;
            Ok(Change::of_rows(rows))
        })
    }

    fn is_sealed(&self, vm: VmId) -> Result<bool, StoreError> {
        self.read(|connection| {
            let sql = "SELECT 1 FROM vms WHERE uuid = ?1 AND uuid NOT IN (SELECT uuid FROM plain_vms)";
            Ok(connection.prepare_cached(sql)?.exists([vm.to_string()])?)
        })
    }

    fn mark(&self, vm: VmId) -> Result<Option<Mark>, StoreError> {
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

    fn set_vtpm_seen(&self, vm: VmId) -> Result<Change, StoreError> {
        self.write(|transaction| {
            let rows = transaction.execute(
                "UPDATE vms SET vtpm_seen = 1 WHERE uuid = ?1 AND vtpm_seen = 0",
                [vm.to_string()],
            )?;
            if rows == 0 && find_vm(transaction, vm)?.is_none() {
                return Err(StoreError::UnknownVm(vm).into());
            }
            Ok(Change::of_rows(rows))
        })
    }

    fn clear_vtpm_seen(&self, vm: VmId) -> Result<Change, StoreError> {
        self.write(|transaction| {
            let rows = transaction.execute(
                "UPDATE vms SET vtpm_seen = 0 WHERE uuid = ?1 AND vtpm_seen = 1",
                [vm.to_string()],
            )?;
            Ok(Change::of_rows(rows))
        })
    }

    fn vm(&self, vm: VmId) -> Result<Option<VmRecord>, StoreError> {
        self.read(|connection| find_vm(connection, vm))
    }

    fn vms(&self) -> Result<Rows<VmRecord>, StoreError> {
        self.read(|connection| {
            let sql = "SELECT uuid, name, sealed_at, vtpm_seen FROM vms ORDER BY name, uuid";
            collect(connection, sql, [], Named("VM", "uuid"), vm_of)
        })
    }

    fn shred_vm(&self, vm: VmId) -> Result<ShreddedRows, StoreError> {
        let envelopes = self.write(|transaction| remove(transaction, vm))?;
        let traces = self.forget_deleted_rows().unwrap_or_else(|error| {
            tracing::warn!(
                "envelopes of VM {vm} stay in the write-ahead log: {}",
                chain(&error)
            );
            Traces::Left
        });
        Ok(ShreddedRows { envelopes, traces })
    }

    fn forget_vm(&self, vm: VmId, saved: &Rows<EnvelopeRecord>) -> Result<Change, StoreError> {
        self.write(|transaction| {
            let id = vm.to_string();
            let known = envelopes::select(transaction, "WHERE vm = ?1 ORDER BY created, id", [&id])?;
            if known != *saved {
                return Ok(Change::Unchanged);
            }
            remove(transaction, vm)?;
            Ok(Change::Changed)
        })
    }

    fn bring_back_vm(&self, vm: &VmRecord, mark: Mark, retired: &[RetiredKek]) -> Result<(), StoreError> {
        self.write(|transaction| {
            let id = vm.vm.to_string();
            let is_known = transaction
                .prepare_cached("SELECT 1 FROM vms WHERE uuid = ?1")?
                .exists([&id])?;
            if !is_known && mark == Mark::Plain {
                transaction.execute(
                    "INSERT OR IGNORE INTO plain_vms (uuid, since) VALUES (?1, ?2)",
                    params![id, now()],
                )?;
            }
            transaction.execute(
                "INSERT INTO vms (uuid, name, sealed_at, vtpm_seen) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (uuid) DO UPDATE SET vtpm_seen = max(vtpm_seen, excluded.vtpm_seen)",
                params![id, vm.name, vm.sealed_at, vm.vtpm_seen],
            )?;
            keks::retire(transaction, retired)
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

/// All rows about a VM and its envelopes. Returns how many envelopes there were.
fn remove(transaction: &Transaction, vm: VmId) -> Result<usize, StoreFault> {
    let id = vm.to_string();
    for table in ["stale_copies", "left_behind", "header_journal"] {
        transaction.execute(
            &format!("DELETE FROM {table} WHERE envelope IN (SELECT id FROM envelopes WHERE vm = ?1)"),
            [&id],
        )?;
    }
    transaction.execute(
        "DELETE FROM damaged_envelopes WHERE vm = ?1 OR id IN (SELECT id FROM envelopes WHERE vm = ?1)",
        [&id],
    )?;
    transaction.execute("DELETE FROM retired_keks WHERE vm = ?1", [&id])?;
    transaction.execute("DELETE FROM saved_states WHERE vm = ?1", [&id])?;
    transaction.execute("DELETE FROM master_keys_on_disk WHERE vm = ?1", [&id])?;
    transaction.execute("DELETE FROM plain_vms WHERE uuid = ?1", [&id])?;
    transaction.execute("DELETE FROM vms WHERE uuid = ?1", [&id])?;
    Ok(transaction.execute("DELETE FROM envelopes WHERE vm = ?1", [&id])?)
}
