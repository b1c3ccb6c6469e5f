//! Which sealed disks have plain overlays: by the XML, and by what the images name below them.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::{OverlaidDisk, modified};
use crate::domain::overlays::ExternalSnapshot;
use crate::domain::{Disk, Domain};
use crate::host::permitted::{PathError, PermittedPath};
use crate::model::advice::Advice;
use crate::model::deadlines::image::GOES_OVER;
use crate::model::envelope::{ObjectKind, VmId};
use crate::model::problem::Problem;
use crate::object::disk::{self, Format, Layer, VolumeError};
use crate::store::EnvelopeRecord;
use crate::terminal::word;
use crate::vm::host::Host;
use crate::vm::seal::OtherUses;

/// A sealed disk with plain overlays on it.
#[derive(Debug)]
pub(crate) struct Overlaid {
    /// Its `<target dev=…>`.
    pub target: String,
    /// The topmost first.
    pub overlays: Vec<PermittedPath>,
    /// The sealed image.
    pub base: PermittedPath,
    /// Of the sealed image.
    pub record: EnvelopeRecord,
    /// What the sealed image is based on in turn.
    pub below: Vec<Layer>,
}

impl Overlaid {
    pub(crate) fn paths(&self) -> OverlaidDisk {
        OverlaidDisk {
            target: self.target.clone(),
            base: self.base.shown().to_owned(),
            overlays: self
                .overlays
                .iter()
                .map(|overlay| overlay.shown().to_owned())
                .collect(),
        }
    }

    /// How much the overlays have, by their files.
    pub(super) fn bytes(&self) -> u64 {
        let lengths = self.overlays.iter().filter_map(|overlay| overlay.metadata().ok());
        lengths.map(|found| found.len()).sum()
    }

    /// When the first overlay was made, where the file system tells.
    pub(super) fn since(&self) -> Option<SystemTime> {
        self.overlays.last()?.metadata().ok()?.created().ok()
    }

    /// Whether the base changed after the first overlay was made, and `later` than that: nobody writes there as long as nothing is
    /// merged, but for its header.
    pub(super) fn was_written_since(&self, later: Duration) -> bool {
        let base = modified(&self.base.handle());
        self.since()
            .zip(base)
            .is_some_and(|(since, base)| base > since + later)
    }

    /// Whether the base was written to after its topmost overlay was for the last time, and not just then, or may have been. Where QEMU has gone over to the
    /// base by a command of somebody else, and libvirtd has died in it, an XML goes on naming the overlay.
    pub(super) fn has_newer_base(&self) -> bool {
        let base = modified(&self.base.handle());
        let top = self.overlays.first().and_then(|top| modified(&top.handle()));
        top.zip(base).is_none_or(|(top, base)| base > top + GOES_OVER)
    }

    pub(super) fn is_on_device(&self) -> bool {
        self.base
            .metadata()
            .is_ok_and(|found| found.file_type().is_block_device())
    }
}

/// Every sealed disk of the domain that has plain overlays.
pub(crate) fn find(host: &Host<'_>, domain: &Domain) -> Result<Vec<Overlaid>, Problem> {
    let others = OtherUses::among(&host.kept, domain.uuid);
    let mut found: Vec<Overlaid> = Vec::new();
    let plain = |disk: &&Disk| !disk.readonly && disk.encryption.is_none();
    for disk in domain.disks.iter().filter(plain) {
        let Some(path) = disk.source.path() else { continue };
        let of_disk = |failure: Problem| failure.of(format!("disk {}", disk.target));
        let Some(overlaid) = overlaid(host, domain, &disk.target, path).map_err(of_disk)? else {
            continue;
        };
        let images = || overlaid.overlays.iter().chain([&overlaid.base]);
        for image in images() {
            others.refuse_users_of(image, domain).map_err(of_disk)?;
            refuse_two_users(domain, &found, disk, image.shown()).map_err(of_disk)?;
        }
        found.push(overlaid);
    }
    Ok(found)
}

