//! Disks of which it is not known whether an overlay or the image below is the newer one, as QEMU may have gone over to that.

use std::path::Path;

use rusqlite::{OptionalExtension, params};

use super::host::HostStore;
use crate::model::envelope::VmId;
use crate::store::error::StoreError;
use crate::store::host_records::{Pivot, PivotBy};
use crate::store::sqlite::database::now;

impl HostStore {
    /// Notes that it is so now.
    pub(crate) fn note_pivot(
        &self,
        vm: VmId,
        base: &Path,
        overlay: &Path,
        by: PivotBy,
    ) -> Result<(), StoreError> {
        let of_others = by == PivotBy::Others;
        self.0.write(|transaction| {
            let sql = "INSERT OR REPLACE INTO pivots (vm, base, overlay, asked, of_others) VALUES (?1, ?2, ?3, ?4, ?5)";
            let row = params![vm.to_string(), text(base), text(overlay), now(), of_others];
            transaction.execute(sql, row)?;
            Ok(())
        })
    }

    /// What is noted of it.
    pub(crate) fn pivot(&self, vm: VmId, base: &Path, overlay: &Path) -> Result<Option<Pivot>, StoreError> {
        self.0.read(|connection| {
            let sql = "SELECT asked, of_others FROM pivots WHERE vm = ?1 AND base = ?2 AND overlay = ?3";
            let values = [vm.to_string(), text(base), text(overlay)];
            let pivot = connection.query_row(sql, values, |row| {
                let by = match row.get(1)? {
                    true => PivotBy::Others,
                    false => PivotBy::Virtseald,
                };
                Ok(Pivot { at: row.get(0)?, by })
            });
            Ok(pivot.optional()?)
        })
    }

    /// The disk is its image `base` alone by all that is known. Reads first: a write is synced.
    pub(crate) fn forget_pivots(&self, vm: VmId, base: &Path) -> Result<(), StoreError> {
        let values = [vm.to_string(), text(base)];
        let is_known: bool = self.0.read(|connection| {
            let sql = "SELECT EXISTS (SELECT 1 FROM pivots WHERE vm = ?1 AND base = ?2)";
            Ok(connection.query_row(sql, values.clone(), |row| row.get(0))?)
        })?;
        if !is_known {
            return Ok(());
        }
        self.0.write(|transaction| {
            transaction.execute("DELETE FROM pivots WHERE vm = ?1 AND base = ?2", values)?;
            Ok(())
        })
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Stores;

    #[test]
    fn what_is_noted_is_known_until_it_is_done_and_of_that_disk_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = Stores::open(dir.path()).unwrap().host_store;
        let (vm, other) = (VmId::random(), VmId::random());
        let [base, overlay] = ["/images/web01", "/images/web01.s1"].map(Path::new);
        let noted = |vm| store.pivot(vm, base, overlay).unwrap();
        let note = |vm, by| store.note_pivot(vm, base, overlay, by).unwrap();
        note(vm, PivotBy::Others);
        note(vm, PivotBy::Virtseald);
        note(other, PivotBy::Others);
        assert!(noted(vm).is_some_and(|pivot| pivot.at > 0 && pivot.by == PivotBy::Virtseald));
        assert!(noted(other).is_some_and(|pivot| pivot.by == PivotBy::Others));
        assert_eq!(store.pivot(vm, overlay, base).unwrap(), None);
        store.forget_pivots(vm, base).unwrap();
        store.forget_pivots(vm, base).unwrap();
        assert!(noted(vm).is_none() && noted(other).is_some());
    }
}
