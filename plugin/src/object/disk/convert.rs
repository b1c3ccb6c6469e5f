//! Data from other images, moved by `qemu-img`.
//!
//! The child gets everything through inherited descriptors: the source, the target (which has no name yet) and a
//! pipe with the passphrase. No path or key is in its arguments, and it can open nothing else (ADR 0014): a source may
//! change while it is read, and may then name any file. Where somebody says what sum the source has, it is copied first to where
//! nobody else can write: what has that sum is what `qemu-img` reads, whoever can write to the source meanwhile, also without a
//! trace in its times (`mmap`).

use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::sys::memfd::{MFdFlags, memfd_create};
use openssl::hash::{Hasher, MessageDigest};

use super::declared::{as_declared, open_declared};
use super::error::{Attempt, VolumeError};
use super::file_id::FileId;
use super::luks::sector::SECTOR;
use super::open::Image;
use super::qemu_img::{Heard, Percent, QemuImg, descriptor};
use super::size::Bytes;
use super::staging::Staged;
use crate::domain::DeclaredFormat;
use crate::host::permitted::PermittedPath;
use crate::model::advice::Advice;
use crate::model::digest::{Algorithm, Digest};
use crate::model::image_format::Format;
use crate::secret::Passphrase;

/// An image whose data can be copied: raw or qcow2, plain, complete in itself. Opened once; what is read is this file,
/// whatever its name comes to mean.
pub(crate) struct Source {
    image: Image,
    path: PathBuf,
    format: DeclaredFormat,
    /// Its first bytes, as they were when they were judged.
    header: Vec<u8>,
    /// The file that `image` is, if that is a copy of ours.
    copy: Option<Staged>,
}

impl Source {
    /// Opens an image, as what it is declared to be, else as what it shows. Refuses what can't be copied safely: a hostile
    /// image must not name other files.
    pub(crate) fn open(place: &PermittedPath, declared: Option<DeclaredFormat>) -> Result<Self, VolumeError> {
        match declared {
            Some(declared) => Self::of(open_declared(place, declared)?),
            None => Self::of(uncompressed(Image::open(place)?)?),
        }
    }

    fn of(image: Image) -> Result<Self, VolumeError> {
        let path = image.path().to_owned();
        let path = path.as_path();
        let format = match image.format()? {
            Format::Raw => DeclaredFormat::Raw,
            Format::Qcow2 => DeclaredFormat::Qcow2,
            encrypted => {
                return Err(VolumeError::unsupported(
                    path,
                    format!("it is encrypted ({}), and can't be a source", encrypted.as_str()),
                    "give a plain raw or qcow2 image",
                ));
            }
        };
        if let Some(other) = image.rests_on() {
            return Err(VolumeError::unsupported(
                path,
                format!("its data is partly in {other}"),
                Advice::ShowVolume(path.to_owned()).also(
                    "if what it names belongs to it, flatten it as the owner of both files, not as root, who would read \
                     whatever it names by then",
                ),
            ));
        }
        let header = first_bytes(&image).attempt("read", path)?;
        Ok(Self {
            image,
            path: path.to_owned(),
            format,
            header,
            copy: None,
        })
    }

    /// A copy on the file system of `target`, which has the sum `expected`; judged anew, because all of it may be other than what
    /// was judged before. It has no name, or one that goes with it.
    pub(crate) fn checked_copy(
        &self,
        expected: &Digest,
        declared: Option<DeclaredFormat>,
        target: &PermittedPath,
        progress: &mut impl FnMut(Heard) -> ControlFlow<()>,
    ) -> Result<Self, VolumeError> {
        let copy = Staged::beside(target)?;
        let found = self.copy_into(copy.file(), expected.algorithm(), target, progress)?;
        if found != *expected {
            return Err(VolumeError::OtherSum {
                path: self.path.clone(),
                expected: expected.clone(),
                found,
            });
        }
        let raw = declared.map(|_| DeclaredFormat::Raw.as_str());
        let image = Image::from_file(copy.reopen()?, &self.path, raw)?;
        let image = match declared {
            Some(declared) => as_declared(image, declared)?,
            None => uncompressed(image)?,
        };
        Ok(Self {
            copy: Some(copy),
            ..Self::of(image)?
        })
    }

