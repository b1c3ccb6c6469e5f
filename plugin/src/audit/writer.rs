//! The thread that writes, and the queue between it and everyone else.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::Flock;
use time::OffsetDateTime;

use super::chain::Head;
use super::tail::{self, End};
use super::{AuditError, Event, Outcome};
use crate::model::deadlines::store::{AUDIT_NOTE_AFTER, AUDIT_RETRY};
use crate::model::problem::chain;

/// How many records may wait; some tens of megabytes.
const MAX_WAITING: usize = 16 * 1024;

/// How many records go into one write.
const MAX_IN_BATCH: usize = 256;

/// Records on their way, numbered from 1 since the log was opened.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    for_writer: Condvar,
    for_callers: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<(Event, OffsetDateTime)>,
    taken_in: u64,
    durable: u64,
    failures: u64,
    last_failure: Option<Arc<io::Error>>,
    wanted: bool,
    closed: bool,
    /// Up to here records are on disk.
    reached: Option<Head>,
    problem: Option<String>,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, event: Event) -> Result<(), AuditError> {
        let mut state = self.state();
        if state.waiting.len() >= MAX_WAITING {
            return Err(AuditError::Backlog(state.waiting.len()));
        }
        // Under the lock, so that times rise with the numbers.
        state.waiting.push_back((event, OffsetDateTime::now_utc()));
        state.taken_in += 1;
        self.for_writer.notify_one();
        Ok(())
    }

    pub(super) fn wait(&self, deadline: Duration) -> Result<(), AuditError> {
        let began = Instant::now();
        let mut state = self.state();
        let (target, failures) = (state.taken_in, state.failures);
        state.wanted = true;
        self.for_writer.notify_one();
        while state.durable < target {
            if state.failures > failures
                && let Some(error) = &state.last_failure
            {
                return Err(AuditError::Write(Arc::clone(error)));
            }
            let left = deadline.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Err(AuditError::Late(deadline));
            }
            state = self
                .for_callers
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    pub(super) fn close(&self) {
        self.state().closed = true;
        self.for_writer.notify_one();
    }

    pub(super) fn position(&self) -> Option<Head> {
        self.state().reached
    }

    fn reached(&self, head: Head) {
        self.state().reached = Some(head);
    }

    pub(super) fn problem(&self) -> Option<String> {
        self.state().problem.clone()
    }

    pub(super) fn found_problem(&self, problem: Option<String>) {
        if let Some(problem) = problem {
            tracing::error!("the audit log was damaged: {problem}");
            self.state().problem = Some(problem);
        }
    }

    /// The next records to write, which stay in the queue until [`Queue::written`]; none after `idle`. `None` when it is closed
    /// and there are none, or the last attempt at the rest has failed.
    fn next_batch(&self, failed: bool, idle: Option<Duration>) -> Option<Vec<(Event, OffsetDateTime)>> {
        let mut state = self.state();
        if failed && !state.wanted && !state.closed {
            state = self
                .for_writer
                .wait_timeout(state, AUDIT_RETRY)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let until = idle.map(|idle| Instant::now() + idle);
        while state.waiting.is_empty() && !state.closed {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            state = match left {
                Some(left) if left.is_zero() => return Some(Vec::new()),
                Some(left) => {
                    let waited = self.for_writer.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self
                    .for_writer
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
        state.wanted = false;
        let batch: Vec<_> = state.waiting.iter().take(MAX_IN_BATCH).cloned().collect();
        (!batch.is_empty()).then_some(batch)
    }

    fn written(&self, records: usize) {
        let mut state = self.state();
        state.waiting.drain(..records);
        state.durable += records as u64;
        self.for_callers.notify_all();
    }

    /// Returns whether to try again.
    fn failed(&self, error: io::Error) -> bool {
        let mut state = self.state();
        state.failures += 1;
        state.last_failure = Some(Arc::new(error));
        self.for_callers.notify_all();
        !state.closed
    }
}

/// Notes how long the log is, in a place of its own; says whether that is done.
pub(super) type Note = Box<dyn FnMut(Head) -> bool + Send>;

pub(super) struct Writer {
    queue: Arc<Queue>,
    path: PathBuf,
    /// `None` while it can't be opened.
    file: Option<Flock<File>>,
    /// Up to here the file is whole and synced.
    length: u64,
    head: Head,
    /// Whether a failed write may have left something behind that length.
    remains: bool,
    /// What has to be recorded before anything else.
    first: Vec<Event>,
    note: Note,
    /// Since when there are records that are not noted.
    unnoted: Option<Instant>,
    /// How long a file may get.
    full_at: u64,
}

impl Writer {
    /// With `opened`, the log that it goes on with, or where it would have to if it could be opened.
    pub(super) fn new(
        queue: Arc<Queue>,
        path: &Path,
        opened: Result<End, Option<Head>>,
        note: Note,
        full_at: u64,
    ) -> Self {
        let (file, length, head) = match opened {
            Ok(end) => (Some(end.file), end.length, end.head),
            Err(noted) => (None, 0, noted.unwrap_or(Head::START)),
        };
        queue.reached(head);
        Self {
            queue,
            path: path.to_owned(),
            file,
            length,
            head,
            remains: false,
            first: Vec::new(),
            note,
            unnoted: Some(Instant::now()),
            full_at,
        }
    }

    pub(super) fn run(mut self) {
        let mut failed = false;
        while let Some(batch) = self.queue.next_batch(failed, self.note_is_due_in()) {
            if batch.is_empty() {
                self.note_length();
                continue;
            }
            match self.write(&batch) {
                Ok(()) => {
                    failed = false;
                    self.queue.reached(self.head);
                    self.queue.written(batch.len());
                    self.unnoted.get_or_insert_with(Instant::now);
                    if self.note_is_due_in().is_some_and(|wait| wait.is_zero()) {
                        self.note_length();
                    }
                }
                Err(error) => {
                    failed = true;
                    if !self.queue.failed(error) {
                        break;
                    }
                }
            }
        }
        self.note_length();
    }

    fn note_is_due_in(&self) -> Option<Duration> {
        self.unnoted
            .map(|since| AUDIT_NOTE_AFTER.saturating_sub(since.elapsed()))
    }

    /// Only what is on disk: a crash in between leaves a log that is longer than what was noted.
    fn note_length(&mut self) {
        if self.unnoted.is_some() {
            let is_noted = self.file.is_none() || (self.note)(self.head);
            self.unnoted = (!is_noted).then(Instant::now);
        }
    }

    fn write(&mut self, batch: &[(Event, OffsetDateTime)]) -> io::Result<()> {
        self.find_file()?;
        let mut head = self.head;
        let first = self.first.iter().map(|event| (event, OffsetDateTime::now_utc()));
        let lines: Vec<u8> = first
            .chain(batch.iter().map(|(event, time)| (event, *time)))
            .flat_map(|(event, time)| head.append(event, time))
            .collect();
        let file = self.file.as_ref().expect("it was found");
        if self.remains {
            file.set_len(self.length)?;
        }
        self.remains = true;
        file.write_all_at(&lines, self.length)?;
        file.sync_data()?;
        self.remains = false;
        self.length += lines.len() as u64;
        self.head = head;
        self.first.clear();
        Ok(())
    }

    /// Somebody may have cut, replaced or removed the file since the last record, and it may be full.
    fn find_file(&mut self) -> io::Result<()> {
        let failed = |error: AuditError| io::Error::other(chain(&error));
        let Some(file) = &self.file else {
            let end = tail::open(&self.path, Some(self.head)).map_err(failed)?;
            self.first.extend(opening_events(&end));
            self.queue.found_problem(end.broken.clone());
            (self.length, self.head, self.file) = (end.length, end.head, Some(end.file));
            return Ok(());
        };
        if let Some(why) = self.strange(file)? {
            self.file = None;
            self.remains = false;
            let end = tail::begin_anew(&self.path, Some(self.head), why).map_err(failed)?;
            self.first.extend(opening_events(&end));
            self.queue.found_problem(end.broken.clone());
            (self.length, self.file) = (0, Some(end.file));
        } else if self.length >= self.full_at {
            let next = tail::next_file(&self.path).map_err(failed)?;
            (self.length, self.remains, self.file) = (0, false, Some(next));
        }
        Ok(())
    }

    /// What is not as this writer left it.
    fn strange(&self, file: &File) -> io::Result<Option<&'static str>> {
        let ours = file.metadata()?;
        let there = match std::fs::symlink_metadata(&self.path) {
            Ok(there) => there,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Some("it was removed while virtseald wrote it"));
            }
            Err(error) => return Err(error),
        };
        let is_it = (ours.dev(), ours.ino()) == (there.dev(), there.ino());
        Ok(if !is_it {
            Some("it was replaced while virtseald wrote it")
        } else if ours.len() < self.length || (ours.len() > self.length && !self.remains) {
            Some("its length was changed while virtseald wrote it")
        } else {
            None
        })
    }
}

/// What the opening of a log has to say in it.
pub(super) fn opening_events(end: &End) -> Option<Event> {
    if let Some(why) = &end.broken {
        return Some(
            Event::new(Event::BREAK, Outcome::Failed).detail(&format!("the log was damaged: {why}")),
        );
    }
    let torn = end.torn.as_ref()?;
    let detail = format!("a crash cut the log short: the rest is in {}", torn.display());
    Some(Event::new("audit-torn", Outcome::Failed).detail(&detail))
}

#[cfg(test)]
mod tests {
    use super::super::Outcome;
    use super::*;

    #[test]
    fn deadline_holds_when_nobody_writes() {
        let queue = Queue::default();
        queue.wait(Duration::MAX).unwrap();
        queue.push(Event::new("prepare", Outcome::Ok)).unwrap();
        let began = Instant::now();
        let error = queue.wait(Duration::from_millis(30)).unwrap_err();
        assert!(matches!(error, AuditError::Late(_)), "{error:?}");
        assert!(began.elapsed() >= Duration::from_millis(30));
    }

    #[test]
    fn backlog_is_bounded_and_says_so() {
        let queue = Queue::default();
        let event = Event::new("prepare", Outcome::Ok);
        for _ in 0..MAX_WAITING {
            queue.push(event.clone()).unwrap();
        }
        assert!(matches!(queue.push(event), Err(AuditError::Backlog(MAX_WAITING))));
    }
}
