//! How an object of a VM stands: by what the XML says, by what is at its place, and by what the keystore knows. Decides without
//! I/O; the daemon looks.

use crate::api::ObjectStanding;
use crate::domain::ObjectState;
use crate::model::envelope::{EnvelopeId, ObjectKind, VmId};

/// What is at an object's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    Plain,
    /// With the envelope that it carries: its id and its VM.
    Encrypted(Option<(EnvelopeId, VmId)>),
    /// Why it can't be told.
    Unreadable(String),
    /// On the network, or not looked at.
    OutOfSight,
}

/// Whether a vTPM's guest has used it since it was sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Used {
    Yes,
    No,
    NotKnown,
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
    /// Only for a vTPM.
    pub(super) used: Used,
}

/// How an object stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    Sealed,
    /// Sealed, and swtpm will make the state at the first start.
    NotUsedYet,
    /// Sealed, and the XML does not say so.
    NotInXml,
    Plain,
    OfAnotherVm(VmId),
    /// The vTPM was used, and has no state.
    StateGone,
    /// The vTPM has no state, and nobody here knows whether it had one.
    NoState,
    FileMissing,
    /// The XML says that it is encrypted, and it is not.
    PlainInside,
    /// The image was made with another envelope than the XML names.
    OtherEnvelope(EnvelopeId),
    /// Neither the keystore nor the XML has it.
    EnvelopeMissing,
    /// Encrypted, with a key that nobody here knows.
    NotOurs,
    Unsupported(&'static str),
    Unreadable(String),
}

impl Facts<'_> {
    pub(super) fn standing(self) -> Standing {
        match self.xml {
            ObjectState::Unsupported(reason) => Standing::Unsupported(reason),
            ObjectState::Plain => self.in_plain_xml(),
            ObjectState::Sealed(id) => self.in_sealed_xml(*id),
        }
    }

    fn in_plain_xml(self) -> Standing {
        match (self.found, self.owner) {
            (Found::Encrypted(_) | Found::OutOfSight, Some(Owner::Other(vm))) => Standing::OfAnotherVm(vm),
            (Found::Encrypted(_), Some(Owner::This)) => Standing::NotInXml,
            (Found::Encrypted(_), None) => Standing::NotOurs,
            (Found::Nothing, Some(Owner::This)) if !self.kind.is_made_at_first_start() => {
                Standing::FileMissing
            }
            (Found::Nothing, Some(Owner::This)) if self.used == Used::Yes => Standing::StateGone,
            (Found::Unreadable(why), Some(_)) => Standing::Unreadable(why),
            _ => Standing::Plain,
        }
    }

    fn in_sealed_xml(self, named: EnvelopeId) -> Standing {
        match self.owner {
            None => return Standing::EnvelopeMissing,
            Some(Owner::Other(vm)) => return Standing::OfAnotherVm(vm),
            Some(Owner::This) => {}
        }
        match (self.found, self.kind) {
            (Found::Nothing, kind) if kind.is_made_at_first_start() => match self.used {
                Used::Yes => Standing::StateGone,
                Used::No => Standing::NotUsedYet,
                Used::NotKnown => Standing::NoState,
            },
            (Found::Nothing, _) => Standing::FileMissing,
            (Found::Plain, _) => Standing::PlainInside,
            (Found::Encrypted(Some((carried, _))), _) if carried != named => Standing::OtherEnvelope(carried),
            (Found::Encrypted(_) | Found::OutOfSight, _) => Standing::Sealed,
            (Found::Unreadable(why), _) => Standing::Unreadable(why),
        }
    }
}

impl Standing {
    /// Encrypted with a key that this VM gets.
    pub(super) fn is_sealed(&self) -> bool {
        matches!(self, Self::Sealed | Self::NotUsedYet | Self::NotInXml)
    }

