//! Copies in a domain's XML and its images that are not what the keystore has: what `vm status` says of them.
//!
//! Status has no key, so it tells only what they claim. One that is behind follows by itself, and is not worth a word.

use std::collections::BTreeMap;
use std::path::Path;

use crate::domain::Domain;
use crate::model::envelope::{Envelope, EnvelopeId, Precedence};
use crate::object::disk::ImageCopy;
use crate::store::EnvelopeRecord;
use crate::terminal::word;

pub(crate) fn of(domain: &Domain, records: &BTreeMap<EnvelopeId, EnvelopeRecord>) -> Vec<String> {
    let Some(metadata) = &domain.metadata else {
        return Vec::new();
    };
    let name = &domain.name;
    let mut warnings: Vec<_> = metadata
        .envelopes
        .iter()
        .filter_map(|copy| match records.get(&copy.id) {
            Some(record) => rival(name, &format!("the XML of {name}"), copy, &record.envelope),
            None => unknown(name, copy),
        })
        .collect();
    warnings.extend(metadata.unreadable.iter().map(|copy| {
        let known = copy.id.is_some_and(|id| records.contains_key(&id));
        let used = if known { "; the keystore's is used" } else { "" };
        format!("{name}: {}{used}", copy.reason)
    }));
    warnings
}

/// Of the copy in the image at `path`, whose envelope the keystore has as `kept`.
pub(crate) fn in_image(name: &str, path: &Path, copy: &ImageCopy, kept: Option<&Envelope>) -> Option<String> {
    let shown = path.display();
    match (copy, kept) {
        (ImageCopy::Envelope(copy), Some(kept)) if copy.id == kept.id => {
            rival(name, &shown.to_string(), copy, kept)
        }
        (ImageCopy::Envelope(copy), Some(kept)) => Some(format!(
            "{name}: {shown} carries envelope {}, which is not the one of this disk ({}); the keystore's is used, and virtseal vm seal {} \
             has it written over that if it opens the image",
            copy.id,
            kept.id,
            word(name)
        )),
        (ImageCopy::Unreadable(why), Some(kept)) => Some(format!(
            "{name}: the copy of envelope {} in {shown} can't be read: {why}; the keystore's is used, and virtseal vm seal {} has it \
             written over that once the image has opened",
            kept.id,
            word(name)
        )),
        (ImageCopy::Unreadable(why), None) => Some(format!(
            "{name}: the copy of an envelope in {shown} can't be read: {why}"
        )),
        (ImageCopy::None, _) | (ImageCopy::Envelope(_), None) => None,
    }
}

fn rival(name: &str, place: &str, copy: &Envelope, kept: &Envelope) -> Option<String> {
    let id = kept.id;
    match copy.supersedes(kept) {
        Precedence::Same | Precedence::Older => None,
        Precedence::Conflict => Some(format!(
            "the keystore and {place} have different versions of generation {} of envelope {id}. The keystore's, opened by \
             {}, is used; that of {place} names {}. Next: virtseal vm rekey {}, which makes a later generation of the keystore's for both; \
             for the other one, do that on the host where it was made, and bring its dumpxml here",
            kept.generation,
            providers(kept),
            providers(copy),
            word(name)
        )),
        Precedence::Newer => Some(format!(
            "{place} claims generation {} of envelope {id}, and the keystore has {}: virtseal vm adopt {} takes it over if \
             it verifies",
            copy.generation,
            kept.generation,
            word(name)
        )),
    }
}

fn unknown(name: &str, copy: &Envelope) -> Option<String> {
    let is_old = copy.format() != Envelope::FORMAT;
    is_old.then(|| {
        format!(
            "the XML of {name} has envelope {} in format 1, which this host does not know: virtseal vm adopt --format-1 {}, if you \
             know where that XML comes from",
            copy.id,
            word(name)
        )
    })
}

fn providers(envelope: &Envelope) -> String {
    let names: Vec<_> = envelope
        .stanzas
        .iter()
        .map(|stanza| format!("'{}'", stanza.provider_name))
        .collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::envelope::{Binding, KekId, ObjectKind, ProviderId, Stanza, Verified, VmId};
    use crate::secret::Dek;

    #[test]
    fn each_is_named_with_what_is_used() {
        let (dek, vm) = (Dek::random().unwrap(), VmId::random());
        let stanza = |name: &str| Stanza {
            provider: ProviderId::random(),
            provider_name: name.to_owned(),
            kek: KekId("v1:provider".to_owned()),
            mechanism: "A256GCM".to_owned(),
            body: vec![7; 92],
        };
        let binding = Binding {
            envelope: EnvelopeId::random(),
            vm,
            kind: ObjectKind::Disk,
        };
        let made = Verified::new(&binding, vec![stanza("main")], &dek).unwrap();
        let ours = made.with_stanzas(vec![stanza("ours")], &dek).unwrap();
        let theirs = made.with_stanzas(vec![stanza("theirs")], &dek).unwrap();
        let newer = theirs.mark_seen(&dek).unwrap();
        assert_eq!(rival("web01", "/images/a", &made, &ours), None);
        assert_eq!(rival("web01", "/images/a", &ours, &ours), None);
        let conflict = rival("web01", "/images/a", &theirs, &ours).unwrap();
        for part in [
            "/images/a",
            "virtseal vm rekey web01",
            "generation 2",
            "'ours'",
            "'theirs'",
            &made.id.to_string(),
        ] {
            assert!(conflict.contains(part), "{conflict}");
        }
        let claim = rival("web01", "/images/a", &newer, &ours).unwrap();
        assert!(
            claim.contains("claims generation 3") && claim.contains("vm adopt web01"),
            "{claim}"
        );
        assert_eq!(unknown("web01", &made), None);
        // The same of images.
        let path = Path::new("/images/a");
        let copy = |envelope: &Verified| ImageCopy::Envelope(Box::new(envelope.clone().into_envelope()));
        assert_eq!(
            in_image("web01", path, &copy(&theirs), Some(&ours)),
            Some(conflict)
        );
        assert_eq!(in_image("web01", path, &copy(&ours), Some(&ours)), None);
        assert_eq!(in_image("web01", path, &ImageCopy::None, Some(&ours)), None);
        let other = Binding {
            envelope: EnvelopeId::random(),
            ..binding
        };
        let other = Verified::new(&other, vec![stanza("main")], &dek).unwrap();
        let foreign = in_image("web01", path, &copy(&other), Some(&ours)).unwrap();
        assert!(
            foreign.contains("/images/a") && foreign.contains(&other.id.to_string()),
            "{foreign}"
        );
        let bad = ImageCopy::Unreadable("it is not text".to_owned());
        let bad = in_image("web01", path, &bad, Some(&ours)).unwrap();
        assert!(bad.contains("/images/a") && bad.contains("not text"), "{bad}");
    }
}
