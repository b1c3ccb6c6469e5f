//! UEFI variable stores under LUKS1.
//!
//! The file is a LUKS1 header and the template's bytes encrypted behind it, without qcow2: the form that every
//! libvirt with `engine='qemu'` reads, whatever the domain says of its format.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::disk::convert::Source;
use super::disk::error::{Attempt, Flaw, Part, VolumeError};
use super::disk::luks::sector::SECTOR;
use super::disk::luks::{self, Fresh};
use super::disk::open::Image;
use super::disk::staging::{Staged, Step};
use super::disk::{Bytes, FileId, ImageLock, Prepared};
use crate::host::permitted::PermittedPath;
use crate::secret::Passphrase;

/// Variable stores have 64 KiB to 4 MiB; a "template" past this is some other file.
const LARGEST: u64 = 64 << 20;

/// Makes a variable store at `target` with the content of `template` (raw or qcow2), so that `passphrase` opens it; up to the moment
/// before it gets its name. That may be the one of the plain store `replaced`, whose owner and mode it gets then.
///
/// # Errors
/// [`VolumeError::Exists`] if there is one already, and [`VolumeError::SameFile`] when the store is its own template; nothing was
/// created or replaced.
pub(crate) fn create(
    template: &PermittedPath,
    target: &PermittedPath,
    replaced: Option<ImageLock>,
    passphrase: &Passphrase,
) -> Result<Prepared, VolumeError> {
    create_watched(template, target, replaced, passphrase, |_| {})
}

/// [`create`], telling `watch` of every step: for tests that stop there.
pub(crate) fn create_watched(
    template: &PermittedPath,
    target: &PermittedPath,
    replaced: Option<ImageLock>,
    passphrase: &Passphrase,
    watch: impl FnMut(Step),
) -> Result<Prepared, VolumeError> {
    let shown = target.shown();
    if replaced.is_none() && target.exists() {
        return Err(VolumeError::Exists(shown.to_owned()));
    }
    let source = Source::open(template, None)?;
    refuse_same(replaced.as_ref(), source.file_id(), shown)?;
    stage(&variables_in(&source)?, target, replaced, passphrase, watch)
}

/// Makes an encrypted store with the variables of the plain one that is held (raw or qcow2), to take its place.
///
/// # Errors
/// [`VolumeError`]; nothing was replaced.
pub(crate) fn encrypt(held: ImageLock, passphrase: &Passphrase) -> Result<Prepared, VolumeError> {
    let place = held.place().clone();
    let source = Source::open(&place, None)?;
    if source.file_id() != held.id() {
        return Err(VolumeError::Changed(place.shown().to_owned()));
    }
    let variables = variables_in(&source)?;
    stage(&variables, &place, Some(held), passphrase, |_| {})
}

fn stage(
    variables: &[u8],
    target: &PermittedPath,
    replaced: Option<ImageLock>,
    passphrase: &Passphrase,
    mut watch: impl FnMut(Step),
) -> Result<Prepared, VolumeError> {
    let shown = target.shown();
    let fresh = luks::create(passphrase)?;
    let staged = Staged::beside(target)?;
    watch(Step::Staged);
    write(&staged, fresh, variables, shown)?;
    if let Some(held) = &replaced {
        staged.take_after(held)?;
    }
    watch(Step::Written);
    staged.sync()?;
    watch(Step::Synced);
    if decrypted(&Image::from_file(staged.reopen()?, shown, None)?, passphrase)? != variables {
        return Err(VolumeError::damaged(
            shown,
            Flaw::new(Part::Luks1, 0, "it does not read as it was written"),
        ));
    }
    watch(Step::Verified);
    Ok(Prepared::new(staged, replaced))
}

/// Behind the name of a store comes this and a number where it was made anew.
pub(crate) const KEPT: &str = ".before-reset-";

/// Keeps a copy of the store beside it, under the first name that is free; where one of these has the same content, that is it: an
/// earlier try has died after this.
pub(crate) fn keep(held: &ImageLock) -> Result<PathBuf, VolumeError> {
    let content = content_of(held.file(), held.path())?;
    let numbers = kept_numbers(held.place())?;
    for place in numbers.iter().map(|number| kept_name(held.place(), *number)) {
        // Others may write to the directory: what can't be read there is not it.
        let found = place.open(OpenOptions::new().read(true));
        let found = found.ok().and_then(|file| content_of(&file, place.shown()).ok());
        if found.is_some_and(|found| found == content) {
            return Ok(place.shown().to_owned());
        }
    }
    let mut free = (1..).filter(|number| !numbers.contains(number));
    let place = kept_name(held.place(), free.next().expect("numbers do not end"));
    let staged = Staged::beside(&place)?;
    staged
        .file()
        .write_all_at(&content, 0)
        .attempt("write", place.shown())?;
    staged.take_after(held)?;
    staged.sync()?;
    staged.publish(None)?.sync()?;
    Ok(place.shown().to_owned())
}

/// The copies that [`keep`] has made of the store at `place`, by what is there: some may have been moved away.
pub(crate) fn kept_of(place: &PermittedPath) -> Result<Vec<PermittedPath>, VolumeError> {
    let numbers = kept_numbers(place)?.into_iter();
    Ok(numbers.map(|number| kept_name(place, number)).collect())
}

fn kept_numbers(place: &PermittedPath) -> Result<BTreeSet<u32>, VolumeError> {
    let directory = place.shown().parent().unwrap_or(place.shown());
    let stem = place.with_suffix(KEPT).handle();
    let stem = stem.file_name().unwrap_or_default().as_bytes();
    let mut numbers = BTreeSet::new();
    for entry in fs::read_dir(place.directory_handle()).attempt("read", directory)? {
        let name = entry.attempt("read", directory)?.file_name();
        let number = name.as_bytes().strip_prefix(stem).map(String::from_utf8_lossy);
        numbers.extend(number.and_then(|number| {
            let parsed: u32 = number.parse().ok()?;
            (parsed.to_string() == number).then_some(parsed)
        }));
    }
    Ok(numbers)
}

