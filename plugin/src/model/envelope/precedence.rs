//! Which of two versions of an envelope counts: nothing else compares generations, and nothing else could.
//!
//! A version that is neither newer, nor the same, nor older is a conflict: somebody who had the key made it out of the same
//! version on another host. Which of the two counts is an admin's to decide, so whoever reads versions has to say what it does
//! with one: none is replaced, and none is taken for the other.

use std::cmp::Ordering;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::Envelope;

/// Counts the changes of an envelope. It has no order of its own: see [`Envelope::supersedes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(transparent)]
pub(crate) struct Generation(u64);

impl Generation {
    /// That of a new envelope.
    pub(super) const FIRST: Self = Self(1);
    /// What a format 1 claims beyond this was never counted: format 2 goes on from here.
    const MAX_OF_FORMAT_1: u64 = u32::MAX as u64;

    /// That of the next change.
    pub(super) fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// That of the format 2 which a format 1 becomes.
    pub(super) fn after_format_1(self) -> Self {
        Self(self.0.min(Self::MAX_OF_FORMAT_1)).next()
    }

    /// As SQLite and the wire have it; none where it is higher than either can hold, which no sequence of changes gets to.
    pub(crate) fn stored(self) -> Option<i64> {
        i64::try_from(self.0).ok()
    }

    /// As the MAC covers it: big-endian.
    pub(super) fn to_be_bytes(self) -> [u8; 8] {
        self.0.to_be_bytes()
    }

    /// Any one, as if the envelope had been changed that often.
    #[cfg(test)]
    pub(crate) const fn of_test(count: u64) -> Self {
        Self(count)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How one version of an envelope stands to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Precedence {
    /// It came after the other.
    Newer,
    /// They are equal.
    Same,
    /// It came before the other.
    Older,
    /// Both claim the same place, and they differ.
    Conflict,
}

impl Envelope {
    /// How it stands to `other` of the same id. Of two that are not [`super::Verified`] this compares only what they claim.
    ///
    /// Format 2 comes after format 1, whatever the generations: who made a format 1 can't be told, so its generation
    /// counts only among its like. One whose writer is known is upgraded before it is compared.
    pub(crate) fn supersedes(&self, other: &Self) -> Precedence {
        let rank = |envelope: &Self| (envelope.format(), envelope.generation.0);
        match rank(self).cmp(&rank(other)) {
            Ordering::Greater => Precedence::Newer,
            Ordering::Less => Precedence::Older,
            Ordering::Equal if self == other => Precedence::Same,
            Ordering::Equal => Precedence::Conflict,
        }
    }

    /// Whether this format 1 says that it was changed more often than the keystore's, which is `own`. One that virtseal left behind when it upgraded the
    /// envelope never does.
    pub(crate) fn claims_more_changes_than(&self, own: Generation) -> bool {
        self.generation.0 > own.0
    }
}
