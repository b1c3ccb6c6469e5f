//! Which secrets libvirt holds for which starting VM.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Deadline;
use crate::model::deadlines::start::TICK;
use crate::model::envelope::{EnvelopeId, VmId};

/// Counts the VMs that an armed secret serves: a shareable disk may be starting in two at once, and is disarmed
/// when the last one is done with it.
///
/// libvirt may take long to undefine a secret. Only a start that needs that very one waits for it.
#[derive(Debug, Default)]
pub(crate) struct ArmedSecrets {
    state: Mutex<State>,
    gone: Condvar,
}

#[derive(Debug, Default)]
struct State {
    armed: BTreeMap<EnvelopeId, BTreeSet<VmId>>,
    /// Since when each VM is starting.
    since: BTreeMap<VmId, Instant>,
    /// How many are undefining each.
    leaving: BTreeMap<EnvelopeId, usize>,
}

/// A start of which nothing was heard for long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Overdue {
    pub vm: VmId,
    since: Instant,
}

/// Secrets that no VM needs any more. Until this is dropped, no start arms them: undefine them before.
#[derive(Debug)]
pub(crate) struct Leaving<'a> {
    of: &'a ArmedSecrets,
    envelopes: Vec<EnvelopeId>,
}

impl State {
    fn disarm(&mut self, vm: VmId) -> Vec<EnvelopeId> {
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

    fn arm(&mut self, vm: VmId, envelopes: &[EnvelopeId]) {
        self.since.insert(vm, Instant::now());
        for envelope in envelopes {
            self.armed.entry(*envelope).or_default().insert(vm);
        }
    }
}

impl ArmedSecrets {
    /// Notes that `vm` needs `envelopes`, once none of them is being undefined. Says whether somebody still waits for that.
    #[must_use]
    pub(crate) fn arm(&self, vm: VmId, envelopes: &[EnvelopeId], deadline: &Deadline) -> bool {
        let mut state = self.state();
        while envelopes.iter().any(|id| state.leaving.contains_key(id)) {
            if deadline.has_passed() {
                return false;
            }
            let waited = self.gone.wait_timeout(state, TICK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.arm(vm, envelopes);
        true
    }

    /// Notes that `vm` is done; says which secrets no VM needs any more.
    #[must_use]
    pub(crate) fn disarm(&self, vm: VmId) -> Leaving<'_> {
        self.leave(|state| state.disarm(vm))
    }

    /// As [`ArmedSecrets::disarm`], and those of `envelopes` too that no VM needs, whoever has disarmed them meanwhile.
    #[must_use]
    pub(crate) fn disarm_with(&self, vm: VmId, envelopes: Vec<EnvelopeId>) -> Leaving<'_> {
        self.leave(|state| {
            state.disarm(vm);
            unneeded(state, envelopes)
        })
    }

    /// Those of `envelopes` that no VM needs.
    #[must_use]
    pub(crate) fn unneeded(&self, envelopes: Vec<EnvelopeId>) -> Leaving<'_> {
        self.leave(|state| unneeded(state, envelopes))
    }

    /// The starts that were armed longer than `limit` ago, and when the next one will be.
    pub(crate) fn overdue(&self, limit: Duration) -> (Vec<Overdue>, Option<Duration>) {
        let (mut overdue, mut next) = (Vec::new(), None::<Duration>);
        for (&vm, &since) in &self.state().since {
            match limit.saturating_sub(since.elapsed()) {
                Duration::ZERO => overdue.push(Overdue { vm, since }),
                left => next = Some(next.map_or(left, |next| next.min(left))),
            }
        }
        (overdue, next)
    }

    /// As [`ArmedSecrets::disarm`], unless that start has ended meanwhile, and perhaps another one has begun.
    #[must_use]
    pub(crate) fn disarm_overdue(&self, start: Overdue) -> Leaving<'_> {
        self.leave(|state| match state.since.get(&start.vm) == Some(&start.since) {
            true => state.disarm(start.vm),
            false => Vec::new(),
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.state().armed.len()
    }

    pub(crate) fn needs(&self, envelope: EnvelopeId) -> bool {
        self.state().armed.contains_key(&envelope)
    }

    fn leave(&self, choose: impl FnOnce(&mut State) -> Vec<EnvelopeId>) -> Leaving<'_> {
        let mut state = self.state();
        let envelopes = choose(&mut state);
        for envelope in &envelopes {
            *state.leaving.entry(*envelope).or_default() += 1;
        }
        Leaving { of: self, envelopes }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that a panic could leave half-done is kept behind it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unneeded(state: &State, mut envelopes: Vec<EnvelopeId>) -> Vec<EnvelopeId> {
    envelopes.retain(|envelope| !state.armed.contains_key(envelope));
    envelopes
}

impl Leaving<'_> {
    /// They could not be undefined: `vm` has them still, so that its end or its next start tries again.
    pub(crate) fn stay_armed(&self, vm: VmId) {
        self.of.state().arm(vm, &self.envelopes);
    }
}

impl Deref for Leaving<'_> {
    type Target = [EnvelopeId];

