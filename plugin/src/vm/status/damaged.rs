//! Records of the keystore that can't be read: each is named with its way out, and stops nothing but what it is about.
//!
//! What destroys a key, or drops a record, must know all of them and refuses. Everything else goes on with the others.

use crate::model::problem::chain;
use crate::store::{DamagedRow, EnvelopeStore, HostStore, StoreError};
use crate::terminal::word;
use crate::vm::names::VmNames;

/// Where a backup is the only way: there is no copy of these elsewhere.
const BACKUP: &str =
    "keep a copy of the state directory, then bring a backup back: virtseal state restore -i FILE";

/// One line for each.
#[must_use]
pub fn records(keystore: &dyn EnvelopeStore, host_store: &HostStore) -> Vec<String> {
    damaged_rows(keystore, host_store).unwrap_or_else(|error| vec![chain(&error)])
}

fn damaged_rows(keystore: &dyn EnvelopeStore, host_store: &HostStore) -> Result<Vec<String>, StoreError> {
    let vms = keystore.vms()?;
    let names = VmNames::of_records(&vms.sound);
    let of_vms = vms.damaged.into_iter().chain(keystore.envelopes()?.damaged);
    let mut lines: Vec<_> = of_vms.map(|row| finding(&row, &names)).collect();
    let others = [
        keystore.providers()?.damaged,
        keystore.deleted_providers()?.damaged,
        host_store.needed_keks()?.damaged,
        keystore.retired_keks()?.damaged,
        keystore.made_keks()?.damaged,
        host_store.saved_states()?.damaged,
        host_store.journaled_headers()?.damaged,
        keystore.jobs(u32::MAX)?.damaged,
    ];
    lines.extend(others.iter().flatten().map(|row| finding(row, &names)));
    Ok(lines)
}

/// What is wrong, and what leads out.
pub(crate) fn finding(row: &DamagedRow, names: &VmNames) -> String {
    let name = row.vm.map(|vm| names.of(vm));
    match (name, row.is_elsewhere) {
        (Some(name), true) => format!(
            "{row} (VM {name}). Next: virtseal vm adopt {}, which takes it from the XML or the image; if neither has it, \
             virtseal vm adopt --from FILE with what vm forget has kept, or {BACKUP}",
            word(&name)
        ),
        (Some(name), false) => format!("{row} (VM {name}). Next: {BACKUP}"),
        (None, _) => format!("{row}. Next: {BACKUP}"),
    }
}
