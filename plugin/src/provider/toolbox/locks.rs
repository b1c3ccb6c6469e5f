//! How often something was locked: what began before a lock and ends after it must not undo it.
//!
//! An unlock takes seconds: scrypt, a login, a TPM. It [notes](Locks::noted) the count before, and keeps what it got only if
//! the count is [the same](Locks::are) then, under the same mutex that a lock takes.

/// Stands beside what a lock takes away, behind its mutex.
#[derive(Debug, Default)]
pub(crate) struct Locks(u64);
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LocksNoted(u64);

impl Locks {
    pub(crate) fn noted(&self) -> LocksNoted {
        LocksNoted(self.0)
    }
    pub(crate) fn count(&mut self) {
        self.0 += 1;
    }

    /// Whether there was no lock since.
    pub(crate) fn are(&self, noted: LocksNoted) -> bool {
        self.0 == noted.0
    }
}
