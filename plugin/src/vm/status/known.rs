//! What the keystore has, in the ways that a status asks for it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::damaged;
use super::standing::{Found, Owner, Used};
use crate::domain::{Object, ObjectState};
use crate::host::permitted::{PathError, PathRule, PermittedPath};
use crate::model::envelope::{Envelope, EnvelopeId, ObjectKind, VmId};
use crate::model::finding::Finding;
use crate::store::{EnvelopeRecord, EnvelopeState, Rows, VmRecord};
use crate::vm::names::{ProviderNames, VmNames};

/// What a host knows of its VMs.
#[derive(Debug, Default)]
pub struct Known {
    rule: PathRule,
    pub(super) swtpm_dir: PathBuf,
    pub(super) providers: ProviderNames,
    names: VmNames,
    vms: BTreeMap<VmId, VmRecord>,
    by_id: BTreeMap<EnvelopeId, EnvelopeRecord>,
    by_vm: BTreeMap<VmId, Vec<EnvelopeId>>,
    by_place: BTreeMap<String, EnvelopeId>,
    damaged: BTreeMap<VmId, Vec<Finding>>,
}

impl Known {
    /// What the keystore has of all VMs.
    #[must_use]
    pub fn new(vms: Rows<VmRecord>, envelopes: Rows<EnvelopeRecord>) -> Self {
        let mut known = Self {
            names: VmNames::of_records(&vms.sound),
            ..Self::default()
        };
        for row in vms.damaged.iter().chain(&envelopes.damaged) {
            let Some(vm) = row.vm else { continue };
            let finding = damaged::finding(row, &known.names);
            known.damaged.entry(vm).or_default().push(finding);
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
    pub fn on_host(self, rule: PathRule, swtpm_dir: PathBuf, providers: ProviderNames) -> Self {
        Self {
            rule,
            swtpm_dir,
            providers,
            ..self
        }
    }

    /// Whether anything is kept of it.
    #[must_use]
    pub fn has(&self, vm: VmId) -> bool {
        self.vms.contains_key(&vm) || self.by_vm.contains_key(&vm) || self.damaged.contains_key(&vm)
    }

    /// The VMs that are known by name.
    pub fn vms(&self) -> impl Iterator<Item = &VmRecord> {
        self.vms.values()
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
    pub fn permit(&self, vm: VmId, path: &Path) -> Result<PermittedPath, PathError> {
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

    /// Only an envelope of format 2, which the keystore has, tells that a vTPM was not used.
    pub(super) fn used(&self, vm: VmId) -> Used {
        let noted = self.vms.get(&vm).is_some_and(|record| record.vtpm_seen);
        let vtpms = || {
            let envelopes = self.records_of(vm).map(|record| &record.envelope);
            envelopes.filter(|envelope| envelope.kind.is_made_at_first_start())
        };
        if noted || vtpms().any(|envelope| envelope.seen) {
            return Used::Yes;
        }
        let tells = |envelope: &Envelope| envelope.format() == Envelope::FORMAT;
        if vtpms().next().is_some() && vtpms().all(tells) {
            Used::No
        } else {
            Used::NotKnown
        }
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
