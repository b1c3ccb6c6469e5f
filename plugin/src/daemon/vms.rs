//! The VMs of this host: those that libvirt has, and those that only the keystore knows.

use std::collections::{BTreeMap, BTreeSet};

use super::Daemon;
use crate::host::libvirt::{DefinedDomain, LibvirtError};
use crate::model::envelope::VmId;
use crate::model::problem::{Code, Problem, chain};
use crate::store::VmRecord;

/// How many names a message has.
const NAMED: usize = 8;

/// A VM that has a name here.
pub(super) enum KnownVm {
    /// libvirt has it.
    Defined(DefinedDomain),
    /// Only the keystore does.
    Undefined(VmRecord),
}

/// The names of the VMs that the keystore knows.
pub(super) struct VmNames(BTreeMap<VmId, String>);

impl VmNames {
    /// Its UUID, if it has no name.
    pub(super) fn of(&self, vm: VmId) -> String {
        self.0.get(&vm).cloned().unwrap_or_else(|| vm.to_string())
    }
}

impl Daemon {
    /// The VM with this name or UUID.
    pub(super) fn find_vm(&self, vm: &str) -> Result<KnownVm, Problem> {
        let absent = match self.find_domain(vm) {
            Ok(defined) => return Ok(KnownVm::Defined(defined)),
            Err(absent) if absent.code == Code::NotFound => absent,
            Err(failure) => return Err(failure),
        };
        let mut known = self.keystore.vms()?.sound.into_iter();
        let found = known.find(|known| known.name == vm || vm.parse() == Ok(known.vm));
        found.map(KnownVm::Undefined).ok_or(absent)
    }

    /// The domain with this name or UUID.
    pub(super) fn find_domain(&self, vm: &str) -> Result<DefinedDomain, Problem> {
        let found = self.background.domain(vm).map_err(|error| unreachable(&error))?;
        found.ok_or_else(|| {
            Problem::new(Code::NotFound, format!("there is no VM '{vm}'")).next("virsh list --all")
        })
    }

    /// A UUID needs no libvirt: the VM may be defined later.
    pub(super) fn vm_id(&self, vm: &str) -> Result<VmId, Problem> {
        if let Ok(id) = vm.parse() {
            return Ok(id);
        }
        let found = self.background.domain(vm).map_err(|error| {
            Problem::new(Code::Unreachable, chain(&error)).next("virtseal status, or give its UUID")
        })?;
        found.map(|domain| domain.vm).ok_or_else(|| {
            Problem::new(Code::NotFound, format!("there is no VM '{vm}'"))
                .next("define it first, or give the UUID that it will have")
        })
    }

    pub(super) fn vm_names(&self) -> Result<VmNames, Problem> {
        let vms = self.keystore.vms()?.sound.into_iter();
        Ok(VmNames(vms.map(|known| (known.vm, known.name)).collect()))
    }

    /// `12 objects of 4 VMs (a, b, c, d)`, given the VM of each object.
    pub(super) fn objects_of_vms(&self, objects: &[VmId]) -> Result<String, Problem> {
        let names = self.vm_names()?;
        let vms: BTreeSet<String> = objects.iter().map(|vm| names.of(*vm)).collect();
        Ok(format!(
            "{} objects of {} VMs ({})",
            objects.len(),
            vms.len(),
            some_of(&vms)
        ))
    }
}

/// The first of them, and how many more there are.
pub(super) fn some_of(names: &BTreeSet<String>) -> String {
    let mut named: Vec<_> = names.iter().take(NAMED).cloned().collect();
    if names.len() > NAMED {
        named.push(format!("{} more", names.len() - NAMED));
    }
    named.join(", ")
}

/// For a command that can't do without libvirt.
pub(super) fn unreachable(error: &LibvirtError) -> Problem {
    Problem::new(Code::Unreachable, chain(error)).next("virtseal status")
}
