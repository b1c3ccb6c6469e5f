//! The changes that sealing makes to domain XML, and their reverse.
//!
//! Every byte that no change is about stays as it is. A change that is there already is not made again, so sealing
//! sealed XML with the same plan gives the same text. Nothing here tells whether a change is allowed: that is the
//! caller's decision, before.

mod firmware;
mod overlay;

use std::path::{Path, PathBuf};

use roxmltree::Node;

use super::metadata::{ascii_json, envelope, envelope_nodes, stated_id, vm_node};
use super::read;
use super::splice::{self, Edit, Element, Place};
use super::xml::{self, child, children, parse_document};
use super::{Domain, DomainError, Encryption, Metadata, Position, SecretRef};
use crate::model::act::{Act, StepCode, Verb};
use crate::model::envelope::{Envelope, EnvelopeError, EnvelopeId, Precedence};

pub(crate) use overlay::without_overlays;

/// What [`seal`] writes.
#[derive(Clone, Debug, Default)]
pub(crate) struct SealEdit<'a> {
    pub disks: Vec<DiskEdit>,
    pub nvram: Option<NvramEdit>,
    pub vtpm: Option<VtpmEdit>,
    /// All envelopes of the VM, for its metadata.
    pub envelopes: &'a [Envelope],
}

#[derive(Clone, Debug)]
pub(crate) struct DiskEdit {
    /// Its `<target dev=…>`.
    pub target: String,
    pub envelope: EnvelopeId,
    /// The secret that the XML may name in its place.
    pub instead_of: Option<EnvelopeId>,
}

/// The file of a disk that the XML has as a volume of a storage pool.
#[derive(Clone, Debug)]
pub(crate) struct DiskFile {
    /// Its `<target dev=…>`.
    pub target: String,
    pub path: PathBuf,
    /// Whether it is a block device.
    pub is_device: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct NvramEdit {
    /// The sealed file.
    pub path: PathBuf,
    /// The plain template it was made from, if the XML is to name it.
    pub template: Option<PathBuf>,
    /// `raw` or `qcow2`, if the XML is to name it; libvirt 9 does not know the attribute.
    pub format: Option<String>,
    pub envelope: EnvelopeId,
    /// The secret that the XML may name in its place.
    pub instead_of: Option<EnvelopeId>,
    /// The loader to write where libvirt is still to choose one (`<os firmware='efi'>`). libvirt 9 takes no
    /// variable store of ours as long as it chooses, so the choice is replaced by this one.
    pub loader: Option<LoaderPin>,
}

/// Added as a TPM 2.0 if the domain has none. libvirt is told to keep its state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VtpmEdit {
    pub envelope: EnvelopeId,
    /// The secret that the XML may name in its place.
    pub instead_of: Option<EnvelopeId>,
}

#[derive(Clone, Debug)]
pub(crate) struct LoaderPin {
    /// Its image, mapped read-only.
    pub path: PathBuf,
    /// Whether it needs SMM, as the ones built for Secure Boot do.
    pub secure: bool,
}

impl LoaderPin {
    /// As a step of a plan.
    pub(crate) fn act(&self) -> Act {
        let secure = if self.secure {
            ", with Secure Boot and SMM"
        } else {
            ""
        };
        let loader = self.path.display();
        let what = format!("the loader {loader} in the XML, which libvirt would choose{secure}");
        Verb::Name.act(StepCode::PinLoader, what).at(&self.path)
    }
}

/// Adds encryption and metadata to domain XML.
///
/// # Errors
/// When the XML can't be read, has no such object, or has it encrypted with another key or in a form that can't
/// be changed.
pub(crate) fn seal(xml: &str, plan: &SealEdit<'_>) -> Result<String, DomainError> {
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
    if let Some(vtpm) = plan.vtpm {
        edits.extend(tpm_edits(xml, root, vtpm)?);
    }
    edits.extend(envelope_edits(xml, root, plan.envelopes)?);
    finish(xml, edits)
}

/// Names the files of these disks in place of their storage pools and volumes.
pub(crate) fn name_files(xml: &str, files: &[DiskFile]) -> Result<String, DomainError> {
    let document = parse_document(xml)?;
    let disks = xml::disk_nodes(xml::root(&document)?)?;
    let mut edits = Vec::new();
    for DiskFile {
        target,
        path,
        is_device,
    } in files
    {
        let found = disks.iter().find(|(found, _)| found == target);
        let source = found.and_then(|(_, disk)| Some((*disk, child(*disk, "source")?)));
        let (disk, source) = source.ok_or_else(|| DomainError::NoObject(format!("disk {target}")))?;
        let (kind, attribute) = match is_device {
            true => ("block", "dev"),
            false => ("file", "file"),
        };
        edits.extend(splice::set_attribute(xml, disk, "type", kind));
        edits.extend(splice::remove_attribute(xml, source, "pool"));
        edits.extend(splice::remove_attribute(xml, source, "mode"));
        edits.extend(splice::rename_attribute(
            xml,
            source,
            "volume",
            attribute,
            &path.display().to_string(),
        ));
    }
    finish(xml, edits)
}

