//! Every secret that a domain's XML may name, wherever it stands.

use roxmltree::Node;
use uuid::Uuid;

use super::DomainError;
use super::xml::{parse_document, root, text};
use crate::model::envelope::EnvelopeId;

/// What virtseal puts before the UUID in the usage of its secrets.
const USAGE: &str = "virtseal:";
/// What is only for people and other programs, and the VM's own name and id.
const FREE: [&str; 5] = ["metadata", "title", "description", "name", "uuid"];

/// The ids in attributes and texts of domain XML that libvirt could take for a secret's UUID, or as the usage of one of ours.
/// Where it looks for secrets grows with every version, so this asks for no place; the hook has the same rule for VMs without
/// metadata.
pub(crate) fn named_secrets(xml: &str) -> Result<Vec<EnvelopeId>, DomainError> {
    let document = parse_document(xml)?;
    let parts = root(&document)?.children();
    let nodes = parts
        .filter(|part| !FREE.contains(&part.tag_name().name()))
        .flat_map(|part| part.descendants())
        .filter(Node::is_element);
    let mut found = Vec::new();
    for node in nodes {
        found.extend(node.attributes().filter_map(|attribute| named(attribute.value())));
        found.extend(named(&text(node)));
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// As libvirt takes a UUID: in any case, dashes and spaces wherever they are.
fn named(value: &str) -> Option<EnvelopeId> {
    let value = value.strip_prefix(USAGE).unwrap_or(value);
    let is_part = |byte: u8| byte.is_ascii_hexdigit() || byte == b'-' || byte.is_ascii_whitespace();
    if value.len() < 32 || !value.bytes().all(is_part) {
        return None;
    }
    let digits: String = value.chars().filter(char::is_ascii_hexdigit).collect();
    (digits.len() == 32).then(|| Uuid::try_parse(&digits).ok().map(EnvelopeId))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_found_in_every_place_and_spelling() {
        let secret = "0b0e5d1c-7f4e-4a52-9b29-0c6fd6d4a111";
        let id: EnvelopeId = secret.parse().unwrap();
        let spaced = secret.to_uppercase().replace('-', " ");
        let bare = secret.replace('-', "");
        let of = |part: &str| {
            named_secrets(&format!(
                "<domain type='kvm'><name>{secret}</name><uuid>{secret}</uuid>{part}</domain>"
            ))
            .unwrap()
        };
        for part in [
            format!("<devices><disk><encryption><secret uuid=' {spaced}'/></encryption></disk></devices>"),
            format!(
                "<devices><disk><backingStore><secret usage='virtseal:{secret}'/></backingStore></disk></devices>"
            ),
            format!("<devices><hostdev><auth><secret uuid='{bare}'/></auth></hostdev></devices>"),
            format!("<later>{}<!-- -->{}</later>", &secret[..9], &secret[9..]),
        ] {
            assert_eq!(of(&part), [id], "{part}");
        }
        for part in [
            format!("<metadata><a secret='{secret}'/></metadata><title>{secret}</title>"),
            format!("<devices><disk><source file='/images/{secret}'/></disk></devices>"),
            format!("<a b='{secret}0'/>"),
        ] {
            assert_eq!(of(&part), [], "{part}");
        }
    }
}
