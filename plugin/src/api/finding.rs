//! What an admin should know of.

use std::fmt;

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

use super::{OrNewer, SubjectView};
use crate::model::finding::{Finding, FindingCode, Severity};
use crate::terminal::unadvised;

/// Something that the admin should know of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct FindingView {
    pub code: OrNewer<FindingCode>,
    /// How much it matters.
    pub severity: OrNewer<Severity>,
    /// What it is about.
    pub object: SubjectView,
    /// What is wrong.
    pub what: String,
    /// The next command to run, if that is a step of its own.
    pub next: Option<String>,
}

impl FindingView {
    /// Of each of these.
    pub(crate) fn all(findings: &[Finding]) -> Vec<Self> {
        findings.iter().map(Self::from).collect()
    }

    /// With what to run next.
    pub(crate) fn told(&self) -> String {
        let what = unadvised(&self.what);
        match &self.next {
            Some(next) => format!("{what}. Next: {next}"),
            None => what.into_owned(),
        }
    }
}

impl From<Finding> for FindingView {
    fn from(finding: Finding) -> Self {
        Self::from(&finding)
    }
}

impl From<&Finding> for FindingView {
    fn from(finding: &Finding) -> Self {
        Self {
            code: finding.code.into(),
            severity: finding.severity.into(),
            object: SubjectView::from(&finding.subject),
            what: finding.what.clone(),
            next: finding.advice.as_ref().map(ToString::to_string),
        }
    }
}

impl fmt::Display for FindingView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.severity, self.told())
    }
}
