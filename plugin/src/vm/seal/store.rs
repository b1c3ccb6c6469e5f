//! The UEFI variable store of a VM that is to be sealed: where it is, what it is made from, and whether anything would be lost.

use std::path::{Path, PathBuf};

use super::Host;
use super::firmware;
use super::known::{is_settled, named_envelope};
use super::loss::{Loss, Way};
use super::others::OtherUses;
use super::take_back::{self, KnownStore, StoreDecision, StoreFile};
use crate::domain::edit::{LoaderPin, NvramEdit};
use crate::domain::{self, Domain, Firmware, Nvram, Source, Uefi};
use crate::host::permitted::PermittedPath;
use crate::model::act::{Act, StepCode, Verb};
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeId, ObjectKind};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::Problem;
use crate::object::disk::{self, FileId};
use crate::object::nvram;
use crate::store::{EnvelopeState, Mark};
use crate::terminal::word;
use crate::vm::accepted_losses::AcceptedLosses;
use crate::vm::has_run::HasRun;

#[derive(Debug)]
pub(super) enum NvramStep {
    Sealed(Envelope),
    /// Sealed, and the XML has a format that the file has not: the VM does not start.
    Reformat(Envelope, PathBuf),
    /// It was sealed, and the XML does not say so.
    TakeBack(SealedStore),
    Create(Box<NewStore>),
    None,
}

/// A store to be opened with one of the envelopes.
#[derive(Debug)]
pub(super) struct SealedStore {
    pub(super) path: PathBuf,
    pub(super) envelopes: Vec<Envelope>,
    loader: Option<LoaderPin>,
    format: Option<String>,
    /// The secret that the XML names.
    stated: Option<EnvelopeId>,
}

/// A store to be made.
#[derive(Debug)]
pub(super) struct NewStore {
    pub(super) place: PermittedPath,
    pub(super) template: PermittedPath,
    pub(super) loader: Option<LoaderPin>,
    pub(super) present: Present,
    /// What the XML has to say of the format, if it says one: the store is raw, whatever it was.
    pub(super) format: Option<String>,
    /// The secret that the XML names.
    pub(super) stated: Option<EnvelopeId>,
}

/// What is at the place of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Present {
    Nothing,
    /// As it came from the template.
    Pristine(FileId),
    /// The VM has run, in plaintext: its variables are taken over.
    Written(FileId),
}

impl NvramStep {
    pub(super) fn act(&self) -> Option<Act> {
        match self {
            Self::Create(store) => Some(store.act()),
            Self::Reformat(_, path) => {
                let shown = path.display();
                let what = format!(
                    "format='raw' for the UEFI variable store {shown}, which it is since it was sealed"
                );
                Some(Verb::Write.act(StepCode::SetFormat, what).on("nvram").at(path))
            }
            Self::TakeBack(store) => {
                let what = format!("the encrypted UEFI variable store {} back", store.path.display());
                let act = Verb::Take.act(StepCode::TakeBack, what);
                Some(act.on("nvram").at(&store.path))
            }
            Self::Sealed(_) | Self::None => None,
        }
    }

    pub(super) fn warning(&self, vm: &str) -> Option<Finding> {
        match self {
            Self::Create(store) => store.warning(vm),
            Self::TakeBack(_) | Self::Reformat(..) | Self::Sealed(_) | Self::None => None,
        }
    }

    /// What is pinned that libvirt would choose at each start.
    pub(super) fn loader(&self) -> Option<&LoaderPin> {
        match self {
            Self::Create(store) => store.loader.as_ref(),
            Self::TakeBack(store) => store.loader.as_ref(),
            Self::Reformat(..) | Self::Sealed(_) | Self::None => None,
        }
    }

    /// The envelopes whose keys it tries at the store's place, until one opens it.
    pub(super) fn to_open(&self) -> Vec<&Envelope> {
        match self {
            Self::TakeBack(store) => store.envelopes.iter().collect(),
            Self::Sealed(_) | Self::Reformat(..) | Self::Create(_) | Self::None => Vec::new(),
        }
    }

    /// An envelope that its XML may name already.
    pub(super) fn known(&self) -> Option<&Envelope> {
        match self {
            Self::Sealed(envelope) | Self::Reformat(envelope, _) => Some(envelope),
            Self::TakeBack(store) => store.envelopes.first(),
            Self::Create(_) | Self::None => None,
        }
    }
}

impl NvramStep {
    /// What the XML gets, given the envelope that opens the store.
    pub(super) fn edit(&self, envelope: EnvelopeId) -> Option<NvramEdit> {
        match self {
            Self::Create(store) => Some(NvramEdit {
                path: store.place.shown().to_owned(),
                template: Some(store.template.shown().to_owned()),
                format: store.format.clone(),
                envelope,
                instead_of: store.stated,
                loader: store.loader.clone(),
            }),
            Self::TakeBack(store) => Some(NvramEdit {
                path: store.path.clone(),
                template: None,
                format: store.format.clone(),
                envelope,
                instead_of: store.stated,
                loader: store.loader.clone(),
            }),
            Self::Reformat(_, path) => Some(NvramEdit {
                path: path.clone(),
                template: None,
                format: Some(RAW.to_owned()),
                envelope,
                instead_of: None,
                loader: None,
            }),
            Self::Sealed(_) | Self::None => None,
        }
    }
}

