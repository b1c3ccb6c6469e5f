//! Making encrypted images.
//!
//! The file is written without a name, put on stable storage, opened anew and unlocked with the passphrase, and
//! only then gets its name. A process that dies at any step leaves nothing, or the complete image.

use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::chain::local_file_name;
use super::convert::{self, Source};
use super::error::{Attempt, VolumeError};
use super::lock::ImageLock;
use super::luks;
use super::open::Image;
use super::prepared::Prepared;
use super::qcow2::BackingName;
use super::qcow2::allocation::Data;
use super::qcow2::layout::{Blueprint, LayoutError, Parts};
use super::qemu_img::Heard;
use super::size::{Bytes, ClusterSize};
use super::staging::{Staged, Step};
use crate::domain::DeclaredFormat;
use crate::host::permitted::PermittedPath;
use crate::model::digest::Digest;
use crate::model::envelope::Envelope;
use crate::model::image_format::Format;
use crate::secret::Passphrase;

/// The image that a new one is an overlay of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Backing {
    /// As it will be written into the image; a relative path counts from the image's directory.
    pub path: PathBuf,
    /// Its format; nothing is guessed.
    pub format: DeclaredFormat,
}

#[derive(Clone, Debug)]
pub(crate) struct CreateRequest {
    /// The image's name, which root has chosen; of one that is replaced, for messages.
    pub path: PathBuf,
    /// Size of the guest's disk, rounded up to whole sectors. `None`: that of the backing file or the source.
    pub size: Option<Bytes>,
    pub cluster_size: ClusterSize,
    /// For an overlay.
    pub backing: Option<Backing>,
    /// The format of the image that it is filled from. `None`: what that image shows.
    pub source_format: Option<DeclaredFormat>,
    /// The sum that this image must have.
    pub source_digest: Option<Digest>,
}

impl CreateRequest {
    /// An image of `size` under a free name, with the usual clusters.
    pub(crate) fn new(path: impl Into<PathBuf>, size: Bytes) -> Self {
        Self {
            path: path.into(),
            size: Some(size),
            cluster_size: ClusterSize::default(),
            backing: None,
            source_format: None,
            source_digest: None,
        }
    }
}

/// Makes an empty image that `passphrase` opens and that carries `envelope`; the size of the guest's disk.
///
/// # Errors
/// [`VolumeError`]; nothing was created then, except when only the last fsync of the directory failed.
pub(crate) fn create(
    request: &CreateRequest,
    envelope: &Envelope,
    passphrase: &Passphrase,
) -> Result<Bytes, VolumeError> {
    create_watched(request, envelope, passphrase, |_| {})
}

/// [`create`], telling `watch` of every step: for tests that stop there.
pub(crate) fn create_watched(
    request: &CreateRequest,
    envelope: &Envelope,
    passphrase: &Passphrase,
    mut watch: impl FnMut(Step),
) -> Result<Bytes, VolumeError> {
    let size = match (request.size, &request.backing) {
        (Some(size), _) => size,
        (None, Some(backing)) => open_backing(request, backing)?.virtual_size(),
        (None, None) => return Err(VolumeError::SizeMissing(request.path.clone())),
    };
    let making = Making::new(None, request, size, envelope, passphrase)?;
    let size = making.size;
    making.make(|_| Ok(()), &mut watch)?.publish_watched(&mut watch)?;
    Ok(size)
}

/// As [`create`], in the place of the empty image `replaced`, whose owner and mode the new one gets; up to the moment before the
/// old image goes.
///
/// # Errors
/// Those of [`create`], and [`VolumeError::HoldsData`]; nothing was replaced.
pub(crate) fn prepare_over(
    replaced: ImageLock,
    request: &CreateRequest,
    envelope: &Envelope,
    passphrase: &Passphrase,
) -> Result<Prepared, VolumeError> {
    prepare_over_watched(replaced, request, envelope, passphrase, |_| {})
}

/// [`prepare_over`], telling `watch` of every step: for tests that stop there.
pub(crate) fn prepare_over_watched(
    replaced: ImageLock,
    request: &CreateRequest,
    envelope: &Envelope,
    passphrase: &Passphrase,
    mut watch: impl FnMut(Step),
) -> Result<Prepared, VolumeError> {
    let size = request
        .size
        .ok_or_else(|| VolumeError::SizeMissing(request.path.clone()))?;
    Making::new(Some(replaced), request, size, envelope, passphrase)?.make(|_| Ok(()), &mut watch)
}

