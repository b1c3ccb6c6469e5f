//! A backup of the whole state directory in one file: a tar archive, encrypted by a passphrase as an age file. `age -d FILE |
//! tar t` reads it, too.
//!
//! It is made while the daemon runs: of the keystore as it is at one moment, and of every other file. What of it was not
//! encrypted before is never on a disk. `restore()` needs no daemon, and must have none.

mod restore;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use tar::{Archive, Builder, EntryType, Header};
use thiserror::Error;

use crate::audit::AuditLog;
use crate::crypto::age_file::{self, AgeError};
use crate::host::file_error::FileError;
use crate::host::local_time::rfc3339;
use crate::secret::SecretBytes;
use crate::store::{HostStore, StoreError};

#[cfg(test)]
use restore::Restored;
pub(crate) use restore::{Replace, restore};

/// Says what the archive is; its first entry.
const MANIFEST: &str = "virtseal-state.json";
const FORMAT: &str = "virtseal-state";
const VERSION: u32 = 1;
/// The most bytes of the manifest.
const MAX_MANIFEST: u64 = 64 * 1024;
/// How often a backup begins again because files have come or gone meanwhile.
const TRIES: usize = 5;

/// Where a backup is from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    format: String,
    version: u32,
    /// The host's name.
    pub host: String,
    /// When: RFC 3339, UTC.
    pub made: String,
}

