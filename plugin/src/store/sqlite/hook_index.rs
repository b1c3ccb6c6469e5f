//! The file from which the hook knows, without any daemon, what is sealed on this host.
//!
//! Behind the one place where the keystore commits, so that no change of envelopes or VMs can forget it: SQLite tells of
//! each such row (`changes.rs`). What is new is in the file before it is committed, what is gone leaves it after; so the
//! file always names at least what the keystore has, whenever the process dies. ADR 11 says why it is a file and not the
//! database, the hook's `index` module has its form, which both have tests for.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::{Connection, Row};
use uuid::Uuid;

use super::changes::Changes;
use super::fault::StoreFault;
use super::rows::{self, Named};
use crate::host::file_error::FileError;
use crate::model::envelope::Envelope;
use crate::model::problem::chain;
use crate::store::error::StoreError;

/// The file, and what it says.
#[derive(Debug)]
pub(crate) struct HookIndex {
    directory: PathBuf,
    path: PathBuf,
    /// Whether rows have changed since it was written.
    changes: Arc<Changes>,
    written: Mutex<Option<Written>>,
}

#[derive(Clone, Debug)]
struct Written {
    entries: Entries,
    file: Identity,
}

/// Device, inode, size and time of change: another file in its place, or other bytes in it, differ in one of them.
type Identity = (u64, u64, u64, (i64, i64));

/// What is sealed here: the envelopes with the VM of each, and the VMs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Entries {
    envelopes: BTreeMap<Uuid, Uuid>,
    vms: BTreeSet<Uuid>,
}

/// What remains to be done once the change is committed.
pub(crate) struct AfterCommit(Option<Entries>);

impl HookIndex {
    /// The file's name in the state directory.
    pub(crate) const FILE: &'static str = "hook.index";
    /// What it is called while it is written.
    pub(crate) const NEW: &'static str = ".hook.index.new";

    /// For the database behind `connection`, whose changes `changes` hears of.
    pub(crate) fn of(connection: &Connection, directory: &Path, changes: Arc<Changes>) -> Self {
        changes.index_is_due.store(true, Ordering::SeqCst);
        let index = Self {
            directory: directory.to_owned(),
            path: directory.join(Self::FILE),
            changes,
            written: Mutex::default(),
        };
        if let Err(fault) = index.rewrite(connection) {
            // Nothing is armed until it can be: `ensure_hook_index`.
            tracing::error!("{}", chain(&fault.at(&index.path)));
        }
        index
    }

    /// Puts what `transaction` adds into the file.
    pub(crate) fn before_commit(&self, transaction: &Connection) -> Result<AfterCommit, StoreFault> {
        if !self.changes.index_is_due.load(Ordering::SeqCst) {
            return Ok(AfterCommit(None));
        }
        let entries = Entries::read(transaction)?;
        let mut written = self.lock();
        match &*written {
            Some(written) if written.entries == entries => Ok(AfterCommit(None)),
            known => {
                let mut both = known
                    .as_ref()
                    .map(|known| known.entries.clone())
                    .unwrap_or_default();
                both.envelopes.extend(&entries.envelopes);
                both.vms.extend(&entries.vms);
                if known.as_ref().is_none_or(|known| known.entries != both) {
                    *written = Some(self.replace(&both)?);
                }
                Ok(AfterCommit((both != entries).then_some(entries)))
            }
        }
    }

    /// Takes out of the file what the commit has removed.
    pub(crate) fn after_commit(&self, AfterCommit(left): AfterCommit) {
        self.changes.index_is_due.store(false, Ordering::SeqCst);
        let Some(entries) = left else { return };
        match self.replace(&entries) {
            Ok(new) => *self.lock() = Some(new),
            Err(error) => {
                // It says too much, which refuses only who names what is gone.
                self.changes.index_is_due.store(true, Ordering::SeqCst);
                tracing::warn!("{}", chain(&error));
            }
        }
    }

    /// Makes sure that it is what was last written, and as the rows are that `connection` shows.
    pub(crate) fn ensure(&self, connection: &Connection) -> Result<(), StoreFault> {
        if self.is_current() {
            return Ok(());
        }
        self.rewrite(connection)
    }

    fn is_current(&self) -> bool {
        let known = self.lock().as_ref().map(|written| written.file);
        known.is_some_and(|file| self.is_there(file)) && !self.changes.index_is_due.load(Ordering::SeqCst)
    }