impl NewStore {
    pub(super) fn act(&self) -> Act {
        let shown = self.place.shown().display();
        let act = match self.present {
            Present::Written(_) => Verb::Encrypt.act(
                StepCode::Encrypt,
                format!("the UEFI variable store {shown}, with the variables that it has"),
            ),
            Present::Nothing | Present::Pristine(_) => {
                let template = self.template.shown().display();
                let what = format!("the encrypted UEFI variable store {shown} from {template}");
                Verb::Create.act(StepCode::Create, what)
            }
        };
        act.on("nvram").at(self.place.shown())
    }

    /// Of what no encryption takes back.
    fn warning(&self, vm: &str) -> Option<Finding> {
        matches!(self.present, Present::Written(_)).then(|| {
            let shown = self.place.shown().display();
            let what = format!(
                "{shown} was in plaintext until now: replacing a file erases nothing on the disk below"
            );
            Finding::warning(FindingCode::PlaintextStays, Subject::object(vm, "nvram"), what)
        })
    }
}

pub(super) fn plan_nvram(
    host: &Host<'_>,
    domain: &Domain,
    others: &OtherUses,
) -> Result<Way<NvramStep>, Problem> {
    let Firmware::Uefi(uefi) = &domain.firmware else {
        let edit = edit(domain, "<os firmware='efi'>, if its guest boots by UEFI too");
        return Err(
            Problem::failed("it does not boot through UEFI, and no other VM can be sealed").next(edit),
        );
    };
    if uefi.stateless {
        return Ok(Way::Open(NvramStep::None));
    }
    let nvram = uefi.nvram.as_ref();
    let path = match nvram.map(|nvram| &nvram.source) {
        Some(Source::File(path)) => path.clone(),
        None | Some(Source::Empty) => host.own_store(&domain.name),
        Some(_) => {
            return Err(Problem::failed("its UEFI variable store is not a file")
                .next(edit(domain, "name a file in <nvram>")));
        }
    };
    let stated = stated_secret(domain, nvram)?;
    let named = match stated {
        Some(id) => named_envelope(host, domain, ObjectKind::Nvram, id)?,
        None => None,
    };
    let file = StoreFile::at(host, domain.uuid, &path)?;
    let (mut known, mut envelopes) = take_back::known_stores(host, domain.uuid)?;
    let is_nobodys = named.is_none() && file == StoreFile::Encrypted;
    if let Some(id) = stated.filter(|_| !is_nobodys)
        && envelopes.iter().all(|envelope| envelope.id != id)
    {
        // By the XML alone.
        known.push(KnownStore {
            path: path.clone(),
            file,
            state: EnvelopeState::Active,
        });
    }
    if let Some(named) = named {
        if file == StoreFile::Encrypted && is_settled(host, domain, named.id)? {
            return sealed_store(host, domain, nvram, named).map(Way::Open);
        }
        envelopes.retain(|envelope| envelope.id != named.id);
        envelopes.insert(0, named);
    }
    // One that `vm unseal` has made plain has lost nothing, whatever it has run since.
    let has_run = match host.keystore.mark(domain.uuid)? {
        Some(Mark::Plain) => HasRun::No,
        Some(Mark::Sealed) | None => HasRun::of(host, domain.uuid)?,
    };
    match take_back::decide_store(&path, file, &known, has_run) {
        StoreDecision::TakeBack(path) => {
            return taken_back(uefi, path, envelopes, stated).map(Way::Open);
        }
        StoreDecision::Elsewhere(sealed) => {
            return Err(take_back::store_elsewhere(&domain.name, &path, &sealed));
        }
        StoreDecision::NotKnown => return Err(take_back::store_not_known(host, domain, &path)?),
        StoreDecision::Lost(lost) if !host.accepted.has(AcceptedLosses::NVRAM) => {
            return Ok(Way::Lost(Loss::nvram(take_back::store_lost(&lost, file))));
        }
        StoreDecision::Lost(_) | StoreDecision::Make => {}
    }
    let place = host.paths.permit(&path)?;
    let chosen = firmware::choose(uefi, nvram)?;
    let template = permit_template(host, domain, &chosen.template)?;
    others.refuse_users_of(&place, domain)?;
    Ok(Way::Open(NvramStep::Create(Box::new(NewStore {
        present: present(domain, &place, &template)?,
        place,
        template,
        loader: chosen.loader,
        format: stated_raw(nvram),
        stated,
    }))))
}

