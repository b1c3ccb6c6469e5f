//! UEFI variable stores under LUKS1.
//!
//! The file is a LUKS1 header and the template's bytes encrypted behind it, without qcow2: the form that every
//! libvirt with `engine='qemu'` reads, whatever the domain says of its format.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::convert::Source;
use super::create::Step;
use super::error::{Attempt, VolumeError};
use super::luks1::sector::SECTOR;
use super::luks1::{Fresh, Header};
use super::open::Image;
use super::staging::Staged;
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
    template: &Path,
    target: &Path,
    passphrase: &Passphrase,
) -> Result<[u8; 32], VolumeError> {
    create_nvram_watched(template, target, passphrase, |_| {})
}

/// [`create_nvram`], telling `watch` of every step: for tests that stop there.
///
/// # Errors
/// Those of [`create_nvram`].
pub fn create_nvram_watched(
    template: &Path,
    target: &Path,
    passphrase: &Passphrase,
    mut watch: impl FnMut(Step),
) -> Result<[u8; 32], VolumeError> {
    if target.symlink_metadata().is_ok() {
        return Err(VolumeError::Exists(target.to_owned()));
    }
    let variables = read_template(template)?;
    let fresh = Header::create(passphrase)?;
    let staged = Staged::beside(target)?;
    watch(Step::Staged);
    write(&staged, &fresh, &variables, target)?;
    watch(Step::Written);
    staged.sync()?;
    watch(Step::Synced);
    let image = Image::from_file(staged.reopen()?, target, None)?;
    image.unlock(passphrase)?;
    watch(Step::Verified);
    let published = staged.publish(None)?;
    watch(Step::Published);
    published.sync()?;
    watch(Step::Durable);
    image.header_digest()
}

fn read_template(template: &Path) -> Result<Vec<u8>, VolumeError> {
    let variables = Source::open(template, None)?.read_all(LARGEST)?;
    if variables.is_empty() || !variables.len().is_multiple_of(SECTOR) {
        return Err(VolumeError::unsupported(
            template,
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
