//! What a shredding destroys, decided from what was seen: nothing here touches a key.
//!
//! A KEK goes only if nothing that this host knows of, or sees, and that is not the doomed VM's needs it: no envelope of the keystore,
//! no copy that is behind, none that was forgotten or saved, and none in an XML or an image that may be true. What a copy claims
//! that is not shown to be true never makes a KEK the doomed VM's.

use std::collections::BTreeSet;

use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeId, KekId, ProviderId, VmId};
use crate::model::problem::Problem;
use crate::model::subject::Subject;
use crate::store::{NeededKek, RetiredKek};
use crate::vm::foreign::Proof;

pub(crate) type Kek = (ProviderId, String);

/// To destroy what a VM on another host may need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Consent {
    /// The VM's name was typed for that as well.
    Given,
    NotGiven,
}

/// Whether libvirt has the VM here. If not, it may be on another host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    Defined,
    NotDefined,
}

/// Which envelopes and KEKs there are.
#[derive(Debug, Default)]
pub(super) struct Facts {
    pub(super) known: Vec<Envelope>,
    /// The KEKs that copies which are behind need.
    pub(super) behind: Vec<NeededKek>,
    /// Those that jobs have taken out of use.
    pub(super) retired: Vec<RetiredKek>,
    /// How many rows can't be read that may need any KEK.
    pub(super) silent: usize,
    /// Copies in XML and images, forgotten envelopes, and those of saved states, with what is known of who wrote them.
    pub(super) elsewhere: Vec<(Envelope, Proof)>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    /// The doomed VM: by its envelopes and their copies, those from before a rotation too.
    pub(super) own: BTreeSet<Kek>,
    pub(super) others: BTreeSet<Kek>,
    /// Whether somebody else may need any.
    pub(super) sight: Sight,
}

/// Whether all was seen that may need a KEK.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sight {
    #[default]
    Whole,
    Partial,
}

impl Facts {
    /// Which KEKs the VM `doomed` needs, whose envelopes are `ids`, and which others do.
    pub(super) fn needs(&self, doomed: VmId, ids: &BTreeSet<EnvelopeId>) -> Needs {
        let mut needs = Needs::default();
        if self.silent > 0 {
            needs.sight = Sight::Partial;
        }
        let mut note = |is_own: bool, provider: ProviderId, KekId(kek): &KekId| {
            let set = if is_own { &mut needs.own } else { &mut needs.others };
            set.insert((provider, kek.clone()));
        };
        for envelope in &self.known {
            for stanza in &envelope.stanzas {
                note(ids.contains(&envelope.id), stanza.provider, &stanza.kek);
            }
        }
        for needed in &self.behind {
            note(ids.contains(&needed.envelope), needed.provider, &needed.kek);
        }
        for retired in &self.retired {
            note(retired.vm == doomed, retired.provider, &retired.kek);
        }
        for (envelope, proof) in &self.elsewhere {
            let is_own = ids.contains(&envelope.id);
            let counts = match proof {
                Proof::Authentic => true,
                Proof::Unknown => !is_own,
                Proof::Forged => false,
            };
            for stanza in envelope.stanzas.iter().filter(|_| counts) {
                note(is_own, stanza.provider, &stanza.kek);
            }
        }
        needs
    }
}

