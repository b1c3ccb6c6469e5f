//! The overlays of a VM that is off. Its images are held from before the first byte is written until the domain is redefined: no QEMU
//! opens them meanwhile.

use std::ops::ControlFlow;
use std::path::Path;

use super::Overlaid;
use crate::domain::{DeclaredFormat, names_path};
use crate::host::libvirt::KeptXml;
use crate::host::permitted::PermittedPath;
use crate::model::advice::Advice;
use crate::model::envelope::VmId;
use crate::model::problem::{Problem, chain};
use crate::object::disk::{self, Base, Below, Format, Heard, ImageLock, Layer, VolumeError};
use crate::secret::Passphrase;
use crate::terminal::word;
use crate::vm::host::Host;
use crate::vm::seal::NewObject;

/// A disk whose images nobody opens until this is dropped.
#[derive(Debug)]
pub(crate) struct HeldDisk {
    base: ImageLock,
    /// The topmost first.
    overlays: Vec<ImageLock>,
    passphrase: Passphrase,
}

impl HeldDisk {
    /// Takes hold of them, and opens the base with its key.
    ///
    /// # Errors
    /// When one of them is in use, or the base does not open.
    pub(crate) fn take(host: &Host<'_>, disk: &Overlaid) -> Result<Self, Problem> {
        let passphrase = NewObject::open(host, &disk.record)?.passphrase()?;
        let base = ImageLock::open(&disk.base)?;
        base.verify(&passphrase)?;
        Ok(Self {
            base,
            overlays: hold_overlays(disk)?,
            passphrase,
        })
    }

