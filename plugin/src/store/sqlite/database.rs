//! One SQLite file with all that this host knows of keys: what a fleet would share, and what is of this host.
//!
//! The daemon owns it; nothing else opens it while the daemon runs (an advisory lock on the state directory
//! sees to that). Losing a row here can mean losing a disk, so no row is ever deleted as a side effect, a
//! change is on the disk when its call returns, and a file that can't be trusted is refused and left alone.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};
use rusqlite::{Connection, Transaction, TransactionBehavior};

use super::changes::Changes;
use super::checkpoints::Checkpoints;
use super::fault::StoreFault;
use super::hook_index::HookIndex;
use super::schema;
use crate::host::file_error::FileError;
use crate::model::problem::chain;
use crate::store::error::StoreError;
use crate::store::records::{Traces, UnixTime};

/// The open keystore of one state directory.
#[derive(Debug)]
pub(crate) struct Database {
    path: PathBuf,
    changes: Arc<Changes>,
    hook_index: HookIndex,
    // Before the connection: closing the last one is a checkpoint, too.
    checkpoints: Checkpoints,
    // Before the lock, so that the connection is closed when the lock goes.
    connection: Mutex<Connection>,
    _lock: Flock<File>,
}

impl Database {
    /// The file's name in the state directory.
    pub(crate) const FILE: &'static str = "keystore.db";
    /// The file that whoever has the keystore open holds a lock on.
    pub(crate) const LOCK: &'static str = "keystore.lock";

    /// Opens the keystore in `dir`, making both (0700, 0600) where they are missing.
    ///
    /// # Errors
    /// [`StoreError::InUse`] when another process has it open, [`StoreError::Damaged`] and
    /// [`StoreError::TooNew`] when the file can't be used; in all cases it stays as it was.
    pub(crate) fn open(dir: &Path) -> Result<Self, StoreError> {
        private_directory(dir)?;
        let lock = lock_directory(dir)?;
        let path = dir.join(Self::FILE);
        private_file(dir, &path)?;
        let connection = schema::open(&path)?;
        let changes = Changes::of(&connection);
        let database = Self {
            hook_index: HookIndex::of(&connection, dir, Arc::clone(&changes)),
            changes,
            checkpoints: Checkpoints::of(&path)?,
            path,
            connection: Mutex::new(connection),
            _lock: lock,
        };
        database.forget_rows_of_the_killed();
        Ok(database)
    }

    /// A virtseald that was killed after a deletion may have left the rows in the write-ahead log.
    fn forget_rows_of_the_killed(&self) {
        match self.forget_deleted_rows() {
            Ok(Traces::None) => {}
            // The next deletion empties it, and so does the end of virtseald.
            Ok(Traces::Left) => {
                tracing::warn!("another program reads the keystore: its write-ahead log stays for now");
            }
            Err(error) => tracing::warn!("the write-ahead log stays for now: {}", chain(&error)),
        }
    }

    /// The state directory, which holds more than the database.
    pub(crate) fn dir(&self) -> &Path {
        self.path
            .parent()
            .expect("the database is a file in the directory")
    }

    /// Takes what was deleted out of the write-ahead log too; the pages themselves are zeroed (`secure_delete`). The deletion
    /// itself stands already, whatever becomes of this. Another program that reads the file may keep the log.
    pub(crate) fn forget_deleted_rows(&self) -> Result<Traces, StoreError> {
        self.read(|connection| {
            let kept: i64 = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
            Ok(match kept {
                0 => Traces::None,
                _ => Traces::Left,
            })
        })
    }

