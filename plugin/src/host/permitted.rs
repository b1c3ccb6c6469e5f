//! Paths that other people have written, and the only way by which root acts at them or reads there.
//!
//! Domain XML, image headers and whatever was taken from them name files, and never choose one for root: what reads a header, writes,
//! renames, removes or takes over a file, or puts its content into a VM, wants a [`PermittedPath`]. A [`PathRule`] makes one of a path
//! - in a directory of libvirt's own, in an active storage pool (`pool.rs`), or in `image_dirs` ([`PathRule::permit`]), or
//! - that the keystore knows as that of this VM's object ([`PathRule::permit_known`]),
//!
//! after a walk from `/` in which a link is followed only where it belongs to root and every directory on the way can be written by
//! root alone: LVM's `/dev/vg/lv` passes, a link that a user planted does not. What comes out holds the directory open, so nothing
//! that happens to the path afterwards leads elsewhere. What root names on a command line is [`PermittedPath::named_by_root`].
//!
//! Of what is outside nothing is told, not even whether it is there: each such path is refused in the same words, and nothing of it is
//! opened. A walk does not enter a directory that others can change, unless something that is permitted is below it.

mod error;
mod pool;
mod rule;
mod walk;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{Mode, fstat, fstatat};

use super::file_stamp::FileStamp;

pub(crate) use error::PathError;
pub(crate) use rule::PathRule;

/// A name in a directory that is held open.
#[derive(Clone, Debug)]
pub(crate) struct PermittedPath {
    directory: Arc<OwnedFd>,
    name: OsString,
    shown: PathBuf,
}

impl PermittedPath {
    /// What root has named, in a command or in a setting: links are followed as ever, once.
    pub(crate) fn named_by_root(path: &Path) -> io::Result<Self> {
        let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let name = target.file_name().ok_or(io::ErrorKind::IsADirectory)?.to_owned();
        let directory = match target.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self {
            directory: Arc::new(open(directory, flags, Mode::empty())?),
            name,
            shown: path.to_owned(),
        })
    }

    /// For messages, and for what is kept: the path as it was given. Not to be opened.
    pub(crate) fn shown(&self) -> &Path {
        &self.shown
    }

    /// Reaches the name through the open directory, whatever has become of the path. Of this process only.
    pub(crate) fn handle(&self) -> PathBuf {
        self.directory_handle().join(&self.name)
    }

    /// Reaches the directory.
    pub(crate) fn directory_handle(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.directory.as_raw_fd()).into()
    }

    /// The same name with something behind it, in the same directory.
    #[must_use]
    pub(crate) fn with_suffix(&self, suffix: &str) -> Self {
        let longer = |name: &OsStr| {
            let mut name = name.to_owned();
            name.push(suffix);
            name
        };
        Self {
            directory: Arc::clone(&self.directory),
            name: longer(&self.name),
            shown: longer(self.shown.as_os_str()).into(),
        }
    }

    /// What has the name now; a link is not followed.
    pub(crate) fn metadata(&self) -> io::Result<Metadata> {
        fs::symlink_metadata(self.handle())
    }

    /// Of the file that has the name now.
    pub(crate) fn stamp(&self) -> Option<FileStamp> {
        let found = fstatat(
            &self.directory,
            self.name.as_os_str(),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        );
        FileStamp::of(&found.ok()?)
    }

    /// Whether the name is taken.
    pub(crate) fn exists(&self) -> bool {
        !matches!(self.metadata(), Err(error) if error.kind() == io::ErrorKind::NotFound)
    }

    /// Opens the file, which is a regular one or a block device: opening anything else may wait for somebody, or have effects. It is
    /// taken hold of before that is looked at, so nothing can come in its place; a link that came meanwhile is an error.
    ///
    /// # Errors
    /// Those of `open`, and `InvalidInput` for anything else.
    pub(crate) fn open(&self, options: &mut OpenOptions) -> io::Result<File> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let held = openat(&self.directory, self.name.as_os_str(), flags, Mode::empty())?;
        match fstat(&held)?.st_mode & libc::S_IFMT {
            libc::S_IFREG | libc::S_IFBLK => {}
            libc::S_IFLNK => return Err(Errno::ELOOP.into()),
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        options
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(format!("/proc/self/fd/{}", held.as_raw_fd()))
    }
}

#[cfg(test)]
mod tests;
