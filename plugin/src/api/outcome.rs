//! What a command has done, or would do.

use serde::{Deserialize, Serialize};
use zlink::introspect::{CustomType, Type};

use super::{FindingView, OrNewer, ProblemView, SubjectView};
use crate::model::act::{Act, StepCode, Tense};
use crate::model::subject::Subject;

/// One step of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct StepView {
    pub code: OrNewer<StepCode>,
    /// What it is done to.
    pub object: SubjectView,
    /// The files that it is about.
    pub paths: Vec<String>,
    /// The UUID of the envelope that it is about.
    pub envelope: Option<String>,
    /// What was done, or would be.
    pub text: String,
}

impl StepView {
    /// Of each of these; `whole` is what the command is about.
    pub(crate) fn all(acts: &[Act], tense: Tense, whole: &Subject) -> Vec<Self> {
        acts.iter().map(|act| Self::of(act, tense, whole)).collect()
    }

    fn of(act: &Act, tense: Tense, whole: &Subject) -> Self {
        let part = match (whole, &act.object) {
            (Subject::Vm(vm), Some(object)) => Some(Subject::object(vm, object)),
            _ => None,
        };
        Self {
            code: act.code.into(),
            object: SubjectView::from(part.as_ref().unwrap_or(whole)),
            paths: act.paths.clone(),
            envelope: act.envelope.map(|id| id.to_string()),
            text: act.told(tense),
        }
    }
}

/// What stands in the way of a seal.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct ObstacleView {
    pub problem: ProblemView,
    /// The object that is lost, where making it anew would clear it.
    pub replace: Option<String>,
}

/// Reply of what changes a VM, a volume or a provider.
#[derive(Clone, Debug, Default, Serialize, Deserialize, Type)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Outcome {
    /// What was done, or would be.
    pub steps: Vec<StepView>,
    /// What holds now, such as "web01 is sealed".
    pub result: Option<String>,
    /// The command that comes after this one.
    pub next: Option<String>,
    /// Of a dry run: what keys are for, and what stays as it is.
    pub notes: Vec<StepView>,
    /// Of a dry run: all that stands in the way.
    pub obstacles: Vec<ObstacleView>,
    /// What the admin should know besides.
    pub warnings: Vec<FindingView>,
    /// Whether anything changed.
    pub changed: bool,
}

/// What a command would come to that asks a word for a loss.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct LossPreview {
    /// The VM's UUID: what is called so when the name was typed may be another VM.
    pub vm: String,
    /// Its name, which is to be typed.
    pub name: String,
    /// What would be done.
    pub steps: Vec<StepView>,
    /// The same, as it is told once it is done.
    pub done: Vec<StepView>,
    /// What would be lost.
    pub lost: Vec<FindingView>,
}
