//! Disks that QEMU was asked to let go over from an overlay to the image below, as long as nobody has seen that it has.

use std::path::Path;

use rusqlite::{OptionalExtension, params};

use super::host::HostStore;
use crate::model::envelope::VmId;
use crate::store::error::StoreError;
use crate::store::records::UnixTime;
use crate::store::sqlite::database::now;

impl HostStore {
    /// Notes that it is asked now.
    pub(crate) fn note_pivot(&self, vm: VmId, base: &Path, overlay: &Path) -> Result<(), StoreError> {
        self.0.write(|transaction| {
            let sql = "INSERT OR REPLACE INTO pivots (vm, base, overlay, asked) VALUES (?1, ?2, ?3, ?4)";
            transaction.execute(sql, params![vm.to_string(), text(base), text(overlay), now()])?;
            Ok(())
        })
    }

    /// When it was asked last, if it is not seen to be done.
    pub(crate) fn pivot(
        &self,
        vm: VmId,
        base: &Path,
        overlay: &Path,
    ) -> Result<Option<UnixTime>, StoreError> {
        self.0.read(|connection| {
            let sql = "SELECT asked FROM pivots WHERE vm = ?1 AND base = ?2 AND overlay = ?3";
            let values = [vm.to_string(), text(base), text(overlay)];
            Ok(connection.query_row(sql, values, |row| row.get(0)).optional()?)
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
    fn what_was_asked_is_known_until_it_is_done_and_of_that_disk_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = Stores::open(dir.path()).unwrap().host_store;
        let (vm, other) = (VmId::random(), VmId::random());
        let [base, overlay] = ["/images/web01", "/images/web01.s1"].map(Path::new);
        let asked = |vm| store.pivot(vm, base, overlay).unwrap();
        store.note_pivot(vm, base, overlay).unwrap();
        store.note_pivot(vm, base, overlay).unwrap();
        store.note_pivot(other, base, overlay).unwrap();
        assert!(asked(vm).is_some_and(|asked| asked > 0));
        assert_eq!(store.pivot(vm, overlay, base).unwrap(), None);
        store.forget_pivots(vm, base).unwrap();
        store.forget_pivots(vm, base).unwrap();
        assert!(asked(vm).is_none() && asked(other).is_some());
    }
}