/// Makes an image and fills it with the data of `source` (raw or qcow2) through `qemu-img convert`. `progress`
/// hears how far it got and may stop it.
///
/// # Errors
/// [`VolumeError`]; nothing was created then.
pub(crate) fn create_from(
    request: &CreateRequest,
    source: &Path,
    envelope: &Envelope,
    passphrase: &Passphrase,
    progress: impl FnMut(Heard) -> ControlFlow<()>,
) -> Result<(), VolumeError> {
    create_from_watched(request, source, envelope, passphrase, progress, |_| {})
}

/// [`create_from`], telling `watch` of every step: for tests that stop there.
pub(crate) fn create_from_watched(
    request: &CreateRequest,
    source: &Path,
    envelope: &Envelope,
    passphrase: &Passphrase,
    mut progress: impl FnMut(Heard) -> ControlFlow<()>,
    mut watch: impl FnMut(Step),
) -> Result<(), VolumeError> {
    let (mut source, mut size) = open_source(request, source)?;
    if let Some(expected) = &request.source_digest {
        let target = named_by_root(&request.path)?;
        source = source.checked_copy(expected, request.source_format, &target, &mut progress)?;
        size = size_over(request, &source)?;
    }
    let making = Making::new(None, request, size, envelope, passphrase)?;
    let fill = |staged: &Staged| convert::fill(&source, staged, passphrase, &request.path, progress);
    making.make(fill, &mut watch)?.publish_watched(&mut watch)?;
    Ok(())
}

/// How much [`create_from`] would copy.
///
/// # Errors
/// Those of [`create_from`] that can be told without writing.
pub(crate) fn source_size(request: &CreateRequest, source: &Path) -> Result<Bytes, VolumeError> {
    open_source(request, source).map(|(source, _)| source.virtual_size())
}

/// With the size that the new image is to have.
fn open_source(request: &CreateRequest, source: &Path) -> Result<(Source, Bytes), VolumeError> {
    if let Some(backing) = &request.backing {
        return Err(VolumeError::BackingName {
            path: request.path.clone(),
            backing: backing.path.clone(),
            reason: "an image that is filled from another one has none".to_owned(),
        });
    }
    let source = Source::open(&named_by_root(source)?, request.source_format)?;
    let size = size_over(request, &source)?;
    Ok((source, size))
}

/// The size that the new image is to have.
fn size_over(request: &CreateRequest, source: &Source) -> Result<Bytes, VolumeError> {
    let size = request.size.unwrap_or(source.virtual_size());
    if size < source.virtual_size() {
        return Err(VolumeError::Size {
            path: request.path.clone(),
            size,
            reason: format!("{} has {}", source.path().display(), source.virtual_size()),
        });
    }
    Ok(size)
}

struct Making<'a> {
    replaced: Option<ImageLock>,
    place: PermittedPath,
    request: &'a CreateRequest,
    size: Bytes,
    envelope: &'a Envelope,
    passphrase: &'a Passphrase,
    blueprint: Blueprint,
}

impl<'a> Making<'a> {
    fn new(
        replaced: Option<ImageLock>,
        request: &'a CreateRequest,
        size: Bytes,
        envelope: &'a Envelope,
        passphrase: &'a Passphrase,
    ) -> Result<Self, VolumeError> {
        let json = envelope.to_json();
        // What can't be read back must not be written.
        Envelope::from_json(&json).map_err(VolumeError::Envelope)?;
        let size = allowed(size, &request.path)?;
        let backing = backing_name(request)?;
        let parts = Parts {
            size,
            cluster_size: request.cluster_size,
            backing: backing.as_ref(),
            luks: luks::create(passphrase)?,
            envelope: &json,
        };
        let blueprint = parts
            .blueprint()
            .map_err(|error| impossible(error, request, size))?;
        let place = match &replaced {
            Some(held) => held.place().clone(),
            None => PermittedPath::named_by_root(&request.path).attempt("reach", &request.path)?,
        };
        Ok(Self {
            replaced,
            place,
            request,
            size,
            envelope,
            passphrase,
            blueprint,
        })
    }

