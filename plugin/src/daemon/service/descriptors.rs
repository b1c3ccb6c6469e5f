//! What comes with a call as file descriptors: passphrases, PINs, files.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::api::of_another_version;
use crate::model::problem::{Code, Problem};
use crate::secret::SecretBytes;

/// The most bytes of a passphrase, or of a client's key and its certificates in PEM.
const MAX_PASSPHRASE: usize = 32 * 1024;

pub(crate) fn take<const N: usize>(fds: Vec<OwnedFd>) -> Result<[OwnedFd; N], Problem> {
    fds.try_into().map_err(|_| wrong_fds())
}

pub(crate) fn wrong_fds() -> Problem {
    of_another_version(
        Code::Usage,
        "the call came without the file descriptors that it needs",
    )
}

pub(crate) fn passphrase_from(fd: OwnedFd) -> Result<SecretBytes, Problem> {
    let mut passphrase = SecretBytes::read_from(File::from(fd), MAX_PASSPHRASE)
        .map_err(|error| Problem::from_error(Code::Usage, "can't read the passphrase", &error))?;
    passphrase.trim_newline();
    if passphrase.expose().is_empty() {
        return Err(Problem::usage("the passphrase is empty").next("choose one"));
    }
    Ok(passphrase)
}

pub(crate) fn pin_from(fd: OwnedFd) -> Result<Arc<SecretBytes>, Problem> {
    passphrase_from(fd).map(Arc::new)
}
