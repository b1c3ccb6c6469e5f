//! Reading images without trusting them: what they are, and whether a key opens them.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use openssl::sha::sha256;
use serde::Serialize;

use super::error::{Attempt, VolumeError};
use super::luks1::{self, LuksInfo, VolumeKey};
use super::qcow2::allocation::{self, Data};
use super::qcow2::{self, Encryption, Span, extension};
use super::size::{Bytes, ClusterSize};
use super::staging::FileId;
use crate::host::permitted::PermittedPath;
use crate::model::envelope::Envelope;
use crate::secret::Passphrase;

/// What kind of image a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Format {
    /// qcow2 without encryption.
    #[serde(rename = "qcow2")]
    Qcow2,
    /// qcow2 with LUKS1 inside: what virtseal makes for disks.
    #[serde(rename = "qcow2+luks1")]
    Qcow2Luks1,
    /// A LUKS1 header and its payload: what virtseal makes for UEFI variable stores.
    #[serde(rename = "luks1")]
    Luks1,
    /// A LUKS2 header and its payload.
    #[serde(rename = "luks2")]
    Luks2,
    /// No format that shows.
    #[serde(rename = "raw")]
    Raw,
}

impl Format {
    /// The name in messages and in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Qcow2Luks1 => "qcow2+luks1",
            Self::Luks1 => "luks1",
            Self::Luks2 => "luks2",
            Self::Raw => "raw",
        }
    }

    /// Whether its data is encrypted.
    #[must_use]
    pub fn is_encrypted(self) -> bool {
        matches!(self, Self::Qcow2Luks1 | Self::Luks1 | Self::Luks2)
    }
}

/// The backing file as an image names it; a relative name counts from the image's directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackingEntry {
    /// Its name.
    pub path: String,
    /// Its format, if the image says.
    pub format: Option<String>,
}

/// What an image says without any key.
#[derive(Clone, Debug, Serialize)]
pub struct VolumeInfo {
    /// The file.
    pub path: PathBuf,
    /// What it is.
    pub format: Format,
    /// Size of the disk that a guest sees, in bytes.
    pub virtual_size: Bytes,
    /// Only for qcow2, in bytes.
    pub cluster_size: Option<ClusterSize>,
    /// Only for qcow2.
    pub backing: Option<BackingEntry>,
    /// Only for LUKS1: cipher, keyslots, payload.
    pub luks: Option<LuksInfo>,
    /// The copy that the image carries.
    pub envelope: Option<Envelope>,
    /// What is wrong with a copy that can't be read: it says nothing of the image.
    pub unreadable_envelope: Option<String>,
    /// Only for qcow2: how many snapshots are in it.
    #[serde(skip)]
    pub snapshots: u32,
    /// Whether anything would be lost with it. An image with a backing file, and any LUKS file that is not qcow2,
    /// count as holding data.
    pub data: Data,
    /// To be given to `create` by a caller that wants to replace this very file.
    #[serde(skip)]
    pub file_id: FileId,
}

/// Reads what an image says about itself, without a key and without looking at its backing file.
///
/// # Errors
/// When it is missing, no regular file or block device, damaged, or of a kind that virtseal does not handle.
pub fn inspect(place: &PermittedPath) -> Result<VolumeInfo, VolumeError> {
    Image::open(place)?.info()
}

/// The copy of an envelope in an image. Anybody who writes the image has written it: one that can't be read is a bad copy, and
/// no reason to do without the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageCopy {
    /// The image carries none.
    None,
    /// It is one in form.
    Envelope(Box<Envelope>),
    /// What is wrong with it.
    Unreadable(String),
}

impl ImageCopy {
    /// The one that can be read.
    #[must_use]
    pub fn envelope(self) -> Option<Envelope> {
        match self {
            Self::Envelope(envelope) => Some(*envelope),
            Self::None | Self::Unreadable(_) => None,
        }
    }

    /// What is wrong with it.
    #[must_use]
    pub fn flaw(&self) -> Option<String> {
        match self {
            Self::Unreadable(why) => Some(why.clone()),
            Self::None | Self::Envelope(_) => None,
        }
    }
}

/// What kind of image it is, and the envelope that it carries, without a look at its data.
///
/// # Errors
/// Those of [`inspect`].
pub fn identify(place: &PermittedPath) -> Result<(Format, ImageCopy), VolumeError> {
    let image = Image::open(place)?;
    Ok((image.format()?, image.copy()))
}

/// Really opens it with `passphrase`: derives the keyslot's key, merges the volume key and checks its digest.
///
/// # Errors
/// [`VolumeError::NoKeyslotOpens`] for the wrong key, [`VolumeError::NotEncrypted`] for a plain image, and those of
/// [`inspect`].
pub fn verify(place: &PermittedPath, passphrase: &Passphrase) -> Result<(), VolumeError> {
    Image::open(place)?.unlock(passphrase).map(drop)
}

/// SHA-256 of the 592 bytes of its LUKS1 header: changes with any keyslot, and with the volume key.
///
/// # Errors
/// [`VolumeError::NotEncrypted`] for a plain image, and those of [`inspect`].
pub fn header_digest(place: &PermittedPath) -> Result<[u8; 32], VolumeError> {
    Image::open(place)?.header_digest()
}

