//! The changes that sealing makes to domain XML, and their reverse.
//!
//! Every byte that no change is about stays as it is. A change that is there already is not made again, so sealing
//! sealed XML with the same plan gives the same text. Nothing here tells whether a change is allowed: that is the
//! caller's decision, before.

mod firmware;

use std::path::{Path, PathBuf};

use roxmltree::Node;

use super::metadata::{ascii_json, envelope, envelope_nodes, stated_id, vm_node};
use super::read;
use super::splice::{self, Edit, Element, Place};
use super::xml::{self, child, children, parse_document};
use super::{Domain, DomainError, Encryption, Metadata, Position, SecretRef};
use crate::model::envelope::{Envelope, EnvelopeError, EnvelopeId, Precedence};

/// What [`seal`] writes.
#[derive(Clone, Debug, Default)]
pub struct SealEdit<'a> {
    /// The disks.
    pub disks: Vec<DiskEdit>,
    /// The variable store.
    pub nvram: Option<NvramEdit>,
    /// The vTPM: added as a TPM 2.0 if the domain has none. libvirt is told to keep its state.
    pub vtpm: Option<EnvelopeId>,
    /// All envelopes of the VM, for its metadata.
    pub envelopes: &'a [Envelope],
}

/// A disk to seal.
#[derive(Clone, Debug)]
pub struct DiskEdit {
    /// Its `<target dev=…>`.
    pub target: String,
    /// The envelope of its DEK.
    pub envelope: EnvelopeId,
    /// The format of the sealed image, if it is another than the XML has.
    pub format: Option<String>,
    /// The file of the sealed image, if it is another than the XML has.
    pub source: Option<PathBuf>,
}

/// A variable store to seal.
#[derive(Clone, Debug)]
pub struct NvramEdit {
    /// The sealed file.
    pub path: PathBuf,
    /// The plain template it was made from, if the XML is to name it.
    pub template: Option<PathBuf>,
    /// `raw` or `qcow2`, if the XML is to name it; libvirt 9 does not know the attribute.
    pub format: Option<String>,
    /// The envelope of its DEK.
    pub envelope: EnvelopeId,
    /// The loader to write where libvirt is still to choose one (`<os firmware='efi'>`). libvirt 9 takes no
    /// variable store of ours as long as it chooses, so the choice is replaced by this one.
    pub loader: Option<LoaderPin>,
}

/// A UEFI loader.
#[derive(Clone, Debug)]
pub struct LoaderPin {
    /// Its image, mapped read-only.
    pub path: PathBuf,
    /// Whether it needs SMM, as the ones built for Secure Boot do.
    pub secure: bool,
}

impl LoaderPin {
    /// As a step of a plan.
    #[must_use]
    pub fn words(&self) -> String {
        let secure = if self.secure {
            ", with Secure Boot and SMM"
        } else {
            ""
        };
        format!(
            "name the loader {} that libvirt would choose{secure}",
            self.path.display()
        )
    }
}

/// Adds encryption and metadata to domain XML.
///
/// # Errors
/// When the XML can't be read, has no such object, or has it encrypted with another key or in a form that can't
/// be changed.
pub fn seal(xml: &str, plan: &SealEdit<'_>) -> Result<String, DomainError> {
    let document = parse_document(xml)?;
    let domain = read::domain(&document)?;
    let root = xml::root(&document)?;
    let mut edits = Vec::new();
    for disk in &plan.disks {
        edits.extend(disk_edits(xml, root, disk)?);
    }
    if let Some(nvram) = &plan.nvram {
        edits.extend(firmware::edits(xml, root, &domain, nvram)?);
    }
    if let Some(envelope) = plan.vtpm {
        edits.extend(tpm_edits(xml, root, envelope)?);
    }
    edits.extend(envelope_edits(xml, root, plan.envelopes)?);
    finish(xml, edits)
}

/// Writes the metadata to hold just these envelopes. One that claims to be newer than the one given stays, and so does what
/// can't be read and is none of these.
///
/// # Errors
/// When the XML can't be read.
pub fn set_envelopes(xml: &str, envelopes: &[Envelope]) -> Result<String, DomainError> {
    let document = parse_document(xml)?;
    let edits = envelope_edits(xml, xml::root(&document)?, envelopes)?;
    finish(xml, edits)
}

