//! Domain XML to a [`Domain`] and back.
//!
//! The hook hands the XML of a VM that is about to start, the commands hand what libvirt dumps; both come from
//! people who may write anything, so reading is bounded (length, nodes, and what `xml_bounds` says, before the parser sees
//! it) and every error names its place. Writing is in [`edit`]: it changes ranges of the original text, so what virtseal
//! does not know stays as it was, byte for byte.
//!
//! Everything here is a pure function of the text.

mod declared;
pub mod edit;
mod firmware;
pub mod jobs;
mod metadata;
mod named;
mod objects;
mod policy;
mod read;
mod side_doors;
mod splice;

use std::fmt;
use std::path::{Path, PathBuf};

use roxmltree::{Document, Node, ParsingOptions};
use swtpm_state::libvirt_state_dir;
use thiserror::Error;

use crate::model::envelope::{EnvelopeError, EnvelopeId, VmId};
use crate::model::problem::{Code, Problem};
use crate::terminal::word;

pub use declared::DeclaredFormat;
pub use firmware::{FirmwareWish, LaunchSecurity};
pub use metadata::{Metadata, UnreadableCopy};
pub use named::named_secrets;
pub use objects::{
    Object, ObjectRef, ObjectState, Refusal, encrypted_layers, objects, sealed_objects, sealed_objects_under,
};
pub use policy::{Permission, Policy, PolicyKey};
pub use side_doors::{Rule, SideDoor};
pub use xml_bounds::Beyond;

/// What virtseal needs to know of a libvirt domain (<https://libvirt.org/formatdomain.html>).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// `<uuid>`.
    pub uuid: VmId,
    /// `<name>`.
    pub name: String,
    /// `<domain type=…>`: `kvm`, `qemu`, …
    pub domain_type: String,
    /// `<domain id=…>`: the VM runs, or is about to.
    pub running_id: Option<i32>,
    /// What boots it.
    pub firmware: Firmware,
    /// Every `<disk>`, in the order of the XML.
    pub disks: Vec<Disk>,
    /// The `<tpm>`, if any.
    pub tpm: Option<Tpm>,
    /// Ways for plaintext beside the objects.
    pub side_doors: Vec<SideDoor>,
    /// What virtseal wrote; none for a VM that is not sealed.
    pub metadata: Option<Metadata>,
}

impl Domain {
    /// The most bytes of XML that are read: libvirt's own limit of a string in its protocol.
    pub const MAX_XML: usize = 4 * 1024 * 1024;
    /// The most nodes of XML that are read.
    pub const MAX_NODES: u32 = 200_000;

    /// Reads `<domain>` XML.
    ///
    /// # Errors
    /// When it is too long, not well-formed, has a DTD, is no domain, or when a part that virtseal needs is
    /// missing or makes no sense.
    pub fn parse(xml: &str) -> Result<Self, DomainError> {
        read::domain(&parse_document(xml)?)
    }

    /// The directory of the vTPM's state, where `swtpm_dir` has one for each VM. Nobody else tells where that state is.
    ///
    /// # Errors
    /// When the XML puts the state elsewhere.
    pub fn vtpm_dir(&self, swtpm_dir: &Path) -> Result<PathBuf, VtpmElsewhere> {
        match &self.tpm {
            Some(Tpm {
                backend: TpmBackend::Emulator {
                    place: Some(place), ..
                },
                ..
            }) => Err(VtpmElsewhere {
                vm: self.name.clone(),
                place: place.clone(),
                usual: libvirt_state_dir(swtpm_dir, &self.uuid),
            }),
            _ => Ok(libvirt_state_dir(swtpm_dir, &self.uuid)),
        }
    }

    /// The disk with this `<target dev=…>`.
    #[must_use]
    pub fn disk(&self, target: &str) -> Option<&Disk> {
        self.disks.iter().find(|disk| disk.target == target)
    }
}

/// How the guest boots, as far as the XML tells.
#[expect(clippy::large_enum_variant, reason = "there is one of a domain")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Firmware {
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
pub struct Uefi {
    /// `<os firmware='efi'>`.
    pub autoselected: bool,
    /// `<loader>`, if it is there with a path.
    pub loader: Option<PathBuf>,
    /// `<loader secure='yes'>`.
    pub secure: bool,
    /// `<loader stateless='yes'>`: there is no variable store.
    pub stateless: bool,
    /// `<nvram>`, if it is there.
    pub nvram: Option<Nvram>,
    /// What libvirt chooses by, where that is left to it.
    pub wish: FirmwareWish,
}

