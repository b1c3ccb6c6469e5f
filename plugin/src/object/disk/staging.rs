//! Files that appear under their name complete, or not at all.
//!
//! A new file has no name while it is written (`O_TMPFILE`), so a killed process leaves nothing behind. On a file
//! system that can't do that, or when an existing file is replaced, it passes through a temporary name,
//! `.virtseal-<16 hex digits>.tmp` beside its target, locked with `flock` while its writer lives;
//! [`sweep_temporaries`] removes those whose writer died. No existing file is ever overwritten, except one that the
//! caller has inspected and named by its [`FileId`].

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, RenameFlags, renameat2};
use nix::unistd::linkat;

use super::error::{Attempt, VolumeError};
use super::file_id::FileId;
use super::lock::ImageLock;
use crate::host::permitted::PermittedPath;

const PREFIX: &str = ".virtseal-";
const SUFFIX: &str = ".tmp";

/// A step of the making that is done. Dying right after any of them must be harmless.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Step {
    /// There is an empty file without a name.
    Staged,
    /// The headers are written.
    Written,
    /// The source's data is written.
    Filled,
    /// All of it is on stable storage.
    Synced,
    /// It was opened with the passphrase.
    Verified,
    /// It has its name.
    Published,
    /// The name is on stable storage.
    Durable,
}

/// A file in the making.
#[derive(Debug)]
pub(crate) struct Staged {
    file: File,
    target: PermittedPath,
    /// Its temporary name, if it has one, reached through the target's open directory.
    name: Option<PathBuf>,
}

impl Staged {
    /// An empty file of mode 0600 on the file system of `target`.
    pub(crate) fn beside(target: &PermittedPath) -> Result<Self, VolumeError> {
        match unnamed(&target.directory_handle()) {
            Ok(file) => Ok(Self {
                file,
                target: target.clone(),
                name: None,
            }),
            Err(error) if needs_a_name(&error) => Self::named(target),
            Err(error) => Err(error).attempt("create a file in", directory_of(target)),
        }
    }

    fn named(target: &PermittedPath) -> Result<Self, VolumeError> {
        let name = temporary_name(&target.directory_handle())?;
        let file = writable()
            .create_new(true)
            .open(&name)
            .attempt("create a file in", directory_of(target))?;
        let staged = Self {
            file,
            target: target.clone(),
            name: Some(name),
        };
        staged
            .file
            .try_lock()
            .map_err(|error| match error {
                TryLockError::Error(error) => error,
                TryLockError::WouldBlock => io::ErrorKind::WouldBlock.into(),
            })
            .attempt("lock the temporary file of", staged.target.shown())?;
        Ok(staged)
    }

    /// The file, open for writing.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The file, opened anew for reading, as anyone else would.
    pub(crate) fn reopen(&self) -> Result<File, VolumeError> {
        File::open(self.magic_link()).attempt("reopen", self.target.shown())
    }

    /// Gives it the owner and the mode of the file that it will replace.
    pub(crate) fn take_after(&self, replaced: &ImageLock) -> Result<(), VolumeError> {
        let replaced = replaced.file().metadata().attempt("look at", replaced.path())?;
        fchown(&self.file, Some(replaced.uid()), Some(replaced.gid()))
            .and_then(|()| {
                // Never more than its owner could give: no set-id bits.
                let mode = replaced.permissions().mode() & 0o777;
                self.file.set_permissions(Permissions::from_mode(mode))
            })
            .attempt("set the owner and mode of", self.target.shown())
    }

    /// Puts the data on stable storage.
    pub(crate) fn sync(&self) -> Result<(), VolumeError> {
        self.file.sync_all().attempt("write", self.target.shown())
    }

    /// Gives it its name: a name nobody has, or that of `replaced`.
    pub(crate) fn publish(mut self, replaced: Option<FileId>) -> Result<Published, VolumeError> {
        match replaced {
            None => self.link_without_clobber()?,
            Some(expected) => self.rename_over(expected)?,
        }
        Ok(Published {
            target: self.target.clone(),
        })
    }

