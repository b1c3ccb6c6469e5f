//! What a job is to do, as its row has it: all that is needed to begin again after a restart, and no key.

use serde::{Deserialize, Serialize};

use super::sweep::Task;
use crate::api::ProblemView;
use crate::domain::DeclaredFormat;
use crate::model::advice::Advice;
use crate::model::digest::Digest;
use crate::model::envelope::{ProviderId, VmId};
use crate::model::job::{JobKind, SnapshotAct, Subject};
use crate::model::problem::{Code, Problem};
use crate::vm::snapshot::OverlaidDisk;

/// What a job is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(crate) enum Work {
    /// Makes an encrypted image with the data of another one.
    CreateVolume(NewVolume),
    /// Frees a VM of the plain overlays on its disks.
    Overlays(Overlays),
    /// Goes through envelopes.
    #[serde(untagged)]
    Sweep(Task),
}

/// An image to be made. Its paths were root's to give, and are looked at again whenever the job begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewVolume {
    pub vm: VmId,
    /// Where it is to be.
    pub path: String,
    /// The image that it gets its data from.
    pub from: String,
    /// That image's format; what it shows, if nobody has said one.
    pub from_format: Option<DeclaredFormat>,
    /// The sum that it must have, if somebody has said one.
    pub digest: Option<Digest>,
    /// Its virtual size in bytes, if it is to be larger.
    pub size: Option<u64>,
    /// Its clusters' size in bytes, if it is not the usual one.
    pub cluster_size: Option<u64>,
    /// The provider that was asked for.
    pub provider: Option<ProviderId>,
    /// The user who has asked for it.
    pub asked_by: Option<u32>,
    /// The machine-id of the host that it is to be made on: a keystore may come back elsewhere, where these paths are others'.
    pub host: Option<String>,
}

/// What becomes of the plain overlays of a VM. Each is looked for again whenever the job begins: what is not as it was stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Overlays {
    pub vm: VmId,
    pub act: SnapshotAct,
    /// Whether the files stay.
    pub keep: bool,
    /// Whether root has said which image is the newer one, where that is not known.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
    /// Whether its disk's sealed image may be the newer one by the times of the files: nothing is merged that does not read the same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reads_only: bool,
    pub disks: Vec<OverlaidDisk>,
    /// What libvirt is to forget in the end.
    pub snapshots: Vec<String>,
    /// The user who has asked for it.
    pub asked_by: Option<u32>,
    /// As in [`NewVolume`].
    pub host: Option<String>,
}

impl Work {
    /// Reads what [`Work::to_json`] wrote.
    pub(crate) fn from_json(json: &str) -> Result<Self, Problem> {
        serde_json::from_str(json).map_err(|error| {
            Problem::from_error(Code::Failed, "the job was started by another version", &error)
                .next(Advice::Upgrade.or(Advice::AbortTheJob))
        })
    }

    /// Its JSON form, for the keystore.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(self).expect("it holds only ids, numbers and text")
    }

    pub(crate) fn kind(&self) -> JobKind {
        match self {
            Self::CreateVolume(_) => JobKind::CreateVolume,
            Self::Overlays(overlays) => match overlays.act {
                SnapshotAct::Commit => JobKind::CommitSnapshot,
                SnapshotAct::Delete => JobKind::DeleteSnapshot,
            },
            Self::Sweep(task) => task.kind(),
        }
    }

    pub(crate) fn subject(&self) -> Subject {
        match self {
            Self::CreateVolume(volume) => Subject::Image {
                vm: volume.vm,
                path: volume.path.clone(),
            },
            // One for all of them: two on one VM exclude each other.
            Self::Overlays(overlays) => Subject::Image {
                vm: overlays.vm,
                path: overlays.tops().next().unwrap_or_default(),
            },
            Self::Sweep(task) => task.subject(),
        }
    }

    /// The providers that it can't do without.
    pub(crate) fn providers(&self) -> Vec<ProviderId> {
        match self {
            Self::CreateVolume(volume) => volume.provider.into_iter().collect(),
            Self::Overlays(_) => Vec::new(),
            Self::Sweep(task) => task.names(),
        }
    }

    pub(crate) fn words(&self, name: impl Fn(ProviderId) -> String) -> String {
        match self {
            Self::CreateVolume(volume) => format!("create {} from {}", volume.path, volume.from),
            Self::Overlays(overlays) => {
                let act = match overlays.act {
                    SnapshotAct::Commit => "merge",
                    SnapshotAct::Delete => "drop",
                };
                let tops: Vec<_> = overlays.tops().collect();
                format!("{act} {}", tops.join(", "))
            }
            Self::Sweep(task) => task.words(name),
        }
    }
}

