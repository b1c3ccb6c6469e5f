//! The VMs that virtseald starts with this host, and the boot in which nothing more is to be done for each.

use rusqlite::params;

use super::host::HostStore;
use crate::host::boot::BootId;
use crate::model::envelope::VmId;
use crate::store::damage::Rows;
use crate::store::error::StoreError;
use crate::store::host_records::Autostart;
use crate::store::records::Change;
use crate::store::sqlite::database::parse_id;
use crate::store::sqlite::rows::{self, Named, collect};

impl HostStore {
    /// All of them.
    pub(crate) fn autostarts(&self) -> Result<Rows<Autostart>, StoreError> {
        self.0.read(|connection| {
            let sql = "SELECT vm, settled FROM autostarts ORDER BY vm";
            collect(connection, sql, [], Named("the autostart of VM", "vm"), |row| {
                Ok(autostart(&row.get::<_, String>(0)?, &row.get::<_, String>(1)?)?)
            })
        })
    }

    /// That of `vm`, if it is to start with this host.
    pub(crate) fn autostart(&self, vm: VmId) -> Result<Option<Autostart>, StoreError> {
        self.0.read(|connection| {
            let sql = "SELECT vm, settled FROM autostarts WHERE vm = ?1";
            rows::one(connection, sql, [vm.to_string()], "an autostart", |row| {
                Ok(autostart(&row.get::<_, String>(0)?, &row.get::<_, String>(1)?)?)
            })
        })
    }

    /// Has `vm` start with this host from the boot after `boot` on. One that is enabled stays as it is.
    pub(crate) fn enable_autostart(&self, vm: VmId, boot: BootId) -> Result<Change, StoreError> {
        match self.autostart(vm) {
            Ok(Some(_)) => return Ok(Change::Unchanged),
            Err(error) if !error.is_of_row() => return Err(error),
            Ok(None) | Err(_) => {}
        }
        self.0.write(|transaction| {
            let sql = "INSERT OR REPLACE INTO autostarts (vm, settled) VALUES (?1, ?2)";
            let rows = transaction.execute(sql, params![vm.to_string(), boot.to_string()])?;
            Ok(Change::of_rows(rows))
        })
    }

    /// Notes that nothing more is to be done for `vm` in `boot`, if it is one of them. Reads first: a write is synced.
    pub(crate) fn settle_autostart(&self, vm: VmId, boot: BootId) -> Result<Change, StoreError> {
        if !matches!(self.autostart(vm)?, Some(row) if row.settled != boot) {
            return Ok(Change::Unchanged);
        }
        self.0.write(|transaction| {
            let sql = "UPDATE autostarts SET settled = ?2 WHERE vm = ?1";
            let rows = transaction.execute(sql, params![vm.to_string(), boot.to_string()])?;
            Ok(Change::of_rows(rows))
        })
    }

    /// Does not start `vm` with this host any more.
    pub(crate) fn disable_autostart(&self, vm: VmId) -> Result<Change, StoreError> {
        if let Ok(None) = self.autostart(vm) {
            return Ok(Change::Unchanged);
        }
        self.0.write(|transaction| {
            let rows = transaction.execute("DELETE FROM autostarts WHERE vm = ?1", [vm.to_string()])?;
            Ok(Change::of_rows(rows))
        })
    }
}

fn autostart(vm: &str, settled: &str) -> Result<Autostart, StoreError> {
    let inconsistent = |_| StoreError::Inconsistent {
        row: format!("of the autostart of VM {vm}"),
        why: "it does not tell a boot".to_owned(),
    };
    Ok(Autostart {
        vm: parse_id("VM", vm)?,
        settled: settled.parse().map_err(inconsistent)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Stores;

    #[test]
    fn a_vm_starts_with_the_host_from_the_next_boot_on_until_it_is_disabled() {
        let dir = tempfile::tempdir().unwrap();
        let store = Stores::open(dir.path()).unwrap().host_store;
        let boots = [1, 2].map(|boot| uuid::Uuid::from_u128(boot).to_string().parse::<BootId>().unwrap());
        let (vm, other) = (VmId::random(), VmId::random());
        let settled = || store.autostart(vm).unwrap().map(|row| row.settled);
        assert_eq!(store.settle_autostart(vm, boots[0]).unwrap(), Change::Unchanged);
        assert_eq!(settled(), None);
        assert_eq!(store.enable_autostart(vm, boots[0]).unwrap(), Change::Changed);
        assert_eq!(
            store.enable_autostart(vm, boots[1]).unwrap(),
            Change::Unchanged,
            "it may be due"
        );
        assert_eq!(settled(), Some(boots[0]));
        store.enable_autostart(other, boots[0]).unwrap();
        assert_eq!(store.settle_autostart(vm, boots[1]).unwrap(), Change::Changed);
        assert_eq!(store.settle_autostart(vm, boots[1]).unwrap(), Change::Unchanged);
        assert_eq!(settled(), Some(boots[1]));
        assert_eq!(store.autostarts().unwrap().whole().unwrap().len(), 2);
        assert_eq!(store.disable_autostart(vm).unwrap(), Change::Changed);
        assert_eq!(store.disable_autostart(vm).unwrap(), Change::Unchanged);
        assert_eq!(store.autostarts().unwrap().whole().unwrap()[0].vm, other);
    }
}
