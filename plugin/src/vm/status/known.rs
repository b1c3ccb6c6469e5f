//! What the keystore has, in the ways that a status asks for it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::damaged;
use super::standing::{Found, Owner};
use crate::api::VmAutostart;
use crate::config::Policies;
use crate::domain::{Domain, Object, ObjectState, Policy};
use crate::host::libvirt::DomainEntry;
use crate::host::permitted::{PathError, PathRule, PermittedPath};
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeId, ObjectKind, VmId};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::object::Inspected;
use crate::recipients::Outlook;
use crate::store::{Autostart, EnvelopeRecord, EnvelopeState, Rows, VmRecord};
use crate::vm::has_run::HasRun;
use crate::vm::names::{ProviderNames, VmNames};
use crate::vm::start::Kept;
use crate::vm::whose::Whose;

/// What a host knows of its VMs.
#[derive(Debug, Default)]
pub(crate) struct Known {
    rule: PathRule,
    pub(super) swtpm_dir: PathBuf,
    pub(super) providers: ProviderNames,
    names: VmNames,
    vms: BTreeMap<VmId, VmRecord>,
    by_id: BTreeMap<EnvelopeId, EnvelopeRecord>,
    by_vm: BTreeMap<VmId, Vec<EnvelopeId>>,
    by_place: BTreeMap<String, EnvelopeId>,
    damaged: BTreeMap<VmId, Vec<Finding>>,
    /// Those that virtseald starts with this host.
    autostarts: BTreeSet<VmId>,
    /// What is left in their rows, of envelopes whose rows are damaged.
    damaged_envelopes: BTreeMap<EnvelopeId, Kept>,
    /// Why QEMU's master key is on a disk while the VM runs.
    master_keys_on_disk: BTreeMap<VmId, String>,
    /// Those whose memory `virsh save` has written to a file.
    saved_to_a_file: BTreeSet<VmId>,
    policies: Policies,
    pub(super) outlook: Outlook,
    pub(super) inspected: Arc<Inspected>,
}

impl Known {
    /// What the keystore has of all VMs.
    pub(crate) fn new(vms: Rows<VmRecord>, envelopes: Rows<EnvelopeRecord>) -> Self {
        let mut known = Self {
            names: VmNames::of_records(&vms.sound),
            ..Self::default()
        };
        for row in vms.damaged.iter().chain(&envelopes.damaged) {
            let Some(vm) = row.vm else { continue };
            let finding = damaged::finding(row, &known.names);
            known.damaged.entry(vm).or_default().push(finding);
        }
        for row in envelopes.damaged {
            let Some(id) = row.envelope else { continue };
            let kept = Kept {
                record: None,
                damaged: Some(row.to_string()),
                held: row.holds.map(|held| held.envelope),
            };
            known.damaged_envelopes.insert(id, kept);
        }
        known.vms = vms.sound.into_iter().map(|record| (record.vm, record)).collect();
        for record in envelopes.sound {
            let id = record.envelope.id;
            known.by_vm.entry(record.envelope.vm).or_default().push(id);
            if !record.location.is_empty() {
                known.by_place.insert(record.location.clone(), id);
            }
            known.by_id.insert(id, record);
        }
        known
    }

    /// Where files are looked at, where libvirt keeps vTPM state, and which providers there are.
    #[must_use]
    pub(crate) fn on_host(self, rule: PathRule, swtpm_dir: PathBuf, providers: ProviderNames) -> Self {
        Self {
            rule: rule.for_one_look(),
            swtpm_dir,
            providers,
            ..self
        }
    }

    /// Whether anything is kept of it.
    pub(crate) fn has(&self, vm: VmId) -> bool {
        self.vms.contains_key(&vm) || self.by_vm.contains_key(&vm) || self.damaged.contains_key(&vm)
    }

    /// The VMs that are known by name.
    pub(crate) fn vms(&self) -> impl Iterator<Item = &VmRecord> {
        self.vms.values()
    }

