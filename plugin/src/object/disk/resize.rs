//! Another size for an encrypted image that nobody has open, by `qemu-img` under QEMU's own locks.

use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::time::Instant;

use super::error::{Attempt, VolumeError};
use super::file_id::FileId;
use super::lock::ImageLock;
use super::open::Image;
use super::qemu_img::{Locking, QemuImg};
use super::size::Bytes;
use crate::host::permitted::PermittedPath;
use crate::model::deadlines::image::RESIZE;
use crate::model::image_format::Format;
use crate::secret::Passphrase;

/// Makes the disk in the image at `place`, which `passphrase` opens, `size` large, in whole sectors. What is beyond that is lost.
/// It is on stable storage then, and opens.
///
/// # Errors
/// [`VolumeError::InUse`] while anyone has it open; when it is no sealed disk, or parts of its data are in another file.
pub(crate) fn resize(place: &PermittedPath, passphrase: &Passphrase, size: Bytes) -> Result<(), VolumeError> {
    let path = place.shown();
    let held = ImageLock::open(place)?;
    held.verify(passphrase)?;
    let image = held.image()?;
    if image.format()? != Format::Qcow2Luks1 {
        return Err(VolumeError::unsupported(
            path,
            "only qcow2 images can be resized",
            "create a larger one",
        ));
    }
    if let Some(other) = image.rests_on() {
        return Err(VolumeError::unsupported(
            path,
            format!("its data is partly in {other}, which would show behind its end"),
            "start its VM, and resize it while that runs",
        ));
    }
    let old = image.virtual_size();
    let file = place
        .open(OpenOptions::new().read(true).write(true))
        .attempt("open for writing", path)?;
    if FileId::from(&file.metadata().attempt("look at", path)?).inode() != held.id().inode() {
        return Err(VolumeError::Changed(path.to_owned()));
    }
    // QEMU takes the same locks, of a description of its own: whoever comes in between makes it fail.
    drop((held, image));
    let arguments: &[&str] = match size < old {
        true => &["resize", "-q", "--shrink"],
        false => &["resize", "-q"],
    };
    let answer = QemuImg::new(arguments)?
        .with_key(passphrase)
        .attempt("pass a key for", path)?
        .writing(file.as_fd())
        .sealed(file.as_fd(), Locking::Locks)
        .arg(size.0.to_string())
        .answer(path, Instant::now() + RESIZE)?;
    if answer.code != Some(0) {
        return Err(VolumeError::Resize {
            path: path.to_owned(),
            said: answer.said,
        });
    }
    file.sync_all().attempt("sync", path)?;
    let image = Image::open(place)?;
    image.unlock(passphrase)?;
    match image.virtual_size() {
        found if found == size => Ok(()),
        found => Err(VolumeError::Resize {
            path: path.to_owned(),
            said: format!("it has {found} now"),
        }),
    }
}
