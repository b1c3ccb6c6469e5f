//! The envelopes in the metadata.

use virtseal::domain::edit::set_envelopes;
use virtseal::domain::{Domain, DomainError};
use virtseal::envelope::{Generation, ObjectKind};

use crate::{envelope, fixture, id, seal_all};

#[test]
fn metadata_is_found_under_any_prefix_and_later_parts_of_it_stay() {
    let xml = seal_all(&fixture("libvirt9-uefi.xml"));
    let prefixed = xml
        .replace("<virtseal:", "<ns0:")
        .replace("</virtseal:", "</ns0:");
    let prefixed = prefixed.replace("xmlns:virtseal", "xmlns:ns0");
    let bare = prefixed
        .replace("<ns0:", "<")
        .replace("</ns0:", "</")
        .replace("xmlns:ns0", "xmlns");
    for other in [prefixed, bare] {
        let later = other.replace(
            "urn:virtseal:vm:1'>",
            "urn:virtseal:vm:1' new='1'>\n      <policy xmlns='urn:virtseal:vm:1'/>",
        );
        let domain = Domain::parse(&later).unwrap();
        let metadata = domain.metadata.unwrap();
        assert_eq!(metadata.envelopes.len(), 3);
        assert_eq!(metadata.unknown, ["attribute new", "<policy>"]);
        let mut envelopes = metadata.envelopes;
        envelopes[0].generation = Generation(2);
        envelopes.pop();
        envelopes.push(envelope(domain.uuid, id(50), ObjectKind::Disk));
        let written = set_envelopes(&later, &envelopes).unwrap();
        let read = Domain::parse(&written).unwrap().metadata.unwrap();
        assert_eq!(read.envelopes, envelopes);
        assert_eq!(read.unknown, ["attribute new", "<policy>"]);
        assert!(!written.contains("virtseal:envelope"));
    }
}

#[test]
fn a_newer_generation_is_never_overwritten() {
    let xml = seal_all(&fixture("libvirt9-uefi.xml"));
    let domain = Domain::parse(&xml).unwrap();
    let mut envelopes = domain.metadata.unwrap().envelopes;
    let old = envelopes.clone();
    envelopes[1].generation = Generation(7);
    let newer = set_envelopes(&xml, &envelopes).unwrap();
    assert!(matches!(
        set_envelopes(&newer, &old),
        Err(DomainError::NewerEnvelope {
            found: Generation(7),
            given: Generation(1),
            ..
        })
    ));
}

#[test]
fn a_damaged_envelope_is_named() {
    let xml = seal_all(&fixture("libvirt9-uefi.xml"));
    let error = Domain::parse(&xml.replacen("\"version\":2", "\"version\":", 1)).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("6:7: the envelope {} in the metadata can't be read", id(100))
    );
    let error = Domain::parse(&xml.replacen("\"version\":2", "\"version\":3", 1)).unwrap_err();
    assert!(
        std::error::Error::source(&error)
            .unwrap()
            .to_string()
            .contains("upgrade virtseal")
    );
    let error = Domain::parse(&xml.replacen(
        &format!("envelope id='{}'", id(100)),
        &format!("envelope id='{}'", id(7)),
        1,
    ));
    assert!(matches!(error, Err(DomainError::EnvelopeName { .. })));
    let second = xml.replace("</metadata>", "<vm xmlns='urn:virtseal:vm:1'/></metadata>");
    assert!(matches!(Domain::parse(&second), Err(DomainError::Twice { .. })));
}
