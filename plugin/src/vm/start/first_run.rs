//! When a vTPM counts as used, and how every host learns of it. The order is that of docs/adr/0012.
//!
//! swtpm answers a missing state with a new TPM. That is right once, at the first start; so whether there was one must be known,
//! and travel with the envelope. The key for its MAC is at hand only in `prepare`: there the envelope that says so is made ready,
//! and kept in memory until the VM runs. A start that fails leaves nothing behind.

use super::adoption::Believed;
use crate::model::envelope::{Envelope, Verified};
use crate::model::problem::chain;
use crate::secret::Dek;

/// What is to be kept once a VM runs for the first time.
#[derive(Clone, Debug)]
pub(crate) struct FirstRun {
    /// The vTPM's envelope as it is.
    pub before: Envelope,
    /// The same, and it knows that the VM has run.
    pub after: Verified,
}

impl FirstRun {
    /// `None` for an envelope that knows already.
    pub(crate) fn of(envelope: &Verified, dek: &Dek) -> Option<Self> {
        let after = mark(envelope, dek)?;
        Some(Self {
            before: (**envelope).clone(),
            after,
        })
    }
}

/// Whether a VM is known to have run by more than what is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KnownRun {
    /// That it runs was heard, and could not be written down yet.
    Yes,
    /// What is kept says all.
    AsKept,
}

/// Where the state of a starting vTPM comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StateSource {
    Disk,
    /// A migration, or a saved image: none has to be in the directory.
    Stream,
}

impl Believed {
    /// A state was found, so there has been one: the envelope learns of it.
    pub(super) fn note_seen(&mut self, dek: &Dek) {
        if let Some(marked) = mark(&self.envelope, dek) {
            self.envelope = marked;
            self.is_news = true;
        }
    }
}

/// `None` where nothing would change.
fn mark(envelope: &Verified, dek: &Dek) -> Option<Verified> {
    match envelope.mark_seen(dek) {
        Ok(marked) => (marked != *envelope).then_some(marked),
        // It would be too long: this host has its own note.
        Err(error) => {
            tracing::warn!(envelope = %envelope.id, "{}", chain(&error));
            None
        }
    }
}
