//! Reads the state files of [swtpm](https://github.com/stefanberger/swtpm), the software TPM behind a VM's vTPM.
//!
//! A vTPM's persistent state is one file, `tpm2-00.permall`. [`State::read`] says whether it is absent, plain or
//! encrypted. With the [`StateKey`], an [`EncryptedState`] is authenticated and opened without starting swtpm, which
//! matters because swtpm makes a *new* TPM, silently, wherever it finds no state.
//!
//! ```no_run
//! use swtpm_state::{State, StateKey, libvirt_state_dir};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = libvirt_state_dir("/var/lib/libvirt/swtpm".as_ref(), &"4a1f0c52-6a1c-4a5d-9df0-2a4fb5c5a7b1");
//! match State::read(&dir)? {
//!     State::Absent => println!("no TPM has been made yet"),
//!     State::Plain(_) => println!("readable by whoever can read the file"),
//!     State::Encrypted(state) => state.authenticate(&StateKey::derive(b"passphrase")?)?,
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # What is checked, and what can't be
//!
//! The format is a 10-byte header and tag-length-value records ([`FormatError`] lists every way a file can break it).
//! The HMAC covers ciphertext and IV. It does not cover the header, and nothing says how old a file is: an earlier
//! state of the same TPM under the same key authenticates. A wrong key and a changed file look the same
//! ([`OpenError::NotAuthentic`]). Only TPM 2.0 state in the second version of the format, plain or under a 256-bit
//! key, is read: that is all that libvirt has ever asked swtpm for.

#![forbid(unsafe_code)]

mod encrypted;
mod format;
mod format_error;
mod key;
mod state;

pub use encrypted::{EncryptedState, OpenError};
pub use format_error::{FormatError, Tag};
pub use key::{KeyError, StateKey};
pub use state::{MAX_STATE_BYTES, PlainState, ReadError, STATE_FILE_NAME, State, libvirt_state_dir};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
