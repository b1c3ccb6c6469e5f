//! What sealing a domain takes, or why it can't be sealed as it is. Looks only; nothing is changed here.

use std::path::{Path, PathBuf};

use swtpm_state::{State, libvirt_state_dir};

use super::take_back::{self, HasRun, StoreDecision, StoreFile};
use super::{Host, declared, firmware};
use crate::api::Outcome;
use crate::domain::{self, Disk, DiskDevice, Domain, Firmware, Source, TpmBackend, edit::LoaderPin};
use crate::envelope::{Envelope, EnvelopeId, ObjectKind};
use crate::failure::{Code, Failure, chain, word};
use crate::libvirt::DefinedDomain;
use crate::side_doors;
use crate::terminal::quoted;
use crate::volume::{Data, VolumeInfo};

/// What sealing a domain takes.
#[derive(Debug)]
pub struct Plan {
    pub(super) disks: Vec<DiskStep>,
    pub(super) nvram: NvramStep,
    pub(super) vtpm: VtpmStep,
    warnings: Vec<String>,
}

#[derive(Debug)]
pub(super) struct DiskStep {
    pub(super) target: String,
    pub(super) path: PathBuf,
    pub(super) work: DiskWork,
}

#[derive(Debug)]
pub(super) enum DiskWork {
    /// The image is a volume of ours, and the XML says so.
    Sealed(Envelope),
    /// The image is a volume of ours.
    Adopt(Envelope),
    /// The image is empty and makes room for one.
    Replace(Box<VolumeInfo>),
}

#[derive(Debug)]
pub(super) enum NvramStep {
    Sealed(Envelope),
    /// It was sealed, and the XML does not say so.
    TakeBack {
        path: PathBuf,
        loader: Option<LoaderPin>,
        envelopes: Vec<Envelope>,
    },
    Create {
        path: PathBuf,
        template: PathBuf,
        loader: Option<LoaderPin>,
    },
    None,
}

#[derive(Debug)]
pub(super) enum VtpmStep {
    Sealed(Envelope),
    /// Sealed by an earlier virtseal: libvirt deletes the state when a transient domain ends.
    Keep(Envelope),
    /// It was sealed, and the XML does not say so.
    TakeBack(Vec<Envelope>),
    Add,
    Encrypt,
    /// The host's TPM, which keeps its state inside the chip.
    Passthrough,
}

impl Plan {
    /// In words.
    #[must_use]
    pub fn outcome(&self, changed: bool) -> Outcome {
        let mut steps: Vec<_> = self.disks.iter().filter_map(DiskStep::words).collect();
        match &self.nvram {
            NvramStep::Create { path, template, .. } => steps.push(format!(
                "create the encrypted UEFI variable store {} from {}",
                path.display(),
                template.display()
            )),
            NvramStep::TakeBack { path, .. } => steps.push(format!(
                "take the encrypted UEFI variable store {} back",
                path.display()
            )),
            NvramStep::Sealed(_) | NvramStep::None => {}
        }
        match &self.vtpm {
            VtpmStep::Add => steps.push("add a TPM 2.0 with encrypted state".into()),
            VtpmStep::Encrypt => steps.push("encrypt the state of the TPM".into()),
            VtpmStep::TakeBack(_) => steps.push("take the encrypted TPM back".into()),
            VtpmStep::Keep(_) => {
                steps.push("have libvirt keep the state of the TPM (persistent_state='yes')".into());
            }
            VtpmStep::Sealed(_) | VtpmStep::Passthrough => {}
        }
        if !steps.is_empty() {
            steps.push("redefine the domain".into());
        }
        Outcome {
            steps,
            warnings: self.warnings.clone(),
            changed,
        }
    }
}

impl DiskStep {
    fn words(&self) -> Option<String> {
        let (target, path) = (&self.target, self.path.display());
        match &self.work {
            DiskWork::Sealed(_) => None,
            DiskWork::Adopt(envelope) => Some(format!("adopt {path} ({target}), envelope {}", envelope.id)),
            DiskWork::Replace(info) => Some(format!(
                "replace the empty {path} ({target}, {} MiB) by an encrypted one",
                info.virtual_size.0 >> 20
            )),
        }
    }
}

