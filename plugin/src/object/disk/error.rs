//! Why an image can't be made, read or opened.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use openssl::error::ErrorStack;
use thiserror::Error;

use super::size::Bytes;
use crate::domain::DeclaredFormat;
use crate::host::file_error::FileError;
use crate::host::permitted::PathError;
use crate::model::advice::Advice;
use crate::model::digest::Digest;
use crate::model::envelope::EnvelopeError;
use crate::model::problem::{Code, Problem, chain};
use crate::terminal::word;

/// The part of an image that a [`Flaw`] was found in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// The qcow2 header, its extensions or its tables.
    Qcow2,
    /// The LUKS1 header.
    Luks1,
    /// The envelope that the image carries.
    Envelope,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2 header",
            Self::Luks1 => "LUKS1 header",
            Self::Envelope => "envelope",
        }
    }

    fn advice(self, path: &Path) -> Advice {
        let path = word(path.display());
        match self {
            Self::Qcow2 => format!(
                "restore it from a backup, or look closer with `qemu-img check {path}` as its owner, not as root"
            )
            .into(),
            Self::Luks1 => {
                format!("look closer with `qemu-img info {path}`, or restore it from a backup").into()
            }
            Self::Envelope => {
                Advice::ShowVms.within("the keystore and the domain XML hold copies of the envelope")
            }
        }
    }
}

/// What is wrong with the bytes of an image, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Flaw {
    /// Where in the file, in bytes.
    pub offset: u64,
    pub part: Part,
    pub what: String,
}

impl Flaw {
    pub(in crate::object) fn new(part: Part, offset: u64, what: impl Into<String>) -> Self {
        Self {
            offset,
            part,
            what: what.into(),
        }
    }

    /// The flaw of a structure that begins at `base` of the file.
    pub(in crate::object) fn within(self, base: u64) -> Self {
        Self {
            offset: self.offset.saturating_add(base),
            ..self
        }
    }
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} (byte {} of the {})",
            self.what,
            self.offset,
            self.part.name()
        )
    }
}

