//! Bringing a backup back. Everything is unpacked, checked and on stable storage beside the state directory before that is
//! touched; then both change places in one step, and the old one is kept.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufReader};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::time::SystemTime;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags, renameat2};
use tar::EntryType;

use super::{MANIFEST, Manifest, StateError, archive, host_name, read_manifest};
use crate::audit::{Actor, AuditLog, Event, Outcome, Position};
use crate::crypto::age_file;
use crate::host::boot::BootId;
use crate::host::file_error::FileError;
use crate::host::local_time::rfc3339;
use crate::model::deadlines::store::RESTORED_NOTE;
use crate::secret::SecretBytes;
use crate::store::{AuditAnchor, HostStore, StoreError, Stores};

/// Whether what is there may be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Replace<'a> {
    /// There must be nothing.
    Nothing,
    /// Whoever typed this name, of the host that this is, wants that.
    TypedName(&'a str),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Restored {
    /// Where the backup is from.
    pub manifest: Manifest,
    pub files: usize,
    /// Where what was there before is now.
    pub before: Option<PathBuf>,
}

/// Restores `backup` as the state directory `dir`. No daemon may use that.
///
/// # Errors
/// [`StateError`]; the directory is as it was then.
pub(crate) fn restore(
    backup: File,
    passphrase: &SecretBytes,
    dir: &Path,
    replace: Replace<'_>,
) -> Result<Restored, StateError> {
    let place = Place::look(dir)?;
    place.refuse_unless(replace)?;
    // Held until both have changed places.
    let _lock = place.lock()?;
    let plain = age_file::reader(BufReader::new(backup), passphrase).map_err(StateError::Age)?;
    let staged = place.staging()?;
    // By whatever name: the state of before may be where this was.
    let made = inode_of(&staged);
    let restored = unpack(plain, &staged).and_then(|(manifest, files)| {
        check(&staged, &manifest)?;
        sync_tree(&staged)?;
        Ok((manifest, files))
    });
    let placed = restored.and_then(|(manifest, files)| {
        let before = place.take(&staged)?;
        Ok(Restored {
            manifest,
            files,
            before,
        })
    });
    if placed.is_err() && inode_of(&staged).is_some_and(|found| Some(found) == made) {
        let _ = fs::remove_dir_all(&staged);
    }
    placed
}

/// What is where the state is to be.
enum Place<'a> {
    Absent(&'a Path),
    Directory(&'a Path),
    /// With nothing in it: it can't be replaced, only filled.
    EmptyMount(&'a Path),
    Occupied(&'a Path),
}

impl<'a> Place<'a> {
    fn look(dir: &'a Path) -> Result<Self, StateError> {
        let found = match fs::symlink_metadata(dir) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::Absent(dir)),
            Err(error) => return Err(FileError::of("look at", dir)(error).into()),
        };
        if !found.is_dir() {
            return Err(FileError::of("restore to", dir)(io::ErrorKind::NotADirectory.into()).into());
        }
        let parent = parent_of(dir);
        let of_parent = fs::metadata(parent).map_err(FileError::of("look at", parent))?;
        let is_mount = of_parent.dev() != found.dev();
        let mut is_empty = true;
        for entry in fs::read_dir(dir).map_err(FileError::of("read", dir))? {
            let name = entry.map_err(FileError::of("read", dir))?.file_name();
            // A lock that nobody may hold, and what mkfs makes.
            is_empty &= name == HostStore::LOCK || name == "lost+found";
        }
        match (is_empty, is_mount) {
            (true, false) => Ok(Self::Directory(dir)),
            (true, true) => Ok(Self::EmptyMount(dir)),
            (false, false) => Ok(Self::Occupied(dir)),
            (false, true) => Err(StateError::MountPoint(dir.to_owned())),
        }
    }

    fn dir(&self) -> &'a Path {
        match self {
            Self::Absent(dir) | Self::Directory(dir) | Self::EmptyMount(dir) | Self::Occupied(dir) => dir,
        }
    }

    fn refuse_unless(&self, replace: Replace<'_>) -> Result<(), StateError> {
        let host = host_name();
        match (self, replace) {
            (Self::Occupied(_), Replace::TypedName(typed)) if typed == host => Ok(()),
            (Self::Occupied(dir), _) => Err(StateError::Occupied {
                dir: (*dir).to_owned(),
                host,
            }),
            _ => Ok(()),
        }
    }

    /// What a daemon holds as long as it lives.
    fn lock(&self) -> Result<Option<Flock<File>>, StateError> {
        let path = self.dir().join(HostStore::LOCK);
        let mut file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(FileError::of("open", &path)(error).into()),
        };
        let holder = StoreError::pid_in(&mut file);
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(lock)),
            Err((_, Errno::EWOULDBLOCK)) => Err(StoreError::InUse {
                dir: self.dir().to_owned(),
                holder,
            }
            .into()),
            Err((_, errno)) => Err(FileError::of("lock", &path)(errno.into()).into()),
        }
    }

    /// A new directory on the same file system.
    fn staging(&self) -> Result<PathBuf, StateError> {
        let within = match self {
            Self::EmptyMount(dir) => dir,
            _ => parent_of(self.dir()),
        };
        let name = self.dir().file_name().unwrap_or_default().to_string_lossy();
        let staged = within.join(format!(".{name}.restoring-{}", std::process::id()));
        DirBuilder::new()
            .mode(0o700)
            .create(&staged)
            .map_err(FileError::of("make", &staged))?;
        Ok(staged)
    }

    /// Says where what was there is now.
    fn take(&self, staged: &Path) -> Result<Option<PathBuf>, StateError> {
        let (dir, parent) = (self.dir(), parent_of(self.dir()));
        let failed = |error| FileError::of("put the restored state into", dir)(error).into();
        match self {
            // Over an empty directory, too.
            Self::Absent(_) | Self::Directory(_) => {
                let _ = fs::remove_file(dir.join(HostStore::LOCK));
                let placed = fs::rename(staged, dir).and_then(|()| File::open(parent)?.sync_all());
                placed.map(|()| None).map_err(failed)
            }
            Self::EmptyMount(_) => fill(dir, staged).map(|()| None).map_err(failed),
            Self::Occupied(_) => exchange(dir, staged).map(Some).map_err(failed),
        }
    }
}

