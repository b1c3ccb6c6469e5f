//! Rows of which some are damaged: one that can't be read hides no other.
//!
//! Whoever reads many rows gets a [`Rows`] and says what damage means to him: [`Rows::sound`] for what goes on without, and
//! [`Rows::whole`] for a guard, which must know all of them.

use std::fmt;

use super::error::StoreError;
use super::records::EnvelopeRecord;
use crate::model::envelope::{Envelope, EnvelopeId, VmId};

/// The rows that can be read, and what is known of the others.
#[derive(Debug, PartialEq)]
pub(crate) struct Rows<T> {
    /// Those that can be read.
    pub sound: Vec<T>,
    /// Those that can't.
    pub damaged: Vec<DamagedRow>,
}

impl<T> Rows<T> {
    /// Whether there is none, not even a damaged one.
    pub(crate) fn is_empty(&self) -> bool {
        self.sound.is_empty() && self.damaged.is_empty()
    }

    /// All of them.
    ///
    /// # Errors
    /// [`StoreError::Inconsistent`], which names the first one that can't be read.
    pub(crate) fn whole(self) -> Result<Vec<T>, StoreError> {
        match self.damaged.into_iter().next() {
            None => Ok(self.sound),
            Some(row) => Err(row.into()),
        }
    }
}

impl Rows<EnvelopeRecord> {
    /// The envelopes of all rows, those of damaged ones as they still hold them, for a guard to which what may be true is enough; and
    /// the rows that hold none.
    pub(crate) fn claims(self) -> (Vec<Envelope>, Vec<DamagedRow>) {
        let mut claims: Vec<_> = self.sound.into_iter().map(|record| record.envelope).collect();
        let (held, silent): (Vec<_>, Vec<_>) = self.damaged.into_iter().partition(|row| row.holds.is_some());
        claims.extend(held.into_iter().filter_map(|row| Some(row.holds?.envelope)));
        (claims, silent)
    }
}

/// A row that can't be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DamagedRow {
    /// Which one, as in `of envelope ID`.
    pub row: String,
    pub why: String,
    /// The VM that it is about, as far as it tells.
    pub vm: Option<VmId>,
    /// The envelope that it is of, as far as it tells.
    pub envelope: Option<EnvelopeId>,
    /// All that is in it, by column, as JSON; what is no text as hexadecimal digits.
    pub raw: serde_json::Value,
    /// The envelope that is in it all the same.
    pub holds: Option<Box<Held>>,
    /// Whether what it says is elsewhere too: the envelopes of a VM travel, and what else is noted of it is seen at its start.
    pub is_elsewhere: bool,
    /// Its place in the order of its table.
    pub(super) place: i64,
}

/// What a damaged row of an envelope still has: to be believed once it was verified, as a copy from anywhere else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub envelope: Envelope,
    /// The path of its object; empty where it has none.
    pub location: String,
}

impl fmt::Display for DamagedRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the keystore's record {} is damaged: {}", self.row, self.why)
    }
}

impl From<DamagedRow> for StoreError {
    fn from(DamagedRow { row, why, .. }: DamagedRow) -> Self {
        Self::Inconsistent { row, why }
    }
}