/// None for a disk that is plain in another way.
fn overlaid(
    host: &Host<'_>,
    domain: &Domain,
    target: &str,
    path: &Path,
) -> Result<Option<Overlaid>, Problem> {
    let records = host.keystore.envelopes_of(domain.uuid)?.sound;
    let known: Vec<_> = records.iter().map(|record| &record.location).collect();
    let permit =
        |path: &Path| -> Result<PermittedPath, PathError> { host.paths.permit_known(path, known.iter()) };
    let top = permit(path)?;
    let (mut layers, end) = disk::known_layers(&top, |path| Ok(permit(path)?));
    let sealed = layers.iter().position(|layer| layer.encrypted);
    let Some(at) = sealed.filter(|at| *at > 0) else {
        return match (sealed, end) {
            (None, Some(error)) => Err(error.into()),
            _ => Ok(None),
        };
    };
    if let Some(error) = end {
        return Err(error.into());
    }
    let mut below = layers.split_off(at);
    let base = below.remove(0);
    let shown = base.path.display();
    if base.format != Format::Qcow2Luks1 {
        let what = format!("it is based on {shown}, which is encrypted, and not an image of virtseal");
        return Err(Problem::failed(what).next(Advice::ShowVolume(base.path.clone())));
    }
    let place = permit(&base.path)?;
    let record = record_of(host, domain.uuid, &place, &records)?;
    let overlays = layers
        .iter()
        .map(|layer| permit(&layer.path))
        .collect::<Result<_, _>>()?;
    Ok(Some(Overlaid {
        target: target.to_owned(),
        overlays,
        base: place,
        record,
        below,
    }))
}

/// By the envelope that the image carries, else by where the keystore has it. Whoever wrote an overlay has named the image.
fn record_of(
    host: &Host<'_>,
    vm: VmId,
    base: &PermittedPath,
    records: &[EnvelopeRecord],
) -> Result<EnvelopeRecord, Problem> {
    let (_, copy) = disk::identify(base)?;
    let known = match copy.envelope() {
        Some(carried) => host.keystore.envelope(carried.id)?,
        None => {
            let here = |record: &&EnvelopeRecord| {
                record.envelope.kind == ObjectKind::Disk && Path::new(&record.location) == base.shown()
            };
            records.iter().rfind(here).cloned()
        }
    };
    known.filter(|record| record.envelope.vm == vm).ok_or_else(|| {
        let what = format!(
            "it is based on {}, which is not a sealed image of this VM",
            base.shown().display()
        );
        Problem::not_found(what).next(Advice::ShowVolume(base.shown().to_owned()))
    })
}

/// What is written to for one disk, another one must not be reading.
fn refuse_two_users(domain: &Domain, found: &[Overlaid], disk: &Disk, image: &Path) -> Result<(), Problem> {
    let names = |other: &&Disk| {
        let below = other.backing.iter().map(|layer| &layer.source);
        let mut sources = below.chain([&other.source]);
        other.target != disk.target && sources.any(|source| source.path() == Some(image))
    };
    let by_xml = domain.disks.iter().find(names).map(|other| &other.target);
    let by_image = || {
        let has_it = |other: &&Overlaid| other.base.shown() == image;
        found.iter().find(has_it).map(|other| &other.target)
    };
    match by_xml.or_else(by_image) {
        None => Ok(()),
        Some(other) => Err(
            Problem::failed(format!("{} is in disk {other} as well", image.display()))
                .next(Advice::EditXml(domain.name.clone()).within("give each disk an image of its own")),
        ),
    }
}

/// Refuses where a snapshot that was reverted from has an overlay of its own on the same base: that would be of no use any more.
pub(super) fn refuse_other_branches(
    host: &Host<'_>,
    vm: VmId,
    disks: &[Overlaid],
    snapshots: &[ExternalSnapshot],
) -> Result<(), Problem> {
    let goes = |path: &PathBuf| {
        let mut overlays = disks.iter().flat_map(|disk| &disk.overlays);
        overlays.any(|overlay| overlay.shown() == path)
    };
    for snapshot in snapshots {
        for overlay in snapshot.overlays.iter().filter(|path| !goes(path)) {
            let of_snapshot =
                |error: Problem| error.of(format!("{} of snapshot {}", overlay.display(), snapshot.name));
            let place = match host.place_of(vm, overlay)? {
                Err(error) if error.is_missing() => continue,
                place => place.map_err(|error| of_snapshot(error.into()))?,
            };
            let (layers, end) = host.layers_of(vm, &place)?;
            let mut layers = layers.iter().map(|layer| layer.path.as_path());
            if layers.any(|path| disks.iter().any(|disk| disk.base.shown() == path)) {
                let what = format!(
                    "{} of snapshot {} is on the same sealed image, and would be unusable once that has changed",
                    overlay.display(),
                    snapshot.name
                );
                return Err(Problem::would_lose_key(what).next(format!(
                    "remove {} first, if it is not needed any more",
                    word(overlay.display())
                )));
            }
            match end {
                // Without what is below it, it is of no use already.
                None | Some(VolumeError::NotFound(_) | VolumeError::Chain { .. }) => {}
                Some(error) => return Err(of_snapshot(error.into())),
            }
        }
    }
    Ok(())
}