/// Why an operation on an image failed. Nothing was changed, unless the variant says so.
#[derive(Debug, Error)]
pub(crate) enum VolumeError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Place(#[from] PathError),
    #[error("{} does not exist", .0.display())]
    NotFound(PathBuf),
    /// A directory, a FIFO, a socket or a character device.
    #[error("{} is {found}, not a disk image: give a regular file or a block device", path.display())]
    NotAnImage { path: PathBuf, found: &'static str },
    #[error("{} is damaged or of an unknown kind: {flaw}", path.display())]
    Damaged { path: PathBuf, flaw: Flaw },
    /// A sound image that virtseal does not handle.
    #[error("{}: {what}", path.display())]
    Unsupported {
        path: PathBuf,
        what: String,
        next: Box<Advice>,
    },
    /// A plain image where an encrypted one was expected.
    #[error("{} is not encrypted", .0.display())]
    NotEncrypted(PathBuf),
    #[error("no keyslot of {} opens with this key: it was encrypted under another one", .0.display())]
    NoKeyslotOpens(PathBuf),
    /// Trying its keyslots would take seconds of work that somebody else chose.
    #[error("{} asks for more than {allowed} PBKDF2 rounds, which no image of virtseal does", path.display())]
    TooManyIterations {
        path: PathBuf,
        /// What one of ours may ask for at the most.
        allowed: u32,
    },
    #[error("{} exists already, and nothing is ever replaced: choose another path", .0.display())]
    Exists(PathBuf),
    /// The file to be replaced is not the one that was inspected.
    #[error("{} changed since it was inspected, and was left as it is; try again", .0.display())]
    Changed(PathBuf),
    /// A source is another file now, or has been written to.
    #[error(
        "{} was written to or replaced while it was read: nothing was created; stop whatever writes to it, then try again",
        .0.display()
    )]
    SourceChanged(PathBuf),
    #[error("{} is not the file that this sum is of: it has {found}, expected was {expected}; nothing was created", path.display())]
    OtherSum {
        path: PathBuf,
        expected: Digest,
        found: Digest,
    },
    /// Its first bytes are those of another format than is declared for it.
    #[error("{} is declared {declared}, but its first bytes are those of {found}", path.display())]
    Contradiction {
        path: PathBuf,
        /// What the domain XML or the caller says.
        declared: DeclaredFormat,
        /// What its first bytes look like.
        found: &'static str,
    },
    /// What is to be read is what is to be written.
    #[error("{} is the same file as the one that would be made from it", .0.display())]
    SameFile(PathBuf),
    /// The file to be replaced holds data, or may.
    #[error("{} holds data, and was left as it is; choose another path", .0.display())]
    HoldsData(PathBuf),
    #[error("{} is open in another process, such as a running VM or qemu-nbd: stop it first", .0.display())]
    InUse(PathBuf),
    /// No size was given, and nothing else says it.
    #[error("no size for {}: give one, such as --size 20G", .0.display())]
    SizeMissing(PathBuf),
    /// A size that this format or this source does not allow.
    #[error("{} can't have {size}: {reason}", path.display())]
    Size {
        path: PathBuf,
        size: Bytes,
        reason: String,
    },
    /// The name of the backing file can't be stored.
    #[error("{} can't be the backing file of {}: {reason}", backing.display(), path.display())]
    BackingName {
        path: PathBuf,
        backing: PathBuf,
        reason: String,
    },
    /// The backing files form a loop, or there are too many.
    #[error("the backing files of {} {reason}", path.display())]
    Chain {
        path: PathBuf,
        /// What is wrong with the chain.
        reason: String,
    },
    #[error("qemu-img could not read {}: {said}", path.display())]
    QemuImg { path: PathBuf, said: String },
    /// `qemu-img` could not give an image another size.
    #[error("{} is not resized: {said}", path.display())]
    Resize { path: PathBuf, said: String },
    /// `qemu-img` failed between two images: either may be the reason.
    #[error("qemu-img could not copy {} into {}: {said}", from.display(), path.display())]
    Copy {
        path: PathBuf,
        from: PathBuf,
        said: String,
    },
    /// `qemu-img` failed between an overlay and what it is based on, or both differ after all.
    #[error("qemu-img could not merge {} into {}: {said}", path.display(), into.display())]
    Merge {
        path: PathBuf,
        into: PathBuf,
        said: String,
    },
    #[error("can't run qemu-img: is the package qemu-utils (or qemu-img) installed?")]
    QemuImgMissing(#[source] io::Error),
    #[error("stopped before {} was complete", .0.display())]
    Stopped(PathBuf),
    /// The envelope can't be put into an image.
    #[error("the envelope can't be stored in an image")]
    Envelope(#[source] EnvelopeError),
    #[error("a cryptographic operation failed")]
    Crypto(#[from] ErrorStack),
    #[error("no memory for a key (is RLIMIT_MEMLOCK too low?)")]
    Memory(#[source] io::Error),
}

impl VolumeError {
    /// What root has named, and is not there or can't be reached.
    pub(crate) fn unreachable(path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound => Self::NotFound(path.to_owned()),
            _ => FileError::of("look at", path)(source).into(),
        }
    }

    pub(in crate::object) fn damaged(path: &Path, flaw: Flaw) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            flaw,
        }
    }

    pub(in crate::object) fn unsupported(
        path: &Path,
        what: impl Into<String>,
        next: impl Into<Advice>,
    ) -> Self {
        Self::Unsupported {
            path: path.to_owned(),
            what: what.into(),
            next: Box::new(next.into()),
        }
    }

    /// What leads out, where that is not said by the error itself.
    pub(crate) fn advice(&self) -> Option<Advice> {
        let show = |path: &PathBuf| Advice::ShowVolume(path.clone());
        Some(match self {
            Self::Damaged { path, flaw } => flaw.part.advice(path),
            Self::Unsupported { next, .. } => next.as_ref().clone(),
            Self::NotEncrypted(path) | Self::NoKeyslotOpens(path) => show(path),
            Self::TooManyIterations { path, .. } => show(path).then(
                "restore its header from a backup (a keyslot that qemu-img added needs encrypt.iter-time=10)",
            ),
            Self::OtherSum { .. } => {
                "download it again, from where the sum was published, and use it only with the sum that it then has to have".into()
            }
            Self::Chain { path, .. } => show(path).note("and the same of each file that it names"),
            _ => return None,
        })
    }
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
            VolumeError::Exists(_) => Code::Exists,
            VolumeError::HoldsData(_) => Code::WouldLoseKey,
            VolumeError::File(error) => return Self::from_io(error, &error.source).advised(error.advice()),
            _ => Code::Failed,
        };
        Self::new(code, chain(&error)).advised(error.advice())
    }
}

/// Names the file and the action of a failed system call.
pub(in crate::object) trait Attempt<T> {
    fn attempt(self, action: &'static str, path: &Path) -> Result<T, VolumeError>;
}

impl<T, E: Into<io::Error>> Attempt<T> for Result<T, E> {
    fn attempt(self, action: &'static str, path: &Path) -> Result<T, VolumeError> {
        self.map_err(|error| FileError::of(action, path)(error.into()).into())
    }
}
