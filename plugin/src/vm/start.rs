//! What happens to a sealed VM's keys at each step of its life. Read this first.
//!
//! ```text
//!             prepare begin                      started begin
//!   OFF ───────────────────────▶ ARMED ───────────────────────────▶ RUNNING
//!    ▲    all DEKs unwrapped,      │     secrets undefined: QEMU       │
//!    │    opened with, defined     │     and swtpm have their copy     │
//!    │    as libvirt secrets       │                                   │
//!    └─────────────────────────────┴───────────────────────────────────┘
//!                release end: whatever is still armed is undefined
//! ```
//!
//! The hook asks at `prepare begin` and may be told no; the other two steps never stop a VM. A start that fails
//! between prepare and started ends in `release end`, so nothing stays armed; what a killed daemon left behind is
//! swept when it starts again. Where neither message comes, libvirt is asked what became of the start.
//!
//! [`prepare`] decides: the VM's objects, the envelope of each, every check that needs no key, one unwrap for all,
//! a real opening of each object, and only then libvirt. All or nothing.

pub mod adoption;
mod armed;
mod deadline;
mod first_run;
mod moved;
mod versions;

use std::path::{Path, PathBuf};

use crate::domain::{Domain, ObjectRef, Policy, sealed_objects_under};
use crate::host::permitted::PathRule;
use crate::model::envelope::{Envelope, EnvelopeId, ObjectKind, VmId};
use crate::model::problem::{Code, Problem, chain};
use crate::object::disk::VolumeError;
use crate::object::{Located, ObjectError, OpenedHeaders, Opening};
use crate::recipients::{OpenError, Recipients};
use crate::secret::Passphrase;
use crate::store::{CopyPlace, EnvelopeState, EnvelopeStore, HostStore, StoreError, VmRecord};
use crate::vm::side_doors;

use adoption::{Believed, Doubt, not_believed};
use versions::{Versions, check_place, find_versions, open_versions};

pub use armed::{ArmedSecrets, Overdue};
pub use deadline::Deadline;
pub use first_run::{FirstRun, KnownRun, StateSource};
pub use moved::Moved;

/// An object whose key was unwrapped and has really opened it.
#[derive(Debug)]
pub struct Opened {
    /// Its envelope.
    pub envelope: EnvelopeId,
    /// What it is.
    pub kind: ObjectKind,
    /// Its name in messages.
    pub label: String,
    /// Whether other VMs may have it open too.
    pub shareable: bool,
    /// For libvirt.
    pub passphrase: Passphrase,
}

/// What a start needs to know besides the domain XML.
pub struct StartContext<'a> {
    /// Where the envelopes are.
    pub keystore: &'a dyn EnvelopeStore,
    /// What this host notes of their copies.
    pub host_store: &'a HostStore,
    /// What opens them.
    pub recipients: &'a Recipients,
    /// What was opened before.
    pub opened_headers: &'a OpenedHeaders,
    /// Where libvirt keeps vTPM state.
    pub swtpm_dir: PathBuf,
    /// Where images may be that the XML names.
    pub paths: PathRule,
    /// What the host lets this VM do beside its sealed objects.
    pub policy: Policy,
    /// Whether the VM is known to have run by more than what is kept.
    pub run: KnownRun,
    /// Where the vTPM's state comes from.
    pub state_source: StateSource,
}

/// What a start gets.
#[derive(Debug)]
pub struct Prepared {
    /// Its objects.
    pub opened: Vec<Opened>,
    /// What is to be noted once the VM runs, if this is the first time.
    pub first_run: Option<FirstRun>,
    /// What was opened elsewhere than the keystore has it.
    pub moved: Vec<Moved>,
}

/// Decides whether the VM of `xml` may start, and with which keys.
///
/// # Errors
/// The one line that the user sees: the VM, the object, the reason, the next command.
pub fn prepare(context: &StartContext<'_>, domain: &Domain) -> Result<Prepared, Problem> {
    let stays_off = |failure: Problem| failure.of(format!("{} stays off", domain.name));
    let objects = sealed_objects_under(domain, context.policy)
        .map_err(|refusal| stays_off(side_doors::not_sealed(&refusal)))?;
    side_doors::refuse(domain, context.policy).map_err(stays_off)?;
    let mut versions = Vec::with_capacity(objects.len());
    for object in &objects {
        versions.push(
            find_versions(context, domain, object).map_err(|failure| stays_off(failure.of(&object.label)))?,
        );
    }
    let deks = open_versions(context, &versions).map_err(|error| stays_off(closed(&objects, &error)))?;
    let mut opened = Vec::with_capacity(objects.len());
    let mut found = Vec::with_capacity(objects.len());
    let (mut first_run, mut moved) = (None, Vec::new());
    for ((object, versions), dek) in objects.into_iter().zip(versions).zip(deks) {
        let of_object = |failure: Problem| stays_off(failure.of(&object.label));
        let mut believed = versions
            .believe(context.recipients, &dek)
            .map_err(|error| of_object(not_believed(&domain.name, &error)))?;
        check_place(domain, &object, &[&believed.envelope]).map_err(of_object)?;
        let passphrase = dek
            .passphrase()
            .map_err(|error| of_object(Problem::from_error(Code::Failed, "no memory for its key", &error)))?;
        match open_object(context, domain, &object, &believed.envelope, &passphrase).map_err(of_object)? {
            Opening::Opened if object.kind.is_made_at_first_start() => believed.note_seen(&dek),
            Opening::Opened => {}
            Opening::NotMade => first_run = FirstRun::of(&believed.envelope, &dek),
        }
        moved.extend(versions.moved(domain, &object));
        opened.push(Opened {
            envelope: believed.envelope.id,
            kind: object.kind,
            shareable: !believed.envelope.shared_with.is_empty(),
            label: object.label,
            passphrase,
        });
        found.push((versions, believed));
    }
    note(context, domain, &found).map_err(stays_off)?;
    Ok(Prepared {
        opened,
        first_run,
        moved,
    })
}

