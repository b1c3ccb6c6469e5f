//! Records of the keystore that can't be read: each is named with its way out, and stops nothing but what it is about.
//!
//! What destroys a key, or drops a record, must know all of them and refuses. Everything else goes on with the others.

use crate::model::advice::Advice;
use crate::model::finding::{Finding, Subject};
use crate::model::problem::chain;
use crate::store::{DamagedRow, EnvelopeStore, HostStore, StoreError};
use crate::vm::names::VmNames;

/// Where a backup is the only way: there is no copy of these elsewhere.
fn from_backup() -> Advice {
    Advice::from("keep a copy of the state directory, then bring a backup back").within(Advice::RestoreState)
}

/// All of them.
#[must_use]
pub fn records(keystore: &dyn EnvelopeStore, host_store: &HostStore) -> Vec<Finding> {
    damaged_rows(keystore, host_store)
        .unwrap_or_else(|error| vec![Finding::critical(Subject::Host, chain(&error))])
}

fn damaged_rows(keystore: &dyn EnvelopeStore, host_store: &HostStore) -> Result<Vec<Finding>, StoreError> {
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
pub(super) fn finding(row: &DamagedRow, names: &VmNames) -> Finding {
    let name = row.vm.map(|vm| names.of(vm));
    let Some(name) = name else {
        return Finding::critical(Subject::Host, row.to_string()).next(from_backup());
    };
    let what = format!("{row} (VM {name})");
    let advice = if row.is_elsewhere {
        let kept = Advice::AdoptFrom("FILE".into()).note("with what forget has kept");
        let adopt = Advice::AdoptVm(name.clone()).note("which takes it from the XML or the image");
        adopt.also("if neither has it").within(kept.or(from_backup()))
    } else {
        from_backup()
    };
    Finding::critical(Subject::Vm(name), what).next(advice)
}
