//! The domain XML on stdin: is it a sealed VM, which one is it, and whose secrets does it name?

use std::io::{ErrorKind, Read};

use nix::poll::PollFlags;
use roxmltree::{Document, Node, ParsingOptions};
use xml_bounds::bounded;

use crate::deadline::Deadline;
use crate::evidence::NAMESPACE;
use crate::index::Id;

/// libvirt's own limit of a string in its protocol.
const MAX_XML: usize = 4 * 1024 * 1024;
const MAX_NODES: u32 = 200_000;
/// What virtseald puts before the UUID in the usage of its secrets.
const USAGE: &str = "virtseal:";

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

/// A VM without virtseal's metadata.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plain {
    /// Its UUID; more if the XML has more.
    pub(crate) uuids: Vec<Id>,
    /// Every UUID that stands alone in an attribute or a text where libvirt may take it for a secret's, or in the usage of
    /// one of ours.
    pub(crate) named: Vec<Id>,
    /// Whether it names any secret at all.
    pub(crate) has_secrets: bool,
    /// Whether it boots by UEFI: others can't be sealed.
    pub(crate) is_uefi: bool,
}

/// What the XML is about.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found<'x> {
    Unsealed(Plain),
    Sealed(Vm<'x>),
    /// Why it can't be told.
    Unreadable(String),
}

/// What came on stdin.
pub(crate) struct Input {
    /// The start of it, a little more than is ever parsed.
    pub(crate) xml: Vec<u8>,
    /// Whether it ended before the deadline.
    pub(crate) whole: bool,
}

/// Reads all of stdin, as long as the deadline lasts, and shows it to `evidence`: also what is behind the limit.
pub(crate) fn read_stdin(deadline: &Deadline, mut evidence: impl FnMut(&[u8])) -> Input {
    let mut stdin = std::io::stdin().lock();
    let mut input = Input {
        xml: Vec::with_capacity(16 * 1024),
        whole: false,
    };
    let mut chunk = [0; 16 * 1024];
    while deadline.wait(&stdin, PollFlags::POLLIN).is_ok() {
        let read = match stdin.read(&mut chunk) {
            Ok(0) => {
                input.whole = true;
                break;
            }
            Ok(count) => &chunk[..count],
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        evidence(read);
        let room = (MAX_XML + 1).saturating_sub(input.xml.len());
        input.xml.extend_from_slice(&read[..read.len().min(room)]);
    }
    input
}

pub(crate) fn find(xml: &[u8]) -> Found<'_> {
    if xml.len() > MAX_XML {
        return Found::Unreadable(format!("its XML has more than {MAX_XML} bytes"));
    }
    let Ok(xml) = std::str::from_utf8(xml) else {
        return Found::Unreadable("its XML is not UTF-8".into());
    };
    if let Err(beyond) = bounded(xml.as_bytes()) {
        return Found::Unreadable(format!("its XML is beyond what is read: {beyond}"));
    }
    let options = ParsingOptions {
        allow_dtd: false,
        nodes_limit: MAX_NODES,
        ..ParsingOptions::default()
    };
    #[expect(clippy::disallowed_methods, reason = "the bounds were checked")]
    match Document::parse_with_options(xml, options) {
        Ok(document) => vm(xml, document.root_element()),
        Err(error) => Found::Unreadable(format!("its XML is malformed ({error})")),
    }
}

