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

use std::path::{Path, PathBuf};

use crate::domain::{Domain, ObjectRef, Policy, sealed_objects_under};
use crate::host::permitted::PathRule;
use crate::model::envelope::{Envelope, EnvelopeError, EnvelopeId, ObjectKind, Precedence, VmId};
use crate::model::problem::{Code, Problem, chain};
use crate::object::disk::VolumeError;
use crate::object::{Located, ObjectError, OpenedHeaders, Opening};
use crate::recipients::{OpenError, Recipients};
use crate::secret::{Dek, Passphrase};
use crate::store::{
    CopyPlace, EnvelopeRecord, EnvelopeState, EnvelopeStore, HostStore, StoreError, VmRecord,
};
use crate::terminal::quoted;
use crate::terminal::word;
use crate::vm::side_doors;

use adoption::{Believed, Doubt, believe, believe_without_row, not_believed};

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

/// What there is of an object's envelope: one of the three at least.
struct Versions {
    record: Option<EnvelopeRecord>,
    /// What a damaged row has in the place of a record.
    held: Option<Envelope>,
    copy: Option<Envelope>,
    /// What is wrong with a copy that can't be read.
    unreadable: Option<String>,
    location: String,
}

impl Versions {
    /// The one to open: the keystore's, where it has one.
    fn first(&self) -> Option<&Envelope> {
        self.record
            .as_ref()
            .map(|record| &record.envelope)
            .or(self.copy.as_ref())
            .or(self.held.as_ref())
    }

    /// The one to open where the first does not: a newer copy, or what is in a damaged row. What it claims is verified then, and
    /// that its key is the keystore's, by the MAC of that one.
    fn second(&self) -> Option<&Envelope> {
        let Some(record) = &self.record else {
            return self.held.as_ref().filter(|_| self.copy.is_some());
        };
        let copy = self.copy.as_ref()?;
        let have_macs = record.envelope.format() == Envelope::FORMAT && copy.format() == Envelope::FORMAT;
        let is_newer = copy.supersedes(&record.envelope) == Precedence::Newer;
        (have_macs && is_newer).then_some(copy)
    }

    /// An image of this VM that was opened elsewhere than the keystore has it: another VM's, which is shared, is where its own says.
    fn moved(&self, domain: &Domain, object: &ObjectRef) -> Option<Moved> {
        let (record, to) = (self.record.as_ref()?, object.path.clone()?);
        let is_elsewhere = record.envelope.vm == domain.uuid && record.location != self.location;
        is_elsewhere.then(|| Moved {
            envelope: record.envelope.id,
            from: record.location.clone(),
            to,
        })
    }

    /// The one that counts, once one of them has opened to `dek`.
    fn believe(&self, recipients: &Recipients, dek: &Dek) -> Result<Believed, EnvelopeError> {
        match (&self.held, &self.copy) {
            (Some(held), Some(copy)) => believe_without_row(recipients, held, copy, dek),
            (held, copy) => believe(
                recipients,
                self.record.as_ref(),
                copy.as_ref().or(held.as_ref()),
                dek,
            ),
        }
    }
}

/// The keystore's version, and the copy that travels in the XML.
fn find_versions(
    context: &StartContext<'_>,
    domain: &Domain,
    object: &ObjectRef,
) -> Result<Versions, Problem> {
    let location = object
        .path
        .as_ref()
        .map(|path| path.display().to_string())
        .unwrap_or_default();
    let metadata = domain.metadata.as_ref();
    let (record, damaged) = match context.keystore.envelope(object.secret) {
        Err(error) if error.is_of_row() => (None, Some(chain(&error))),
        found => (found?, None),
    };
    let held = match damaged {
        Some(_) => context.keystore.held_envelope(object.secret)?,
        None => None,
    };
    let versions = Versions {
        record,
        held,
        copy: metadata
            .and_then(|metadata| metadata.envelope(object.secret))
            .cloned(),
        unreadable: metadata.and_then(|metadata| metadata.unreadable(object.secret)),
        location,
    };
    if versions.first().is_none() {
        return Err(match damaged {
            Some(damaged) => lost(domain, object, &damaged),
            None => missing(object, versions.unreadable.as_deref()),
        });
    }
    // What a copy claims is verified once it is open.
    let claims: Vec<_> = versions.first().into_iter().chain(versions.second()).collect();
    check_place(domain, object, &claims)?;
    Ok(versions)
}

/// The DEK of each object, or the reason of the first that has none.
fn open_versions(context: &StartContext<'_>, versions: &[Versions]) -> Result<Vec<Dek>, OpenError> {
    let first: Vec<_> = versions.iter().filter_map(Versions::first).collect();
    if versions.iter().all(|versions| versions.second().is_none()) {
        return context.recipients.open_all(&first);
    }
    let opened = context.recipients.open_each(&first);
    let mut deks = Vec::with_capacity(versions.len());
    for (versions, opened) in versions.iter().zip(opened) {
        deks.push(match (opened, versions.second()) {
            (Err(error), Some(copy)) => context.recipients.open_envelope(copy).map_err(|_| error)?,
            (opened, _) => opened?,
        });
    }
    Ok(deks)
}

/// The XML has no copy that can be read; the image, or a backup, may have one.
fn lost(domain: &Domain, object: &ObjectRef, damaged: &str) -> Problem {
    let id = object.secret;
    Problem::new(Code::Failed, format!("{damaged}; the domain XML has no copy of envelope {id} either")).next(format!(
        "virtseal vm adopt {}, which looks at the image too; else virsh define FILE with a dumpxml of the VM that has its \
         <virtseal:vm> metadata, or virtseal state restore -i FILE",
        word(&domain.name)
    ))
}

fn missing(object: &ObjectRef, unreadable: Option<&str>) -> Problem {
    let id = object.secret;
    let reason = match unreadable {
        Some(reason) => format!("its envelope {id} is not in the keystore; in the domain XML, {reason}"),
        None => format!("its envelope {id} is neither in the keystore nor in the domain XML"),
    };
    Problem::new(Code::NotFound, reason)
        .next("virsh define FILE, where FILE is a dumpxml with its <virtseal:vm> metadata")
}

/// An envelope serves the object that it was made for, in its own VM and in those that root has shared the object with. One of
/// `versions`, of which there is one at least, must say so.
fn check_place(domain: &Domain, object: &ObjectRef, versions: &[&Envelope]) -> Result<(), Problem> {
    let envelope = versions[0];
    if envelope.kind != object.kind {
        let found = envelope.kind;
        return Err(Problem::new(
            Code::Failed,
            format!(
                "envelope {} is that of a {found}: envelopes were swapped",
                envelope.id
            ),
        )
        .next(format!(
            "virsh edit {}: give each object its own secret UUID",
            word(&domain.name)
        )));
    }
    if !versions.iter().any(|envelope| envelope.serves(domain.uuid)) {
        return Err(Problem::new(
            Code::Failed,
            format!(
                "envelope {} belongs to VM {}, which does not share it: the XML was copied or swapped",
                envelope.id, envelope.vm
            ),
        )
        .next(format!(
            "virsh edit {0}, or virsh define FILE with its own dumpxml: it needs its own disks and <virtseal:vm> metadata; \
             new ones are made by virtseal volume create FILE --vm={1}",
            word(&domain.name),
            quoted(&domain.name)
        )));
    }
    Ok(())
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
