//! What a user is told when something does not work: what happened, to which object, and the next command.
//!
//! Module errors become a [`Problem`] at the edge of the daemon; the CLI turns it into an exit code, the hook
//! into its one line.

use std::error::Error;
use std::{fmt, io};

use super::advice::Advice;
use super::subject::Subject;
use crate::terminal::unadvised;

/// Why a command ends, as the exit code of `virtseal`. Stable: scripts rely on the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Code {
    /// None of the others.
    Failed = 1,
    /// The command line or the configuration is wrong.
    Usage = 2,
    /// A provider must be unlocked first.
    Locked = 3,
    /// A provider, libvirt or virtseald does not answer.
    Unreachable = 4,
    /// Trust between host and provider is not established.
    NotTrusted = 5,
    /// The caller may not do this.
    Denied = 6,
    /// There is no such VM, provider, image or envelope.
    NotFound = 7,
    /// Refused, because a key or data would be lost.
    WouldLoseKey = 8,
    /// The VM or the image is in use.
    Busy = 9,
    /// What is to be made is there already.
    Exists = 10,
}

impl Code {
    /// The code with this number, or `Failed`.
    pub(crate) fn from_number(number: i64) -> Self {
        match number {
            2 => Self::Usage,
            3 => Self::Locked,
            4 => Self::Unreachable,
            5 => Self::NotTrusted,
            6 => Self::Denied,
            7 => Self::NotFound,
            8 => Self::WouldLoseKey,
            9 => Self::Busy,
            10 => Self::Exists,
            _ => Self::Failed,
        }
    }
}

/// A problem in the user's words. Never holds a key.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Problem {
    pub code: Code,
    /// What happened, and to which object; without a full stop.
    pub message: String,
    /// The nearest thing that it is about, where there is one.
    pub subject: Option<Box<Subject>>,
    pub advice: Option<Advice>,
}

impl Problem {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            subject: None,
            advice: None,
        }
    }

    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(Code::Failed, message)
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Code::Usage, message)
    }

    pub(crate) fn unreachable(message: impl Into<String>) -> Self {
        Self::new(Code::Unreachable, message)
    }

    pub(crate) fn denied(message: impl Into<String>) -> Self {
        Self::new(Code::Denied, message)
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(Code::NotFound, message)
    }

    pub(crate) fn would_lose_key(message: impl Into<String>) -> Self {
        Self::new(Code::WouldLoseKey, message)
    }

    pub(crate) fn busy(message: impl Into<String>) -> Self {
        Self::new(Code::Busy, message)
    }

    /// The system did not let `what` be done.
    pub(crate) fn from_io(what: impl fmt::Display, error: &io::Error) -> Self {
        let code = match error.kind() {
            io::ErrorKind::AlreadyExists => Code::Exists,
            io::ErrorKind::NotFound => Code::NotFound,
            io::ErrorKind::PermissionDenied => Code::Denied,
            _ => Code::Failed,
        };
        Self::from_error(code, what, error)
    }

    /// `what` failed because of `error` and all its sources.
    pub(crate) fn from_error(code: Code, what: impl fmt::Display, error: &dyn Error) -> Self {
        Self::new(code, format!("{what}: {}", chain(error)))
    }

    pub(crate) fn next(mut self, advice: impl Into<Advice>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// Adds what leads out, where anything does.
    pub(crate) fn advised(self, advice: Option<Advice>) -> Self {
        match advice {
            Some(advice) => self.next(advice),
            None => self,
        }
    }

    /// Says what it is about, unless something nearer has been named.
    pub(crate) fn about(mut self, subject: Subject) -> Self {
        self.subject.get_or_insert_with(|| Box::new(subject));
        self
    }

    /// Says to which object it happened, in the message.
    pub(crate) fn of(mut self, object: impl fmt::Display) -> Self {
        self.message = format!("{object}: {}", self.message);
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&unadvised(&self.message))?;
        match &self.advice {
            Some(advice) => write!(f, ". Next: {advice}"),
            None => Ok(()),
        }
    }
}

impl Error for Problem {}

/// An error with all its sources, in one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_survive_the_wire() {
        for number in 1..=10 {
            assert_eq!(Code::from_number(number) as i64, number);
        }
        assert_eq!(Code::from_number(77), Code::Failed);
    }

    #[test]
    fn the_nearest_subject_stays() {
        let failure = Problem::new(Code::Locked, "locked")
            .about(Subject::Provider("main".into()))
            .about(Subject::Vm("web01".into()));
        assert_eq!(
            failure.subject.as_deref(),
            Some(&Subject::Provider("main".into()))
        );
    }

    /// As in the name of a VM, a path, or what libvirt says.
    #[test]
    fn advice_of_others_is_none_of_ours() {
        let path = "/images/a. Next: rm -rf /.qcow2";
        let failure = Problem::failed(format!("{path} is in use"));
        assert!(!failure.to_string().contains("Next:"), "{failure}");
        let told = failure.next(Advice::ShowVolume(path.into())).to_string();
        let (what, next) = told.split_once(". Next: ").unwrap();
        assert_eq!(what, "/images/a. Next\\u{3a} rm -rf /.qcow2 is in use");
        assert_eq!(next, Advice::ShowVolume(path.into()).to_string());
    }

    #[test]
    fn display_ends_with_the_next_command() {
        let failure = Problem::new(Code::Locked, "provider 'main' is locked")
            .of("web01 disk vda")
            .next(Advice::UnlockProvider("main".into()));
        assert_eq!(
            failure.to_string(),
            "web01 disk vda: provider 'main' is locked. Next: virtseal provider unlock main"
        );
    }
}
