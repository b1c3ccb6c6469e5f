//! Which VMs the hook takes for sealed: it lets none of them start by an XML that does not say so.
//!
//! A VM is marked before the first of its objects is replaced, because from then on its old XML would show the guest ciphertext,
//! and write on it. The mark goes when nothing of the VM is encrypted.

use super::Daemon;
use crate::api::Outcome;
use crate::domain::{self, Domain};
use crate::failure::Failure;
use crate::libvirt::DefinedDomain;
use crate::volume;

impl Daemon {
    /// Runs `seal` with the VM marked; a VM of which nothing was sealed starts as before.
    pub(super) fn while_marked<T>(
        &self,
        vm: &DefinedDomain,
        seal: impl FnOnce() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let was_sealed = self.keystore.is_sealed(vm.vm)?;
        self.keystore.remember_vm(vm.vm, &vm.name)?;
        seal().inspect_err(|_| {
            if !was_sealed && nothing_is_encrypted(&vm.xml) {
                // Else the next `vm seal` or `vm unseal` of it does.
                let _ = self.keystore.note_plain(vm.vm);
            }
        })
    }

    /// Takes the mark from a plain VM, if it has no more of a sealed one: a seal was interrupted before it did anything, or the
    /// VM was brought back from a plain backup. `None` for any other VM.
    pub(super) fn unmark(&self, vm: &DefinedDomain, dry_run: bool) -> Result<Option<Outcome>, Failure> {
        let is_plain = Domain::parse(&vm.xml).is_ok_and(|domain| domain.metadata.is_none());
        if !is_plain || !self.keystore.is_sealed(vm.vm)? || !nothing_is_encrypted(&vm.xml) {
            return Ok(None);
        }
        if !dry_run {
            self.keystore.note_plain(vm.vm)?;
        }
        Ok(Some(Outcome {
            steps: vec!["let it start as it is: nothing of it is encrypted".into()],
            warnings: vec!["the keys stay in the keystore".into()],
            changed: !dry_run,
        }))
    }
}

/// Whether every file that the XML names is there, and plain. In doubt it is not.
fn nothing_is_encrypted(xml: &str) -> bool {
    let Ok(domain) = Domain::parse(xml) else {
        return false;
    };
    domain::encrypted_layers(&domain).is_empty()
        && domain::objects(&domain).iter().all(|object| {
            object
                .path
                .as_ref()
                .is_none_or(|path| match volume::inspect(path) {
                    Ok(info) => !info.format.is_encrypted(),
                    Err(volume::VolumeError::NotFound(_)) => {
                        object.kind == crate::envelope::ObjectKind::Nvram
                    }
                    Err(_) => false,
                })
        })
}
