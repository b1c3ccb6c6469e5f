//! Records of the keystore that can't be read: each is named with its way out, and stops nothing but what it is about.
//!
//! What destroys a key, or drops a record, must know all of them and refuses. Everything else goes on with the others.

use std::collections::BTreeMap;

use super::Daemon;
use super::visible::{Place, VisibleCopy};
use crate::model::envelope::VmId;
use crate::store::{DamagedRow, Keystore, KeystoreError, VmRecord};
use crate::terminal::word;

/// Where a backup is the only way: there is no copy of these elsewhere.
const BACKUP: &str =
    "keep a copy of the state directory, then bring a backup back: virtseal state restore -i FILE";

impl Daemon {
    /// One line for each.
    pub(super) fn damaged_records(&self) -> Vec<String> {
        damaged_rows(&self.keystore).unwrap_or_else(|error| vec![crate::model::problem::chain(&error)])
    }

    /// The envelopes that damaged rows still hold: they count as copies, as those of the XML and the images do.
    pub(super) fn held_copies(&self, vm: Option<VmId>) -> Vec<VisibleCopy> {
        let rows = match vm {
            Some(vm) => self.keystore.envelopes_of(vm),
            None => self.keystore.envelopes(),
        };
        let damaged = rows.map(|rows| rows.damaged).unwrap_or_default();
        let held = damaged.into_iter().filter_map(|row| row.holds);
        held.map(|held| VisibleCopy {
            location: (!held.location.is_empty()).then(|| held.location.clone().into()),
            envelope: held.envelope,
            place: Place::Keystore,
        })
        .collect()
    }
}

fn damaged_rows(keystore: &Keystore) -> Result<Vec<String>, KeystoreError> {
    let vms = keystore.vms()?;
    let names = names(&vms.sound);
    let of_vms = vms.damaged.into_iter().chain(keystore.envelopes()?.damaged);
    let mut lines: Vec<_> = of_vms.map(|row| finding(&row, &names)).collect();
    let others = [
        keystore.providers()?.damaged,
        keystore.deleted_providers()?.damaged,
        keystore.needed_keks()?.damaged,
        keystore.retired_keks()?.damaged,
        keystore.made_keks()?.damaged,
        keystore.saved_states()?.damaged,
        keystore.journaled_headers()?.damaged,
        keystore.jobs(u32::MAX)?.damaged,
    ];
    lines.extend(others.iter().flatten().map(|row| finding(row, &names)));
    Ok(lines)
}

pub(super) fn names(vms: &[VmRecord]) -> BTreeMap<VmId, String> {
    vms.iter().map(|known| (known.vm, known.name.clone())).collect()
}

/// What is wrong, and what leads out.
pub(super) fn finding(row: &DamagedRow, names: &BTreeMap<VmId, String>) -> String {
    let name = row
        .vm
        .map(|vm| names.get(&vm).cloned().unwrap_or_else(|| vm.to_string()));
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
