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

pub(crate) mod adoption;
mod armed;
mod deadline;
mod first_run;
pub(crate) mod outlook;
mod versions;

use std::path::{Path, PathBuf};

use crate::domain::{Domain, ObjectRef, Policy};
use crate::host::permitted::PathRule;
use crate::host::storage::{self, Silent};
use crate::model::advice::Advice;
use crate::model::deadlines::image::ANSWERS;
use crate::model::envelope::{Envelope, EnvelopeId, ObjectKind, VmId};
use crate::model::problem::{Problem, chain};
use crate::model::subject::Subject;
use crate::object::disk::VolumeError;
use crate::object::vtpm::StateError;
use crate::object::{Located, ObjectError, OpenedHeaders, Opening};
use crate::recipients::{OpenError, Recipients};
use crate::secret::Passphrase;
use crate::store::{
    CopyPlace, EnvelopeRecord, EnvelopeState, EnvelopeStore, HostStore, StoreError, VmRecord,
};
use crate::vm::host::passphrase;
use crate::vm::moved::Moved;
use crate::vm::whose::Whose;

use adoption::{Believed, Doubt, not_believed};
use outlook::Obstacle;
use versions::{Versions, check_place, open_versions};

pub(crate) use armed::{ArmedSecrets, Overdue};
pub(crate) use deadline::Deadline;
pub(crate) use first_run::{FirstRun, KnownRun, StateSource};
pub(crate) use versions::Kept;

/// An object whose key was unwrapped and has really opened it.
#[derive(Debug)]
pub(crate) struct Opened {
    pub envelope: EnvelopeId,
    pub kind: ObjectKind,
    /// Its name in messages.
    pub label: String,
    /// For libvirt.
    pub passphrase: Passphrase,
}

/// What a start needs to know besides the domain XML.
pub(crate) struct StartContext<'a> {
    pub keystore: &'a dyn EnvelopeStore,
    /// What this host notes of their copies.
    pub host_store: &'a HostStore,
    pub recipients: &'a Recipients,
    /// What was opened before.
    pub opened_headers: &'a OpenedHeaders,
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