/// What is known of a KEK and its VM before anything is destroyed.
#[derive(Clone, Copy, Debug)]
pub(super) struct KekFacts {
    /// Whether anything that is not the VM's needs it.
    pub(super) others_need_it: bool,
    /// Whether that can be told.
    pub(super) sight: Sight,
    pub(super) provider_is_here: bool,
    /// Whether it exists at all, and is not derived from another key whenever it is needed.
    pub(super) is_kept_by_provider: bool,
    pub(super) presence: Presence,
    /// Whether that one may lose it.
    pub(super) consent: Consent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KekFate {
    Destroy,
    /// It does not, and why.
    Stays(&'static str),
}

impl KekFate {
    /// Why one stays that a second word would destroy.
    pub(super) const ELSEWHERE: &'static str =
        "not destroyed: the VM is not defined here, so it may be on another host, and need it there";

    /// One host's view is not all there is: a VM that is not defined here may run on another host by the same KEK.
    pub(super) fn of(facts: KekFacts) -> Self {
        let is_elsewhere = facts.presence == Presence::NotDefined && facts.consent == Consent::NotGiven;
        if facts.others_need_it {
            Self::Stays("not destroyed: other VMs need it")
        } else if facts.sight == Sight::Partial {
            Self::Stays("not destroyed: a record of the keystore is damaged, and may need it")
        } else if !facts.provider_is_here {
            Self::Stays("not destroyed: this host does not have the provider")
        } else if facts.is_kept_by_provider && is_elsewhere {
            Self::Stays(Self::ELSEWHERE)
        } else {
            Self::Destroy
        }
    }
}

/// What was typed to have the VM called `name` shredded: that name, now. One that was renamed meanwhile, and one that is called by
/// now as another was, stays.
///
/// # Errors
/// When it was not typed.
pub(crate) fn consent(
    name: &str,
    presence: Presence,
    typed: Option<&str>,
    typed_for_keks: Option<&str>,
) -> Result<Consent, Problem> {
    match (typed, typed_for_keks) {
        (Some(typed), _) if typed != name => Err(not_typed(name, presence, typed)),
        (_, Some(typed)) if typed != name => Err(not_typed(name, presence, typed)),
        (None, _) => Err(not_typed(name, presence, "")),
        (Some(_), Some(_)) => Ok(Consent::Given),
        (Some(_), None) => Ok(Consent::NotGiven),
    }
}

fn not_typed(name: &str, presence: Presence, typed: &str) -> Problem {
    let typed = match typed {
        "" => String::new(),
        typed => format!(", and '{typed}' was typed"),
    };
    let stays = format!("{name} stays: what is on its disks would be lost for ever{typed}");
    let shred = Advice::ShredAsTyped(name.to_owned());
    let problem = Problem::would_lose_key(stays).about(Subject::Vm(name.to_owned()));
    problem.next(match presence {
        Presence::Defined => shred,
        Presence::NotDefined => Advice::ForgetVm(name.to_owned())
            .note("if it is on another host")
            .also(shred.note("if it is not")),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::envelope::{Binding, ObjectKind, Stanza, Verified};
    use crate::model::problem::Code;
    use crate::secret::Dek;
    use crate::store::CopyPlace;

    const FACTS: KekFacts = KekFacts {
        others_need_it: false,
        sight: Sight::Whole,
        provider_is_here: true,
        is_kept_by_provider: true,
        presence: Presence::Defined,
        consent: Consent::NotGiven,
    };

    #[test]
    fn a_kek_of_a_vm_that_is_elsewhere_goes_only_by_a_second_word() {
        assert_eq!(KekFate::of(FACTS), KekFate::Destroy);
        let elsewhere = KekFacts {
            presence: Presence::NotDefined,
            ..FACTS
        };
        assert_eq!(KekFate::of(elsewhere), KekFate::Stays(KekFate::ELSEWHERE));
        let consented = KekFacts {
            consent: Consent::Given,
            ..elsewhere
        };
        assert_eq!(KekFate::of(consented), KekFate::Destroy);
        let derived = KekFacts {
            is_kept_by_provider: false,
            ..elsewhere
        };
        assert_eq!(KekFate::of(derived), KekFate::Destroy);
        let unseen = KekFacts {
            sight: Sight::Partial,
            ..consented
        };
        assert_ne!(KekFate::of(unseen), KekFate::Destroy);
    }

    #[test]
    fn the_word_is_the_name_that_the_vm_has_when_it_goes() {
        for presence in [Presence::Defined, Presence::NotDefined] {
            let word = |typed, again| consent("web01", presence, typed, again).map_err(|error| error.code);
            assert_eq!(word(Some("web01"), None), Ok(Consent::NotGiven));
            assert_eq!(word(Some("web01"), Some("web01")), Ok(Consent::Given));
            // Renamed since the preview, the old name means nothing.
            for (typed, again) in [
                (None, None),
                (None, Some("web01")),
                (Some(""), None),
                (Some("old"), None),
                (Some("old"), Some("web01")),
                (Some("web01"), Some("old")),
            ] {
                assert_eq!(word(typed, again), Err(Code::WouldLoseKey), "{typed:?} {again:?}");
            }
        }
    }

    /// Few VMs, envelopes, providers and KEKs, so that they meet.
    fn envelope(id: u8, vm: u8, keks: &[(u8, u8)]) -> Envelope {
        let binding = Binding {
            envelope: EnvelopeId(uuid::Uuid::from_u128(id.into())),
            vm: vm_of(vm),
            kind: ObjectKind::Disk,
        };
        let stanzas = keks.iter().map(|(provider, kek)| Stanza {
            provider: provider_of(*provider),
            provider_name: "main".to_owned(),
            kek: KekId(kek.to_string()),
            mechanism: "A256GCM".to_owned(),
            body: vec![7; 92],
        });
        Verified::new(&binding, stanzas.collect(), &Dek::from_bytes(&[7; 32]).unwrap())
            .unwrap()
            .into_envelope()
    }

    fn vm_of(vm: u8) -> VmId {
        VmId(uuid::Uuid::from_u128(vm.into()))
    }

    fn provider_of(provider: u8) -> ProviderId {
        ProviderId(uuid::Uuid::from_u128(provider.into()))
    }

    fn envelopes() -> impl Strategy<Value = Envelope> {
        let keks = prop::collection::vec((0..2_u8, 0..6_u8), 1..3);
        // The VM of an envelope is part of what it is.
        (0..8_u8, keks).prop_map(|(id, keks)| envelope(id, id / 2, &keks))
    }

    fn facts() -> impl Strategy<Value = Facts> {
        let proofs = prop_oneof![Just(Proof::Authentic), Just(Proof::Forged), Just(Proof::Unknown)];
        (
            prop::collection::vec(envelopes(), 0..6),
            prop::collection::vec((0..8_u8, 0..2_u8, 0..6_u8), 0..4),
            prop::collection::vec((0..4_u8, 0..2_u8, 0..6_u8), 0..4),
            prop::collection::vec((envelopes(), proofs), 0..6),
        )
            .prop_map(|(known, behind, retired, elsewhere)| Facts {
                known,
                silent: 0,
                behind: behind
                    .into_iter()
                    .map(|(id, provider, kek)| NeededKek {
                        envelope: EnvelopeId(uuid::Uuid::from_u128(id.into())),
                        place: CopyPlace::Xml,
                        provider: provider_of(provider),
                        kek: KekId(kek.to_string()),
                    })
                    .collect(),
                retired: retired
                    .into_iter()
                    .map(|(vm, provider, kek)| RetiredKek {
                        vm: vm_of(vm),
                        provider: provider_of(provider),
                        kek: KekId(kek.to_string()),
                    })
                    .collect(),
                elsewhere,
            })
    }

    proptest! {
        /// Whatever was typed, and wherever the VM is.
        #[test]
        fn no_kek_goes_that_anybody_else_may_need(
            facts in facts(),
            provider_is_here in any::<bool>(),
            is_kept_by_provider in any::<bool>(),
            defined in any::<bool>(),
            consented in any::<bool>(),
        ) {
            let doomed = vm_of(0);
            let ids: BTreeSet<_> = facts
                .known
                .iter()
                .filter(|envelope| envelope.vm == doomed)
                .map(|envelope| envelope.id)
                .collect();
            let needs = facts.needs(doomed, &ids);
            let destroyed: BTreeSet<_> = needs
                .own
                .iter()
                .filter(|kek| {
                    KekFate::of(KekFacts {
                        others_need_it: needs.others.contains(*kek),
                        sight: needs.sight,
                        provider_is_here,
                        is_kept_by_provider,
                        presence: if defined { Presence::Defined } else { Presence::NotDefined },
                        consent: if consented { Consent::Given } else { Consent::NotGiven },
                    }) == KekFate::Destroy
                })
                .cloned()
                .collect();
            let others = facts.known.iter().filter(|envelope| !ids.contains(&envelope.id));
            let visible = facts.elsewhere.iter().filter(|(_, proof)| *proof != Proof::Forged);
            let visible = visible.map(|(envelope, _)| envelope).filter(|envelope| !ids.contains(&envelope.id));
            for stanza in others.chain(visible).flat_map(|envelope| &envelope.stanzas) {
                prop_assert!(!destroyed.contains(&(stanza.provider, stanza.kek.0.clone())));
            }
            for needed in facts.behind.iter().filter(|needed| !ids.contains(&needed.envelope)) {
                prop_assert!(!destroyed.contains(&(needed.provider, needed.kek.0.clone())));
            }
            for retired in facts.retired.iter().filter(|retired| retired.vm != doomed) {
                prop_assert!(!destroyed.contains(&(retired.provider, retired.kek.0.clone())));
            }
        }

        /// A copy of the VM's own envelope that somebody has made up names the KEKs of others.
        #[test]
        fn what_is_not_shown_to_be_true_dooms_no_kek(facts in facts()) {
            let ids: BTreeSet<_> = facts
                .known
                .iter()
                .filter(|envelope| envelope.vm == vm_of(0))
                .map(|envelope| envelope.id)
                .collect();
            let own = facts.needs(vm_of(0), &ids).own;
            let mut without = facts;
            without.elsewhere.retain(|(_, proof)| *proof == Proof::Authentic);
            prop_assert_eq!(own, without.needs(vm_of(0), &ids).own);
        }
    }
}