/// Names the object whose envelope does not open, by its label: its ids are of no use to who reads the line.
fn closed(objects: &[ObjectRef], error: &OpenError) -> Problem {
    let object = objects
        .iter()
        .find(|object| object.secret == error.binding.envelope);
    let label = object.map_or("an object", |object| object.label.as_str());
    Problem {
        message: error.reasons(),
        ..Problem::from(error)
    }
    .of(label)
}

/// Really opens the object with its key, or says why QEMU or swtpm would fail.
fn open_object(
    context: &StartContext<'_>,
    domain: &Domain,
    object: &ObjectRef,
    envelope: &Envelope,
    passphrase: &Passphrase,
) -> Result<Opening, Problem> {
    let path = object.path.as_deref();
    let known = known_places(context, domain, envelope)?;
    let permit = |path: &Path| {
        // Nothing is read where neither this host's settings nor the keystore expect an image of this VM, or another's that is shared.
        context.paths.permit_known(path, known.iter())
    };
    let located = Located::of(object.kind, domain.uuid, path, &context.swtpm_dir, permit);
    let located = located.map_err(|error| match (error.is_missing(), path) {
        (true, Some(path)) => ObjectError::from(VolumeError::NotFound(path.to_owned())).into(),
        _ => Problem::from(error),
    })?;
    // On the network: QEMU alone can open it.
    let Some(located) = located else {
        return Ok(Opening::Opened);
    };
    let opening = context.opened_headers.open(&located, envelope, passphrase)?;
    match opening {
        Opening::NotMade if context.state_source == StateSource::Stream => {
            tracing::info!(
                domain = domain.name,
                "the {} is not here: it comes with the VM",
                object.label
            );
        }
        Opening::NotMade if has_run(context, domain.uuid, envelope)? => return Err(located.gone().into()),
        Opening::NotMade | Opening::Opened => {}
    }
    Ok(opening)
}

/// The images of this VM by the keystore, and that of the envelope, which may be another's that is shared.
fn known_places(
    context: &StartContext<'_>,
    domain: &Domain,
    envelope: &Envelope,
) -> Result<Vec<String>, Problem> {
    let own = context.keystore.envelopes_of(domain.uuid)?.sound.into_iter();
    let named = context.keystore.readable_envelope(envelope.id)?;
    Ok(own.chain(named).map(|record| record.location).collect())
}

/// By the envelope, which travels, by what this host has noted, or by what it could not write down yet.
fn has_run(context: &StartContext<'_>, vm: VmId, envelope: &Envelope) -> Result<bool, Problem> {
    Ok(envelope.seen || context.run == KnownRun::Yes || context.keystore.vtpm_was_seen(vm)?)
}

/// Every envelope here was verified by the key that has opened its object: only now the keystore learns of it. What it knows
/// already opens the object, now and at the next start, so a full disk stops nothing of that; what it does not know is in no index
/// that keeps others off.
fn note(context: &StartContext<'_>, domain: &Domain, found: &[(Versions, Believed)]) -> Result<(), Problem> {
    let (keystore, vm) = (context.keystore, domain.uuid);
    let unwritten = |error: &StoreError| {
        tracing::error!(
            domain = domain.name,
            "its start goes on, though a note of it can't be written: {}",
            chain(error)
        );
    };
    let remember = || {
        let is_noted = |record: &VmRecord| record.name == domain.name;
        let renamed = !matches!(keystore.vm(vm), Ok(Some(record)) if is_noted(&record));
        if renamed || !keystore.is_sealed(vm)? {
            keystore.remember_vm(vm, &domain.name)?;
        }
        Ok(())
    };
    remember().unwrap_or_else(|error| unwritten(&error));
    for (versions, believed) in found {
        if let Err(error) = keep(context, domain, versions, believed) {
            match &versions.record {
                Some(_) => unwritten(&error),
                None => return Err(error.into()),
            }
        }
    }
    Ok(())
}

fn keep(
    context: &StartContext<'_>,
    domain: &Domain,
    versions: &Versions,
    believed: &Believed,
) -> Result<(), StoreError> {
    let (keystore, host_store) = (context.keystore, context.host_store);
    if let (Some(reason), Some(record)) = (&versions.unreadable, &versions.record) {
        tracing::warn!(domain = domain.name, "{reason}; the keystore's is used");
        host_store.copy_is_behind(&record.envelope, CopyPlace::Xml)?;
    }
    if believed.is_news {
        keystore.put(&believed.envelope, &versions.location)?;
    }
    if let Some(copy) = versions.copy.as_ref().filter(|copy| **copy != *believed.envelope) {
        if let Some(doubt) = &believed.doubt {
            let domain = &domain.name;
            tracing::warn!(domain, "{}", doubt.words(copy, &format!("the XML of {domain}")));
        }
        if !matches!(believed.doubt, Some(Doubt::Conflict)) {
            host_store.copy_is_behind(believed.needed_by(copy), CopyPlace::Xml)?;
        }
    }
    let state = versions.record.as_ref().map(|record| record.state);
    if state == Some(EnvelopeState::Pending) {
        keystore.activate(believed.envelope.id)?;
    }
    let seen = believed.envelope.kind.is_made_at_first_start() && believed.envelope.seen;
    if seen && keystore.vm(domain.uuid)?.is_some_and(|record| !record.vtpm_seen) {
        keystore.set_vtpm_seen(domain.uuid)?;
    }
    Ok(())
}
