//! What virtseal keeps in a domain's `<metadata>`: copies of the VM's envelopes, so that they travel with it.
//!
//! ```xml
//! <metadata>
//!   <virtseal:vm xmlns:virtseal='urn:virtseal:vm:1'>
//!     <virtseal:envelope id='…'>{"version":2,…}</virtseal:envelope>
//!   </virtseal:vm>
//! </metadata>
//! ```
//!
//! The namespace counts, not its prefix: others may rewrite that. What a later virtseal added in this namespace is
//! kept; a form that this one would misread gets a new namespace, or a new
//! version in the envelope. An envelope that can't be read is listed in [`Metadata::unreadable`] and hides no other: the
//! keystore may have it.

use std::collections::HashSet;
use std::path::PathBuf;

use roxmltree::Node;

use super::xml::{child, parse_document, text};
use super::{DomainError, Position};
use crate::model::envelope::{Envelope, EnvelopeId};
use crate::model::problem::chain;

/// The contents of `<virtseal:vm>`. Its mere presence makes a VM a sealed one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Metadata {
    /// In the order of the XML, each id once. Nothing in them can be believed before one was verified by its key.
    pub envelopes: Vec<Envelope>,
    /// Those that can't be read, and second ones of an id, for a warning.
    pub unreadable: Vec<UnreadableCopy>,
}

/// An `<envelope>` that is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UnreadableCopy {
    /// What its element says.
    pub id: Option<EnvelopeId>,
    /// Where it is, and what is wrong with it.
    pub reason: String,
}

impl Metadata {
    /// The namespace of everything virtseal writes into domain XML.
    pub(crate) const NAMESPACE: &'static str = "urn:virtseal:vm:1";

    /// The prefix that virtseal writes for it.
    pub(crate) const PREFIX: &'static str = "virtseal";

    /// The envelopes in any XML that libvirt keeps: that of a snapshot has one domain or two inside.
    pub(crate) fn envelopes_in(xml: &str) -> Result<(Vec<Envelope>, Vec<UnreadableCopy>), DomainError> {
        let document = parse_document(xml)?;
        let nodes = document.descendants().filter(|node| is_ours(*node, "envelope"));
        let found = nodes
            .zip(1..)
            .map(|(node, number)| (node, envelope(node, number)));
        Ok(sorted_out(found))
    }

    /// The ids of the envelopes in any XML, also of those that can't be read.
    pub(crate) fn ids_in(xml: &str) -> Vec<EnvelopeId> {
        let Ok(document) = parse_document(xml) else {
            return Vec::new();
        };
        let nodes = document.descendants().filter(|node| is_ours(*node, "envelope"));
        let id = |node: Node<'_, '_>| match node.attribute("id") {
            Some(id) => id.parse().ok(),
            None => envelope(node, 1).ok().map(|envelope| envelope.id),
        };
        nodes.filter_map(id).collect()
    }

    /// The files and devices that any XML names as a source, those that a disk is based on too.
    pub(crate) fn sources_in(xml: &str) -> Result<Vec<PathBuf>, DomainError> {
        let document = parse_document(xml)?;
        let sources = document.descendants().filter(|node| node.has_tag_name("source"));
        let paths = sources.filter_map(|node| node.attribute("file").or_else(|| node.attribute("dev")));
        Ok(paths
            .filter(|path| path.starts_with('/'))
            .map(PathBuf::from)
            .collect())
    }

    /// What is wrong with the copy of this envelope, where none can be read.
    pub(crate) fn unreadable(&self, id: EnvelopeId) -> Option<String> {
        let mut copies = self.unreadable.iter().filter(|_| self.envelope(id).is_none());
        copies
            .find(|copy| copy.id == Some(id))
            .map(|copy| copy.reason.clone())
    }

    /// Whether there is a copy of this envelope, readable or not.
    pub(crate) fn names(&self, id: EnvelopeId) -> bool {
        self.envelope(id).is_some() || self.unreadable.iter().any(|copy| copy.id == Some(id))
    }