    /// Returns the sum of what was copied. What is zero there is a hole in the copy.
    fn copy_into(
        &self,
        copy: &File,
        algorithm: Algorithm,
        target: &PermittedPath,
        progress: &mut impl FnMut(Heard) -> ControlFlow<()>,
    ) -> Result<Digest, VolumeError> {
        let method = match algorithm {
            Algorithm::Sha256 => MessageDigest::sha256(),
            Algorithm::Sha512 => MessageDigest::sha512(),
        };
        let mut sum = Hasher::new(method)?;
        let len = self.image.len();
        copy.set_len(len).attempt("copy", &self.path)?;
        let mut buffer = vec![0; COPIED_AT_ONCE];
        let mut done = 0;
        while done < len {
            if progress(Heard::Done(Percent(0.0))).is_break() {
                return Err(VolumeError::Stopped(target.shown().to_owned()));
            }
            let part = &mut buffer[..(len - done).min(COPIED_AT_ONCE as u64) as usize];
            let read = self.image.file().read_exact_at(part, done);
            read.attempt("read", &self.path)?;
            sum.update(part)?;
            if part.iter().any(|byte| *byte != 0) {
                copy.write_all_at(part, done).attempt("copy", &self.path)?;
            }
            done += part.len() as u64;
        }
        let sum = sum.finish()?.to_vec();
        Ok(Digest::new(algorithm, sum).expect("a sum of this kind has its length"))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file_id(&self) -> FileId {
        self.image.file_id()
    }

    /// The size of its disk, in whole sectors.
    pub(crate) fn virtual_size(&self) -> Bytes {
        let size = self.image.virtual_size();
        size.whole_sectors().unwrap_or(size)
    }

    /// All of its data, which may have `limit` bytes at the most.
    pub(crate) fn read_all(&self, limit: u64) -> Result<Vec<u8>, VolumeError> {
        let size = self.image.virtual_size();
        if size.0 > limit {
            return Err(VolumeError::unsupported(
                &self.path,
                format!("it has {size}, more than any UEFI variable store"),
                "give the template that belongs to the firmware",
            ));
        }
        if self.format == DeclaredFormat::Raw {
            return read_exactly(self.image.file(), size.0).attempt("read", &self.path);
        }
        let copy = memfd_create("template", MFdFlags::MFD_CLOEXEC)
            .map(File::from)
            .attempt("copy", &self.path)?;
        copy.set_len(size.0).attempt("copy", &self.path)?;
        QemuImg::new(&["convert", "-n", "-O", "raw"])?
            .source(self.image.file().as_fd(), self.format)
            .arg(descriptor(copy.as_fd()))
            .inheriting(copy.as_fd())
            .run(&self.path, |_| ControlFlow::Continue(()))
            .map(drop)?;
        self.refuse_if_changed()?;
        read_exactly(&copy, size.0).attempt("copy", &self.path)
    }

    /// What was read is what was judged only if the file is still as it was, and still has its name.
    fn refuse_if_changed(&self) -> Result<(), VolumeError> {
        if self.copy.is_some() {
            return Ok(());
        }
        let same = |found: std::fs::Metadata| FileId::from(&found) == self.image.file_id();
        let unchanged = self.image.file().metadata().is_ok_and(same)
            && std::fs::metadata(&self.path).is_ok_and(same)
            && first_bytes(&self.image).attempt("read", &self.path)? == self.header;
        if unchanged {
            Ok(())
        } else {
            Err(VolumeError::SourceChanged(self.path.clone()))
        }
    }
}

const COPIED_AT_ONCE: usize = 256 << 10;

/// The most that a qcow2 header, its extensions and the names in it take.
const HEADER_BYTES: u64 = 2 << 20;

fn first_bytes(image: &Image) -> io::Result<Vec<u8>> {
    let cluster = image
        .qcow2()
        .map_or(SECTOR as u64, |header| header.cluster_size.bytes());
    read_exactly(image.file(), cluster.min(HEADER_BYTES).min(image.len()))
}

/// Copies all data of `source` into the encrypted image `target`, which must be new: what is not written reads as
/// zeros already.
pub(crate) fn fill(
    source: &Source,
    target: &Staged,
    passphrase: &Passphrase,
    target_path: &Path,
    progress: impl FnMut(Heard) -> ControlFlow<()>,
) -> Result<(), VolumeError> {
    let (from, to) = (source.image.file().as_fd(), target.file().as_fd());
    let outcome = QemuImg::new(&["convert", "-p", "-n", "--target-is-zero"])?
        .with_key(passphrase)
        .attempt("pass a key for", target_path)?
        .arg("--target-image-opts")
        .source(from, source.format)
        .arg(target_options(to))
        .writing(to)
        .run(&source.path, progress);
    let outcome = outcome.map_err(|error| match error {
        VolumeError::QemuImg { path: from, said } => VolumeError::Copy {
            path: target_path.to_owned(),
            from,
            said,
        },
        error => error,
    });
    match outcome? {
        ControlFlow::Continue(()) => source.refuse_if_changed(),
        ControlFlow::Break(()) => Err(VolumeError::Stopped(target_path.to_owned())),
    }
}

/// Nobody else can know the target, so it needs no lock; a lock of ours on it must not stop QEMU either.
fn target_options(target: BorrowedFd<'_>) -> String {
    format!(
        "driver=qcow2,encrypt.format=luks,encrypt.key-secret=key,file.driver=file,file.locking=off,file.filename={}",
        descriptor(target)
    )
}

fn read_exactly(file: &File, len: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// What nobody has declared to be raw.
fn uncompressed(image: Image) -> Result<Image, VolumeError> {
    if image.format()? == Format::Raw {
        refuse_compressed(&image, image.path())?;
    }
    Ok(image)
}

fn refuse_compressed(image: &Image, path: &Path) -> Result<(), VolumeError> {
    const COMPRESSED: [(&[u8], &str); 5] = [
        (b"\x1f\x8b\x08", "gzip"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"BZh", "bzip2"),
        (b"PK\x03\x04", "zip"),
    ];
    let mut start = [0; 8];
    let read = image.file().read_at(&mut start, 0).attempt("read", path)?;
    match COMPRESSED
        .iter()
        .find(|(magic, _)| start[..read].starts_with(magic))
    {
        Some((_, name)) => Err(VolumeError::unsupported(
            path,
            format!("it is compressed with {name}"),
            "unpack it first",
        )),
        None => Ok(()),
    }
}