    pub(crate) fn connection(&self) -> MutexGuard<'_, Connection> {
        // A panic elsewhere can't leave the connection half changed: transactions roll back when dropped.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn read<T>(
        &self,
        query: impl FnOnce(&Connection) -> Result<T, StoreFault>,
    ) -> Result<T, StoreError> {
        query(&self.connection()).map_err(|fault| fault.at(&self.path))
    }

    /// Runs `change` in one transaction that takes the write lock first, and commits it unless it fails.
    pub(crate) fn write<T>(
        &self,
        change: impl FnOnce(&Transaction) -> Result<T, StoreFault>,
    ) -> Result<T, StoreError> {
        let mut connection = self.connection();
        let run = || {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let outcome = change(&transaction)?;
            let index = self.hook_index.before_commit(&transaction)?;
            transaction.commit()?;
            self.changes.after_commit();
            self.hook_index.after_commit(index);
            Ok(outcome)
        };
        let outcome = run().map_err(|fault: StoreFault| fault.at(&self.path))?;
        self.checkpoints.note_change();
        Ok(outcome)
    }

    /// What has changed so far.
    pub(crate) fn changes(&self) -> &Changes {
        &self.changes
    }

    /// Makes sure that what the hook reads is as the rows are.
    pub(crate) fn ensure_hook_index(&self) -> Result<(), StoreError> {
        self.read(|connection| self.hook_index.ensure(connection))
    }

    /// The database as it is at one moment, for a backup.
    pub(crate) fn snapshot(&self) -> Result<Vec<u8>, StoreError> {
        self.read(|connection| Ok(connection.serialize(rusqlite::MAIN_DB)?.to_vec()))
    }

    /// Brings all changes into the database file, as the end of virtseald does. Says whether that file alone is whole now.
    pub(crate) fn checkpoint(&self) -> Result<bool, StoreError> {
        schema::checkpoint(&self.path)
    }
}

/// The id in a row of `what`.
pub(crate) fn parse_id<T: FromStr>(what: &str, id: &str) -> Result<T, StoreError> {
    id.parse().map_err(|_| StoreError::Inconsistent {
        row: format!("of {what} {id:?}"),
        why: "its id is not a UUID".to_owned(),
    })
}

/// Makes `dir` with mode 0700, or takes the group's and others' rights from the one there is.
fn private_directory(dir: &Path) -> Result<(), StoreError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(FileError::of("make the state directory", dir))?;
    let mode = fs::metadata(dir)
        .map_err(FileError::of("read the state directory", dir))?
        .mode();
    if mode & 0o077 != 0 {
        fs::set_permissions(dir, Permissions::from_mode(0o700))
            .map_err(FileError::of("make private the state directory", dir))?;
    }
    Ok(())
}

/// Takes the lock that lasts as long as the file stays open, so it goes with the process whatever happens.
fn lock_directory(dir: &Path) -> Result<Flock<File>, StoreError> {
    let path = dir.join(Database::LOCK);
    let mut file = open_private(&path).map_err(FileError::of("open the lock file", &path))?;
    // Only for the message below: the lock decides, not what the file says.
    let holder = StoreError::pid_in(&mut file);
    let mut lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => StoreError::InUse {
            dir: dir.to_owned(),
            holder,
        },
        errno => FileError::of("lock", &path)(errno.into()).into(),
    })?;
    if let Err(error) = write_pid(&mut lock) {
        // A full disk: only the message above is the poorer for it.
        tracing::warn!("can't write {}: {error}", path.display());
    }
    Ok(lock)
}

fn write_pid(file: &mut File) -> io::Result<()> {
    file.rewind()?;
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())
}

/// Makes the database file before SQLite does, which would give it the umask's mode; SQLite gives its `-wal`
/// and `-shm` the mode of the database.
fn private_file(dir: &Path, path: &Path) -> Result<(), StoreError> {
    let file = open_private(path).map_err(FileError::of("open the keystore", path))?;
    file.set_permissions(Permissions::from_mode(0o600))
        .map_err(FileError::of("make private the keystore", path))?;
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    Ok(synced.map_err(FileError::of("sync the state directory", dir))?)
}

