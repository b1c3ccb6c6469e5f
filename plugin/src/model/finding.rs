//! What is wrong, or about to be, as a value: status shows it as a warning, and doctor, metrics and reports tell the same of the same
//! thing.

use std::fmt;

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

use super::advice::Advice;
use super::problem::Problem;

/// How much it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub enum Severity {
    /// It works, and something is to be known or done.
    Warning,
    /// A VM stays off, a key can't be read, or plaintext was written.
    Critical,
}

/// What it is about, by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// This host: its settings, its keystore.
    Host,
    /// A key provider.
    Provider(String),
    /// A VM as a whole.
    Vm(String),
    /// An object of a VM, as `disk vda`.
    Object {
        /// The VM.
        vm: String,
        /// Its object.
        object: String,
    },
}

/// Something that an admin should know of, without having asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// What it is about.
    pub subject: Subject,
    /// What is wrong, with what it is about; without a full stop.
    pub what: String,
    /// What leads out.
    pub advice: Option<Advice>,
}

impl Finding {
    /// Something to know or to do.
    pub fn warning(subject: Subject, what: impl Into<String>) -> Self {
        let what = what.into();
        Self {
            severity: Severity::Warning,
            subject,
            what,
            advice: None,
        }
    }

    /// Something that does not work, or plaintext that was written.
    pub fn critical(subject: Subject, what: impl Into<String>) -> Self {
        Self {
            severity: Severity::Critical,
            ..Self::warning(subject, what)
        }
    }

    /// A problem that nobody has asked for.
    #[must_use]
    pub fn of(subject: Subject, problem: Problem) -> Self {
        Self {
            advice: problem.advice,
            ..Self::critical(subject, problem.message)
        }
    }

    /// Adds what leads out.
    #[must_use]
    pub fn next(mut self, advice: impl Into<Advice>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}

impl Severity {
    /// As it is printed.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host"),
            Self::Provider(name) => write!(f, "provider {name}"),
            Self::Vm(name) => write!(f, "VM {name}"),
            Self::Object { vm, object } => write!(f, "VM {vm}, {object}"),
        }
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