fn inode_of(path: &Path) -> Option<u64> {
    path.symlink_metadata().ok().map(|found| found.ino())
}

/// Both change places in one step: whatever dies here, there is one whole state at `dir`.
fn exchange(dir: &Path, staged: &Path) -> io::Result<PathBuf> {
    let date = rfc3339(SystemTime::now()).replace(':', "-");
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(format!(".before-{date}"));
    let before = parent_of(dir).join(name);
    if before.symlink_metadata().is_ok() {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            format!("{} exists", before.display()),
        ));
    }
    let sync = || File::open(parent_of(dir))?.sync_all();
    exchanged(dir, staged, || {
        sync()?;
        fs::rename(staged, &before)?;
        sync().inspect_err(|_| drop(fs::rename(&before, staged)))
    })?;
    Ok(before)
}

/// Undone where `keep`, which is to give the state of before its name, fails.
fn exchanged(dir: &Path, staged: &Path, keep: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let exchange = || renameat2(AT_FDCWD, dir, AT_FDCWD, staged, RenameFlags::RENAME_EXCHANGE);
    exchange()?;
    keep().inspect_err(|_| {
        let _ = exchange();
    })
}

/// The keystore comes last: without one a daemon that starts meanwhile finds nothing to believe.
fn fill(dir: &Path, staged: &Path) -> io::Result<()> {
    let mut names = Vec::new();
    for entry in fs::read_dir(staged)? {
        names.push(entry?.file_name());
    }
    names.sort_by_key(|name| name == HostStore::FILE);
    for name in names {
        fs::rename(staged.join(&name), dir.join(&name))?;
    }
    fs::remove_dir(staged)?;
    File::open(dir)?.sync_all()
}

