//! Plain files in the place of encrypted ones that hold nothing.

use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::path::Path;

use super::error::{Attempt, VolumeError};
use super::held::Held;
use super::qemu_img::{QemuImg, descriptor};
use super::size::Bytes;
use super::staging::Staged;

/// Puts an empty qcow2 image of `size` in the place of `replaced`.
///
/// # Errors
/// [`VolumeError`]; the old image is still there then, except when only the last fsync of the directory failed.
pub fn empty_over(replaced: &Held, size: Bytes) -> Result<(), VolumeError> {
    put_over(replaced, |staged| {
        let file = staged.file().as_fd();
        QemuImg::new(&["create", "-q", "-f", "qcow2"])?
            .arg(descriptor(file))
            .writing(file)
            .arg(size.0.to_string())
            // An empty image has no progress to stop at.
            .run(replaced.path(), |_| ControlFlow::Continue(()))
            .map(drop)?;
        staged.sync()
    })
}

/// Puts a copy of `source` in the place of `replaced`.
///
/// # Errors
/// [`VolumeError`]; the old file is still there then, except when only the last fsync of the directory failed.
pub fn copy_over(replaced: &Held, source: &Path) -> Result<(), VolumeError> {
    put_over(replaced, |staged| {
        let mut from = std::fs::File::open(source).attempt("open", source)?;
        std::io::copy(&mut from, &mut staged.file()).attempt("copy", source)?;
        staged.sync()
    })
}

fn put_over(
    replaced: &Held,
    write: impl FnOnce(&Staged) -> Result<(), VolumeError>,
) -> Result<(), VolumeError> {
    let staged = Staged::beside(replaced.path())?;
    staged.take_after(replaced)?;
    write(&staged)?;
    staged.publish(Some(replaced.id()))?.sync()
}
