//! Plain images in the place of encrypted ones that hold nothing.

use std::ops::ControlFlow;
use std::os::fd::AsFd;

use super::error::VolumeError;
use super::lock::ImageLock;
use super::prepared::Prepared;
use super::qemu_img::{QemuImg, descriptor};
use super::size::Bytes;

/// An empty qcow2 image of `size` for the place of `replaced`, up to the moment before that goes.
///
/// # Errors
/// [`VolumeError`]; nothing was replaced.
pub(crate) fn prepare_empty(replaced: ImageLock, size: Bytes) -> Result<Prepared, VolumeError> {
    Prepared::over(replaced, |staged, replaced| {
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
