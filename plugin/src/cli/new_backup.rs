//! The file that a backup is written to: never one that is there, whole and on the disk before anything relies on it, and gone again
//! when it does not become whole.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::model::problem::{Code, Problem};

/// A file that this command has made.
#[derive(Debug)]
pub(super) struct NewBackup {
    path: PathBuf,
    file: File,
    is_whole: bool,
}

impl NewBackup {
    /// Whether [`NewBackup::create`] is likely to go through, to be asked before somebody has to type anything.
    ///
    /// # Errors
    /// [`Code::Exists`] when something is there, or the directory can't be reached.
    pub(super) fn check(path: &Path) -> Result<(), Problem> {
        let found = match path.symlink_metadata() {
            Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => fs::metadata(directory(path)).map(drop),
            Err(error) => Err(error),
        };
        found.map_err(|error| unwritable(path, &error))
    }

    pub(super) fn create(path: &Path) -> Result<Self, Problem> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(path).map_err(|error| unwritable(path, &error))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            is_whole: false,
        })
    }

    /// For the daemon to write to.
    pub(super) fn descriptor(&self) -> Result<OwnedFd, Problem> {
        let copy = self.file.try_clone();
        Ok(copy.map_err(|error| unwritable(&self.path, &error))?.into())
    }

    /// Keeps it, once it and its name are on the disk.
    pub(super) fn keep(mut self) -> Result<(), Problem> {
        let synced = self.file.sync_all();
        synced
            .and_then(|()| File::open(directory(&self.path))?.sync_all())
            .map_err(|error| unwritable(&self.path, &error))?;
        self.is_whole = true;
        Ok(())
    }
}

impl Drop for NewBackup {
    fn drop(&mut self) {
        if !self.is_whole {
            // Nothing relies on it yet.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// For scripts, which may look at it elsewhere.
pub(super) fn absolute(path: &Path) -> Result<PathBuf, Problem> {
    std::path::absolute(path).map_err(|error| unwritable(path, &error))
}

fn directory(path: &Path) -> &Path {
    path.parent()
        .filter(|parent| *parent != Path::new(""))
        .unwrap_or(Path::new("."))
}

fn unwritable(path: &Path, error: &io::Error) -> Problem {
    let path = path.display();
    match error.kind() {
        io::ErrorKind::AlreadyExists => Problem::new(Code::Exists, format!("{path} exists already"))
            .next("choose another --output: a backup is never overwritten"),
        _ => Problem::from_io(format!("can't write {path}"), error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_stays_of_what_did_not_become_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("backup");
        NewBackup::check(&path).unwrap();
        drop(NewBackup::create(&path).unwrap());
        assert!(!path.exists());
        NewBackup::create(&path).unwrap().keep().unwrap();
        assert!(path.exists());
    }

    #[test]
    fn what_is_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (file, dangling) = (dir.path().join("file"), dir.path().join("link"));
        fs::write(&file, "mine").unwrap();
        std::os::unix::fs::symlink("nowhere", &dangling).unwrap();
        for path in [&file, &dangling] {
            assert_eq!(NewBackup::check(path).unwrap_err().code, Code::Exists);
            assert_eq!(NewBackup::create(path).unwrap_err().code, Code::Exists);
        }
        assert_eq!(fs::read(&file).unwrap(), b"mine");
        let nowhere = NewBackup::check(&dir.path().join("none/backup")).unwrap_err();
        assert_eq!(nowhere.code, Code::NotFound, "{nowhere}");
    }
}
