//! Changing an image that exists and that nobody has open: its copy of the envelope, and the end of its keys.
//!
//! QEMU's own locks are held for writing, as a QEMU would that shares nothing. The bytes that change are written to the
//! caller's journal first, old and new: a process that dies in between leaves a header that [`finish_rewrite`] completes,
//! or leaves alone when somebody else has changed it since. The LUKS header, the key material and the data are never among
//! them; [`shred`] is the one exception, and the purpose of it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::error::{Attempt, Flaw, Part, VolumeError};
use super::info::ImageCopy;
use super::lock::ImageLock;
use super::open::Image;
use super::qcow2::{extension, extension::Place, rewrite};
use crate::host::permitted::PermittedPath;
use crate::model::envelope::{Envelope, EnvelopeId, Generation};
use crate::object::{Shredded, Shredding};
use crate::secret::Passphrase;

/// Bytes that a disk replaces whole or not at all.
const SECTOR: usize = 512;

/// What an image's copy of an envelope has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carried {
    /// It has this generation, from now on or before.
    Generation(Generation),
    /// The image does not carry this envelope.
    NotThere,
}

/// Makes the image at `place` carry `envelope`, if it carries a version of it that `gives_way`, or another one or something that
/// can't be read while `passphrase`, that of the envelope, really opens the image. `journal` keeps the bytes that
/// it gets, on stable storage, until this returns; after a crash they go to [`finish_rewrite`].
///
/// # Errors
/// [`VolumeError::InUse`] while anyone has the image open; when it can't be read, has no room for the envelope, `gives_way` does
/// not know, or the journal fails. Then nothing was written, unless the journal has the bytes.
pub(crate) fn rewrite_envelope<E: From<VolumeError>>(
    place: &PermittedPath,
    envelope: &Envelope,
    passphrase: Option<&Passphrase>,
    gives_way: impl FnOnce(&Envelope) -> Result<bool, E>,
    journal: impl FnOnce(&[u8]) -> Result<(), E>,
) -> Result<Carried, E> {
    let (held, path) = (ImageLock::open(place)?, place.shown());
    let (file, image) = (held.file(), held.image()?);
    match image.copy() {
        ImageCopy::Envelope(found) if found.id == envelope.id => {
            if *found == *envelope || !gives_way(&found)? {
                return Ok(Carried::Generation(found.generation));
            }
        }
        ImageCopy::Envelope(_) | ImageCopy::Unreadable(_)
            if passphrase.is_some_and(|passphrase| image.unlock(passphrase).is_ok()) => {}
        _ => return Ok(Carried::NotThere),
    }
    let digest = image.header_digest()?;
    let patch = patch(&image, Some(envelope))?;
    journal(&patch.to_bytes())?;
    patch.write(file, path)?;
    let written = held.image()?;
    if written.copy().envelope().as_ref() != Some(envelope) || written.header_digest()? != digest {
        return Err(damaged(path, "the envelope does not read back as it was written").into());
    }
    Ok(Carried::Generation(envelope.generation))
}

/// Completes what a crash interrupted. An image that somebody else has changed since is left alone.
///
/// # Errors
/// [`VolumeError::InUse`], and when the image can't be written.
pub(crate) fn finish_rewrite(place: &PermittedPath, journaled: &[u8]) -> Result<(), VolumeError> {
    let (held, path) = (ImageLock::open(place)?, place.shown());
    let patch = Patch::from_bytes(journaled).ok_or_else(|| damaged(path, "its journal is damaged"))?;
    if patch.is_torn(held.file(), path)? {
        patch.write(held.file(), path)?;
    }
    Ok(())
}

