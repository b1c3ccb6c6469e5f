//! Which secrets libvirt holds for which starting VM.

use std::collections::{BTreeMap, BTreeSet};

use crate::envelope::{EnvelopeId, VmId};

/// Counts the VMs that an armed secret serves: a shareable disk may be starting in two at once, and is disarmed
/// when the last one is done with it.
#[derive(Debug, Default)]
pub struct Arms {
    armed: BTreeMap<EnvelopeId, BTreeSet<VmId>>,
}

impl Arms {
    /// Notes that `vm` needs `envelopes`.
    pub fn arm(&mut self, vm: VmId, envelopes: impl IntoIterator<Item = EnvelopeId>) {
        for envelope in envelopes {
            self.armed.entry(envelope).or_default().insert(vm);
        }
    }

    /// Notes that `vm` is done; says which secrets no VM needs any more.
    #[must_use]
    pub fn disarm(&mut self, vm: VmId) -> Vec<EnvelopeId> {
        let mut unused = Vec::new();
        self.armed.retain(|envelope, vms| {
            if vms.remove(&vm) && vms.is_empty() {
                unused.push(*envelope);
            }
            !vms.is_empty()
        });
        unused
    }

    /// How many secrets are armed.
    #[must_use]
    pub fn len(&self) -> usize {
        self.armed.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.armed.is_empty()
    }

    /// Whether any VM needs this secret now.
    #[must_use]
    pub fn needs(&self, envelope: EnvelopeId) -> bool {
        self.armed.contains_key(&envelope)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_shared_disk_stays_armed_until_the_last_vm_is_done() {
        let (web, db) = (VmId::random(), VmId::random());
        let (shared, own) = (EnvelopeId::random(), EnvelopeId::random());
        let mut arms = Arms::default();
        arms.arm(web, [shared, own]);
        arms.arm(db, [shared]);
        assert_eq!(arms.disarm(web), [own]);
        assert!(arms.needs(shared));
        assert_eq!(arms.disarm(web), []);
        assert_eq!(arms.disarm(db), [shared]);
        assert!(arms.is_empty());
    }

    proptest! {
        /// Whatever the order of starts and ends, a secret is taken away exactly when its last VM is done.
        #[test]
        fn nothing_stays_armed(steps in prop::collection::vec((any::<bool>(), 0u128..4, 0u128..4), 0..60)) {
            let mut arms = Arms::default();
            for (arm, vm, envelope) in steps {
                let (vm, envelope) = (VmId(Uuid::from_u128(vm)), EnvelopeId(Uuid::from_u128(envelope)));
                if arm {
                    arms.arm(vm, [envelope]);
                    prop_assert!(arms.needs(envelope));
                } else {
                    for gone in arms.disarm(vm) {
                        prop_assert!(!arms.needs(gone));
                    }
                }
            }
            for vm in 0..4 {
                let _ = arms.disarm(VmId(Uuid::from_u128(vm)));
            }
            prop_assert!(arms.is_empty());
        }
    }
}
