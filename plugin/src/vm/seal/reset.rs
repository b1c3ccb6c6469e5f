//! `vm nvram reset`: the UEFI variables of a sealed VM begin again from their template.
//!
//! The fresh store is encrypted with the DEK that the old one had, so the XML stays as it is, and so does the copy of the old one that
//! is kept beside it: whoever wants that back moves it there. The fresh store is complete and was opened with its key before it takes
//! the old one's place, by a rename; killed anywhere, the VM has one of both.

use std::path::PathBuf;

use super::firmware;
use super::known::named_envelope;
use super::others::OtherUses;
use super::plan::{parse, refuse_unless_off};
use super::store::{RAW, is_content_of, permit_template};
use super::{Host, NewObject};
use crate::api::{FindingView, LossPreview, Outcome, StepView};
use crate::domain::{Domain, Firmware, SecretRef, Uefi};
use crate::host::libvirt::DefinedDomain;
use crate::host::permitted::PermittedPath;
use crate::model::act::{Act, StepCode, Tense, Verb};
use crate::model::advice::Advice;
use crate::model::envelope::{EnvelopeId, ObjectKind};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::Problem;
use crate::object::disk::{self, FileId, ImageLock, VolumeError};
use crate::object::nvram;
use crate::store::EnvelopeRecord;
use crate::vm::consent;

#[derive(Debug)]
pub(crate) struct ResetPlan {
    uuid: String,
    name: String,
    place: PermittedPath,
    template: PermittedPath,
    record: EnvelopeRecord,
    old: OldStore,
}

/// What is at the store's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OldStore {
    Nothing,
    /// As it came from the template: libvirt puts that there for `--reset-nvram`.
    Pristine(FileId),
    Encrypted(FileId),
    /// With variables of somebody's.
    Plain(FileId),
}

impl OldStore {
    fn file(self) -> Option<FileId> {
        match self {
            Self::Nothing => None,
            Self::Pristine(file) | Self::Encrypted(file) | Self::Plain(file) => Some(file),
        }
    }

    fn is_kept(self) -> bool {
        matches!(self, Self::Encrypted(_) | Self::Plain(_))
    }
}

impl ResetPlan {
    /// What is asked before, with what is lost.
    pub(crate) fn preview(&self) -> LossPreview {
        let path = self.place.shown().display();
        let variables = match self.old {
            OldStore::Nothing => format!("the variables of {path}, which is missing: put it back instead if there is a copy"),
            OldStore::Pristine(_) => format!("nothing more: {path} is the template, and its variables are gone already"),
            OldStore::Encrypted(_) | OldStore::Plain(_) => {
                "its boot entries, the Secure Boot keys that were enrolled, the settings and passwords of its firmware".to_owned()
            }
        };
        let tpm = "what its TPM opens only for the variables as they were: BitLocker and others ask for their recovery key";
        let lost =
            |code, object, what: &str| Finding::critical(code, Subject::object(&self.name, object), what);
        LossPreview {
            vm: self.uuid.clone(),
            name: self.name.clone(),
            steps: self.steps(None, Tense::Planned),
            done: self.steps(None, Tense::Done),
            lost: FindingView::all(&[
                lost(FindingCode::VariablesLost, "nvram", &variables),
                lost(FindingCode::BoundToVariablesLost, "vtpm", tpm),
            ]),
        }
    }

    /// `kept` is where the old store was put, once that is known.
    fn steps(&self, kept: Option<&PathBuf>, tense: Tense) -> Vec<StepView> {
        let path = self.place.shown().display();
        let kept = kept.map_or_else(
            || format!("{path}{}N", nvram::KEPT),
            |kept| kept.display().to_string(),
        );
        let keep = self.old.is_kept().then(|| {
            let what = format!("the current UEFI variable store as {kept}");
            Verb::Keep.act(StepCode::KeepOld, what).on("nvram").at(&kept)
        });
        let what = format!(
            "the encrypted UEFI variable store {path} from {}",
            self.template.shown().display()
        );
        let make = Verb::Create.act(StepCode::Renew, what).on("nvram");
        let acts: Vec<Act> = keep.into_iter().chain([make.at(self.place.shown())]).collect();
        StepView::all(&acts, tense, &Subject::Vm(self.name.clone()))
    }
}

/// Looks and decides; nothing is changed.
///
/// # Errors
/// When the VM runs, or has no encrypted variable store that is known here.
pub(crate) fn plan_reset(host: &Host<'_>, defined: &DefinedDomain) -> Result<ResetPlan, Problem> {
    let again = Advice::ResetNvram {
        vm: defined.name.clone(),
        typed: false,
    };
    refuse_unless_off(defined, &again)?;
    let domain = parse(defined)?;
    plan_of(host, &domain).map_err(|failure| {
        let failure = failure.about(Subject::object(&domain.name, "nvram"));
        failure.of(&domain.name)
    })
}

