//! Records as lines, and the chain through them.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use openssl::sha::sha256;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{AuditError, Event};

/// The most bytes that a line has: every text of an [`Event`] at its limit, escaped, and room to spare.
pub(super) const MOST_LINE: usize = 128 * 1024;

/// The end of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// Number of the last record; 0 before the first.
    seq: u64,
    /// SHA-256 of its line without the newline; zeros before the first.
    hash: [u8; 32],
}

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
    #[serde(rename = "op")]
    _op: String,
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

    pub(super) fn seq(&self) -> u64 {
        self.seq
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
pub struct Verified {
    /// How many records it has.
    pub records: u64,
    /// SHA-256 of the last line, in hex: kept elsewhere, it proves later that no record was cut off.
    pub head: String,
    /// Bytes after the last whole line: a record that is being written, or that a crash cut short.
    pub unfinished: usize,
}

/// Follows the chain through the log at `path`, also while a daemon writes it.
///
/// # Errors
/// [`AuditError::Broken`] names the first line that does not fit.
pub fn verify(path: &Path) -> Result<Verified, AuditError> {
    let mut log = BufReader::new(File::open(path).map_err(AuditError::io("open", path))?);
    let mut head = Head::START;
    let mut line = Vec::new();
    let broken = |line: u64, why: String| AuditError::Broken {
        path: path.to_owned(),
        line,
        why,
    };
    loop {
        line.clear();
        let mut rest = log.by_ref().take(MOST_LINE as u64 + 1);
        rest.read_until(b'\n', &mut line)
            .map_err(AuditError::io("read", path))?;
        let number = head.seq + 1;
        match line.split_last() {
            Some((b'\n', line)) => head.follow(line).map_err(|why| broken(number, why))?,
            Some(_) if line.len() > MOST_LINE => {
                return Err(broken(number, "is too long for an audit record".to_owned()));
            }
            _ => {
                return Ok(Verified {
                    records: head.seq,
                    head: hex::encode(head.hash),
                    unfinished: line.len(),
                });
            }
        }
    }
}
