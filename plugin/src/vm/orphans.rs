//! What `provider orphans` shows: envelopes whose VM is not defined here, and KEKs that no defined VM's envelope needs. What one host
//! sees is no reason to destroy any of them.

use std::collections::{BTreeMap, BTreeSet};

use super::shred::Kek;
use crate::api::KekOrigin;
use crate::model::envelope::{Envelope, KekId, VmId};
use crate::store::{EnvelopeRecord, EnvelopeState, MadeKek, NeededKek, RetiredKek};

/// Which envelopes and KEKs there are.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    pub defined: BTreeSet<VmId>,
    pub known: Vec<Envelope>,
    /// The KEKs that copies which are behind need.
    pub behind: Vec<NeededKek>,
    /// Those that jobs have taken out of use.
    pub retired: Vec<RetiredKek>,
    pub made: Vec<MadeKek>,
}

/// What needs a KEK that no defined VM's envelope needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Uses {
    /// Envelopes of VMs that are not defined.
    pub envelopes: i64,
    /// Copies that are behind.
    pub copies: i64,
    is_retired: bool,
}

impl Uses {
    pub(crate) fn origin(self) -> KekOrigin {
        match self {
            Self { envelopes: 1.., .. } => KekOrigin::VmNotDefined,
            Self { copies: 1.., .. } => KekOrigin::CopyBehind,
            Self { is_retired: true, .. } => KekOrigin::Retired,
            _ => KekOrigin::NeverUsed,
        }
    }
}

impl Facts {
    /// Whether no VM that is defined here has this envelope.
    pub(crate) fn is_orphan(&self, envelope: &Envelope) -> bool {
        !self.defined.contains(&envelope.vm)
    }

    /// Whether `record` is one that nothing here needs, as far as it shows: its VM is not defined, or its image is gone and no XML needs
    /// it.
    pub(crate) fn lists(
        &self,
        record: &EnvelopeRecord,
        is_present: bool,
        is_needed: impl FnOnce() -> bool,
    ) -> bool {
        let may_be_gone = record.state == EnvelopeState::Active && !record.location.is_empty();
        self.is_orphan(&record.envelope) || (may_be_gone && !is_present && !is_needed())
    }

    /// The KEKs that no defined VM's envelope needs, and what does.
    pub(crate) fn keks(&self) -> BTreeMap<Kek, Uses> {
        let (mut in_use, mut keks) = (BTreeSet::new(), BTreeMap::<Kek, Uses>::new());
        for envelope in &self.known {
            for stanza in &envelope.stanzas {
                let kek = (stanza.provider, stanza.kek.0.clone());
                match self.is_orphan(envelope) {
                    true => keks.entry(kek).or_default().envelopes += 1,
                    false => drop(in_use.insert(kek)),
                }
            }
        }
        let of = |provider, KekId(kek): &KekId| (provider, kek.clone());
        for needed in &self.behind {
            keks.entry(of(needed.provider, &needed.kek)).or_default().copies += 1;
        }
        for retired in &self.retired {
            keks.entry(of(retired.provider, &retired.kek))
                .or_default()
                .is_retired = true;
        }
        for made in &self.made {
            keks.entry(of(made.provider, &made.kek)).or_default();
        }
        keks.retain(|kek, _| !in_use.contains(kek));
        keks
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::model::envelope::{Binding, EnvelopeId, ObjectKind, ProviderId, Stanza, Verified};
    use crate::secret::Dek;

    fn provider() -> ProviderId {
        ProviderId(Uuid::nil())
    }

    fn vm(number: u8) -> VmId {
        VmId(Uuid::from_u128(number.into()))
    }

    fn envelope(of: u8, kek: u8) -> Envelope {
        let binding = Binding {
            envelope: EnvelopeId::random(),
            vm: vm(of),
            kind: ObjectKind::Disk,
        };
        let stanza = Stanza {
            provider: provider(),
            provider_name: "main".to_owned(),
            kek: KekId(kek.to_string()),
            mechanism: "A256GCM".to_owned(),
            body: vec![7; 92],
        };
        let made = Verified::new(&binding, vec![stanza], &Dek::from_bytes(&[7; 32]).unwrap());
        made.unwrap().into_envelope()
    }

    proptest! {
        /// A KEK is an orphan exactly if something knows of it and no defined VM has an envelope by it.
        #[test]
        fn no_kek_of_a_defined_vm_is_an_orphan(
            defined in prop::collection::btree_set(0..4_u8, 0..4),
            known in prop::collection::vec((0..4_u8, 0..6_u8), 0..8),
            retired in prop::collection::vec((0..4_u8, 0..6_u8), 0..4),
            made in prop::collection::vec((0..4_u8, 0..6_u8), 0..4),
        ) {
            let kek = |number: u8| KekId(number.to_string());
            let facts = Facts {
                defined: defined.iter().copied().map(vm).collect(),
                known: known.iter().map(|(of, kek)| envelope(*of, *kek)).collect(),
                behind: Vec::new(),
                retired: retired
                    .iter()
                    .map(|(of, number)| RetiredKek { vm: vm(*of), provider: provider(), kek: kek(*number) })
                    .collect(),
                made: made
                    .iter()
                    .map(|(of, number)| MadeKek { vm: vm(*of), provider: provider(), kek: kek(*number) })
                    .collect(),
            };
            let found: BTreeSet<String> = facts.keks().into_keys().map(|(_, kek)| kek).collect();
            let all = known.iter().chain(&retired).chain(&made).map(|(_, kek)| *kek);
            let is_used = |kek: u8| known.iter().any(|(of, used)| *used == kek && defined.contains(of));
            let expected: BTreeSet<String> = all.filter(|kek| !is_used(*kek)).map(|kek| kek.to_string()).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