/// Brings the envelopes in the `<vm>` element that libvirt hands out, without its namespace, up to date: each one that is
/// there becomes what `newest` says, given its id and what can be read of it. `None` if nothing changes.
///
/// # Errors
/// When the element can't be read.
pub fn refresh_element(
    element: &str,
    newest: impl Fn(EnvelopeId, Option<&Envelope>) -> Option<Envelope>,
) -> Result<Option<String>, DomainError> {
    let document = parse_document(element)?;
    let mut edits = Vec::new();
    let envelopes = document
        .root_element()
        .children()
        .filter(|node| node.is_element() && node.tag_name().name() == "envelope");
    for (number, node) in (1..).zip(envelopes) {
        let new = match envelope(node, number) {
            Ok(found) => newest(found.id, Some(&found)).filter(|new| *new != found),
            Err(error) if is_of_later_virtseal(&error) => None,
            Err(_) => stated_id(node).and_then(|id| newest(id, None)),
        };
        edits.extend(new.map(|new| splice::set_text(element, node, &ascii_json(&new))));
    }
    if edits.is_empty() {
        return Ok(None);
    }
    splice::apply(element, edits)
        .ok_or(DomainError::Overlap)
        .map(Some)
}

/// That one can read it.
fn is_of_later_virtseal(error: &DomainError) -> bool {
    let source = match error {
        DomainError::Envelope { source, .. } => source,
        _ => return false,
    };
    matches!(source, EnvelopeError::Version { .. })
}

/// Removes the metadata and each `<encryption>` whose secret is one of its envelopes. Formats, paths and the `<tpm>`
/// stay.
///
/// # Errors
/// When the XML can't be read, or a layer below a disk still needs one of the envelopes.
pub fn unseal(xml: &str) -> Result<String, DomainError> {
    let document = parse_document(xml)?;
    let root = xml::root(&document)?;
    let Some(metadata) = read::domain(&document)?.metadata else {
        return Ok(xml.to_owned());
    };
    let mut edits = Vec::new();
    for (target, disk) in xml::disk_nodes(root)? {
        refuse_sealed_layers(target, disk, &metadata)?;
        edits.extend(ours(xml::disk_encryption(disk), &metadata)?.map(|node| collapse(xml, node)));
    }
    let nvram = child(root, "os").and_then(|os| child(os, "nvram"));
    let nvram = nvram
        .and_then(|nvram| child(nvram, "source"))
        .and_then(|source| child(source, "encryption"));
    edits.extend(ours(nvram, &metadata)?.map(|node| collapse(xml, node)));
    edits.extend(tpm_encryption(root, &metadata)?.map(|node| collapse(xml, node)));
    edits.extend(metadata_removal(xml, root)?);
    finish(xml, edits)
}

fn collapse(xml: &str, node: Node<'_, '_>) -> Edit {
    splice::remove_and_collapse(xml, node)
}

/// Applies the edits and reads the result once: nothing leaves here that the daemon would refuse later.
fn finish(xml: &str, edits: Vec<Edit>) -> Result<String, DomainError> {
    if edits.is_empty() {
        return Ok(xml.to_owned());
    }
    let edited = splice::apply(xml, edits).ok_or(DomainError::Overlap)?;
    Domain::parse(&edited)?;
    Ok(edited)
}

fn disk_edits(xml: &str, root: Node<'_, '_>, plan: &DiskEdit) -> Result<Vec<Edit>, DomainError> {
    let label = format!("disk {}", plan.target);
    let (_, disk) = xml::disk_nodes(root)?
        .into_iter()
        .find(|(target, _)| *target == plan.target)
        .ok_or_else(|| DomainError::NoObject(label.clone()))?;
    let unsupported = |reason| DomainError::Unsupported {
        label: label.clone(),
        reason,
        at: Position::of(disk),
    };
    let source = child(disk, "source").ok_or_else(|| unsupported("it has no <source>"))?;
    let mut edits = Vec::new();
    if let Some(format) = &plan.format {
        edits.extend(format_edit(xml, disk, writable(format)?));
    }
    if let Some(path) = &plan.source {
        if disk.attribute("type").unwrap_or("file") != "file" {
            return Err(unsupported(
                "only the file of a disk of type='file' can be replaced",
            ));
        }
        edits.extend(splice::set_attribute(xml, source, "file", writable_path(path)?));
    }
    if !has_encryption(xml::disk_encryption(disk), plan.envelope, &label)? {
        let element = encryption(plan.envelope, None);
        edits.push(splice::insert(xml, source, Place::Last, &element));
    }
    Ok(edits)
}

