//! Where a passphrase comes from: a prompt, a file, a file descriptor, a systemd credential.
//!
//! It reaches the daemon as a file descriptor. A file is opened here, as the caller, and read there; what was
//! typed, and what is new, goes through a pipe.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use clap::Args;
use zeroize::Zeroizing;

use super::print::Printer;
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Code, Problem};
use crate::secret::SecretBytes;
use crate::terminal::visible;

/// How often a prompt asks for the same.
pub(super) const TRIES: usize = 3;
/// A new passphrase of fewer characters is warned about.
const SHORT: usize = 10;
/// What a pipe takes before a write would wait is twice this.
const MAX_PASSPHRASE: usize = 32 * 1024;

/// For a passphrase that exists.
#[derive(Debug, Args)]
pub(super) struct PassphraseArgs {
    /// Read the passphrase, or PIN, from this file; - is standard input.
    #[arg(
        long,
        visible_alias = "pin-file",
        value_name = "FILE",
        group = "passphrase_source"
    )]
    passphrase_file: Option<PathBuf>,
    /// Read the passphrase, or PIN, from this file descriptor.
    #[arg(long, visible_alias = "pin-fd", value_name = "N", group = "passphrase_source")]
    passphrase_fd: Option<i32>,
    /// Read the passphrase, or PIN, from this systemd credential.
    #[arg(
        long,
        visible_alias = "pin-credential",
        value_name = "NAME",
        group = "passphrase_source"
    )]
    passphrase_credential: Option<String>,
}

/// For a passphrase that is being chosen: a prompt asks twice.
#[derive(Debug, Args)]
pub(super) struct NewPassphraseArgs {
    #[command(flatten)]
    source: PassphraseArgs,
}

impl PassphraseArgs {
    /// A descriptor to read the passphrase from.
    pub(super) fn open(&self, prompt: &str) -> Result<OwnedFd, Problem> {
        match self.given() {
            Some(source) => source,
            None => to_pipe(&ask(prompt)?),
        }
    }

    /// Whether nobody has to be asked.
    pub(super) fn is_given(&self) -> bool {
        self.passphrase_file.is_some() || self.passphrase_fd.is_some() || self.passphrase_credential.is_some()
    }

    fn given(&self) -> Option<Result<OwnedFd, Problem>> {
        if let Some(path) = &self.passphrase_file {
            return Some(open_file(path));
        }
        if let Some(fd) = self.passphrase_fd {
            return Some(inherited(fd));
        }
        self.passphrase_credential.as_deref().map(credential)
    }
}

impl NewPassphraseArgs {
    /// Whether one comes from elsewhere than a prompt.
    pub(super) fn is_given(&self) -> bool {
        self.source.passphrase_file.is_some()
            || self.source.passphrase_fd.is_some()
            || self.source.passphrase_credential.is_some()
    }

    /// A descriptor to read the passphrase from. `about` is what it protects.
    pub(super) fn open(&self, prompt: &str, about: &Subject, printer: &Printer) -> Result<OwnedFd, Problem> {
        if let Some(source) = self.source.given() {
            let given = SecretBytes::read_from(File::from(source?), MAX_PASSPHRASE)
                .map_err(|error| Problem::from_error(Code::Usage, "can't read the passphrase", &error))?;
            warn_if_short(given.expose(), about, printer);
            return pipe_with(given.expose());
        }
        let passphrase = ask_twice(prompt, printer)?;
        warn_if_short(passphrase.as_bytes(), about, printer);
        to_pipe(&passphrase)
    }

    /// The same for a PIN, which may be short: who asks for it counts wrong ones.
    pub(super) fn open_pin(&self, prompt: &str, printer: &Printer) -> Result<OwnedFd, Problem> {
        match self.source.given() {
            Some(source) => source,
            None => to_pipe(&ask_twice(prompt, printer)?),
        }
    }
}

fn warn_if_short(passphrase: &[u8], about: &Subject, printer: &Printer) {
    if is_short(passphrase) {
        let what = format!(
            "the passphrase has fewer than {SHORT} characters: whoever gets a copy of what it protects can try them all"
        );
        printer.warn(Finding::warning(
            FindingCode::PassphraseShort,
            about.clone(),
            what,
        ));
    }
}

