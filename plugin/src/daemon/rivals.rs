//! Copies in a domain's XML that are not what the keystore has: what `vm status` says of them.
//!
//! Status has no key, so it tells only what they claim. One that is behind follows by itself, and is not worth a word.

use std::collections::BTreeMap;

use crate::domain::Domain;
use crate::envelope::{Envelope, EnvelopeId, Precedence};
use crate::failure::word;
use crate::keystore::EnvelopeRecord;

pub(super) fn of(domain: &Domain, records: &BTreeMap<EnvelopeId, EnvelopeRecord>) -> Vec<String> {
    let Some(metadata) = &domain.metadata else {
        return Vec::new();
    };
    let name = &domain.name;
    let mut warnings: Vec<_> = metadata
        .envelopes
        .iter()
        .filter_map(|copy| match records.get(&copy.id) {
            Some(record) => rival(name, copy, &record.envelope),
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

fn rival(name: &str, copy: &Envelope, kept: &Envelope) -> Option<String> {
    let id = kept.id;
    match copy.supersedes(kept) {
        Precedence::Same | Precedence::Older => None,
        Precedence::Conflict => Some(format!(
            "the keystore and the XML of {name} have different versions of generation {} of envelope {id}. The keystore's, opened by \
             {}, is used; the XML's names {}",
            kept.generation,
            providers(kept),
            providers(copy)
        )),
        Precedence::Newer => Some(format!(
            "the XML of {name} claims generation {} of envelope {id}, and the keystore has {}: virtseal vm adopt {} takes it over if \
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
    use crate::envelope::{Binding, KekId, ObjectKind, ProviderId, Stanza, Verified, VmId};
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
        assert_eq!(rival("web01", &made, &ours), None);
        assert_eq!(rival("web01", &ours, &ours), None);
        let conflict = rival("web01", &theirs, &ours).unwrap();
        for part in [
            "web01",
            "generation 2",
            "'ours'",
            "'theirs'",
            &made.id.to_string(),
        ] {
            assert!(conflict.contains(part), "{conflict}");
        }
        let claim = rival("web01", &newer, &ours).unwrap();
        assert!(
            claim.contains("claims generation 3") && claim.contains("vm adopt web01"),
            "{claim}"
        );
        assert_eq!(unknown("web01", &made), None);
    }
}
