//! What the daemon's threads wait for among themselves, and the order in which one thread takes it.
//!
//! | rank | lock | held while | who waits |
//! | --- | --- | --- | --- |
//! | 1 | [`Claims::vm`] | something is done to one VM's keys: at most one thing at a time | commands about that VM, for [`CLAIM`]. Never a start, a lock, a status, another VM |
//! | 2 | [`Claims::jobs`] | it is decided whether a job over many envelopes may begin, or a provider may go | commands that begin a job or delete a provider, for [`CLAIM`] |
//! | 3 | `headers` | one envelope: a start needs the header as it is, or it is being rewritten | a start for its own, within its deadline (`vm::headers`) |
//! | 4 | `armed` | one secret of libvirt is being undefined | a start that needs that very one, within its deadline (`vm::start`) |
//! | 5 | all others | a value is read or changed | whoever reads or changes it |
//!
//! Of rank 5 a thread holds one at a time. A job that is at work, the filling of an image, a provider's call and a watcher hold none
//! of these, and `provider lock` takes none: the lock of a provider is its own. What is about the whole host, as the start of a job
//! or a backup of the state, goes VM by VM or takes what there is at one moment. Locks of one file are not listed: nothing is
//! called while they are held.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::ordered::{Holding, Ordered, Rank};
use crate::model::deadlines::daemon::CLAIM;
use crate::model::envelope::VmId;
use crate::model::problem::Problem;

const VM: Rank = Rank {
    number: 1,
    name: "a VM",
};
const JOBS: Rank = Rank {
    number: 2,
    name: "jobs",
};

/// For a value that is read or changed, while nothing else is.
pub(super) fn value<T: Default>(name: &'static str) -> Ordered<T> {
    Ordered::new(Rank { number: 5, name }, T::default())
}

/// Waits for it. Nothing that a panic could leave half-done is kept behind one of these.
pub(super) fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a command does with what it has claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doing {
    Seal,
    Unseal,
    Adopt,
    Forget,
    Shred,
    /// Its UEFI variables are made anew.
    ResetNvram,
    /// It is freed of plain overlays.
    Overlays,
    /// One of its volumes gets an envelope, or loses it.
    Volume,
    /// Another VM gets one of its volumes.
    Share,
    /// Copies of its envelopes follow.
    Copies,
    /// A job is about to go through its envelopes.
    Look,
    /// A job begins.
    Begin,
    Rotate,
    Delete,
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Seal => "is being sealed",
            Self::Unseal => "is being unsealed",
            Self::Adopt => "is being adopted",
            Self::Forget => "is being forgotten",
            Self::Shred => "is being shredded",
            Self::ResetNvram => "gets new UEFI variables",
            Self::Overlays => "gets its sealed images back",
            Self::Volume => "gets the envelope of a volume",
            Self::Share => "has a volume that is being shared",
            Self::Copies => "gets the newest copies of its envelopes",
            Self::Look => "is being looked at for a job",
            Self::Begin => "a job is being begun",
            Self::Rotate => "a provider is being rotated",
            Self::Delete => "a provider is being deleted",
        })
    }
}

/// Who changes the keys of which VM now. Two at once would make two envelopes for one object, or destroy what the other has just
/// made.
#[derive(Debug, Default)]
pub(super) struct Claims {
    taken: Mutex<BTreeMap<Option<VmId>, (Doing, Instant)>>,
    freed: Condvar,
}

/// A VM, or the right to begin a job, until this is dropped.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    claims: &'a Claims,
    /// `None` for jobs.
    vm: Option<VmId>,
    _holding: Holding,
}