fn format_edit(xml: &str, disk: Node<'_, '_>, format: &str) -> Option<Edit> {
    match child(disk, "driver") {
        Some(driver) => splice::set_attribute(xml, driver, "type", format),
        None => {
            let driver = Element::new("driver")
                .attribute("name", "qemu")
                .attribute("type", format);
            Some(splice::insert(xml, disk, Place::First, &driver))
        }
    }
}

/// `<encryption format='luks'><secret type='passphrase' uuid='…'/></encryption>`.
fn encryption(secret: EnvelopeId, engine: Option<&str>) -> Element {
    let element = Element::new("encryption").attribute("format", "luks");
    let element = match engine {
        Some(engine) => element.attribute("engine", engine),
        None => element,
    };
    let secret = Element::new("secret")
        .attribute("type", "passphrase")
        .attribute("uuid", &secret.to_string());
    element.children([secret])
}

/// Whether the object is encrypted with this secret already; with another one is an error.
fn has_encryption(node: Option<Node<'_, '_>>, secret: EnvelopeId, label: &str) -> Result<bool, DomainError> {
    let Some(node) = node else { return Ok(false) };
    match read::encryption(node)? {
        Encryption {
            format,
            secret: SecretRef::Uuid(found),
            ..
        } if found == secret && format == "luks" => Ok(true),
        _ => Err(DomainError::AlreadyEncrypted {
            label: label.to_owned(),
            at: Position::of(node),
        }),
    }
}

/// Encrypts the state, and keeps libvirt from deleting it: without `persistent_state` it does so whenever a transient domain
/// ends or is refused.
fn tpm_edits(xml: &str, root: Node<'_, '_>, secret: EnvelopeId) -> Result<Vec<Edit>, DomainError> {
    let element = Element::new("encryption").attribute("secret", &secret.to_string());
    let Some(tpm) = xml::tpm_node(root) else {
        let devices = child(root, "devices").ok_or_else(|| DomainError::NoObject("<devices>".into()))?;
        let backend = Element::new("backend")
            .attribute("type", "emulator")
            .attribute("version", "2.0")
            .attribute("persistent_state", "yes")
            .children([element]);
        let tpm = Element::new("tpm")
            .attribute("model", tpm_model(root))
            .children([backend]);
        return Ok(vec![splice::insert(xml, devices, Place::Last, &tpm)]);
    };
    let backend = child(tpm, "backend").filter(|backend| backend.attribute("type") == Some("emulator"));
    let backend = backend.ok_or_else(|| DomainError::Unsupported {
        label: "vtpm".into(),
        reason: "only a TPM of type='emulator' has its state with the VM",
        at: Position::of(tpm),
    })?;
    let mut edits: Vec<_> = splice::set_attribute(xml, backend, "persistent_state", "yes")
        .into_iter()
        .collect();
    match read::tpm_secret(backend)? {
        Some(found) if found == secret => {}
        Some(_) => {
            return Err(DomainError::AlreadyEncrypted {
                label: "vtpm".into(),
                at: Position::of(backend),
            });
        }
        None => edits.push(splice::insert(xml, backend, Place::Last, &element)),
    }
    Ok(edits)
}

/// The TPM 2.0 that QEMU offers on the domain's architecture.
fn tpm_model(root: Node<'_, '_>) -> &'static str {
    let kind = child(root, "os").and_then(|os| child(os, "type"));
    match kind.and_then(|kind| kind.attribute("arch")) {
        Some("ppc64" | "ppc64le") => "tpm-spapr",
        Some(arm) if arm.starts_with("aarch64") || arm.starts_with("arm") => "tpm-tis",
        _ => "tpm-crb",
    }
}

fn envelope_edits(xml: &str, root: Node<'_, '_>, envelopes: &[Envelope]) -> Result<Vec<Edit>, DomainError> {
    let Some(vm) = vm_node(root)? else {
        return Ok(vec![metadata_insertion(xml, root, envelopes)]);
    };
    let mut edits = Vec::new();
    let present = envelope_nodes(vm);
    let id_of = |node, found: &Result<Envelope, DomainError>| match found {
        Ok(found) => Some(found.id),
        Err(_) => stated_id(node),
    };
    for (node, found) in &present {
        let given = envelopes
            .iter()
            .find(|given| id_of(*node, found) == Some(given.id));
        match (found, given) {
            (Ok(_), None) | (Err(DomainError::Twice { .. }), _) => edits.push(splice::remove(xml, *node)),
            // Whether it is what it claims shows when somebody has the key.
            (Ok(found), Some(given)) if *given == *found || may_count(found, given) => {}
            (Err(error), _) if is_of_later_virtseal(error) => {}
            (Err(_), None) => {}
            (_, Some(given)) => edits.push(splice::set_text(xml, *node, &ascii_json(given))),
        }
    }
    let name = splice::raw_name(xml, vm);
    let prefix = name.strip_suffix("vm").unwrap_or_default();
    let is_new = |given: &&Envelope| {
        present
            .iter()
            .all(|(node, found)| id_of(*node, found) != Some(given.id))
    };
    let new = envelopes
        .iter()
        .filter(is_new)
        .map(|given| envelope_element(prefix, given));
    edits.extend(new.map(|element| splice::insert(xml, vm, Place::Last, &element)));
    Ok(edits)
}

