//! How an object of a VM stands: by what the XML says, by what is at its place, and by what the keystore knows. Decides without
//! I/O; the daemon looks.

use crate::api::ObjectStanding;
use crate::domain::ObjectState;
use crate::model::envelope::{EnvelopeId, ObjectKind, VmId};
use crate::vm::has_run::HasRun;

/// What is at an object's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    Plain,
    /// With the envelope that it carries: its id and its VM.
    Encrypted(Option<(EnvelopeId, VmId)>),
    /// Why it can't be told.
    Unreadable(String),
    /// Why root does not look there: nothing is known of it.
    NotPermitted(String),
    /// On the network, or not looked at.
    OutOfSight,
}

/// Whose an envelope is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// This VM's, or shared with it.
    This,
    /// Another VM's.
    Other(VmId),
}

/// What is known of an object.
#[derive(Clone, Debug)]
pub(super) struct Facts<'a> {
    pub(super) kind: ObjectKind,
    pub(super) xml: &'a ObjectState,
    pub(super) found: Found,
    /// Of the envelope that the XML names; else of the one that is at its place, in the file or by the keystore.
    pub(super) owner: Option<Owner>,
    /// Its VM.
    pub(super) has_run: HasRun,
}

/// How an object stands, and what there is to say of that.
pub(super) type Standing = (ObjectStanding, Option<String>);

fn of_another(vm: VmId) -> Standing {
    (ObjectStanding::OfAnotherVm, Some(vm.to_string()))
}

impl Facts<'_> {
    pub(super) fn standing(self) -> Standing {
        match self.xml {
            ObjectState::Unsupported(reason) => (ObjectStanding::Unsupported, Some((*reason).to_owned())),
            ObjectState::Plain => self.in_plain_xml(),
            ObjectState::Sealed(id) => self.in_sealed_xml(*id),
        }
    }

    fn in_plain_xml(self) -> Standing {
        let state = match (self.found, self.owner) {
            (Found::Encrypted(_) | Found::OutOfSight, Some(Owner::Other(vm))) => return of_another(vm),
            (Found::Unreadable(why), _) => return (ObjectStanding::Unreadable, Some(why)),
            (Found::NotPermitted(why), _) => return (ObjectStanding::NotLookedAt, Some(why)),
            (Found::Encrypted(_), Some(Owner::This)) => ObjectStanding::NotInXml,
            (Found::Encrypted(_), None) => ObjectStanding::NotOurs,
            (Found::Nothing, Some(Owner::This)) if !self.kind.is_made_at_first_start() => {
                ObjectStanding::FileMissing
            }
            (Found::Nothing, Some(Owner::This)) if self.has_run == HasRun::Yes => ObjectStanding::StateGone,
            _ => ObjectStanding::Plain,
        };
        (state, None)
    }

    fn in_sealed_xml(self, named: EnvelopeId) -> Standing {
        match self.owner {
            None => return (ObjectStanding::EnvelopeMissing, None),
            Some(Owner::Other(vm)) => return of_another(vm),
            Some(Owner::This) => {}
        }
        let state = match (self.found, self.kind) {
            (Found::Nothing, kind) if kind.is_made_at_first_start() => match self.has_run {
                HasRun::Yes => ObjectStanding::StateGone,
                HasRun::No => ObjectStanding::NotUsedYet,
                HasRun::NotKnown => ObjectStanding::NoState,
            },
            (Found::Nothing, _) => ObjectStanding::FileMissing,
            (Found::Plain, _) => ObjectStanding::PlainInside,
            (Found::Encrypted(Some((carried, _))), _) if carried != named => {
                return (ObjectStanding::OtherEnvelope, Some(carried.to_string()));
            }
            (Found::Encrypted(_) | Found::OutOfSight, _) => ObjectStanding::Sealed,
            (Found::Unreadable(why), _) => return (ObjectStanding::Unreadable, Some(why)),
            (Found::NotPermitted(why), _) => return (ObjectStanding::NotLookedAt, Some(why)),
        };
        (state, None)
    }
}

