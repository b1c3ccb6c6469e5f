//! An image that no QEMU has open, and that none can open while this lasts.
//!
//! QEMU's own locks are held as a QEMU would that shares nothing: OFD locks on the bytes 100 to 103 for what an opener does
//! and on 200 to 203 for what it does not let others do (QEMU, `block/file-posix.c`). They belong to the file, not to its
//! name: a QEMU that opened it before it was replaced is refused as well.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};

use super::error::{Attempt, VolumeError};
use super::file_id::FileId;
use super::open::Image;
use crate::host::permitted::PermittedPath;
use crate::model::deadlines::image::IN_USE;
use crate::secret::Passphrase;

const LOCKED_BYTES: [i64; 2] = [100, 200];
const LOCKS_IN_RANGE: i64 = 4;

/// An image open for writing, with QEMU's locks.
#[derive(Debug)]
pub(crate) struct ImageLock {
    file: File,
    place: PermittedPath,
    id: FileId,
}

impl ImageLock {
    /// Takes hold of the image at `place`.
    ///
    /// # Errors
    /// [`VolumeError::InUse`] while anyone has it open; when it is no image, or can't be opened for writing.
    pub(crate) fn open(place: &PermittedPath) -> Result<Self, VolumeError> {
        let path = place.shown();
        // Tells what is no image before a device is opened.
        match Image::open(place) {
            // A torn header is to be completed by whoever holds it.
            Ok(_) | Err(VolumeError::Damaged { .. }) => {}
            Err(error) => return Err(error),
        }
        let file = place
            .open(OpenOptions::new().read(true).write(true))
            .attempt("open for writing", path)?;
        for first in LOCKED_BYTES {
            let lock = libc::flock {
                l_type: libc::F_RDLCK as libc::c_short,
                l_whence: libc::SEEK_SET as libc::c_short,
                l_start: first,
                l_len: LOCKS_IN_RANGE,
                l_pid: 0,
            };
            fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).map_err(|_| VolumeError::InUse(path.to_owned()))?;
        }
        // QEMU takes its locks before it looks for others', and so do we: of two, one notices.
        if is_in_use(&file).attempt("look for locks on", path)? {
            return Err(VolumeError::InUse(path.to_owned()));
        }
        let id = FileId::from(&file.metadata().attempt("look at", path)?);
        Ok(Self {
            file,
            place: place.clone(),
            id,
        })
    }

    /// As [`ImageLock::open`], if the image is still as it was when it was inspected.
    ///
    /// # Errors
    /// Those of [`ImageLock::open`], and [`VolumeError::Changed`].
    pub(crate) fn unchanged(place: &PermittedPath, inspected: FileId) -> Result<Self, VolumeError> {
        let held = Self::open(place)?;
        if held.id == inspected {
            Ok(held)
        } else {
            Err(VolumeError::Changed(place.shown().to_owned()))
        }
    }

    /// Really opens it with `passphrase`.
    ///
    /// # Errors
    /// [`VolumeError::NoKeyslotOpens`], and [`VolumeError::NotEncrypted`].
    pub(crate) fn verify(&self, passphrase: &Passphrase) -> Result<(), VolumeError> {
        self.image()?.unlock(passphrase).map(drop)
    }

    /// What it holds now.
    pub(crate) fn image(&self) -> Result<Image, VolumeError> {
        let copy = self.file.try_clone().attempt("read", self.path())?;
        Image::from_file(copy, self.path(), None)
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// For messages.
    pub(crate) fn path(&self) -> &Path {
        self.place.shown()
    }

    pub(crate) fn place(&self) -> &PermittedPath {
        &self.place
    }

    /// The file as it was when it was taken hold of.
    pub(crate) fn id(&self) -> FileId {
        self.id
    }
}

/// Whether another process has the image open the way QEMU does: it holds OFD locks on these bytes.
///
/// A child that was forked while we had it open ourselves holds our lock until it becomes its program, so a lock counts only if it
/// stays.
fn is_in_use(file: &File) -> io::Result<bool> {
    const LOOKS: u32 = 25;
    for _ in 1..LOOKS {
        if !is_locked(file)? {
            return Ok(false);
        }
        std::thread::sleep(IN_USE);
    }
    is_locked(file)
}

fn is_locked(file: &File) -> io::Result<bool> {
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 100,
        l_len: 200,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}
