//! From a path to a [`State`]: the only part of this crate that touches files. It only ever reads.
//!
//! State directories belong to the account that runs swtpm, so a reader with more rights must expect anything there: it
//! follows no symbolic link to the file, never waits on a pipe, and reads no more than [`MAX_STATE_BYTES`].

use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::encrypted::EncryptedState;
use crate::format::{self, Layout};
use crate::format_error::FormatError;

/// The name of a TPM 2.0's state file in swtpm's state directory.
pub const STATE_FILE_NAME: &str = "tpm2-00.permall";

/// The largest file that is read, 1 MiB. The largest state that libtpms writes is about a sixth of it.
pub const MAX_STATE_BYTES: u64 = 1 << 20;

/// Where libvirt lets swtpm keep a VM's state: `<root>/<UUID of the VM>/tpm2`, with `/var/lib/libvirt/swtpm` as the
/// root of the system's libvirt.
pub fn libvirt_state_dir(root: &Path, vm_uuid: &impl Display) -> PathBuf {
    root.join(vm_uuid.to_string()).join("tpm2")
}

/// What is known of a TPM's state without a key.
#[derive(Debug)]
pub enum State {
    /// There is no state file: swtpm would make a new TPM here.
    Absent,
    /// The state is readable by whoever can read the file.
    Plain(PlainState),
    /// The state is encrypted under a 256-bit key.
    Encrypted(EncryptedState),
}

/// A state that swtpm keeps in plaintext. Zeroized when dropped, because it holds the TPM's seeds.
pub struct PlainState(Zeroizing<Vec<u8>>);

/// Why a state file was not read. An absent file is not an error but [`State::Absent`].
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The operating system refused.
    #[error("can't read the TPM state {path}", path = path.display())]
    Io {
        /// The state file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A symbolic link, a directory, a pipe or a device where the state file belongs.
    #[error("the TPM state {path} is not a regular file", path = path.display())]
    NotAFile {
        /// The state file.
        path: PathBuf,
    },
    /// More bytes than any TPM writes.
    #[error("the TPM state {path} has {bytes} bytes, no TPM needs more than {MAX_STATE_BYTES}", path = path.display())]
    TooLarge {
        /// The state file.
        path: PathBuf,
        /// Size of the file.
        bytes: u64,
    },
    /// The file's size changed under the reader. swtpm replaces the file as a whole, so something else wrote to it.
    #[error("the TPM state {path} changed while it was read", path = path.display())]
    Changed {
        /// The state file.
        path: PathBuf,
    },
    /// The contents are no state of swtpm.
    #[error("{path} is not a TPM state that can be read", path = path.display())]
    Format {
        /// The state file.
        path: PathBuf,
        /// What is wrong with the contents.
        source: FormatError,
    },
}

impl State {
    /// Reads a state file, given the file itself or the directory that holds it as [`STATE_FILE_NAME`].
    ///
    /// # Errors
    ///
    /// [`ReadError`] for a file that is there but can't be read, or breaks the format. A path of which any part does
    /// not exist is [`State::Absent`].
    pub fn read(path: &Path) -> Result<State, ReadError> {
        let path = if path.is_dir() {
            path.join(STATE_FILE_NAME)
        } else {
            path.to_owned()
        };
        let Some(bytes) = read_file(&path)? else {
            return Ok(State::Absent);
        };
        State::parse(&bytes).map_err(|source| ReadError::Format { path, source })
    }

    /// Parses the contents of a state file. Never gives [`State::Absent`].
    ///
    /// # Errors
    ///
    /// [`FormatError`] says how the bytes break the format.
    pub fn parse(file: &[u8]) -> Result<State, FormatError> {
        Ok(match format::parse(file)? {
            Layout::Plain(state) => State::Plain(PlainState(Zeroizing::new(state.to_vec()))),
            Layout::Encrypted { ciphertext, hmac, iv } => {
                State::Encrypted(EncryptedState::new(ciphertext, *hmac, *iv))
            }
        })
    }
}

impl PlainState {
    /// The state in libtpms' own serialized form.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for PlainState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PlainState")
            .field("bytes", &self.0.len())
            .finish_non_exhaustive()
    }
}

