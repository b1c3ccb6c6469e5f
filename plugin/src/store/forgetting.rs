//! What is dropped of a VM, and comes back: both are for who has a copy of it elsewhere, see [`crate::vm::forgotten`].

use rusqlite::{Transaction, params};

use super::error::StoreFault;
use super::proofs::saved_texts;
use super::{
    Change, EnvelopeRecord, Keystore, KeystoreError, Mark, Put, RetiredKek, SavedState, VmRecord, envelopes,
    now,
};
use crate::model::envelope::VmId;

impl Keystore {
    /// Drops what is known of `vm`, if its envelopes are still `saved`: one that has changed since would be lost.
    ///
    /// # Errors
    /// The keystore's; [`Change::Unchanged`] when they are not.
    pub fn forget_vm(&self, vm: VmId, saved: &[EnvelopeRecord]) -> Result<Change, KeystoreError> {
        self.write(|transaction| {
            let id = vm.to_string();
            let known = envelopes::select(transaction, "WHERE vm = ?1 ORDER BY created, id", [&id])?;
            if known.whole()? != saved {
                return Ok(Change::Unchanged);
            }
            remove(transaction, vm)?;
            Ok(Change::Changed)
        })
    }

    /// Drops one envelope, if it is still `saved`.
    ///
    /// # Errors
    /// As [`Keystore::forget_vm`].
    pub fn forget_envelope(&self, saved: &EnvelopeRecord) -> Result<Change, KeystoreError> {
        self.write(|transaction| {
            let id = saved.envelope.id.to_string();
            let known = envelopes::select(transaction, "WHERE id = ?1", [&id])?;
            if known.whole()?.first() != Some(saved) {
                return Ok(Change::Unchanged);
            }
            for table in ["stale_copies", "left_behind", "header_journal"] {
                transaction.execute(&format!("DELETE FROM {table} WHERE envelope = ?1"), [&id])?;
            }
            transaction.execute("DELETE FROM envelopes WHERE id = ?1", [&id])?;
            Ok(Change::Changed)
        })
    }

    /// Takes back a row that was forgotten, as it was; one that is known by now stays if it is as new. Only for what root
    /// alone can have written: it is believed as the keystore is.
    ///
    /// # Errors
    /// As [`Keystore::put`].
    pub fn bring_back(&self, record: &EnvelopeRecord) -> Result<Put, KeystoreError> {
        self.write(|transaction| {
            envelopes::take_over(transaction, &record.envelope, record.state, &record.location)
        })
    }

    /// Takes back what was known of a VM. What is known by now stays, its mark too.
    pub fn bring_back_vm(
        &self,
        vm: &VmRecord,
        mark: Mark,
        retired: &[RetiredKek],
        saved: Option<&SavedState>,
    ) -> Result<(), KeystoreError> {
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
            if let Some(saved) = saved {
                transaction.execute(
                    "INSERT OR IGNORE INTO saved_states (vm, since, envelopes) VALUES (?1, ?2, ?3)",
                    params![id, saved.since, saved_texts(&saved.envelopes)],
                )?;
            }
            transaction.execute(
                "INSERT INTO vms (uuid, name, sealed_at, vtpm_seen) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (uuid) DO UPDATE SET vtpm_seen = max(vtpm_seen, excluded.vtpm_seen)",
                params![id, vm.name, vm.sealed_at, vm.vtpm_seen],
            )?;
            for kek in retired {
                transaction.execute(
                    "INSERT OR IGNORE INTO retired_keks (provider, kek, vm, since) VALUES (?1, ?2, ?3, ?4)",
                    params![kek.provider.to_string(), kek.kek.0, kek.vm.to_string(), now()],
                )?;
            }
            Ok(())
        })
    }
}

/// All rows about a VM and its envelopes. Returns how many envelopes there were.
pub(super) fn remove(transaction: &Transaction, vm: VmId) -> Result<usize, StoreFault> {
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
    transaction.execute("DELETE FROM plain_vms WHERE uuid = ?1", [&id])?;
    transaction.execute("DELETE FROM vms WHERE uuid = ?1", [&id])?;
    Ok(transaction.execute("DELETE FROM envelopes WHERE vm = ?1", [&id])?)
}
