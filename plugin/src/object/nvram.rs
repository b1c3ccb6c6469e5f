//! UEFI variable stores under LUKS1.
//!
//! The file is a LUKS1 header and the template's bytes encrypted behind it, without qcow2: the form that every
//! libvirt with `engine='qemu'` reads, whatever the domain says of its format.

use std::fs::{File, OpenOptions};
use std::io;
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
    let mut places = kept_names(held.place());
    let place = loop {
        let place = places.next().expect("numbers do not end");
        match place.open(OpenOptions::new().read(true)) {
            Ok(file) if content_of(&file, place.shown())? == content => return Ok(place.shown().to_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => break place,
            Ok(_) | Err(_) => {}
        }
    };
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

/// The copies that [`keep`] has made of the store at `place`, up to the first number that is free.
pub(crate) fn kept_of(place: &PermittedPath) -> impl Iterator<Item = PermittedPath> + use<> {
    kept_names(place).take_while(PermittedPath::exists)
}

fn kept_names(place: &PermittedPath) -> impl Iterator<Item = PermittedPath> + use<> {
    let place = place.clone();
    (1_u32..).map(move |number| place.with_suffix(&format!("{KEPT}{number}")))
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
    Prepared::over(held, |staged, held| {
        staged
            .file()
            .write_all_at(&variables, 0)
            .attempt("write", held.path())
    })
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
