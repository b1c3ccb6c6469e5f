//! Sweeps over the envelopes, and the copies that follow them.

use serde::{Deserialize, Serialize};
use zlink::introspect::{CustomType, Type};

/// A job to start.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct JobRequest {
    /// rotate, rekey, move, add-recipient or remove-recipient.
    pub kind: String,
    /// The provider that it is about; for a move, the one to move from.
    pub provider: Option<String>,
    /// For a move, the provider to move to.
    pub to: Option<String>,
    /// Only the envelopes of this VM, for rekey and move: name or UUID.
    pub vm: Option<String>,
}

/// A sweep over the envelopes, as `virtseal jobs` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
pub struct JobView {
    /// Its number.
    pub id: i64,
    /// What it does, in words.
    pub task: String,
    /// running, done, incomplete or aborted.
    pub state: String,
    /// How many envelopes there were when it began.
    pub total: i64,
    /// How many of them it has seen.
    pub seen: i64,
    /// How many of them it has changed.
    pub changed: i64,
    /// How many of them it could not change.
    pub left: i64,
    /// What it waits for, while it does.
    pub waiting: Option<String>,
    /// Why it could not change some of them, an envelope a line.
    pub reasons: Vec<String>,
    /// When it was started, in seconds since 1970.
    pub started: i64,
    /// When it last changed, in seconds since 1970.
    pub updated: i64,
}

/// How a job stands.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct JobReport {
    /// The job.
    pub job: JobView,
}

/// A job that was started.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct JobStarted {
    /// The job.
    pub job: JobView,
    /// What the admin should know besides.
    pub warnings: Vec<String>,
}

/// A copy of an envelope that is behind the keystore's.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct CopyView {
    /// The VM.
    pub vm: String,
    /// The envelope's UUID.
    pub envelope: String,
    /// xml or image.
    pub place: String,
    /// Why it could not follow yet; empty if nobody has tried.
    pub reason: String,
}

/// Reply of `virtseal jobs`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Jobs {
    /// The last ones, oldest first.
    pub jobs: Vec<JobView>,
    /// How many copies are behind.
    pub stale_copies: i64,
    /// The first hundred of each place, or as many as fit into a reply.
    pub copies: Vec<CopyView>,
}
