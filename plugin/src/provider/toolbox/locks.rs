//! How often something was locked: what began before a lock and ends after it must not undo it.
//!
//! An unlock takes seconds: scrypt, a login, a TPM. It [notes](Locks::noted) the count before, and keeps what it got only if
//! the count is [the same](Locks::are) then, under the same mutex that a lock takes.

/// Stands beside what a lock takes away, behind its mutex.
#[derive(Debug, Default)]
pub(in crate::provider) struct Locks(u64);

/// The count at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocksNoted(u64);

impl Locks {
    pub(in crate::provider) fn noted(&self) -> LocksNoted {
        LocksNoted(self.0)
    }

    /// One more lock.
    pub(in crate::provider) fn count(&mut self) {
        self.0 += 1;
    }

    /// Whether there was no lock since.
    pub(in crate::provider) fn are(&self, noted: LocksNoted) -> bool {
        self.0 == noted.0
    }
}