/// The file's bytes, or `None` where there is no file. A plain state's bytes are secret, hence the zeroized buffer.
fn read_file(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, ReadError> {
    let io_error = |source| ReadError::Io {
        path: path.to_owned(),
        source,
    };
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = match OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(path)
    {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        // O_NOFOLLOW answers ELOOP at a symbolic link; a socket can't be opened at all.
        Err(_) if path.symlink_metadata().is_ok_and(|m| !m.is_file()) => {
            return Err(ReadError::NotAFile {
                path: path.to_owned(),
            });
        }
        Err(e) => return Err(io_error(e)),
    };
    let metadata = file.metadata().map_err(io_error)?;
    if !metadata.is_file() {
        return Err(ReadError::NotAFile {
            path: path.to_owned(),
        });
    }
    if metadata.len() > MAX_STATE_BYTES {
        return Err(ReadError::TooLarge {
            path: path.to_owned(),
            bytes: metadata.len(),
        });
    }
    let size = usize::try_from(metadata.len()).expect("at most MAX_STATE_BYTES");
    let bytes = read_exactly(&file, size).map_err(io_error)?;
    bytes.map(Some).ok_or_else(|| ReadError::Changed {
        path: path.to_owned(),
    })
}

/// Reads `size` bytes up to the end of the file, `None` if it ends elsewhere. One allocation, so that no copy of a
/// secret is left behind by a growing buffer.
fn read_exactly(mut file: &File, size: usize) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
    let mut bytes = Zeroizing::new(vec![0; size]);
    match file.read_exact(&mut bytes) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let at_end = file.read(&mut [0; 1])? == 0;
    Ok(at_end.then_some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;
    use std::fs;
    use std::os::unix::{fs::symlink, net::UnixListener};
    use tempfile::TempDir;

    const PLAIN: &[u8] = b"\x02\x01\x00\x0a\x00\x00\x00\x00\x00\x15\x00\x01\x00\x00\x00\x05state";

    fn state_dir() -> (TempDir, PathBuf) {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join(STATE_FILE_NAME);
        (dir, file)
    }

    #[test]
    fn file_and_directory_name_the_same_state() {
        let (dir, file) = state_dir();
        fs::write(&file, PLAIN).unwrap();
        for path in [dir.path(), &file] {
            assert!(
                matches!(State::read(path).unwrap(), State::Plain(state) if state.as_bytes() == b"state")
            );
        }
    }

    #[test]
    fn what_is_not_there_is_absent() {
        let (dir, file) = state_dir();
        for path in [dir.path(), &file, &libvirt_state_dir(dir.path(), &"no-such-vm")] {
            assert!(
                matches!(State::read(path), Ok(State::Absent)),
                "{}",
                path.display()
            );
        }
    }

    #[test]
    fn an_empty_file_is_damage_and_not_absence() {
        let (dir, file) = state_dir();
        fs::write(&file, b"").unwrap();
        let error = State::read(dir.path()).unwrap_err();
        assert!(
            matches!(
                error,
                ReadError::Format {
                    source: FormatError::Empty,
                    ..
                }
            ),
            "{error:?}"
        );
    }

    #[test]
    fn links_pipes_sockets_and_directories_are_refused_without_waiting() {
        let make: [fn(&Path); 5] = [
            |file| symlink("/etc/passwd", file).unwrap(),
            |file| symlink("nowhere", file).unwrap(),
            |file| nix::unistd::mkfifo(file, Mode::S_IRWXU).unwrap(),
            |file| drop(UnixListener::bind(file).unwrap()),
            |file| fs::create_dir(file).unwrap(),
        ];
        for make in make {
            let (dir, file) = state_dir();
            make(&file);
            let error = State::read(dir.path()).unwrap_err();
            assert!(matches!(error, ReadError::NotAFile { .. }), "{error:?}");
        }
    }

    #[test]
    fn a_huge_file_is_refused_unread() {
        let (dir, file) = state_dir();
        File::create(&file).unwrap().set_len(1 << 40).unwrap();
        let error = State::read(dir.path()).unwrap_err();
        assert!(
            matches!(error, ReadError::TooLarge { bytes, .. } if bytes == 1 << 40),
            "{error:?}"
        );
    }

    #[test]
    fn a_file_of_another_size_than_announced_has_changed() {
        let (_dir, file) = state_dir();
        fs::write(&file, PLAIN).unwrap();
        let read = |size| read_exactly(&File::open(&file).unwrap(), size).unwrap();
        assert!(read(PLAIN.len() - 1).is_none() && read(PLAIN.len() + 1).is_none());
        assert_eq!(&**read(PLAIN.len()).unwrap(), PLAIN);
    }

    #[test]
    fn a_plain_state_is_not_printed() {
        let state = State::parse(PLAIN).unwrap();
        assert_eq!(format!("{state:?}"), "Plain(PlainState { bytes: 5, .. })");
    }
}
