//! The UEFI variable store of a VM that is to be sealed: where it is, what it is made from, and whether anything would be lost.

use std::path::{Path, PathBuf};

use super::Host;
use super::firmware;
use super::known::{HasRun, is_settled, named_envelope};
use super::others::OtherUses;
use super::take_back::{self, StoreDecision, StoreFile};
use crate::domain::edit::{LoaderPin, NvramEdit};
use crate::domain::{self, Domain, Firmware, Nvram, Source, Uefi};
use crate::host::permitted::PermittedPath;
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeId, ObjectKind};
use crate::model::problem::{Code, Problem};
use crate::object::disk::{self, FileId};
use crate::object::nvram;
use crate::terminal::word;

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
}

/// What is at the place of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Present {
    Nothing,
    /// As it came from the template.
    Pristine(FileId),
}

impl NvramStep {
    pub(super) fn words(&self) -> Option<String> {
        match self {
            Self::Create(store) => Some(store.words()),
            Self::Reformat(_, path) => Some(format!(
                "say format='raw' of the UEFI variable store {}, which it is since it was sealed",
                path.display()
            )),
            Self::TakeBack(store) => Some(format!(
                "take the encrypted UEFI variable store {} back",
                store.path.display()
            )),
            Self::Sealed(_) | Self::None => None,
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
                loader: store.loader.clone(),
            }),
            Self::TakeBack(store) => Some(NvramEdit {
                path: store.path.clone(),
                template: None,
                format: store.format.clone(),
                envelope,
                loader: store.loader.clone(),
            }),
            Self::Reformat(_, path) => Some(NvramEdit {
                path: path.clone(),
                template: None,
                format: Some(RAW.to_owned()),
                envelope,
                loader: None,
            }),
            Self::Sealed(_) | Self::None => None,
        }
    }
}

impl NewStore {
    pub(super) fn words(&self) -> String {
        let loader = self.loader.as_ref().map(|pin| format!(", and {}", pin.words()));
        format!(
            "create the encrypted UEFI variable store {} from {}{}",
            self.place.shown().display(),
            self.template.shown().display(),
            loader.unwrap_or_default()
        )
    }
}

pub(super) fn plan_nvram(host: &Host<'_>, domain: &Domain, others: &OtherUses) -> Result<NvramStep, Problem> {
    let Firmware::Uefi(uefi) = &domain.firmware else {
        return Err(Problem::new(Code::Failed, "it does not boot through UEFI")
            .next("define it with <os firmware='efi'>: only UEFI VMs can be sealed"));
    };
    if uefi.stateless {
        return Ok(NvramStep::None);
    }
    let nvram = uefi.nvram.as_ref();
    if let Some(encryption) = nvram.and_then(|nvram| nvram.encryption.as_ref()) {
        let domain::SecretRef::Uuid(id) = encryption.secret else {
            return Err(Problem::new(
                Code::Failed,
                "its UEFI variables are encrypted with a secret of somebody else",
            ));
        };
        let envelope = named_envelope(host, domain, ObjectKind::Nvram, id)?;
        return match nvram.and_then(|nvram| nvram.source.path()) {
            Some(path) if !is_settled(host, domain, id)? => taken_back(uefi, path.to_owned(), vec![envelope]),
            _ => sealed_store(host, domain, nvram, envelope),
        };
    }
    let path = match nvram.map(|nvram| &nvram.source) {
        Some(Source::File(path)) => path.clone(),
        None | Some(Source::Empty) => host.own_store(&domain.name),
        Some(_) => {
            return Err(Problem::new(
                Code::Failed,
                "its UEFI variable store is not a file",
            ));
        }
    };
    let file = StoreFile::at(host, domain.uuid, &path)?;
    let (known, envelopes) = take_back::known_stores(host, domain.uuid)?;
    match take_back::decide_store(&path, file, &known, HasRun::of(host, domain.uuid)?) {
        StoreDecision::TakeBack(path) => return taken_back(uefi, path, envelopes),
        StoreDecision::Elsewhere(sealed) => {
            return Err(take_back::store_elsewhere(&domain.name, &path, &sealed));
        }
        StoreDecision::Lost(lost) => return Err(take_back::store_lost(&domain.name, &lost)),
        StoreDecision::NotKnown => return Err(take_back::store_not_known(&path)),
        StoreDecision::Make => {}
    }
    let place = host.paths.permit(&path)?;
    let chosen = firmware::choose(uefi, nvram)?;
    let template = permit_template(host, domain, &chosen.template)?;
    others.refuse_users_of(&place, domain)?;
    Ok(NvramStep::Create(Box::new(NewStore {
        present: present(domain, &place, &template)?,
        place,
        template,
        loader: chosen.loader,
        format: stated_raw(nvram),
    })))
}

const RAW: &str = "raw";

/// Where the XML says a format at all.
fn stated_raw(nvram: Option<&Nvram>) -> Option<String> {
    let stated = nvram.and_then(|nvram| nvram.format.as_ref());
    stated.map(|_| RAW.to_owned())
}

fn taken_back(uefi: &Uefi, path: PathBuf, envelopes: Vec<Envelope>) -> Result<NvramStep, Problem> {
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
        return Err(Problem::new(
            Code::Failed,
            format!("{path} is its UEFI variable store and the template for that as well"),
        )
        .next(Advice::EditXml(domain.name.clone()).within(format!(
            "give <nvram> a file of its own, with {path} as the template"
        ))));
    }
    if info.snapshots > 0 {
        return Err(Problem::new(
            Code::WouldLoseKey,
            format!(
                "{path} has {} internal snapshots, which a sealed store can't have",
                info.snapshots
            ),
        )
        .next(
            Advice::ListSnapshots(domain.name.clone())
                .within("delete them once they are not needed any more")
                .or_else(format!(
                    "seal a copy of the store: qemu-img convert -O raw {} NEW",
                    word(path)
                ))
                .then(Advice::EditXml(domain.name.clone()).within("<nvram template='NEW'>")),
        ));
    }
    if nvram::read_variables(place)? == variables {
        return Ok(Present::Pristine(info.file_id));
    }
    Err(Problem::new(
        Code::WouldLoseKey,
        format!("it has run before: {path} holds UEFI variables in plaintext"),
    )
    .next(
        Advice::EditXml(domain.name.clone())
            .within(format!(
                "make it the template of a new store, <nvram template='{path}'>{path}.sealed</nvram>"
            ))
            .then(Advice::SealVm(domain.name.clone()).note(format!(
                "which takes the variables over ({path} stays, in plaintext)"
            ))),
    ))
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
            Problem::new(Code::NotFound, format!("{} does not exist", path.display())).next(
                Advice::EditXml(domain.name.clone()).within(
                    "name one of this host, such as <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>",
                ),
            ),
        ));
    }
    let others = OtherUses::among(&host.kept, domain.uuid);
    others.refuse_users_of(&place, domain).map_err(of_template)?;
    Ok(place)
}

pub(super) fn is_content_of(store: &PermittedPath, template: &PermittedPath) -> Result<bool, Problem> {
    Ok(nvram::read_variables(store)? == nvram::read_variables(template)?)
}
