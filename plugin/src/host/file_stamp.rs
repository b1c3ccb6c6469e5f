//! That a file is the same one as before, with the same bytes, by what the file system says of it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::stat::FileStat;

use crate::model::deadlines::status::SETTLED;

/// Of a regular file. Two that are equal stand for the same bytes, as every write changes the time of its inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileStamp {
    device: u64,
    inode: u64,
    length: i64,
    changed: (i64, i64),
}

impl FileStamp {
    /// None of a device, which is written to without a trace, nor of a file that was changed just now: its next change may have
    /// the same time.
    pub(crate) fn of(file: &FileStat) -> Option<Self> {
        Self::at(file, SystemTime::now())
    }

    fn at(file: &FileStat, now: SystemTime) -> Option<Self> {
        let changed = (file.st_ctime, file.st_ctime_nsec);
        let at = UNIX_EPOCH + Duration::new(changed.0.try_into().ok()?, changed.1.try_into().ok()?);
        let is_settled = now.duration_since(at).is_ok_and(|age| age > SETTLED);
        let is_file = file.st_mode & libc::S_IFMT == libc::S_IFREG;
        (is_file && is_settled).then_some(Self {
            device: file.st_dev,
            inode: file.st_ino,
            length: file.st_size,
            changed,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nix::sys::stat::lstat;

    use super::*;

    #[test]
    fn a_file_that_was_written_to_or_replaced_has_another_stamp() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let later = SystemTime::now() + 60 * SETTLED;
        let stamp = || FileStamp::at(&lstat(&path).unwrap(), later).unwrap();
        let mut stamps = Vec::new();
        for text in ["one", "two"] {
            fs::write(&path, text).unwrap();
            stamps.push(stamp());
            assert_eq!(stamp(), stamps[stamps.len() - 1]);
            std::thread::sleep(SETTLED / 50);
        }
        fs::write(dir.path().join("other"), "two").unwrap();
        fs::rename(dir.path().join("other"), &path).unwrap();
        stamps.push(stamp());
        assert!(stamps[0] != stamps[1] && stamps[1] != stamps[2], "{stamps:?}");
    }

    #[test]
    fn what_was_changed_just_now_or_is_no_file_has_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "one").unwrap();
        assert_eq!(FileStamp::of(&lstat(&path).unwrap()), None);
        let later = SystemTime::now() + 60 * SETTLED;
        assert_eq!(FileStamp::at(&lstat(dir.path()).unwrap(), later), None);
        let device = lstat("/dev/null").unwrap();
        assert_eq!(FileStamp::at(&device, later), None);
    }
}
