//! The end of a log when it is opened: where the chain goes on, and what a crash left behind it.
//!
//! Only what was never synced can be unfinished, and that is the end. It may be half a line, or, after a power
//! cut, zeros where lines should be. It is copied to a file beside the log before the log is cut back to its
//! last record; dying in between leaves a second copy and nothing lost.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::AuditError;
use super::chain::{Head, MOST_LINE};

/// How far back the last record is looked for; many times more than one batch.
const WINDOW: u64 = 16 * MOST_LINE as u64;

/// An open log, and where to go on.
pub(super) struct End {
    pub(super) file: Flock<File>,
    pub(super) length: u64,
    pub(super) head: Head,
    pub(super) torn: Option<PathBuf>,
}

pub(super) fn open(path: &Path) -> Result<End, AuditError> {
    let file = lock(path)?;
    sync_directory(path).map_err(AuditError::io("sync the directory of", path))?;
    let read = || -> io::Result<(u64, Vec<u8>)> {
        let length = file.metadata()?.len();
        let from = length.saturating_sub(WINDOW);
        let mut window = vec![0; usize::try_from(length - from).map_err(io::Error::other)?];
        file.read_exact_at(&mut window, from)?;
        Ok((from, window))
    };
    let (from, window) = read().map_err(AuditError::io("read", path))?;
    let (kept, head) = last_record(&window, from == 0).ok_or_else(|| AuditError::NotALog {
        path: path.to_owned(),
    })?;
    let length = from + kept as u64;
    let torn = match &window[kept..] {
        [] => None,
        rest => {
            let aside = set_aside(path, head, rest).map_err(AuditError::io("save the torn end of", path))?;
            file.set_len(length)
                .and_then(|()| file.sync_all())
                .map_err(AuditError::io("cut the torn end from", path))?;
            Some(aside)
        }
    };
    Ok(End {
        file,
        length,
        head,
        torn,
    })
}

fn lock(path: &Path) -> Result<Flock<File>, AuditError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(AuditError::io("open", path))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => AuditError::InUse {
            path: path.to_owned(),
        },
        errno => AuditError::io("lock", path)(errno.into()),
    })
}

/// How many bytes of `window` end with a record, and the head there. `None` when this is no end of a log.
fn last_record(window: &[u8], is_whole_file: bool) -> Option<(usize, Head)> {
    let mut end = window.len();
    while let Some(newline) = window[..end].iter().rposition(|byte| *byte == b'\n') {
        let start = window[..newline]
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map(|before| before + 1);
        let start = match start {
            Some(start) => start,
            None if is_whole_file => 0,
            None => return None,
        };
        if let Some(head) = Head::after(&window[start..newline]) {
            return Some((newline + 1, head));
        }
        end = newline;
    }
    // The very first record may be the torn one; anything else without a record is somebody else's file.
    let first_is_torn = window.is_empty() || window.starts_with(b"{\"seq\":1,") || window[0] == 0;
    (is_whole_file && first_is_torn).then_some((0, Head::START))
}

fn set_aside(path: &Path, head: Head, bytes: &[u8]) -> io::Result<PathBuf> {
    let mut nth = 0;
    loop {
        let aside = path.with_extension(format!("log.torn-{}.{nth}", head.seq() + 1));
        let made = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&aside);
        match made {
            Ok(mut file) => {
                file.write_all(bytes)?;
                file.sync_all()?;
                sync_directory(path)?;
                return Ok(aside);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => nth += 1,
            Err(error) => return Err(error),
        }
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    File::open(dir)?.sync_all()
}
