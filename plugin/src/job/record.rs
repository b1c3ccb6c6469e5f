//! What a job is to do, as its row has it: all that is needed to begin again after a restart, and no key.

use serde::{Deserialize, Serialize};

use super::sweep::Task;
use crate::domain::DeclaredFormat;
use crate::model::advice::Advice;
use crate::model::envelope::{ProviderId, VmId};
use crate::model::job::{JobKind, Subject};
use crate::model::problem::{Code, Problem};

/// What a job is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Work {
    /// Makes an encrypted image with the data of another one.
    CreateVolume(NewVolume),
    /// Goes through envelopes.
    #[serde(untagged)]
    Sweep(Task),
}

/// An image to be made. Its paths were root's to give, and are looked at again whenever the job begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewVolume {
    /// The VM that it is for.
    pub vm: VmId,
    /// Where it is to be.
    pub path: String,
    /// The image that it gets its data from.
    pub from: String,
    /// That image's format; what it shows, if nobody has said one.
    pub from_format: Option<DeclaredFormat>,
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

impl Work {
    /// Reads what [`Work::to_json`] wrote.
    ///
    /// # Errors
    /// When a later virtseal wrote it.
    pub fn from_json(json: &str) -> Result<Self, Problem> {
        serde_json::from_str(json).map_err(|error| {
            Problem::from_error(Code::Failed, "the job was started by another version", &error)
                .next(Advice::Upgrade.or(Advice::AbortTheJob))
        })
    }

    /// Its JSON form, for the keystore.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("it holds only ids, numbers and text")
    }

    /// Which kind it is.
    #[must_use]
    pub fn kind(&self) -> JobKind {
        match self {
            Self::CreateVolume(_) => JobKind::CreateVolume,
            Self::Sweep(task) => task.kind(),
        }
    }

    /// What it is about.
    #[must_use]
    pub fn subject(&self) -> Subject {
        match self {
            Self::CreateVolume(volume) => Subject::Image {
                vm: volume.vm,
                path: volume.path.clone(),
            },
            Self::Sweep(task) => task.subject(),
        }
    }

    /// The providers that it can't do without.
    #[must_use]
    pub fn providers(&self) -> Vec<ProviderId> {
        match self {
            Self::CreateVolume(volume) => volume.provider.into_iter().collect(),
            Self::Sweep(task) => task.names(),
        }
    }

    /// In words, with the providers' names.
    #[must_use]
    pub fn words(&self, name: impl Fn(ProviderId) -> String) -> String {
        match self {
            Self::CreateVolume(volume) => format!("create {} from {}", volume.path, volume.from),
            Self::Sweep(task) => task.words(name),
        }
    }
}

/// A problem, as the row of a job has it.
#[derive(Serialize, Deserialize)]
struct Kept {
    code: i64,
    message: String,
    next: Option<String>,
}

/// Why a job was given up, for its row.
#[must_use]
pub fn problem_to_json(problem: &Problem) -> String {
    let kept = Kept {
        code: problem.code as i64,
        message: problem.message.clone(),
        next: problem.advice.as_ref().map(ToString::to_string),
    };
    serde_json::to_string(&kept).expect("it holds a number and text")
}

/// Reads what [`problem_to_json`] wrote; as it is, if that can't be read.
#[must_use]
pub fn problem_from_json(json: &str) -> Problem {
    match serde_json::from_str::<Kept>(json) {
        Ok(kept) => Problem {
            code: Code::from_number(kept.code),
            message: kept.message,
            advice: kept.next.map(Advice::from),
        },
        Err(_) => Problem::new(Code::Failed, json),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume() -> NewVolume {
        NewVolume {
            vm: VmId::random(),
            path: "/images/web01.qcow2".to_owned(),
            from: "/images/cloud.raw".to_owned(),
            from_format: Some(DeclaredFormat::Raw),
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
        let all = [
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
        let problem = Problem::new(Code::Busy, "it is in use").next("wait");
        assert_eq!(problem_from_json(&problem_to_json(&problem)), problem);
        assert_eq!(problem_from_json("?").message, "?");
    }
}