fn vm<'x>(xml: &'x str, root: Node<'_, '_>) -> Found<'x> {
    if root.tag_name().name() != "domain" {
        return Found::Unreadable("its XML is not a <domain>".into());
    }
    if !children(root, "metadata").any(|metadata| metadata.children().any(is_ours)) {
        return Found::Unsealed(plain(root));
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

/// By what virtseald takes for UEFI (`domain/read.rs` there).
fn is_uefi(root: Node<'_, '_>) -> bool {
    children(root, "os").any(|os| {
        let by_pflash = |loader: Node<'_, '_>| loader.attribute("type") == Some("pflash");
        os.attribute("firmware") == Some("efi")
            || children(os, "loader").any(by_pflash)
            || children(os, "nvram").next().is_some()
    })
}

/// Does not ask where libvirt looks for secrets, which grows with every version: everywhere but in what is only for people
/// and other programs.
fn plain(root: Node<'_, '_>) -> Plain {
    let mut found = Plain {
        uuids: children(root, "uuid")
            .filter_map(|uuid| Id::spelled(&text(uuid)))
            .collect(),
        is_uefi: is_uefi(root),
        ..Plain::default()
    };
    let parts = root.children().filter(|part| {
        !["metadata", "title", "description", "name", "uuid"].contains(&part.tag_name().name())
    });
    for node in parts.flat_map(|part| part.descendants()).filter(Node::is_element) {
        let attributes = node.attributes();
        found.has_secrets |= node.tag_name().name() == "secret"
            || attributes.clone().any(|attribute| attribute.name() == "secret");
        found
            .named
            .extend(attributes.filter_map(|attribute| named(attribute.value())));
        found.named.extend(named(&text(node)));
    }
    found
}

fn named(value: &str) -> Option<Id> {
    Id::spelled(value.strip_prefix(USAGE).unwrap_or(value))
}

/// The text directly in `node`, comments left out.
fn text(node: Node<'_, '_>) -> String {
    node.children()
        .filter(Node::is_text)
        .filter_map(|child| child.text())
        .collect()
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
            format!(
                "<domain {}/>",
                (0..300).map(|n| format!("a{n}='' ")).collect::<String>()
            )
            .into_bytes(),
        ] {
            assert!(matches!(find(&broken), Found::Unreadable(_)));
        }
    }

    #[test]
    fn secrets_are_found_wherever_they_are_named() {
        let secret = "0b0e5d1c-7f4e-4a52-9b29-0c6fd6d4a111";
        let id = Id::spelled(secret).unwrap();
        let bare = secret.replace('-', "");
        let spaced = secret.to_uppercase().replace('-', " ");
        for part in [
            format!(
                "<devices><disk><source><encryption><secret uuid='{secret}'/></encryption></source></disk></devices>"
            ),
            format!(
                "<devices><disk><encryption><secret usage='virtseal:{secret}'/></encryption></disk></devices>"
            ),
            format!(
                "<devices><disk><backingStore><backingStore><source><encryption><secret uuid='{bare}'/></encryption>\
                     </source></backingStore></backingStore></disk></devices>"
            ),
            format!(
                "<os><nvram><source><encryption><secret uuid=' {spaced}'/></encryption></source></nvram></os>"
            ),
            format!("<devices><tpm><backend><encryption secret='{bare}'/></backend></tpm></devices>"),
            format!(
                "<devices><hostdev><source><auth><secret uuid='&#48;{}'/></auth></source></hostdev></devices>",
                &secret[1..]
            ),
            format!(
                "<devices><disk><mirror><source><slices/><encryption><secret uuid='{secret}'/></encryption></source>\
                     </mirror></disk></devices>"
            ),
            format!(
                "<of-a-later-libvirt><key>{}<!-- -->{}</key></of-a-later-libvirt>",
                &secret[..9],
                &secret[9..]
            ),
        ] {
            let xml = xml(&part);
            let Found::Unsealed(plain) = find(xml.as_bytes()) else {
                panic!("{xml}");
            };
            assert!(plain.named.contains(&id), "{xml}");
            assert!(plain.has_secrets || part.contains("later"), "{xml}");
        }
        for part in [
            format!("<description>{secret}</description><title>{secret}</title>"),
            format!("<metadata><a:b xmlns:a='urn:other' secret='{secret}'>{secret}</a:b></metadata>"),
            format!("<devices><disk><source file='/images/{secret}.qcow2'/></disk></devices>"),
        ] {
            let uuids = vec![Id::spelled(UUID).unwrap()];
            let plain = Plain {
                uuids,
                ..Plain::default()
            };
            assert_eq!(find(xml(&part).as_bytes()), Found::Unsealed(plain), "{part}");
        }
    }
}
