//! What the daemon's threads wait for among themselves, and the order in which one thread takes it.
//!
//! | rank | lock | held while | who waits |
//! | --- | --- | --- | --- |
//! | 1 | [`Sealing`] | a VM is sealed or unsealed, or an envelope of it made: that VM alone. While it is decided which keys go, what a job is about, and which copies are believed: all VMs | commands of root. Never a start, a lock, a status |
//! | 2 | `copying` | copies are brought up to date, and while all of a VM go: one that was read before must not be put back | the same, and the thread of copies |
//! | 3 | `headers` | one envelope: a start needs the header as it is, or it is being rewritten | a start for its own, within its deadline (`vm::headers`) |
//! | 4 | `shared` | a secret that other VMs may need too is defined or undefined | starts of VMs with shared disks, and ends |
//! | 5 | `armed` | it is looked up or noted who is armed; by who undefines what nobody fetched, until that is done | starts |
//! | 6 | all others | a value is read or changed | whoever reads or changes it |
//!
//! Of rank 6 a thread holds one at a time. A job, the filling of an image, a provider's call and a watcher hold none of these, and
//! `provider lock` takes none: the lock of a provider is its own. Locks of one file are not listed: nothing is called while
//! they are held.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::ordered::{Guard, Holding, Ordered, Rank};
use crate::model::envelope::VmId;

const fn rank(number: u8, name: &'static str) -> Rank {
    Rank { number, name }
}

const SEALING: Rank = rank(1, "sealing");
pub(super) const COPYING: Rank = rank(2, "copying");
pub(super) const SHARED: Rank = rank(4, "shared");
pub(super) const ARMED: Rank = rank(5, "armed");

/// For a value that is read or changed, while nothing else is.
pub(super) fn value<T: Default>(name: &'static str) -> Ordered<T> {
    Ordered::new(rank(6, name), T::default())
}

/// What can be locked for a while.
pub(super) trait Lock {
    type Guard<'a>
    where
        Self: 'a;

    fn take(&self) -> Self::Guard<'_>;
}

/// Waits for it.
#[track_caller]
pub(super) fn lock<L: Lock>(what: &L) -> L::Guard<'_> {
    what.take()
}

impl<T> Lock for Mutex<T> {
    type Guard<'a>
        = MutexGuard<'a, T>
    where
        T: 'a;

    fn take(&self) -> MutexGuard<'_, T> {
        // Nothing that a panic could leave half-done is kept behind these.
        self.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Lock for Ordered<T> {
    type Guard<'a>
        = Guard<'a, T>
    where
        T: 'a;

    #[track_caller]
    fn take(&self) -> Guard<'_, T> {
        self.lock()
    }
}

/// Who makes envelopes now: two at once would make two for one object. A VM excludes itself, and the whole excludes all.
#[derive(Debug, Default)]
pub(super) struct Sealing {
    taken: Mutex<Taken>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct Taken {
    vms: BTreeSet<VmId>,
    all: bool,
}

/// One VM, or all, until this is dropped.
#[derive(Debug)]
pub(super) struct Sealed<'a> {
    sealing: &'a Sealing,
    /// `None` for all.
    vm: Option<VmId>,
    _holding: Holding,
}

impl Sealing {
    /// Waits for others that have this VM, or all, but for no other VM.
    #[track_caller]
    pub(super) fn of(&self, vm: VmId) -> Sealed<'_> {
        self.wait_for(Some(vm))
    }

    #[track_caller]
    fn wait_for(&self, vm: Option<VmId>) -> Sealed<'_> {
        let _holding = Holding::begin(SEALING);
        let in_the_way = |taken: &mut Taken| match vm {
            Some(vm) => taken.all || taken.vms.contains(&vm),
            None => taken.all || !taken.vms.is_empty(),
        };
        let taken = lock(&self.taken);
        let taken = self.freed.wait_while(taken, in_the_way);
        let mut taken = taken.unwrap_or_else(PoisonError::into_inner);
        match vm {
            Some(vm) => drop(taken.vms.insert(vm)),
            None => taken.all = true,
        }
        drop(taken);
        Sealed {
            sealing: self,
            vm,
            _holding,
        }
    }
}

/// All VMs. Who comes for one of them meanwhile goes first while this waits.
impl Lock for Sealing {
    type Guard<'a> = Sealed<'a>;

    #[track_caller]
    fn take(&self) -> Sealed<'_> {
        self.wait_for(None)
    }
}

impl Drop for Sealed<'_> {
    fn drop(&mut self) {
        let mut taken = lock(&self.sealing.taken);
        match self.vm {
            Some(vm) => drop(taken.vms.remove(&vm)),
            None => taken.all = false,
        }
        drop(taken);
        self.sealing.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_vm_that_is_being_sealed_makes_no_other_wait() {
        let (one, other) = (VmId(uuid::Uuid::from_u128(1)), VmId(uuid::Uuid::from_u128(2)));
        let sealing = Sealing::default();
        let long = sealing.of(one);
        std::thread::scope(|scope| {
            scope.spawn(|| drop(sealing.of(other))).join().unwrap();
            let (done, decided) = channel();
            let (whole, again) = (done.clone(), done);
            let sealing = &sealing;
            scope.spawn(move || {
                drop(lock(sealing));
                whole.send("all").unwrap();
            });
            scope.spawn(move || {
                drop(sealing.of(one));
                again.send("the same").unwrap();
            });
            // Nor while somebody waits for all.
            scope.spawn(|| drop(sealing.of(other))).join().unwrap();
            let early = decided.recv_timeout(Duration::from_millis(50));
            assert_eq!(early, Err(RecvTimeoutError::Timeout));
            drop(long);
            let mut seen = [decided.recv().unwrap(), decided.recv().unwrap()];
            seen.sort_unstable();
            assert_eq!(seen, ["all", "the same"]);
        });
    }

    #[test]
    fn whoever_takes_them_in_another_order_is_found_out() {
        let (armed, shared) = (Ordered::new(ARMED, ()), Ordered::new(SHARED, ()));
        let (copying, sealing) = (Ordered::new(COPYING, ()), Sealing::default());
        let some = value::<u8>("some");
        let all = (
            lock(&sealing),
            lock(&copying),
            lock(&shared),
            lock(&armed),
            lock(&some),
        );
        drop(all);
        let panics = |work: &(dyn Fn() + Sync)| std::thread::scope(|scope| scope.spawn(work).join().is_err());
        assert!(panics(&|| drop((lock(&armed), lock(&shared)))));
        assert!(panics(&|| drop((lock(&copying), lock(&sealing)))));
        assert!(panics(&|| drop((lock(&some), lock(&armed)))));
        assert!(panics(&|| drop((
            sealing.of(VmId(uuid::Uuid::from_u128(1))),
            lock(&sealing)
        ))));
        assert!(!panics(&|| drop((lock(&sealing), lock(&some)))));
    }
}