/// The metadata with just these envelopes. One that claims to be newer than the one given stays, and so does what can't be read
/// and is none of these.
#[cfg(test)]
pub(crate) fn set_envelopes(xml: &str, envelopes: &[Envelope]) -> Result<String, DomainError> {
    let document = parse_document(xml)?;
    let edits = envelope_edits(xml, xml::root(&document)?, envelopes)?;
    finish(xml, edits)
}

/// Brings the envelopes in the `<vm>` element that libvirt hands out, without its namespace, up to date: each one that is
/// there becomes what `newest` says, given its id and what can be read of it. `None` if nothing changes.
pub(crate) fn refresh_element(
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

/// The `<vm>` element that libvirt hands out, without its copies of the envelope `id`. `None` if it has none.
pub(crate) fn element_without(element: &str, id: EnvelopeId) -> Result<Option<String>, DomainError> {
    let document = parse_document(element)?;
    let is_it = |node: &Node<'_, '_>| {
        node.is_element()
            && node.tag_name().name() == "envelope"
            && (stated_id(*node) == Some(id) || envelope(*node, 1).is_ok_and(|found| found.id == id))
    };
    let found = document.root_element().children().filter(is_it);
    let edits: Vec<_> = found.map(|node| splice::remove(element, node)).collect();
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
pub(crate) fn unseal(xml: &str) -> Result<String, DomainError> {
    let document = parse_document(xml)?;
    let root = xml::root(&document)?;
    let Some(metadata) = read::domain(&document)?.metadata else {
        return Ok(xml.to_owned());
    };
    let collapse = |node| splice::remove_and_collapse(xml, node);
    let mut edits = Vec::new();
    for (target, disk) in xml::disk_nodes(root)? {
        refuse_sealed_layers(target, disk, &metadata)?;
        edits.extend(ours(xml::disk_encryption(disk), &metadata)?.map(collapse));
    }
    let nvram = child(root, "os").and_then(|os| child(os, "nvram"));
    let nvram = nvram
        .and_then(|nvram| child(nvram, "source"))
        .and_then(|source| child(source, "encryption"));
    edits.extend(ours(nvram, &metadata)?.map(collapse));
    edits.extend(tpm_encryption(root, &metadata)?.map(collapse));
    edits.extend(metadata_removal(xml, root)?);
    finish(xml, edits)
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
    let source = child(disk, "source").ok_or_else(|| DomainError::Unsupported {
        label: label.clone(),
        reason: "it has no <source>",
        at: Position::of(disk),
    })?;
    let mut edits: Vec<_> = format_edit(xml, disk).into_iter().collect();
    match xml::disk_encryption(disk) {
        Some(found) => edits.extend(secret_edit(xml, found, plan.envelope, plan.instead_of, &label)?),
        None => {
            let element = encryption(plan.envelope, None);
            edits.push(splice::insert(xml, source, Place::Last, &element));
        }
    }
    Ok(edits)
}

/// A sealed image is qcow2, whatever the XML has.
fn format_edit(xml: &str, disk: Node<'_, '_>) -> Option<Edit> {
    match child(disk, "driver") {
        Some(driver) => splice::set_attribute(xml, driver, "type", "qcow2"),
        None => {
            let driver = Element::new("driver")
                .attribute("name", "qemu")
                .attribute("type", "qcow2");
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

/// Has an `<encryption>` name this secret, unless it does; where it names any other than `instead_of` is an error.
fn secret_edit(
    xml: &str,
    node: Node<'_, '_>,
    secret: EnvelopeId,
    instead_of: Option<EnvelopeId>,
    label: &str,
) -> Result<Option<Edit>, DomainError> {
    let Encryption {
        format,
        secret: SecretRef::Uuid(found),
        ..
    } = read::encryption(node)?
    else {
        return Err(already_encrypted(node, label));
    };
    match child(node, "secret") {
        _ if format != "luks" => Err(already_encrypted(node, label)),
        _ if found == secret => Ok(None),
        Some(named) if Some(found) == instead_of => {
            Ok(splice::set_attribute(xml, named, "uuid", &secret.to_string()))
        }
        _ => Err(already_encrypted(node, label)),
    }
}

fn already_encrypted(node: Node<'_, '_>, label: &str) -> DomainError {
    DomainError::AlreadyEncrypted {
        label: label.to_owned(),
        at: Position::of(node),
    }
}

/// Encrypts the state, and keeps libvirt from deleting it: without `persistent_state` it does so whenever a transient domain
/// ends or is refused.
fn tpm_edits(xml: &str, root: Node<'_, '_>, plan: VtpmEdit) -> Result<Vec<Edit>, DomainError> {
    let secret = plan.envelope;
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
    match (read::tpm_secret(backend)?, child(backend, "encryption")) {
        (Some(found), _) if found == secret => {}
        (Some(found), Some(named)) if Some(found) == plan.instead_of => {
            edits.extend(splice::set_attribute(xml, named, "secret", &secret.to_string()));
        }
        (Some(_), _) => return Err(already_encrypted(backend, "vtpm")),
        (None, _) => edits.push(splice::insert(xml, backend, Place::Last, &element)),
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
