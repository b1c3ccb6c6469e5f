//! The state of a vTPM, which swtpm keeps in a directory that libvirt has for each VM.
//!
//! It is looked at and authenticated here, never written: swtpm makes it at the VM's first start, and answers a missing state
//! with a new, empty TPM. So a state that is not there is never taken for one that can't be read, and who knows that there was
//! one must not let the VM start.

use std::path::{Path, PathBuf};

use swtpm_state::{KeyError, OpenError, ReadError, State, StateKey, libvirt_state_dir};
use thiserror::Error;

use super::disk::ImageCopy;
use super::{Opening, Present, Shredding};
use crate::domain::{Domain, Tpm};
use crate::model::advice::Advice;
use crate::model::envelope::VmId;
use crate::model::problem::{Code, Problem, chain};
use crate::secret::Passphrase;
use crate::terminal::word;

/// Where libvirt lets swtpm keep the state of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StateDir(PathBuf);

impl StateDir {
    /// Libvirt's own place for it.
    pub(crate) fn of(vm: VmId, swtpm_dir: &Path) -> Self {
        Self(libvirt_state_dir(swtpm_dir, &vm))
    }

    /// The same, unless the XML puts it elsewhere. Nobody but the XML tells where that is.
    ///
    /// # Errors
    /// Where it says so.
    pub(crate) fn of_domain(domain: &Domain, swtpm_dir: &Path) -> Result<Self, Elsewhere> {
        let usual = Self::of(domain.uuid, swtpm_dir);
        match domain.tpm_place() {
            None => Ok(usual),
            Some(place) => Err(Elsewhere {
                vm: domain.name.clone(),
                place: place.to_owned(),
                usual,
            }),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Looks at the state without a key.
    pub(crate) fn inspect(&self) -> Result<Present, StateError> {
        Ok(match self.read()? {
            State::Absent => Present::Absent,
            State::Plain(_) => Present::Plain,
            State::Encrypted(_) => Present::Encrypted(ImageCopy::None),
        })
    }

    /// Authenticates the state with the key that swtpm derives from `passphrase`.
    pub(crate) fn open(&self, passphrase: &Passphrase) -> Result<Opening, StateError> {
        match self.read()? {
            State::Absent => Ok(Opening::NotMade),
            State::Plain(_) => Err(StateError::Plain(self.clone())),
            State::Encrypted(state) => {
                let key = StateKey::derive(passphrase.expose())?;
                state.authenticate(&key).map_err(|source| StateError::Closed {
                    dir: self.clone(),
                    source,
                })?;
                Ok(Opening::Opened)
            }
        }
    }

    /// Writes nothing: the key is outside of the state.
    pub(crate) fn shred(&self) -> Shredding {
        match self.inspect() {
            Ok(Present::Absent) => Shredding::Absent,
            Ok(Present::Plain) => Shredding::Plain,
            Ok(Present::Encrypted(_)) => Shredding::HasNoKey,
            Err(error) => Shredding::Unreadable(chain(&error)),
        }
    }

    fn read(&self) -> Result<State, StateError> {
        State::read(&self.0).map_err(|source| StateError::Unreadable {
            dir: self.clone(),
            source,
        })
    }
}

/// Why the state can't be read or opened.
#[derive(Debug, Error)]
pub(crate) enum StateError {
    #[error("its state is gone from {}, and swtpm would silently make a new TPM", .0.0.display())]
    Gone(StateDir),
    /// It is there, and is no state of swtpm's or can't be reached.
    #[error("its state in {}", dir.0.display())]
    Unreadable {
        dir: StateDir,
        #[source]
        source: ReadError,
    },
    #[error("its state in {} is not encrypted", .0.0.display())]
    Plain(StateDir),
    /// It is encrypted with another key, or was changed.
    #[error("its state in {}", dir.0.display())]
    Closed {
        dir: StateDir,
        #[source]
        source: OpenError,
    },
    #[error("its key")]
    Key(#[from] KeyError),
}

impl From<StateError> for Problem {
    fn from(error: StateError) -> Self {
        let code = match &error {
            StateError::Gone(_) | StateError::Plain(_) => Code::WouldLoseKey,
            StateError::Unreadable { .. } | StateError::Closed { .. } | StateError::Key(_) => Code::Failed,
        };
        let problem = Self::new(code, chain(&error));
        match &error {
            StateError::Gone(dir)
            | StateError::Plain(dir)
            | StateError::Unreadable { dir, .. }
            | StateError::Closed { dir, .. } => {
                problem.next(format!("restore {} from a backup", word(dir.0.display())))
            }
            StateError::Key(_) => problem,
        }
    }
}

/// The state is in a place of its own, which virtseal does not look at.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("its vTPM {}: {}", Tpm::STATE_ELSEWHERE, place.display())]
pub(crate) struct Elsewhere {
    vm: String,
    place: PathBuf,
    usual: StateDir,
}

impl From<Elsewhere> for Problem {
    fn from(error: Elsewhere) -> Self {
        Self::new(Code::Failed, error.to_string()).next(
            Advice::from(format!(
                "copy the state to {}, where libvirt has it by itself",
                word(error.usual.0.display())
            ))
            .then(Advice::EditXml(error.vm.clone()).within("take <source> out of <backend>")),
        )
    }
}