/// In UTF-8, without the newline that `echo` and editors put at its end.
fn is_short(passphrase: &[u8]) -> bool {
    let is_end = |byte: &&u8| [b'\n', b'\r'].contains(byte);
    let end = passphrase.iter().rev().take(2).take_while(is_end).count();
    let begins_one = |byte: &&u8| **byte & 0xc0 != 0x80;
    let characters = passphrase[..passphrase.len() - end].iter().filter(begins_one);
    characters.count() < SHORT
}

fn ask_twice(prompt: &str, printer: &Printer) -> Result<Zeroizing<String>, Problem> {
    for _ in 0..TRIES {
        let first = ask(prompt)?;
        if *first == *ask("Once more: ")? {
            return Ok(first);
        }
        printer.caution("the two differ");
    }
    Err(Problem::usage("the two differ, three times").next("try again"))
}

/// Opens a file that holds a secret; - is standard input.
pub(super) fn open_file(path: &Path) -> Result<OwnedFd, Problem> {
    if path == Path::new("-") {
        return inherited(0);
    }
    let file = File::open(path)
        .map_err(|error| Problem::from_io(format!("can't open {}", path.display()), &error))?;
    Ok(file.into())
}

/// A descriptor that the caller's shell opened for us; the same one, for opening a named pipe anew would wait for another
/// writer.
pub(super) fn inherited(fd: i32) -> Result<OwnedFd, Problem> {
    // SAFETY: fcntl takes numbers only, and answers one that is not open with an error.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        let error = io::Error::last_os_error();
        return Err(
            Problem::from_error(Code::Usage, format!("can't read file descriptor {fd}"), &error)
                .next(format!("open it in the shell: virtseal … {fd}<FILE")),
        );
    }
    // SAFETY: `copy` was just returned to us and is owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

fn credential(name: &str) -> Result<OwnedFd, Problem> {
    let directory = std::env::var_os("CREDENTIALS_DIRECTORY").ok_or_else(|| {
        Problem::usage(format!(
            "no systemd credential '{name}': CREDENTIALS_DIRECTORY is not set"
        ))
        .next(format!("run it in a unit with LoadCredential={name}:FILE"))
    })?;
    if name.contains('/') {
        return Err(Problem::usage(format!(
            "'{name}' is not the name of a credential"
        )));
    }
    open_file(&Path::new(&directory).join(name))
}

/// Asks on the terminal.
pub(super) fn ask(prompt: &str) -> Result<Zeroizing<String>, Problem> {
    if !io::stdin().is_terminal() {
        return Err(
            Problem::usage("a passphrase is needed, and there is no terminal to ask on")
                .next("give it with --passphrase-file FILE, or --passphrase-file - for standard input"),
        );
    }
    rpassword::prompt_password(visible(prompt).as_ref())
        .map(Zeroizing::new)
        .map_err(|error| Problem::from_error(Code::Failed, "can't ask for the passphrase", &error))
}

/// A pipe that holds `secret`.
pub(super) fn to_pipe(secret: &str) -> Result<OwnedFd, Problem> {
    // No one types more.
    let secret = secret
        .as_bytes()
        .get(..MAX_PASSPHRASE)
        .unwrap_or(secret.as_bytes());
    pipe_with(secret)
}

fn pipe_with(secret: &[u8]) -> Result<OwnedFd, Problem> {
    let failed = |error: &dyn std::error::Error| {
        Problem::from_error(Code::Failed, "can't hand the passphrase over", error)
    };
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|error| failed(&error))?;
    File::from(write)
        .write_all(secret)
        .map_err(|error| failed(&error))?;
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passphrase_is_measured_in_characters_and_without_its_newline() {
        for short in ["", "123456789", "123456789\n", "123456789\r\n", "äöüäöüäöü"] {
            assert!(is_short(short.as_bytes()), "{short:?}");
        }
        for long in ["1234567890", "1234567890\n", "äöüäöüäöüß\n"] {
            assert!(!is_short(long.as_bytes()), "{long:?}");
        }
    }
}
