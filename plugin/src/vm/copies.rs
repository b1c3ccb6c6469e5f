//! How the copies of envelopes that travel stand to the keystore: which of them give way to it, and whose they are. Decides without
//! I/O; `crate::job::copies` looks and writes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::start::adoption::{Doubt, Weighed, weigh};
use crate::domain::{Domain, Metadata, encrypted_layers};
use crate::host::libvirt::KeptXml;
use crate::model::envelope::{Envelope, EnvelopeId, Precedence, VmId};
use crate::model::problem::chain;
use crate::secret::Dek;
use crate::store::EnvelopeRecord;

/// How a copy stands to the keystore's version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It is equal; or it is authentic, and a start or an admin decides between the two.
    Stays,
    /// It is behind, or not authentic.
    GivesWay,
    /// Nobody has the key now, and why.
    Undecided(String),
}

impl Standing {
    /// Whether the keystore's version takes the place of a copy. One that claims to be newer is asked for its MAC, by the key
    /// that the keystore's opens to: `open` says what that is, or why nobody has it now.
    pub(crate) fn of(
        found: &Envelope,
        record: &EnvelopeRecord,
        open: impl FnOnce() -> Result<Dek, String>,
    ) -> Self {
        let claims = found.supersedes(&record.envelope);
        if claims == Precedence::Same {
            return Self::Stays;
        }
        // Who wrote a format 1 can't be told; the keystore's row is root's.
        if claims == Precedence::Older || found.format() != Envelope::FORMAT {
            return Self::GivesWay;
        }
        let weighed = open().and_then(|dek| {
            let own = record.verify(&dek).map_err(|error| chain(&error))?;
            Ok(weigh(&own, found, &dek))
        });
        match weighed {
            Ok(Weighed::Counts(_) | Weighed::Doubtful(Doubt::Conflict | Doubt::DoesNotOpen)) => Self::Stays,
            Ok(Weighed::IsBehind | Weighed::Doubtful(Doubt::Unverified(_))) => Self::GivesWay,
            Err(reason) => Self::Undecided(format!(
                "the copy claims generation {}, which can't be verified now: {reason}",
                found.generation
            )),
        }
    }
}

/// Who has a copy of which envelope, by what libvirt has.
///
/// Anybody who defines a domain can name any envelope in it. Only those count that the envelope serves: what another VM claims
/// would keep the copies of this one behind for good, by an XML or a file that nobody can bring up to date.
#[derive(Debug, Default)]
pub(crate) struct Holders {
    /// The VMs with it in their XML: of a disk that several share, all of them.
    vms: BTreeMap<EnvelopeId, BTreeSet<VmId>>,
    /// The files that it opens, as each VM has it.
    paths: BTreeMap<EnvelopeId, BTreeSet<(VmId, PathBuf)>>,
}

impl Holders {
    /// Those that these XMLs name. What a snapshot has, nobody can change.
    pub(crate) fn among(kept: &[KeptXml]) -> Self {
        let mut holders = Self::default();
        for kept in kept.iter().filter(|kept| kept.snapshot.is_none()) {
            // One envelope that can't be read must not hide the others: whether the element can be changed shows then.
            for id in Metadata::ids_in(&kept.xml) {
                holders.vms.entry(id).or_default().insert(kept.vm);
            }
            if let Ok(domain) = Domain::parse(&kept.xml) {
                for (id, path) in encrypted_layers(&domain) {
                    holders.paths.entry(id).or_default().insert((kept.vm, path));
                }
            }
        }
        holders
    }

    /// The VMs that have it in their XML, and may.
    pub(crate) fn vms_of(&self, envelope: &Envelope) -> impl Iterator<Item = VmId> {
        let vms = self.vms.get(&envelope.id).into_iter().flatten();
        vms.copied().filter(|vm| envelope.serves(*vm))
    }