/// Looks at the domain and decides what sealing it takes.
///
/// # Errors
/// When it can't be sealed as it is, with what to do about it.
pub fn plan(host: &Host<'_>, defined: &DefinedDomain) -> Result<Plan, Failure> {
    let name = &defined.name;
    refuse_unless_off(defined)?;
    let domain = parse(defined)?;
    let of_vm = |failure: Failure| failure.of(name);
    host.confirmed.refuse_unknown(&domain).map_err(of_vm)?;
    let policy = host.policies.of(&domain);
    side_doors::refuse(&domain, policy).map_err(of_vm)?;
    let nvram = plan_nvram(host, &domain).map_err(of_vm)?;
    let vtpm = plan_vtpm(host, &domain).map_err(of_vm)?;
    let mut disks = Vec::new();
    for disk in domain
        .disks
        .iter()
        .filter(|disk| !disk.readonly && disk.source != Source::Empty)
    {
        let step = plan_disk(host, &domain, disk)
            .map_err(|failure| of_vm(failure.of(format!("disk {}", disk.target))))?;
        disks.push(step);
    }
    let autostart = defined.autostart.then(|| {
        format!(
            "libvirt autostarts {name}. A monolithic libvirtd can't start a sealed VM that way: virsh autostart --disable {}",
            word(name)
        )
    });
    let gone = state_gone(host, &domain)?.map(|dir| {
        format!(
            "the state of its TPM is gone from {0}, and {name} stays off until it is back: restore {0} from a backup",
            dir.display()
        )
    });
    Ok(Plan {
        disks,
        nvram,
        vtpm,
        warnings: autostart
            .into_iter()
            .chain(gone)
            .chain(side_doors::warnings(&domain, policy))
            .chain(side_doors::plain_layers(&domain, policy))
            .collect(),
    })
}

/// The directory that lacks the vTPM's state, where there must be one.
fn state_gone(host: &Host<'_>, domain: &Domain) -> Result<Option<PathBuf>, Failure> {
    let dir = libvirt_state_dir(&host.swtpm_dir, &domain.uuid);
    let absent = matches!(State::read(&dir), Ok(State::Absent));
    let has_run = HasRun::of(host, domain.uuid)? == HasRun::Yes;
    Ok((absent && has_run).then_some(dir))
}

pub(super) fn refuse_unless_off(defined: &DefinedDomain) -> Result<(), Failure> {
    let name = &defined.name;
    if defined.active {
        return Err(Failure::new(Code::Busy, format!("{name} is running"))
            .next(format!("virsh shutdown {}", word(name))));
    }
    if defined.managed_save {
        return Err(Failure::new(
            Code::Busy,
            format!("{name} has a saved state, made from the VM as it is now"),
        )
        .next(format!(
            "virsh start {0} and shut it down, or virsh managedsave-remove {0}",
            word(name)
        )));
    }
    Ok(())
}

pub(super) fn parse(defined: &DefinedDomain) -> Result<Domain, Failure> {
    Domain::parse(&defined.xml)
        .map_err(|error| Failure::new(Code::Failed, format!("{}: {}", defined.name, chain(&error))))
}

fn plan_disk(host: &Host<'_>, domain: &Domain, disk: &Disk) -> Result<DiskStep, Failure> {
    let (Source::File(path), DiskDevice::Disk) = (&disk.source, disk.device) else {
        return Err(
            Failure::new(Code::Failed, "only disks that are image files can be sealed").next(format!(
                "move it to a file, or detach it: virsh detach-disk --config {} {}",
                word(&domain.name),
                disk.target
            )),
        );
    };
    if disk.transient {
        return Err(Failure::new(
            Code::Failed,
            "it is transient: libvirt would put a plaintext overlay on it",
        )
        .next(format!("virsh edit {}: remove <transient/>", word(&domain.name))));
    }
    if !path.exists() {
        if take_back::known_disk(host, domain.uuid, path)?.is_some() {
            let shown = path.display();
            return Err(Failure::new(
                Code::NotFound,
                format!("{shown}, which was sealed, does not exist"),
            )
            .next(format!(
                "put {shown} back where it was, or restore it from a backup"
            )));
        }
        return Err(
            Failure::new(Code::NotFound, format!("{} does not exist", path.display())).next(format!(
                "virtseal volume create --vm={} --size SIZE {}",
                quoted(&domain.name),
                word(path.display())
            )),
        );
    }
    let info = declared::inspect(host, domain, disk, path)?;
    let work =
        match (&info.envelope, info.format.is_encrypted()) {
            (Some(envelope), true) => ours(host, domain, disk, envelope)?,
            (None, true) => match take_back::known_disk(host, domain.uuid, path)? {
                Some(envelope) => DiskWork::Adopt(envelope),
                None => return Err(encrypted_by_others(path)),
            },
            (_, false) if disk.encryption.is_some() => return Err(encrypted_by_others(path)),
            (_, false) if info.data == Data::Empty => DiskWork::Replace(Box::new(info)),
            (_, false) => {
                return Err(Failure::new(
                Code::WouldLoseKey,
                format!("{} holds data, and converting a disk in place is not possible yet", path.display()),
            )
            .next(format!(
                "virtseal volume create NEW --from={} --vm={}, point the disk to it (virsh edit), then seal",
                quoted(path.display()),
                quoted(&domain.name)
            )));
            }
        };
    Ok(DiskStep {
        target: disk.target.clone(),
        path: path.clone(),
        work,
    })
}

