//! What is sealed of a VM, each kind in a module of its own: disks ([`disk`]), the UEFI variable store ([`nvram`]) and the state
//! of the vTPM ([`vtpm`]).
//!
//! [`Located`] is an object where it is on this host: what is done with any of them in the same words is done through it, so
//! that nobody else has to ask whether it is a file or a directory of swtpm's.

pub(crate) mod disk;
mod error;
mod inspected;
pub(crate) mod nvram;
mod opened_headers;
#[cfg(test)]
mod tests;
pub(crate) mod vtpm;

use std::fmt;
use std::path::{Path, PathBuf};

use nix::sys::stat::lstat;
use swtpm_state::STATE_FILE_NAME;

use crate::domain::{Domain, Object};
use crate::host::file_stamp::FileStamp;
use crate::host::permitted::{PathError, PermittedPath};
use crate::model::envelope::{EnvelopeId, Form, ObjectKind, VmId};
use crate::model::problem::Problem;
use crate::secret::Passphrase;
use crate::store::EnvelopeRecord;
use disk::{ImageCopy, VolumeError};
use vtpm::{StateDir, StateError};

pub(crate) use error::ObjectError;
pub(crate) use inspected::Inspected;
pub(crate) use opened_headers::OpenedHeaders;

/// Where an object is.
#[derive(Clone, Debug)]
pub(crate) enum Located {
    /// The file or device of a disk or a variable store.
    Image(PermittedPath),
    /// The directory of a vTPM's state.
    State(StateDir),
}

/// What is there, as far as it shows without a key.
#[derive(Clone, Debug)]
pub(crate) enum Present {
    /// Nothing.
    Absent,
    /// Something that is not encrypted.
    Plain,
    /// Something encrypted, with the envelope that it carries.
    Encrypted(ImageCopy),
}

/// What opening an object with its key has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opening {
    /// It is there, and this is its key.
    Opened,
    /// It is not there, as before the first start of its VM, which makes it.
    NotMade,
}

/// What ending an object's keys has come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Shredding {
    /// It was the object that was meant.
    Done(Shredded),
    /// There is no key in it: it is encrypted with one that is gone with the envelope's stanzas.
    HasNoKey,
    /// Left alone: it carries another envelope.
    Carries(EnvelopeId),
    /// Left alone: it carries no envelope, and the passphrase does not open it. So many keyslots are active.
    NotShown(usize),
    /// Left alone: it is not encrypted.
    Plain,
    Absent,
    /// Left alone where that destroys nothing: why it can't be read.
    Unreadable(String),
}

/// What was destroyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shredded {
    /// Keyslots that were active.
    pub keyslots: usize,
    /// Bytes of key material that were overwritten.
    pub material: u64,
    /// Whether a copy of the envelope was removed.
    pub envelope: bool,
}

impl Located {
    /// The object of this kind that `vm` has, at `path` if it is an image; `None` for an image that has no path on this host.
    ///
    /// # Errors
    /// Those of `permit`, which says whether an image at that path may be looked at.
    pub(crate) fn of(
        kind: ObjectKind,
        vm: VmId,
        path: Option<&Path>,
        swtpm_dir: &Path,
        permit: impl FnOnce(&Path) -> Result<PermittedPath, PathError>,
    ) -> Result<Option<Self>, PathError> {
        match kind.form() {
            Form::State => Ok(Some(Self::made_by_start(vm, swtpm_dir))),
            Form::Image => Ok(path.map(permit).transpose()?.map(Self::Image)),
        }
    }

    /// The object of `vm` that its first start makes.
    pub(crate) fn made_by_start(vm: VmId, swtpm_dir: &Path) -> Self {
        Self::State(StateDir::of(vm, swtpm_dir))
    }

