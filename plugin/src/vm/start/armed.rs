//! Which secrets libvirt holds for which starting VM.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::model::envelope::{EnvelopeId, VmId};

/// Counts the VMs that an armed secret serves: a shareable disk may be starting in two at once, and is disarmed
/// when the last one is done with it.
#[derive(Debug, Default)]
pub struct ArmedSecrets {
    armed: BTreeMap<EnvelopeId, BTreeSet<VmId>>,
    /// Since when each VM is starting.
    since: BTreeMap<VmId, Instant>,
}

/// A start of which nothing was heard for long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overdue {
    /// Its VM.
    pub vm: VmId,
    since: Instant,
}

impl ArmedSecrets {
    /// Notes that `vm` needs `envelopes`.
    pub fn arm(&mut self, vm: VmId, envelopes: impl IntoIterator<Item = EnvelopeId>) {
        self.since.insert(vm, Instant::now());
        for envelope in envelopes {
            self.armed.entry(envelope).or_default().insert(vm);
        }
    }

    /// Notes that `vm` is done; says which secrets no VM needs any more.
    #[must_use]
    pub fn disarm(&mut self, vm: VmId) -> Vec<EnvelopeId> {
        self.since.remove(&vm);
        let mut unused = Vec::new();
        self.armed.retain(|envelope, vms| {
            if vms.remove(&vm) && vms.is_empty() {
                unused.push(*envelope);
            }
            !vms.is_empty()
        });
        unused
    }

    /// The starts that were armed longer than `limit` ago, and when the next one will be.
    #[must_use]
    pub fn overdue(&self, limit: Duration) -> (Vec<Overdue>, Option<Duration>) {
        let (mut overdue, mut next) = (Vec::new(), None::<Duration>);
        for (vm, since) in &self.since {
            match limit.saturating_sub(since.elapsed()) {
                Duration::ZERO => overdue.push(Overdue {
                    vm: *vm,
                    since: *since,
                }),
                left => next = Some(next.map_or(left, |next| next.min(left))),
            }
        }
        (overdue, next)
    }

    /// As [`ArmedSecrets::disarm`], unless that start has ended meanwhile, and perhaps another one has begun.
    #[must_use]
    pub fn disarm_overdue(&mut self, start: Overdue) -> Vec<EnvelopeId> {
        if self.since.get(&start.vm) == Some(&start.since) {
            self.disarm(start.vm)
        } else {
            Vec::new()
        }
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
        let mut arms = ArmedSecrets::default();
        arms.arm(web, [shared, own]);
        arms.arm(db, [shared]);
        assert_eq!(arms.disarm(web), [own]);
        assert!(arms.needs(shared));
        assert_eq!(arms.disarm(web), []);
        assert_eq!(arms.disarm(db), [shared]);
        assert!(arms.is_empty());
    }

    #[test]
    fn a_start_is_overdue_until_it_ends_or_another_begins() {
        let (web, db) = (VmId::random(), VmId::random());
        let (of_web, of_db) = (EnvelopeId::random(), EnvelopeId::random());
        let mut arms = ArmedSecrets::default();
        arms.arm(web, [of_web]);
        let (none, next) = arms.overdue(Duration::from_secs(60));
        assert!(none.is_empty() && next.is_some_and(|next| next > Duration::from_secs(50)));
        arms.arm(db, [of_db]);
        let (overdue, next) = arms.overdue(Duration::ZERO);
        assert_eq!((overdue.len(), next), (2, None));
        let first = overdue.into_iter().find(|start| start.vm == web).unwrap();
        // It starts anew before libvirt has answered.
        assert_eq!(arms.disarm(web), [of_web]);
        assert_eq!(arms.disarm_overdue(first), []);
        arms.arm(web, [of_web]);
        assert_eq!(arms.disarm_overdue(first), []);
        let (overdue, _) = arms.overdue(Duration::ZERO);
        let second = overdue.into_iter().find(|start| start.vm == web).unwrap();
        assert_eq!(arms.disarm_overdue(second), [of_web]);
        assert!(arms.needs(of_db));
    }

    proptest! {
        /// Whatever the order of starts and ends, a secret is taken away exactly when its last VM is done.
        #[test]
        fn nothing_stays_armed(steps in prop::collection::vec((any::<bool>(), 0u128..4, 0u128..4), 0..60)) {
            let mut arms = ArmedSecrets::default();
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
