//! Domain XML to a [`Domain`] and back.
//!
//! The hook hands the XML of a VM that is about to start, the commands hand what libvirt dumps; both come from
//! people who may write anything, so reading is bounded (length, nodes, and what `xml_bounds` says, before the parser sees
//! it) and every error names its place. Writing is in [`edit`]: it changes ranges of the original text, so what virtseal
//! does not know stays as it was, byte for byte.
//!
//! Everything here is a pure function of the text.

mod arguments;
mod declared;
pub(crate) mod edit;
mod error;
mod firmware;
pub(crate) mod jobs;
mod metadata;
mod named;
mod objects;
pub(crate) mod overlays;
mod policy;
mod read;
mod side_doors;
mod splice;
#[cfg(test)]
mod tests;
mod xml;

use std::path::{Path, PathBuf};

use crate::model::envelope::{EnvelopeId, VmId};

pub(crate) use declared::DeclaredFormat;
pub(crate) use error::{DomainError, Position};
pub(crate) use firmware::{FirmwareWish, LaunchSecurity};
pub(crate) use metadata::Metadata;
pub(crate) use named::named_secrets;
pub(crate) use objects::{
    Object, ObjectRef, ObjectState, Refusal, encrypted_layers, is_overlay, objects, sealed_objects_under,
};
pub(crate) use policy::{Permission, Policy, PolicyKey};
pub(crate) use side_doors::{Rule, SideDoor};
pub(crate) use xml::{names_path, parse_document};

/// What virtseal needs to know of a libvirt domain (<https://libvirt.org/formatdomain.html>).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Domain {
    pub uuid: VmId,
    pub name: String,
    pub firmware: Firmware,
    pub disks: Vec<Disk>,
    pub tpm: Option<Tpm>,
    /// Ways for plaintext beside the objects.
    pub side_doors: Vec<SideDoor>,
    /// What virtseal wrote; none for a VM that is not sealed.
    pub metadata: Option<Metadata>,
}

impl Domain {
    /// The most bytes of XML that are read: libvirt's own limit of a string in its protocol.
    pub(crate) const MAX_XML: usize = 4 * 1024 * 1024;
    /// The most nodes of XML that are read.
    pub(crate) const MAX_NODES: u32 = 200_000;

    /// Reads `<domain>` XML.
    ///
    /// # Errors
    /// When it is too long, not well-formed, has a DTD, is no domain, or when a part that virtseal needs is
    /// missing or makes no sense.
    pub(crate) fn parse(xml: &str) -> Result<Self, DomainError> {
        read::domain(&parse_document(xml)?)
    }

    /// Where the XML puts the vTPM's state, if not in libvirt's own directory.
    pub(crate) fn tpm_place(&self) -> Option<&Path> {
        match &self.tpm.as_ref()?.backend {
            TpmBackend::Emulator { place, .. } => place.as_deref(),
            TpmBackend::Passthrough | TpmBackend::External | TpmBackend::Other(_) => None,
        }
    }

    /// The disk with this `<target dev=…>`.
    pub(crate) fn disk(&self, target: &str) -> Option<&Disk> {
        self.disks.iter().find(|disk| disk.target == target)
    }
}

/// How the guest boots, as far as the XML tells.
#[expect(clippy::large_enum_variant, reason = "there is one of a domain")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Firmware {
    /// The emulator's default BIOS.
    Bios,
    /// A `<loader type='rom'>` at this path, without a variable store.
    Rom(PathBuf),
    /// UEFI, on pflash.
    Uefi(Uefi),
}

