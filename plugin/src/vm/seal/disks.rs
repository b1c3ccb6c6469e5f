//! A disk of a VM that is to be sealed.

use std::path::Path;

use super::known::{is_defined, known_disk, named_envelope, of_another};
use super::loss::{Loss, Way};
use super::others::OtherUses;
use super::{Host, declared};
use crate::domain::edit::DiskEdit;
use crate::domain::{self, Disk, DiskDevice, Domain, SecretRef, Source};
use crate::host::permitted::PermittedPath;
use crate::model::act::{Act, StepCode, Verb};
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeId, ObjectKind};
use crate::model::problem::Problem;
use crate::object::disk::{Data, VolumeInfo};
use crate::store::EnvelopeState;
use crate::terminal::word;
use crate::vm::has_run::HasRun;
use crate::vm::side_doors;
use crate::vm::whose::Whose;

#[derive(Debug)]
pub(super) struct DiskStep {
    pub(super) target: String,
    pub(super) place: PermittedPath,
    pub(super) work: DiskWork,
    /// The secret that the XML names.
    stated: Option<EnvelopeId>,
    /// The format that the XML says now.
    declared: Option<String>,
}

/// What every sealed image is.
const QCOW2: &str = "qcow2";

#[derive(Debug)]
pub(super) enum DiskWork {
    /// The image is a volume of ours, and the XML says so.
    Sealed(Envelope),
    /// The image is a volume of ours.
    Adopt(Envelope),
    /// The image is empty and makes room for one.
    Replace(Box<VolumeInfo>),
}

impl DiskWork {
    pub(super) fn known(&self) -> Option<&Envelope> {
        match self {
            Self::Sealed(envelope) | Self::Adopt(envelope) => Some(envelope),
            Self::Replace(_) => None,
        }
    }
}

impl DiskStep {
    /// The envelope whose key it tries at the disk's place.
    pub(super) fn opened(&self) -> Option<EnvelopeId> {
        match &self.work {
            DiskWork::Adopt(envelope) => Some(envelope.id),
            DiskWork::Sealed(_) | DiskWork::Replace(_) => None,
        }
    }

    pub(super) fn edit(&self, envelope: EnvelopeId) -> DiskEdit {
        DiskEdit {
            target: self.target.clone(),
            envelope,
            instead_of: self.stated.filter(|_| !matches!(self.work, DiskWork::Sealed(_))),
        }
    }

    pub(super) fn act(&self) -> Option<Act> {
        let (target, path) = (&self.target, self.place.shown().display());
        match &self.work {
            DiskWork::Sealed(_) => None,
            DiskWork::Adopt(envelope) => {
                let id = envelope.id;
                let other = self.stated.filter(|stated| *stated != id);
                let instead = other.map_or(String::new(), |other| format!(" in place of {other}"));
                let what = format!("{path} ({target}), envelope {id}{instead}");
                Some(self.act_on(Verb::Adopt.act(StepCode::Adopt, what).with(id)))
            }
            DiskWork::Replace(info) => Some(self.replacement(info)),
        }
    }

    /// Of its empty image.
    pub(super) fn replacement(&self, info: &VolumeInfo) -> Act {
        let what = format!(
            "the empty {} ({}, {} MiB) by an encrypted qcow2 image of that name",
            self.place.shown().display(),
            self.target,
            info.virtual_size.0 >> 20
        );
        self.act_on(Verb::Replace.act(StepCode::ReplaceByEncrypted, what))
    }

    fn act_on(&self, act: Act) -> Act {
        act.on(format!("disk {}", self.target)).at(self.place.shown())
    }

    /// What of it changes in the XML besides its key.
    pub(super) fn note(&self) -> Option<Act> {
        let declared = self.declared.as_deref().unwrap_or("no type");
        let changes = !matches!(self.work, DiskWork::Sealed(_)) && declared != QCOW2;
        changes.then(|| {
            let target = &self.target;
            let what = format!("disk {target}: the XML says {declared} now, and {QCOW2} then");
            self.act_on(StepCode::SetFormat.told(what))
        })
    }
}