    /// All but its name.
    fn make(
        self,
        fill: impl FnOnce(&Staged) -> Result<(), VolumeError>,
        watch: &mut dyn FnMut(Step),
    ) -> Result<Prepared, VolumeError> {
        self.check_target()?;
        let staged = Staged::beside(&self.place)?;
        watch(Step::Staged);
        self.write(&staged).attempt("write", &self.request.path)?;
        watch(Step::Written);
        fill(&staged)?;
        watch(Step::Filled);
        if let Some(held) = &self.replaced {
            staged.take_after(held)?;
        }
        staged.sync()?;
        watch(Step::Synced);
        self.verify(&staged)?;
        watch(Step::Verified);
        self.check_target()?;
        Ok(Prepared::new(staged, self.replaced))
    }

    /// The name is free, or taken by the file to be replaced, which holds nothing.
    fn check_target(&self) -> Result<(), VolumeError> {
        match &self.replaced {
            None if self.place.exists() => Err(VolumeError::Exists(self.request.path.clone())),
            None => Ok(()),
            Some(held) => refuse_data(held),
        }
    }

    fn write(&self, staged: &Staged) -> std::io::Result<()> {
        staged.file().set_len(self.blueprint.len)?;
        for region in &self.blueprint.regions {
            staged.file().write_all_at(&region.bytes, region.offset)?;
        }
        Ok(())
    }

    /// Opens it as anyone would, and finds all that was put in.
    fn verify(&self, staged: &Staged) -> Result<(), VolumeError> {
        let image = Image::from_file(staged.reopen()?, &self.request.path, None)?;
        image.unlock(self.passphrase)?;
        let complete = image.format()? == Format::Qcow2Luks1
            && image.virtual_size() == self.size
            && image.copy().envelope().as_ref() == Some(self.envelope);
        if !complete {
            return Err(VolumeError::unsupported(
                &self.request.path,
                "the new image did not read back as it was written",
                "nothing was created; check the file system and the disk below it",
            ));
        }
        Ok(())
    }
}

fn refuse_data(held: &ImageLock) -> Result<(), VolumeError> {
    match held.image()?.data()? {
        Data::HasData => Err(VolumeError::HoldsData(held.path().to_owned())),
        Data::Empty => Ok(()),
    }
}

fn allowed(size: Bytes, path: &Path) -> Result<Bytes, VolumeError> {
    size.whole_sectors()
        .filter(|rounded| rounded.0 > 0)
        .ok_or_else(|| VolumeError::Size {
            path: path.to_owned(),
            size,
            reason: "a disk has at least one sector of 512 bytes, and less than 16 EiB".to_owned(),
        })
}

fn impossible(error: LayoutError, request: &CreateRequest, size: Bytes) -> VolumeError {
    let path = request.path.clone();
    match error {
        LayoutError::BackingName { name, room } => VolumeError::BackingName {
            path,
            backing: name.into(),
            reason: format!("the header has room for a name of {room} bytes; use larger clusters"),
        },
        LayoutError::TooLarge { most } => VolumeError::Size {
            path,
            size,
            reason: format!(
                "with clusters of {} a disk has {most} at the most; use larger clusters",
                Bytes(request.cluster_size.bytes())
            ),
        },
    }
}

fn backing_name(request: &CreateRequest) -> Result<Option<BackingName>, VolumeError> {
    let Some(backing) = &request.backing else {
        return Ok(None);
    };
    let refused = |reason: &str| VolumeError::BackingName {
        path: request.path.clone(),
        backing: backing.path.clone(),
        reason: reason.to_owned(),
    };
    let name = backing
        .path
        .to_str()
        .ok_or_else(|| refused("its name is not UTF-8"))?;
    if local_file_name(name) != Some(name) {
        return Err(refused(
            "QEMU would take its name for a protocol; write ./ before it",
        ));
    }
    let found = open_backing(request, backing)?.format()?;
    let fits = match backing.format {
        DeclaredFormat::Qcow2 => matches!(found, Format::Qcow2 | Format::Qcow2Luks1),
        DeclaredFormat::Raw => found == Format::Raw,
    };
    if !fits {
        return Err(refused(&format!(
            "it is {}, not {}",
            found.as_str(),
            backing.format
        )));
    }
    Ok(Some(BackingName {
        name: name.to_owned(),
        format: Some(backing.format.as_str().to_owned()),
    }))
}

fn open_backing(request: &CreateRequest, backing: &Backing) -> Result<Image, VolumeError> {
    let directory = request.path.parent().unwrap_or(Path::new(""));
    Image::open(&named_by_root(&directory.join(&backing.path))?)
}

fn named_by_root(path: &Path) -> Result<PermittedPath, VolumeError> {
    PermittedPath::named_by_root(path).map_err(|source| VolumeError::unreachable(path, source))
}
