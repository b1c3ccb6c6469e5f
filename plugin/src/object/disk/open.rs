//! Reading images without trusting them: what they are, and whether a key opens them.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use openssl::sha::sha256;

use super::error::{Attempt, VolumeError};
use super::file_id::FileId;
use super::format::{Sniffed, foreign, name_of, sniff};
use super::info::{ImageCopy, VolumeInfo};
use super::luks::{Luks, VolumeKey};
use super::qcow2::allocation::{self, Data};
use super::qcow2::{self, Encryption, Span, extension};
use super::size::Bytes;
use crate::host::permitted::PermittedPath;
use crate::model::image_format::Format;
use crate::secret::Passphrase;

/// Reads what an image says about itself, without a key and without looking at its backing file.
///
/// # Errors
/// When it is missing, no regular file or block device, damaged, or of a kind that virtseal does not handle.
pub(crate) fn inspect(place: &PermittedPath) -> Result<VolumeInfo, VolumeError> {
    Image::open(place)?.info()
}

/// What kind of image it is, and the envelope that it carries, without a look at its data.
pub(crate) fn identify(place: &PermittedPath) -> Result<(Format, ImageCopy), VolumeError> {
    let image = Image::open(place)?;
    Ok((image.format()?, image.copy()))
}

/// Really opens it with `passphrase`: derives the keyslot's key, merges the volume key and checks its digest.
///
/// # Errors
/// [`VolumeError::NoKeyslotOpens`] for the wrong key, [`VolumeError::NotEncrypted`] for a plain image, and those of
/// [`inspect`].
pub(crate) fn open(place: &PermittedPath, passphrase: &Passphrase) -> Result<(), VolumeError> {
    Image::open(place)?.unlock(passphrase).map(drop)
}

/// SHA-256 of its LUKS header: changes with any keyslot, and with the volume key.
///
/// # Errors
/// [`VolumeError::NotEncrypted`] for a plain image, and those of [`inspect`].
pub(crate) fn header_digest(place: &PermittedPath) -> Result<[u8; 32], VolumeError> {
    Image::open(place)?.header_digest()
}

enum Kind {
    Qcow2(Box<qcow2::Header>),
    Luks(Luks),
    Luks2,
    Raw,
}

/// An image that is open for reading, its outermost header parsed.
pub(crate) struct Image {
    file: File,
    path: PathBuf,
    len: u64,
    file_id: FileId,
    kind: Kind,
    /// The format that its first bytes are those of.
    looks_like: &'static str,
}

impl Image {
    /// Opens it and tells its format from its first bytes.
    pub(crate) fn open(place: &PermittedPath) -> Result<Self, VolumeError> {
        Self::open_as(place, None)
    }

    /// Opens it in the format that another image declares for it.
    pub(crate) fn open_as(place: &PermittedPath, declared: Option<&str>) -> Result<Self, VolumeError> {
        let path = place.shown();
        // Named here: of what is no image, opening says only that it is none.
        let found = place
            .metadata()
            .map_err(|source| VolumeError::unreachable(path, source))?;
        refuse_what_is_no_image(&found, path)?;
        let file = place.open(OpenOptions::new().read(true)).attempt("open", path)?;
        Self::from_file(file, path, declared)
    }

    /// Reads the headers of an open file; `path` is for messages.
    pub(crate) fn from_file(
        mut file: File,
        path: &Path,
        declared: Option<&str>,
    ) -> Result<Self, VolumeError> {
        let found = file.metadata().attempt("look at", path)?;
        refuse_what_is_no_image(&found, path)?;
        let len = file.seek(SeekFrom::End(0)).attempt("measure", path)?;
        let start = read(&file, 0, len.min(4096) as usize).attempt("read", path)?;
        let kind = match declared.map_or_else(|| sniff(&start), name_of) {
            Some(Sniffed::Qcow2) => Kind::Qcow2(Box::new(qcow2_header(&file, &start, len, path)?)),
            Some(Sniffed::Luks1) => {
                Kind::Luks(Luks::parse(&start, len).map_err(|flaw| VolumeError::damaged(path, flaw))?)
            }
            Some(Sniffed::Luks2) => Kind::Luks2,
            Some(Sniffed::Raw) => Kind::Raw,
            Some(Sniffed::Foreign(name)) => return Err(foreign(path, name)),
            None => return Err(foreign(path, declared.unwrap_or("unknown"))),
        };
        Ok(Self {
            file,
            path: path.to_owned(),
            len,
            file_id: FileId::from(&found),
            kind,
            looks_like: sniff(&start).map_or("raw", Sniffed::name),
        })
    }