    pub(crate) fn envelope(&self, id: EnvelopeId) -> Option<&Envelope> {
        self.envelopes.iter().find(|envelope| envelope.id == id)
    }
}

pub(super) fn read(root: Node<'_, '_>) -> Result<Option<Metadata>, DomainError> {
    let Some(vm) = vm_node(root)? else {
        return Ok(None);
    };
    let (envelopes, unreadable) = sorted_out(envelope_nodes(vm));
    Ok(Some(Metadata {
        envelopes,
        unreadable,
    }))
}

/// Our element `name`, under whatever prefix.
pub(super) fn is_ours(node: Node<'_, '_>, name: &str) -> bool {
    node.is_element()
        && node.tag_name().namespace() == Some(Metadata::NAMESPACE)
        && node.tag_name().name() == name
}

pub(super) fn vm_node<'a, 'i>(root: Node<'a, 'i>) -> Result<Option<Node<'a, 'i>>, DomainError> {
    let Some(holder) = child(root, "metadata") else {
        return Ok(None);
    };
    let mut found = holder.children().filter(|node| is_ours(*node, "vm"));
    let first = found.next();
    match found.next() {
        None => Ok(first),
        Some(second) => Err(DomainError::Twice {
            what: "virtseal metadata".into(),
            at: Position::of(second),
        }),
    }
}

/// Every `<envelope>`, with what is in it: a second one of an id is an error.
pub(super) fn envelope_nodes<'a, 'i>(vm: Node<'a, 'i>) -> Vec<(Node<'a, 'i>, Result<Envelope, DomainError>)> {
    let mut seen = HashSet::new();
    let nodes = vm.children().filter(|node| is_ours(*node, "envelope"));
    nodes
        .zip(1..)
        .map(|(node, number)| {
            let envelope = envelope(node, number).and_then(|envelope| {
                if seen.insert(envelope.id) {
                    Ok(envelope)
                } else {
                    Err(DomainError::Twice {
                        what: format!("envelope {}", envelope.id),
                        at: Position::of(node),
                    })
                }
            });
            (node, envelope)
        })
        .collect()
}

pub(super) fn stated_id(node: Node<'_, '_>) -> Option<EnvelopeId> {
    node.attribute("id").and_then(|id| id.parse().ok())
}

fn sorted_out<'a, 'i: 'a>(
    found: impl IntoIterator<Item = (Node<'a, 'i>, Result<Envelope, DomainError>)>,
) -> (Vec<Envelope>, Vec<UnreadableCopy>) {
    let (mut envelopes, mut unreadable) = (Vec::new(), Vec::new());
    for (node, envelope) in found {
        match envelope {
            Ok(envelope) => envelopes.push(envelope),
            Err(error) => unreadable.push(UnreadableCopy {
                id: stated_id(node),
                reason: chain(&error),
            }),
        }
    }
    (envelopes, unreadable)
}

pub(super) fn envelope(node: Node<'_, '_>, number: u32) -> Result<Envelope, DomainError> {
    let stated = node.attribute("id");
    let envelope = Envelope::from_json(text(node).trim()).map_err(|source| DomainError::Envelope {
        which: stated.map_or_else(|| format!("number {number}"), str::to_owned),
        at: Position::of(node),
        source,
    })?;
    match stated {
        Some(id) if id.parse() != Ok(envelope.id) => Err(DomainError::EnvelopeName {
            stated: id.to_owned(),
            found: envelope.id,
            at: Position::of(node),
        }),
        _ => Ok(envelope),
    }
}

/// The envelope's JSON in ASCII: libvirtd keeps it in any locale, and XML has no character that it can't hold.
pub(super) fn ascii_json(envelope: &Envelope) -> String {
    let mut out = String::new();
    for found in envelope.to_json().chars() {
        if found.is_ascii() && found != '\x7f' {
            out.push(found);
        } else {
            let mut units = [0; 2];
            for unit in found.encode_utf16(&mut units) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    out
}
