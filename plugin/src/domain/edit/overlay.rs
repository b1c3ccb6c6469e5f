//! A disk without what was laid over it.

use roxmltree::Node;

use super::{encryption, finish, format_edit, writable_path};
use crate::domain::splice::{self, Element, Place};
use crate::domain::xml::{self, child, parse_document};
use crate::domain::{DomainError, Position, Source};
use crate::model::envelope::EnvelopeId;

/// Lets the disk `target` be the sealed image `base` again. What the XML has of layers below that stays.
///
/// # Errors
/// When the XML can't be read or has no such disk, or `base` is neither a file nor a block device.
pub(crate) fn without_overlays(
    xml: &str,
    target: &str,
    base: &Source,
    envelope: EnvelopeId,
) -> Result<String, DomainError> {
    let label = format!("disk {target}");
    let document = parse_document(xml)?;
    let disks = xml::disk_nodes(xml::root(&document)?)?;
    let disk = disks.into_iter().find(|(name, _)| *name == target);
    let (_, disk) = disk.ok_or_else(|| DomainError::NoObject(label.clone()))?;
    let unsupported = |reason| DomainError::Unsupported {
        label: label.clone(),
        reason,
        at: Position::of(disk),
    };
    let source = child(disk, "source").ok_or_else(|| unsupported("it has no <source>"))?;
    let (kind, attribute, path) = match base {
        Source::File(path) => ("file", "file", path),
        Source::Block(path) => ("block", "dev", path),
        _ => return Err(unsupported("its image is not a file")),
    };
    let path = writable_path(path)?;
    if source.attribute(attribute) == Some(path) {
        // What is below is that of the sealed image.
        return Ok(xml.to_owned());
    }
    let element = Element::new("source")
        .attribute(attribute, path)
        .children([encryption(envelope, Some("qemu"))]);
    let mut edits: Vec<_> = format_edit(xml, disk).into_iter().collect();
    edits.extend(splice::set_attribute(xml, disk, "type", kind));
    edits.push(splice::remove(xml, source));
    edits.push(splice::insert(xml, disk, Place::After(source), &element));
    if let Some(chain) = child(disk, "backingStore") {
        edits.push(match below(chain, path) {
            Some(rest) => splice::put_in_place_of(xml, chain, rest),
            None => splice::remove(xml, chain),
        });
    }
    finish(xml, edits)
}

/// What is below the layer at `path`, where the XML names that.
fn below<'a, 'i>(chain: Node<'a, 'i>, path: &str) -> Option<Node<'a, 'i>> {
    let mut layers = std::iter::successors(Some(chain), |layer| child(*layer, "backingStore"));
    let is_it = |layer: &Node<'_, '_>| {
        let source = child(*layer, "source");
        source.is_some_and(|source| [source.attribute("file"), source.attribute("dev")].contains(&Some(path)))
    };
    child(layers.find(is_it)?, "backingStore")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Domain, ObjectState, objects};

    fn disk(inside: &str) -> String {
        format!(
            "<domain type='kvm'>\n  <name>a</name>\n  <uuid>{}</uuid>\n  <devices>\n    <disk type='file' device='disk'>\n      \
             <driver name='qemu' type='qcow2' discard='unmap'/>\n      <source file='/o2' index='3'/>\n{inside}      \
             <target dev='vda' bus='virtio'/>\n    </disk>\n  </devices>\n</domain>\n",
            uuid::Uuid::from_u128(1)
        )
    }

    fn layer(path: &str, inside: &str) -> String {
        format!(
            "<backingStore type='file'><format type='qcow2'/><source file='{path}'/>{inside}</backingStore>"
        )
    }

    #[test]
    fn only_what_was_laid_over_the_disk_goes() {
        let (id, base) = (EnvelopeId::random(), Source::File("/b".into()));
        let golden = layer("/golden", "<backingStore/>");
        let chain = layer("/o1", &layer("/b", &golden));
        for (inside, left) in [
            (String::new(), ""),
            (format!("      {}\n", layer("/o1", &layer("/b", ""))), ""),
            (format!("      {}\n", layer("/o1", "")), ""),
            (format!("      {chain}\n"), golden.as_str()),
        ] {
            let before = disk(&inside);
            let after = without_overlays(&before, "vda", &base, id).unwrap();
            assert!(!after.contains("/o1") && !after.contains("/o2"), "{after}");
            assert!(
                after.contains("discard='unmap'") && after.contains(left),
                "{after}"
            );
            assert_eq!(after.contains("backingStore"), !left.is_empty(), "{after}");
            let read = Domain::parse(&after).unwrap();
            assert_eq!(read.disks[0].source, base);
            assert_eq!(objects(&read)[0].state, ObjectState::Sealed(id));
            assert_eq!(
                without_overlays(&after, "vda", &base, id)
                    .map(|again| Domain::parse(&again).unwrap())
                    .unwrap(),
                read
            );
        }
        let block = without_overlays(&disk(""), "vda", &Source::Block("/dev/vg/b".into()), id).unwrap();
        assert_eq!(
            Domain::parse(&block).unwrap().disks[0].source,
            Source::Block("/dev/vg/b".into())
        );
        assert!(without_overlays(&disk(""), "vdb", &base, id).is_err());
        assert!(without_overlays(&disk(""), "vda", &Source::Elsewhere, id).is_err());
    }
}