/// Overwrites the key material of all keyslots of the image at `place` with random bytes, makes the keyslots dead, and removes
/// the envelope, if it is the image of envelope `id`: it carries that, or it carries none and `passphrase` opens it. Whatever
/// else is at that path by now is left alone. Nothing opens the image afterwards; what the storage below keeps of the old bytes
/// is out of reach.
///
/// # Errors
/// [`VolumeError::InUse`] while anyone has the image open, and when it is not encrypted or can't be written. May be repeated.
pub(crate) fn shred(
    place: &PermittedPath,
    id: EnvelopeId,
    passphrase: Option<&Passphrase>,
) -> Result<Shredding, VolumeError> {
    let (held, path) = (ImageLock::open(place)?, place.shown());
    let (file, image) = (held.file(), held.image()?);
    // Of the file that is held: another may be at the path by now.
    let opens = || passphrase.is_some_and(|passphrase| image.unlock(passphrase).is_ok());
    let (header, base) = image.encrypted()?;
    let keyslots = header.active_keyslots();
    match image.copy() {
        ImageCopy::Envelope(found) if found.id != id => return Ok(Shredding::Carries(found.id)),
        ImageCopy::None | ImageCopy::Unreadable(_) if keyslots > 0 && !opens() => {
            return Ok(Shredding::NotShown(keyslots));
        }
        _ => {}
    }
    let mut material = 0;
    let (ranges, without_keys) = header.erasure();
    for range in ranges {
        let mut noise = vec![0; (range.end - range.start) as usize];
        openssl::rand::rand_bytes(&mut noise)?;
        file.write_all_at(&noise, base + range.start)
            .attempt("overwrite the key material of", path)?;
        material += range.end - range.start;
    }
    file.sync_data().attempt("write", path)?;
    file.write_all_at(&without_keys, base)
        .attempt("overwrite the LUKS header of", path)?;
    file.sync_data().attempt("write", path)?;
    let envelope = image.copy() != ImageCopy::None;
    if envelope {
        patch(&image, None)?.write(file, path)?;
    }
    Ok(Shredding::Done(Shredded {
        keyslots,
        material,
        envelope,
    }))
}

/// Whether an image could be changed now.
///
/// # Errors
/// [`VolumeError::InUse`] while anyone has it open, and when it can't be opened for writing.
pub(crate) fn is_free(place: &PermittedPath) -> Result<(), VolumeError> {
    ImageLock::open(place).map(drop)
}

fn damaged(path: &Path, what: &str) -> VolumeError {
    VolumeError::damaged(path, Flaw::new(Part::Envelope, 0, what))
}

/// The change that puts `envelope` in the place of the one that the image carries, or removes that.
fn patch(image: &Image, envelope: Option<&Envelope>) -> Result<Patch, VolumeError> {
    let path = image.path();
    let of = |flaw| VolumeError::damaged(path, flaw);
    let header = image
        .qcow2()
        .ok_or_else(|| damaged(path, "it is not a qcow2 image"))?;
    let (offset, payload) = header
        .envelope
        .as_ref()
        .ok_or_else(|| damaged(path, "it carries no envelope"))?;
    let cluster_size = header.cluster_size;
    let first = image.read(0, cluster_size.bytes() as usize)?;
    let json = envelope.map(Envelope::to_json);
    let (place, old_len) = whereabouts(image, *offset, payload, json.as_deref())?;
    let mut patch = Patch::default();
    if let Place::BehindLuks(start) = place {
        patch.push(behind_luks(
            image,
            start,
            old_len,
            json.as_deref().unwrap_or_default(),
        )?);
    } else if json
        .as_deref()
        .is_some_and(|json| Place::choose(json, cluster_size, 0) != Place::Inline)
    {
        return Err(damaged(path, "its first cluster has no room for the envelope"));
    }
    let payload = json.map(|json| extension::payload(&json, place));
    let new = rewrite::with_payload(&first, image.len(), payload.as_deref()).map_err(of)?;
    let end = first
        .iter()
        .zip(&new)
        .rposition(|(old, new)| old != new)
        .map_or(0, |last| last + 1);
    patch.push(Region {
        offset: 0,
        old: first[..end].to_vec(),
        new: new[..end].to_vec(),
    });
    Ok(patch)
}

