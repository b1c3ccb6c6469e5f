//! UEFI variable stores under LUKS1.
//!
//! The file is a LUKS1 header and the template's bytes encrypted behind it, without qcow2: the form that every
//! libvirt with `engine='qemu'` reads, whatever the domain says of its format.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::convert::Source;
use super::create::Step;
use super::error::{Attempt, VolumeError};
use super::lock::ImageLock;
use super::luks1::sector::SECTOR;
use super::luks1::{Fresh, Header};
use super::open::Image;
use super::prepared::Prepared;
use super::staging::Staged;
use crate::host::permitted::PermittedPath;
use crate::secret::Passphrase;

/// Variable stores have 64 KiB to 4 MiB; a "template" past this is some other file.
const LARGEST: u64 = 64 << 20;

/// Makes the variable store `target` with the content of `template` (raw or qcow2), so that `passphrase` opens it.
/// Returns its header's digest, as [`header_digest`](super::header_digest) does.
///
/// # Errors
/// [`VolumeError::Exists`] if there is one already; nothing was created after an error, except when only the last
/// fsync of the directory failed.
pub fn create_nvram(
    template: &PermittedPath,
    target: &PermittedPath,
    passphrase: &Passphrase,
) -> Result<[u8; 32], VolumeError> {
    create_nvram_watched(template, target, passphrase, |_| {})
}

/// [`create_nvram`], telling `watch` of every step: for tests that stop there.
///
/// # Errors
/// Those of [`create_nvram`].
pub fn create_nvram_watched(
    template: &PermittedPath,
    target: &PermittedPath,
    passphrase: &Passphrase,
    mut watch: impl FnMut(Step),
) -> Result<[u8; 32], VolumeError> {
    let (staged, digest) = make(template, target, None, passphrase, &mut watch)?;
    let published = staged.publish(None)?;
    watch(Step::Published);
    published.sync()?;
    watch(Step::Durable);
    Ok(digest)
}

/// As [`create_nvram`], up to the moment before it gets its name. It may be that of the plain store `replaced`, whose owner and
/// mode it gets then.
///
/// # Errors
/// Those of [`create_nvram`], and [`VolumeError::SameFile`] when the store is its own template; nothing was created or replaced.
pub fn prepare_nvram(
    template: &PermittedPath,
    target: &PermittedPath,
    replaced: Option<ImageLock>,
    passphrase: &Passphrase,
) -> Result<Prepared, VolumeError> {
    let (staged, _) = make(template, target, replaced.as_ref(), passphrase, &mut |_| {})?;
    Ok(Prepared::new(staged, replaced))
}

fn make(
    template: &PermittedPath,
    target: &PermittedPath,
    replaced: Option<&ImageLock>,
    passphrase: &Passphrase,
    watch: &mut dyn FnMut(Step),
) -> Result<(Staged, [u8; 32]), VolumeError> {
    let shown = target.shown();
    if replaced.is_none() && target.exists() {
        return Err(VolumeError::Exists(shown.to_owned()));
    }
    let source = Source::open(template, None)?;
    if replaced.is_some_and(|held| held.id().inode() == source.file_id().inode()) {
        return Err(VolumeError::SameFile(shown.to_owned()));
    }
    let variables = variables_in(&source)?;
    let fresh = Header::create(passphrase)?;
    let staged = Staged::beside(target)?;
    watch(Step::Staged);
    write(&staged, &fresh, &variables, shown)?;
    if let Some(held) = replaced {
        staged.take_after(held)?;
    }
    watch(Step::Written);
    staged.sync()?;
    watch(Step::Synced);
    let image = Image::from_file(staged.reopen()?, shown, None)?;
    image.unlock(passphrase)?;
    watch(Step::Verified);
    let digest = image.header_digest()?;
    Ok((staged, digest))
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

fn write(staged: &Staged, fresh: &Fresh, variables: &[u8], target: &Path) -> Result<(), VolumeError> {
    let mut sealed = vec![0; variables.len()];
    fresh.key.encryptor()?.apply(0, variables, &mut sealed)?;
    let regions = [
        (0, &fresh.header.to_bytes()[..]),
        (fresh.material_offset(), &fresh.material),
        (fresh.header.payload_offset(), &sealed),
    ];
    for (offset, bytes) in regions {
        staged
            .file()
            .write_all_at(bytes, offset)
            .attempt("write", target)?;
    }
    Ok(())
}