fn kept_name(place: &PermittedPath, number: u32) -> PermittedPath {
    place.with_suffix(&format!("{KEPT}{number}"))
}

fn content_of(file: &File, shown: &Path) -> Result<Vec<u8>, VolumeError> {
    let len = file.metadata().attempt("look at", shown)?.len();
    if len > LARGEST {
        let what = format!("it has {}, more than any UEFI variable store", Bytes(len));
        return Err(VolumeError::unsupported(shown, what, "put it elsewhere"));
    }
    let mut content = vec![0; len as usize];
    file.read_exact_at(&mut content, 0).attempt("read", shown)?;
    Ok(content)
}

/// A plain variable store with the variables of the encrypted one that is held, up to the moment before that goes.
///
/// # Errors
/// [`VolumeError`]; nothing was replaced.
pub(crate) fn decrypt(held: ImageLock, passphrase: &Passphrase) -> Result<Prepared, VolumeError> {
    let variables = decrypted(&held.image()?, passphrase)?;
    let staged = Staged::beside(held.place())?;
    staged
        .file()
        .write_all_at(&variables, 0)
        .attempt("write", held.path())?;
    staged.take_after(&held)?;
    staged.sync()?;
    if content_of(&staged.reopen()?, held.path())? != variables {
        let differs = io::Error::other("it does not read as it was written");
        return Err(differs).attempt("write", held.path());
    }
    Ok(Prepared::new(staged, Some(held)))
}

/// The UEFI variables in an encrypted store.
fn decrypted(store: &Image, passphrase: &Passphrase) -> Result<Vec<u8>, VolumeError> {
    let key = store.unlock(passphrase)?;
    let (header, base) = store.encrypted()?;
    let size = store.virtual_size().0;
    if size > LARGEST || !size.is_multiple_of(SECTOR as u64) {
        return Err(no_store(store.path(), size));
    }
    let encrypted = store.read(base + header.payload_offset(), size as usize)?;
    let mut variables = vec![0; encrypted.len()];
    key.decryptor()?.apply(0, &encrypted, &mut variables)?;
    Ok(variables)
}

fn refuse_same(replaced: Option<&ImageLock>, source: FileId, shown: &Path) -> Result<(), VolumeError> {
    match replaced.is_some_and(|held| held.id().inode() == source.inode()) {
        true => Err(VolumeError::SameFile(shown.to_owned())),
        false => Ok(()),
    }
}

/// The UEFI variables in a plain store or a template, raw or qcow2.
///
/// # Errors
/// When it can't be read, or has a size or a form that no store has.
pub(crate) fn read_variables(place: &PermittedPath) -> Result<Vec<u8>, VolumeError> {
    variables_in(&Source::open(place, None)?)
}

fn variables_in(source: &Source) -> Result<Vec<u8>, VolumeError> {
    let variables = source.read_all(LARGEST)?;
    match variables.len() {
        len if len > 0 && len.is_multiple_of(SECTOR) => Ok(variables),
        len => Err(no_store(source.path(), len as u64)),
    }
}

fn no_store(path: &Path, size: u64) -> VolumeError {
    VolumeError::unsupported(
        path,
        format!(
            "it has {size} bytes, which no store has: some whole sectors, up to {}",
            Bytes(LARGEST)
        ),
        "give the template that belongs to the firmware, such as OVMF_VARS_4M.fd",
    )
}

fn write(staged: &Staged, fresh: Fresh, variables: &[u8], target: &Path) -> Result<(), VolumeError> {
    let mut encrypted = vec![0; variables.len()];
    fresh.key.encryptor()?.apply(0, variables, &mut encrypted)?;
    let payload = (fresh.payload_offset, encrypted);
    for (offset, bytes) in fresh.regions.into_iter().chain([payload]) {
        staged
            .file()
            .write_all_at(&bytes, offset)
            .attempt("write", target)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_found_by_what_is_there_and_a_name_without_room_for_one_ends_the_search() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let place = |name: &str| PermittedPath::named_by_root(&path(name)).unwrap();
        let keep_now = |name: &str, byte: u8| {
            fs::write(path(name), [byte; 1024]).unwrap();
            keep(&ImageLock::open(&place(name)).unwrap())
        };
        let kept = |number: &str| path(&format!("a_VARS.fd{KEPT}{number}"));
        let found = || -> Vec<_> {
            let found = kept_of(&place("a_VARS.fd")).unwrap();
            found.iter().map(|place| place.shown().to_owned()).collect()
        };
        assert!(found().is_empty());
        // Somebody else has put that there.
        fs::create_dir(kept("1")).unwrap();
        for name in ["02", "x", ""] {
            fs::write(kept(name), "").unwrap();
        }
        assert_eq!(keep_now("a_VARS.fd", 1).unwrap(), kept("2"));
        assert_eq!(keep_now("a_VARS.fd", 2).unwrap(), kept("3"));
        assert_eq!(keep_now("a_VARS.fd", 1).unwrap(), kept("2"), "it is kept already");
        // Whoever wants one back moves it: the later ones are still there.
        fs::remove_dir(kept("1")).unwrap();
        fs::rename(kept("2"), path("a_VARS.fd")).unwrap();
        assert_eq!(found(), [kept("3")]);

        let long = "v".repeat(250);
        assert!(keep_now(&long, 1).is_err());
        assert!(kept_of(&place(&long)).unwrap().is_empty());
    }
}
