//! Which parts of a VM hold its data, and whether each may start as it is.
//!
//! A sealed VM starts only when nothing that the guest writes would land on the host in plaintext.

use std::path::{Path, PathBuf};

use thiserror::Error;

use super::{
    Disk, DiskDevice, Domain, Encryption, Firmware, Policy, PolicyKey, SecretRef, Source, Tpm, TpmBackend,
    Uefi,
};
use crate::model::envelope::{EnvelopeId, ObjectKind};

/// A disk, TPM or variable store that keeps what the guest writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Object {
    pub kind: ObjectKind,
    /// Its name in messages: `disk vda`, `vtpm`, `nvram`.
    pub label: String,
    /// Its file or device, if the XML names one.
    pub path: Option<PathBuf>,
    pub state: ObjectState,
}

impl Object {
    /// The envelope that opens it; none if it is not sealed.
    pub(crate) fn envelope(&self) -> Option<EnvelopeId> {
        match self.state {
            ObjectState::Sealed(id) => Some(id),
            ObjectState::Plain | ObjectState::Unsupported(_) => None,
        }
    }

    /// With the libvirt secret that the XML names for it.
    pub(crate) fn with(self, secret: EnvelopeId) -> ObjectRef {
        ObjectRef {
            kind: self.kind,
            label: self.label,
            secret,
            path: self.path,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ObjectState {
    /// Encrypted with this envelope's DEK.
    Sealed(EnvelopeId),
    Plain,
    /// In a form that virtseal can't vouch for.
    Unsupported(&'static str),
}

/// An object that needs its DEK at a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ObjectRef {
    /// What it is: its envelope must be of the same kind.
    pub kind: ObjectKind,
    /// Its name in messages: `disk vda`, `disk vda (backing layer 1)`, `vtpm`, `nvram`.
    pub label: String,
    /// The libvirt secret that the XML names, and thus the envelope.
    pub secret: EnvelopeId,
    /// Its file or device, if the XML names one.
    pub path: Option<PathBuf>,
}

/// Why a sealed VM must not start as it is.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum Refusal {
    #[error("VM {vm} is not sealed")]
    NotSealed { vm: String },
    #[error("{label}{} of sealed VM {vm} is not encrypted", in_file(.path.as_ref()))]
    Plain {
        vm: String,
        kind: ObjectKind,
        label: String,
        /// The file or device of a disk, if the XML names one.
        path: Option<PathBuf>,
    },
    /// A disk would be written in plaintext, on top of what is sealed.
    #[error("{label} of sealed VM {vm} has a plain overlay, {}", path.display())]
    Overlaid {
        vm: String,
        label: String,
        path: PathBuf,
    },
    /// An object has a form that virtseal can't vouch for.
    #[error("{label} of sealed VM {vm} {reason}")]
    Unsupported {
        vm: String,
        label: String,
        reason: &'static str,
    },
}

fn in_file(path: Option<&PathBuf>) -> String {
    path.map(|path| format!(" ({})", path.display()))
        .unwrap_or_default()
}

/// Every object of the domain that keeps what the guest writes, sealed or not.
pub(crate) fn objects(domain: &Domain) -> Vec<Object> {
    let disks = domain
        .disks
        .iter()
        .filter(|disk| keeps_data(disk))
        .map(disk_object);
    let nvram = match &domain.firmware {
        Firmware::Uefi(uefi) => nvram_object(uefi),
        Firmware::Bios | Firmware::Rom(_) => None,
    };
    disks
        .chain(domain.tpm.as_ref().and_then(tpm_object))
        .chain(nvram)
        .collect()
}

/// What a start of this sealed VM needs a DEK for: its objects, then encrypted layers that a disk is based on.
///
/// # Errors
/// The first reason why it must not start at all under `policy`.
pub(crate) fn sealed_objects_under(domain: &Domain, policy: Policy) -> Result<Vec<ObjectRef>, Refusal> {
    if domain.metadata.is_none() {
        let vm = domain.name.clone();
        return Err(Refusal::NotSealed { vm });
    }
    let mut needed = Vec::new();
    for object in objects(domain) {
        let (kind, vm) = (object.kind, domain.name.clone());
        match object.state {
            ObjectState::Sealed(secret) => needed.push(object.with(secret)),
            // Never the variable store or the vTPM.
            ObjectState::Plain if kind == ObjectKind::Disk && policy.allows(PolicyKey::MixedDisks) => {}
            ObjectState::Plain => {
                let path = object.path.filter(|_| kind == ObjectKind::Disk);
                let label = object.label;
                if let Some(path) = path.as_ref().filter(|path| is_overlay(domain, path)) {
                    let path = path.clone();
                    return Err(Refusal::Overlaid { vm, label, path });
                }
                return Err(Refusal::Plain {
                    vm,
                    kind,
                    label,
                    path,
                });
            }
            ObjectState::Unsupported(reason) => {
                let label = object.label;
                return Err(Refusal::Unsupported { vm, label, reason });
            }
        }
    }
    needed.extend(domain.disks.iter().flat_map(read_only_layers));
    Ok(needed)
}

/// Whether the image of a disk lies over a sealed one, by what the XML names below it.
pub(crate) fn is_overlay(domain: &Domain, path: &Path) -> bool {
    let of_path = |disk: &&Disk| disk.source.path() == Some(path);
    let mut below = domain.disks.iter().filter(of_path).flat_map(|disk| &disk.backing);
    below.any(|layer| layer.encryption.is_some())
}

/// The files that are encrypted, with the envelope that opens each: disks, what they are based on, the variable store.
pub(crate) fn encrypted_layers(domain: &Domain) -> Vec<(EnvelopeId, PathBuf)> {
    let below = domain.disks.iter().flat_map(read_only_layers);
    let below = below.filter_map(|layer| Some((layer.secret, layer.path?)));
    let objects = objects(domain).into_iter();
    let sealed = objects.filter_map(|object| Some((object.envelope()?, object.path?)));
    sealed.chain(below).collect()
}

fn keeps_data(disk: &Disk) -> bool {
    !disk.readonly && disk.source != Source::Empty
}

fn disk_object(disk: &Disk) -> Object {
    let state = if disk.transient {
        ObjectState::Unsupported("is transient, so libvirt would put a plaintext overlay on it")
    } else if let Some(objection) = disk.layout.objection() {
        ObjectState::Unsupported(objection)
    } else {
        encrypted(disk.encryption.as_ref(), disk.device)
    };
    Object {
        kind: ObjectKind::Disk,
        label: format!("disk {}", disk.target),
        path: disk.source.path().map(Path::to_owned),
        state,
    }
}

fn encrypted(encryption: Option<&Encryption>, device: DiskDevice) -> ObjectState {
    match encryption {
        None => ObjectState::Plain,
        Some(_) if device == DiskDevice::Lun => {
            ObjectState::Unsupported("is a LUN passed through, which QEMU does not encrypt")
        }
        Some(encryption) => match luks_secret(encryption) {
            Ok(id) => ObjectState::Sealed(id),
            Err(reason) => ObjectState::Unsupported(reason),
        },
    }
}

fn luks_secret(encryption: &Encryption) -> Result<EnvelopeId, &'static str> {
    match (&encryption.secret, encryption.format.as_str()) {
        (SecretRef::Uuid(id), "luks") => Ok(*id),
        (_, "luks") => Err("has an <encryption> without the UUID of a secret"),
        _ => Err("has an <encryption> in another format than luks"),
    }
}

fn tpm_object(tpm: &Tpm) -> Option<Object> {
    let state = match &tpm.backend {
        TpmBackend::Emulator { place: Some(_), .. } => ObjectState::Unsupported(Tpm::STATE_ELSEWHERE),
        TpmBackend::Emulator { secret: Some(id), .. } => ObjectState::Sealed(*id),
        TpmBackend::Emulator { secret: None, .. } => ObjectState::Plain,
        // The host's TPM keeps its state inside the chip.
        TpmBackend::Passthrough => return None,
        TpmBackend::External => ObjectState::Unsupported("is run outside of libvirt, its state may be plain"),
        TpmBackend::Other(_) => ObjectState::Unsupported("has a backend that virtseal does not know"),
    };
    Some(Object {
        kind: ObjectKind::Vtpm,
        label: "vtpm".into(),
        path: None,
        state,
    })
}

fn nvram_object(uefi: &Uefi) -> Option<Object> {
    if uefi.stateless {
        return None;
    }
    let encryption = uefi.nvram.as_ref().and_then(|nvram| nvram.encryption.as_ref());
    let state = match encryption {
        Some(found) if found.engine.as_deref() != Some("qemu") => {
            ObjectState::Unsupported("has an <encryption> without engine='qemu', which QEMU would ignore")
        }
        found => encrypted(found, DiskDevice::Disk),
    };
    let path = uefi.nvram.as_ref().and_then(|nvram| nvram.source.path());
    Some(Object {
        kind: ObjectKind::Nvram,
        label: "nvram".into(),
        path: path.map(Path::to_owned),
        state,
    })
}

/// The encrypted among what the guest only reads: read-only disks, and the layers below a disk. A key that
/// libvirt finds by usage is somebody else's.
fn read_only_layers(disk: &Disk) -> impl Iterator<Item = ObjectRef> {
    let top = (disk.readonly && disk.source != Source::Empty).then(|| {
        (
            format!("disk {}", disk.target),
            &disk.source,
            disk.encryption.as_ref(),
        )
    });
    let below = disk.backing.iter().zip(1..).map(|(layer, number)| {
        let label = format!("disk {} (backing layer {number})", disk.target);
        (label, &layer.source, layer.encryption.as_ref())
    });
    top.into_iter()
        .chain(below)
        .filter_map(|(label, source, encryption)| {
            Some(ObjectRef {
                kind: ObjectKind::Disk,
                label,
                secret: luks_secret(encryption?).ok()?,
                path: source.path().map(Path::to_owned),
            })
        })
}
