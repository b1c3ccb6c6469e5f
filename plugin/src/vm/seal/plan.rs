//! What sealing a domain takes, or why it can't be sealed as it is. Looks only; nothing is changed here.

use std::path::Path;

use super::known::{known_disk, named_envelope};
use super::others::{OtherUses, refuse_one_file_twice};
use super::room::{NewFile, refuse_without_room};
use super::store::{NvramStep, plan_nvram};
use super::vtpm::{VtpmStep, plan_vtpm, state_gone};
use super::{Host, declared};
use crate::api::Outcome;
use crate::domain::edit::{DiskEdit, SealEdit};
use crate::domain::{self, Disk, DiskDevice, Domain, Source};
use crate::host::libvirt::DefinedDomain;
use crate::host::permitted::PermittedPath;
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeId, ObjectKind};
use crate::model::problem::{Code, Problem, chain};
use crate::object::disk::{Data, VolumeInfo};
use crate::terminal::word;
use crate::vm::side_doors;

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
    pub(super) place: PermittedPath,
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

impl Plan {
    /// In words.
    #[must_use]
    pub fn outcome(&self, changed: bool) -> Outcome {
        let mut steps: Vec<_> = self.nvram.words().into_iter().collect();
        steps.extend(self.vtpm.words());
        steps.extend(self.disks.iter().filter_map(DiskStep::words));
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

impl Plan {
    /// What is written beside what is there.
    fn new_files(&self) -> impl Iterator<Item = NewFile<'_>> {
        let store = match &self.nvram {
            NvramStep::Create(store) => Some(NewFile {
                place: &store.place,
                bytes: STORE_BYTES,
            }),
            _ => None,
        };
        let disks = self.disks.iter().filter_map(|step| match &step.work {
            DiskWork::Replace(info) => Some(NewFile {
                place: &step.place,
                // The tables of an empty image grow with its disk.
                bytes: IMAGE_BYTES + (info.virtual_size.0 >> 22),
            }),
            DiskWork::Sealed(_) | DiskWork::Adopt(_) => None,
        });
        store.into_iter().chain(disks)
    }

    /// The change of the XML, before anything is made for it: with ids that nobody will have.
    fn try_edit(&self, defined: &DefinedDomain) -> Result<(), Problem> {
        let envelope_of = |known: Option<&Envelope>| known.map_or_else(EnvelopeId::random, |known| known.id);
        let edit = SealEdit {
            disks: self
                .disks
                .iter()
                .map(|step| step.edit(envelope_of(step.work.known())))
                .collect(),
            nvram: self.nvram.edit(envelope_of(self.nvram.known())),
            vtpm: self.vtpm.changes_xml().then(|| envelope_of(self.vtpm.known())),
            envelopes: &[],
        };
        domain::edit::seal(&defined.xml, &edit)
            .map(drop)
            .map_err(|error| {
                Problem::new(Code::Failed, format!("{}: {}", defined.name, chain(&error)))
                    .next(Advice::EditXml(defined.name.clone()))
            })
    }
}

/// Larger than any store with its LUKS header.
const STORE_BYTES: u64 = 8 << 20;
/// Larger than the headers and key material of an empty image.
const IMAGE_BYTES: u64 = 4 << 20;

impl DiskWork {
    fn known(&self) -> Option<&Envelope> {
        match self {
            Self::Sealed(envelope) | Self::Adopt(envelope) => Some(envelope),
            Self::Replace(_) => None,
        }
    }
}

impl DiskStep {
    pub(super) fn edit(&self, envelope: EnvelopeId) -> DiskEdit {
        DiskEdit {
            target: self.target.clone(),
            envelope,
            format: Some("qcow2".into()),
            source: None,
        }
    }

