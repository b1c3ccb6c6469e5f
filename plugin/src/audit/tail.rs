//! The end of a log when it is opened: where the chain goes on, and what a crash left behind it.
//!
//! Only what was never synced can be unfinished, and that is the end. It may be half a line, or, after a power
//! cut, zeros where lines should be. It is copied to a file beside the log before the log is cut back to its
//! last record; dying in between leaves a second copy and nothing lost.
//!
//! A log that does not reach what was noted of it (see [`super::AuditLog::open_anchored`]), or that is no log, was damaged by
//! somebody else. It is put away as it is, and a new file goes on from what was noted.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::AuditError;
use super::chain::Head;
use super::segments::MAX_LINE;
use super::segments::{self, sync_directory};

/// How far back the last record is looked for; many times more than one batch.
const WINDOW: u64 = 16 * MAX_LINE as u64;

/// An open log, and where to go on.
pub(super) struct End {
    pub(super) file: Flock<File>,
    pub(super) length: u64,
    pub(super) head: Head,
    pub(super) torn: Option<PathBuf>,
    /// What is wrong with what was put away, and where that is.
    pub(super) broken: Option<String>,
}

pub(super) fn open(path: &Path, noted: Option<Head>) -> Result<End, AuditError> {
    match lock(path) {
        Ok(file) => go_on(path, file, noted),
        Err(error @ AuditError::InUse { .. }) => Err(error),
        // A directory, a link: whatever it is, it is no log.
        Err(error) => begin_anew(path, noted, &crate::model::problem::chain(&error)),
    }
}

fn go_on(path: &Path, file: Flock<File>, noted: Option<Head>) -> Result<End, AuditError> {
    sync_directory(path).map_err(AuditError::io("sync the directory of", path))?;
    let (from, window) = read_end(&file).map_err(AuditError::io("read", path))?;
    let before = match from {
        0 => last_of_full(path).map_err(AuditError::io("read the files before", path))?,
        _ => Some(Head::START),
    };
    // Where this file has a record, it does not matter what the one before it ends with.
    let is_whole_file = from == 0;
    let found = last_record(&window, is_whole_file, before.unwrap_or(Head::START))
        .filter(|(kept, _)| *kept > 0 || before.is_some());
    let Some((kept, head)) = found else {
        drop(file);
        return begin_anew(path, noted, "it holds no audit record");
    };
    if let Some(why) = missing(path, head, noted).map_err(AuditError::io("read", path))? {
        drop(file);
        return begin_anew(path, noted, &why);
    }
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
        broken: None,
    })
}

/// Puts away what is at `path`, and goes on in a new file from what was noted.
pub(super) fn begin_anew(path: &Path, noted: Option<Head>, why: &str) -> Result<End, AuditError> {
    let broken = match segments::put_away(path) {
        Ok(to) => format!("{why}; it is in {} as it was found", to.display()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => why.to_owned(),
        Err(error) => return Err(AuditError::io("put away", path)(error)),
    };
    let file = lock(path)?;
    sync_directory(path).map_err(AuditError::io("sync the directory of", path))?;
    Ok(End {
        file,
        length: 0,
        head: noted.unwrap_or(Head::START),
        torn: None,
        broken: Some(broken),
    })
}

/// The next file of a log that goes on, after the one at `path` was put away.
pub(super) fn next_file(path: &Path) -> Result<Flock<File>, AuditError> {
    segments::put_away(path).map_err(AuditError::io("put away", path))?;
    let file = lock(path)?;
    sync_directory(path).map_err(AuditError::io("sync the directory of", path))?;
    Ok(file)
}

fn read_end(file: &File) -> io::Result<(u64, Vec<u8>)> {
    let length = file.metadata()?.len();
    let from = length.saturating_sub(WINDOW);
    let mut window = vec![0; usize::try_from(length - from).map_err(io::Error::other)?];
    file.read_exact_at(&mut window, from)?;
    Ok((from, window))
}

/// Where the files before this one end; `None` if the last of them does not end with a record.
fn last_of_full(path: &Path) -> io::Result<Option<Head>> {
    let Some((_, last)) = segments::full(path)?.pop() else {
        return Ok(Some(Head::START));
    };
    let mut head = None;
    if last.is_file() {
        segments::each_line_back(&File::open(&last)?, |line| {
            head = Head::after(line);
            false
        })?;
    }
    Ok(head)
}

/// What is missing of what was noted, if anything is.
fn missing(path: &Path, head: Head, noted: Option<Head>) -> io::Result<Option<String>> {
    let Some(noted) = noted.filter(|noted| noted.seq > 0) else {
        return Ok(None);
    };
    if head.seq < noted.seq {
        return Ok(Some(format!(
            "it ends with record {}, and {} were written",
            head.seq, noted.seq
        )));
    }
    if head == noted {
        return Ok(None);
    }
    let mut found = None;
    for file in segments::all(path)?.iter().rev() {
        let file = match File::open(file) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let is_there = segments::each_line_back(&file, |line| match Head::after(line) {
            Some(at) if at.seq > noted.seq => true,
            at => {
                found = at;
                false
            }
        })?;
        if is_there {
            break;
        }
    }
    let is_it = found == Some(noted);
    Ok((!is_it).then(|| format!("its record {} is not the one that was written", noted.seq)))
}

fn lock(path: &Path) -> Result<Flock<File>, AuditError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(AuditError::io("open", path))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => AuditError::InUse {
            path: path.to_owned(),
        },
        errno => AuditError::io("lock", path)(errno.into()),
    })
}

/// How many bytes of `window` end with a record, and the head there; that of the files `before`, if there is none yet. `None`
/// when this is no end of a log.
fn last_record(window: &[u8], is_whole_file: bool, before: Head) -> Option<(usize, Head)> {
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
    let begins = format!("{{\"seq\":{},", before.seq + 1);
    let first_is_torn = window.is_empty()
        || window[0] == 0
        || window.starts_with(begins.as_bytes())
        || begins.as_bytes().starts_with(window);
    (is_whole_file && first_is_torn).then_some((0, before))
}

fn set_aside(path: &Path, head: Head, bytes: &[u8]) -> io::Result<PathBuf> {
    let mut nth = 0;
    loop {
        let aside = path.with_extension(format!("log.torn-{}.{nth}", head.seq + 1));
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
