//! Records of the keystore that can't be read: each is named with its way out, and stops nothing but what it is about.
//!
//! What a record that tells nothing may need stays; all else goes on with the others.

use crate::model::advice::Advice;
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::store::{DamagedRow, EnvelopeRecord, EnvelopeStore, HostStore, Rows, StoreError, VmRecord};
use crate::vm::names::VmNames;

/// Where a backup is the only way: there is no copy of these elsewhere.
fn from_backup() -> Advice {
    Advice::from("keep a copy of the state directory, then bring a backup back").within(Advice::RestoreState)
}

/// All of them.
pub(crate) fn records(keystore: &dyn EnvelopeStore, host_store: &HostStore) -> Vec<Finding> {
    let read = || Ok((keystore.vms()?, keystore.envelopes()?));
    let found = read().map(|(vms, envelopes)| records_beside(&vms, &envelopes, keystore, host_store));
    found.unwrap_or_else(|error: StoreError| {
        vec![Finding::of(
            FindingCode::KeystoreUnreadable,
            Subject::Host,
            error.into(),
        )]
    })
}

/// The same, where those of VMs and envelopes were read before.
pub(crate) fn records_beside(
    vms: &Rows<VmRecord>,
    envelopes: &Rows<EnvelopeRecord>,
    keystore: &dyn EnvelopeStore,
    host_store: &HostStore,
) -> Vec<Finding> {
    let names = VmNames::of_records(&vms.sound);
    let of_vms = vms.damaged.iter().chain(&envelopes.damaged);
    let mut lines: Vec<_> = of_vms.map(|row| finding(row, &names)).collect();
    let others = other_rows(keystore, host_store, &names);
    lines.extend(others.unwrap_or_else(|error| {
        vec![Finding::of(
            FindingCode::KeystoreUnreadable,
            Subject::Host,
            error.into(),
        )]
    }));
    lines
}

fn other_rows(
    keystore: &dyn EnvelopeStore,
    host_store: &HostStore,
    names: &VmNames,
) -> Result<Vec<Finding>, StoreError> {
    let others = [
        keystore.providers()?.damaged,
        keystore.deleted_providers()?.damaged,
        host_store.needed_keks()?.damaged,
        keystore.retired_keks()?.damaged,
        keystore.made_keks()?.damaged,
        host_store.saved_states()?.damaged,
        host_store.master_keys_on_disk()?.damaged,
        host_store.autostarts()?.damaged,
        host_store.journaled_headers()?.damaged,
        keystore.jobs(u32::MAX)?.damaged,
    ];
    Ok(others.iter().flatten().map(|row| finding(row, names)).collect())
}

/// What is wrong, and what leads out.
pub(super) fn finding(row: &DamagedRow, names: &VmNames) -> Finding {
    let name = row.vm.map(|vm| names.of(vm));
    let Some(name) = name else {
        return Finding::critical(FindingCode::RecordDamaged, Subject::Host, row.to_string())
            .next(from_backup());
    };
    let what = format!("{row} (VM {name})");
    let advice = if row.is_elsewhere {
        let kept = Advice::AdoptFrom("FILE".into()).note("with what forget has kept");
        let adopt = Advice::AdoptVm(name.clone()).note("which takes it from the XML or the image");
        let forget = Advice::ForgetVm(name.clone())
            .note("which keeps the bytes of the record, and lets all else go on");
        let without = Advice::UndefineVm(name.clone()).then(forget);
        let instead = kept
            .or(from_backup())
            .or_else(Advice::from("without any copy").within(without));
        adopt.also("if neither has it").within(instead)
    } else {
        from_backup()
    };
    Finding::critical(FindingCode::RecordDamaged, Subject::Vm(name), what).next(advice)
}
