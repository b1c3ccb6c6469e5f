//! Back to plain, as long as the VM has not run since it was sealed. UEFI variables that it had before come along.

use super::plan::{parse, refuse_unless_off};
use super::replaced::{Ready, Replaced};
use super::{Host, NewObject, vtpm};
use crate::api::{FindingView, Outcome, StepView};
use crate::domain::{self, Domain, Object, ObjectState};
use crate::host::libvirt::DefinedDomain;
use crate::host::permitted::PermittedPath;
use crate::model::act::{Act, StepCode, Tense, Verb};
use crate::model::advice::Advice;
use crate::model::envelope::{EnvelopeId, ObjectKind};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Problem, chain};
use crate::object::disk::{self, Data, FileId, ImageLock};
use crate::object::{self, nvram};
use crate::store::EnvelopeRecord;
use crate::vm::has_run::HasRun;
use crate::vm::marks::keys_stay;

#[derive(Debug)]
pub(crate) struct UnsealPlan {
    pub xml: String,
    name: String,
    steps: Vec<Step>,
}

#[derive(Debug)]
struct Step {
    label: String,
    place: PermittedPath,
    inspected: FileId,
    record: EnvelopeRecord,
    by: Replacement,
}

#[derive(Debug)]
enum Replacement {
    Empty(disk::Bytes),
    Decrypted,
}

impl Step {
    fn act(&self) -> Act {
        let (label, path) = (&self.label, self.place.shown().display());
        let what = match &self.by {
            Replacement::Empty(_) => format!("the empty {path} ({label}) by a plain one"),
            Replacement::Decrypted => format!("{path} by a plain one with the same variables"),
        };
        let act = Verb::Replace.act(StepCode::ReplaceByPlain, what);
        act.on(label).at(self.place.shown())
    }
}

impl UnsealPlan {
    pub(crate) fn outcome(&self, tense: Tense) -> Outcome {
        let name = &self.name;
        let mut acts: Vec<_> = self.steps.iter().map(Step::act).collect();
        acts.push(Verb::Redefine.act(StepCode::Redefine, "the domain"));
        let is_done = tense == Tense::Done;
        Outcome {
            steps: StepView::all(&acts, tense, &Subject::Vm(name.clone())),
            result: is_done.then(|| format!("{name} is plain")),
            next: is_done.then(|| Advice::StartVm(name.clone()).to_string()),
            warnings: FindingView::all(&self.warnings(tense)),
            changed: is_done,
            ..Outcome::default()
        }
    }

    fn warnings(&self, tense: Tense) -> Vec<Finding> {
        let decrypted = |step: &&Step| matches!(step.by, Replacement::Decrypted);
        let are = match tense {
            Tense::Done => "are",
            Tense::Planned => "will be",
        };
        let stores = self.steps.iter().filter(decrypted).map(|step| {
            let path = step.place.shown().display();
            let what = format!(
                "the UEFI variables in {path} {are} in plaintext: boot entries, keys of Secure Boot, and whatever else the firmware and \
                 the guest have put there, such as a password of its setup or a kernel's last messages"
            );
            let object = Subject::object(&self.name, &step.label);
            Finding::warning(FindingCode::PlaintextStays, object, what)
        });
        // Only a VM with a sealed one that never ran gets here.
        let vtpm = Finding::warning(
            FindingCode::VtpmStays,
            Subject::object(&self.name, "vtpm"),
            "the TPM stays in the domain, and its state will be plain",
        )
        .next(Advice::EditXml(self.name.clone()).within("remove it"));
        let keys = keys_stay(Subject::Vm(self.name.clone()));
        stores.chain([vtpm, keys]).collect()
    }
}

