//! From XML nodes to the types of [`super`].

use std::path::PathBuf;

use roxmltree::{Document, Node};

use super::xml::{
    attribute, child, children, disk_encryption, disk_nodes, parsed, required, root, text, tpm_node, value,
};
use super::{
    BackingLayer, Disk, DiskDevice, Domain, DomainError, Encryption, Firmware, Layout, Nvram, Position,
    SecretRef, Source, Tpm, TpmBackend, Uefi,
};
use super::{firmware as wish, metadata, side_doors};
use crate::model::envelope::EnvelopeId;

pub(super) fn domain(document: &Document<'_>) -> Result<Domain, DomainError> {
    let root = root(document)?;
    let firmware = firmware(root)?;
    Ok(Domain {
        uuid: parsed(required(root, "uuid", "<uuid>")?, "UUID")?,
        name: name(root)?,
        side_doors: side_doors::read(root, &firmware),
        firmware,
        disks: disks(root)?,
        tpm: tpm(root)?,
        metadata: metadata::read(root)?,
    })
}

/// Where `<nvram>` says that the variable store is.
fn nvram_source(node: Node<'_, '_>) -> Source {
    let path = text(node).trim().to_owned();
    match node.attribute("type") {
        None | Some("file") if child(node, "source").is_none() && !path.is_empty() => {
            Source::File(path.into())
        }
        kind => source(node, kind.unwrap_or("file")),
    }
}

pub(super) fn encryption(node: Node<'_, '_>) -> Result<Encryption, DomainError> {
    let mut secrets = children(node, "secret");
    let first = secrets.next();
    if let Some(second) = secrets.next() {
        return Err(DomainError::Twice {
            what: "<secret> in an <encryption>".into(),
            at: Position::of(second),
        });
    }
    Ok(Encryption {
        format: attribute(node, "format", "the encryption's format")?.to_owned(),
        engine: node.attribute("engine").map(str::to_owned),
        secret: first.map_or(Ok(SecretRef::Missing), secret)?,
    })
}

fn secret(node: Node<'_, '_>) -> Result<SecretRef, DomainError> {
    match (node.attribute("uuid"), node.attribute("usage")) {
        (Some(uuid), _) => value(node, uuid, "UUID").map(SecretRef::Uuid),
        (None, Some(_)) => Ok(SecretRef::Usage),
        (None, None) => Err(DomainError::Missing {
            what: "the secret's uuid",
            at: Position::of(node),
        }),
    }
}

fn name(root: Node<'_, '_>) -> Result<String, DomainError> {
    let name = text(required(root, "name", "<name>")?);
    if name.is_empty() {
        return Err(DomainError::Missing {
            what: "the text of <name>",
            at: Position::of(root),
        });
    }
    Ok(name)
}

fn firmware(root: Node<'_, '_>) -> Result<Firmware, DomainError> {
    let Some(os) = child(root, "os") else {
        return Ok(Firmware::Bios);
    };
    let loader = child(os, "loader");
    let says = |name: &str, value: &str| loader.and_then(|loader| loader.attribute(name)) == Some(value);
    let path = loader.map(text).filter(|path| !path.trim().is_empty());
    let path = path.map(|path| PathBuf::from(path.trim()));
    let is_chosen_by_libvirt = os.attribute("firmware") == Some("efi");
    if is_chosen_by_libvirt || says("type", "pflash") || child(os, "nvram").is_some() {
        return Ok(Firmware::Uefi(Uefi {
            loader: path,
            stateless: says("stateless", "yes"),
            nvram: child(os, "nvram").map(nvram).transpose()?,
            wish: wish::read(root, os),
        }));
    }
    Ok(path.map_or(Firmware::Bios, Firmware::Rom))
}

fn nvram(node: Node<'_, '_>) -> Result<Nvram, DomainError> {
    let encrypted = child(node, "source").and_then(|source| child(source, "encryption"));
    Ok(Nvram {
        source: nvram_source(node),
        template: node.attribute("template").map(PathBuf::from),
        format: node.attribute("format").map(str::to_owned),
        encryption: encrypted.map(encryption).transpose()?,
    })
}

fn disks(root: Node<'_, '_>) -> Result<Vec<Disk>, DomainError> {
    let nodes = disk_nodes(root)?.into_iter();
    nodes.map(|(target, node)| disk(target, node)).collect()
}