    /// Merges them into the base, the lowest first: what is above reads the same then without it. `watch` gets the bytes that are done,
    /// of all that the overlays have. Says whether it got through.
    ///
    /// # Errors
    /// [`VolumeError`]; the disk is what it was as long as its overlays are there.
    pub(crate) fn merge(
        &self,
        host: &Host<'_>,
        disk: &Overlaid,
        mut watch: impl FnMut(u64) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, Problem> {
        let base = self.base(host, disk)?;
        let mut done = 0.0;
        for overlay in self.overlays.iter().rev() {
            let len = overlay.file().metadata().map_or(0, |found| found.len()) as f64;
            // Reading all of both once more is the second half.
            let mut half = |begun: f64, heard: Heard| {
                let percent = match heard {
                    Heard::Done(percent) => percent.0,
                    Heard::Stuck(_) => 100.0,
                };
                watch((done + len * (begun + f64::from(percent) / 200.0)) as u64)
            };
            let merged = disk::merge(overlay, &base, |heard| half(0.0, heard))
                .and_then(|()| disk::verify_merged(overlay, &base, |heard| half(0.5, heard)));
            match merged {
                Err(VolumeError::Stopped(_)) => return Ok(ControlFlow::Break(())),
                merged => merged?,
            }
            done += len;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Reads the disk through all overlays, and the base alone, and writes nothing. `watch` is as for [`HeldDisk::merge`].
    ///
    /// # Errors
    /// When the base has not what the overlays have.
    pub(crate) fn compare(
        &self,
        host: &Host<'_>,
        disk: &Overlaid,
        mut watch: impl FnMut(u64) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, Problem> {
        let base = self.base(host, disk)?;
        let all: Vec<_> = self.overlays.iter().collect();
        match disk::verify_all(&all, &base, |_| watch(0)) {
            Err(VolumeError::Stopped(_)) => Ok(ControlFlow::Break(())),
            compared => Ok(ControlFlow::Continue(compared?)),
        }
    }

    fn base(&self, host: &Host<'_>, disk: &Overlaid) -> Result<Base<'_>, Problem> {
        let vm = disk.record.envelope.vm;
        let below = disk.below.iter().map(|layer| open_below(host, vm, layer));
        Ok(Base {
            held: &self.base,
            passphrase: &self.passphrase,
            below: below.collect::<Result<_, _>>()?,
        })
    }

    /// Removes the overlays, which the domain no longer names.
    pub(crate) fn remove_overlays(self) -> Result<(), Problem> {
        remove(self.overlays)
    }
}

/// Takes hold of the overlays alone, which nobody has open any more.
pub(crate) fn hold_overlays(disk: &Overlaid) -> Result<Vec<ImageLock>, Problem> {
    let held = disk.overlays.iter().map(ImageLock::open);
    Ok(held.collect::<Result<_, _>>()?)
}

/// Whether somebody has the base open, and nobody any overlay: where QEMU keeps its locks, it has merged them.
pub(crate) fn has_base_alone(disk: &Overlaid) -> bool {
    let is_in_use = |error: &VolumeError| matches!(error, VolumeError::InUse(_));
    hold_overlays(disk).is_ok() && ImageLock::open(&disk.base).is_err_and(|error| is_in_use(&error))
}

/// Takes hold of an overlay that a job has left behind, if it is still a plain one on `base` and no XML names it.
pub(crate) fn hold_left(
    host: &Host<'_>,
    vm: VmId,
    path: &Path,
    base: &Path,
) -> Result<Option<ImageLock>, Problem> {
    let is_named = |kept: &KeptXml| kept.snapshot.is_none() && names_path(&kept.xml, path);
    if host.kept.iter().any(is_named) {
        return Ok(None);
    }
    let place = match host.paths.permit(path) {
        Ok(place) => place,
        Err(error) if error.is_missing() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if !place.exists() {
        return Ok(None);
    }
    let (layers, _) = host.layers_of(vm, &place)?;
    let is_overlay = layers.first().is_some_and(|top| top.format == Format::Qcow2)
        && layers.iter().skip(1).any(|layer| layer.path == base);
    Ok(is_overlay.then(|| ImageLock::open(&place)).transpose()?)
}

/// Removes files that are still those that are held.
pub(crate) fn remove(overlays: Vec<ImageLock>) -> Result<(), Problem> {
    for overlay in overlays {
        disk::remove(&overlay).map_err(|error| {
            let shown = overlay.path().display().to_string();
            let what = format!("{shown} is merged, and stays: {}", chain(&error));
            Problem::failed(what).next(Advice::from(format!("remove {}", word(shown))))
        })?;
    }
    Ok(())
}

fn open_below(host: &Host<'_>, vm: VmId, layer: &Layer) -> Result<Below, Problem> {
    let place = host.permit_known(vm, &layer.path)?;
    let (format, passphrase) = match layer.format {
        Format::Raw => (DeclaredFormat::Raw, None),
        Format::Qcow2 => (DeclaredFormat::Qcow2, None),
        Format::Qcow2Luks1 => (DeclaredFormat::Qcow2, Some(passphrase_of(host, vm, &place)?)),
        Format::Luks1 | Format::Luks2 => {
            let what = format!(
                "{} is encrypted, and not an image of virtseal",
                layer.path.display()
            );
            return Err(Problem::failed(what).next(Advice::ShowVolume(layer.path.clone())));
        }
    };
    Ok(Below::open(&place, format, passphrase)?)
}

/// Anybody who writes an image names what is below it: what a merge copies up from there is for this VM to read.
fn passphrase_of(host: &Host<'_>, vm: VmId, place: &PermittedPath) -> Result<Passphrase, Problem> {
    let (_, copy) = disk::identify(place)?;
    let record = match copy.envelope() {
        Some(carried) => host.keystore.envelope(carried.id)?,
        None => None,
    };
    let path = place.shown();
    let Some(record) = record else {
        let what = format!(
            "{} is encrypted, and no envelope of it is known here",
            path.display()
        );
        return Err(Problem::not_found(what).next(Advice::ShowVolume(path.to_owned())));
    };
    if !record.envelope.serves(vm) {
        let (path, owner) = (path.display(), record.envelope.vm);
        let what = format!("{path} is below its disk, and belongs to VM {owner}, which does not share it");
        return Err(Problem::failed(what).next(Advice::ShowVolume(place.shown().to_owned())));
    }
    NewObject::open(host, &record)?.passphrase()
}