    /// As it travels, with what there is to say of it.
    pub(super) fn view(&self) -> (ObjectStanding, Option<String>) {
        match self {
            Self::Sealed => (ObjectStanding::Sealed, None),
            Self::NotUsedYet => (ObjectStanding::NotUsedYet, None),
            Self::NotInXml => (ObjectStanding::NotInXml, None),
            Self::Plain => (ObjectStanding::Plain, None),
            Self::OfAnotherVm(vm) => (ObjectStanding::OfAnotherVm, Some(vm.to_string())),
            Self::StateGone => (ObjectStanding::StateGone, None),
            Self::NoState => (ObjectStanding::NoState, None),
            Self::FileMissing => (ObjectStanding::FileMissing, None),
            Self::PlainInside => (ObjectStanding::PlainInside, None),
            Self::OtherEnvelope(id) => (ObjectStanding::OtherEnvelope, Some(id.to_string())),
            Self::EnvelopeMissing => (ObjectStanding::EnvelopeMissing, None),
            Self::NotOurs => (ObjectStanding::NotOurs, None),
            Self::Unsupported(reason) => (ObjectStanding::Unsupported, Some((*reason).to_owned())),
            Self::Unreadable(why) => (ObjectStanding::Unreadable, Some(why.clone())),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_facts() -> impl Strategy<Value = (ObjectKind, ObjectState, Found, Option<Owner>, Used)> {
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
            prop::option::of((id(), vm())).prop_map(Found::Encrypted)
        ];
        let owner = prop_oneof![Just(Owner::This), vm().prop_map(Owner::Other)];
        (
            prop::sample::select(vec![ObjectKind::Disk, ObjectKind::Nvram, ObjectKind::Vtpm]),
            xml,
            found,
            prop::option::of(owner),
            prop::sample::select(vec![Used::Yes, Used::No, Used::NotKnown]),
        )
    }

    proptest! {
        #[test]
        fn what_is_plain_or_gone_is_never_called_sealed((kind, xml, found, owner, used) in any_facts()) {
            let standing = Facts { kind, xml: &xml, found: found.clone(), owner, used }.standing();
            let (view, _) = standing.view();
            if standing.is_sealed() {
                // Not even a vTPM that swtpm will make is called sealed where a plain one lies, or where there was one.
                let will_be_made = kind == ObjectKind::Vtpm && found == Found::Nothing && used == Used::No;
                prop_assert!(will_be_made || matches!(found, Found::Encrypted(_) | Found::OutOfSight));
                prop_assert_eq!(owner, Some(Owner::This));
            } else {
                prop_assert!(!matches!(
                    view,
                    ObjectStanding::Sealed | ObjectStanding::NotUsedYet | ObjectStanding::NotInXml
                ));
            }
            if let (ObjectState::Sealed(named), Found::Encrypted(Some((carried, _)))) = (&xml, &found)
                && named != carried
            {
                prop_assert!(!standing.is_sealed());
            }
        }
    }

    fn facts(kind: ObjectKind, xml: &ObjectState, found: Found, owner: Option<Owner>) -> Facts<'_> {
        Facts {
            kind,
            xml,
            found,
            owner,
            used: Used::NotKnown,
        }
    }

    #[test]
    fn what_is_at_its_place_counts_and_not_what_the_xml_says() {
        let (id, other) = (EnvelopeId::random(), VmId::random());
        let named = ObjectState::Sealed(id);
        let disk = |xml, found, owner| facts(ObjectKind::Disk, xml, found, owner).standing();
        let this = Some(Owner::This);
        let carried = || Found::Encrypted(Some((id, other)));

        assert_eq!(disk(&named, carried(), this), Standing::Sealed);
        assert_eq!(disk(&named, Found::OutOfSight, this), Standing::Sealed);
        assert_eq!(disk(&named, Found::Nothing, this), Standing::FileMissing);
        assert_eq!(disk(&named, Found::Plain, this), Standing::PlainInside);
        assert_eq!(disk(&named, carried(), None), Standing::EnvelopeMissing);
        let swapped = EnvelopeId::random();
        assert_eq!(
            disk(&named, Found::Encrypted(Some((swapped, other))), this),
            Standing::OtherEnvelope(swapped)
        );

        let plain = ObjectState::Plain;
        assert_eq!(disk(&plain, carried(), this), Standing::NotInXml);
        assert_eq!(disk(&plain, Found::Encrypted(None), None), Standing::NotOurs);
        assert_eq!(disk(&plain, Found::Plain, None), Standing::Plain);
        assert_eq!(disk(&plain, Found::Nothing, None), Standing::Plain);
        assert_eq!(disk(&plain, Found::Nothing, this), Standing::FileMissing);
        for xml in [&plain, &named] {
            for found in [carried(), Found::OutOfSight] {
                assert_eq!(
                    disk(xml, found, Some(Owner::Other(other))),
                    Standing::OfAnotherVm(other)
                );
            }
        }
    }

    #[test]
    fn a_vtpm_is_called_unused_only_when_that_is_known() {
        let named = ObjectState::Sealed(EnvelopeId::random());
        let vtpm = |xml, used| {
            let found = facts(ObjectKind::Vtpm, xml, Found::Nothing, Some(Owner::This));
            Facts { used, ..found }.standing()
        };
        assert_eq!(vtpm(&named, Used::No), Standing::NotUsedYet);
        assert_eq!(vtpm(&named, Used::Yes), Standing::StateGone);
        assert_eq!(vtpm(&named, Used::NotKnown), Standing::NoState);
        assert_eq!(vtpm(&ObjectState::Plain, Used::Yes), Standing::StateGone);
        assert_eq!(vtpm(&ObjectState::Plain, Used::NotKnown), Standing::Plain);
        assert_eq!(
            facts(
                ObjectKind::Vtpm,
                &ObjectState::Plain,
                Found::Encrypted(None),
                Some(Owner::This)
            )
            .standing(),
            Standing::NotInXml
        );
    }
}