fn disk(target: &str, node: Node<'_, '_>) -> Result<Disk, DomainError> {
    let device = disk_device(node)?;
    Ok(Disk {
        target: target.to_owned(),
        device,
        source: source(node, node.attribute("type").unwrap_or("file")),
        format: child(node, "driver")
            .and_then(|driver| driver.attribute("type"))
            .map(str::to_owned),
        readonly: device == DiskDevice::Cdrom || child(node, "readonly").is_some(),
        transient: child(node, "transient").is_some(),
        layout: layout(node),
        encryption: disk_encryption(node).map(encryption).transpose()?,
        backing: backing(node)?,
    })
}

fn layout(disk: Node<'_, '_>) -> Layout {
    let has = |name| child(disk, "source").is_some_and(|source| child(source, name).is_some());
    match (has("slices"), has("dataStore")) {
        (true, _) => Layout::Slices,
        (false, true) => Layout::DataStore,
        (false, false) => Layout::Whole,
    }
}

fn disk_device(node: Node<'_, '_>) -> Result<DiskDevice, DomainError> {
    match node.attribute("device").unwrap_or("disk") {
        "disk" => Ok(DiskDevice::Disk),
        "cdrom" => Ok(DiskDevice::Cdrom),
        "floppy" => Ok(DiskDevice::Floppy),
        "lun" => Ok(DiskDevice::Lun),
        other => Err(DomainError::Value {
            what: "kind of disk",
            found: other.to_owned(),
            at: Position::of(node),
        }),
    }
}

/// The chain of `<backingStore>`, each nested in the one above it; one without `type` ends it.
fn backing(disk: Node<'_, '_>) -> Result<Vec<BackingLayer>, DomainError> {
    let mut layers = Vec::new();
    let mut next = child(disk, "backingStore");
    while let Some(node) = next {
        let Some(kind) = node.attribute("type") else { break };
        layers.push(BackingLayer {
            source: source(node, kind),
            encryption: disk_encryption(node).map(encryption).transpose()?,
        });
        next = child(node, "backingStore");
    }
    Ok(layers)
}

fn source(holder: Node<'_, '_>, kind: &str) -> Source {
    let of = |name: &str| child(holder, "source")?.attribute(name).map(PathBuf::from);
    match kind {
        "file" => of("file").map_or(Source::Empty, Source::File),
        "block" => of("dev").map_or(Source::Empty, Source::Block),
        "dir" => of("dir").map_or(Source::Empty, Source::Dir),
        "network" | "volume" if child(holder, "source").is_none() => Source::Empty,
        "volume" => {
            let named = |name: &str| child(holder, "source")?.attribute(name).map(str::to_owned);
            match (named("pool"), named("volume")) {
                (Some(pool), Some(volume)) => Source::Volume { pool, volume },
                _ => Source::Elsewhere,
            }
        }
        _ => Source::Elsewhere,
    }
}

fn tpm(root: Node<'_, '_>) -> Result<Option<Tpm>, DomainError> {
    let Some(node) = tpm_node(root) else {
        return Ok(None);
    };
    let backend = required(node, "backend", "the tpm's <backend>")?;
    Ok(Some(Tpm {
        backend: match attribute(backend, "type", "the backend's type")? {
            "emulator" => TpmBackend::Emulator {
                version: backend.attribute("version").map(str::to_owned),
                secret: tpm_secret(backend)?,
                persistent_state: backend.attribute("persistent_state") == Some("yes"),
                place: tpm_place(backend),
            },
            "passthrough" => TpmBackend::Passthrough,
            "external" => TpmBackend::External,
            other => TpmBackend::Other(other.to_owned()),
        },
    }))
}

/// The `<source>` of an emulated TPM's `<backend>`, whatever its type.
fn tpm_place(backend: Node<'_, '_>) -> Option<PathBuf> {
    let source = child(backend, "source")?;
    let path = ["path", "file", "dir"]
        .into_iter()
        .find_map(|name| source.attribute(name));
    Some(path.unwrap_or_default().into())
}

/// The `<encryption secret=…/>` of a TPM's `<backend>`.
pub(super) fn tpm_secret(backend: Node<'_, '_>) -> Result<Option<EnvelopeId>, DomainError> {
    let Some(encryption) = child(backend, "encryption") else {
        return Ok(None);
    };
    let uuid = attribute(encryption, "secret", "the encryption's secret")?;
    value(encryption, uuid, "UUID").map(Some)
}