/// Where the JSON is, and its length; of a copy that can't be read, where a new one has room.
fn whereabouts(
    image: &Image,
    offset: u64,
    payload: &[u8],
    json: Option<&str>,
) -> Result<(Place, usize), VolumeError> {
    if let (ImageCopy::Envelope(_), Ok(pointer)) = (image.copy(), extension::pointer(payload, offset)) {
        return Ok((pointer.place, pointer.len));
    }
    let (Some(json), Some(header)) = (json, image.qcow2()) else {
        return Ok((Place::Inline, 0));
    };
    let (luks, _) = image.encrypted()?;
    Ok((Place::choose(json, header.cluster_size, luks.payload_offset()), 0))
}

/// The JSON in the space that the image has behind the LUKS header and its key material, and nowhere else.
fn behind_luks(image: &Image, start: u64, old_len: usize, json: &str) -> Result<Region, VolumeError> {
    let path = image.path();
    let (luks, base) = image.encrypted()?;
    let span = image
        .luks_span()
        .ok_or_else(|| damaged(path, "it has no LUKS header"))?;
    let len = old_len.max(json.len());
    if start < luks.payload_offset() || start.saturating_add(len as u64) > span.len {
        return Err(damaged(
            path,
            "there is no room after its LUKS header for the envelope",
        ));
    }
    let old = image.read(base + start, len)?;
    let mut new = json.as_bytes().to_vec();
    new.resize(len, 0);
    Ok(Region {
        offset: base + start,
        old,
        new,
    })
}

/// Bytes of the file that change.
#[derive(Debug, Default, PartialEq, Eq)]
struct Patch {
    regions: Vec<Region>,
}

#[derive(Debug, PartialEq, Eq)]
struct Region {
    offset: u64,
    old: Vec<u8>,
    /// As long as `old`.
    new: Vec<u8>,
}

impl Patch {
    fn push(&mut self, region: Region) {
        if !region.new.is_empty() {
            self.regions.push(region);
        }
    }

    fn write(&self, file: &File, path: &Path) -> Result<(), VolumeError> {
        for region in &self.regions {
            file.write_all_at(&region.new, region.offset)
                .attempt("write the envelope into", path)?;
        }
        file.sync_data().attempt("write", path)
    }

    /// Whether each sector is either as it was or as it is to be, and not all are as they are to be.
    fn is_torn(&self, file: &File, path: &Path) -> Result<bool, VolumeError> {
        let mut complete = true;
        for region in &self.regions {
            let mut found = vec![0; region.new.len()];
            if file.read_exact_at(&mut found, region.offset).is_err() {
                return Ok(false);
            }
            let pieces = found
                .chunks(SECTOR)
                .zip(region.old.chunks(SECTOR).zip(region.new.chunks(SECTOR)));
            for (found, (old, new)) in pieces {
                complete &= found == new;
                if found != old && found != new {
                    tracing::warn!(path = %path.display(), "its header was changed by somebody else meanwhile");
                    return Ok(false);
                }
            }
        }
        Ok(!complete)
    }

    /// Each region: offset (8 bytes) and length (4), big-endian, then the old and the new bytes.
    fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for region in &self.regions {
            out.extend_from_slice(&region.offset.to_be_bytes());
            out.extend_from_slice(&(region.new.len() as u32).to_be_bytes());
            out.extend_from_slice(&region.old);
            out.extend_from_slice(&region.new);
        }
        out
    }

    fn from_bytes(mut bytes: &[u8]) -> Option<Self> {
        let mut patch = Self::default();
        while !bytes.is_empty() {
            let (offset, rest) = bytes.split_first_chunk()?;
            let (len, rest) = rest.split_first_chunk()?;
            let len = u32::from_be_bytes(*len) as usize;
            let (old, rest) = rest.split_at_checked(len)?;
            let (new, rest) = rest.split_at_checked(len)?;
            patch.regions.push(Region {
                offset: u64::from_be_bytes(*offset),
                old: old.to_vec(),
                new: new.to_vec(),
            });
            bytes = rest;
        }
        Some(patch)
    }
}

#[cfg(test)]
mod tests;
