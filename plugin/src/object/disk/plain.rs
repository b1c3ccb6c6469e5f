//! Plain files in the place of encrypted ones that hold nothing.

use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::error::{Attempt, VolumeError};
use super::lock::ImageLock;
use super::nvram::read_variables;
use super::open::Image;
use super::prepared::Prepared;
use super::qemu_img::{QemuImg, descriptor};
use super::size::Bytes;
use super::staging::Staged;
use crate::host::permitted::PermittedPath;

/// Puts an empty qcow2 image of `size` in the place of `replaced`, which is given back.
///
/// # Errors
/// [`VolumeError`]; the old image is still there then, except when only the last fsync of the directory failed.
pub fn empty_over(replaced: ImageLock, size: Bytes) -> Result<Option<ImageLock>, VolumeError> {
    prepare_empty(replaced, size)?.publish()
}

/// Puts a plain variable store with the content of `source` in the place of `replaced`, which is given back.
///
/// # Errors
/// [`VolumeError`]; the old file is still there then, except when only the last fsync of the directory failed.
pub fn copy_over(replaced: ImageLock, source: &PermittedPath) -> Result<Option<ImageLock>, VolumeError> {
    prepare_copy(replaced, source)?.publish()
}

/// As [`empty_over`], up to the moment before the old image goes.
///
/// # Errors
/// [`VolumeError`]; nothing was replaced.
pub fn prepare_empty(replaced: ImageLock, size: Bytes) -> Result<Prepared, VolumeError> {
    prepare(replaced, |staged, replaced| {
        // By its descriptor: others may write to the directory, and change what has a name there.
        let file = staged.file().as_fd();
        QemuImg::new(&["create", "-q", "-f", "qcow2"])?
            .arg(descriptor(file))
            .writing(file)
            .arg(size.0.to_string())
            // An empty image has no progress to stop at.
            .run(replaced.path(), |_| ControlFlow::Continue(()))
            .map(drop)
    })
}

/// As [`copy_over`], up to the moment before the old file goes.
///
/// # Errors
/// [`VolumeError`]; nothing was replaced.
pub fn prepare_copy(replaced: ImageLock, source: &PermittedPath) -> Result<Prepared, VolumeError> {
    let shown = source.shown();
    prepare(replaced, |staged, replaced| {
        if Image::open(source)?.file_id().inode() == replaced.id().inode() {
            return Err(VolumeError::SameFile(shown.to_owned()));
        }
        let variables = read_variables(source)?;
        staged.file().write_all_at(&variables, 0).attempt("copy", shown)
    })
}

fn prepare(
    replaced: ImageLock,
    write: impl FnOnce(&Staged, &ImageLock) -> Result<(), VolumeError>,
) -> Result<Prepared, VolumeError> {
    let staged = Staged::beside(replaced.place())?;
    write(&staged, &replaced)?;
    staged.take_after(&replaced)?;
    staged.sync()?;
    Ok(Prepared::new(staged, Some(replaced)))
}
