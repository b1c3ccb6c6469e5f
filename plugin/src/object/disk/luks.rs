//! LUKS, as far as images need it: a header that is read, opened and ended, and one that is made.
//!
//! A version of the format is a file beside `luks1.rs` and a case of [`Luks`]: nobody outside of this folder names one.

mod info;
pub(super) mod luks1;
pub(crate) mod sector;

use std::ops::Range;

use super::VolumeError;
use super::error::Flaw;
use crate::secret::{Passphrase, SecretBytes};
use luks1::Header;
use sector::SectorCipher;

pub(crate) use info::{KeyslotInfo, LuksInfo};

/// A header whose bounds have been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Luks {
    /// LUKS On-Disk Format 1.2.3.
    V1(Box<Header>),
}

/// A version, by the first bytes of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    V1,
    /// It is told apart, and not read.
    V2,
}

impl Version {
    pub(crate) fn of(start: &[u8]) -> Option<Self> {
        match start.strip_prefix(b"LUKS\xba\xbe")? {
            [0, 2, ..] => Some(Self::V2),
            _ => Some(Self::V1),
        }
    }
}

/// The key that encrypts the payload.
#[derive(Debug)]
pub(crate) struct VolumeKey(SecretBytes);

impl VolumeKey {
    pub(crate) fn encryptor(&self) -> Result<SectorCipher, VolumeError> {
        Ok(SectorCipher::encryptor(self.0.expose())?)
    }

    pub(crate) fn decryptor(&self) -> Result<SectorCipher, VolumeError> {
        Ok(SectorCipher::decryptor(self.0.expose())?)
    }
}

/// A header that has just been made, with what belongs beside it.
#[derive(Debug)]
pub(crate) struct Fresh {
    /// Bytes, each with its offset from the header; the header itself is the first.
    pub(crate) regions: [(u64, Vec<u8>); 2],
    /// Where the payload begins, in bytes from the header.
    pub(crate) payload_offset: u64,
    pub(crate) key: VolumeKey,
}

/// Makes a new volume key under `passphrase`, in the form that every libvirt with `engine='qemu'` opens.
pub(crate) fn create(passphrase: &Passphrase) -> Result<Fresh, VolumeError> {
    let (header, material, key) = Header::create(passphrase)?;
    Ok(Fresh {
        payload_offset: header.payload_offset(),
        regions: [
            (0, header.to_bytes().to_vec()),
            (header.material(0).start, material),
        ],
        key: VolumeKey(key),
    })
}

impl Luks {
    /// Length of the longest header proper in bytes: how much [`Self::parse`] wants to see.
    pub(crate) const LEN: usize = Header::LEN;

    /// Reads a header from its first bytes. `space` is how many bytes there are from the header to the end of
    /// what it may use: the file, or the area that qcow2 gives it.
    ///
    /// # Errors
    /// The first [`Flaw`], its offset counted from the header.
    pub(crate) fn parse(bytes: &[u8], space: u64) -> Result<Self, Flaw> {
        Ok(Self::V1(Box::new(Header::parse(bytes, space)?)))
    }

    /// Length of the bytes that change with any keyslot and with the volume key; they are the first ones.
    pub(crate) fn header_len(&self) -> usize {
        match self {
            Self::V1(_) => Header::LEN,
        }
    }

    /// Where the payload begins, in bytes from the header.
    pub(crate) fn payload_offset(&self) -> u64 {
        match self {
            Self::V1(header) => header.payload_offset(),
        }
    }

    pub(crate) fn info(&self) -> LuksInfo {
        match self {
            Self::V1(header) => header.info(),
        }
    }

    /// The volume key, from the first active keyslot that `passphrase` opens; `None` if there is none. `read` fills a buffer
    /// with the bytes at an offset from the header.
    ///
    /// # Errors
    /// Those of `read`, and when OpenSSL fails or there is no memory for keys. Look at [`Self::excess`] before.
    pub(crate) fn unlock(
        &self,
        passphrase: &Passphrase,
        read: impl FnMut(u64, &mut [u8]) -> Result<(), VolumeError>,
    ) -> Result<Option<VolumeKey>, VolumeError> {
        match self {
            Self::V1(header) => Ok(header.unlock(passphrase, read)?.map(VolumeKey)),
        }
    }

    /// The most rounds of key derivation that opening one may ask for, where this one asks for more.
    pub(crate) fn excess(&self) -> Option<u32> {
        match self {
            Self::V1(header) => (!header.is_cheap_to_open()).then_some(luks1::MAX_ITERATIONS_OPENED),
        }
    }

    pub(crate) fn active_keyslots(&self) -> usize {
        match self {
            Self::V1(header) => header.active_keyslots(),
        }
    }

    /// Where the key material of every keyslot lies, in bytes from the header; and the header without keys, to be written once
    /// that is overwritten.
    pub(crate) fn erasure(&self) -> (Vec<Range<u64>>, Vec<u8>) {
        match self {
            Self::V1(header) => (
                header.all_material().collect(),
                header.without_keys().to_bytes().to_vec(),
            ),
        }
    }
}