fn unpack(plain: impl io::Read, staged: &Path) -> Result<(Manifest, usize), StateError> {
    let mut archive = archive(plain);
    let (mut manifest, mut files) = (None, 0);
    for entry in archive.entries().map_err(StateError::Damaged)? {
        let mut entry = entry.map_err(StateError::Damaged)?;
        if manifest.is_none() {
            manifest = Some(read_manifest(&mut entry)?);
            continue;
        }
        let name = entry.path().map_err(StateError::Damaged)?.into_owned();
        let strange = || StateError::NotABackup(format!("it has a file {:?}", name.display().to_string()));
        let is_inside = name.components().all(|part| matches!(part, Component::Normal(_)));
        if !is_inside || name.as_os_str().is_empty() || name == Path::new(MANIFEST) {
            return Err(strange());
        }
        let path = staged.join(&name);
        match entry.header().entry_type() {
            EntryType::Directory => DirBuilder::new()
                .mode(0o700)
                .create(&path)
                .map_err(FileError::of("make", &path))?,
            EntryType::Regular => {
                let mut file = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&path)
                    .map_err(FileError::of("make", &path))?;
                io::copy(&mut entry, &mut file).map_err(FileError::of("write", &path))?;
                file.sync_all().map_err(FileError::of("write", &path))?;
                files += 1;
            }
            _ => return Err(strange()),
        }
    }
    // age has authenticated all of it only when its end was read.
    let mut plain = archive.into_inner();
    io::copy(&mut plain, &mut io::sink()).map_err(StateError::Damaged)?;
    let manifest = manifest.ok_or_else(|| StateError::NotABackup("it is empty".to_owned()))?;
    Ok((manifest, files))
}

/// Opens the keystore, which checks it whole, and notes in its audit log what it comes from.
fn check(staged: &Path, manifest: &Manifest) -> Result<(), StateError> {
    if !staged.join(HostStore::FILE).is_file() {
        return Err(StateError::NotABackup("it has no keystore".to_owned()));
    }
    let Stores { host_store, .. } = Stores::open(staged)?;
    let noted = match host_store.audit_anchor() {
        Err(error) if error.is_of_row() => None,
        noted => noted?,
    };
    let noted = noted.map(|anchor| Position {
        seq: anchor.seq,
        hash: anchor.hash,
    });
    let log = AuditLog::open_anchored(&staged.join(AuditLog::FILE), noted, |_| true);
    let log = log.map_err(|error| StateError::NotABackup(error.to_string()))?;
    let detail = format!("from a backup of {}, made {}", manifest.host, manifest.made);
    let event = Event::new("state-restore", Outcome::Ok)
        .by(Actor::User(nix::unistd::getuid().as_raw()))
        .detail(&detail);
    log.record(event)
        .and_then(|()| log.flush(RESTORED_NOTE))
        .map_err(|error| StateError::NotABackup(error.to_string()))?;
    if let Some(at) = log.position() {
        host_store.set_audit_anchor(AuditAnchor {
            seq: at.seq,
            hash: at.hash,
        })?;
    }
    start_nothing(&host_store)
}

/// What a host restores its state for may run elsewhere: its VMs start with it from the next boot on.
fn start_nothing(host_store: &HostStore) -> Result<(), StateError> {
    if let Ok(boot) = BootId::of_host() {
        for kept in host_store.autostarts()?.sound {
            host_store.settle_autostart(kept.vm, boot)?;
        }
    }
    Ok(())
}

fn sync_tree(dir: &Path) -> Result<(), StateError> {
    for entry in fs::read_dir(dir).map_err(FileError::of("read", dir))? {
        let path = entry.map_err(FileError::of("read", dir))?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path)
                .and_then(|file| file.sync_all())
                .map_err(FileError::of("write", &path))?;
        }
    }
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    Ok(synced.map_err(FileError::of("sync", dir))?)
}

fn parent_of(dir: &Path) -> &Path {
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("/"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_of_before_is_where_it_was_if_it_can_t_be_kept_aside() {
        let parent = tempfile::tempdir().unwrap();
        let [dir, staged] = ["state", "staged"].map(|name| parent.path().join(name));
        for path in [&dir, &staged] {
            fs::create_dir(path).unwrap();
            fs::write(path.join("keystore.db"), path.display().to_string()).unwrap();
        }
        let is_at = |of: &Path, at: &Path| {
            fs::read_to_string(at.join("keystore.db")).is_ok_and(|text| text == of.display().to_string())
        };
        let full = || Err(io::ErrorKind::StorageFull.into());
        assert!(exchanged(&dir, &staged, full).is_err());
        assert!(is_at(&dir, &dir) && is_at(&staged, &staged));
        // Not even then is it taken for what was made here, and removed.
        let made = inode_of(&staged);
        let stuck = || {
            fs::rename(&dir, parent.path().join("elsewhere"))?;
            full()
        };
        assert!(exchanged(&dir, &staged, stuck).is_err());
        assert!(is_at(&dir, &staged) && inode_of(&staged) != made);
    }
}
