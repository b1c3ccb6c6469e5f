//! What this host has dropped on request, kept as files in `forgotten/` of the state directory: the net under a drop that was
//! a mistake.
//!
//! One file a drop, `DATE.json` for the records of a VM and `DATE-NAME.age` for the root keys of a native provider, which its
//! passphrase opens and `virtseal provider restore` takes. Nothing here is a secret by itself: keys in it are wrapped. A file
//! is whole and on stable storage before [`keep`] returns, and only then may what it holds be dropped. Nothing here ever
//! deletes one.

mod document;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use thiserror::Error;

use crate::host::file_error::FileError;
use crate::host::local_time::rfc3339;
use crate::model::envelope::{Envelope, EnvelopeId};
use document::DocumentError;

pub(crate) use document::{Forgotten, Said};

/// The directory's name in the state directory.
pub(crate) const DIRECTORY: &str = "forgotten";
/// The most bytes of a file that is read.
pub(crate) const MAX_BYTES: u64 = 16 << 20;

#[derive(Debug, Error)]
pub(crate) enum ForgottenError {
    /// A file or a directory can't be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// It does not read back as it was written.
    #[error("{} does not read back as it was written", .0.display())]
    NotVerified(PathBuf),
    #[error(transparent)]
    Document(#[from] DocumentError),
}

/// Writes the records of a VM to a new file in `state_dir` and reads them back from it. It is on stable storage then.
///
/// # Errors
/// When it is not: then nothing may be dropped.
pub(crate) fn keep(state_dir: &Path, forgotten: &Forgotten) -> Result<PathBuf, ForgottenError> {
    let path = keep_bytes(state_dir, ".json", forgotten.to_json().as_bytes())?;
    match read(&path) {
        Ok(found) if found == *forgotten => Ok(path),
        Ok(_) => Err(ForgottenError::NotVerified(path)),
        Err(error) => Err(error),
    }
}

/// The same for bytes; the file's name is the date and `suffix`.
pub(crate) fn keep_bytes(state_dir: &Path, suffix: &str, bytes: &[u8]) -> Result<PathBuf, ForgottenError> {
    let dir = state_dir.join(DIRECTORY);
    make_directory(state_dir, &dir).map_err(FileError::of("make", &dir))?;
    let date = rfc3339(SystemTime::now()).replace(':', "-");
    let staged = dir.join(format!(".{date}{suffix}.{}.new", std::process::id()));
    // Of this process and this second: nobody writes it now.
    let _ = fs::remove_file(&staged);
    let written = write_and_read_back(&staged, bytes);
    let written = written.map_err(|error| FileError::of("write", &staged)(error).into());
    let kept = written.and_then(|is_whole| match is_whole {
        true => give_name(&staged, &dir, &date, suffix)
            .map_err(|error| FileError::of("write into", &dir)(error).into()),
        false => Err(ForgottenError::NotVerified(staged.clone())),
    });
    // The bytes have another name now, or are not wanted.
    let _ = fs::remove_file(&staged);
    let path = kept?;
    File::open(&dir)
        .and_then(|dir| dir.sync_all())
        .map_err(FileError::of("sync", &dir))?;
    Ok(path)
}

/// What [`keep`] wrote.
pub(crate) fn read(path: &Path) -> Result<Forgotten, ForgottenError> {
    let mut text = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_BYTES).read_to_end(&mut text))
        .map_err(FileError::of("read", path))?;
    Ok(Forgotten::from_json(&text)?)
}

/// A file with records of a VM, and what it holds.
pub(crate) type Kept = (PathBuf, Result<Forgotten, ForgottenError>);

/// The files with records of VMs, the oldest first, each with what it holds.
pub(crate) fn kept(state_dir: &Path) -> Result<Vec<Kept>, ForgottenError> {
    let dir = state_dir.join(DIRECTORY);
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(FileError::of("read", &dir)(error).into()),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(FileError::of("read", &dir))?.path();
        let is_hidden = path
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !is_hidden && path.extension().is_some_and(|extension| extension == "json") {
            paths.push(path);
        }
    }
    paths.sort();
    let read = |path: PathBuf| {
        let found = read(&path);
        (path, found)
    };
    Ok(paths.into_iter().map(read).collect())
}

/// The newest of the files that have such an envelope.
pub(crate) fn file_with(
    state_dir: &Path,
    is_it: impl Fn(&Envelope) -> bool,
) -> Result<Option<PathBuf>, ForgottenError> {
    let has_it = |found: &Forgotten| found.objects.iter().any(|record| is_it(&record.envelope));
    let mut kept = kept(state_dir)?.into_iter().rev();
    let newest = kept.find(|(_, found)| found.as_ref().is_ok_and(has_it));
    Ok(newest.map(|(path, _)| path))
}

