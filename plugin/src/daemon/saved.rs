//! VMs that `virsh save` has written to a file: where that is, libvirt does not say, and the envelopes in it need their
//! providers all the same. Noted when such a VM has ended, until it runs again.

use super::{Daemon, lock};
use crate::domain::Metadata;
use crate::host::libvirt::Whereabouts;
use crate::model::envelope::VmId;
use crate::model::problem::{Problem, chain};

impl Daemon {
    /// For a hook, which waits for nothing: libvirt is asked behind it.
    pub(super) fn look_later(&self, vm: &str) {
        if let Ok(vm) = vm.parse() {
            lock(&self.changed_vms).insert(vm);
        }
    }

    /// Looks at the VMs that have started or ended since.
    pub(super) fn note_saved_states(&self) {
        let changed = std::mem::take(&mut *lock(&self.changed_vms));
        for vm in changed {
            if let Err(failure) = self.note_whereabouts(vm) {
                tracing::warn!(%vm, "it is not known whether it was saved to a file: {failure}");
            }
        }
    }

    fn note_whereabouts(&self, vm: VmId) -> Result<(), Problem> {
        let known = self.keystore.envelopes_of(vm)?;
        if known.is_empty() {
            return Ok(());
        }
        let found = self
            .background
            .whereabouts(vm)
            .map_err(|error| super::vms::unreachable(&error))?;
        match found {
            Some(Whereabouts::Running) => Ok(self.keystore.forget_saved(vm)?),
            Some(Whereabouts::SavedToAFile(xml)) => {
                // What the file has is what the XML had, or a moment later the keystore: rather too many than one too few.
                let mut envelopes: Vec<_> = known.sound.into_iter().map(|record| record.envelope).collect();
                match Metadata::envelopes_in(&xml) {
                    Ok((copies, _)) => envelopes.extend(copies),
                    Err(error) => tracing::warn!(%vm, "its metadata can't be read: {}", chain(&error)),
                }
                tracing::info!(%vm, "its state was saved to a file");
                Ok(self.keystore.note_saved(vm, &envelopes)?)
            }
            Some(Whereabouts::Off) | None => Ok(()),
        }
    }
}