impl Claims {
    /// Waits for whoever has this VM, and for no other.
    ///
    /// # Errors
    /// With what is being done to it, after [`CLAIM`].
    #[track_caller]
    pub(super) fn vm(&self, vm: VmId, name: &str, doing: Doing) -> Result<Claim<'_>, Problem> {
        self.claim(Some(vm), name, doing, Instant::now() + CLAIM)
    }

    /// As [`Claims::vm`], of one among many that are claimed in turn: waits until `deadline`.
    #[track_caller]
    pub(super) fn vm_until(&self, vm: VmId, doing: Doing, deadline: Instant) -> Result<Claim<'_>, Problem> {
        self.claim(Some(vm), &format!("VM {vm}"), doing, deadline)
    }

    /// Waits for who begins a job over many envelopes, or deletes a provider.
    ///
    /// # Errors
    /// With what is being done, after [`CLAIM`].
    #[track_caller]
    pub(super) fn jobs(&self, doing: Doing) -> Result<Claim<'_>, Problem> {
        self.claim(None, "now", doing, Instant::now() + CLAIM)
    }

    /// Whether the keys of this VM are going.
    pub(super) fn is_leaving(&self, vm: VmId) -> bool {
        let taken = lock(&self.taken);
        matches!(taken.get(&Some(vm)), Some((Doing::Shred | Doing::Forget, _)))
    }

    /// What has been done since before `moment` to a VM, or to `only` this one, and may come to a new envelope, in words.
    pub(super) fn making_since(&self, moment: Instant, only: Option<VmId>) -> Option<String> {
        lock(&self.taken).iter().find_map(|(vm, (doing, since))| {
            let makes = matches!(doing, Doing::Seal | Doing::Adopt | Doing::Volume);
            let is_of_it = |vm: &VmId| only.is_none_or(|only| only == *vm);
            let vm = vm.filter(|vm| makes && *since < moment && is_of_it(vm))?;
            Some(format!("VM {vm} {doing}"))
        })
    }

    #[track_caller]
    fn claim(
        &self,
        vm: Option<VmId>,
        name: &str,
        doing: Doing,
        deadline: Instant,
    ) -> Result<Claim<'_>, Problem> {
        let _holding = Holding::begin(if vm.is_some() { VM } else { JOBS });
        let patience = deadline.saturating_duration_since(Instant::now());
        let (mut taken, _) = self
            .freed
            .wait_timeout_while(lock(&self.taken), patience, |taken| taken.contains_key(&vm))
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((other, since)) = taken.get(&vm) {
            let time = since.elapsed().as_secs();
            return Err(Problem::busy(format!("{name} {other}, for {time} s"))
                .next("the same command again when that is done"));
        }
        taken.insert(vm, (doing, Instant::now()));
        Ok(Claim {
            claims: self,
            vm,
            _holding,
        })
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        lock(&self.claims.taken).remove(&self.vm);
        self.claims.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::problem::Code;

    fn vm(number: u128) -> VmId {
        VmId(uuid::Uuid::from_u128(number))
    }

    #[test]
    fn what_is_done_to_one_vm_makes_no_other_wait_and_no_job() {
        let claims = Claims::default();
        let long = claims.vm(vm(1), "web01", Doing::Seal).unwrap();
        std::thread::scope(|scope| {
            let free = scope.spawn(|| {
                drop(claims.vm(vm(2), "db01", Doing::Shred).unwrap());
                drop(claims.jobs(Doing::Begin).unwrap());
            });
            free.join().unwrap();
            let same = scope.spawn(|| drop(claims.vm(vm(1), "web01", Doing::Shred).unwrap()));
            // Nor while somebody waits for it.
            scope
                .spawn(|| drop(claims.vm(vm(2), "db01", Doing::Seal).unwrap()))
                .join()
                .unwrap();
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert!(!same.is_finished());
            drop(long);
            same.join().unwrap();
        });
        assert!(lock(&claims.taken).is_empty());
    }

    #[test]
    fn who_waits_too_long_is_told_what_is_being_done() {
        let claims = Claims::default();
        let _sealing = claims.vm(vm(1), "web01", Doing::Seal).unwrap();
        std::thread::scope(|scope| {
            let late = scope.spawn(|| {
                let now = Instant::now();
                claims.vm_until(vm(1), Doing::Shred, now).map(drop).unwrap_err()
            });
            let busy = late.join().unwrap();
            assert_eq!(busy.code, Code::Busy);
            assert_eq!(busy.message, format!("VM {} is being sealed, for 0 s", vm(1)));
        });
    }

    #[test]
    fn what_was_begun_before_a_moment_is_under_way_until_it_ends() {
        let claims = Claims::default();
        let before = claims.vm(vm(1), "web01", Doing::Seal).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(2));
        let moment = Instant::now();
        std::thread::scope(|scope| {
            let later = scope.spawn(|| {
                let later = claims.vm(vm(2), "db01", Doing::Seal).unwrap();
                assert!(
                    claims
                        .making_since(moment, None)
                        .unwrap()
                        .contains(&vm(1).to_string())
                );
                drop(later);
            });
            later.join().unwrap();
        });
        assert!(claims.making_since(moment, Some(vm(1))).is_some());
        assert_eq!(claims.making_since(moment, Some(vm(2))), None);
        drop(before);
        let _shredding = claims.vm(vm(1), "web01", Doing::Shred).unwrap();
        assert!(claims.is_leaving(vm(1)) && !claims.is_leaving(vm(2)));
        let _jobs = claims.jobs(Doing::Begin).unwrap();
        assert_eq!(claims.making_since(Instant::now() + CLAIM, None), None);
    }

    #[test]
    fn whoever_takes_them_in_another_order_is_found_out() {
        let claims = Claims::default();
        let some = value::<u8>("some");
        drop((
            claims.vm(vm(1), "web01", Doing::Seal),
            claims.jobs(Doing::Begin),
            some.lock(),
        ));
        let panics = |work: &(dyn Fn() + Sync)| std::thread::scope(|scope| scope.spawn(work).join().is_err());
        assert!(panics(&|| drop((
            claims.jobs(Doing::Begin),
            claims.vm(vm(1), "web01", Doing::Seal)
        ))));
        assert!(panics(&|| drop((some.lock(), claims.jobs(Doing::Begin)))));
        assert!(panics(&|| drop((
            claims.vm(vm(1), "web01", Doing::Seal),
            claims.vm(vm(2), "db01", Doing::Seal)
        ))));
        assert!(!panics(&|| drop((claims.jobs(Doing::Begin), some.lock()))));
    }
}
