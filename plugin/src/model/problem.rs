//! What a user is told when something does not work: what happened, to which object, and the next command.
//!
//! Module errors become a [`Problem`] at the edge of the daemon; the CLI turns it into an exit code, the hook
//! into its one line.

use std::error::Error;
use std::fmt;

use super::advice::Advice;

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

/// A problem in the user's words. Never holds a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The exit code.
    pub code: Code,
    /// What happened, and to which object; without a full stop.
    pub message: String,
    /// What leads out.
    pub advice: Option<Advice>,
}

impl Problem {
    /// A problem without advice.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            advice: None,
        }
    }

    /// `what` failed because of `error` and all its sources.
    pub fn from_error(code: Code, what: impl fmt::Display, error: &dyn Error) -> Self {
        Self::new(code, format!("{what}: {}", chain(error)))
    }

    /// Adds what leads out.
    #[must_use]
    pub fn next(mut self, advice: impl Into<Advice>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// Adds what leads out, where anything does.
    #[must_use]
    pub fn advised(self, advice: Option<Advice>) -> Self {
        match advice {
            Some(advice) => self.next(advice),
            None => self,
        }
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
        match &self.advice {
            Some(advice) => write!(f, ". Next: {advice}"),
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
            .next(Advice::UnlockProvider("main".into()));
        assert_eq!(
            failure.to_string(),
            "web01 disk vda: provider 'main' is locked. Next: virtseal provider unlock main"
        );
    }
}