    fn deref(&self) -> &[EnvelopeId] {
        &self.envelopes
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        let mut state = self.of.state();
        for envelope in &self.envelopes {
            if let Some(count) = state.leaving.get_mut(envelope) {
                *count -= 1;
                if *count == 0 {
                    state.leaving.remove(envelope);
                }
            }
        }
        drop(state);
        self.of.gone.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(60))
    }

    #[test]
    fn only_who_needs_a_secret_that_is_being_undefined_waits_for_that() {
        let (web, db, mail) = (VmId::random(), VmId::random(), VmId::random());
        let (shared, own) = (EnvelopeId::random(), EnvelopeId::random());
        let arms = ArmedSecrets::default();
        assert!(arms.arm(web, &[shared], &soon()));
        let leaving = arms.disarm(web);
        assert!(arms.arm(mail, &[own], &soon()));
        assert!(!arms.arm(db, &[own, shared], &Deadline::after(Duration::ZERO)));
        assert!(
            !arms.needs(shared),
            "nothing is noted of a start that nobody waits for"
        );
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| arms.arm(db, &[shared], &soon()));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!waiting.is_finished());
            drop(leaving);
            assert!(waiting.join().unwrap());
        });
        assert_eq!(*arms.unneeded(vec![shared, own]), []);
        assert_eq!(*arms.disarm_with(mail, vec![own, shared]), [own]);
        arms.disarm(db).stay_armed(db);
        assert!(arms.needs(shared));
    }

    #[test]
    fn a_shared_disk_stays_armed_until_the_last_vm_is_done() {
        let (web, db) = (VmId::random(), VmId::random());
        let (shared, own) = (EnvelopeId::random(), EnvelopeId::random());
        let arms = ArmedSecrets::default();
        assert!(arms.arm(web, &[shared, own], &soon()));
        assert!(arms.arm(db, &[shared], &soon()));
        assert_eq!(*arms.disarm(web), [own]);
        assert!(arms.needs(shared));
        assert_eq!(*arms.disarm(web), []);
        assert_eq!(*arms.disarm(db), [shared]);
        assert_eq!(arms.len(), 0);
    }

    #[test]
    fn a_start_is_overdue_until_it_ends_or_another_begins() {
        let (web, db) = (VmId::random(), VmId::random());
        let (of_web, of_db) = (EnvelopeId::random(), EnvelopeId::random());
        let arms = ArmedSecrets::default();
        assert!(arms.arm(web, &[of_web], &soon()));
        let (none, next) = arms.overdue(Duration::from_secs(60));
        assert!(none.is_empty() && next.is_some_and(|next| next > Duration::from_secs(50)));
        assert!(arms.arm(db, &[of_db], &soon()));
        let (overdue, next) = arms.overdue(Duration::ZERO);
        assert_eq!((overdue.len(), next), (2, None));
        let first = overdue.into_iter().find(|start| start.vm == web).unwrap();
        // It starts anew before libvirt has answered.
        assert_eq!(*arms.disarm(web), [of_web]);
        assert_eq!(*arms.disarm_overdue(first), []);
        assert!(arms.arm(web, &[of_web], &soon()));
        assert_eq!(*arms.disarm_overdue(first), []);
        let (overdue, _) = arms.overdue(Duration::ZERO);
        let second = overdue.into_iter().find(|start| start.vm == web).unwrap();
        assert_eq!(*arms.disarm_overdue(second), [of_web]);
        assert!(arms.needs(of_db));
    }

    proptest! {
        /// Whatever the order of starts and ends, a secret is taken away exactly when its last VM is done.
        #[test]
        fn nothing_stays_armed(steps in prop::collection::vec((any::<bool>(), 0u128..4, 0u128..4), 0..60)) {
            let arms = ArmedSecrets::default();
            for (arm, vm, envelope) in steps {
                let (vm, envelope) = (VmId(Uuid::from_u128(vm)), EnvelopeId(Uuid::from_u128(envelope)));
                if arm {
                    assert!(arms.arm(vm, &[envelope], &soon()));
                    prop_assert!(arms.needs(envelope));
                } else {
                    for gone in arms.disarm(vm).iter() {
                        prop_assert!(!arms.needs(*gone));
                    }
                }
            }
            for vm in 0..4 {
                let _ = arms.disarm(VmId(Uuid::from_u128(vm)));
            }
            prop_assert_eq!(arms.len(), 0);
        }
    }
}
