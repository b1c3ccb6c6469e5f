//! The thread that writes, and the queue between it and everyone else.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::Flock;
use time::OffsetDateTime;

use super::chain::Head;
use super::tail::End;
use super::{AuditError, Event};

/// How many records may wait; some tens of megabytes.
const MOST_WAITING: usize = 16 * 1024;

/// How many records go into one write.
const MOST_IN_BATCH: usize = 256;

/// How long a failed write rests when nobody asks for it.
const RETRY: Duration = Duration::from_secs(1);

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
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, event: Event) -> Result<(), AuditError> {
        let mut state = self.state();
        if state.waiting.len() >= MOST_WAITING {
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

    /// The next records to write, which stay in the queue until [`Queue::written`]; `None` when it is closed and
    /// there are none, or the last attempt at the rest has failed.
    fn next_batch(&self, failed: bool) -> Option<Vec<(Event, OffsetDateTime)>> {
        let mut state = self.state();
        if failed && !state.wanted && !state.closed {
            state = self
                .for_writer
                .wait_timeout(state, RETRY)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        while state.waiting.is_empty() && !state.closed {
            state = self
                .for_writer
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.wanted = false;
        let batch: Vec<_> = state.waiting.iter().take(MOST_IN_BATCH).cloned().collect();
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

pub(super) struct Writer {
    queue: Arc<Queue>,
    file: Flock<File>,
    /// Up to here the file is whole and synced.
    length: u64,
    head: Head,
    /// Whether a failed write may have left something behind that length.
    remains: bool,
}

impl Writer {
    pub(super) fn new(queue: Arc<Queue>, end: End) -> Self {
        Self {
            queue,
            file: end.file,
            length: end.length,
            head: end.head,
            remains: false,
        }
    }

    pub(super) fn run(mut self) {
        let mut failed = false;
        while let Some(batch) = self.queue.next_batch(failed) {
            match self.write(&batch) {
                Ok(()) => {
                    failed = false;
                    self.queue.written(batch.len());
                }
                Err(error) => {
                    failed = true;
                    if !self.queue.failed(error) {
                        return;
                    }
                }
            }
        }
    }

    fn write(&mut self, batch: &[(Event, OffsetDateTime)]) -> io::Result<()> {
        let mut head = self.head;
        let lines: Vec<u8> = batch
            .iter()
            .flat_map(|(event, time)| head.append(event, *time))
            .collect();
        if self.remains {
            self.file.set_len(self.length)?;
        }
        self.remains = true;
        self.file.write_all_at(&lines, self.length)?;
        self.file.sync_data()?;
        self.remains = false;
        self.length += lines.len() as u64;
        self.head = head;
        Ok(())
    }
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
        for _ in 0..MOST_WAITING {
            queue.push(event.clone()).unwrap();
        }
        assert!(matches!(
            queue.push(event),
            Err(AuditError::Backlog(MOST_WAITING))
        ));
    }
}
