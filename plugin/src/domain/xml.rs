//! The way to the XML parser, and the nodes that libvirt looks at.

use std::collections::HashSet;
use std::path::Path;
use std::str::FromStr;

use roxmltree::{Document, Node, ParsingOptions};

use super::{Domain, DomainError, Position};

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

/// Whether anything in the XML is this path or has it in it, as an argument for QEMU may. What can't be read counts by its text.
pub(crate) fn names_path(xml: &str, path: &Path) -> bool {
    let shown = path.display().to_string();
    let Ok(document) = parse_document(xml) else {
        return xml.contains(&shown) || xml.contains(&escaped(&shown));
    };
    let is_it = |value: &str| value.contains(&shown) || Path::new(value.trim()) == path;
    document.descendants().any(|node| {
        node.text().is_some_and(is_it) || node.attributes().any(|attribute| is_it(attribute.value()))
    })
}

/// As libvirt writes it.
fn escaped(text: &str) -> String {
    let pairs = [
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("\"", "&quot;"),
        ("'", "&apos;"),
    ];
    pairs.iter().fold(text.to_owned(), |text, (plain, escaped)| {
        text.replace(plain, escaped)
    })
}

pub(super) fn root<'a, 'i>(document: &'a Document<'i>) -> Result<Node<'a, 'i>, DomainError> {
    let root = document.root_element();
    if is(root, "domain") {
        Ok(root)
    } else {
        Err(DomainError::NotADomain {
            found: root.tag_name().name().to_owned(),
            at: Position::of(root),
        })
    }
}

/// Whether this is libvirt's element `name`: those have no namespace.
pub(super) fn is(node: Node<'_, '_>, name: &str) -> bool {
    node.is_element() && node.tag_name().namespace().is_none() && node.tag_name().name() == name
}

/// All of libvirt's elements `name` directly below `node`.
pub(super) fn children<'a, 'i>(node: Node<'a, 'i>, name: &str) -> impl Iterator<Item = Node<'a, 'i>> {
    node.children().filter(move |child| is(*child, name))
}

/// libvirt's element `name` directly below `node`; libvirt too looks at the first one only.
pub(super) fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    children(node, name).next()
}

/// The text directly in `node`, comments left out.
pub(super) fn text(node: Node<'_, '_>) -> String {
    node.children()
        .filter(Node::is_text)
        .filter_map(|child| child.text())
        .collect()
}

/// Every `<disk>` with its `<target dev=…>`.
pub(super) fn disk_nodes<'a, 'i>(root: Node<'a, 'i>) -> Result<Vec<(&'a str, Node<'a, 'i>)>, DomainError> {
    let mut seen = HashSet::new();
    let devices = children(root, "devices").flat_map(|devices| children(devices, "disk"));
    devices
        .map(|disk| {
            let target = attribute(
                required(disk, "target", "<target>")?,
                "dev",
                "the target's attribute dev",
            )?;
            if seen.insert(target) {
                Ok((target, disk))
            } else {
                Err(DomainError::Twice {
                    what: format!("disk {target}"),
                    at: Position::of(disk),
                })
            }
        })
        .collect()
}

/// The `<tpm>` that holds the VM's state: an emulator before any other.
pub(super) fn tpm_node<'a, 'i>(root: Node<'a, 'i>) -> Option<Node<'a, 'i>> {
    let tpms = || children(root, "devices").flat_map(|devices| children(devices, "tpm"));
    let emulated = |tpm: &Node<'_, '_>| {
        child(*tpm, "backend").is_some_and(|backend| backend.attribute("type") == Some("emulator"))
    };
    tpms().find(emulated).or_else(|| tpms().next())
}

/// The `<encryption>` of a disk: in its `<source>`, or in the `<disk>` itself as older XML has it.
pub(super) fn disk_encryption<'a, 'i>(disk: Node<'a, 'i>) -> Option<Node<'a, 'i>> {
    child(disk, "source")
        .and_then(|source| child(source, "encryption"))
        .or_else(|| child(disk, "encryption"))
}

pub(super) fn required<'a, 'i>(
    node: Node<'a, 'i>,
    name: &str,
    what: &'static str,
) -> Result<Node<'a, 'i>, DomainError> {
    child(node, name).ok_or_else(|| DomainError::Missing {
        what,
        at: Position::of(node),
    })
}

pub(super) fn attribute<'a>(
    node: Node<'a, '_>,
    name: &str,
    what: &'static str,
) -> Result<&'a str, DomainError> {
    node.attribute(name).ok_or_else(|| DomainError::Missing {
        what,
        at: Position::of(node),
    })
}

pub(super) fn parsed<T: FromStr>(node: Node<'_, '_>, what: &'static str) -> Result<T, DomainError> {
    value(node, text(node).trim(), what)
}

pub(super) fn value<T: FromStr>(
    node: Node<'_, '_>,
    found: &str,
    what: &'static str,
) -> Result<T, DomainError> {
    found.parse().map_err(|_| DomainError::Value {
        what,
        found: found.chars().take(80).collect(),
        at: Position::of(node),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_named_however_libvirt_writes_it() {
        let names = |xml: &str| names_path(xml, Path::new("/images/a & 'b'"));
        assert!(names(
            "<domain><source file='/images/a &amp; &apos;b&apos;'/></domain>"
        ));
        assert!(names("<domain><source file=\"/images//a &amp; 'b'\"/></domain>"));
        assert!(names("<domain><nvram>/images/a &amp; 'b'\n</nvram></domain>"));
        assert!(names(
            "<domain><arg value='file=/images/a &amp; &apos;b&apos;,if=virtio'/></domain>"
        ));
        assert!(!names("<domain><source file='/images/a'/></domain>"));
        // What can't be read.
        assert!(names("<domain><source file='/images/a &amp; &apos;b&apos;'/>"));
        assert!(names("<domain><source file=\"/images/a & 'b'\"/>"));
        assert!(!names("<domain><source file='/images/a'/>"));
    }
}
