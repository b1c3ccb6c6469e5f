//! The audit log: who asked for which key, and what came of it.
//!
//! One JSON record a line, appended only. Each carries the SHA-256 of the line before it, so that a changed,
//! removed or reordered line breaks the chain ([`verify`]). A file that is full gets a number, and the chain goes on in the
//! next one.
//!
//! Whoever can write the file can also rewrite all of it, or cut its end. So its length and last record are noted in the
//! keystore: after they are on disk, so that a crash in between leaves a log that is longer than what was noted, which is no
//! damage; one that is shorter is. Root can change both: compare [`chain::Verified::head`] with a copy kept elsewhere to notice that.
//! A damaged log keeps nobody from going on: it is put away, and the next file begins with a record that says so.
//!
//! One thread writes. [`AuditLog::record`] returns at once, [`AuditLog::flush`] waits until the disk has all
//! records made before it; callers that wait together share one fdatasync. A batch that could not be written is
//! kept and tried again; the callers learn why.

mod chain;
mod segments;
mod tail;
mod writer;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::model::envelope::VmId;
use crate::model::problem::chain as chain_of;

pub(crate) use chain::{Position, verify};
pub(crate) use segments::Shown;
use writer::{Note, Queue, Writer};

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    /// Done.
    Ok,
    /// Not allowed, or not safe.
    Refused,
    /// Tried in vain.
    Failed,
}

/// Who had something done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Actor {
    /// The daemon, on its own.
    Virtseald,
    /// A process of the user with this id.
    User(u32),
}

impl Actor {
    pub(crate) fn uid(self) -> Option<u32> {
        match self {
            Self::Virtseald => None,
            Self::User(uid) => Some(uid),
        }
    }
}

/// What is worth a record. Never holds a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Event {
    op: String,
    outcome: Outcome,
    #[serde(skip_serializing_if = "Option::is_none")]
    actor: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vm: Option<VmId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vm_name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    object: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    provider: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

impl Event {
    /// The most bytes that any text of an event has in the log; what is longer is cut.
    pub(crate) const MAX_TEXT: usize = 2048;
    /// The operation of a record with which the chain begins anew.
    pub(crate) const BREAK: &str = "audit-break";

    /// `op` ended in `outcome`: `prepare`, `provider-unlock`, …
    pub(crate) fn new(op: &str, outcome: Outcome) -> Self {
        Self {
            op: cut(op),
            outcome,
            actor: None,
            vm: None,
            vm_name: None,
            object: None,
            provider: None,
            detail: None,
        }
    }

    /// Who asked.
    #[must_use]
    pub(crate) fn by(mut self, actor: Actor) -> Self {
        self.actor = actor.uid();
        self
    }

    /// The VM, with its name at that time.
    #[must_use]
    pub(crate) fn vm(mut self, vm: VmId, name: &str) -> Self {
        self.vm = Some(vm);
        self.vm_name = Some(cut(name));
        self
    }

    /// The object: `disk vda`, `vtpm`, a path.
    #[must_use]
    pub(crate) fn object(mut self, object: &str) -> Self {
        self.object = Some(cut(object));
        self
    }

    #[must_use]
    pub(crate) fn provider(mut self, name: &str) -> Self {
        self.provider = Some(cut(name));
        self
    }

    /// Anything else, such as the reason of a refusal.
    #[must_use]
    pub(crate) fn detail(mut self, detail: &str) -> Self {
        self.detail = Some(cut(detail));
        self
    }
}

/// Names and reasons can come from a domain's XML: none may make a line too long to be read again.
fn cut(text: &str) -> String {
    let end = (0..=Event::MAX_TEXT.min(text.len()))
        .rev()
        .find(|end| text.is_char_boundary(*end))
        .unwrap_or(0);
    text[..end].to_owned()
}

/// The open log of one daemon.
#[derive(Debug)]
pub(crate) struct AuditLog {
    queue: Arc<Queue>,
    writer: Option<JoinHandle<()>>,
}

impl AuditLog {
    /// The file's name in the state directory.
    pub(crate) const FILE: &'static str = "audit.log";

    /// A file that is longer gets a number, and the next one begins.
    const FULL: u64 = 16 << 20;

    /// Opens `path`, or makes it (0600), and goes on from its last record. What a crash left unfinished behind
    /// it is moved to a file of its own, and a record says so.
    ///
    /// # Errors
    /// When another process has it open, or no file can be made.
    #[cfg(test)]
    pub(crate) fn open(path: &Path) -> Result<Self, AuditError> {
        Self::start(path, tail::open(path, None)?, Box::new(|_| true), Self::FULL)
    }

