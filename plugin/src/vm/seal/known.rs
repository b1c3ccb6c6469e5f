//! What the keystore and the XML know of a VM's objects.

use std::path::{Path, PathBuf};

use super::Host;
use crate::domain::{Domain, Metadata};
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeId, ObjectKind, VmId};
use crate::model::problem::{Problem, chain};
use crate::store::{EnvelopeRecord, EnvelopeState};
use crate::vm::forgotten;
use crate::vm::whose::own_objects;

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
pub(super) fn known_disk(host: &Host<'_>, vm: VmId, path: &Path) -> Result<Option<EnvelopeRecord>, Problem> {
    let location = path.display().to_string();
    let records = known(host, vm, ObjectKind::Disk)?;
    Ok(records.into_iter().find(|record| record.location == location))
}

/// Whether keystore and metadata both have this envelope: otherwise its object is opened first.
pub(super) fn is_settled(host: &Host<'_>, domain: &Domain, id: EnvelopeId) -> Result<bool, Problem> {
    let is_named = |metadata: &Metadata| metadata.envelope(id).is_some();
    Ok(domain.metadata.as_ref().is_some_and(is_named) && host.keystore.readable_envelope(id)?.is_some())
}

/// The envelope that the XML names for an object: the keystore's, where it has one, else that of the metadata; none if nobody
/// here knows it.
pub(super) fn named_envelope(
    host: &Host<'_>,
    domain: &Domain,
    kind: ObjectKind,
    id: EnvelopeId,
) -> Result<Option<Envelope>, Problem> {
    let kept = host.keystore.readable_envelope(id)?.map(|record| record.envelope);
    let carried = || domain.metadata.as_ref()?.envelope(id).cloned();
    let Some(named) = kept.or_else(carried) else {
        return Ok(None);
    };
    if named.kind == kind && named.vm == domain.uuid {
        return Ok(Some(named));
    }
    let problem = Problem::failed(format!(
        "the XML names secret {id} for it, which is of the {} of VM {}",
        named.kind, named.vm
    ));
    if known(host, domain.uuid, kind)?.is_empty() {
        return Err(problem.next(of_another(host, domain, named.vm)));
    }
    Err(problem.next(
        Advice::EditXml(domain.name.clone())
            .within("remove that <encryption>")
            .then(Advice::SealVm(domain.name.clone()).note("which finds the right one")),
    ))
}

/// The file that a vTPM's envelope was put into when it was dropped here for that of a new one, as `vm seal --replace=vtpm` does.
pub(crate) fn given_up(host: &Host<'_>, vm: VmId, id: EnvelopeId) -> Result<Option<PathBuf>, Problem> {
    let known = host.keystore.envelopes_of(vm)?.sound;
    let is_another = |known: &Envelope| known.kind.is_made_at_first_start() && known.id != id;
    if !known.iter().any(|record| is_another(&record.envelope)) {
        return Ok(None);
    }
    let file = forgotten::file_with(host.host_store.dir(), |envelope| envelope.id == id);
    file.map_err(|error| Problem::failed(chain(&error)))
}

/// What leads out where an object was made for another VM: this one may be a copy of that, or may have been that.
pub(super) fn of_another(host: &Host<'_>, domain: &Domain, other: VmId) -> Advice {
    let own = own_objects(&domain.name);
    if is_defined(host, other) {
        return own;
    }
    // A defined VM's UUID can't be changed.
    Advice::UndefineVm(domain.name.clone())
        .then(format!("define it again with <uuid>{other}</uuid>"))
        .then(Advice::SealVm(other.to_string()))
        .or_else(own)
}

pub(super) fn is_defined(host: &Host<'_>, vm: VmId) -> bool {
    host.kept.iter().any(|kept| kept.vm == vm)
}
