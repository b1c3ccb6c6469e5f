//! What went wrong, and what it is about.

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

use super::OrNewer;
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem};
use crate::model::subject::Subject;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
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

/// See [`Subject`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
pub(crate) struct SubjectView {
    pub kind: OrNewer<SubjectKind>,
    /// Of the VM, provider, image (its path) or job (its number).
    pub name: Option<String>,
    /// Of the VM: `disk vda`, `vtpm`, `nvram`.
    pub object: Option<String>,
}

impl From<&Subject> for SubjectView {
    fn from(subject: &Subject) -> Self {
        let (kind, name) = match subject {
            Subject::Host => (SubjectKind::Host, None),
            Subject::Vm(name) => (SubjectKind::Vm, Some(name.clone())),
            Subject::Object { vm, .. } => (SubjectKind::Object, Some(vm.clone())),
            Subject::Provider(name) => (SubjectKind::Provider, Some(name.clone())),
            Subject::Image(path) => (SubjectKind::Image, Some(path.clone())),
            Subject::Job(id) => (SubjectKind::Job, Some(id.to_string())),
        };
        let object = match subject {
            Subject::Object { object, .. } => Some(object.clone()),
            _ => None,
        };
        Self {
            kind: kind.into(),
            name,
            object,
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
                vm: name,
                object: self.object.unwrap_or_default(),
            },
            SubjectKind::Provider => Subject::Provider(name),
            SubjectKind::Image => Subject::Image(name),
            SubjectKind::Job => Subject::Job(name.parse().ok()?),
        })
    }
}

/// A [`Problem`] on the wire, and in the row of a job that was given up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
pub(crate) struct ProblemView {
    /// The exit code that the CLI should end with.
    pub code: i64,
    /// What happened, and to which object.
    pub message: String,
    /// What it is about, where that is one thing.
    pub subject: Option<Box<SubjectView>>,
    /// The next command to run.
    pub next: Option<String>,
}

impl From<&Problem> for ProblemView {
    fn from(problem: &Problem) -> Self {
        Self {
            code: problem.code as i64,
            message: problem.message.clone(),
            subject: problem.subject.as_deref().map(|subject| Box::new(subject.into())),
            next: problem.advice.as_ref().map(ToString::to_string),
        }
    }
}

impl From<ProblemView> for Problem {
    fn from(told: ProblemView) -> Self {
        Self {
            code: Code::from_number(told.code),
            message: told.message,
            subject: told.subject.and_then(|subject| subject.known()).map(Box::new),
            advice: told.next.map(Advice::from),
        }
    }
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