    fn rewrite(&self, connection: &Connection) -> Result<(), StoreFault> {
        let entries = Entries::read(connection)?;
        let mut written = self.lock();
        let before = written.take();
        match self.replace(&entries) {
            Ok(new) => *written = Some(new),
            Err(error) => {
                // On a full disk after a deletion: it refuses only who names what is gone, and is tried again.
                let covers = |before: &Written| self.is_there(before.file) && before.entries.cover(&entries);
                *written = Some(before.filter(covers).ok_or(error)?);
                return Ok(());
            }
        }
        self.changes.index_is_due.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn is_there(&self, file: Identity) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|found| identity(&found) == file)
    }

    /// Temporary file, fsync, rename, fsync of the directory; nothing where it says that already.
    fn replace(&self, entries: &Entries) -> Result<Written, StoreError> {
        let text = entries.text();
        let known = fs::symlink_metadata(&self.path).ok();
        let is_ours = |known: &fs::Metadata| {
            known.is_file() && known.uid() == nix::unistd::geteuid().as_raw() && known.mode() & 0o777 == 0o600
        };
        let same = known.filter(|known| {
            is_ours(known) && fs::read(&self.path).is_ok_and(|found| found == text.as_bytes())
        });
        let file = match same {
            Some(known) => identity(&known),
            None => self
                .write(&text)
                .map_err(FileError::of("write the hook's index", &self.path))?,
        };
        Ok(Written {
            entries: entries.clone(),
            file,
        })
    }

    fn write(&self, text: &str) -> io::Result<Identity> {
        // One daemon at a time has this directory, so the name is free.
        let temporary = self.directory.join(Self::NEW);
        let _ = fs::remove_file(&temporary);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, &self.path)?;
        File::open(&self.directory)?.sync_all()?;
        // After the rename, which changes one of the times.
        Ok(identity(&file.metadata()?))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Written>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn identity(file: &fs::Metadata) -> Identity {
    (
        file.dev(),
        file.ino(),
        file.size(),
        (file.ctime(), file.ctime_nsec()),
    )
}

impl Entries {
    fn read(connection: &Connection) -> Result<Self, StoreFault> {
        // A row that makes no sense is a matter of who reads it, and must not keep the others out. Its envelope may still tell.
        let id = |row: &Row, column| rows::text(row, column)?.parse::<Uuid>().ok();
        let named = |row: &Row| {
            let ids = id(row, "id").zip(id(row, "vm"));
            ids.or_else(|| {
                let held = Envelope::from_json(&rows::text(row, "json")?).ok()?;
                Some((held.id.0, held.vm.0))
            })
        };
        let select = "SELECT id, vm, json FROM envelopes";
        let envelopes = rows::collect(connection, select, [], Named("envelope", "id"), |row| {
            Ok(named(row))
        })?;
        let sealed = "SELECT uuid FROM vms WHERE uuid NOT IN (SELECT uuid FROM plain_vms)";
        let vms = rows::collect(connection, sealed, [], Named("VM", "uuid"), |row| {
            Ok(id(row, "uuid"))
        })?;
        Ok(Self {
            envelopes: envelopes.sound.into_iter().flatten().collect(),
            vms: vms.sound.into_iter().flatten().collect(),
        })
    }

    /// Whether all of `others` is in these.
    fn cover(&self, others: &Self) -> bool {
        let mut envelopes = others.envelopes.iter();
        envelopes.all(|(envelope, vm)| self.envelopes.get(envelope) == Some(vm))
            && others.vms.is_subset(&self.vms)
    }

    fn text(&self) -> String {
        let mut text = format!(
            "virtseal hook index 1\n{:010} envelopes {:010} VMs\n",
            self.envelopes.len(),
            self.vms.len()
        );
        let mut line =
            |words: fmt::Arguments<'_>| writeln!(text, "{words}").expect("a string takes everything");
        for (envelope, vm) in &self.envelopes {
            line(format_args!("{} {}", envelope.simple(), vm.simple()));
        }
        for vm in &self.vms {
            line(format_args!("{}", vm.simple()));
        }
        let sum = checksum(text.as_bytes());
        writeln!(text, "{sum:016x}").expect("a string takes everything");
        text
    }
}

