//! The domain XML on stdin: is it a sealed VM, and which?

use std::io::{ErrorKind, Read};

use nix::poll::PollFlags;
use roxmltree::{Document, Node, ParsingOptions};

use crate::deadline::Deadline;

/// libvirt's own limit of a string in its protocol.
const MAX_XML: usize = 4 * 1024 * 1024;
const MAX_NODES: u32 = 200_000;
/// What every namespace of virtseal starts with: metadata of a later version makes a sealed VM too.
const NAMESPACE: &str = "urn:virtseal:";

/// A sealed VM.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Vm<'x> {
    /// 36 characters, checked: it becomes part of a mount's name.
    pub(crate) uuid: String,
    pub(crate) name: String,
    /// The domain id, which it has from just before its start.
    pub(crate) id: Option<u32>,
    pub(crate) xml: &'x str,
}

/// What the XML is about.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found<'x> {
    Unsealed,
    Sealed(Vm<'x>),
    /// Why it can't be told.
    Unreadable(String),
}

/// All of stdin, or what came of it before the deadline and the limit.
pub(crate) fn read_stdin(deadline: &Deadline) -> Vec<u8> {
    let mut stdin = std::io::stdin().lock();
    let mut xml = Vec::with_capacity(16 * 1024);
    let mut chunk = [0; 16 * 1024];
    while xml.len() <= MAX_XML && deadline.wait(&stdin, PollFlags::POLLIN).is_ok() {
        match stdin.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => xml.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    xml
}

/// Whether virtseal's namespace is anywhere in the text: the question that works on broken XML too.
pub(crate) fn has_marker(xml: &[u8]) -> bool {
    xml.windows(NAMESPACE.len())
        .any(|window| window == NAMESPACE.as_bytes())
}

pub(crate) fn find(xml: &[u8]) -> Found<'_> {
    if xml.len() > MAX_XML {
        return Found::Unreadable(format!("its XML has more than {MAX_XML} bytes"));
    }
    let Ok(xml) = std::str::from_utf8(xml) else {
        return Found::Unreadable("its XML is not UTF-8".into());
    };
    let options = ParsingOptions {
        allow_dtd: false,
        nodes_limit: MAX_NODES,
        ..ParsingOptions::default()
    };
    match Document::parse_with_options(xml, options) {
        Ok(document) => vm(xml, document.root_element()),
        Err(error) => Found::Unreadable(format!("its XML is malformed ({error})")),
    }
}

fn vm<'x>(xml: &'x str, root: Node<'_, '_>) -> Found<'x> {
    if root.tag_name().name() != "domain" {
        return Found::Unreadable("its XML is no <domain>".into());
    }
    if !children(root, "metadata").any(|metadata| metadata.children().any(is_ours)) {
        return Found::Unsealed;
    }
    let text = |name| children(root, name).next().and_then(|node| node.text());
    match (
        text("uuid").map(str::trim).filter(|uuid| is_uuid(uuid)),
        text("name"),
    ) {
        (Some(uuid), Some(name)) => Found::Sealed(Vm {
            uuid: uuid.to_ascii_lowercase(),
            name: name.to_owned(),
            id: root.attribute("id").and_then(|id| id.parse().ok()),
            xml,
        }),
        _ => Found::Unreadable("its XML has no name or UUID".into()),
    }
}

fn children<'a, 'i>(node: Node<'a, 'i>, name: &str) -> impl Iterator<Item = Node<'a, 'i>> {
    node.children().filter(move |child| {
        child.is_element() && child.tag_name().namespace().is_none() && child.tag_name().name() == name
    })
}

fn is_ours(node: Node<'_, '_>) -> bool {
    node.is_element()
        && node
            .tag_name()
            .namespace()
            .is_some_and(|found| found.starts_with(NAMESPACE))
}

fn is_uuid(text: &str) -> bool {
    let dash = |at| matches!(at, 8 | 13 | 18 | 23);
    let fits = |(at, found): (usize, u8)| {
        if dash(at) {
            found == b'-'
        } else {
            found.is_ascii_hexdigit()
        }
    };
    text.len() == 36 && text.bytes().enumerate().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b7";

    fn xml(metadata: &str) -> String {
        format!("<domain type='kvm' id='7'><name>web01</name><uuid>{UUID}</uuid>{metadata}</domain>")
    }

    fn sealed(metadata: &str) -> bool {
        matches!(find(xml(metadata).as_bytes()), Found::Sealed(_))
    }

    #[test]
    fn metadata_of_any_version_and_prefix_makes_a_sealed_vm() {
        for metadata in [
            "<metadata><virtseal:vm xmlns:virtseal='urn:virtseal:vm:1'/></metadata>",
            "<metadata><other/><vm xmlns=\"urn:virtseal:vm:1\"><envelope/></vm></metadata>",
            "<metadata><n:machine xmlns:n='urn:virtseal:vm:2'/></metadata>",
        ] {
            assert!(sealed(metadata), "{metadata}");
        }
    }

    #[test]
    fn mentioning_the_namespace_does_not() {
        for metadata in [
            "",
            "<metadata/>",
            "<description>urn:virtseal:vm:1</description>",
            "<metadata><a:vm xmlns:a='urn:other'>urn:virtseal:vm:1</a:vm></metadata>",
        ] {
            assert!(!sealed(metadata), "{metadata}");
        }
    }

    #[test]
    fn a_sealed_vm_is_read() {
        let xml = xml("<metadata><vm xmlns='urn:virtseal:vm:1'/></metadata>");
        let expected = Vm {
            uuid: UUID.into(),
            name: "web01".into(),
            id: Some(7),
            xml: &xml,
        };
        assert_eq!(find(xml.as_bytes()), Found::Sealed(expected));
    }

    #[test]
    fn what_cannot_be_read_says_why() {
        let metadata = "<metadata><vm xmlns='urn:virtseal:vm:1'/></metadata>";
        for broken in [
            b"<domain>".to_vec(),
            b"\xff<domain/>".to_vec(),
            b"<!DOCTYPE d [<!ENTITY a 'b'>]><domain/>".to_vec(),
            b"<network/>".to_vec(),
            format!("<domain><name>a</name><uuid>../../etc</uuid>{metadata}</domain>").into_bytes(),
            vec![b' '; MAX_XML + 1],
        ] {
            assert!(matches!(find(&broken), Found::Unreadable(_)));
        }
    }
}