    /// Which VMs were started with QEMU's master key on a disk, and why.
    #[must_use]
    pub(crate) fn with_master_keys_on_disk(self, noted: Vec<(VmId, String)>) -> Self {
        let master_keys_on_disk = noted.into_iter().collect();
        Self {
            master_keys_on_disk,
            ..self
        }
    }

    /// Which VMs virtseald starts with this host.
    #[must_use]
    pub(crate) fn with_autostarts(self, kept: &[Autostart]) -> Self {
        let autostarts = kept.iter().map(|kept| kept.vm).collect();
        Self { autostarts, ..self }
    }

    /// Who starts a VM with the host.
    pub(super) fn autostart(&self, vm: VmId, defined: Option<&DomainEntry>) -> VmAutostart {
        if self.autostarts.contains(&vm) {
            VmAutostart::Virtseald
        } else if defined.is_some_and(|defined| defined.autostart) {
            VmAutostart::Libvirt
        } else {
            VmAutostart::No
        }
    }

    /// Which VMs have their memory in a file that `virsh save` has written.
    #[must_use]
    pub(crate) fn with_saved_to_a_file(self, vms: impl Iterator<Item = VmId>) -> Self {
        let saved_to_a_file = vms.collect();
        Self {
            saved_to_a_file,
            ..self
        }
    }

    /// What decides about starts: the host's policy, and how the providers are.
    #[must_use]
    pub(crate) fn with_outlook(self, policies: Policies, outlook: Outlook) -> Self {
        Self {
            policies,
            outlook,
            ..self
        }
    }

    /// Files that have not changed are not opened again.
    #[must_use]
    pub(crate) fn with_inspected(self, inspected: &Arc<Inspected>) -> Self {
        let inspected = Arc::clone(inspected);
        Self { inspected, ..self }
    }

    pub(super) fn policy_of(&self, domain: &Domain) -> Policy {
        self.policies.of(domain)
    }

    /// As a start reads it.
    pub(super) fn kept(&self, id: EnvelopeId) -> Kept {
        let damaged = || self.damaged_envelopes.get(&id).cloned().unwrap_or_default();
        self.by_id.get(&id).map_or_else(damaged, |record| Kept {
            record: Some(record.clone()),
            ..Kept::default()
        })
    }

    /// Of an envelope that is not for the VM that names it.
    pub(super) fn whose(&self, envelope: &Envelope) -> Whose {
        let place = self.by_id.get(&envelope.id).map(|record| record.location.clone());
        Whose {
            owner: self.vms.get(&envelope.vm).map(|record| record.name.clone()),
            place,
        }
    }

    /// Its memory, which holds what the guest has decrypted, in a file that nothing encrypts.
    pub(super) fn saved(&self, defined: &DomainEntry) -> Option<Finding> {
        let name = &defined.name;
        let (what, advice) = if defined.managed_save {
            let go_on = Advice::StartVm(name.clone()).note("which goes on from it and deletes it");
            let drop =
                Advice::DropSavedState(name.clone()).note("which loses what was not written to its disks");
            (
                format!("{name} has a managed save: its memory is in plaintext on a disk of this host"),
                go_on.or_else(drop),
            )
        } else if self.saved_to_a_file.contains(&defined.vm) && !defined.active {
            (
                format!("{name} was saved to a file: its memory is in plaintext in there"),
                Advice::RestoreSaved.then("delete that file"),
            )
        } else {
            return None;
        };
        Some(Finding::warning(FindingCode::MemorySaved, Subject::Vm(name.clone()), what).next(advice))
    }