    /// The format that its first bytes are those of, whatever it was opened as: a guest may have written them.
    pub(in crate::object) fn looks_like(&self) -> &'static str {
        self.looks_like
    }

    pub(in crate::object) fn into_file(self) -> File {
        self.file
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn file_id(&self) -> FileId {
        self.file_id
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn virtual_size(&self) -> Bytes {
        match &self.kind {
            Kind::Qcow2(header) => header.virtual_size,
            Kind::Luks(header) => Bytes(self.len - header.payload_offset()),
            Kind::Luks2 | Kind::Raw => Bytes(self.len),
        }
    }

    pub(crate) fn format(&self) -> Result<Format, VolumeError> {
        Ok(match &self.kind {
            Kind::Qcow2(header) => match header.encryption {
                Encryption::None => Format::Qcow2,
                Encryption::Luks(_) => Format::Qcow2Luks1,
                Encryption::Legacy => {
                    return Err(VolumeError::unsupported(
                        &self.path,
                        "it uses QEMU's withdrawn AES encryption",
                        "convert it with `qemu-img convert` first, as its owner and not as root",
                    ));
                }
            },
            Kind::Luks(Luks::V1(_)) => Format::Luks1,
            Kind::Luks2 => Format::Luks2,
            Kind::Raw => Format::Raw,
        })
    }

    /// The parts of its data that are outside of the file, in words; `None` if it stands alone.
    pub(crate) fn rests_on(&self) -> Option<&'static str> {
        match &self.kind {
            Kind::Qcow2(header) if header.backing.is_some() => Some("a backing file"),
            Kind::Qcow2(header) if header.data_file => Some("an external data file"),
            _ => None,
        }
    }

    pub(crate) fn info(&self) -> Result<VolumeInfo, VolumeError> {
        let format = self.format()?;
        let qcow2 = self.qcow2();
        if qcow2.is_some_and(|header| header.marked_corrupt) {
            return Err(VolumeError::unsupported(
                &self.path,
                "QEMU has marked the image as corrupt (feature bit 1, byte 72 of the qcow2 header)",
                "repair it with `qemu-img check -r all` as its owner, not as root, or restore it from a backup",
            ));
        }
        let copy = self.copy();
        Ok(VolumeInfo {
            path: self.path.clone(),
            format,
            virtual_size: self.virtual_size(),
            cluster_size: qcow2.map(|header| header.cluster_size),
            backing: qcow2.and_then(|header| header.backing.clone()),
            luks: self.luks_header()?.map(|(header, _)| header.info()),
            unreadable_envelope: copy.flaw(),
            envelope: copy.envelope(),
            snapshots: qcow2.map_or(0, |header| header.snapshots),
            data: self.data()?,
            file_id: self.file_id,
        })
    }

    pub(crate) fn data(&self) -> Result<Data, VolumeError> {
        match &self.kind {
            Kind::Qcow2(header) => allocation::of_qcow2(&self.file, self.len, header),
            Kind::Raw => allocation::of_raw(&self.file, self.len),
            Kind::Luks(_) | Kind::Luks2 => Ok(Data::HasData),
        }
        .attempt("read", &self.path)
    }

    /// The envelope that it carries.
    pub(crate) fn copy(&self) -> ImageCopy {
        let Some((offset, payload)) = self.qcow2().and_then(|header| header.envelope.as_ref()) else {
            return ImageCopy::None;
        };
        let luks = self.luks_span().unwrap_or(Span { offset: 0, len: 0 });
        let located = extension::pointer(payload, *offset)
            .and_then(|pointer| Ok((extension::locate(pointer, *offset, luks)?, pointer.len)));
        let found =
            located
                .map_err(|flaw| flaw.to_string())
                .and_then(|(at, len)| match read(&self.file, at, len) {
                    Ok(json) => extension::envelope(&json, at).map_err(|flaw| flaw.to_string()),
                    Err(error) => Err(format!("the envelope can't be read: {error}")),
                });
        match found {
            Ok(envelope) => ImageCopy::Envelope(Box::new(envelope)),
            Err(why) => ImageCopy::Unreadable(why),
        }
    }

    /// The volume key, if `passphrase` opens a keyslot.
    pub(crate) fn unlock(&self, passphrase: &Passphrase) -> Result<VolumeKey, VolumeError> {
        let (header, base) = self.encrypted()?;
        if let Some(allowed) = header.excess() {
            let path = self.path.clone();
            return Err(VolumeError::TooManyIterations { path, allowed });
        }
        header
            .unlock(passphrase, |offset, out| {
                self.file
                    .read_exact_at(out, base + offset)
                    .attempt("read the key material of", &self.path)
            })?
            .ok_or_else(|| VolumeError::NoKeyslotOpens(self.path.clone()))
    }

    pub(crate) fn header_digest(&self) -> Result<[u8; 32], VolumeError> {
        let (header, base) = self.encrypted()?;
        let bytes = read(&self.file, base, header.header_len()).attempt("read", &self.path)?;
        Ok(sha256(&bytes))
    }

    /// The LUKS header, and where in the file it begins.
    pub(crate) fn encrypted(&self) -> Result<(Luks, u64), VolumeError> {
        if let Kind::Luks2 = self.kind {
            return Err(VolumeError::unsupported(
                &self.path,
                "it is LUKS2",
                "this virtseal opens LUKS1 only",
            ));
        }
        self.format()?;
        self.luks_header()?
            .ok_or_else(|| VolumeError::NotEncrypted(self.path.clone()))
    }

    /// The LUKS header, and where in the file it begins.
    fn luks_header(&self) -> Result<Option<(Luks, u64)>, VolumeError> {
        if let Kind::Luks(header) = &self.kind {
            return Ok(Some((header.clone(), 0)));
        }
        let Some(Span { offset, len }) = self.luks_span() else {
            return Ok(None);
        };
        let want = len.min(Luks::LEN as u64) as usize;
        let bytes = read(&self.file, offset, want).attempt("read", &self.path)?;
        Luks::parse(&bytes, len)
            .map(|header| Some((header, offset)))
            .map_err(|flaw| VolumeError::damaged(&self.path, flaw.within(offset)))
    }

    pub(crate) fn luks_span(&self) -> Option<Span> {
        match self.qcow2()?.encryption {
            Encryption::Luks(span) => Some(span),
            Encryption::None | Encryption::Legacy => None,
        }
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// `len` bytes from `offset` on.
    pub(crate) fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, VolumeError> {
        read(&self.file, offset, len).attempt("read", &self.path)
    }

    pub(crate) fn qcow2(&self) -> Option<&qcow2::Header> {
        match &self.kind {
            Kind::Qcow2(header) => Some(header),
            _ => None,
        }
    }
}

fn qcow2_header(file: &File, start: &[u8], len: u64, path: &Path) -> Result<qcow2::Header, VolumeError> {
    let damaged = |flaw| VolumeError::damaged(path, flaw);
    let cluster = qcow2::Header::cluster_size(start).map_err(damaged)?.bytes();
    let parsed = if cluster <= start.len() as u64 {
        qcow2::Header::parse(&start[..cluster as usize], len)
    } else {
        let first = read(file, 0, cluster.min(len) as usize).attempt("read", path)?;
        qcow2::Header::parse(&first, len)
    };
    parsed.map_err(damaged)
}

fn read(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

fn refuse_what_is_no_image(metadata: &Metadata, path: &Path) -> Result<(), VolumeError> {
    let kind = metadata.file_type();
    let found = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a character device"
    };
    Err(VolumeError::NotAnImage {
        path: path.to_owned(),
        found,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_root(path: &Path) -> PermittedPath {
        PermittedPath::named_by_root(path).unwrap()
    }

    #[test]
    fn what_is_no_file_is_refused_without_waiting() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let socket = directory.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for path in [&fifo, &socket, directory.path(), Path::new("/dev/zero")] {
            assert!(
                matches!(inspect(&by_root(path)), Err(VolumeError::NotAnImage { .. })),
                "{path:?}"
            );
        }
        assert!(matches!(
            inspect(&by_root(&directory.path().join("none"))),
            Err(VolumeError::NotFound(_))
        ));
    }
}
