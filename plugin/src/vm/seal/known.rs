//! What the keystore and the XML know of a VM's objects.

use std::path::Path;

use super::Host;
use crate::domain::{Domain, Metadata};
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeId, ObjectKind, VmId};
use crate::model::problem::{Code, Problem};
use crate::store::{EnvelopeRecord, EnvelopeState};

/// Whether a VM is known to have run since it was sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HasRun {
    Yes,
    NotKnown,
}

impl HasRun {
    pub(super) fn of(host: &Host<'_>, vm: VmId) -> Result<Self, Problem> {
        let seen = host.keystore.vtpm_was_seen(vm)?
            || host
                .keystore
                .envelopes_of(vm)?
                .whole()?
                .iter()
                .any(|record| record.envelope.kind.is_made_at_first_start() && record.envelope.seen);
        Ok(if seen { Self::Yes } else { Self::NotKnown })
    }
}

/// What the keystore has of this kind for the VM: what is known to open something first, then the newest.
pub(super) fn known(host: &Host<'_>, vm: VmId, kind: ObjectKind) -> Result<Vec<EnvelopeRecord>, Problem> {
    // What can't be read may be what is looked for: nothing is made anew in its place.
    let mut records = host.keystore.envelopes_of(vm)?.whole()?;
    records.retain(|record| record.envelope.kind == kind);
    records.reverse();
    records.sort_by_key(|record| record.state == EnvelopeState::Pending);
    Ok(records)
}

/// The disk image's envelope by what the keystore knows, for one that carries none.
pub(super) fn known_disk(host: &Host<'_>, vm: VmId, path: &Path) -> Result<Option<Envelope>, Problem> {
    let location = path.display().to_string();
    let records = known(host, vm, ObjectKind::Disk)?.into_iter();
    let mut here = records.filter(|record| record.location == location);
    Ok(here.next().map(|record| record.envelope))
}

/// Whether keystore and metadata both have this envelope: otherwise its object is opened first.
pub(super) fn is_settled(host: &Host<'_>, domain: &Domain, id: EnvelopeId) -> Result<bool, Problem> {
    let is_named = |metadata: &Metadata| metadata.envelope(id).is_some();
    Ok(domain.metadata.as_ref().is_some_and(is_named) && host.keystore.readable_envelope(id)?.is_some())
}

/// The envelope that the XML names for an object, if it is one of this VM: the keystore's, where it has one.
pub(super) fn named_envelope(
    host: &Host<'_>,
    domain: &Domain,
    kind: ObjectKind,
    id: EnvelopeId,
) -> Result<Envelope, Problem> {
    let known = host.keystore.readable_envelope(id)?.map(|record| record.envelope);
    let carried = domain
        .metadata
        .as_ref()
        .and_then(|metadata| metadata.envelope(id).cloned());
    known
        .or(carried)
        .filter(|envelope| envelope.kind == kind && envelope.vm == domain.uuid)
        .ok_or_else(|| {
            Problem::new(
                Code::NotFound,
                format!("the {kind} is encrypted with secret {id}, which is no envelope of this VM"),
            )
            .next(
                Advice::EditXml(domain.name.clone())
                    .within("remove its <encryption>, if nothing is kept there"),
            )
        })
}
