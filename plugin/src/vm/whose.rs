//! Objects of one VM in the XML of another: shared without a word of root's, or copied, as virt-clone does.

use std::path::Path;

use crate::model::advice::Advice;
use crate::model::envelope::Envelope;
use crate::model::problem::Problem;
use crate::store::EnvelopeStore;

/// Of which VM this host has an envelope, and where its object is.
#[derive(Debug, Default)]
pub(crate) struct Whose {
    pub owner: Option<String>,
    pub place: Option<String>,
}

impl Whose {
    pub(crate) fn in_keystore(keystore: &dyn EnvelopeStore, envelope: &Envelope) -> Self {
        let record = keystore.readable_envelope(envelope.id).ok().flatten();
        let owner = keystore.vm(envelope.vm).ok().flatten();
        Self {
            owner: owner.map(|vm| vm.name),
            place: record.map(|record| record.location),
        }
    }

    /// Why the VM called `vm` can't have the object of another at `path`: that may share it, unless it is a copy.
    pub(crate) fn refuse(&self, envelope: &Envelope, vm: &str, path: Option<&Path>) -> Problem {
        let (id, other) = (envelope.id, envelope.vm);
        let owner = match &self.owner {
            Some(owner) => format!("{owner} (VM {other})"),
            None => format!("VM {other}"),
        };
        match (path, &self.place) {
            (Some(path), Some(place)) if path == Path::new(place) => {
                let share = Advice::ShareVolume {
                    path: path.to_owned(),
                    vm: vm.to_owned(),
                };
                Problem::denied(format!(
                    "it is {owner}'s, which does not share it (envelope {id})"
                ))
                .next(share.note("if it may have it").or_else(own_objects(vm)))
            }
            _ => Problem::failed(format!(
                "it was copied from {owner}, as virt-clone does, and its key is that VM's alone (envelope {id})"
            ))
            .next(own_objects(vm)),
        }
    }
}

/// What makes a copy a VM of its own. What was copied stays closed to it.
pub(crate) fn own_objects(vm: &str) -> Advice {
    Advice::EditXml(vm.to_owned())
        .within("remove <virtseal:vm> and each <encryption>, and name new files for its disks and variables")
        .then(Advice::CreateVolume {
            path: "FILE".into(),
            vm: vm.to_owned(),
        })
        .then(Advice::SealVm(vm.to_owned()))
}