    fn link_without_clobber(&mut self) -> Result<(), VolumeError> {
        let target = self.target.handle();
        let outcome = match &self.name {
            None => self.link_to(&target),
            Some(name) => rename_without_clobber(name, &target),
        };
        match outcome {
            Ok(()) => {
                self.name = None;
                Ok(())
            }
            Err(Errno::EEXIST) => Err(VolumeError::Exists(self.target.shown().to_owned())),
            Err(error) => Err(error).attempt("create", self.target.shown()),
        }
    }

    fn rename_over(&mut self, expected: FileId) -> Result<(), VolumeError> {
        let name = match self.name.take() {
            Some(name) => name,
            None => {
                let name = temporary_name(&self.target.directory_handle())?;
                self.link_to(&name)
                    .attempt("create a file in", directory_of(&self.target))?;
                name
            }
        };
        let name = self.name.insert(name);
        let shown = self.target.shown();
        let found = self.target.metadata().attempt("look at", shown)?;
        if FileId::from(&found) != expected {
            return Err(VolumeError::Changed(shown.to_owned()));
        }
        fs::rename(name, self.target.handle()).attempt("replace", shown)?;
        self.name = None;
        // Others may write to the directory, and have put something else under the temporary name.
        let ours = self.file.metadata().attempt("look at", shown)?;
        match self.target.metadata() {
            Ok(found) if FileId::from(&found).inode() == FileId::from(&ours).inode() => Ok(()),
            _ => Err(VolumeError::Changed(shown.to_owned())),
        }
    }

    fn link_to(&self, path: &Path) -> nix::Result<()> {
        linkat(
            AT_FDCWD,
            &self.magic_link(),
            AT_FDCWD,
            path,
            AtFlags::AT_SYMLINK_FOLLOW,
        )
    }

    fn magic_link(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            // What can't be removed now is swept later.
            let _ = fs::remove_file(name);
        }
    }
}

/// A file that has its name, and may lose it again in a power failure until [`Self::sync`].
#[derive(Debug)]
pub(crate) struct Published {
    target: PermittedPath,
}

impl Published {
    /// Puts the name on stable storage.
    pub(crate) fn sync(self) -> Result<(), VolumeError> {
        File::open(self.target.directory_handle())
            .and_then(|directory| directory.sync_all())
            .attempt("write the directory", directory_of(&self.target))
    }
}

/// Removes a file that is still the one that is held, for good. What has come in its place meanwhile stays.
pub(crate) fn remove(held: &ImageLock) -> Result<(), VolumeError> {
    let place = held.place();
    let is_it = |found: fs::Metadata| FileId::from(&found).inode() == held.id().inode();
    if !place.metadata().is_ok_and(is_it) {
        return Ok(());
    }
    fs::remove_file(place.handle())
        .and_then(|()| File::open(place.directory_handle())?.sync_all())
        .attempt("remove", held.path())
}

/// Removes what a killed virtseal left half-made beside `image`. Files that a live process is making stay.
pub(crate) fn sweep_temporaries(image: &PermittedPath) -> Result<Vec<PathBuf>, VolumeError> {
    let directory = directory_of(image);
    let mut removed = Vec::new();
    for entry in fs::read_dir(image.directory_handle()).attempt("read", directory)? {
        let entry = entry.attempt("read", directory)?;
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file && is_temporary(&entry.file_name()) && is_abandoned(&entry.path()) {
            let shown = directory.join(entry.file_name());
            fs::remove_file(entry.path()).attempt("remove", &shown)?;
            removed.push(shown);
        }
    }
    Ok(removed)
}

fn is_temporary(name: &OsStr) -> bool {
    name.to_str()
        .and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX))
        .is_some_and(|middle| middle.len() == 16 && middle.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn is_abandoned(path: &Path) -> bool {
    writable().open(path).is_ok_and(|file| file.try_lock().is_ok())
}

fn writable() -> OpenOptions {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    options
}

fn unnamed(directory: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_TMPFILE)
        .open(directory)
}

