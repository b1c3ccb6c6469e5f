//! What an overlay has goes down into the image that it is based on, by `qemu-img`.
//!
//! The base is written in place: as long as the overlay is there and is read through, whatever was written of it so far changes
//! nothing of what a guest sees, so this may die anywhere and be repeated. The overlay stays; it may go once [`verify`] has read
//! both. Whoever calls holds all of the images, so that no QEMU opens them meanwhile.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use super::error::{Attempt, VolumeError};
use super::lock::ImageLock;
use super::qemu_img::{Access, ChainLayer, Heard, Place, QemuImg, descriptor, passphrase_pipe};
use crate::domain::DeclaredFormat;
use crate::host::permitted::PermittedPath;
use crate::secret::Passphrase;

/// A sealed image, and those that it is based on in turn.
pub(crate) struct Base<'a> {
    pub held: &'a ImageLock,
    pub passphrase: &'a Passphrase,
    pub below: Vec<Below>,
}

/// An image that is only read.
pub(crate) struct Below {
    file: File,
    format: DeclaredFormat,
    passphrase: Option<Passphrase>,
}

impl Below {
    /// Opens it as what the image above declares it to be.
    pub(crate) fn open(
        place: &PermittedPath,
        format: DeclaredFormat,
        passphrase: Option<Passphrase>,
    ) -> Result<Self, VolumeError> {
        let opened = place.open(File::options().read(true));
        Ok(Self {
            file: opened.attempt("open", place.shown())?,
            format,
            passphrase,
        })
    }
}

/// Writes what `overlay` has into `base`, and has it on stable storage.
///
/// # Errors
/// [`VolumeError::Merge`], and [`VolumeError::Stopped`]; the overlay has all that it had.
pub(crate) fn merge(
    overlay: &ImageLock,
    base: &Base<'_>,
    progress: impl FnMut(Heard) -> ControlFlow<()>,
) -> Result<(), VolumeError> {
    // `-d`: the overlay is not emptied.
    run(&["commit", "-p", "-d"], &[overlay], base, Access::Write, progress)?;
    base.held.file().sync_all().attempt("write", base.held.path())
}

/// Reads all of both: through the overlay the guest sees what is in the base.
///
/// # Errors
/// [`VolumeError::Merge`] where it does not, and [`VolumeError::Stopped`].
pub(crate) fn verify(
    overlay: &ImageLock,
    base: &Base<'_>,
    progress: impl FnMut(Heard) -> ControlFlow<()>,
) -> Result<(), VolumeError> {
    verify_all(&[overlay], base, progress)
}

/// The same through several overlays, the topmost first.
///
/// # Errors
/// As [`verify`].
pub(crate) fn verify_all(
    overlays: &[&ImageLock],
    base: &Base<'_>,
    progress: impl FnMut(Heard) -> ControlFlow<()>,
) -> Result<(), VolumeError> {
    run(&["compare", "-p"], overlays, base, Access::Read, progress)
}

fn run(
    command: &[&str],
    overlays: &[&ImageLock],
    base: &Base<'_>,
    access: Access,
    progress: impl FnMut(Heard) -> ControlFlow<()>,
) -> Result<(), VolumeError> {
    let keys = Keys::of(base).attempt("pass a key for", base.held.path())?;
    let mut layers = vec![ChainLayer {
        file: base.held.file().as_fd(),
        place: place_of(base.held.file(), base.held.path())?,
        format: DeclaredFormat::Qcow2,
        secret: Some(&keys.0[0].0),
        access,
    }];
    for (below, key) in base.below.iter().zip(&keys.0[1..]) {
        layers.push(ChainLayer {
            file: below.file.as_fd(),
            place: place_of(&below.file, base.held.path())?,
            format: below.format,
            secret: below.passphrase.is_some().then_some(key.0.as_str()),
            access: Access::Read,
        });
    }
    let mut whole = Vec::new();
    for overlay in overlays {
        whole.push(ChainLayer {
            file: overlay.file().as_fd(),
            place: place_of(overlay.file(), overlay.path())?,
            format: DeclaredFormat::Qcow2,
            secret: None,
            access,
        });
    }
    whole.extend(&layers);
    let mut child = QemuImg::new(command)?;
    for (name, pipe) in &keys.0 {
        let Some(pipe) = pipe else { continue };
        child = child
            .arg("--object")
            .arg(format!("secret,id={name},file={}", descriptor(pipe.as_fd())))
            .inheriting(pipe.as_fd());
    }
    child = child.chain(&whole);
    if access == Access::Read {
        child = child.chain(&layers);
    }
    let top = overlays.first().map_or(base.held.path(), |top| top.path());
    let outcome = child.run(top, progress).map_err(|error| match error {
        VolumeError::QemuImg { path, said } => VolumeError::Merge {
            path,
            into: base.held.path().to_owned(),
            said,
        },
        error => error,
    });
    match outcome? {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(VolumeError::Stopped(top.to_owned())),
    }
}

/// A secret's name for each image from the base down, and a pipe with it where the image is encrypted.
struct Keys(Vec<(String, Option<OwnedFd>)>);

impl Keys {
    fn of(base: &Base<'_>) -> std::io::Result<Self> {
        let below = base.below.iter().map(|below| below.passphrase.as_ref());
        let all = [Some(base.passphrase)].into_iter().chain(below).enumerate();
        let key = |(number, passphrase): (usize, Option<&Passphrase>)| {
            Ok((
                format!("key{number}"),
                passphrase.map(passphrase_pipe).transpose()?,
            ))
        };
        Ok(Self(all.map(key).collect::<std::io::Result<_>>()?))
    }
}

fn place_of(file: &File, shown: &Path) -> Result<Place, VolumeError> {
    let kind = file.metadata().attempt("look at", shown)?.file_type();
    Ok(if kind.is_block_device() {
        Place::Device
    } else {
        Place::File
    })
}