/// Decides whether anything would be lost.
///
/// # Errors
/// When the VM is not sealed, or has run since; when an object is not known as one of this VM.
pub(crate) fn plan_unseal(host: &Host<'_>, defined: &DefinedDomain) -> Result<UnsealPlan, Problem> {
    refuse_unless_off(defined, &Advice::UnsealVm(defined.name.clone()))?;
    let domain = parse(defined)?;
    let name = &defined.name;
    if domain.metadata.is_none() {
        let back = host.keystore.is_sealed(domain.uuid)?;
        let back = back.then(|| Advice::SealVm(name.clone()).note("which takes it back"));
        return Err(Problem::not_found(format!("{name} is not sealed, by its XML")).advised(back));
    }
    let of_vm = |failure: Problem| failure.of(name);
    object::refuse_elsewhere(&domain, &host.swtpm_dir).map_err(of_vm)?;
    let mut sealed = Vec::new();
    for object in domain::objects(&domain) {
        if let ObjectState::Sealed(id) = object.state {
            let record = own_record(host, &domain, &object, id).map_err(of_vm)?;
            sealed.push((object, record));
        }
    }
    refuse_if_it_ran(host, &domain)?;
    let xml = domain::edit::unseal(&defined.xml)
        .map_err(|error| Problem::failed(format!("{name}: {}", chain(&error))))?;
    let mut steps = Vec::new();
    for (object, record) in sealed {
        let label = object.label.clone();
        let step = plan_object(host, &domain, object, record)
            .map_err(|failure| of_vm(failure.about(Subject::object(name, &label)).of(label)))?;
        steps.extend(step);
    }
    Ok(UnsealPlan {
        xml,
        name: name.clone(),
        steps,
    })
}

/// XML may name any secret: only what this host knows of the VM is replaced.
fn own_record(
    host: &Host<'_>,
    domain: &Domain,
    object: &Object,
    id: EnvelopeId,
) -> Result<EnvelopeRecord, Problem> {
    let known = host.keystore.envelope(id)?;
    known
        .filter(|record| record.envelope.vm == domain.uuid && record.envelope.kind == object.kind)
        .ok_or_else(|| {
            Problem::not_found(format!(
                "{} is encrypted with secret {id}, which this host does not know as one of this VM",
                object.label
            ))
            .next(Advice::DefineSealedXml(None))
        })
}

/// What makes it plain; nothing, if an earlier run has done so.
fn plan_object(
    host: &Host<'_>,
    domain: &Domain,
    object: Object,
    record: EnvelopeRecord,
) -> Result<Option<Step>, Problem> {
    let Some(path) = object.path else {
        return Ok(None);
    };
    let place = host.permit_known(domain.uuid, &path)?;
    let info = disk::inspect(&place)?;
    let by = match object.kind {
        ObjectKind::Nvram if !info.format.is_encrypted() => return Ok(None),
        ObjectKind::Nvram => Replacement::Decrypted,
        _ if info.data != Data::Empty => {
            return Err(would_lose(
                &domain.name,
                &format!("{} on {} holds data", object.label, path.display()),
            ));
        }
        _ if !info.format.is_encrypted() => return Ok(None),
        _ => Replacement::Empty(info.virtual_size),
    };
    Ok(Some(Step {
        label: object.label,
        place,
        inspected: info.file_id,
        record,
        by,
    }))
}

/// Replaces the sealed objects by plain ones. May be repeated: each is opened with its key before any goes. The caller keeps what was
/// replaced until it has defined the XML: a start may still be opening it.
pub(crate) fn unseal(host: &Host<'_>, plan: &UnsealPlan) -> Result<Replaced, Problem> {
    let mut ready = Vec::new();
    for step in &plan.steps {
        let file = prepare(host, step).map_err(|failure| failure.of(&step.label))?;
        ready.push(Ready {
            act: step.act(),
            file,
            envelope: None,
        });
    }
    let again = Advice::UnsealVm(plan.name.clone());
    Replaced::publish(host, ready, &again)
}

fn prepare(host: &Host<'_>, step: &Step) -> Result<disk::Prepared, Problem> {
    let passphrase = NewObject::open(host, &step.record)?.passphrase()?;
    let held = ImageLock::unchanged(&step.place, step.inspected)?;
    held.verify(&passphrase)?;
    Ok(match &step.by {
        Replacement::Empty(size) => disk::prepare_empty(held, *size)?,
        Replacement::Decrypted => nvram::decrypt(held, &passphrase)?,
    })
}

/// The first start makes the vTPM's state: without one the VM never ran.
fn refuse_if_it_ran(host: &Host<'_>, domain: &Domain) -> Result<(), Problem> {
    let never_made = vtpm::was_never_made(host, domain)?;
    if HasRun::of(host, domain.uuid)? != HasRun::Yes && never_made {
        return Ok(());
    }
    Err(would_lose(&domain.name, "it has run since it was sealed"))
}

fn would_lose(name: &str, why: &str) -> Problem {
    Problem::would_lose_key(format!("{name} stays sealed: {why}, which would be lost"))
        .next("copy the data out from inside the guest: turning sealed data plain is not possible yet")
}