/// Shows the hook a file that was cut, overwritten in part or mixed up.
fn checksum(bytes: &[u8]) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let words = bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    });
    words.fold(bytes.len() as u64, |sum, word| {
        (sum ^ word).wrapping_mul(ODD).rotate_left(29)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::envelope::VmId;
    use crate::model::envelope::fixture::envelope;
    use crate::store::Stores;

    /// What the file names: envelopes, VMs.
    fn named(dir: &Path) -> (Vec<String>, Vec<String>) {
        let text = fs::read_to_string(dir.join(HookIndex::FILE)).unwrap();
        let lines = || text.lines().skip(2).filter(|line| line.len() >= 32);
        let envelopes = lines().filter_map(|line| Some(line.split_once(' ')?.0.to_owned()));
        let vms = lines().filter(|line| !line.contains(' ')).map(str::to_owned);
        (envelopes.collect(), vms.collect())
    }

    fn hex(id: impl ToString) -> String {
        id.to_string().replace('-', "")
    }

    /// The hook's tests have the same text.
    #[test]
    fn it_is_what_the_hook_reads() {
        let id = |text: &str| text.parse::<Uuid>().unwrap();
        let web = id("aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee");
        let entries = Entries {
            envelopes: BTreeMap::from([
                (id("6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b7"), web),
                (id("11111111-2222-3333-4444-555555555555"), web),
            ]),
            vms: BTreeSet::from([web]),
        };
        let golden = "virtseal hook index 1\n\
            0000000002 envelopes 0000000001 VMs\n\
            11111111222233334444555555555555 aaaaaaaabbbbccccddddeeeeeeeeeeee\n\
            6b2f9b3e58c34fd59aa10d1f44a3e9b7 aaaaaaaabbbbccccddddeeeeeeeeeeee\n\
            aaaaaaaabbbbccccddddeeeeeeeeeeee\n\
            84155179ffaffd66\n";
        assert_eq!(entries.text(), golden);
    }

    #[test]
    fn it_follows_every_change() {
        let dir = tempfile::tempdir().unwrap();
        let stores = Stores::open(dir.path()).unwrap();
        assert_eq!(named(dir.path()), (vec![], vec![]));
        let vm = VmId::random();
        let (pending, adopted) = (envelope(vm), envelope(vm));
        stores
            .keystore
            .insert_pending(&pending, "/images/web01.qcow2")
            .unwrap();
        assert_eq!(named(dir.path()), (vec![hex(pending.id)], vec![]));
        stores.keystore.put(&adopted, "").unwrap();
        stores.keystore.remember_vm(vm, "web01").unwrap();
        let both = BTreeSet::from([hex(pending.id), hex(adopted.id)]);
        let (envelopes, vms) = named(dir.path());
        assert_eq!((BTreeSet::from_iter(envelopes), vms), (both, vec![hex(vm)]));
        stores.keystore.note_plain(vm).unwrap();
        assert_eq!(named(dir.path()).1, Vec::<String>::new());
        stores.keystore.remember_vm(vm, "web01").unwrap();
        assert_eq!(named(dir.path()).1, vec![hex(vm)]);
        stores.keystore.withdraw(pending.id).unwrap();
        assert_eq!(named(dir.path()).0, vec![hex(adopted.id)]);
        stores.keystore.shred_vm(vm).unwrap();
        assert_eq!(named(dir.path()), (vec![], vec![]));
    }

    #[test]
    fn what_the_index_does_not_name_is_not_committed() {
        let dir = tempfile::tempdir().unwrap();
        let stores = Stores::open(dir.path()).unwrap();
        let (vm, other) = (VmId::random(), VmId::random());
        stores.keystore.put(&envelope(vm), "").unwrap();
        // Nothing can be written beside it now.
        let blocked = dir.path().join(".hook.index.new");
        fs::create_dir(&blocked).unwrap();
        let new = envelope(other);
        let error = stores.keystore.insert_pending(&new, "").unwrap_err();
        assert!(error.to_string().contains("write the hook's index"), "{error}");
        assert!(stores.keystore.remember_vm(other, "web02").is_err());
        assert!(
            stores.keystore.envelope(new.id).unwrap().is_none()
                && stores.keystore.vms().unwrap().whole().unwrap().is_empty()
        );
        // What is gone from the stores may stay in the index for a while.
        assert_eq!(stores.keystore.shred_vm(vm).unwrap().envelopes, 1);
        assert_eq!(named(dir.path()).0.len(), 1);
        // It keeps off all that it should, so starts go on; as long as it is what was written.
        stores.host_store.ensure_hook_index().unwrap();
        assert_eq!(named(dir.path()).0.len(), 1);
        let index = dir.path().join(HookIndex::FILE);
        fs::copy(&index, dir.path().join("kept")).unwrap();
        fs::remove_file(&index).unwrap();
        assert!(stores.host_store.ensure_hook_index().is_err());
        fs::rename(dir.path().join("kept"), &index).unwrap();
        assert!(stores.host_store.ensure_hook_index().is_err());
        fs::remove_dir(&blocked).unwrap();
        stores.host_store.ensure_hook_index().unwrap();
        assert_eq!(named(dir.path()), (vec![], vec![]));
        stores.keystore.insert_pending(&new, "").unwrap();
        assert_eq!(named(dir.path()).0, vec![hex(new.id)]);
    }

    #[test]
    fn whatever_happens_to_the_file_it_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(HookIndex::FILE);
        let vm = VmId::random();
        let known = envelope(vm);
        let stores = Stores::open(dir.path()).unwrap();
        stores.keystore.put(&known, "").unwrap();
        let good = fs::read(&path).unwrap();
        let before = identity(&fs::metadata(&path).unwrap());
        stores.host_store.ensure_hook_index().unwrap();
        assert_eq!(
            identity(&fs::metadata(&path).unwrap()),
            before,
            "it was written for nothing"
        );
        let damages: [fn(&Path); 4] = [
            |path| fs::remove_file(path).unwrap(),
            |path| fs::write(path, b"").unwrap(),
            |path| fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap(),
            |path| {
                fs::remove_file(path).unwrap();
                std::os::unix::fs::symlink("/dev/null", path).unwrap();
            },
        ];
        for damage in damages {
            damage(&path);
            stores.host_store.ensure_hook_index().unwrap();
            let found = fs::symlink_metadata(&path).unwrap();
            assert!(found.is_file() && found.mode() & 0o777 == 0o600);
            assert_eq!(fs::read(&path).unwrap(), good);
        }
        drop(stores);
        fs::remove_file(&path).unwrap();
        // Another program has changed the database, such as a restore.
        let stores = Stores::open(dir.path()).unwrap();
        assert_eq!(fs::read(&path).unwrap(), good);
        drop(stores);
    }
}