fn plan_of(host: &Host<'_>, domain: &Domain) -> Result<ResetPlan, Problem> {
    let uefi = match &domain.firmware {
        Firmware::Uefi(uefi) if !uefi.stateless => uefi,
        _ => return Err(Problem::failed("it has no UEFI variables")),
    };
    let (path, id) = sealed_store(domain, uefi)?;
    named_envelope(host, domain, ObjectKind::Nvram, id)?;
    let Some(record) = host.keystore.envelope(id)? else {
        let why = "its UEFI variable store came from another host, and has not been opened here yet";
        return Err(Problem::not_found(why).next(Advice::AdoptVm(domain.name.clone())));
    };
    let place = host.permit_known(domain.uuid, &path)?;
    OtherUses::among(&host.kept, domain.uuid).refuse_users_of(&place, domain)?;
    let chosen = firmware::choose(uefi, uefi.nvram.as_ref())?;
    let template = permit_template(host, domain, &chosen.template)?;
    let old = match disk::inspect(&place) {
        Err(VolumeError::NotFound(_)) => OldStore::Nothing,
        Ok(info) if info.format.is_encrypted() => OldStore::Encrypted(info.file_id),
        // What can't be read as variables is kept as well.
        Ok(info) if is_content_of(&place, &template).is_ok_and(|same| same) => {
            OldStore::Pristine(info.file_id)
        }
        Ok(info) => OldStore::Plain(info.file_id),
        Err(error) => return Err(error.into()),
    };
    Ok(ResetPlan {
        uuid: domain.uuid.to_string(),
        name: domain.name.clone(),
        place,
        template,
        record,
        old,
    })
}

/// By the XML: what it does not call encrypted, or calls qcow2, would not start afterwards either.
fn sealed_store(domain: &Domain, uefi: &Uefi) -> Result<(PathBuf, EnvelopeId), Problem> {
    let seal_first =
        |why: &str| Err(Problem::failed(why.to_owned()).next(Advice::SealVm(domain.name.clone())));
    let nvram = uefi.nvram.as_ref();
    let secret = nvram.and_then(|nvram| Some(&nvram.encryption.as_ref()?.secret));
    let path = nvram.and_then(|nvram| nvram.source.path());
    let (Some(SecretRef::Uuid(id)), Some(path)) = (secret, path) else {
        return seal_first("its XML names no encrypted UEFI variable store");
    };
    match nvram.and_then(|nvram| nvram.format.as_deref()) {
        None | Some(RAW) => Ok((path.to_owned(), *id)),
        Some(_) => seal_first("its XML calls its UEFI variable store qcow2, and a sealed one is raw"),
    }
}

/// Makes the fresh store, once the VM's name was `typed`. May be repeated.
///
/// # Errors
/// When it was not; else the store is as it was.
pub(crate) fn reset(host: &Host<'_>, plan: &ResetPlan, typed: Option<&str>) -> Result<Outcome, Problem> {
    let name = &plan.name;
    let again = || Advice::ResetNvram {
        vm: name.clone(),
        typed: true,
    };
    consent::refuse_unless_typed(name, typed, "its UEFI variables would be lost", again)?;
    let kept =
        replace(host, plan).map_err(|failure| failure.about(Subject::object(name, "nvram")).of(name))?;
    let is_plain = matches!(plan.old, OldStore::Plain(_));
    let warning = kept.as_ref().filter(|_| is_plain).map(|kept| {
        let kept = kept.display();
        let what = format!("{kept} is not encrypted, as it was found: remove it once it is not needed");
        let subject = Subject::object(name, "nvram");
        FindingView::from(Finding::warning(FindingCode::PlaintextStays, subject, what))
    });
    Ok(Outcome {
        steps: plan.steps(kept.as_ref(), Tense::Done),
        warnings: warning.into_iter().collect(),
        changed: true,
        ..Outcome::default()
    })
}

fn replace(host: &Host<'_>, plan: &ResetPlan) -> Result<Option<PathBuf>, Problem> {
    let passphrase = NewObject::open(host, &plan.record)?.passphrase()?;
    let unchanged = |file| ImageLock::unchanged(&plan.place, file);
    let held = plan.old.file().map(unchanged).transpose()?;
    let kept = match &held {
        Some(held) if plan.old.is_kept() => Some(nvram::keep(held)?),
        _ => None,
    };
    // Who was about to open the old one finds this instead, with the same key.
    nvram::create(&plan.template, &plan.place, held, &passphrase)?.publish()?;
    host.keystore.activate(plan.record.envelope.id)?;
    Ok(kept)
}
