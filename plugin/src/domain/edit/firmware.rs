//! The variable store in `<os>`, and the loader where libvirt has not chosen one yet.

use roxmltree::Node;

use super::super::splice::{self, Edit, Element, Place};
use super::super::xml::child;
use super::super::{Domain, DomainError, Firmware, Position};
use super::{LoaderPin, NvramEdit, encryption, secret_edit, writable, writable_path};

const LABEL: &str = "nvram";

pub(super) fn edits(
    xml: &str,
    root: Node<'_, '_>,
    domain: &Domain,
    plan: &NvramEdit,
) -> Result<Vec<Edit>, DomainError> {
    let (Firmware::Uefi(uefi), Some(os)) = (&domain.firmware, child(root, "os")) else {
        return Err(DomainError::NotUefi);
    };
    if uefi.stateless {
        return Err(unsupported(os, "its loader is stateless"));
    }
    let mut edits = match (&uefi.loader, &plan.loader) {
        (Some(_), _) => Vec::new(),
        (None, Some(pin)) => pin_edits(xml, root, os, pin)?,
        (None, None) => return Err(DomainError::FirmwareOpen { at: Position::of(os) }),
    };
    match child(os, "nvram") {
        Some(nvram) => edits.extend(nvram_edits(xml, nvram, plan)?),
        None => edits.push(splice::insert(xml, os, Place::Last, &nvram_element(plan)?)),
    }
    Ok(edits)
}

fn unsupported(node: Node<'_, '_>, reason: &'static str) -> DomainError {
    DomainError::Unsupported {
        label: LABEL.into(),
        reason,
        at: Position::of(node),
    }
}

/// Replaces libvirt's choice of a loader by a given one.
fn pin_edits(
    xml: &str,
    root: Node<'_, '_>,
    os: Node<'_, '_>,
    pin: &LoaderPin,
) -> Result<Vec<Edit>, DomainError> {
    let mut edits: Vec<_> = splice::remove_attribute(xml, os, "firmware")
        .into_iter()
        .collect();
    edits.extend(child(os, "firmware").map(|features| splice::remove(xml, features)));
    edits.extend(child(os, "loader").map(|loader| splice::remove(xml, loader)));
    let loader = Element::new("loader").attribute("readonly", "yes");
    let loader = if pin.secure {
        loader.attribute("secure", "yes")
    } else {
        loader
    };
    let loader = loader.attribute("type", "pflash").text(writable_path(&pin.path)?);
    edits.push(splice::insert(xml, os, Place::Last, &loader));
    if pin.secure {
        edits.extend(smm_edit(xml, root));
    }
    Ok(edits)
}

/// `<smm state='on'/>`, which a secure loader needs and libvirt adds only to its own choice.
fn smm_edit(xml: &str, root: Node<'_, '_>) -> Option<Edit> {
    let smm = Element::new("smm").attribute("state", "on");
    match child(root, "features") {
        Some(features) => match child(features, "smm") {
            Some(found) => splice::set_attribute(xml, found, "state", "on"),
            None => Some(splice::insert(xml, features, Place::Last, &smm)),
        },
        None => {
            let features = Element::new("features").children([smm]);
            let place = child(root, "os").map_or(Place::Last, Place::After);
            Some(splice::insert(xml, root, place, &features))
        }
    }
}

fn nvram_edits(xml: &str, nvram: Node<'_, '_>, plan: &NvramEdit) -> Result<Vec<Edit>, DomainError> {
    if !matches!(nvram.attribute("type"), None | Some("file")) {
        return Err(unsupported(nvram, "only a file is"));
    }
    let mut edits = Vec::new();
    if let Some(template) = &plan.template {
        edits.extend(splice::set_attribute(
            xml,
            nvram,
            "template",
            writable_path(template)?,
        ));
    }
    edits.extend(splice::set_attribute(xml, nvram, "type", "file"));
    if let Some(format) = &plan.format {
        edits.extend(splice::set_attribute(xml, nvram, "format", writable(format)?));
    }
    let Some(source) = child(nvram, "source") else {
        edits.push(splice::set_child(xml, nvram, &source_element(plan)?));
        return Ok(edits);
    };
    edits.extend(splice::set_attribute(
        xml,
        source,
        "file",
        writable_path(&plan.path)?,
    ));
    match child(source, "encryption") {
        Some(found) => {
            edits.extend(secret_edit(xml, found, plan.envelope, plan.instead_of, LABEL)?);
            edits.extend(splice::set_attribute(xml, found, "engine", "qemu"));
        }
        None => {
            let element = encryption(plan.envelope, Some("qemu"));
            edits.push(splice::insert(xml, source, Place::Last, &element));
        }
    }
    Ok(edits)
}

fn nvram_element(plan: &NvramEdit) -> Result<Element, DomainError> {
    let mut element = Element::new("nvram");
    if let Some(template) = &plan.template {
        element = element.attribute("template", writable_path(template)?);
    }
    element = element.attribute("type", "file");
    if let Some(format) = &plan.format {
        element = element.attribute("format", writable(format)?);
    }
    Ok(element.children([source_element(plan)?]))
}

fn source_element(plan: &NvramEdit) -> Result<Element, DomainError> {
    let source = Element::new("source").attribute("file", writable_path(&plan.path)?);
    Ok(source.children([encryption(plan.envelope, Some("qemu"))]))
}