    /// The files that these VMs have for it.
    pub(crate) fn paths_of(&self, envelope: &Envelope) -> BTreeSet<PathBuf> {
        let paths = self.paths.get(&envelope.id).into_iter().flatten();
        let of_its_vms = paths.filter(|(vm, _)| envelope.serves(*vm));
        of_its_vms.map(|(_, path)| path.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::envelope::{Binding, Generation, KekId, ObjectKind, ProviderId, Stanza, Verified};
    use crate::store::EnvelopeState;

    fn kept(vm: VmId, path: &str, envelope: &Envelope) -> KeptXml {
        let xml = format!(
            "<domain type='kvm'><name>a</name><uuid>{vm}</uuid><metadata><virtseal:vm xmlns:virtseal='{}'>\
             <virtseal:envelope>{}</virtseal:envelope></virtseal:vm></metadata><devices><disk type='file'><driver type='qcow2'/>\
             <source file='{path}'><encryption format='luks'><secret type='passphrase' uuid='{}'/></encryption></source>\
             <target dev='vda'/></disk></devices></domain>",
            Metadata::NAMESPACE,
            envelope.to_json(),
            envelope.id
        );
        KeptXml {
            vm,
            name: "a".to_owned(),
            snapshot: None,
            xml,
        }
    }

    fn made(vm: VmId, dek: &Dek) -> Envelope {
        let binding = Binding {
            envelope: EnvelopeId::random(),
            vm,
            kind: ObjectKind::Disk,
        };
        let stanza = Stanza {
            provider: ProviderId::random(),
            provider_name: "main".to_owned(),
            kek: KekId("v1:provider".to_owned()),
            mechanism: "A256GCM".to_owned(),
            body: vec![7; 92],
        };
        Verified::new(&binding, vec![stanza], dek)
            .unwrap()
            .into_envelope()
    }

    #[test]
    fn what_a_stranger_claims_to_have_keeps_no_copy_behind() {
        let [owner, sharer, stranger] = [0; 3].map(|_| VmId::random());
        let mut envelope = made(owner, &Dek::random().unwrap());
        envelope.shared_with = vec![sharer];
        let holders = Holders::among(&[
            kept(stranger, "/elsewhere/unreadable", &envelope),
            kept(owner, "/images/own", &envelope),
            kept(sharer, "/images/shared", &envelope),
        ]);
        assert_eq!(
            holders.vms_of(&envelope).collect::<BTreeSet<_>>(),
            BTreeSet::from([owner, sharer])
        );
        assert_eq!(
            holders.paths_of(&envelope),
            BTreeSet::from(["/images/own".into(), "/images/shared".into()])
        );
    }

    proptest! {
        /// Nothing authentic that is as new, or newer, is written over, also where nobody has the key now; whatever was forged gives
        /// way once the key shows it.
        #[test]
        fn only_what_is_behind_or_forged_gives_way(
            own in (1..4_u64, 0..2_u8),
            found in (1..4_u64, 0..2_u8),
            forged in any::<bool>(),
            has_key in any::<bool>(),
        ) {
            let (dek, other) = (Dek::from_bytes(&[7; 32]).unwrap(), Dek::from_bytes(&[8; 32]).unwrap());
            let made = made(VmId::random(), &dek);
            let version = |(generation, body): (u64, u8), dek: &Dek| {
                let mut version = made.clone();
                version.generation = Generation::of_test(generation);
                version.stanzas[0].body = vec![body; 92];
                Verified::of_test(version, dek).into_envelope()
            };
            let record = EnvelopeRecord {
                envelope: version(own, &dek),
                state: EnvelopeState::Active,
                location: String::new(),
                created: 0,
                updated: 0,
            };
            let copy = version(found, if forged { &other } else { &dek });
            let claims = copy.supersedes(&record.envelope);
            let open = || match has_key {
                true => Ok(Dek::from_bytes(&[7; 32]).unwrap()),
                false => Err("locked".to_owned()),
            };
            let expected_stays = !forged && claims != Precedence::Older;
            match Standing::of(&copy, &record, open) {
                Standing::Stays => prop_assert!(expected_stays),
                Standing::GivesWay => prop_assert!(!expected_stays),
                Standing::Undecided(_) => {
                    prop_assert!(!has_key && matches!(claims, Precedence::Newer | Precedence::Conflict));
                }
            }
        }
    }
}
