//! What commands answer, and the states of a domain as `virsh domstate` words them.

use std::process::{Command, ExitStatus};

use anyhow::{Context, Result, bail};

/// The end of a command, with all it printed.
#[derive(Debug)]
pub struct Output {
    /// The command line, for messages.
    pub command: String,
    /// Its exit status.
    pub status: ExitStatus,
    /// Its standard output, lossily as UTF-8.
    pub stdout: String,
    /// Its standard error, lossily as UTF-8.
    pub stderr: String,
}

impl Output {
    pub(crate) fn new(command: String, output: &std::process::Output) -> Self {
        Self {
            command,
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Its exit code, if no signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Runs a command that was put together by hand to its end.
    ///
    /// # Errors
    /// It could not be started.
    pub fn of(command: &mut Command) -> Result<Self> {
        let words = format!("{command:?}");
        let output = command
            .output()
            .with_context(|| format!("{words} did not start"))?;
        Ok(Self::new(words, &output))
    }

    /// Its standard output, without white space at the end.
    ///
    /// # Errors
    /// The command failed; the message holds what it printed.
    pub fn succeeded(self) -> Result<String> {
        if !self.status.success() {
            bail!(
                "`{}` failed ({}): {}{}",
                self.command,
                self.status,
                self.stdout,
                self.stderr
            );
        }
        Ok(self.stdout.trim_end().to_owned())
    }

    /// Its standard error, without white space at the end.
    ///
    /// # Errors
    /// The command succeeded, which the caller did not want.
    pub fn refused(self) -> Result<String> {
        if self.status.success() {
            bail!(
                "`{}` succeeded, but should have been refused: {}",
                self.command,
                self.stdout
            );
        }
        Ok(self.stderr.trim_end().to_owned())
    }
}

/// The state of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DomainState {
    /// Its vCPUs run.
    Running,
    /// QEMU is there, the vCPUs stand still.
    Paused,
    /// No QEMU.
    ShutOff,
    /// QEMU or the guest crashed.
    Crashed,
    /// Any other word of virsh.
    Other(String),
}

impl DomainState {
    pub(crate) fn parse(word: &str) -> Self {
        match word.trim() {
            "running" => Self::Running,
            "paused" => Self::Paused,
            "shut off" => Self::ShutOff,
            "crashed" => Self::Crashed,
            other => Self::Other(other.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_virsh_words() {
        assert_eq!(DomainState::parse("shut off\n\n"), DomainState::ShutOff);
        assert_eq!(
            DomainState::parse("in shutdown"),
            DomainState::Other("in shutdown".to_owned())
        );
    }
}