/// What sealing it takes.
pub(super) fn plan_disk(
    host: &Host<'_>,
    domain: &Domain,
    disk: &Disk,
    others: &OtherUses,
) -> Result<Way<DiskStep>, Problem> {
    let path = file_of(domain, disk)?;
    let place = host.permit_known(domain.uuid, path)?;
    let known = known_disk(host, domain.uuid, path)?;
    if !place.exists() {
        return Err(match known {
            Some(_) => sealed_one_is_missing(domain, path),
            None => missing(domain, path),
        });
    }
    let info = declared::inspect(host, domain, disk, &place)?;
    let work = match (&info.envelope, info.format.is_encrypted()) {
        (Some(carried), true) => {
            let known = host.keystore.readable_envelope(carried.id)?;
            let known = known.map(|record| record.envelope);
            let of = known.as_ref().unwrap_or(carried).clone();
            match ours(domain, disk, carried, known) {
                Some(work) => work,
                None => return Err(made_for_another(host, domain, path, &of)),
            }
        }
        (None, true) => DiskWork::Adopt(match known {
            Some(record) => record.envelope,
            None => named_by_xml(host, domain, disk, path, info.unreadable_envelope)?,
        }),
        (_, false) => {
            let was_sealed = known.is_some_and(|record| record.state == EnvelopeState::Active)
                && host.keystore.is_sealed(domain.uuid)?;
            let was_sealed = was_sealed || disk.encryption.is_some();
            if was_sealed && !host.accepted.has(&disk.target) {
                return replaced_by_a_plain_one(host, domain, disk, path, &info);
            }
            refuse_unless_empty(domain, path, &info)?;
            // The keystore's word is not enough for a file that no key opens.
            host.paths.permit(path)?;
            others.refuse_users_of(&place, domain)?;
            DiskWork::Replace(Box::new(info))
        }
    };
    Ok(Way::Open(DiskStep {
        target: disk.target.clone(),
        place,
        work,
        stated: match named(disk) {
            Some(SecretRef::Uuid(id)) => Some(*id),
            _ => None,
        },
        declared: disk.format.clone(),
    }))
}

/// The file of a disk whose form can be sealed.
fn file_of<'d>(domain: &Domain, disk: &'d Disk) -> Result<&'d Path, Problem> {
    let again = || Advice::SealVm(domain.name.clone());
    let edit = |what: &'static str| Advice::EditXml(domain.name.clone()).within(what).then(again());
    let (Source::File(path), DiskDevice::Disk) = (&disk.source, disk.device) else {
        let detach = Advice::DetachDisk {
            vm: domain.name.clone(),
            disk: disk.target.clone(),
        };
        let detach = detach.then(again());
        if disk.device == DiskDevice::Floppy {
            return Err(
                Problem::failed("the guest could write to the floppy in plaintext")
                    .next(edit("add <readonly/> to it").or_else(detach)),
            );
        }
        let copy = match &disk.source {
            Source::Block(device) => convert(domain, device),
            _ => Advice::from("copy its data into a plain image").then(convert(domain, Path::new("PLAIN"))),
        };
        return Err(
            Problem::failed("only disks that are image files can be sealed").next(copy.or_else(detach))
        );
    };
    if disk.transient {
        let what = "it is transient: libvirt would put a plaintext overlay on it";
        return Err(Problem::failed(what).next(edit("remove <transient/>")));
    }
    if let Some(objection) = disk.layout.objection() {
        let copy = format!(
            "copy the disk into an image of its own (qemu-img convert --image-opts \
             driver=raw,offset=O,size=S,file.filename={} NEW for a slice)",
            word(path.display())
        );
        let next = Advice::from(copy).then(edit("name that in its <source> instead"));
        return Err(Problem::failed(format!("it {objection}")).next(next));
    }
    Ok(path)
}

fn missing(domain: &Domain, path: &Path) -> Problem {
    let what = format!("{} does not exist", path.display());
    Problem::not_found(what).next(made_empty(domain, path).then(Advice::SealVm(domain.name.clone())))
}

fn sealed_one_is_missing(domain: &Domain, path: &Path) -> Problem {
    let shown = path.display();
    let again = || Advice::SealVm(domain.name.clone());
    let back = format!("put {shown} back where it was, or restore it from a backup");
    let anew = Advice::from("if its data may be lost, make an empty one")
        .within(made_empty(domain, path))
        .then(again());
    Problem::not_found(format!("{shown}, which was sealed, does not exist"))
        .next(Advice::from(back).then(again()).or_else(anew))
}