/// Encrypted with a key that this VM gets.
pub(super) fn is_sealed(standing: ObjectStanding) -> bool {
    use ObjectStanding::{NotInXml, NotUsedYet, Sealed};
    matches!(standing, Sealed | NotUsedYet | NotInXml)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_facts() -> impl Strategy<Value = (ObjectKind, ObjectState, Found, Option<Owner>, HasRun)> {
        let id = || (0..3u128).prop_map(|n| EnvelopeId(uuid::Uuid::from_u128(n)));
        let vm = || (0..3u128).prop_map(|n| VmId(uuid::Uuid::from_u128(n)));
        let xml = prop_oneof![
            Just(ObjectState::Plain),
            Just(ObjectState::Unsupported("odd")),
            id().prop_map(ObjectState::Sealed)
        ];
        let found = prop_oneof![
            Just(Found::Nothing),
            Just(Found::Plain),
            Just(Found::OutOfSight),
            Just(Found::Unreadable("odd".into())),
            Just(Found::NotPermitted("odd".into())),
            prop::option::of((id(), vm())).prop_map(Found::Encrypted)
        ];
        let owner = prop_oneof![Just(Owner::This), vm().prop_map(Owner::Other)];
        (
            prop::sample::select(vec![ObjectKind::Disk, ObjectKind::Nvram, ObjectKind::Vtpm]),
            xml,
            found,
            prop::option::of(owner),
            prop::sample::select(vec![HasRun::Yes, HasRun::No, HasRun::NotKnown]),
        )
    }

    proptest! {
        #[test]
        fn what_is_plain_or_gone_is_never_called_sealed((kind, xml, found, owner, has_run) in any_facts()) {
            let (standing, _) = Facts { kind, xml: &xml, found: found.clone(), owner, has_run }.standing();
            if is_sealed(standing) {
                // Not even a vTPM that swtpm will make is called sealed where a plain one lies, or where there was one.
                let will_be_made = kind == ObjectKind::Vtpm && found == Found::Nothing && has_run == HasRun::No;
                prop_assert!(will_be_made || matches!(found, Found::Encrypted(_) | Found::OutOfSight));
                prop_assert_eq!(owner, Some(Owner::This));
            }
            if let (ObjectState::Sealed(named), Found::Encrypted(Some((carried, _)))) = (&xml, &found)
                && named != carried
            {
                prop_assert!(!is_sealed(standing));
            }
        }
    }

    fn facts(kind: ObjectKind, xml: &ObjectState, found: Found, owner: Option<Owner>) -> Facts<'_> {
        Facts {
            kind,
            xml,
            found,
            owner,
            has_run: HasRun::NotKnown,
        }
    }

    #[test]
    fn what_is_at_its_place_counts_and_not_what_the_xml_says() {
        let (id, other) = (EnvelopeId::random(), VmId::random());
        let named = ObjectState::Sealed(id);
        let told = |xml, found, owner| facts(ObjectKind::Disk, xml, found, owner).standing();
        let disk = |xml, found, owner| told(xml, found, owner).0;
        let this = Some(Owner::This);
        let carried = || Found::Encrypted(Some((id, other)));

        assert_eq!(disk(&named, carried(), this), ObjectStanding::Sealed);
        assert_eq!(disk(&named, Found::OutOfSight, this), ObjectStanding::Sealed);
        assert_eq!(disk(&named, Found::Nothing, this), ObjectStanding::FileMissing);
        assert_eq!(disk(&named, Found::Plain, this), ObjectStanding::PlainInside);
        assert_eq!(disk(&named, carried(), None), ObjectStanding::EnvelopeMissing);
        let swapped = EnvelopeId::random();
        assert_eq!(
            told(&named, Found::Encrypted(Some((swapped, other))), this),
            (ObjectStanding::OtherEnvelope, Some(swapped.to_string()))
        );

        let plain = ObjectState::Plain;
        assert_eq!(disk(&plain, carried(), this), ObjectStanding::NotInXml);
        assert_eq!(
            disk(&plain, Found::Encrypted(None), None),
            ObjectStanding::NotOurs
        );
        assert_eq!(disk(&plain, Found::Plain, None), ObjectStanding::Plain);
        assert_eq!(disk(&plain, Found::Nothing, None), ObjectStanding::Plain);
        assert_eq!(disk(&plain, Found::Nothing, this), ObjectStanding::FileMissing);
        // Of what nobody has looked at nothing is said, also where nobody expects anything.
        for (xml, owner) in [(&plain, None), (&plain, this), (&named, this)] {
            let told = |found| told(xml, found, owner);
            let why = || Some("why".to_owned());
            assert_eq!(
                told(Found::NotPermitted("why".into())),
                (ObjectStanding::NotLookedAt, why())
            );
            assert_eq!(
                told(Found::Unreadable("why".into())),
                (ObjectStanding::Unreadable, why())
            );
        }
        for xml in [&plain, &named] {
            for found in [carried(), Found::OutOfSight] {
                assert_eq!(told(xml, found, Some(Owner::Other(other))), of_another(other));
            }
        }
    }

    #[test]
    fn a_vtpm_is_called_unused_only_when_that_is_known() {
        let named = ObjectState::Sealed(EnvelopeId::random());
        let vtpm = |xml, has_run| {
            let found = facts(ObjectKind::Vtpm, xml, Found::Nothing, Some(Owner::This));
            Facts { has_run, ..found }.standing().0
        };
        assert_eq!(vtpm(&named, HasRun::No), ObjectStanding::NotUsedYet);
        assert_eq!(vtpm(&named, HasRun::Yes), ObjectStanding::StateGone);
        assert_eq!(vtpm(&named, HasRun::NotKnown), ObjectStanding::NoState);
        assert_eq!(vtpm(&ObjectState::Plain, HasRun::Yes), ObjectStanding::StateGone);
        assert_eq!(vtpm(&ObjectState::Plain, HasRun::NotKnown), ObjectStanding::Plain);
        assert_eq!(
            facts(
                ObjectKind::Vtpm,
                &ObjectState::Plain,
                Found::Encrypted(None),
                Some(Owner::This)
            )
            .standing()
            .0,
            ObjectStanding::NotInXml
        );
    }
}