impl Overlays {
    /// The images that the VM has as its disks.
    fn tops(&self) -> impl Iterator<Item = String> {
        let tops = self.disks.iter().filter_map(|disk| disk.overlays.first());
        tops.map(|top| top.display().to_string())
    }
}

/// Why a job was given up, for its row.
pub(crate) fn problem_to_json(problem: &Problem) -> String {
    serde_json::to_string(&ProblemView::from(problem)).expect("it holds a number and text")
}

/// Reads what [`problem_to_json`] wrote; as it is, if that can't be read.
pub(crate) fn problem_from_json(json: &str) -> ProblemView {
    serde_json::from_str(json).unwrap_or_else(|_| ProblemView::from(&Problem::failed(json)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::subject::Subject as ProblemSubject;

    fn volume() -> NewVolume {
        NewVolume {
            vm: VmId::random(),
            path: "/images/web01.qcow2".to_owned(),
            from: "/images/cloud.raw".to_owned(),
            from_format: Some(DeclaredFormat::Raw),
            digest: Digest::from_hex(&"0f".repeat(64)),
            size: Some(1 << 30),
            cluster_size: None,
            provider: Some(ProviderId::random()),
            asked_by: Some(0),
            host: Some("4c3f".to_owned()),
        }
    }

    #[test]
    fn what_is_kept_is_read_back_and_what_another_version_wrote_is_not_guessed() {
        let (one, other) = (ProviderId::random(), ProviderId::random());
        let vm = Some(VmId::random());
        let overlays = Overlays {
            vm: VmId::random(),
            act: SnapshotAct::Commit,
            keep: false,
            force: false,
            reads_only: false,
            disks: vec![OverlaidDisk {
                target: "vda".to_owned(),
                base: "/images/web01.qcow2".into(),
                overlays: vec!["/images/web01.s1".into()],
            }],
            snapshots: vec!["s1".to_owned()],
            asked_by: Some(0),
            host: None,
        };
        let all = [
            Work::Overlays(overlays),
            Work::CreateVolume(volume()),
            Work::Sweep(Task::Rotate { provider: one }),
            Work::Sweep(Task::Rekey {
                to: vec![one, other],
                vm,
            }),
            Work::Sweep(Task::Move {
                from: one,
                to: other,
                vm: None,
            }),
            Work::Sweep(Task::AddRecipient { provider: one }),
            Work::Sweep(Task::RemoveRecipient { provider: other }),
        ];
        for work in all {
            assert_eq!(Work::from_json(&work.to_json()).unwrap(), work);
        }
        // As the versions before this one wrote it.
        let before = Task::Move {
            from: one,
            to: other,
            vm,
        };
        assert_eq!(Work::from_json(&before.to_json()).unwrap(), Work::Sweep(before));
        let added = Work::CreateVolume(volume())
            .to_json()
            .replace("\"vm\"", "\"later\":1,\"vm\"");
        for unreadable in ["", "{}", r#"{"kind":"convert"}"#, &added] {
            assert!(Work::from_json(unreadable).is_err(), "{unreadable}");
        }
        let problem = Problem::busy("it is in use")
            .about(ProblemSubject::Image("/a".into()))
            .next("wait");
        assert_eq!(
            Problem::from(problem_from_json(&problem_to_json(&problem))),
            problem
        );
        // As the versions before this one wrote it.
        let before = problem_from_json(r#"{"code":9,"message":"it is in use","next":null}"#);
        assert_eq!(Problem::from(before), Problem::busy("it is in use"));
        assert_eq!(problem_from_json("?").message, "?");
    }
}