fn made_empty(domain: &Domain, path: &Path) -> Advice {
    Advice::CreateVolume {
        path: path.to_owned(),
        vm: domain.name.clone(),
    }
}

/// An image that is not encrypted is replaced, if nothing would be lost.
fn refuse_unless_empty(domain: &Domain, path: &Path, info: &VolumeInfo) -> Result<(), Problem> {
    let shown = path.display();
    if info.virtual_size.0 == 0 {
        return Err(
            Problem::failed(format!("{shown} has 0 bytes, and no disk has that")).next(
                Advice::from(format!("truncate --size=SIZE {}, such as 20G", word(shown)))
                    .then(Advice::SealVm(domain.name.clone())),
            ),
        );
    }
    if domain::is_overlay(domain, path) {
        let what = format!("{shown} is a plain overlay on a sealed disk");
        return Err(Problem::would_lose_key(what).next(side_doors::free_of_overlays(&domain.name)));
    }
    if info.data == Data::Empty {
        return Ok(());
    }
    let what = format!("{shown} holds data, and converting a disk in place is not possible yet");
    Err(Problem::would_lose_key(what).next(convert(domain, path)))
}

fn convert(domain: &Domain, path: &Path) -> Advice {
    let create = Advice::CreateVolumeFrom {
        path: "NEW".into(),
        from: path.to_owned(),
        vm: domain.name.clone(),
    };
    create
        .then(Advice::EditXml(domain.name.clone()).within("point the disk to it"))
        .then(Advice::SealVm(domain.name.clone()))
}

/// The sealed image may be anywhere: nobody but an admin gives it up.
fn replaced_by_a_plain_one(
    host: &Host<'_>,
    domain: &Domain,
    disk: &Disk,
    path: &Path,
    info: &VolumeInfo,
) -> Result<Way<DiskStep>, Problem> {
    let shown = path.display();
    let found = Problem::would_lose_key(format!(
        "{shown} is a plain image, in the place of the one that was sealed"
    ));
    let back = Advice::from(format!(
        "put the sealed image back as {}, or restore it from a backup",
        word(shown)
    ));
    if info.data == Data::Empty {
        let unseal = Advice::UnsealVm(domain.name.clone()).note("if that was interrupted");
        let back = match HasRun::of(host, domain.uuid)? {
            // An unsealing leaves an empty image first of all.
            HasRun::No => unseal.or_else(back),
            HasRun::Yes | HasRun::NotKnown => back,
        };
        return Ok(Way::Lost(Loss::disk(&disk.target, found.next(back))));
    }
    let again = Advice::SealVm(domain.name.clone());
    let takes_over =
        Advice::from("if the plain one is to be its disk from now on").within(convert(domain, path));
    Err(found.next(back.then(again).or_else(takes_over)))
}

/// An image of ours, which carries an envelope, of which the keystore has `known`: it is adopted, unless keystore and XML have it.
/// None of another VM is.
fn ours(domain: &Domain, disk: &Disk, carried: &Envelope, known: Option<Envelope>) -> Option<DiskWork> {
    let envelope = known.as_ref().unwrap_or(carried);
    if !envelope.serves(domain.uuid) {
        return None;
    }
    let is_named = matches!(named(disk), Some(SecretRef::Uuid(named)) if *named == envelope.id);
    Some(match known {
        Some(known) if is_named && in_metadata(domain, known.id) == Some(&known) => DiskWork::Sealed(known),
        _ => DiskWork::Adopt(carried.clone()),
    })
}

fn made_for_another(host: &Host<'_>, domain: &Domain, path: &Path, envelope: &Envelope) -> Problem {
    let other = envelope.vm;
    if is_defined(host, other) {
        return Whose::in_keystore(host.keystore, envelope).refuse(envelope, &domain.name, Some(path));
    }
    Problem::failed(format!("it was made for VM {other}")).next(of_another(host, domain, other))
}

fn named(disk: &Disk) -> Option<&SecretRef> {
    disk.encryption.as_ref().map(|encryption| &encryption.secret)
}

