//! Records as lines, and the chain through them.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use openssl::sha::sha256;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{AuditError, Event, segments};

/// The end of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    /// Number of the last record; 0 before the first.
    pub seq: u64,
    /// SHA-256 of its line without the newline; zeros before the first.
    pub hash: [u8; 32],
}

pub(super) type Head = Position;

#[derive(Serialize)]
struct Record<'a> {
    seq: u64,
    time: String,
    #[serde(flatten)]
    event: &'a Event,
    prev: String,
}

/// What links a record, whatever else a later version writes into it.
#[derive(Deserialize)]
struct Link {
    seq: u64,
    prev: String,
    #[serde(rename = "time")]
    _time: String,
    op: String,
}

impl Head {
    pub(super) const START: Self = Self {
        seq: 0,
        hash: [0; 32],
    };

    /// The head after `line`, if that is a record; its link is not looked at.
    pub(super) fn after(line: &[u8]) -> Option<Self> {
        let link: Link = serde_json::from_slice(line).ok()?;
        Some(Self {
            seq: link.seq,
            hash: sha256(line),
        })
    }

    /// The next line, with its newline.
    pub(super) fn append(&mut self, event: &Event, time: OffsetDateTime) -> Vec<u8> {
        let record = Record {
            seq: self.seq + 1,
            time: time.format(&Rfc3339).unwrap_or_default(),
            event,
            prev: hex::encode(self.hash),
        };
        let mut line = serde_json::to_vec(&record).expect("a record holds only strings and numbers");
        *self = Self {
            seq: record.seq,
            hash: sha256(&line),
        };
        line.push(b'\n');
        line
    }

    fn follow(&mut self, line: &[u8]) -> Result<(), String> {
        let link: Link = serde_json::from_slice(line).map_err(|_| "is not an audit record".to_owned())?;
        if link.seq != self.seq + 1 {
            return Err(format!(
                "has number {}, {} was expected: lines were removed, added or moved",
                link.seq,
                self.seq + 1
            ));
        }
        if link.prev != hex::encode(self.hash) {
            return Err(
                "does not follow from the line before it: that one was changed or replaced".to_owned(),
            );
        }
        *self = Self {
            seq: link.seq,
            hash: sha256(line),
        };
        Ok(())
    }
}

/// A log whose chain holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verified {
    pub records: u64,
    /// SHA-256 of the last line, in hex: kept elsewhere, it proves later that no record was cut off.
    pub head: String,
    /// Bytes after the last whole line: a record that is being written, or that a crash cut short.
    pub unfinished: usize,
}

/// Follows the chain through the log at `path` and the files that it has filled before, also while a daemon writes it. With
/// `written` it must reach that record.
///
/// # Errors
/// [`AuditError::Broken`] names the first line that does not fit.
pub(crate) fn verify(path: &Path, written: Option<Position>) -> Result<Verified, AuditError> {
    let mut walk = Walk {
        head: Head::START,
        written: written.filter(|written| written.seq > 0),
        broken: None,
        unfinished: 0,
    };
    for file in segments::all(path).map_err(AuditError::io("list the files of", path))? {
        walk.file(&file)?;
    }
    if let Some(written) = walk.written.filter(|written| written.seq > walk.head.seq) {
        let why = format!(
            "is missing: {} records were written, so the end was cut off",
            written.seq
        );
        walk.broke(path, walk.head.seq + 1, why);
    }
    match walk.broken {
        Some(broken) => Err(broken),
        None => Ok(Verified {
            records: walk.head.seq,
            head: hex::encode(walk.head.hash),
            unfinished: walk.unfinished,
        }),
    }
}

/// A way through all files, on which the first thing that does not fit is remembered.
struct Walk {
    head: Head,
    written: Option<Position>,
    broken: Option<AuditError>,
    unfinished: usize,
}

impl Walk {
    fn broke(&mut self, path: &Path, line: u64, why: String) {
        if self.broken.is_none() {
            self.broken = Some(AuditError::Broken {
                path: path.to_owned(),
                line,
                why,
            });
        }
    }

    /// What follows something that does not fit can't be told right from wrong: on it goes with the next file, which says in
    /// its first record that the chain begins anew.
    fn file(&mut self, path: &Path) -> Result<(), AuditError> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(AuditError::io("open", path)(error)),
        };
        let (mut log, mut line, mut number) = (BufReader::new(file), Vec::new(), 0);
        loop {
            line.clear();
            let mut rest = log.by_ref().take(segments::MAX_LINE as u64 + 1);
            rest.read_until(b'\n', &mut line)
                .map_err(AuditError::io("read", path))?;
            number += 1;
            let followed = match line.split_last() {
                Some((b'\n', line)) => self.follow(line),
                Some(_) if line.len() > segments::MAX_LINE => {
                    Err("is too long for an audit record".to_owned())
                }
                _ => {
                    self.unfinished = line.len();
                    return Ok(());
                }
            };
            if let Err(why) = followed {
                self.broke(path, number, why);
                let begins_anew = number == 1 && line.last() == Some(&b'\n') && is_break(&line);
                match Head::after(&line[..line.len() - 1]).filter(|_| begins_anew) {
                    Some(head) => self.head = head,
                    None => return Ok(()),
                }
            }
        }
    }

    fn follow(&mut self, line: &[u8]) -> Result<(), String> {
        let before = self.head;
        self.head.follow(line)?;
        match self.written {
            Some(written) if written.seq == self.head.seq && written.hash != self.head.hash => {
                self.head = before;
                Err("is another record than the one that was written".to_owned())
            }
            _ => Ok(()),
        }
    }
}

/// Whether a record says that the chain begins anew with it.
fn is_break(line: &[u8]) -> bool {
    let link: Option<Link> = serde_json::from_slice(line).ok();
    link.is_some_and(|link| link.op == Event::BREAK)
}
