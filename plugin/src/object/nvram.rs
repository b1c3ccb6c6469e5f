//! UEFI variable stores under LUKS1.
//!
//! The file is a LUKS1 header and the template's bytes encrypted behind it, without qcow2: the form that every
//! libvirt with `engine='qemu'` reads, whatever the domain says of its format.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::disk::convert::Source;
use super::disk::error::{Attempt, VolumeError};
use super::disk::luks::sector::SECTOR;
use super::disk::luks::{self, Fresh};
use super::disk::open::Image;
use super::disk::staging::{Staged, Step};
use super::disk::{FileId, ImageLock, Prepared};
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
pub fn prepare(
    template: &PermittedPath,
    target: &PermittedPath,
    replaced: Option<ImageLock>,
    passphrase: &Passphrase,
) -> Result<Prepared, VolumeError> {
    prepare_watched(template, target, replaced, passphrase, |_| {})
}

/// [`prepare`], telling `watch` of every step: for tests that stop there.
///
/// # Errors
/// Those of [`prepare`].
pub fn prepare_watched(
    template: &PermittedPath,
    target: &PermittedPath,
    replaced: Option<ImageLock>,
    passphrase: &Passphrase,
    mut watch: impl FnMut(Step),
) -> Result<Prepared, VolumeError> {
    let shown = target.shown();
    if replaced.is_none() && target.exists() {
        return Err(VolumeError::Exists(shown.to_owned()));
    }
    let source = Source::open(template, None)?;
    refuse_same(replaced.as_ref(), source.file_id(), shown)?;
    let variables = variables_in(&source)?;
    let fresh = luks::create(passphrase)?;
    let staged = Staged::beside(target)?;
    watch(Step::Staged);
    write(&staged, fresh, &variables, shown)?;
    if let Some(held) = &replaced {
        staged.take_after(held)?;
    }
    watch(Step::Written);
    staged.sync()?;
    watch(Step::Synced);
    Image::from_file(staged.reopen()?, shown, None)?.unlock(passphrase)?;
    watch(Step::Verified);
    Ok(Prepared::new(staged, replaced))
}

/// A plain variable store with the content of `source` for the place of `replaced`, up to the moment before that goes.
///
/// # Errors
/// [`VolumeError`]; nothing was replaced.
pub fn prepare_plain(replaced: ImageLock, source: &PermittedPath) -> Result<Prepared, VolumeError> {
    let shown = source.shown();
    let source = Source::open(source, None)?;
    refuse_same(Some(&replaced), source.file_id(), shown)?;
    let variables = variables_in(&source)?;
    Prepared::over(replaced, |staged, _| {
        staged.file().write_all_at(&variables, 0).attempt("copy", shown)
    })
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
pub fn read_variables(place: &PermittedPath) -> Result<Vec<u8>, VolumeError> {
    variables_in(&Source::open(place, None)?)
}

fn variables_in(source: &Source) -> Result<Vec<u8>, VolumeError> {
    let variables = source.read_all(LARGEST)?;
    if variables.is_empty() || !variables.len().is_multiple_of(SECTOR) {
        return Err(VolumeError::unsupported(
            source.path(),
            format!("it has {} bytes, which are no whole sectors", variables.len()),
            "give the template that belongs to the firmware, such as OVMF_VARS_4M.fd",
        ));
    }
    Ok(variables)
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
