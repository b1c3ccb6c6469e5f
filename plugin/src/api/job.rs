//! Work that outlives a request, and the copies that follow sweeps.

use serde::{Deserialize, Serialize};
use zlink::introspect::{CustomType, Type};

use super::{FindingView, OrNewer, ProblemView};
use crate::domain::DeclaredFormat;
use crate::model::envelope::CopyPlace;

pub(crate) use crate::model::job::{JobKind, JobState, SnapshotAct, Unit};

/// What a sweep over envelopes is to do. A rotation is asked for by a method of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum SweepKind {
    /// Replace all stanzas by ones of the recipients.
    Rekey,
    /// Replace the stanzas of `provider` by ones of `to`.
    Move,
    /// Add a stanza of `provider`.
    AddRecipient,
    /// Remove the stanzas of `provider`.
    RemoveRecipient,
}

/// A sweep to start.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub(crate) struct JobRequest {
    /// What it is to do.
    pub kind: SweepKind,
    /// The provider that it is about; for a move, the one to move from.
    pub provider: Option<String>,
    /// For a move, the provider to move to.
    pub to: Option<String>,
    /// Only the envelopes of this VM, for rekey and move: name or UUID.
    pub vm: Option<String>,
}

/// A job, as `virtseal jobs` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct JobView {
    /// Its number.
    pub id: i64,
    /// What it does; none if another version has started it.
    pub kind: Option<OrNewer<JobKind>>,
    /// That in words.
    pub task: String,
    /// The only VM that it is about, if there is one: UUID.
    pub vm: Option<String>,
    /// The image that it is about, if it is about one.
    pub path: Option<String>,
    /// How far it is.
    pub state: OrNewer<JobState>,
    /// What the following are counted in.
    pub unit: OrNewer<Unit>,
    /// How many there were when it began.
    pub total: i64,
    /// How many of them are done.
    pub seen: i64,
    /// How many envelopes it has changed.
    pub changed: i64,
    /// How many envelopes it could not change.
    pub left: i64,
    /// How many are done in a second, while that can be told.
    pub per_second: Option<i64>,
    /// How long the rest takes at this pace, in seconds.
    pub seconds_left: Option<i64>,
    /// What it waits for, while it does.
    pub waiting: Option<String>,
    /// Why it could not change some envelopes, an envelope a line.
    pub reasons: Vec<String>,
    /// Why it was given up, if it was.
    pub problem: Option<ProblemView>,
    /// The envelope of the image that it has made.
    pub envelope: Option<String>,
    /// When it was started: RFC 3339, UTC.
    #[cfg_attr(test, schemars(extend("format" = "date-time", "pattern" = "Z$")))]
    pub started: String,
    /// When it last changed: RFC 3339, UTC.
    #[cfg_attr(test, schemars(extend("format" = "date-time", "pattern" = "Z$")))]
    pub updated: String,
}

/// How a job stands.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub(crate) struct JobReport {
    pub job: JobView,
}

/// A job that was started.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub(crate) struct JobStarted {
    pub job: JobView,
    /// Whether it is this call that has started it.
    pub changed: bool,
    /// What the admin should know besides.
    pub warnings: Vec<FindingView>,
}

/// A copy of an envelope that is behind the keystore's.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct CopyView {
    pub vm: String,
    /// The envelope's UUID.
    pub envelope: String,
    pub place: OrNewer<CopyPlace>,
    /// Why it could not follow yet; empty if nobody has tried.
    pub reason: String,
}

/// Reply of `virtseal jobs`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Jobs {
    /// The last ones, oldest first.
    pub jobs: Vec<JobView>,
    /// How many copies are behind.
    pub stale_copies: i64,
    /// The first hundred of each place, or as many as fit into a reply.
    pub copies: Vec<CopyView>,
}

/// What a new volume should be.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub(crate) struct VolumeRequest {
    /// Where; absolute.
    pub path: String,
    /// Its virtual size in bytes; may be left out where `from` or `backing` has one.
    pub size: Option<u64>,
    /// The VM that it is for: name or UUID.
    pub vm: String,
    /// qcow2 cluster size in bytes.
    pub cluster_size: Option<u64>,
    /// The image below it; absolute.
    pub backing: Option<String>,
    /// That image's format.
    pub backing_format: Option<DeclaredFormat>,
    /// The image to fill it from; absolute. A job does that.
    pub from: Option<String>,
    /// That image's format: what libvirt has for it, else what it shows, if left out.
    pub from_format: Option<DeclaredFormat>,
    /// The sum that it must have, or nothing is made: `sha256:` or `sha512:`, and hex digits.
    pub digest: Option<String>,
    /// Another provider than the default one.
    pub provider: Option<String>,
}

/// Reply of `volume create`: a volume, or the job that makes it.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub(crate) struct VolumeCreated {
    /// The job that fills it.
    pub job: Option<JobView>,
    /// The envelope's UUID, once it is active.
    pub envelope: Option<String>,
    /// The virtual size in bytes, once it is there.
    pub size: Option<u64>,
}