    /// What the hook lets pass only where hook.conf has `master_key_tmpfs = preferred`.
    pub(crate) fn master_key_on_disk(&self, domain: &Domain) -> Option<Finding> {
        let why = self.master_keys_on_disk.get(&domain.uuid)?;
        let name = &domain.name;
        let what = format!(
            "QEMU's master key for {name} is on the disk while it runs, and opens its passphrases in libvirt's log: no tmpfs for it: \
             {why}"
        );
        let start_anew = Advice::ShutDownVm(name.clone()).then(Advice::StartVm(name.clone()));
        let advice = Advice::from("make that tmpfs possible").then(start_anew);
        Some(Finding::warning(FindingCode::MasterKeyOnDisk, Subject::Vm(name.clone()), what).next(advice))
    }

    pub(super) fn damaged_of(&self, vm: VmId) -> Vec<Finding> {
        self.damaged.get(&vm).cloned().unwrap_or_default()
    }

    pub(super) fn names(&self, vms: &[VmId]) -> Vec<String> {
        vms.iter().map(|vm| self.names.of(*vm)).collect()
    }

    pub(super) fn envelope(&self, id: EnvelopeId) -> Option<&Envelope> {
        self.by_id.get(&id).map(|record| &record.envelope)
    }

    pub(super) fn records_of(&self, vm: VmId) -> impl Iterator<Item = &EnvelopeRecord> {
        let ids = self.by_vm.get(&vm).into_iter().flatten();
        ids.filter_map(|id| self.by_id.get(id))
    }

    fn at_place(&self, place: &Path) -> Option<&EnvelopeRecord> {
        let id = self.by_place.get(&place.display().to_string())?;
        self.by_id.get(id)
    }

    /// A path that the XML of a VM names. Also of what others share with it.
    ///
    /// # Errors
    /// Where root does not look.
    pub(crate) fn permit(&self, vm: VmId, path: &Path) -> Result<PermittedPath, PathError> {
        let is_its = self
            .records_of(vm)
            .any(|record| Path::new(&record.location) == path)
            || self
                .at_place(path)
                .is_some_and(|record| record.envelope.serves(vm));
        self.rule.permit_known(path, is_its.then_some(path).into_iter())
    }

    /// The envelope of an object: the one that the XML names, else the one that its image carries, else the one that was made
    /// for its place.
    pub(super) fn of(
        &self,
        vm: VmId,
        object: &Object,
        found: &Found,
        path: Option<&Path>,
    ) -> Option<&Envelope> {
        if let ObjectState::Sealed(id) = &object.state {
            return self.envelope(*id);
        }
        if let Found::Encrypted(Some((id, _))) = found {
            return self.envelope(*id);
        }
        let at_place = path.and_then(|path| self.at_place(path));
        // A variable store may have been moved, and a vTPM has no place of its own.
        let of_kind = || {
            let of_vm = || {
                self.records_of(vm)
                    .filter(|record| record.envelope.kind == object.kind)
            };
            let active = |record: &&EnvelopeRecord| record.state == EnvelopeState::Active;
            of_vm().find(active).or_else(|| of_vm().last())
        };
        let record = match object.kind {
            ObjectKind::Disk => at_place,
            _ => at_place.or_else(of_kind),
        };
        record.map(|record| &record.envelope)
    }

    pub(super) fn has_run(&self, vm: VmId) -> HasRun {
        let noted = self.vms.get(&vm).is_some_and(|record| record.vtpm_seen);
        let envelopes: Vec<_> = self.records_of(vm).map(|record| &record.envelope).collect();
        HasRun::by_records(&envelopes, noted)
    }
}

/// Whether the VM may have the object of an envelope. One that only the XML has may claim to be shared with anybody.
pub(super) fn owner(kept: Option<&Envelope>, in_xml: Option<&Envelope>, vm: VmId) -> Option<Owner> {
    let (envelope, is_its) = match (kept, in_xml) {
        (Some(kept), _) => (kept, kept.serves(vm)),
        (None, Some(copy)) => (copy, copy.vm == vm),
        (None, None) => return None,
    };
    Some(if is_its {
        Owner::This
    } else {
        Owner::Other(envelope.vm)
    })
}
