//! What is mounted where, by proc(5), read again only when it has changed: each start asks for it.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const MOUNTINFO: &str = "/proc/self/mountinfo";
const POINT: usize = 4;

/// The mount points of this process.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Mounts(Vec<PathBuf>);

/// As they were when the file was opened, which tells what has come since.
struct Seen {
    file: File,
    mounts: Arc<Mounts>,
}

static SEEN: Mutex<Option<Seen>> = Mutex::new(None);

impl Mounts {
    /// None where they can't be read: then all is on one storage.
    pub(crate) fn now() -> Arc<Self> {
        let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.as_ref().is_none_or(|seen| has_changed(&seen.file)) {
            *seen = Seen::read().ok();
        }
        seen.as_ref()
            .map_or_else(Arc::default, |seen| Arc::clone(&seen.mounts))
    }

    /// What answers for this file as a whole: what is mounted there; a device answers for itself. Asks no storage.
    pub(crate) fn storage_of(&self, path: &Path) -> PathBuf {
        if path.starts_with("/dev") {
            return path.to_owned();
        }
        let around = self.0.iter().filter(|point| path.starts_with(point));
        around
            .max_by_key(|point| point.components().count())
            .map_or_else(|| PathBuf::from("/"), Clone::clone)
    }

    fn parse(mountinfo: &[u8]) -> Self {
        let lines = mountinfo.split(|byte| *byte == b'\n');
        let points = lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(POINT));
        Self(points.map(unescaped).collect())
    }
}

impl Seen {
    fn read() -> io::Result<Self> {
        let mut file = File::open(MOUNTINFO)?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        let mounts = Arc::new(Mounts::parse(&text));
        Ok(Self { file, mounts })
    }
}

/// Since it was opened.
fn has_changed(mountinfo: &File) -> bool {
    let mut asked = [PollFd::new(mountinfo.as_fd(), PollFlags::POLLPRI)];
    let changed = PollFlags::POLLPRI | PollFlags::POLLERR;
    poll(&mut asked, PollTimeout::ZERO).is_err()
        || asked[0].revents().is_none_or(|found| found.intersects(changed))
}

/// Blanks and the like are written as three octal digits.
fn unescaped(point: &[u8]) -> PathBuf {
    let mut text = Vec::with_capacity(point.len());
    let mut rest = point;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let code = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) if byte == b'\\' => {
                text.push(code);
                rest = &after[3..];
            }
            _ => {
                text.push(byte);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(text))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::fs;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    const MOUNTS: &[u8] = b"25 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 25 0:40 / /srv/nfs rw - nfs4 kms:/ rw\n\
                            31 30 0:41 / /srv/nfs/a\\040b rw - nfs4 kms:/b rw\n32 30 0:42 / /srv/\xff rw - nfs4 kms:/c rw\n";

    #[test]
    fn a_file_is_on_what_is_mounted_nearest_and_a_device_is_its_own() {
        let mounts = Mounts::parse(MOUNTS);
        for (path, storage) in [
            ("/var/lib/libvirt/images/a.qcow2", "/"),
            ("/srv/nfs/a.qcow2", "/srv/nfs"),
            ("/srv/nfs2/a.qcow2", "/"),
            ("/srv/nfs/a b/a.qcow2", "/srv/nfs/a b"),
            ("/dev/vg/a", "/dev/vg/a"),
        ] {
            assert_eq!(mounts.storage_of(Path::new(path)), Path::new(storage));
        }
        let of_bytes = Path::new(OsStr::from_bytes(b"/srv/\xff/a"));
        assert_eq!(mounts.storage_of(of_bytes), of_bytes.parent().unwrap());
        assert_eq!(Mounts::default().storage_of(Path::new("/a")), Path::new("/"));
    }

    #[test]
    fn they_are_those_that_the_kernel_has() {
        let read = Mounts::parse(&fs::read(MOUNTINFO).unwrap());
        assert!(!read.0.is_empty());
        for _ in 0..2 {
            assert_eq!(*Mounts::now(), read);
        }
    }
}