#[derive(Debug)]
pub(crate) struct Prepared {
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
pub(crate) fn prepare(context: &StartContext<'_>, domain: &Domain) -> Result<Prepared, Problem> {
    let stays_off = |failure: Problem| {
        let vm = Subject::Vm(domain.name.clone());
        failure.about(vm).of(format!("{} stays off", domain.name))
    };
    let of = |failure: Problem, object: &str| {
        let failure = failure.about(Subject::object(&domain.name, object));
        stays_off(failure.of(object))
    };
    let whose = |envelope: &Envelope| Whose::in_keystore(context.keystore, envelope);
    let kept = |id| Kept::in_keystore(context.keystore, id);
    let needed = outlook::needed(domain, context.policy, kept, whose);
    let needed = needed.map_err(|Obstacle { object, problem }| match object {
        Some(label) => of(*problem, &label),
        None => stays_off(*problem),
    })?;
    let (objects, versions): (Vec<_>, Vec<_>) = needed.into_iter().unzip();
    let deks = open_versions(context, &versions).map_err(|error| closed(&objects, &error, of))?;
    let own = context.keystore.envelopes_of(domain.uuid);
    let own = own.map_err(|error| stays_off(error.into()))?.sound;
    let mut opened = Vec::with_capacity(objects.len());
    let mut found = Vec::with_capacity(objects.len());
    let (mut first_run, mut moved) = (None, Vec::new());
    for ((object, versions), dek) in objects.into_iter().zip(versions).zip(deks) {
        let of_object = |failure: Problem| of(failure, &object.label);
        let mut believed = versions
            .believe(context.recipients, &dek)
            .map_err(|error| of_object(not_believed(&domain.name, &error)))?;
        check_place(domain, &object, &[&believed.envelope], whose).map_err(of_object)?;
        let passphrase = passphrase(&dek).map_err(of_object)?;
        // The images of this VM by the keystore, and that of the envelope, which may be another's that is shared.
        let known = own.iter().chain(&versions.record);
        let opening = open_object(context, domain, &object, &believed.envelope, &passphrase, known);
        match opening.map_err(of_object)? {
            Opening::Opened if object.kind.is_made_at_first_start() => believed.note_seen(&dek),
            Opening::Opened => {}
            Opening::NotMade => first_run = FirstRun::of(&believed.envelope, &dek),
        }
        let record = versions.record.as_ref();
        moved.extend(record.and_then(|record| Moved::of(record, domain.uuid, object.path.as_deref()?)));
        opened.push(Opened {
            envelope: believed.envelope.id,
            kind: object.kind,
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
fn closed(objects: &[ObjectRef], error: &OpenError, of: impl Fn(Problem, &str) -> Problem) -> Problem {
    let object = objects
        .iter()
        .find(|object| object.secret == error.binding.envelope);
    let label = object.map_or("an object", |object| object.label.as_str());
    let problem = Problem {
        message: error.reasons(),
        ..Problem::from(error)
    };
    of(problem, label)
}

/// Really opens the object with its key, or says why QEMU or swtpm would fail.
fn open_object<'a>(
    context: &StartContext<'_>,
    domain: &Domain,
    object: &ObjectRef,
    envelope: &Envelope,
    passphrase: &Passphrase,
    known: impl Iterator<Item = &'a EnvelopeRecord> + Clone,
) -> Result<Opening, Problem> {
    let path = object.path.as_deref();
    // Until it is opened. Another start would wait there like this one.
    let _asked = match path {
        Some(path) => Some(storage::ask(path, ANSWERS).map_err(|silent| unanswered(path, &silent))?),
        None => None,
    };
    let permit = |path: &Path| {
        // Nothing is read where neither this host's settings nor the keystore expect an image of this VM, or another's that is shared.
        let known = known.clone().map(|record| record.location.as_str());
        context.paths.permit_known(path, known)
    };
    let located = Located::of(object.kind, domain.uuid, path, &context.swtpm_dir, permit);
    let located = located.map_err(|error| match (error.is_missing(), path) {
        (true, Some(path)) => {
            let missing = ObjectError::from(VolumeError::NotFound(path.to_owned()));
            not_opened(domain, object.kind, missing)
        }
        _ => Problem::from(error),
    })?;
    // On the network: QEMU alone can open it.
    let Some(located) = located else {
        return Ok(Opening::Opened);
    };
    let opening = context
        .opened_headers
        .open(&located, envelope, passphrase)
        .map_err(|error| match error {
            ObjectError::State(error @ StateError::Closed { .. }) if has_another(known, envelope) => {
                of_another_key(domain, error)
            }
            error => not_opened(domain, object.kind, error),
        })?;
    match opening {
        Opening::NotMade if context.state_source == StateSource::Stream => {
            tracing::info!(
                domain = domain.name,
                "the {} is not here: it comes with the VM",
                object.label
            );
        }
        Opening::NotMade if has_run(context, domain.uuid, envelope)? => {
            return Err(not_opened(domain, object.kind, located.gone()));
        }
        Opening::NotMade | Opening::Opened => {}
    }
    Ok(opening)
}

/// Whether the VM has had more than one object of this kind: a vTPM was given up for a new one.
fn has_another<'a>(mut known: impl Iterator<Item = &'a EnvelopeRecord>, envelope: &Envelope) -> bool {
    known.any(|record| record.envelope.kind == envelope.kind && record.envelope.id != envelope.id)
}

fn of_another_key(domain: &Domain, error: StateError) -> Problem {
    let problem = Problem::from(error);
    let seal = Advice::SealVm(domain.name.clone()).note("which tries the other keys that its TPM has had");
    let advice = match problem.advice.clone() {
        Some(back) => seal.or_else(back),
        None => seal,
    };
    problem.next(advice)
}

fn unanswered(path: &Path, Silent(storage): &Silent) -> Problem {
    let (path, storage) = (path.display(), storage.display());
    let what =
        format!("{path} is on storage that does not answer ({storage}): earlier starts still wait for it");
    Problem::unreachable(what).next("see why it does not answer; once it does, start the VM again")
}

fn not_opened(domain: &Domain, kind: ObjectKind, error: ObjectError) -> Problem {
    let is_gone = matches!(
        error,
        ObjectError::Image(VolumeError::NotEncrypted(_) | VolumeError::NotFound(_))
            | ObjectError::State(StateError::Gone(_))
    );
    let problem = Problem::from(error);
    match is_gone {
        true => gone(&domain.name, kind, problem),
        false => problem,
    }
}

/// With what leads out where an object can't be brought back. A variable store can be made anew, where its loss is all that there is to
/// it: `--reset-nvram` puts the plain template in its place.
pub(crate) fn gone(vm: &str, kind: ObjectKind, problem: Problem) -> Problem {
    if kind != ObjectKind::Nvram {
        let heal = Advice::SealVm(vm.to_owned()).note("which says what can be done without that");
        let advice = match problem.advice.clone() {
            Some(back) => back.or_else(heal),
            None => heal,
        };
        return problem.next(advice);
    }
    let back = "restore it from a backup, or put it back where it was";
    let vm = vm.to_owned();
    problem.next(
        Advice::from(back).or_else(
            Advice::ResetNvram { vm, typed: false }
                .note("which makes UEFI variables anew, as after `start --reset-nvram`"),
        ),
    )
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
            "its start goes on, although it can't be recorded: {}",
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