fn in_metadata(domain: &Domain, id: EnvelopeId) -> Option<&Envelope> {
    domain.metadata.as_ref()?.envelope(id)
}

fn encrypted_by_others(domain: &Domain, path: &Path) -> Problem {
    let shown = path.display();
    let decrypt = Advice::from("copy it into a plain image by the tool that encrypted it");
    Problem::failed(format!("{shown} is encrypted, but not by virtseal"))
        .next(decrypt.then(convert(domain, Path::new("PLAIN"))))
}

/// The envelope of an image that carries none that can be read, at a place that the keystore does not know.
fn named_by_xml(
    host: &Host<'_>,
    domain: &Domain,
    disk: &Disk,
    path: &Path,
    unreadable: Option<String>,
) -> Result<Envelope, Problem> {
    let named = match named(disk) {
        Some(SecretRef::Uuid(id)) => named_envelope(host, domain, ObjectKind::Disk, *id)?,
        _ => None,
    };
    match (named, unreadable) {
        (Some(named), _) => Ok(named),
        (None, Some(why)) => {
            let path = path.display();
            let what = format!(
                "the copy of the envelope in {path} can't be read, and no other is known here: {why}"
            );
            let sealed_xml = Advice::DefineSealedXml(Some(domain.name.clone()));
            Err(Problem::not_found(what).next(sealed_xml.then(Advice::SealVm(domain.name.clone()))))
        }
        (None, None) => Err(encrypted_by_others(domain, path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::envelope::{VmId, fixture};

    /// A VM with one disk, whose XML has `inside` it, and `metadata`.
    fn domain(vm: VmId, inside: &str, metadata: &str) -> Domain {
        let xml = format!(
            "<domain type='kvm'><name>a</name><uuid>{vm}</uuid><metadata>\
             <virtseal:vm xmlns:virtseal='urn:virtseal:vm:1'>{metadata}</virtseal:vm></metadata><devices>\
             <disk type='file'><source file='/d'>{inside}</source><target dev='vda'/></disk></devices></domain>"
        );
        Domain::parse(&xml).unwrap()
    }

    fn luks(id: EnvelopeId) -> String {
        format!("<encryption format='luks'><secret type='passphrase' uuid='{id}'/></encryption>")
    }

    #[test]
    fn an_image_of_ours_is_sealed_only_once_keystore_and_xml_say_so() {
        let vm = VmId::random();
        let own = fixture::envelope(vm).into_envelope();
        let copy = format!("<virtseal:envelope>{}</virtseal:envelope>", own.to_json());
        let work = |inside: &str, metadata: &str, known: Option<&Envelope>| {
            let domain = domain(vm, inside, metadata);
            ours(&domain, &domain.disks[0], &own, known.cloned())
        };
        let named = luks(own.id);
        assert!(matches!(
            work(&named, &copy, Some(&own)),
            Some(DiskWork::Sealed(_))
        ));
        let other = luks(EnvelopeId::random());
        for adopted in [
            work(&named, "", Some(&own)),
            work(&named, &copy, None),
            work("", &copy, Some(&own)),
            // The image knows better.
            work(&other, &copy, Some(&own)),
        ] {
            assert!(matches!(adopted, Some(DiskWork::Adopt(_))), "{adopted:?}");
        }
        // Of another VM, by the keystore, whatever the image claims.
        let mut of_another = own.clone();
        of_another.vm = VmId::random();
        assert!(work(&named, &copy, Some(&of_another)).is_none());
    }

    #[test]
    fn only_a_whole_file_that_stays_can_be_sealed() {
        let refused = |from: &str, to: &str| {
            let mut domain = domain(VmId::random(), "", "");
            match from {
                "" => {}
                "transient" => domain.disks[0].transient = true,
                _ => domain.disks[0].source = Source::Block(to.into()),
            }
            file_of(&domain, &domain.disks[0])
                .map(Path::to_owned)
                .map_err(|problem| problem.advice)
        };
        assert_eq!(refused("", ""), Ok("/d".into()));
        assert!(refused("transient", "").unwrap_err().is_some());
        assert!(refused("block", "/dev/x").unwrap_err().is_some());
    }
}