/// Format 1 never does: nobody can tell who wrote it.
fn may_count(found: &Envelope, given: &Envelope) -> bool {
    found.format() == Envelope::FORMAT && found.supersedes(given) != Precedence::Older
}

fn envelope_element(prefix: &str, envelope: &Envelope) -> Element {
    Element::new(format!("{prefix}envelope"))
        .attribute("id", &envelope.id.to_string())
        .text(&ascii_json(envelope))
}

/// `<virtseal:vm>` in `<metadata>`, and that behind what libvirt writes before it.
fn metadata_insertion(xml: &str, root: Node<'_, '_>, envelopes: &[Envelope]) -> Edit {
    let vm = Element::new("virtseal:vm")
        .attribute("xmlns:virtseal", Metadata::NAMESPACE)
        .children(
            envelopes
                .iter()
                .map(|envelope| envelope_element("virtseal:", envelope)),
        );
    if let Some(metadata) = child(root, "metadata") {
        return splice::insert(xml, metadata, Place::Last, &vm);
    }
    let before = ["name", "uuid", "genid", "title", "description"];
    let is_before = |node: &Node<'_, '_>| before.iter().any(|name| xml::is(*node, name));
    let last = root.children().rfind(is_before);
    let place = last.map_or(Place::First, Place::After);
    splice::insert(xml, root, place, &Element::new("metadata").children([vm]))
}

fn metadata_removal(xml: &str, root: Node<'_, '_>) -> Result<Option<Edit>, DomainError> {
    Ok(vm_node(root)?.map(|vm| match vm.parent_element() {
        Some(metadata) if splice::is_all_of(vm, metadata) => splice::remove(xml, metadata),
        _ => splice::remove(xml, vm),
    }))
}

/// The `<encryption>` if its secret is one of our envelopes.
fn ours<'a, 'i>(
    node: Option<Node<'a, 'i>>,
    metadata: &Metadata,
) -> Result<Option<Node<'a, 'i>>, DomainError> {
    let Some(node) = node else { return Ok(None) };
    let secret = read::encryption(node)?.secret;
    let ours = matches!(secret, SecretRef::Uuid(id) if metadata.names(id));
    Ok(ours.then_some(node))
}

fn tpm_encryption<'a, 'i>(
    root: Node<'a, 'i>,
    metadata: &Metadata,
) -> Result<Option<Node<'a, 'i>>, DomainError> {
    let Some(backend) = xml::tpm_node(root).and_then(|tpm| child(tpm, "backend")) else {
        return Ok(None);
    };
    let ours = read::tpm_secret(backend)?.is_some_and(|id| metadata.names(id));
    Ok(child(backend, "encryption").filter(|_| ours))
}

fn refuse_sealed_layers(target: &str, disk: Node<'_, '_>, metadata: &Metadata) -> Result<(), DomainError> {
    let mut layer = child(disk, "backingStore");
    while let Some(node) = layer {
        if ours(xml::disk_encryption(node), metadata)?.is_some() {
            return Err(DomainError::Unsupported {
                label: format!("disk {target}"),
                reason: "a layer below it is still encrypted with a key of this VM",
                at: Position::of(node),
            });
        }
        layer = children(node, "backingStore").next();
    }
    Ok(())
}

fn writable_path(path: &Path) -> Result<&str, DomainError> {
    let text = path
        .to_str()
        .ok_or_else(|| DomainError::Unwritable(path.display().to_string()))?;
    writable(text)
}

/// Text that comes back from XML as it went in.
fn writable(text: &str) -> Result<&str, DomainError> {
    let refused = |found: char| found.is_control() || matches!(found, '\u{fffe}' | '\u{ffff}');
    if text.contains(refused) || text.trim() != text || text.is_empty() {
        return Err(DomainError::Unwritable(text.to_owned()));
    }
    Ok(text)
}