fn open_private(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

pub(crate) fn now() -> UnixTime {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::envelope::VmId;
    use crate::model::problem::Problem;
    use crate::store::shared::Vms;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn directory_and_files_are_private() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("a/state");
        let database = Database::open(&dir).unwrap();
        database.remember_vm(VmId::random(), "web01").unwrap();
        assert_eq!(mode(&dir), 0o700);
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            assert_eq!(mode(&path), 0o600, "{}", path.display());
        }
        drop(database);
        fs::set_permissions(&dir, Permissions::from_mode(0o755)).unwrap();
        drop(Database::open(&dir).unwrap());
        assert_eq!(mode(&dir), 0o700);
    }

    #[test]
    fn second_open_is_refused_and_names_the_holder() {
        let dir = tempfile::tempdir().unwrap();
        let first = Database::open(dir.path()).unwrap();
        let message = Database::open(dir.path()).unwrap_err().to_string();
        assert!(
            message.contains(&format!("pid {}", std::process::id())),
            "{message}"
        );
        drop(first);
        Database::open(dir.path()).unwrap();
    }

    #[test]
    fn corrupt_file_is_named_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(Database::FILE);
        let garbage = vec![0x41; 9000];
        fs::write(&path, &garbage).unwrap();
        let error = Database::open(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");
        assert!(error.to_string().contains(path.to_str().unwrap()));
        assert_eq!(fs::read(&path).unwrap(), garbage);
    }

    #[test]
    fn damaged_page_is_noticed_when_opening() {
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(dir.path()).unwrap();
        for name in 0..200 {
            database
                .remember_vm(VmId::random(), &format!("vm{name}"))
                .unwrap();
        }
        let path = database.path.clone();
        drop(database);
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2 / 4096 * 4096;
        bytes[middle..middle + 4096].fill(0xff);
        fs::write(&path, bytes).unwrap();
        let error = Database::open(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");
    }

    /// What is in the write-ahead log of a damaged database stays there: the next look may find a way to use it.
    #[test]
    fn nothing_is_written_before_the_check() {
        let (dir, damaged) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let database = Database::open(dir.path()).unwrap();
        for name in 0..200 {
            database
                .remember_vm(VmId::random(), &format!("vm{name}"))
                .unwrap();
        }
        database.checkpoint().unwrap();
        database.remember_vm(VmId::random(), "later").unwrap();
        let files = [Database::FILE, "keystore.db-wal"].map(|name| damaged.path().join(name));
        let mut bytes = fs::read(&database.path).unwrap();
        // An index that lacks an entry: whole pages, in which only a full check sees anything.
        let before = bytes.len();
        for page in bytes.chunks_mut(4096).skip(1).filter(|page| page[0] == 0x0a) {
            let cells = u16::from_be_bytes([page[3], page[4]]);
            page[3..5].copy_from_slice(&cells.saturating_sub(1).to_be_bytes());
        }
        assert_eq!(bytes.len(), before);
        fs::write(&files[0], bytes).unwrap();
        fs::copy(dir.path().join("keystore.db-wal"), &files[1]).unwrap();
        let were = files.each_ref().map(|file| fs::read(file).unwrap());
        assert!(!were[1].is_empty());
        let error = Database::open(damaged.path()).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");
        let told = Problem::from(error).to_string();
        assert!(told.contains("virtseal state restore"), "{told}");
        assert_eq!(files.each_ref().map(|file| fs::read(file).unwrap()), were);
    }

    #[test]
    fn later_schema_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(Database::open(dir.path()).unwrap());
        let raw = Connection::open(dir.path().join(Database::FILE)).unwrap();
        raw.pragma_update(None, "user_version", 99).unwrap();
        drop(raw);
        let error = Database::open(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::TooNew { found: 99, .. }), "{error:?}");
        assert!(error.to_string().contains("later virtseal"));
    }

    #[test]
    fn foreign_database_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let raw = Connection::open(dir.path().join(Database::FILE)).unwrap();
        raw.execute_batch("CREATE TABLE music (title TEXT)").unwrap();
        drop(raw);
        let error = Database::open(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");
    }

    #[test]
    fn full_disk_is_an_error_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(dir.path()).unwrap();
        database
            .connection()
            .pragma_update(None, "max_page_count", 1)
            .unwrap();
        let (mut done, mut failed) = (0, None);
        while failed.is_none() {
            match database.remember_vm(VmId::random(), &"x".repeat(500)) {
                Ok(_) => done += 1,
                Err(error) => failed = Some(error),
            }
            assert!(done < 1000);
        }
        assert!(matches!(failed, Some(StoreError::DiskFull { .. })), "{failed:?}");
        assert_eq!(database.vms().unwrap().whole().unwrap().len(), done);
    }

    #[test]
    fn read_only_database_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(dir.path()).unwrap();
        database
            .connection()
            .pragma_update(None, "query_only", true)
            .unwrap();
        let error = database.remember_vm(VmId::random(), "web01").unwrap_err();
        assert!(matches!(error, StoreError::ReadOnly { .. }), "{error:?}");
    }

    #[test]
    fn lock_file_that_is_a_link_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/null", dir.path().join(Database::LOCK)).unwrap();
        assert!(matches!(Database::open(dir.path()), Err(StoreError::File(_))));
    }
}
