//! `virtseal volume share`: root lets another VM have a volume, and takes that back. What the envelope says is checked at each
//! start; `<shareable/>` and `<readonly/>` in domain XML, which a consumer writes, grant nothing.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::host::Host;
use super::names;
use crate::api::Outcome;
use crate::host::permitted::PermittedPath;
use crate::model::advice::Advice;
use crate::model::envelope::{EnvelopeId, ObjectKind, Verified, VmId};
use crate::model::problem::{Code, Problem, chain};
use crate::object::disk::{self, ImageCopy, VolumeError};
use crate::store::{CopyPlace, EnvelopeRecord, Put};

/// What root wants of a VM's right to a volume that is another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// It may have it.
    With,
    /// It may have it no more.
    Without,
}

/// How often another change of the envelope, by a job, may come between.
const TRIES: usize = 5;

/// Lets a VM have the volume at `path`, or no longer. It needs not be defined. Nobody else may seal or share meanwhile.
///
/// # Errors
/// When it is not such a volume, or the image does not open.
pub fn share(host: &Host<'_>, path: &Path, vm: &str, sharing: Sharing) -> Result<Outcome, Problem> {
    let vm_id = vm_to_share_with(host, vm)?;
    let mut record = volume_record(host, path)?;
    if record.envelope.vm == vm_id {
        return Err(
            Problem::new(Code::Usage, format!("{} is {vm}'s own", path.display()))
                .next(Advice::from("name another VM").or(Advice::ShowVms)),
        );
    }
    if sharing == Sharing::With {
        refuse_a_copy(host, path, vm, &record)?;
    }
    for _ in 0..TRIES {
        let next = shared(host, path, &record, vm_id, sharing)?;
        if *next == record.envelope {
            return Ok(outcome(host, path, vm, vm_id, sharing, false));
        }
        match host.keystore.put(&next, &record.location) {
            Ok(Put::Updated | Put::Adopted | Put::Unchanged) => {
                host.host_store.copy_is_behind(&record.envelope, CopyPlace::Xml)?;
                return Ok(outcome(host, path, vm, vm_id, sharing, true));
            }
            // A job was faster: on top of what it made.
            Ok(Put::Stale) | Err(crate::store::StoreError::Conflict { .. }) => {
                record = record_of(host, path, record.envelope.id)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(Problem::new(
        Code::Busy,
        format!("the envelope of {} is being changed by a job", path.display()),
    )
    .next(Advice::ListJobs.then("the same command again")))
}

/// The next version of the envelope, after its key has opened the image. To take a right back, the image need not be there.
fn shared(
    host: &Host<'_>,
    path: &Path,
    record: &EnvelopeRecord,
    vm: VmId,
    sharing: Sharing,
) -> Result<Verified, Problem> {
    let dek = host.recipients.open_envelope(&record.envelope)?;
    let unusable = |error| Problem::new(Code::Failed, format!("{}: {}", path.display(), chain(&error)));
    let own = record.verify(&dek).map_err(unusable)?;
    if sharing == Sharing::Without {
        return own.unshare(vm, &dek).map_err(unusable);
    }
    let passphrase = dek
        .passphrase()
        .map_err(|error| Problem::from_error(Code::Failed, "no memory for a key", &error))?;
    disk::verify(&named_by_root(path)?, &passphrase)?;
    own.share_with(vm, &dek).map_err(unusable)
}

/// What an image carries says which volume root would share; of somebody's copy of another VM's image it says that of the other VM,
/// whose volume is still where the keystore has it.
fn refuse_a_copy(host: &Host<'_>, path: &Path, vm: &str, record: &EnvelopeRecord) -> Result<(), Problem> {
    let kept_at = Path::new(&record.location);
    let which = |path: &Path| path.metadata().map(|found| (found.dev(), found.ino())).ok();
    if kept_at == path || which(kept_at) == which(path) {
        return Ok(());
    }
    let there = host.known_place(kept_at).map(|place| disk::identify(&place));
    match there {
        Ok(Ok((_, ImageCopy::Envelope(carried)))) if carried.id == record.envelope.id => Err(Problem::new(
            Code::Denied,
            format!(
                "{} is a copy of {}, which is a volume of VM {}",
                path.display(),
                kept_at.display(),
                record.envelope.vm
            ),
        )
        .next(
            Advice::ShareVolume {
                path: kept_at.to_owned(),
                vm: vm.to_owned(),
            }
            .note("if it may have that volume"),
        )),
        // It was moved.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// A VM that is gone has its UUID in the keystore, or the admin has it.
fn vm_to_share_with(host: &Host<'_>, vm: &str) -> Result<VmId, Problem> {
    let known = host.keystore.vms()?.sound;
    names::vm_id(host.libvirt, vm).or_else(|problem| {
        let known = names::undefined(&known, vm).map_err(|several| {
            several.refuse(Code::Usage, |id| format!("the same command with its {id}").into())
        })?;
        known.map(|known| known.vm).ok_or(problem)
    })
}

/// By the envelope that the image carries, else by its path.
fn volume_record(host: &Host<'_>, path: &Path) -> Result<EnvelopeRecord, Problem> {
    let carried = match named_by_root(path).and_then(|place| disk::identify(&place)) {
        Ok((_, copy)) => copy.envelope().map(|envelope| envelope.id),
        Err(VolumeError::NotFound(_)) => None,
        Err(error) => return Err(error.into()),
    };
    let shown = path.display().to_string();
    let id = match carried {
        Some(id) => Some(id),
        None => {
            let records = host.keystore.envelopes()?.sound.into_iter();
            let mut here = records.filter(|record| record.location == shown);
            here.next().map(|record| record.envelope.id)
        }
    };
    let id = id.ok_or_else(|| not_known(path))?;
    record_of(host, path, id)
}

fn record_of(host: &Host<'_>, path: &Path, id: EnvelopeId) -> Result<EnvelopeRecord, Problem> {
    let record = host.keystore.envelope(id)?.ok_or_else(|| not_known(path))?;
    if record.envelope.kind != ObjectKind::Disk {
        let kind = record.envelope.kind;
        return Err(Problem::new(
            Code::Usage,
            format!(
                "{} is the {kind} of a VM: only disks can be shared",
                path.display()
            ),
        )
        .next(Advice::ShowVms));
    }
    Ok(record)
}

fn outcome(host: &Host<'_>, path: &Path, vm: &str, id: VmId, sharing: Sharing, changed: bool) -> Outcome {
    let shown = path.display();
    let steps = match sharing {
        _ if !changed => Vec::new(),
        Sharing::With => vec![format!("let {vm} have {shown}")],
        Sharing::Without => vec![format!("let {vm} have {shown} no more")],
    };
    let mut warnings = Vec::new();
    if sharing == Sharing::Without {
        let runs = host.libvirt.domain(&id.to_string());
        if runs.is_ok_and(|found| found.is_some_and(|domain| domain.active)) {
            warnings.push(format!(
                "{vm} runs, and has it until it ends: {}",
                Advice::ShutDownVm(vm.to_owned())
            ));
        }
        warnings.push(
            "a host that has only an older copy of the envelope, in a domain's XML, lets it start there: \
             define VMs that have it from a new dumpxml"
                .into(),
        );
    }
    Outcome {
        steps,
        warnings,
        changed,
    }
}

fn named_by_root(path: &Path) -> Result<PermittedPath, VolumeError> {
    PermittedPath::named_by_root(path).map_err(|source| VolumeError::unreachable(path, source))
}

fn not_known(path: &Path) -> Problem {
    Problem::new(
        Code::NotFound,
        format!("{} is no volume that this host knows", path.display()),
    )
    .next(
        Advice::ShowVolume(path.to_owned())
            .then(Advice::SealVm("VM".into()).note("the one that it was made for")),
    )
}
