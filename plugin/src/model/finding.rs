//! What is wrong, or about to be, as a value: status shows it as a warning, and doctor, metrics and reports tell the same of the same
//! thing.

use std::fmt;

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

use super::advice::Advice;
use super::problem::Problem;

pub(crate) use super::subject::Subject;

/// How much it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum Severity {
    /// It works, and something is to be known or done.
    Warning,
    /// A VM stays off, a key can't be read, or plaintext was written.
    Critical,
}

/// Something that an admin should know of, without having asked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Finding {
    pub severity: Severity,
    pub subject: Subject,
    /// What is wrong, with what it is about; without a full stop.
    pub what: String,
    pub advice: Option<Advice>,
}

impl Finding {
    /// Something to know or to do.
    pub(crate) fn warning(subject: Subject, what: impl Into<String>) -> Self {
        let what = what.into();
        Self {
            severity: Severity::Warning,
            subject,
            what,
            advice: None,
        }
    }

    /// Something that does not work, or plaintext that was written.
    pub(crate) fn critical(subject: Subject, what: impl Into<String>) -> Self {
        Self {
            severity: Severity::Critical,
            ..Self::warning(subject, what)
        }
    }

    /// A problem that nobody has asked for.
    pub(crate) fn of(subject: Subject, problem: Problem) -> Self {
        Self {
            advice: problem.advice,
            ..Self::critical(subject, problem.message)
        }
    }

    pub(crate) fn next(mut self, advice: impl Into<Advice>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        match &self.advice {
            Some(advice) => write!(f, ". Next: {advice}"),
            None => Ok(()),
        }
    }
}
