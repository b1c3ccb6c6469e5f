//! What an image is: what was declared decides, never its bytes alone.
//!
//! A guest can write any header into a disk that is raw. Taken at its word, such a disk is "an empty qcow2 image" that may
//! be replaced, or one whose backing file is any file of the host.

use super::error::VolumeError;
use super::info::VolumeInfo;
use super::open::Image;
use crate::domain::DeclaredFormat;
use crate::host::permitted::PermittedPath;

/// How sure a declaration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Declaration {
    /// The XML has it. A file that looks like something else needs a second word.
    Stated(DeclaredFormat),
    /// An admin has looked, and says so too.
    Confirmed(DeclaredFormat),
}

/// Opens an image as `declared`, whatever a raw file's first bytes look like.
pub(super) fn open_declared(place: &PermittedPath, declared: DeclaredFormat) -> Result<Image, VolumeError> {
    let image = Image::open_as(place, Some(DeclaredFormat::Raw.as_str()))?;
    as_declared(image, declared)
}

/// `image`, which was opened as raw, as what it is declared to be.
pub(super) fn as_declared(image: Image, declared: DeclaredFormat) -> Result<Image, VolumeError> {
    let path = &image.path().to_owned();
    let found = image.looks_like();
    match declared {
        DeclaredFormat::Raw => Ok(image),
        DeclaredFormat::Qcow2 if found == declared.as_str() => {
            Image::from_file(image.into_file(), path, Some(declared.as_str()))
        }
        DeclaredFormat::Qcow2 => Err(VolumeError::Contradiction {
            path: path.to_owned(),
            declared,
            found,
        }),
    }
}

/// As [`inspect`](super::inspect), in the format that is declared for it.
///
/// # Errors
/// [`VolumeError::Contradiction`] where its first bytes are those of another format, unless they may be a guest's: a raw
/// disk that was confirmed to be one. Else those of [`inspect`](super::inspect).
pub(crate) fn inspect_declared(
    place: &PermittedPath,
    declaration: Declaration,
) -> Result<VolumeInfo, VolumeError> {
    let raw = Image::open_as(place, Some(DeclaredFormat::Raw.as_str()))?;
    let (Declaration::Stated(declared) | Declaration::Confirmed(declared)) = declaration;
    let path = &raw.path().to_owned();
    let image = as_declared(raw, declared)?;
    let found = image.looks_like();
    if declaration == Declaration::Stated(declared) && found != declared.as_str() {
        return Err(VolumeError::Contradiction {
            path: path.to_owned(),
            declared,
            found,
        });
    }
    image.info()
}