    /// The file or directory.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Image(place) => place.shown(),
            Self::State(dir) => dir.path(),
        }
    }

    /// Of its file; none while there is no file that has one.
    fn stamp(&self) -> Option<FileStamp> {
        match self {
            Self::Image(place) => place.stamp(),
            Self::State(dir) => FileStamp::of(&lstat(&dir.path().join(STATE_FILE_NAME)).ok()?),
        }
    }

    /// Looks at it without a key.
    pub(crate) fn inspect(&self) -> Result<Present, ObjectError> {
        match self {
            Self::Image(place) => match disk::identify(place) {
                Ok((format, copy)) if format.is_encrypted() => Ok(Present::Encrypted(copy)),
                Ok(_) => Ok(Present::Plain),
                Err(VolumeError::NotFound(_)) => Ok(Present::Absent),
                Err(error) => Err(error.into()),
            },
            Self::State(dir) => Ok(dir.inspect()?),
        }
    }

    /// Why it would not open with any key, where that shows in what is there.
    pub(crate) fn objection(&self, present: &Present) -> Option<ObjectError> {
        match (present, self) {
            (Present::Encrypted(_), _) => None,
            (Present::Absent, _) => Some(self.gone()),
            (Present::Plain, Self::Image(place)) => {
                Some(VolumeError::NotEncrypted(place.shown().to_owned()).into())
            }
            (Present::Plain, Self::State(dir)) => Some(StateError::Plain(dir.clone()).into()),
        }
    }

    /// Really opens it with `passphrase`.
    ///
    /// # Errors
    /// When it is not encrypted, or not with this key; when it can't be read, or is an image that is not there.
    pub(crate) fn open(&self, passphrase: &Passphrase) -> Result<Opening, ObjectError> {
        match self {
            Self::Image(place) => {
                disk::open(place, passphrase)?;
                Ok(Opening::Opened)
            }
            Self::State(dir) => Ok(dir.open(passphrase)?),
        }
    }

    /// Whether its keys could be ended now.
    ///
    /// # Errors
    /// [`VolumeError::InUse`] while anyone has it open, and when it is there and can't be opened for writing.
    pub(crate) fn is_free(&self) -> Result<(), ObjectError> {
        match self {
            Self::Image(place) => match disk::is_free(place) {
                Ok(()) | Err(VolumeError::NotFound(_)) => Ok(()),
                Err(error) => Err(error.into()),
            },
            Self::State(_) => Ok(()),
        }
    }

    /// Ends its keys, if it is the object of envelope `id`; see [`disk::shred`] and [`StateDir::shred`]. May be repeated.
    ///
    /// # Errors
    /// [`VolumeError::InUse`] while anyone has it open, and when it can't be written.
    pub(crate) fn shred(
        &self,
        id: EnvelopeId,
        passphrase: Option<&Passphrase>,
    ) -> Result<Shredding, ObjectError> {
        match self {
            Self::Image(place) => match disk::shred(place, id, passphrase) {
                Err(VolumeError::NotFound(_)) => Ok(Shredding::Absent),
                Err(VolumeError::NotEncrypted(_)) => Ok(Shredding::Plain),
                shredding => Ok(shredding?),
            },
            Self::State(dir) => Ok(dir.shred()),
        }
    }

    /// What there is to say where it must be there and is not.
    pub(crate) fn gone(&self) -> ObjectError {
        match self {
            Self::Image(place) => VolumeError::NotFound(place.shown().to_owned()).into(),
            Self::State(dir) => StateError::Gone(dir.clone()).into(),
        }
    }
}

/// Where the keystore has the object of an envelope, or libvirt by itself.
pub(crate) fn path_of(record: &EnvelopeRecord, swtpm_dir: &Path) -> PathBuf {
    let envelope = &record.envelope;
    match envelope.kind.form() {
        Form::State => StateDir::of(envelope.vm, swtpm_dir).path().to_owned(),
        Form::Image => (&record.location).into(),
    }
}

/// That all objects of a domain are where virtseal looks for them.
///
/// # Errors
/// Where its XML has the state of its vTPM elsewhere.
pub(crate) fn refuse_elsewhere(domain: &Domain, swtpm_dir: &Path) -> Result<(), Problem> {
    Ok(StateDir::of_domain(domain, swtpm_dir).map(drop)?)
}

/// Where the XML has an object, or libvirt by itself.
pub(crate) fn path_in(domain: &Domain, object: &Object, swtpm_dir: &Path) -> Option<PathBuf> {
    match object.kind.form() {
        Form::State => StateDir::of_domain(domain, swtpm_dir)
            .ok()
            .map(|dir| dir.path().to_owned()),
        Form::Image => object.path.clone(),
    }
}

impl fmt::Display for Located {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path().display().fmt(f)
    }
}
