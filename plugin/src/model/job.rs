//! What a job is called, how it stands, and what it is about: that decides which others may run beside it.

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

use super::envelope::VmId;

/// Names a job on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct JobId(pub i64);

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum JobKind {
    /// A provider's stanzas are replaced by ones of a newer KEK.
    Rotate,
    /// All stanzas are replaced.
    Rekey,
    /// The stanzas of one provider are replaced by those of another.
    Move,
    /// A provider gets stanzas besides.
    AddRecipient,
    /// A provider loses its stanzas.
    RemoveRecipient,
    /// An image is made out of another one.
    CreateVolume,
    /// The plain overlays of a VM are merged into its sealed images.
    CommitSnapshot,
    /// They are dropped.
    DeleteSnapshot,
}

/// What becomes of the plain overlays of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum SnapshotAct {
    /// What they have goes down into the sealed images.
    Commit,
    /// What they have goes.
    Delete,
}

/// How far a job has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum JobState {
    /// At work, or waiting until it can be.
    Running,
    /// Through, nothing left behind.
    Done,
    /// Through, with envelopes left behind.
    Incomplete,
    /// Given up, and why is told: what it had begun was taken back.
    Failed,
    /// Ended by an admin; what it changed until then stays.
    Aborted,
}

impl JobState {
    /// The word for it in messages.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Incomplete => "incomplete",
            Self::Failed => "failed",
            Self::Aborted => "aborted",
        }
    }
}

/// What a job counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum Unit {
    /// Envelopes that it has looked at.
    Envelopes,
    /// Bytes of a guest's disk.
    Bytes,
}

/// What a job is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    AllEnvelopes,
    EnvelopesOf(VmId),
    Image { vm: VmId, path: String },
}

impl Subject {
    /// Whether two jobs would undo each other's work, or do it twice.
    ///
    /// Two sweeps over one envelope would: of two that each take a recipient out, each may count on the other one's. A sweep and the
    /// making of an image do not: each changes the envelope in a transaction of its own, and the image follows.
    pub(crate) fn excludes(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Image { path: one, .. }, Self::Image { path: other, .. }) => one == other,
            (Self::Image { .. }, _) | (_, Self::Image { .. }) => false,
            (Self::EnvelopesOf(one), Self::EnvelopesOf(other)) => one == other,
            (Self::AllEnvelopes, _) | (_, Self::AllEnvelopes) => true,
        }
    }

    /// Whether the keys of `vm` are in a job's hands: they can't be destroyed, nor given away, before it ends. A sweep over all may
    /// make a KEK for any VM at any moment, which a destruction that counts them would not see.
    pub(crate) fn concerns(&self, vm: VmId) -> bool {
        match self {
            Self::AllEnvelopes => true,
            Self::EnvelopesOf(of) | Self::Image { vm: of, .. } => *of == vm,
        }
    }

    /// The only VM that it is about, if there is one.
    pub(crate) fn vm(&self) -> Option<VmId> {
        match self {
            Self::AllEnvelopes => None,
            Self::EnvelopesOf(vm) | Self::Image { vm, .. } => Some(*vm),
        }
    }

    /// The image that it is about, if it is about one.
    pub(crate) fn path(&self) -> Option<&str> {
        match self {
            Self::Image { path, .. } => Some(path),
            Self::AllEnvelopes | Self::EnvelopesOf(_) => None,
        }
    }

    /// What its progress is counted in.
    pub(crate) fn unit(&self) -> Unit {
        match self {
            Self::Image { .. } => Unit::Bytes,
            Self::AllEnvelopes | Self::EnvelopesOf(_) => Unit::Envelopes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_excludes_those_about_the_same_and_concerns_its_vm_alone() {
        let (web, db) = (VmId::random(), VmId::random());
        let image = |vm, path: &str| Subject::Image {
            vm,
            path: path.to_owned(),
        };
        let all = [
            (Subject::AllEnvelopes, None),
            (Subject::EnvelopesOf(web), Some(web)),
            (Subject::EnvelopesOf(db), Some(db)),
            (image(web, "/a"), Some(web)),
            (image(web, "/b"), Some(web)),
            (image(db, "/a"), Some(db)),
        ];
        let excluded = |at: usize| -> Vec<usize> {
            let others = all.iter().enumerate();
            let those = others.filter(|(_, (other, _))| all[at].0.excludes(other));
            those.map(|(other, _)| other).collect()
        };
        let found: Vec<_> = (0..all.len()).map(excluded).collect();
        let expected = [
            vec![0, 1, 2],
            vec![0, 1],
            vec![0, 2],
            vec![3, 5],
            vec![4],
            vec![3, 5],
        ];
        assert_eq!(found, expected);
        for (subject, vm) in all {
            assert_eq!(subject.vm(), vm);
            assert_eq!(subject.concerns(web), vm.is_none_or(|vm| vm == web));
        }
    }
}