    /// Opens `path`, or makes it (0600), and goes on from its last record. What a crash left unfinished behind
    /// it is moved to a file of its own, and a record says so. `noted` was noted last; `note` notes more, once it is on disk. A log that does not
    /// reach that, or that can't be opened now, is no reason to fail: see [`AuditLog::problem`].
    ///
    /// # Errors
    /// When another process has it open.
    pub(crate) fn open_anchored(
        path: &Path,
        noted: Option<Position>,
        note: impl FnMut(Position) -> bool + Send + 'static,
    ) -> Result<Self, AuditError> {
        let note: Note = Box::new(note);
        match tail::open(path, noted) {
            Ok(end) => Self::start(path, end, note, Self::FULL),
            Err(error @ AuditError::InUse { .. }) => Err(error),
            Err(error) => {
                let queue = Arc::new(Queue::default());
                queue.found_problem(Some(format!("{}; virtseald tries again", chain_of(&error))));
                let writer = Writer::new(Arc::clone(&queue), path, Err(noted), note, Self::FULL);
                Self::spawn(path, queue, writer)
            }
        }
    }

    fn start(path: &Path, end: tail::End, note: Note, full_at: u64) -> Result<Self, AuditError> {
        let queue = Arc::new(Queue::default());
        if let Some(event) = writer::opening_events(&end) {
            queue.push(event)?;
        }
        queue.found_problem(end.broken.clone());
        let writer = Writer::new(Arc::clone(&queue), path, Ok(end), note, full_at);
        Self::spawn(path, queue, writer)
    }

    fn spawn(path: &Path, queue: Arc<Queue>, writer: Writer) -> Result<Self, AuditError> {
        let thread = std::thread::Builder::new()
            .name("audit".to_owned())
            .spawn(move || writer.run())
            .map_err(AuditError::io("start the writer of", path))?;
        Ok(Self {
            queue,
            writer: Some(thread),
        })
    }

    /// What was found wrong with it since it was opened.
    pub(crate) fn problem(&self) -> Option<String> {
        self.queue.problem()
    }

    /// Something is wrong with it that its files don't tell.
    pub(crate) fn found_problem(&self, problem: String) {
        self.queue.found_problem(Some(problem));
    }

    /// Up to where records are on disk.
    pub(crate) fn position(&self) -> Option<Position> {
        self.queue.position()
    }

    /// The last `count` records before a place that an earlier call has named, or before the end, of at most `max_bytes` together
    /// in a reply.
    pub(crate) fn last(
        path: &Path,
        before: Option<u64>,
        count: usize,
        max_bytes: usize,
    ) -> Result<Shown, AuditError> {
        segments::last_lines(path, before, count, max_bytes).map_err(AuditError::io("read", path))
    }

    /// Adds a record, and returns before it is written.
    ///
    /// # Errors
    /// [`AuditError::Backlog`] when the disk has not kept up for a very long time.
    pub(crate) fn record(&self, event: Event) -> Result<(), AuditError> {
        self.queue.push(event)
    }

    /// Waits until the disk has all records made before this call, for `deadline` at the most.
    ///
    /// # Errors
    /// [`AuditError::Write`] when it can't be written, [`AuditError::Late`] after the deadline. The records are
    /// kept and tried again.
    pub(crate) fn flush(&self, deadline: Duration) -> Result<(), AuditError> {
        self.queue.wait(deadline)
    }
}

impl Drop for AuditLog {
    /// Writes what is left, once.
    fn drop(&mut self) {
        self.queue.close();
        if let Some(writer) = self.writer.take() {
            // It has nothing to return; a panic in it was printed.
            let _ = writer.join();
        }
    }
}

/// Why the log can't be written or trusted.
#[derive(Debug, Error)]
pub(crate) enum AuditError {
    #[error("the audit log {} is not whole: line {line} {why}", .path.display())]
    Broken {
        path: PathBuf,
        /// The first line that does not fit, from 1.
        line: u64,
        /// What is wrong with it.
        why: String,
    },
    #[error("another virtseald writes the audit log {}", .path.display())]
    InUse { path: PathBuf },
    #[error("can't {action} the audit log {}", .path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("can't write the audit log: free space on its file system, or see why it can't be written")]
    Write(#[source] Arc<io::Error>),
    #[error("the audit log did not reach the disk within {} ms", .0.as_millis())]
    Late(Duration),
    #[error("{0} audit records wait for the disk: no more are taken")]
    Backlog(usize),
}

impl AuditError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

#[cfg(test)]
mod tests;