fn needs_a_name(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)
    )
}

fn temporary_name(directory: &Path) -> Result<PathBuf, VolumeError> {
    let mut random = [0; 8];
    openssl::rand::rand_bytes(&mut random)?;
    let name = OsString::from(format!("{PREFIX}{}{SUFFIX}", hex::encode(random)));
    Ok(directory.join(name))
}

/// For messages.
fn directory_of(target: &PermittedPath) -> &Path {
    match target.shown().parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn rename_without_clobber(from: &Path, to: &Path) -> nix::Result<()> {
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        // Network file systems lack the flag; a hard link never clobbers either.
        Err(Errno::EINVAL | Errno::ENOSYS) => {
            linkat(AT_FDCWD, from, AT_FDCWD, to, AtFlags::empty())?;
            nix::unistd::unlink(from)
        }
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn named(path: &Path) -> PermittedPath {
        PermittedPath::named_by_root(path).unwrap()
    }

    fn names(directory: &Path) -> Vec<OsString> {
        fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect()
    }

    const WAYS: [fn(&Path) -> Staged; 2] = [
        |target| Staged::beside(&named(target)).unwrap(),
        |target| Staged::named(&named(target)).unwrap(),
    ];

    #[test]
    fn a_file_appears_when_published_and_leaves_no_temporary() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("disk");
        for stage in WAYS {
            let mut staged = stage(&target);
            staged.file.write_all(b"data").unwrap();
            staged.publish(None).unwrap().sync().unwrap();
            assert_eq!(names(directory.path()), ["disk"]);
            assert_eq!(fs::read(&target).unwrap(), b"data");
            assert_eq!(fs::metadata(&target).unwrap().mode() & 0o7777, 0o600);
            fs::remove_file(&target).unwrap();
        }
    }

    #[test]
    fn an_existing_file_is_never_clobbered() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("disk");
        fs::write(&target, "theirs").unwrap();
        for stage in WAYS {
            let staged = stage(&target);
            assert!(matches!(staged.publish(None), Err(VolumeError::Exists(_))));
        }
        assert_eq!(fs::read(&target).unwrap(), b"theirs");
        assert_eq!(names(directory.path()), ["disk"]);
    }

    #[test]
    fn only_the_inspected_file_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("disk");
        for _ in 0..2 {
            for stage in WAYS {
                let mut staged = stage(&target);
                fs::write(&target, "old").unwrap();
                let inspected = FileId::from(&fs::metadata(&target).unwrap());
                staged.file.write_all(b"new").unwrap();
                staged.publish(Some(inspected)).unwrap();
                assert_eq!(fs::read(&target).unwrap(), b"new");
            }
        }
        for stage in WAYS {
            let staged = stage(&target);
            let inspected = FileId::from(&fs::metadata(&target).unwrap());
            fs::write(&target, "written since").unwrap();
            assert!(matches!(
                staged.publish(Some(inspected)),
                Err(VolumeError::Changed(_))
            ));
        }
        assert_eq!(fs::read(&target).unwrap(), b"written since");
        assert_eq!(names(directory.path()), ["disk"]);
    }

    #[test]
    fn sweeping_takes_abandoned_temporaries_only() {
        let directory = tempfile::tempdir().unwrap();
        let abandoned = directory.path().join(".virtseal-0123456789abcdef.tmp");
        fs::write(&abandoned, "").unwrap();
        for other in [
            ".virtseal-0123456789abcdeg.tmp",
            ".virtseal-01.tmp",
            "virtseal-0123456789abcdef.tmp",
        ] {
            fs::write(directory.path().join(other), "").unwrap();
        }
        let disk = named(&directory.path().join("disk"));
        let live = Staged::named(&disk).unwrap();
        assert_eq!(sweep_temporaries(&disk).unwrap(), [abandoned]);
        assert_eq!(names(directory.path()).len(), 4);
        drop(live);
        assert_eq!(names(directory.path()).len(), 3);
    }
}