/// UEFI as the XML has it.
///
/// With `<os firmware='efi'>` libvirt chooses loader and variable store itself: libvirt 11 writes them into the
/// XML when the domain is defined, libvirt 9 only when it starts. Until then they are `None` here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Uefi {
    /// `<loader>`, if it is there with a path.
    pub loader: Option<PathBuf>,
    /// `<loader stateless='yes'>`: there is no variable store.
    pub stateless: bool,
    /// `<nvram>`, if it is there.
    pub nvram: Option<Nvram>,
    /// What libvirt chooses by, where that is left to it.
    pub wish: FirmwareWish,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Nvram {
    /// Where it is; [`Source::Empty`] while libvirt is to choose.
    pub source: Source,
    /// The file it is first copied from.
    pub template: Option<PathBuf>,
    /// `format=…`: `raw` if absent.
    pub format: Option<String>,
    pub encryption: Option<Encryption>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Disk {
    /// `<target dev=…>`, such as `vda`; unique in a domain.
    pub target: String,
    /// What the guest sees.
    pub device: DiskDevice,
    /// Where the data is.
    pub source: Source,
    /// `<driver type=…>`: `raw`, `qcow2`, …
    pub format: Option<String>,
    /// `<readonly/>`, and always so for a CD.
    pub readonly: bool,
    /// `<transient/>`: libvirt puts a throw-away overlay on it.
    pub transient: bool,
    /// What its `<source>` says of where in the file or beside it the data is.
    pub layout: Layout,
    pub encryption: Option<Encryption>,
    /// The layers below, where the XML names them.
    pub backing: Vec<BackingLayer>,
}

/// Where the data of a disk is, as its `<source>` tells besides the file. What is said there is about one image and would outlive it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// The file is the image.
    Whole,
    /// `<slices>`: the image is a part of the file.
    Slices,
    /// `<dataStore>`: the data is in another file.
    DataStore,
}

impl Layout {
    /// Why such a disk can't be sealed, as a predicate.
    pub(crate) fn objection(self) -> Option<&'static str> {
        match self {
            Self::Whole => None,
            Self::Slices => Some("has <slices>, by which it is only a part of its file"),
            Self::DataStore => Some("has a <dataStore>, which keeps its data in another file"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DiskDevice {
    /// A hard disk.
    Disk,
    /// A CD or DVD.
    Cdrom,
    /// A floppy disk.
    Floppy,
    /// A SCSI LUN passed through.
    Lun,
}

/// One `<backingStore>`: read by the guest, never written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BackingLayer {
    /// Where the data is.
    pub source: Source,
    pub encryption: Option<Encryption>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// None: an empty drive.
    Empty,
    File(PathBuf),
    Block(PathBuf),
    /// A host directory shown as a FAT disk.
    Dir(PathBuf),
    /// A volume of a storage pool: libvirt finds its path.
    Volume {
        pool: String,
        volume: String,
    },
    /// What has no path here: on the network, or of another type.
    Elsewhere,
}

impl Source {
    /// The path on this host, if it has one.
    pub(crate) fn path(&self) -> Option<&Path> {
        match self {
            Self::File(path) | Self::Block(path) | Self::Dir(path) => Some(path),
            Self::Empty | Self::Volume { .. } | Self::Elsewhere => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Encryption {
    /// `luks`, `qcow`, …
    pub format: String,
    /// `qemu`, `librbd`, or libvirt's choice.
    pub engine: Option<String>,
    pub secret: SecretRef,
}

/// The `<secret>` in an `<encryption>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SecretRef {
    /// By UUID: the only form that virtseal writes.
    Uuid(EnvelopeId),
    /// By usage: a secret that somebody else keeps.
    Usage,
    /// There is none.
    Missing,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tpm {
    /// What stands behind it.
    pub backend: TpmBackend,
}

impl Tpm {
    /// Why a vTPM whose state is in a place of its own can't be sealed, as a predicate.
    pub(crate) const STATE_ELSEWHERE: &str =
        "has its state in a place of its own (<source> in its <backend>), which virtseal can't seal yet";
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TpmBackend {
    /// swtpm, run by libvirt.
    Emulator {
        /// `1.2`, `2.0`, or libvirt's default.
        version: Option<String>,
        /// `<encryption secret=…/>`.
        secret: Option<EnvelopeId>,
        /// `persistent_state='yes'`: libvirt keeps the state when a transient domain ends, or is refused.
        persistent_state: bool,
        /// `<source file=…>` or `<source path=…>`: where its state is, if not in libvirt's own directory.
        place: Option<PathBuf>,
    },
    /// The host's TPM.
    Passthrough,
    /// An swtpm that somebody else runs.
    External,
    /// Another type, by its name.
    Other(String),
}
