//! How an object of a VM stands: by what the XML says, by what is at its place, and by what the keystore knows. Decides without
//! I/O; the daemon looks.

use std::fmt;

use crate::domain::ObjectState;
use crate::model::envelope::{EnvelopeId, ObjectKind, VmId};

/// What is at an object's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found {
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
pub(crate) enum Used {
    Yes,
    No,
    NotKnown,
}

/// Whose an envelope is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// This VM's, or shared with it.
    This,
    /// Another VM's.
    Other(VmId),
}

/// What is known of an object.
#[derive(Clone, Debug)]
pub(crate) struct Facts<'a> {
    pub(crate) kind: ObjectKind,
    pub(crate) xml: &'a ObjectState,
    pub(crate) found: Found,
    /// Of the envelope that the XML names; else of the one that is at its place, in the file or by the keystore.
    pub(crate) owner: Option<Owner>,
    /// Only for a vTPM.
    pub(crate) used: Used,
}

/// How an object stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
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
    pub(crate) fn standing(self) -> Standing {
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
            (Found::Nothing, Some(Owner::This)) if self.kind != ObjectKind::Vtpm => Standing::FileMissing,
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
            (Found::Nothing, ObjectKind::Vtpm) => match self.used {
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
    pub(crate) fn is_sealed(&self) -> bool {
        matches!(self, Self::Sealed | Self::NotUsedYet | Self::NotInXml)
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sealed => f.write_str("sealed"),
            Self::NotUsedYet => f.write_str("sealed, not used yet"),
            Self::NotInXml => f.write_str("sealed, but the XML does not say so"),
            Self::Plain => f.write_str("plain"),
            Self::OfAnotherVm(vm) => write!(f, "of another VM ({vm})"),
            Self::StateGone => f.write_str("state gone"),
            Self::NoState => f.write_str("no state here, and not known whether there was one"),
            Self::FileMissing => f.write_str("file missing"),
            Self::PlainInside => f.write_str("not encrypted, though the XML says so"),
            Self::OtherEnvelope(id) => write!(f, "not the object that the XML names: it has envelope {id}"),
            Self::EnvelopeMissing => f.write_str("envelope missing"),
            Self::NotOurs => f.write_str("encrypted, but not by virtseal"),
            Self::Unsupported(reason) => f.write_str(reason),
            Self::Unreadable(why) => f.write_str(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
