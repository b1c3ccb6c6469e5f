//! Which VMs the hook takes for sealed: it lets none of them start by an XML that does not say so.
//!
//! A VM is marked before the first of its objects is replaced, because from then on its old XML would show the guest ciphertext,
//! and write on it. The mark goes when nothing of the VM is encrypted.

use super::Daemon;
use crate::api::Outcome;
use crate::domain::{self, Domain};
use crate::host::libvirt::DefinedDomain;
use crate::model::envelope::ObjectKind;
use crate::model::problem::Problem;
use crate::object::disk::{self, VolumeError};

impl Daemon {
    /// Runs `seal` with the VM marked; a VM of which nothing was sealed starts as before.
    pub(super) fn while_marked<T>(
        &self,
        vm: &DefinedDomain,
        seal: impl FnOnce() -> Result<T, Problem>,
    ) -> Result<T, Problem> {
        let was_sealed = self.keystore.is_sealed(vm.vm)?;
        self.keystore.remember_vm(vm.vm, &vm.name)?;
        seal().inspect_err(|_| {
            if !was_sealed && self.nothing_is_encrypted(vm).unwrap_or(false) {
                // Else the next `vm seal` or `vm unseal` of it does.
                let _ = self.keystore.note_plain(vm.vm);
            }
        })
    }

    /// Takes the mark from a plain VM, if it has no more of a sealed one: a seal was interrupted before it did anything, or the
    /// VM was brought back from a plain backup. `None` for any other VM.
    pub(super) fn unmark(&self, vm: &DefinedDomain, dry_run: bool) -> Result<Option<Outcome>, Problem> {
        let is_plain = Domain::parse(&vm.xml).is_ok_and(|domain| domain.metadata.is_none());
        if !is_plain || !self.keystore.is_sealed(vm.vm)? || !self.nothing_is_encrypted(vm)? {
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

    /// Whether every file that the XML names is there, and plain. In doubt it is not.
    ///
    /// # Errors
    /// Of a file where root does not look, with what permits it.
    fn nothing_is_encrypted(&self, vm: &DefinedDomain) -> Result<bool, Problem> {
        let Ok(domain) = Domain::parse(&vm.xml) else {
            return Ok(false);
        };
        if !domain::encrypted_layers(&domain).is_empty() {
            return Ok(false);
        }
        let (rule, known) = (self.path_rule(), self.locations_of(vm.vm)?);
        for object in domain::objects(&domain) {
            let Some(path) = object.path else { continue };
            let found = match rule.permit_known(&path, known.iter()) {
                Ok(place) => disk::inspect(&place),
                Err(error) if error.is_missing() => Err(VolumeError::NotFound(path)),
                Err(error) => return Err(error.into()),
            };
            let is_plain = match found {
                Ok(info) => !info.format.is_encrypted(),
                Err(VolumeError::NotFound(_)) => object.kind == ObjectKind::Nvram,
                Err(_) => false,
            };
            if !is_plain {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
