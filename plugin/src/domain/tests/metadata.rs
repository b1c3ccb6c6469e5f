//! The envelopes in the metadata.

use crate::domain::edit::set_envelopes;
use crate::domain::{Domain, DomainError};
use crate::model::envelope::{Envelope, Generation, ObjectKind};

use super::{envelope, fixture, id, seal_all};

fn generation(count: u64) -> Generation {
    serde_json::from_value(count.into()).unwrap()
}

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
        let mut envelopes = metadata.envelopes;
        envelopes[0].generation = generation(2);
        envelopes.pop();
        envelopes.push(envelope(domain.uuid, id(50), ObjectKind::Disk));
        let written = set_envelopes(&later, &envelopes).unwrap();
        let read = Domain::parse(&written).unwrap().metadata.unwrap();
        assert_eq!(read.envelopes, envelopes);
        // What a later version has put there stays.
        assert!(
            written.contains("new='1'") && written.contains("<policy "),
            "{written}"
        );
        assert!(!written.contains("virtseal:envelope"));
    }
}

/// Whether it is what it claims, only the key tells; format 1 has nothing to show.
#[test]
fn what_claims_to_be_newer_stays_in_format_2_alone() {
    let xml = seal_all(&fixture("libvirt9-uefi.xml"));
    let domain = Domain::parse(&xml).unwrap();
    let mut envelopes = domain.metadata.unwrap().envelopes;
    let old = envelopes.clone();
    envelopes[1].generation = generation(7);
    let newer = set_envelopes(&xml, &envelopes).unwrap();
    assert_eq!(set_envelopes(&newer, &old).unwrap(), newer);
    let mut format_1: serde_json::Value = serde_json::from_str(&envelopes[1].to_json()).unwrap();
    format_1["version"] = 1.into();
    let fields = format_1.as_object_mut().unwrap();
    fields.retain(|field, _| !["mac", "seen", "shared_with"].contains(&field.as_str()));
    envelopes[1] = Envelope::from_json(&format_1.to_string()).unwrap();
    assert_eq!(envelopes[1].generation, generation(7));
    let claimed = set_envelopes(&xml, &envelopes).unwrap();
    assert_eq!(Domain::parse(&claimed).unwrap().metadata.unwrap().envelopes, old);
}

/// A copy that can't be read is named, hides no other, and gives way to what is known.
#[test]
fn a_damaged_envelope_is_named_and_hides_no_other() {
    let xml = seal_all(&fixture("libvirt9-uefi.xml"));
    let whole = Domain::parse(&xml).unwrap().metadata.unwrap().envelopes;
    let as_id = format!("envelope id='{}'", id(100));
    let other_id = format!("envelope id='{}'", id(7));
    for (from, to, said) in [
        ("\"version\":2", "\"version\":", "can't be read"),
        ("\"version\":2", "\"version\":1", "not those of format 1"),
        (
            "\"generation\":1,",
            "\"generation\":18446744073709551615,",
            "generation",
        ),
        (as_id.as_str(), other_id.as_str(), "calls an envelope"),
    ] {
        let damaged = xml.replacen(from, to, 1);
        assert_ne!(damaged, xml);
        let metadata = Domain::parse(&damaged).unwrap().metadata.unwrap();
        assert_eq!(metadata.envelopes, whole[1..], "{said}");
        assert_eq!(metadata.unreadable.len(), 1);
        let reason = &metadata.unreadable[0].reason;
        assert!(reason.starts_with("6:7: ") && reason.contains(said), "{reason}");
        let mended = set_envelopes(&damaged, &whole).unwrap();
        let metadata = Domain::parse(&mended).unwrap().metadata.unwrap();
        assert_eq!(metadata.envelopes.len(), 3, "{said}");
        assert!(whole.iter().all(|envelope| metadata.envelopes.contains(envelope)));
    }
    // A later virtseal can read it.
    let later = xml.replacen("\"version\":2", "\"version\":3", 1);
    let unreadable = Domain::parse(&later).unwrap().metadata.unwrap().unreadable;
    assert!(unreadable[0].reason.contains("upgrade virtseal"));
    assert_eq!(unreadable[0].id, Some(id(100)));
    assert_eq!(set_envelopes(&later, &whole).unwrap(), later);
    let second = xml.replace("</metadata>", "<vm xmlns='urn:virtseal:vm:1'/></metadata>");
    assert!(matches!(Domain::parse(&second), Err(DomainError::Twice { .. })));
}

/// The first of two counts as the copy, and the second goes with the next change.
#[test]
fn a_second_copy_is_no_way_in() {
    let xml = seal_all(&fixture("libvirt9-uefi.xml"));
    let whole = Domain::parse(&xml).unwrap().metadata.unwrap().envelopes;
    let start = xml.find("<virtseal:envelope").unwrap();
    let end = xml.find("</virtseal:envelope>").unwrap() + "</virtseal:envelope>".len();
    let mut twice = xml.clone();
    twice.insert_str(
        end,
        &xml[start..end].replace("\"generation\":1", "\"generation\":9"),
    );
    let metadata = Domain::parse(&twice).unwrap().metadata.unwrap();
    assert_eq!(
        (metadata.envelopes, metadata.unreadable.len()),
        (whole.clone(), 1)
    );
    let mended = Domain::parse(&set_envelopes(&twice, &whole).unwrap()).unwrap();
    assert_eq!(mended.metadata.unwrap().unreadable, []);
}
