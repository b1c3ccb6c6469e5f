//! What a user is told when something does not work: what happened, to which object, and the next command.
//!
//! Module errors become a [`Problem`] at the edge of the daemon; the CLI turns it into an exit code, the hook
//! into its one line.

use std::error::Error;
use std::fmt;

use crate::object::disk::VolumeError;
use crate::store::KeystoreError;
use crate::terminal::word;

/// Why a command ends, as the exit code of `virtseal`. Stable: scripts rely on the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
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
}

impl Code {
    /// The code with this number, or `Failed`.
    #[must_use]
    pub fn from_number(number: i64) -> Self {
        match number {
            2 => Self::Usage,
            3 => Self::Locked,
            4 => Self::Unreachable,
            5 => Self::NotTrusted,
            6 => Self::Denied,
            7 => Self::NotFound,
            8 => Self::WouldLoseKey,
            9 => Self::Busy,
            _ => Self::Failed,
        }
    }
}

/// A failure in the user's words. Never holds a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The exit code.
    pub code: Code,
    /// What happened, and to which object; without a full stop.
    pub message: String,
    /// The next command to run, or what to do.
    pub next: Option<String>,
}

impl Problem {
    /// A failure without advice.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            next: None,
        }
    }

    /// `what` failed because of `error` and all its sources.
    pub fn from_error(code: Code, what: impl fmt::Display, error: &dyn Error) -> Self {
        Self::new(code, format!("{what}: {}", chain(error)))
    }

    /// Adds the next command to run.
    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }

    /// Says to which object it happened.
    #[must_use]
    pub fn of(mut self, object: impl fmt::Display) -> Self {
        self.message = format!("{object}: {}", self.message);
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.next {
            Some(next) => write!(f, ". Next: {next}"),
            None => Ok(()),
        }
    }
}

impl Error for Problem {}

/// An error with all its sources, in one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text.replace('\n', " ")
}

impl From<VolumeError> for Problem {
    fn from(error: VolumeError) -> Self {
        let error = match error {
            VolumeError::Place(error) => return error.into(),
            error => error,
        };
        let code = match &error {
            VolumeError::NotFound(_) => Code::NotFound,
            VolumeError::InUse(_) => Code::Busy,
            VolumeError::HoldsData(_) => Code::WouldLoseKey,
            _ => Code::Failed,
        };
        Self::new(code, chain(&error))
    }
}

impl From<KeystoreError> for Problem {
    fn from(error: KeystoreError) -> Self {
        Self::from(&error)
    }
}

impl From<&KeystoreError> for Problem {
    fn from(error: &KeystoreError) -> Self {
        let failure = Self::new(Code::Failed, chain(error));
        match error {
            KeystoreError::ProviderExists { name, .. } => {
                failure.next(format!("virtseal provider show {}", word(name)))
            }
            error if error.is_of_row() => {
                failure.next("virtseal status, which names each damaged record and its way out")
            }
            _ => failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_survive_the_wire() {
        for number in 1..=9 {
            assert_eq!(Code::from_number(number) as i64, number);
        }
        assert_eq!(Code::from_number(77), Code::Failed);
    }

    #[test]
    fn display_ends_with_the_next_command() {
        let failure = Problem::new(Code::Locked, "provider 'main' is locked")
            .of("web01 disk vda")
            .next("virtseal provider unlock main");
        assert_eq!(
            failure.to_string(),
            "web01 disk vda: provider 'main' is locked. Next: virtseal provider unlock main"
        );
    }
}
