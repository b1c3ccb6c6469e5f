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
pub struct Object {
    /// What it is.
    pub kind: ObjectKind,
    /// Its name in messages: `disk vda`, `vtpm`, `nvram`.
    pub label: String,
    /// Its file or device, if the XML names one.
    pub path: Option<PathBuf>,
    /// How it stands.
    pub state: ObjectState,
}

/// How an [`Object`] stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectState {
    /// Encrypted with this envelope's DEK.
    Sealed(EnvelopeId),
    /// Not encrypted.
    Plain,
    /// In a form that virtseal can't vouch for.
    Unsupported(&'static str),
}

/// An object that needs its DEK at a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectRef {
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
pub enum Refusal {
    /// It has no virtseal metadata.
    #[error("VM {vm} is not sealed")]
    NotSealed {
        /// The VM's name.
        vm: String,
    },
    /// An object would be written in plaintext.
    #[error("{label}{} of sealed VM {vm} is not encrypted", in_file(.path.as_ref()))]
    Plain {
        /// The VM's name.
        vm: String,
        /// What it is.
        kind: ObjectKind,
        /// The object.
        label: String,
        /// The file or device of a disk, if the XML names one.
        path: Option<PathBuf>,
    },
    /// An object has a form that virtseal can't vouch for.
    #[error("{label} of sealed VM {vm} {reason}")]
    Unsupported {
        /// The VM's name.
        vm: String,
        /// The object.
        label: String,
        /// Why, as a predicate.
        reason: &'static str,
    },
}

fn in_file(path: Option<&PathBuf>) -> String {
    path.map(|path| format!(" ({})", path.display()))
        .unwrap_or_default()
}

/// Every object of the domain that keeps what the guest writes, sealed or not.
#[must_use]
pub fn objects(domain: &Domain) -> Vec<Object> {
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
/// The first reason why it must not start at all.
pub fn sealed_objects(domain: &Domain) -> Result<Vec<ObjectRef>, Refusal> {
    sealed_objects_under(domain, Policy::default())
}

/// As [`sealed_objects`], where the host's policy may allow more.
///
/// # Errors
/// Those of [`sealed_objects`].
pub fn sealed_objects_under(domain: &Domain, policy: Policy) -> Result<Vec<ObjectRef>, Refusal> {
    let vm = || domain.name.clone();
    if domain.metadata.is_none() {
        return Err(Refusal::NotSealed { vm: vm() });
    }
    let mut needed = Vec::new();
    for Object {
        kind,
        label,
        path,
        state,
    } in objects(domain)
    {
        match state {
            ObjectState::Sealed(secret) => needed.push(ObjectRef {
                kind,
                label,
                secret,
                path,
            }),
            // Never the variable store or the vTPM.
            ObjectState::Plain if kind == ObjectKind::Disk && policy.allows(PolicyKey::MixedDisks) => {}
            ObjectState::Plain => {
                return Err(Refusal::Plain {
                    vm: vm(),
                    kind,
                    label,
                    path: path.filter(|_| kind == ObjectKind::Disk),
                });
            }
            ObjectState::Unsupported(reason) => {
                return Err(Refusal::Unsupported {
                    vm: vm(),
                    label,
                    reason,
                });
            }
        }
    }
    needed.extend(domain.disks.iter().flat_map(read_only_layers));
    Ok(needed)
}

/// The files that are encrypted, with the envelope that opens each: disks, what they are based on, the variable store.
#[must_use]
pub fn encrypted_layers(domain: &Domain) -> Vec<(EnvelopeId, PathBuf)> {
    let below = domain.disks.iter().flat_map(read_only_layers);
    let below = below.filter_map(|layer| Some((layer.secret, layer.path?)));
    let objects = objects(domain).into_iter();
    let sealed = objects.filter_map(|object| match object.state {
        ObjectState::Sealed(id) => Some((id, object.path?)),
        ObjectState::Plain | ObjectState::Unsupported(_) => None,
    });
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
