//! VMs that `virsh save` has written to a file: where that is, libvirt does not say, and the envelopes in it need their
//! providers all the same. Noted when such a VM has ended, until it runs again.

use super::Daemon;
use crate::domain::Metadata;
use crate::host::libvirt::Whereabouts;
use crate::model::envelope::{Envelope, VmId};
use crate::model::problem::{Problem, chain};
use crate::vm::names;

/// For a hook, which waits for nothing: libvirt is asked behind it.
pub(super) fn look_later(daemon: &Daemon, vm: &str) {
    if let Ok(vm) = vm.parse() {
        daemon.changed_vms.lock().insert(vm);
        daemon.notes_bell.ring();
    }
}

/// Looks at the VMs that have started or ended since.
pub(super) fn note_all(daemon: &Daemon) {
    let changed = std::mem::take(&mut *daemon.changed_vms.lock());
    for vm in changed {
        if let Err(failure) = note(daemon, vm) {
            tracing::warn!(%vm, "it is not known whether it was saved to a file: {failure}");
        }
    }
}

fn note(daemon: &Daemon, vm: VmId) -> Result<(), Problem> {
    let kept = daemon.keystore.envelopes_of(vm)?;
    if kept.is_empty() {
        return Ok(());
    }
    let found = daemon.background.whereabouts(vm);
    match found.map_err(|error| names::unreachable(&error))? {
        Some(Whereabouts::Running) => Ok(daemon.host_store.forget_saved(vm)?),
        Some(Whereabouts::SavedToAFile(xml)) => {
            let kept = kept.sound.into_iter().map(|record| record.envelope);
            tracing::info!(%vm, "its state was saved to a file");
            Ok(daemon.host_store.note_saved(vm, &in_file(vm, kept, &xml))?)
        }
        Some(Whereabouts::Off) | None => Ok(()),
    }
}

/// What the file has is what the XML had, or a moment later the keystore: rather too many than one too few.
fn in_file(vm: VmId, kept: impl Iterator<Item = Envelope>, xml: &str) -> Vec<Envelope> {
    let mut envelopes: Vec<_> = kept.collect();
    match Metadata::envelopes_in(xml) {
        Ok((copies, _)) => envelopes.extend(copies),
        Err(error) => tracing::warn!(%vm, "its metadata can't be read: {}", chain(&error)),
    }
    envelopes
}
