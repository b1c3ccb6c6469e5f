//! Brings changes from the write-ahead log into the database soon after they were made.
//!
//! Whoever copies `keystore.db` alone, as file backups do, has all that is older than five seconds. On a thread and a connection
//! of their own: a commit never waits for it.

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::schema;
use crate::host::file_error::FileError;
use crate::model::deadlines::store::{CHECKPOINT_AGAIN, GATHER};
use crate::model::problem::chain;
use crate::store::error::StoreError;

/// The thread, until this is dropped.
#[derive(Debug)]
pub(crate) struct Checkpoints {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    is_due: bool,
    is_closed: bool,
}

impl Checkpoints {
    pub(crate) fn of(path: &Path) -> Result<Self, StoreError> {
        let shared = Arc::new(Shared::default());
        // What a daemon that was killed has left, and a new schema.
        shared.lock().is_due = true;
        let (of_thread, owned) = (Arc::clone(&shared), path.to_owned());
        let thread = std::thread::Builder::new()
            .name("checkpoints".to_owned())
            .spawn(move || of_thread.run(&owned))
            .map_err(FileError::of("start the checkpoints of", path))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    pub(crate) fn note_change(&self) {
        self.shared.lock().is_due = true;
        self.shared.changed.notify_all();
    }
}

impl Drop for Checkpoints {
    fn drop(&mut self) {
        self.shared.lock().is_closed = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // It has nothing to return; a panic in it was printed.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is something to do and as long as changes gather; `false` at the end.
    fn wait(&self, wait: Duration) -> bool {
        let idle = |state: &mut State| !state.is_due && !state.is_closed;
        let state = self
            .changed
            .wait_while(self.lock(), idle)
            .unwrap_or_else(PoisonError::into_inner);
        let open = |state: &mut State| !state.is_closed;
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, wait, open)
            .unwrap_or_else(PoisonError::into_inner);
        state.is_due = false;
        !state.is_closed
    }

    fn run(&self, path: &Path) {
        let (mut wait, mut has_failed) = (GATHER, false);
        while self.wait(wait) {
            let done = schema::checkpoint(path);
            if let (Err(error), false) = (&done, has_failed) {
                tracing::warn!("changes stay in the write-ahead log: {}", chain(error));
            }
            has_failed = done.is_err();
            let is_whole = matches!(done, Ok(true));
            wait = if is_whole { GATHER } else { CHECKPOINT_AGAIN };
            if !is_whole {
                self.lock().is_due = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::model::envelope::VmId;
    use crate::store::shared::Vms;
    use crate::store::sqlite::database::Database;

    /// The most time from a change to its place in the database.
    const LATEST: Duration = Duration::from_secs(5);

    /// How many VMs a copy of the database alone has.
    fn copied(database: &Database, into: &Path) -> Option<usize> {
        let copy = into.join(Database::FILE);
        std::fs::copy(database.dir().join(Database::FILE), &copy).unwrap();
        let connection = rusqlite::Connection::open(&copy).unwrap();
        let count = connection.query_row("SELECT count(*) FROM vms", [], |row| row.get(0));
        count.ok()
    }

    #[test]
    fn the_database_alone_is_whole_soon_after_a_change() {
        let (dir, aside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        drop(Database::open(dir.path()).unwrap());
        let database = Database::open(dir.path()).unwrap();
        database.remember_vm(VmId::random(), "web01").unwrap();
        assert_ne!(copied(&database, aside.path()), Some(1), "it was there at once");
        let began = Instant::now();
        while copied(&database, aside.path()) != Some(1) {
            assert!(began.elapsed() < LATEST, "not within {LATEST:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
        database.remember_vm(VmId::random(), "web02").unwrap();
        assert!(database.checkpoint().unwrap());
        assert_eq!(copied(&database, aside.path()), Some(2));
    }

    /// A reader of another process pins the log: what could not be done then is done when it is gone.
    #[test]
    fn a_reader_delays_it_and_does_not_lose_it() {
        let (dir, aside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let database = Database::open(dir.path()).unwrap();
        let reader = rusqlite::Connection::open(database.dir().join(Database::FILE)).unwrap();
        reader.execute_batch("BEGIN; SELECT * FROM vms").unwrap();
        database.remember_vm(VmId::random(), "web01").unwrap();
        assert!(!database.checkpoint().unwrap(), "the reader does not pin the log");
        std::thread::sleep(GATHER + CHECKPOINT_AGAIN / 2);
        reader.execute_batch("COMMIT").unwrap();
        drop(reader);
        let began = Instant::now();
        while copied(&database, aside.path()) != Some(1) {
            assert!(began.elapsed() < LATEST, "not within {LATEST:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