/// An image of ours: its envelope is adopted, unless the keystore and the XML have it.
fn ours(host: &Host<'_>, domain: &Domain, disk: &Disk, carried: &Envelope) -> Result<DiskWork, Failure> {
    let known = host.keystore.envelope(carried.id)?.map(|record| record.envelope);
    let is_known = known.is_some();
    let envelope = known.unwrap_or_else(|| carried.clone());
    if envelope.vm != domain.uuid && !disk.shareable {
        return Err(
            Failure::new(Code::Failed, format!("it was made for VM {}", envelope.vm)).next(format!(
                "virtseal volume create NEW --vm={}",
                quoted(&domain.name)
            )),
        );
    }
    let named = disk.encryption.as_ref().map(|encryption| &encryption.secret);
    match named {
        Some(domain::SecretRef::Uuid(id)) if *id == envelope.id && is_known && carries(domain, &envelope) => {
            Ok(DiskWork::Sealed(envelope))
        }
        Some(domain::SecretRef::Uuid(id)) if *id != envelope.id => Err(Failure::new(
            Code::Failed,
            format!(
                "the domain names secret {id}, the image has envelope {}",
                envelope.id
            ),
        )
        .next(format!(
            "virsh edit {}: remove that disk's <encryption>, then seal",
            word(&domain.name)
        ))),
        _ => Ok(DiskWork::Adopt(carried.clone())),
    }
}

fn encrypted_by_others(path: &Path) -> Failure {
    Failure::new(
        Code::Failed,
        format!("{} is encrypted, but not by virtseal", path.display()),
    )
    .next(format!(
        "convert it to a plain image, then virtseal volume create NEW --from it: {} itself can't be adopted",
        path.display()
    ))
}

fn carries(domain: &Domain, envelope: &Envelope) -> bool {
    domain
        .metadata
        .as_ref()
        .and_then(|metadata| metadata.envelope(envelope.id))
        == Some(envelope)
}

/// The envelope that the XML names for an object, if it is one of this VM: the keystore's, where it has one.
fn named_envelope(
    host: &Host<'_>,
    domain: &Domain,
    kind: ObjectKind,
    id: EnvelopeId,
) -> Result<Envelope, Failure> {
    let known = host.keystore.envelope(id)?.map(|record| record.envelope);
    let carried = domain
        .metadata
        .as_ref()
        .and_then(|metadata| metadata.envelope(id).cloned());
    known
        .or(carried)
        .filter(|envelope| envelope.kind == kind && envelope.vm == domain.uuid)
        .ok_or_else(|| {
            Failure::new(
                Code::NotFound,
                format!("the {kind} is encrypted with secret {id}, which is no envelope of this VM"),
            )
            .next(format!(
                "virsh edit {}: remove its <encryption>, if nothing is kept there",
                word(&domain.name)
            ))
        })
}

fn plan_nvram(host: &Host<'_>, domain: &Domain) -> Result<NvramStep, Failure> {
    let Firmware::Uefi(uefi) = &domain.firmware else {
        return Err(Failure::new(Code::Failed, "it does not boot through UEFI")
            .next("define it with <os firmware='efi'>: only UEFI VMs can be sealed"));
    };
    if uefi.stateless {
        return Ok(NvramStep::None);
    }
    let nvram = uefi.nvram.as_ref();
    if let Some(encryption) = nvram.and_then(|nvram| nvram.encryption.as_ref()) {
        let domain::SecretRef::Uuid(id) = encryption.secret else {
            return Err(Failure::new(
                Code::Failed,
                "its UEFI variables are encrypted with a secret of somebody else",
            ));
        };
        let envelope = named_envelope(host, domain, ObjectKind::Nvram, id)?;
        return match nvram.and_then(|nvram| nvram.source.path()) {
            Some(path) if !take_back::is_settled(host, domain, id)? => Ok(NvramStep::TakeBack {
                path: path.to_owned(),
                loader: loader_pin(uefi, nvram)?,
                envelopes: vec![envelope],
            }),
            _ => Ok(NvramStep::Sealed(envelope)),
        };
    }
    let path = match nvram.map(|nvram| &nvram.source) {
        Some(Source::File(path)) => path.clone(),
        None | Some(Source::Empty) => host.nvram_dir.join(format!("{}_VARS.fd", domain.name)),
        Some(_) => {
            return Err(Failure::new(
                Code::Failed,
                "its UEFI variable store is not a file",
            ));
        }
    };
    let file = StoreFile::at(&path)?;
    let (known, envelopes) = take_back::known_stores(host, domain.uuid)?;
    match take_back::decide_store(&path, file, &known, HasRun::of(host, domain.uuid)?) {
        StoreDecision::TakeBack(path) => {
            return Ok(NvramStep::TakeBack {
                path,
                loader: loader_pin(uefi, nvram)?,
                envelopes,
            });
        }
        StoreDecision::Elsewhere(sealed) => {
            return Err(take_back::store_elsewhere(&domain.name, &path, &sealed));
        }
        StoreDecision::Lost(lost) => return Err(take_back::store_lost(&domain.name, &lost)),
        StoreDecision::NotKnown => return Err(take_back::store_not_known(&path)),
        StoreDecision::Make => {}
    }
    let chosen = firmware::choose(uefi, nvram)?;
    if file == StoreFile::Plain && !same_content(&path, &chosen.template)? {
        return Err(Failure::new(
            Code::WouldLoseKey,
            format!(
                "it has run before: {} holds UEFI variables in plaintext",
                path.display()
            ),
        )
        .next(format!(
            "if they may be lost, remove that file, then virtseal vm seal {}",
            word(&domain.name)
        )));
    }
    Ok(NvramStep::Create {
        path,
        template: chosen.template,
        loader: chosen.loader,
    })
}