/// Why there is no backup, or nothing was restored.
#[derive(Debug, Error)]
pub(crate) enum StateError {
    /// A file or a directory can't be used.
    #[error(transparent)]
    File(#[from] FileError),
    #[error("can't write the backup")]
    Output(#[source] io::Error),
    #[error("the backup does not open")]
    Age(#[source] AgeError),
    #[error("the backup is damaged")]
    Damaged(#[source] io::Error),
    #[error("it is not a backup of virtseal's state: {0}")]
    NotABackup(String),
    #[error(
        "the backup was made by a later virtseal (format {0}, this one reads {VERSION}): upgrade virtseal"
    )]
    TooNew(u32),
    #[error(transparent)]
    Keystore(#[from] StoreError),
    #[error("files in {} came and went all the time", .0.display())]
    Unsteady(PathBuf),
    /// It does not read back as it was written.
    #[error("what was written does not read back as it was")]
    NotVerified,
    #[error("{} holds the state of {host}: its keys would be replaced", .dir.display())]
    Occupied {
        dir: PathBuf,
        /// The name to be typed.
        host: String,
    },
    #[error("{} is a file system of its own and not empty, so it can't be replaced as a whole", .0.display())]
    MountPoint(PathBuf),
}

/// Which file, and which state of it, is in a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Directory,
    File {
        inode: (u64, u64),
        modified: (i64, i64),
    },
    /// It is only added to.
    Growing {
        inode: (u64, u64),
    },
    /// What it says is in the keystore: any state of it will do, and each seal makes it anew.
    Derived,
}

/// Writes a backup of the directory of `host_store` to `output`, and reads all of it again. Returns how many files it has.
///
/// # Errors
/// [`StateError`]; `output` holds nothing of use then.
pub(crate) fn write(
    output: &mut File,
    host_store: &HostStore,
    passphrase: &SecretBytes,
) -> Result<usize, StateError> {
    for _ in 0..TRIES {
        output
            .set_len(0)
            .and_then(|()| output.rewind())
            .map_err(StateError::Output)?;
        // First: the audit log must have all that the keystore has noted of it.
        let snapshot = host_store.snapshot()?;
        let files = list(host_store.dir(), output)?;
        let written = match write_once(output, host_store.dir(), &snapshot, &files, passphrase) {
            Err(StateError::File(error)) if error.source.kind() == io::ErrorKind::NotFound => continue,
            written => written?,
        };
        if list(host_store.dir(), output)? != files {
            continue;
        }
        output.sync_all().map_err(StateError::Output)?;
        if read_back(output, passphrase)? != written {
            return Err(StateError::NotVerified);
        }
        return Ok(files.len() + 1);
    }
    Err(StateError::Unsteady(host_store.dir().to_owned()))
}

/// SHA-256 of everything that goes through.
struct Digesting<T> {
    inner: T,
    digest: openssl::sha::Sha256,
}

impl<T> Digesting<T> {
    fn new(inner: T) -> Self {
        Self {
            inner,
            digest: openssl::sha::Sha256::new(),
        }
    }
}

impl<T: Write> Write for Digesting<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.digest.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn write_once(
    output: &File,
    dir: &Path,
    snapshot: &[u8],
    files: &BTreeMap<PathBuf, Kind>,
    passphrase: &SecretBytes,
) -> Result<[u8; 32], StateError> {
    let encrypted = age_file::writer(BufWriter::new(output), passphrase).map_err(StateError::Age)?;
    let mut archive = Builder::new(Digesting::new(encrypted));
    let manifest = Manifest {
        format: FORMAT.to_owned(),
        version: VERSION,
        host: host_name(),
        made: rfc3339(SystemTime::now()),
    };
    let manifest = serde_json::to_vec_pretty(&manifest).expect("it holds only texts and numbers");
    append(
        &mut archive,
        Path::new(MANIFEST),
        manifest.len() as u64,
        &manifest[..],
    )?;
    append(
        &mut archive,
        Path::new(HostStore::FILE),
        snapshot.len() as u64,
        snapshot,
    )?;
    for (name, kind) in files {
        let path = dir.join(name);
        if *kind == Kind::Directory {
            let mut header = Header::new_gnu();
            header.set_entry_type(EntryType::Directory);
            header.set_mode(0o700);
            header.set_size(0);
            archive
                .append_data(&mut header, name, io::empty())
                .map_err(StateError::Output)?;
            continue;
        }
        let file = File::open(&path).map_err(FileError::of("read", &path))?;
        let length = file.metadata().map_err(FileError::of("read", &path))?.len();
        append(&mut archive, name, length, file.take(length))?;
    }
    let finish = || -> io::Result<[u8; 32]> {
        let digesting = archive.into_inner()?;
        let mut output = digesting.inner.finish()?;
        output.flush()?;
        Ok(digesting.digest.finish())
    };
    finish().map_err(StateError::Output)
}

fn append<W: Write>(
    archive: &mut Builder<W>,
    name: &Path,
    length: u64,
    content: impl Read,
) -> Result<(), StateError> {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o600);
    header.set_size(length);
    archive
        .append_data(&mut header, name, content)
        .map_err(StateError::Output)
}

/// All of it, as anyone else would read it.
fn read_back(output: &mut File, passphrase: &SecretBytes) -> Result<[u8; 32], StateError> {
    output.rewind().map_err(StateError::Output)?;
    let mut plain = age_file::reader(BufReader::new(&*output), passphrase).map_err(StateError::Age)?;
    let mut digesting = Digesting::new(io::sink());
    io::copy(&mut plain, &mut digesting).map_err(StateError::Damaged)?;
    Ok(digesting.digest.finish())
}

/// What is in the state directory besides the keystore, by its path there. Sockets and links are not of ours; `output` may be
/// in there.
fn list(dir: &Path, output: &File) -> Result<BTreeMap<PathBuf, Kind>, StateError> {
    let of_output = output.metadata().map_err(StateError::Output)?;
    let of_output = (of_output.dev(), of_output.ino());
    let (mut found, mut open) = (BTreeMap::new(), vec![PathBuf::new()]);
    while let Some(below) = open.pop() {
        let at = dir.join(&below);
        for entry in fs::read_dir(&at).map_err(FileError::of("read", &at))? {
            let entry = entry.map_err(FileError::of("read", &at))?;
            let name = below.join(entry.file_name());
            let metadata = match entry.metadata() {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(FileError::of("look at", &entry.path())(error).into()),
            };
            let inode = (metadata.dev(), metadata.ino());
            if metadata.is_dir() {
                open.push(name.clone());
                found.insert(name, Kind::Directory);
            } else if metadata.is_file() && inode != of_output && !is_of_keystore(&name) {
                let kind = match name.to_str() {
                    Some(AuditLog::FILE) => Kind::Growing { inode },
                    Some(HostStore::HOOK_INDEX) => Kind::Derived,
                    _ => Kind::File {
                        inode,
                        modified: (metadata.mtime(), metadata.mtime_nsec()),
                    },
                };
                found.insert(name, kind);
            }
        }
    }
    Ok(found)
}

/// The database is taken as a snapshot; what is beside it is of the process that has it open.
fn is_of_keystore(name: &Path) -> bool {
    let name = name.as_os_str().as_encoded_bytes();
    [HostStore::LOCK, HostStore::NEW_HOOK_INDEX]
        .map(str::as_bytes)
        .contains(&name)
        || name.starts_with(HostStore::FILE.as_bytes())
}

/// The first entry of a backup.
fn read_manifest(entry: &mut tar::Entry<'_, impl Read>) -> Result<Manifest, StateError> {
    let is_it = entry.path().is_ok_and(|path| path == Path::new(MANIFEST));
    if !is_it {
        return Err(StateError::NotABackup(format!(
            "it does not begin with {MANIFEST}"
        )));
    }
    let mut text = Vec::new();
    entry
        .take(MAX_MANIFEST)
        .read_to_end(&mut text)
        .map_err(StateError::Damaged)?;
    let manifest: Manifest =
        serde_json::from_slice(&text).map_err(|error| StateError::NotABackup(error.to_string()))?;
    if manifest.format != FORMAT {
        return Err(StateError::NotABackup(format!(
            "its format is {:?}",
            manifest.format
        )));
    }
    if manifest.version > VERSION {
        return Err(StateError::TooNew(manifest.version));
    }
    Ok(manifest)
}

/// What a backup has, decrypted as it is read.
fn archive<R: Read>(plain: R) -> Archive<R> {
    let mut archive = Archive::new(plain);
    archive.set_preserve_permissions(false);
    archive
}

fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "localhost".to_owned(),
        name => name.to_owned(),
    }
}

#[cfg(test)]
mod tests;
