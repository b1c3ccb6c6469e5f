//! What the rows of jobs say.

use super::damage::DamagedRow;
use super::records::UnixTime;
use crate::model::envelope::{Envelope, EnvelopeId, Verified};
use crate::model::job::{JobId, JobState, Subject};

/// Which envelopes a job goes through now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// All of them, in the order in which they came here: one that is made meanwhile comes last.
    All,
    /// Those that it left behind and that may open by now.
    Left,
}

/// A job to be kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NewJob<'a> {
    pub subject: &'a Subject,
    /// What it does, as JSON: all that it needs to be done again after a restart, and no key.
    pub task: &'a str,
    /// How many units there are to be done; of a sweep, the envelopes are counted here.
    pub total: u64,
    /// Envelopes that it leaves behind from the beginning.
    pub left: &'a [LeftBehind],
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct JobRecord {
    pub id: JobId,
    pub subject: Subject,
    /// What it does, as JSON.
    pub task: String,
    pub state: JobState,
    pub pass: Pass,
    /// The row of the last envelope of the pass that it has seen; none yet, if empty.
    pub cursor: String,
    /// How many units there were when it began.
    pub total: u64,
    /// How many of them are done.
    pub seen: u64,
    /// How many of them it has changed.
    pub changed: u64,
    /// How many of them it could not change.
    pub left: u64,
    /// What it waits for; empty while it works.
    pub waiting: String,
    /// Why it was given up, as JSON; empty if it was not.
    pub failure: String,
    pub created: UnixTime,
    pub updated: UnixTime,
}

/// An envelope that a job could not change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LeftBehind {
    pub envelope: EnvelopeId,
    pub reason: String,
    /// Whether it may work later, as with a locked provider.
    pub again: bool,
}

/// What a batch has come to, envelope by envelope.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// It is as the job wants it.
    Unchanged(EnvelopeId),
    /// The second, of the next generation, takes the place of the first.
    Replace(Box<Envelope>, Box<Verified>),
    /// It stays as it was.
    Left(LeftBehind),
    /// Its row can't be read.
    Damaged(DamagedRow),
}