/// The UEFI variable store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nvram {
    /// Where it is; [`Source::Empty`] while libvirt is to choose.
    pub source: Source,
    /// The file it is first copied from.
    pub template: Option<PathBuf>,
    /// `format=…`: `raw` if absent.
    pub format: Option<String>,
    /// How it is encrypted.
    pub encryption: Option<Encryption>,
}

/// A `<disk>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
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
    /// `<shareable/>`: other VMs may have it too.
    pub shareable: bool,
    /// `<transient/>`: libvirt puts a throw-away overlay on it.
    pub transient: bool,
    /// What its `<source>` says of where in the file or beside it the data is.
    pub layout: Layout,
    /// How it is encrypted.
    pub encryption: Option<Encryption>,
    /// The layers below, where the XML names them.
    pub backing: Vec<BackingLayer>,
}

/// Where the data of a disk is, as its `<source>` tells besides the file. What is said there is about one image and would outlive it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The file is the image.
    Whole,
    /// `<slices>`: the image is a part of the file.
    Slices,
    /// `<dataStore>`: the data is in another file.
    DataStore,
}

impl Layout {
    /// Why such a disk can't be sealed, as a predicate.
    #[must_use]
    pub fn objection(self) -> Option<&'static str> {
        match self {
            Self::Whole => None,
            Self::Slices => Some("has <slices>, by which it is only a part of its file"),
            Self::DataStore => Some("has a <dataStore>, which keeps its data in another file"),
        }
    }
}

/// `<disk device=…>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskDevice {
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
pub struct BackingLayer {
    /// Where the data is.
    pub source: Source,
    /// `<format type=…>`.
    pub format: Option<String>,
    /// How it is encrypted.
    pub encryption: Option<Encryption>,
}

/// A `<source>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// None: an empty drive.
    Empty,
    /// A file.
    File(PathBuf),
    /// A host block device.
    Block(PathBuf),
    /// A host directory shown as a FAT disk.
    Dir(PathBuf),
    /// Something on the network.
    Network {
        /// `rbd`, `nbd`, `iscsi`, …
        protocol: String,
        /// The name at the server.
        name: Option<String>,
    },
    /// A volume of a libvirt storage pool.
    Volume {
        /// The pool.
        pool: String,
        /// The volume in it.
        volume: String,
    },
    /// Another type, by its name.
    Other(String),
}

impl Source {
    /// The path on this host, if it has one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File(path) | Self::Block(path) | Self::Dir(path) => Some(path),
            _ => None,
        }
    }
}

/// An `<encryption>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encryption {
    /// `luks`, `qcow`, …
    pub format: String,
    /// `qemu`, `librbd`, or libvirt's choice.
    pub engine: Option<String>,
    /// The key.
    pub secret: SecretRef,
}

/// The `<secret>` in an `<encryption>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretRef {
    /// By UUID: the only form that virtseal writes.
    Uuid(EnvelopeId),
    /// By usage: a secret that somebody else keeps.
    Usage(String),
    /// There is none.
    Missing,
}

/// The `<tpm>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tpm {
    /// `tpm-crb`, `tpm-tis`, …
    pub model: Option<String>,
    /// What stands behind it.
    pub backend: TpmBackend,
}

/// The `<backend>` of a `<tpm>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TpmBackend {
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

/// The state of the vTPM is in a place of its own, which virtseal does not look at.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("its vTPM {}: {}", Self::REASON, place.display())]
pub struct VtpmElsewhere {
    vm: String,
    place: PathBuf,
    usual: PathBuf,
}

impl VtpmElsewhere {
    /// As a predicate.
    pub const REASON: &str =
        "has its state in a place of its own (<source> in its <backend>), which virtseal can't seal yet";
}

impl From<VtpmElsewhere> for Problem {
    fn from(error: VtpmElsewhere) -> Self {
        Self::new(Code::Failed, error.to_string()).next(format!(
            "copy the state to {}, where libvirt has it by itself, and take <source> out of <backend>: virsh edit {}",
            word(error.usual.display()),
            word(&error.vm)
        ))
    }
}

