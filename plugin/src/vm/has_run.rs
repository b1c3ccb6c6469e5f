//! Whether a VM has run since it was sealed. What its first start makes tells: by its envelope, which travels, by what the keystore has
//! noted, and by being there.

use crate::model::envelope::{Envelope, VmId};
use crate::model::problem::Problem;
use crate::object::{Located, Present};
use crate::vm::host::Host;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HasRun {
    Yes,
    /// Nothing tells of a run, and the envelope would.
    No,
    NotKnown,
}

impl HasRun {
    pub(crate) fn of(host: &Host<'_>, vm: VmId) -> Result<Self, Problem> {
        let records = host.keystore.envelopes_of(vm)?.whole()?;
        let envelopes: Vec<_> = records.iter().map(|record| &record.envelope).collect();
        let noted = host.keystore.vtpm_was_seen(vm)?;
        let made = Located::made_by_start(vm, &host.swtpm_dir).inspect();
        Ok(Self::by_what_is_there(&envelopes, noted, made.as_ref().ok()))
    }

    /// By the VM's envelopes and the keystore's note. Only an envelope of format 2 tells that there was no run.
    pub(crate) fn by_records(envelopes: &[&Envelope], noted: bool) -> Self {
        if noted || made_by_start(envelopes).any(|made| made.seen) {
            return Self::Yes;
        }
        let is_known = made_by_start(envelopes).next().is_some();
        match is_known && made_by_start(envelopes).all(|made| made.format() == Envelope::FORMAT) {
            true => Self::No,
            false => Self::NotKnown,
        }
    }

    /// The same, where it was looked for: it may be there, and nobody came to note that.
    fn by_what_is_there(envelopes: &[&Envelope], noted: bool, found: Option<&Present>) -> Self {
        let is_known = made_by_start(envelopes).next().is_some();
        match (Self::by_records(envelopes, noted), found) {
            (Self::Yes, _) => Self::Yes,
            (_, Some(Present::Encrypted(_))) if is_known => Self::Yes,
            (Self::No, Some(Present::Absent)) => Self::No,
            (Self::No | Self::NotKnown, _) => Self::NotKnown,
        }
    }
}

fn made_by_start<'e>(envelopes: &[&'e Envelope]) -> impl Iterator<Item = &'e Envelope> {
    let envelopes = envelopes.iter().copied();
    envelopes.filter(|envelope| envelope.kind.is_made_at_first_start())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::envelope::{ObjectKind, fixture};
    use crate::object::disk::ImageCopy;

    #[test]
    fn that_a_vm_never_ran_is_known_by_its_vtpm_alone() {
        let vtpm = |seen| {
            let mut envelope = fixture::envelope(VmId::random()).into_envelope();
            (envelope.kind, envelope.seen) = (ObjectKind::Vtpm, seen);
            envelope
        };
        let (unused, used) = (vtpm(false), vtpm(true));
        let mut disk = unused.clone();
        disk.kind = ObjectKind::Disk;
        let encrypted = Present::Encrypted(ImageCopy::None);
        let by = |envelopes: &[&Envelope], noted, found: Option<&Present>| {
            (
                HasRun::by_records(envelopes, noted),
                HasRun::by_what_is_there(envelopes, noted, found),
            )
        };
        let absent = Some(&Present::Absent);
        assert_eq!(by(&[&unused, &disk], false, absent), (HasRun::No, HasRun::No));
        assert_eq!(by(&[&unused, &used], false, absent), (HasRun::Yes, HasRun::Yes));
        assert_eq!(by(&[&unused], true, absent), (HasRun::Yes, HasRun::Yes));
        // It was made, and nobody came to write that down.
        assert_eq!(by(&[&unused], false, Some(&encrypted)), (HasRun::No, HasRun::Yes));
        for found in [None, Some(&Present::Plain)] {
            assert_eq!(by(&[&unused], false, found), (HasRun::No, HasRun::NotKnown));
        }
        for none in [&[][..], &[&disk]] {
            for found in [absent, Some(&encrypted)] {
                assert_eq!(by(none, false, found), (HasRun::NotKnown, HasRun::NotKnown));
            }
        }
    }
}
