//! What went wrong, and what it is about.

use std::fmt;

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

use super::OrNewer;
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem};
use crate::model::subject::Subject;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum SubjectKind {
    Host,
    Vm,
    /// Of a VM.
    Object,
    Provider,
    Image,
    Job,
}

/// What a problem or a finding is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct SubjectView {
    pub kind: OrNewer<SubjectKind>,
    /// Of the VM, provider, image (its path), job (its number), or object (`disk vda`, `vtpm`, `nvram`).
    pub name: Option<String>,
    /// The VM that the object is of.
    pub vm: Option<String>,
}

impl From<&Subject> for SubjectView {
    fn from(subject: &Subject) -> Self {
        let (kind, name) = match subject {
            Subject::Host => (SubjectKind::Host, None),
            Subject::Vm(name) => (SubjectKind::Vm, Some(name.clone())),
            Subject::Object { object, .. } => (SubjectKind::Object, Some(object.clone())),
            Subject::Provider(name) => (SubjectKind::Provider, Some(name.clone())),
            Subject::Image(path) => (SubjectKind::Image, Some(path.clone())),
            Subject::Job(id) => (SubjectKind::Job, Some(id.to_string())),
        };
        let vm = match subject {
            Subject::Object { vm, .. } => Some(vm.clone()),
            _ => None,
        };
        Self {
            kind: kind.into(),
            name,
            vm,
        }
    }
}

impl SubjectView {
    /// `None` for a kind that this version does not know.
    pub(super) fn known(self) -> Option<Subject> {
        let name = self.name.unwrap_or_default();
        Some(match self.kind.known()? {
            SubjectKind::Host => Subject::Host,
            SubjectKind::Vm => Subject::Vm(name),
            SubjectKind::Object => Subject::Object {
                vm: self.vm.unwrap_or_default(),
                object: name,
            },
            SubjectKind::Provider => Subject::Provider(name),
            SubjectKind::Image => Subject::Image(name),
            SubjectKind::Job => Subject::Job(name.parse().ok()?),
        })
    }
}

/// Why something was not done. Also in the row of a job that was given up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct ProblemView {
    /// The exit code: 1 to 10.
    pub code: i64,
    /// What happened, and to which object, in words.
    pub message: String,
    /// What it is about, where that is one thing.
    pub object: Option<Box<SubjectView>>,
    /// The next command to run.
    pub next: Option<String>,
}

impl From<&Problem> for ProblemView {
    fn from(problem: &Problem) -> Self {
        Self {
            code: problem.code as i64,
            message: problem.message.clone(),
            object: problem.subject.as_deref().map(|subject| Box::new(subject.into())),
            next: problem.advice.as_ref().map(ToString::to_string),
        }
    }
}

impl From<ProblemView> for Problem {
    fn from(told: ProblemView) -> Self {
        Self {
            code: Code::from_number(told.code),
            message: told.message,
            subject: told.object.and_then(|object| object.known()).map(Box::new),
            advice: told.next.map(Advice::from),
        }
    }
}

/// One end asks, or answers, what the other does not know: `what` says of what.
pub(crate) fn of_another_version(code: Code, what: impl fmt::Display) -> Problem {
    let said = format!("virtseal and virtseald are of different versions: {what}");
    Problem::new(code, said).next(
        Advice::RestartDaemon
            .note("if it was upgraded")
            .or("use the virtseal of the same version"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_survive_the_wire_and_those_of_a_newer_daemon_are_left_out() {
        for subject in [
            Subject::Host,
            Subject::Vm("a".into()),
            Subject::object("a", "disk vda"),
            Subject::Provider("main".into()),
            Subject::Image("/a".into()),
            Subject::Job(3),
        ] {
            let json = serde_json::to_string(&SubjectView::from(&subject)).unwrap();
            let read: SubjectView = serde_json::from_str(&json).unwrap();
            assert_eq!(read.known(), Some(subject), "{json}");
        }
        let newer: SubjectView = serde_json::from_str(r#"{"kind":"fleet","name":"x"}"#).unwrap();
        assert_eq!(newer.known(), None);
    }
}