/// The secret that the XML names.
fn stated_secret(domain: &Domain, nvram: Option<&Nvram>) -> Result<Option<EnvelopeId>, Problem> {
    match nvram.and_then(|nvram| nvram.encryption.as_ref()) {
        None => Ok(None),
        Some(encryption) => match encryption.secret {
            domain::SecretRef::Uuid(id) => Ok(Some(id)),
            domain::SecretRef::Usage | domain::SecretRef::Missing => Err(Problem::failed(
                "its UEFI variables are encrypted with a secret of somebody else",
            )
            .next(edit(
                domain,
                "name a store in <nvram> that is not encrypted, without <encryption>",
            ))),
        },
    }
}

pub(super) const RAW: &str = "raw";

/// Where the XML says a format at all.
fn stated_raw(nvram: Option<&Nvram>) -> Option<String> {
    let stated = nvram.and_then(|nvram| nvram.format.as_ref());
    stated.map(|_| RAW.to_owned())
}

fn taken_back(
    uefi: &Uefi,
    path: PathBuf,
    envelopes: Vec<Envelope>,
    stated: Option<EnvelopeId>,
) -> Result<NvramStep, Problem> {
    // To be named where libvirt would still choose one.
    let loader = match uefi.loader {
        Some(_) => None,
        None => firmware::choose(uefi, uefi.nvram.as_ref())?.loader,
    };
    Ok(NvramStep::TakeBack(SealedStore {
        path,
        envelopes,
        loader,
        format: stated_raw(uefi.nvram.as_ref()),
        stated,
    }))
}

/// A store that the XML calls qcow2 and that is raw, as one that was sealed before this was looked at, gets its format.
fn sealed_store(
    host: &Host<'_>,
    domain: &Domain,
    nvram: Option<&Nvram>,
    envelope: Envelope,
) -> Result<NvramStep, Problem> {
    let stated = nvram.and_then(|nvram| nvram.format.as_deref());
    let path = nvram.and_then(|nvram| nvram.source.path());
    let (Some(path), true) = (path, stated.is_some_and(|format| format != RAW)) else {
        return Ok(NvramStep::Sealed(envelope));
    };
    let place = host.permit_known(domain.uuid, path)?;
    Ok(match disk::inspect(&place)?.format.is_bare_luks() {
        true => NvramStep::Reformat(envelope, path.to_owned()),
        false => NvramStep::Sealed(envelope),
    })
}

/// What is there now, if nothing would be lost with it.
fn present(domain: &Domain, place: &PermittedPath, template: &PermittedPath) -> Result<Present, Problem> {
    let variables = nvram::read_variables(template)?;
    if !place.exists() {
        return Ok(Present::Nothing);
    }
    let path = place.shown().display();
    let info = disk::inspect(place)?;
    let of_template = disk::inspect(template)?.file_id;
    if info.file_id.inode() == of_template.inode() {
        return Err(Problem::failed(format!(
            "{path} is its UEFI variable store and the template for that as well"
        ))
        .next(edit(
            domain,
            format!("give <nvram> a file of its own, with {path} as the template"),
        )));
    }
    if info.snapshots > 0 {
        let flat = format!("{path}.raw");
        return Err(Problem::would_lose_key(format!(
            "{path} has {} internal snapshots, which a sealed store can't have",
            info.snapshots
        ))
        .next(
            Advice::ListSnapshots(domain.name.clone())
                .within("delete them once they are not needed any more")
                .or_else(
                    Advice::from("put a copy without them in its place")
                        .within(format!("qemu-img convert -O raw {} {}", word(&path), word(&flat)))
                        .then(format!("mv {} {}", word(&flat), word(path)))
                        .then(Advice::SealVm(domain.name.clone())),
                ),
        ));
    }
    Ok(match nvram::read_variables(place)? == variables {
        true => Present::Pristine(info.file_id),
        false => Present::Written(info.file_id),
    })
}

/// Then to seal.
fn edit(domain: &Domain, what: impl Into<Advice>) -> Advice {
    let edit = Advice::EditXml(domain.name.clone()).within(what);
    edit.then(Advice::SealVm(domain.name.clone()))
}

/// Root reads it and puts it into the VM, so it must be something that whoever wrote the XML may have.
pub(super) fn permit_template(
    host: &Host<'_>,
    domain: &Domain,
    path: &Path,
) -> Result<PermittedPath, Problem> {
    let of_template = |failure: Problem| failure.of("the template of its UEFI variable store");
    let permitted = if path == host.own_store(&domain.name) {
        host.paths.permit(path)
    } else {
        host.paths.permit_template(path, &firmware::templates())
    };
    let place = permitted.map_err(|error| of_template(error.into()))?;
    if !place.exists() {
        return Err(of_template(
            Problem::not_found(format!("{} does not exist", path.display())).next(edit(
                domain,
                "name one of this host, such as <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>",
            )),
        ));
    }
    let others = OtherUses::among(&host.kept, domain.uuid);
    others.refuse_users_of(&place, domain).map_err(of_template)?;
    Ok(place)
}

pub(super) fn is_content_of(store: &PermittedPath, template: &PermittedPath) -> Result<bool, Problem> {
    Ok(nvram::read_variables(store)? == nvram::read_variables(template)?)
}