/// A place in the XML, both counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The line.
    pub line: u32,
    /// The column, in characters.
    pub column: u32,
}

impl Position {
    fn of(node: Node<'_, '_>) -> Self {
        let at = node.document().text_pos_at(node.range().start);
        Self {
            line: at.row,
            column: at.col,
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// Why domain XML can't be read or changed.
#[derive(Debug, Error)]
pub enum DomainError {
    /// Longer than [`Domain::MAX_XML`].
    #[error("the domain XML has {found} bytes, more than the {} allowed", Domain::MAX_XML)]
    TooLong {
        /// Its length in bytes.
        found: usize,
    },
    /// The parser would take too long.
    #[error("the domain XML is beyond what is read")]
    Beyond(#[source] Beyond),
    /// Not well-formed, or with too many nodes.
    #[error("the domain XML can't be read")]
    Xml(#[source] roxmltree::Error),
    /// The root element is another one.
    #[error("{at}: <{found}> is no <domain>")]
    NotADomain {
        /// Its name.
        found: String,
        /// Where.
        at: Position,
    },
    /// A needed element or attribute is missing.
    #[error("{at}: {what} is missing")]
    Missing {
        /// Which.
        what: &'static str,
        /// The element that lacks it.
        at: Position,
    },
    /// An element that may be there once is there twice.
    #[error("{at}: a second {what}")]
    Twice {
        /// Which.
        what: String,
        /// The second one.
        at: Position,
    },
    /// A value makes no sense.
    #[error("{at}: {found:?} is no {what}")]
    Value {
        /// What it should be.
        what: &'static str,
        /// What it is.
        found: String,
        /// Where.
        at: Position,
    },
    /// One of the envelopes in the metadata.
    #[error("{at}: the envelope {which} in the metadata can't be read")]
    Envelope {
        /// Its id, or its number if it has none.
        which: String,
        /// Where.
        at: Position,
        /// Why.
        #[source]
        source: EnvelopeError,
    },
    /// An element's id and the envelope in it differ.
    #[error("{at}: the metadata calls an envelope {stated}, but it is {found}")]
    EnvelopeName {
        /// The element's.
        stated: String,
        /// The envelope's.
        found: EnvelopeId,
        /// Where.
        at: Position,
    },
    /// The plan names an object that is not there.
    #[error("the domain has no {0}")]
    NoObject(String),
    /// The object is encrypted with another key already.
    #[error("{at}: {label} is encrypted already, with another secret")]
    AlreadyEncrypted {
        /// The object.
        label: String,
        /// Where.
        at: Position,
    },
    /// The object's form can't be changed as planned.
    #[error("{at}: {label} can't be changed: {reason}")]
    Unsupported {
        /// The object.
        label: String,
        /// Why.
        reason: &'static str,
        /// Where.
        at: Position,
    },
    /// The domain boots no UEFI.
    #[error("the domain does not boot through UEFI, so it has no variable store")]
    NotUefi,
    /// libvirt is still to choose the firmware.
    #[error(
        "{at}: libvirt has not chosen the UEFI firmware yet: name the loader, or start the domain once before"
    )]
    FirmwareOpen {
        /// The `<os>`.
        at: Position,
    },
    /// Two changes at one place.
    #[error("the domain XML has a form in which the changes overlap")]
    Overlap,
    /// XML can't hold this text.
    #[error("{0:?} can't be written in XML")]
    Unwritable(String),
}

/// The only way to the parser.
pub(crate) fn parse_document(xml: &str) -> Result<Document<'_>, DomainError> {
    if xml.len() > Domain::MAX_XML {
        return Err(DomainError::TooLong { found: xml.len() });
    }
    xml_bounds::bounded(xml.as_bytes()).map_err(DomainError::Beyond)?;
    let options = ParsingOptions {
        allow_dtd: false,
        nodes_limit: Domain::MAX_NODES,
        ..ParsingOptions::default()
    };
    #[expect(clippy::disallowed_methods, reason = "the bounds were checked")]
    Document::parse_with_options(xml, options).map_err(DomainError::Xml)
}