enum Kind {
    Qcow2(Box<qcow2::Header>),
    Luks1(Box<luks1::Header>),
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
        refuse_what_is_no_image(&found(place.metadata(), path)?, path)?;
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
            Some(Sniffed::Luks1) => Kind::Luks1(Box::new(
                luks1::Header::parse(&start, len).map_err(|flaw| VolumeError::damaged(path, flaw))?,
            )),
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
    pub(super) fn looks_like(&self) -> &'static str {
        self.looks_like
    }

    pub(super) fn into_file(self) -> File {
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
            Kind::Luks1(header) => Bytes(self.len - header.payload_offset()),
            Kind::Luks2 | Kind::Raw => Bytes(self.len),
        }
    }

    pub(crate) fn format(&self) -> Result<Format, VolumeError> {
        Ok(match &self.kind {
            Kind::Qcow2(header) => match header.encryption {
                Encryption::None => Format::Qcow2,
                Encryption::Luks1(_) => Format::Qcow2Luks1,
                Encryption::Legacy => {
                    return Err(VolumeError::unsupported(
                        &self.path,
                        "it uses QEMU's withdrawn AES encryption",
                        "convert it with `qemu-img convert` first, as its owner and not as root",
                    ));
                }
            },
            Kind::Luks1(_) => Format::Luks1,
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
            backing: qcow2
                .and_then(|header| header.backing.as_ref())
                .map(|backing| BackingEntry {
                    path: backing.name.clone(),
                    format: backing.format.clone(),
                }),
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
            Kind::Luks1(_) | Kind::Luks2 => Ok(Data::HasData),
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
        if !header.is_cheap_to_open() {
            return Err(VolumeError::TooManyIterations(self.path.clone()));
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
        let (_, base) = self.encrypted()?;
        let bytes = read(&self.file, base, luks1::Header::LEN).attempt("read", &self.path)?;
        Ok(sha256(&bytes))
    }

    /// The LUKS1 header, and where in the file it begins.
    pub(crate) fn encrypted(&self) -> Result<(luks1::Header, u64), VolumeError> {
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

    /// The LUKS1 header, and where in the file it begins.
    fn luks_header(&self) -> Result<Option<(luks1::Header, u64)>, VolumeError> {
        if let Kind::Luks1(header) = &self.kind {
            return Ok(Some((header.as_ref().clone(), 0)));
        }
        let Some(Span { offset, len }) = self.luks_span() else {
            return Ok(None);
        };
        let want = len.min(luks1::Header::LEN as u64) as usize;
        let bytes = read(&self.file, offset, want).attempt("read", &self.path)?;
        luks1::Header::parse(&bytes, len)
            .map(|header| Some((header, offset)))
            .map_err(|flaw| VolumeError::damaged(&self.path, flaw.within(offset)))
    }

    pub(crate) fn luks_span(&self) -> Option<Span> {
        match self.qcow2()?.encryption {
            Encryption::Luks1(span) => Some(span),
            Encryption::None | Encryption::Legacy => None,
        }
    }

    /// Its length in bytes.
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

enum Sniffed {
    Qcow2,
    Luks1,
    Luks2,
    Raw,
    Foreign(&'static str),
}

impl Sniffed {
    fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Luks1 => "LUKS1",
            Self::Luks2 => "LUKS2",
            Self::Raw => "raw",
            Self::Foreign(name) => name,
        }
    }
}

fn name_of(declared: &str) -> Option<Sniffed> {
    match declared {
        "qcow2" => Some(Sniffed::Qcow2),
        "raw" => Some(Sniffed::Raw),
        "luks" => Some(Sniffed::Luks1),
        _ => None,
    }
}

fn sniff(start: &[u8]) -> Option<Sniffed> {
    const FOREIGN: [(usize, &[u8], &str); 8] = [
        (0, b"KDMV", "VMDK"),
        (0, b"COWD", "VMDK"),
        (0, b"# Disk DescriptorFile", "VMDK"),
        (0, b"vhdxfile", "VHDX"),
        (0, b"conectix", "VHD"),
        (0, b"QED\0", "QED"),
        (0, b"WithouFreSpacExt", "Parallels"),
        (64, b"\x7f\x10\xda\xbe", "VDI"),
    ];
    let has = |at: usize, magic: &[u8]| start.get(at..).is_some_and(|rest| rest.starts_with(magic));
    if let Some((_, _, name)) = FOREIGN.iter().find(|(at, magic, _)| has(*at, magic)) {
        return Some(Sniffed::Foreign(name));
    }
    Some(if has(0, qcow2::MAGIC) {
        Sniffed::Qcow2
    } else if has(0, b"LUKS\xba\xbe\x00\x02") {
        Sniffed::Luks2
    } else if has(0, b"LUKS\xba\xbe") {
        Sniffed::Luks1
    } else {
        Sniffed::Raw
    })
}

fn foreign(path: &Path, name: &str) -> VolumeError {
    VolumeError::unsupported(
        path,
        format!("it is a {name} image"),
        "convert it to qcow2 or raw with `qemu-img convert` first, as its owner and not as root: an image can name other files",
    )
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

fn found(metadata: io::Result<Metadata>, path: &Path) -> Result<Metadata, VolumeError> {
    metadata.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => VolumeError::NotFound(path.to_owned()),
        _ => VolumeError::Io {
            path: path.to_owned(),
            action: "look at",
            source,
        },
    })
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
    use std::fs;

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

    #[test]
    fn other_formats_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        fs::write(&path, b"KDMV and the rest").unwrap();
        assert!(inspect(&by_root(&path)).unwrap_err().to_string().contains("VMDK"));
    }
}