    pub(super) fn words(&self) -> Option<String> {
        let (target, path) = (&self.target, self.place.shown().display());
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
pub fn plan(host: &Host<'_>, defined: &DefinedDomain) -> Result<Plan, Problem> {
    let name = &defined.name;
    refuse_unless_off(defined)?;
    let domain = parse(defined)?;
    let of_vm = |failure: Problem| failure.of(name);
    host.confirmed.refuse_unknown(&domain).map_err(of_vm)?;
    refuse_name(&domain)?;
    let policy = host.policies.of(&domain);
    side_doors::refuse(&domain, policy).map_err(of_vm)?;
    let others = OtherUses::among(&host.kept, domain.uuid);
    let nvram = plan_nvram(host, &domain, &others).map_err(of_vm)?;
    let vtpm = plan_vtpm(host, &domain).map_err(of_vm)?;
    let mut disks = Vec::new();
    for disk in domain
        .disks
        .iter()
        .filter(|disk| !disk.readonly && disk.source != Source::Empty)
    {
        let step = plan_disk(host, &domain, disk, &others)
            .map_err(|failure| of_vm(failure.of(format!("disk {}", disk.target))))?;
        disks.push(step);
    }
    refuse_one_file_twice(&domain).map_err(of_vm)?;
    let autostart = defined.autostart.then(|| {
        format!(
            "libvirt autostarts {name}. A monolithic libvirtd can't start a sealed VM that way: {}",
            Advice::NoAutostart(name.clone())
        )
    });
    let gone = state_gone(host, &domain)?.map(|dir| {
        format!(
            "the state of its TPM is gone from {0}, and {name} stays off until it is back: restore {0} from a backup",
            dir.display()
        )
    });
    let records = host.keystore.envelopes_of(domain.uuid)?.sound;
    let known: Vec<_> = records.iter().map(|record| &record.location).collect();
    let plan = Plan {
        disks,
        nvram,
        vtpm,
        warnings: autostart
            .into_iter()
            .chain(gone)
            .chain(side_doors::warnings(&domain, policy))
            .chain(side_doors::plain_layers(&domain, policy, |path| {
                host.paths.permit_known(path, known.iter())
            }))
            .collect(),
    };
    refuse_without_room(plan.new_files()).map_err(of_vm)?;
    plan.try_edit(defined)?;
    Ok(plan)
}

/// What swtpm_setup, which the first start runs with the name in its arguments, can't take.
fn refuse_name(domain: &Domain) -> Result<(), Problem> {
    let name = &domain.name;
    if !name.contains(['\\', '/']) && !name.contains(char::is_control) {
        return Ok(());
    }
    Err(Problem::new(
        Code::Failed,
        format!("the name {name:?} has a character that swtpm_setup or libvirt's files can't have"),
    )
    .next(Advice::RenameVm(name.to_owned())))
}

pub(super) fn refuse_unless_off(defined: &DefinedDomain) -> Result<(), Problem> {
    let name = &defined.name;
    if defined.active {
        return Err(
            Problem::new(Code::Busy, format!("{name} is running")).next(Advice::ShutDownVm(name.clone()))
        );
    }
    if defined.managed_save {
        return Err(Problem::new(
            Code::Busy,
            format!("{name} has a saved state, made from the VM as it is now"),
        )
        .next(
            Advice::StartVm(name.clone())
                .then("shut it down")
                .or(Advice::DropSavedState(name.clone())),
        ));
    }
    Ok(())
}

pub(super) fn parse(defined: &DefinedDomain) -> Result<Domain, Problem> {
    Domain::parse(&defined.xml)
        .map_err(|error| Problem::new(Code::Failed, format!("{}: {}", defined.name, chain(&error))))
}

fn plan_disk(host: &Host<'_>, domain: &Domain, disk: &Disk, others: &OtherUses) -> Result<DiskStep, Problem> {
    let (Source::File(path), DiskDevice::Disk) = (&disk.source, disk.device) else {
        return Err(
            Problem::new(Code::Failed, "only disks that are image files can be sealed").next(
                Advice::from("move it to a file").or(Advice::DetachDisk {
                    vm: domain.name.clone(),
                    disk: disk.target.clone(),
                }),
            ),
        );
    };
    if disk.transient {
        return Err(Problem::new(
            Code::Failed,
            "it is transient: libvirt would put a plaintext overlay on it",
        )
        .next(Advice::EditXml(domain.name.clone()).within("remove <transient/>")));
    }
    if let Some(objection) = disk.layout.objection() {
        return Err(Problem::new(Code::Failed, format!("it {objection}")).next(Advice::from(format!( "copy the disk into an image of its own (qemu-img convert --image-opts driver=raw,offset=O,size=S,file.filename={} NEW \
            for a slice)", word(path.display()) )).then(Advice::EditXml(domain.name.clone()).within("name that in its <source> instead")).then("seal")));
    }
    let place = host.permit_known(domain.uuid, path)?;
    if !place.exists() {
        if known_disk(host, domain.uuid, path)?.is_some() {
            let shown = path.display();
            return Err(Problem::new(
                Code::NotFound,
                format!("{shown}, which was sealed, does not exist"),
            )
            .next(format!(
                "put {shown} back where it was, or restore it from a backup"
            )));
        }
        return Err(
            Problem::new(Code::NotFound, format!("{} does not exist", path.display())).next(
                Advice::CreateVolumeOfSize {
                    path: path.clone(),
                    vm: domain.name.clone(),
                },
            ),
        );
    }
    let info = declared::inspect(host, domain, disk, &place)?;
    let work = match (&info.envelope, info.format.is_encrypted()) {
        (Some(envelope), true) => ours(host, domain, disk, envelope)?,
        (None, true) => match known_disk(host, domain.uuid, path)? {
            Some(envelope) => DiskWork::Adopt(envelope),
            None => DiskWork::Adopt(named_by_xml(host, domain, disk, path, info.unreadable_envelope)?),
        },
        (_, false) if disk.encryption.is_some() => return Err(encrypted_by_others(path)),
        (_, false) if info.virtual_size.0 == 0 => return Err(without_size(path)),
        (_, false) if info.data == Data::Empty => {
            // The keystore's word is not enough for a file that no key opens.
            host.paths.permit(path)?;
            others.refuse_users_of(&place, domain)?;
            DiskWork::Replace(Box::new(info))
        }
        (_, false) => {
            return Err(Problem::new(
                Code::WouldLoseKey,
                format!(
                    "{} holds data, and converting a disk in place is not possible yet",
                    path.display()
                ),
            )
            .next(
                Advice::CreateVolumeFrom {
                    path: "NEW".into(),
                    from: path.clone(),
                    vm: Some(domain.name.clone()),
                }
                .then(Advice::EditXml(domain.name.clone()).within("point the disk to it"))
                .then("seal"),
            ));
        }
    };
    Ok(DiskStep {
        target: disk.target.clone(),
        place,
        work,
    })
}

fn without_size(path: &Path) -> Problem {
    let path = path.display();
    Problem::new(Code::Failed, format!("{path} has 0 bytes, and no disk has that"))
        .next(format!("truncate --size=SIZE {}, such as 20G", word(path)))
}

/// An image of ours: its envelope is adopted, unless the keystore and the XML have it.
fn ours(host: &Host<'_>, domain: &Domain, disk: &Disk, carried: &Envelope) -> Result<DiskWork, Problem> {
    let known = host
        .keystore
        .readable_envelope(carried.id)?
        .map(|record| record.envelope);
    let is_known = known.is_some();
    let envelope = known.unwrap_or_else(|| carried.clone());
    if !envelope.serves(domain.uuid) {
        return Err(
            Problem::new(Code::Failed, format!("it was made for VM {}", envelope.vm)).next(
                Advice::CreateVolume {
                    path: "NEW".into(),
                    vm: domain.name.clone(),
                },
            ),
        );
    }
    let named = disk.encryption.as_ref().map(|encryption| &encryption.secret);
    match named {
        Some(domain::SecretRef::Uuid(id)) if *id == envelope.id && is_known && carries(domain, &envelope) => {
            Ok(DiskWork::Sealed(envelope))
        }
        Some(domain::SecretRef::Uuid(id)) if *id != envelope.id => Err(Problem::new(
            Code::Failed,
            format!(
                "the domain names secret {id}, the image has envelope {}",
                envelope.id
            ),
        )
        .next(Advice::EditXml(domain.name.clone()).within("remove that disk's <encryption>, then seal"))),
        _ => Ok(DiskWork::Adopt(carried.clone())),
    }
}

fn encrypted_by_others(path: &Path) -> Problem {
    Problem::new(
        Code::Failed,
        format!("{} is encrypted, but not by virtseal", path.display()),
    )
    .next(
        Advice::from("convert it to a plain image")
            .then(Advice::CreateVolumeFrom {
                path: "NEW".into(),
                from: "PLAIN".into(),
                vm: None,
            })
            .within(format!("{} itself can't be adopted", path.display())),
    )
}

/// The envelope of an image that carries none that can be read, at a place that the keystore does not know.
fn named_by_xml(
    host: &Host<'_>,
    domain: &Domain,
    disk: &Disk,
    path: &Path,
    unreadable: Option<String>,
) -> Result<Envelope, Problem> {
    match (
        disk.encryption.as_ref().map(|encryption| &encryption.secret),
        unreadable,
    ) {
        (Some(domain::SecretRef::Uuid(id)), _) => named_envelope(host, domain, ObjectKind::Disk, *id),
        (_, Some(why)) => Err(Problem::new(
            Code::NotFound,
            format!(
                "the copy of the envelope in {} can't be read, and no other is known here: {why}",
                path.display()
            ),
        )
        .next(Advice::DefineSealedXml(Some(domain.name.clone())).then("seal"))),
        (_, None) => Err(encrypted_by_others(path)),
    }
}

fn carries(domain: &Domain, envelope: &Envelope) -> bool {
    domain
        .metadata
        .as_ref()
        .and_then(|metadata| metadata.envelope(envelope.id))
        == Some(envelope)
}