/// The envelopes in `kept` that nothing else has: not those that are known again. With any of them go those of its saved state.
pub(crate) fn only_there(forgotten: &Forgotten, is_known: impl Fn(EnvelopeId) -> bool) -> Vec<&Envelope> {
    let envelopes = forgotten.objects.iter().map(|record| &record.envelope);
    let mut alone: Vec<_> = envelopes.filter(|envelope| !is_known(envelope.id)).collect();
    if !alone.is_empty() {
        alone.extend(forgotten.saved.iter().flat_map(|saved| &saved.envelopes));
    }
    alone
}

fn make_directory(state_dir: &Path, dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    // Also one that an earlier call has made and died.
    File::open(state_dir)?.sync_all()
}

/// Says whether the file holds `bytes`.
fn write_and_read_back(path: &Path, bytes: &[u8]) -> io::Result<bool> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    Ok(fs::read(path)? == bytes)
}

/// A name that nobody has.
fn give_name(staged: &Path, dir: &Path, date: &str, suffix: &str) -> io::Result<PathBuf> {
    for nth in 1.. {
        let name = match nth {
            1 => format!("{date}{suffix}"),
            nth => format!("{date}-{nth}{suffix}"),
        };
        let path = dir.join(name);
        match fs::hard_link(staged, &path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    unreachable!("the loop ends with a free name")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::model::envelope::{KekId, ProviderId, VmId};
    use crate::recipients::Recipients;
    use crate::store::{Change, Mark, RetiredKek, Stores};

    /// A keystore with a VM that has two envelopes, and what would be forgotten of it.
    fn stage(dir: &Path) -> (Stores, Forgotten) {
        let stores = Stores::open(dir).unwrap();
        let recipients = Recipients::open(&stores, std::time::Duration::from_secs(60)).unwrap();
        let passphrase = crate::secret::SecretBytes::take(&mut b"pass".to_vec()).unwrap();
        let native = recipients
            .add_by(|table| {
                crate::provider::native::NativeProvider::create(table, &"main".parse().unwrap(), &passphrase)
            })
            .unwrap();
        native.confirm_backup(1).unwrap();
        drop((recipients, native));
        let recipients = Recipients::open(&stores, std::time::Duration::from_secs(60)).unwrap();
        recipients.providers()[0].provider().unlock(&passphrase).unwrap();
        let vm = VmId::random();
        for (kind, location) in [
            (crate::model::envelope::ObjectKind::Disk, "/images/a.qcow2"),
            (crate::model::envelope::ObjectKind::Vtpm, ""),
        ] {
            let binding = crate::model::envelope::Binding {
                envelope: EnvelopeId::random(),
                vm,
                kind,
            };
            let (envelope, _) = recipients.seal_new(None, &binding).unwrap();
            stores.keystore.insert_pending(&envelope, location).unwrap();
            if kind == crate::model::envelope::ObjectKind::Disk {
                stores.keystore.activate(envelope.id).unwrap();
            }
        }
        stores.keystore.remember_vm(vm, "my vm").unwrap();
        stores.keystore.set_vtpm_seen(vm).unwrap();
        drop(recipients);
        stores.keystore.note_plain(vm).unwrap();
        let objects = stores.keystore.envelopes_of(vm).unwrap().sound;
        stores
            .host_store
            .note_saved(vm, &[objects[0].envelope.clone()])
            .unwrap();
        let forgotten = Forgotten {
            said: Said::Elsewhere,
            vm: stores.keystore.vm(vm).unwrap().unwrap(),
            mark: stores.keystore.mark(vm).unwrap().unwrap(),
            saved: stores.host_store.saved_states().unwrap().whole().unwrap().pop(),
            objects,
            retired: vec![RetiredKek {
                vm,
                provider: ProviderId::random(),
                kek: KekId("k".to_owned()),
            }],
            damaged: vec![serde_json::json!({ "id": "x", "json": { "hex": "ff" } })],
        };
        (stores, forgotten)
    }

    #[test]
    fn what_is_forgotten_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let (stores, forgotten) = stage(dir.path());
        let vm = forgotten.vm.vm;
        let path = keep(dir.path(), &forgotten).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(
            fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777,
            0o700
        );
        // One that has changed since it was kept stays.
        let known = || stores.keystore.envelopes_of(vm).unwrap();
        let mut other = known();
        other.sound[0].location = "elsewhere".to_owned();
        assert_eq!(stores.keystore.forget_vm(vm, &other).unwrap(), Change::Unchanged);
        assert_eq!(
            stores.keystore.envelopes_of(vm).unwrap().whole().unwrap(),
            forgotten.objects
        );

        assert_eq!(stores.keystore.forget_vm(vm, &known()).unwrap(), Change::Changed);
        assert!(
            stores
                .keystore
                .envelopes_of(vm)
                .unwrap()
                .whole()
                .unwrap()
                .is_empty()
                && stores.keystore.vm(vm).unwrap().is_none()
        );
        let (_, read) = kept(dir.path()).unwrap().pop().unwrap();
        let read = read.unwrap();
        assert_eq!(read, forgotten);
        assert_eq!(only_there(&read, |_| false).len(), 3, "the saved state's, too");
        assert!(only_there(&read, |_| true).is_empty());
        for record in &read.objects {
            stores.keystore.bring_back(record).unwrap();
        }
        let bring_back = |mark| {
            stores
                .keystore
                .bring_back_vm(&read.vm, mark, &read.retired)
                .unwrap();
            let saved = read.saved.as_ref().unwrap();
            stores.host_store.bring_back_saved(saved).unwrap();
        };
        bring_back(read.mark);
        assert_eq!(stores.keystore.vm(vm).unwrap().as_ref(), Some(&forgotten.vm));
        assert_eq!(stores.keystore.mark(vm).unwrap(), Some(Mark::Plain));
        assert_eq!(
            stores.host_store.saved_states().unwrap().whole().unwrap(),
            [forgotten.saved.clone().unwrap()]
        );
        // Who is sealed by now stays so, whatever an old file says; and so does who is plain by now.
        stores.keystore.remember_vm(vm, "my vm").unwrap();
        bring_back(Mark::Plain);
        assert!(stores.keystore.is_sealed(vm).unwrap());
        stores.keystore.note_plain(vm).unwrap();
        bring_back(Mark::Sealed);
        assert!(!stores.keystore.is_sealed(vm).unwrap());
        let back = stores.keystore.envelopes_of(vm).unwrap().whole().unwrap();
        for record in &forgotten.objects {
            let found = back
                .iter()
                .find(|found| found.envelope == record.envelope)
                .unwrap();
            assert_eq!((found.state, &found.location), (record.state, &record.location));
        }
        assert_eq!(
            stores.keystore.retired_keks().unwrap().whole().unwrap(),
            forgotten.retired
        );
        // Again: nothing changes.
        for record in &read.objects {
            stores.keystore.bring_back(record).unwrap();
        }
    }

    #[test]
    fn no_file_takes_the_place_of_another() {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (0..5_u8)
            .map(|nth| keep_bytes(dir.path(), "-main.age", &[nth]).unwrap())
            .collect();
        for (nth, path) in paths.iter().enumerate() {
            assert_eq!(fs::read(path).unwrap(), [nth as u8]);
        }
        let left = fs::read_dir(dir.path().join(DIRECTORY)).unwrap().count();
        assert_eq!(left, paths.len(), "something half-made is left");
    }

    #[test]
    fn what_is_not_such_a_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (_, forgotten) = stage(dir.path());
        let text = forgotten.to_json();
        let other_vm = text.replacen(&forgotten.vm.vm.to_string(), &VmId::random().to_string(), 1);
        for (bad, word) in [
            ("", "not a file"),
            ("{}", "not a file"),
            (r#"{"format": "x", "version": 1}"#, "not a file"),
            (
                &text.replace("\"version\": 1,\n  \"vm\"", "\"version\": 9,\n  \"vm\""),
                "version 9",
            ),
            (&other_vm, "among those of VM"),
            (&text[..text.len() / 2], "not a file"),
        ] {
            let error = Forgotten::from_json(bad.as_bytes()).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
        assert!(kept(&dir.path().join("nowhere")).unwrap().is_empty());
        // As the version before wrote it.
        let old = text.replacen("  \"plain\": true,\n", "", 1);
        let old = old[..old.find(",\n  \"saved\"").unwrap()].to_owned() + "\n}\n";
        let read = Forgotten::from_json(old.as_bytes()).unwrap();
        assert_eq!((read.mark, read.saved), (Mark::Sealed, None));
    }

    #[test]
    fn a_place_that_can_not_be_written_keeps_nothing_back() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(DIRECTORY), "a file").unwrap();
        assert!(keep_bytes(dir.path(), ".json", b"x").is_err());
    }
}
