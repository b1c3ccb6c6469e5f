//! What is sealed of a VM, each kind in a module of its own: disks ([`disk`]), the UEFI variable store ([`nvram`]) and the state
//! of the vTPM ([`vtpm`]).
//!
//! [`Located`] is an object where it is on this host: what is done with any of them in the same words is done through it, so
//! that nobody else has to ask whether it is a file or a directory of swtpm's.

pub mod disk;
mod error;
pub mod nvram;
mod opened_headers;
pub mod vtpm;

use std::fmt;
use std::path::{Path, PathBuf};

use crate::domain::{Domain, Object};
use crate::host::permitted::{PathError, PermittedPath};
use crate::model::envelope::{ObjectKind, VmId};
use crate::secret::Passphrase;
use disk::{ImageCopy, VolumeError};
use vtpm::{StateDir, StateError};

pub use error::ObjectError;
pub use opened_headers::OpenedHeaders;

/// Where an object is.
#[derive(Clone, Debug)]
pub enum Located {
    /// The file or device of a disk or a variable store.
    Image(PermittedPath),
    /// The directory of a vTPM's state.
    State(StateDir),
}

/// What is there, as far as it shows without a key.
#[derive(Debug)]
pub enum Present {
    /// Nothing.
    Absent,
    /// Something that is not encrypted.
    Plain,
    /// Something encrypted, with the envelope that it carries.
    Encrypted(ImageCopy),
}

/// What opening an object with its key has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// It is there, and this is its key.
    Opened,
    /// It is not there, as before the first start of its VM, which makes it.
    NotMade,
}

impl Located {
    /// The object of this kind that `vm` has, at `path` if it is an image; `None` for an image that has no path on this host.
    ///
    /// # Errors
    /// Those of `permit`, which says whether an image at that path may be looked at.
    pub fn of(
        kind: ObjectKind,
        vm: VmId,
        path: Option<&Path>,
        swtpm_dir: &Path,
        permit: impl FnOnce(&Path) -> Result<PermittedPath, PathError>,
    ) -> Result<Option<Self>, PathError> {
        match kind {
            ObjectKind::Vtpm => Ok(Some(Self::State(StateDir::of(vm, swtpm_dir)))),
            ObjectKind::Disk | ObjectKind::Nvram => Ok(path.map(permit).transpose()?.map(Self::Image)),
        }
    }

    /// The file or directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Image(place) => place.shown(),
            Self::State(dir) => dir.path(),
        }
    }

    /// Looks at it without a key.
    ///
    /// # Errors
    /// When it is there and can't be read.
    pub fn inspect(&self) -> Result<Present, ObjectError> {
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

    /// Really opens it with `passphrase`.
    ///
    /// # Errors
    /// When it is not encrypted, or not with this key; when it can't be read, or is an image that is not there.
    pub fn open(&self, passphrase: &Passphrase) -> Result<Opening, ObjectError> {
        match self {
            Self::Image(place) => {
                disk::verify(place, passphrase)?;
                Ok(Opening::Opened)
            }
            Self::State(dir) => Ok(dir.open(passphrase)?),
        }
    }

    /// What there is to say where it must be there and is not.
    #[must_use]
    pub fn gone(&self) -> ObjectError {
        match self {
            Self::Image(place) => VolumeError::NotFound(place.shown().to_owned()).into(),
            Self::State(dir) => StateError::Gone(dir.clone()).into(),
        }
    }
}

/// Where the XML has an object, or libvirt by itself.
#[must_use]
pub fn path_in(domain: &Domain, object: &Object, swtpm_dir: &Path) -> Option<PathBuf> {
    match object.kind {
        ObjectKind::Vtpm => StateDir::of_domain(domain, swtpm_dir)
            .ok()
            .map(|dir| dir.path().to_owned()),
        ObjectKind::Disk | ObjectKind::Nvram => object.path.clone(),
    }
}

impl fmt::Display for Located {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path().display().fmt(f)
    }
}