/// The loader to name where libvirt would still choose one.
fn loader_pin(uefi: &domain::Uefi, nvram: Option<&domain::Nvram>) -> Result<Option<LoaderPin>, Failure> {
    match uefi.loader {
        Some(_) => Ok(None),
        None => Ok(firmware::choose(uefi, nvram)?.loader),
    }
}

fn plan_vtpm(host: &Host<'_>, domain: &Domain) -> Result<VtpmStep, Failure> {
    let dir = libvirt_state_dir(&host.swtpm_dir, &domain.uuid);
    let state = State::read(&dir).map_err(|error| {
        Failure::from_error(Code::Failed, format!("vTPM state in {}", dir.display()), &error)
    })?;
    let step = match domain.tpm.as_ref().map(|tpm| &tpm.backend) {
        None => VtpmStep::Add,
        Some(TpmBackend::Emulator {
            secret: Some(id),
            persistent_state,
            ..
        }) => {
            let envelope = named_envelope(host, domain, ObjectKind::Vtpm, *id)?;
            return Ok(if !take_back::is_settled(host, domain, *id)? {
                VtpmStep::TakeBack(vec![envelope])
            } else if *persistent_state {
                VtpmStep::Sealed(envelope)
            } else {
                VtpmStep::Keep(envelope)
            });
        }
        Some(TpmBackend::Emulator {
            version: Some(version),
            ..
        }) if version != "2.0" => {
            return Err(Failure::new(
                Code::Failed,
                format!("its TPM is version {version}: only 2.0 can be sealed"),
            )
            .next(format!(
                "virsh edit {}: <backend type='emulator' version='2.0'/>",
                word(&domain.name)
            )));
        }
        Some(TpmBackend::Emulator { .. }) => VtpmStep::Encrypt,
        Some(TpmBackend::Passthrough) => return Ok(VtpmStep::Passthrough),
        Some(TpmBackend::External | TpmBackend::Other(_)) => {
            return Err(Failure::new(
                Code::Failed,
                "its TPM is run by somebody else, who may keep it in plaintext",
            )
            .next(format!(
                "virsh edit {}: <backend type='emulator' version='2.0'/>",
                word(&domain.name)
            )));
        }
    };
    let known = take_back::known(host, domain.uuid, ObjectKind::Vtpm)?;
    let known: Vec<_> = known.into_iter().map(|record| record.envelope).collect();
    match state {
        State::Absent if HasRun::of(host, domain.uuid)? == HasRun::Yes && !known.is_empty() => {
            Ok(VtpmStep::TakeBack(known))
        }
        State::Absent => Ok(step),
        State::Encrypted(_) if !known.is_empty() => Ok(VtpmStep::TakeBack(known)),
        State::Plain(_) => Err(Failure::new(
            Code::WouldLoseKey,
            format!(
                "its vTPM has plaintext state in {}, and encrypting that is not possible yet",
                dir.display()
            ),
        )
        .next("if it may be lost, remove that directory, then seal")),
        State::Encrypted(_) => Err(Failure::new(
            Code::WouldLoseKey,
            format!(
                "its vTPM has encrypted state in {}, but the domain does not name its key",
                dir.display()
            ),
        )
        .next("define the VM again from a dumpxml that has its <virtseal:vm> metadata")),
    }
}

pub(super) fn same_content(path: &Path, template: &Path) -> Result<bool, Failure> {
    let read = |path: &Path| {
        std::fs::read(path).map_err(|error| {
            Failure::from_error(Code::Failed, format!("can't read {}", path.display()), &error)
        })
    };
    Ok(read(path)? == read(template)?)
}
