//! Back to plain, as long as nothing was ever written under seal.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use swtpm_state::{State, libvirt_state_dir};

use super::Host;
use super::plan::{parse, refuse_unless_off};
use crate::api::Outcome;
use crate::domain::{self, Domain, Firmware, ObjectState};
use crate::envelope::ObjectKind;
use crate::failure::{Code, Failure, chain};
use crate::libvirt::DefinedDomain;
use crate::volume::{self, Data, VolumeInfo};

/// What unsealing takes.
#[derive(Debug)]
pub struct UnsealPlan {
    /// The XML of the plain domain.
    pub xml: String,
    disks: Vec<(String, PathBuf, VolumeInfo)>,
    nvram: Option<(PathBuf, PathBuf)>,
}

impl UnsealPlan {
    /// In words.
    #[must_use]
    pub fn outcome(&self, changed: bool) -> Outcome {
        let mut steps: Vec<_> = self
            .disks
            .iter()
            .map(|(target, path, _)| {
                format!("replace the empty {} ({target}) by a plain one", path.display())
            })
            .collect();
        if let Some((path, template)) = &self.nvram {
            steps.push(format!(
                "replace {} by a copy of {}",
                path.display(),
                template.display()
            ));
        }
        steps.push("redefine the domain".into());
        Outcome {
            steps,
            warnings: vec!["the keys stay in the keystore".into()],
            changed,
        }
    }
}

/// Decides whether anything would be lost.
///
/// # Errors
/// When the VM is not sealed, or has run since.
pub fn plan_unseal(host: &Host<'_>, defined: &DefinedDomain) -> Result<UnsealPlan, Failure> {
    refuse_unless_off(defined)?;
    let domain = parse(defined)?;
    let name = &defined.name;
    if domain.metadata.is_none() {
        return Err(Failure::new(Code::NotFound, format!("{name} is not sealed")));
    }
    refuse_if_it_ran(host, &domain)?;
    let mut disks = Vec::new();
    for object in domain::objects(&domain) {
        let (ObjectKind::Disk, ObjectState::Sealed(_), Some(path)) = (object.kind, object.state, object.path)
        else {
            continue;
        };
        let info = volume::inspect(&path)?;
        if info.data != Data::Empty {
            return Err(would_lose(
                name,
                &format!("{} on {} holds data", object.label, path.display()),
            ));
        }
        disks.push((object.label, path, info));
    }
    let xml = domain::edit::unseal(&defined.xml)
        .map_err(|error| Failure::new(Code::Failed, format!("{name}: {}", chain(&error))))?;
    Ok(UnsealPlan {
        xml,
        disks,
        nvram: nvram(&domain)?,
    })
}

/// Replaces the sealed objects by plain ones. May be repeated; the caller defines the XML after it.
pub fn unseal(plan: &UnsealPlan) -> Result<(), Failure> {
    for (_, path, info) in &plan.disks {
        replace(path, |temporary| plain_image(temporary, info))?;
    }
    match &plan.nvram {
        Some((path, template)) => replace(path, |temporary| {
            fs::copy(template, temporary).map(drop).map_err(|error| {
                Failure::from_error(Code::Failed, format!("can't copy {}", template.display()), &error)
            })
        }),
        None => Ok(()),
    }
}

/// The first start makes the vTPM's state: without one the VM never ran.
fn refuse_if_it_ran(host: &Host<'_>, domain: &Domain) -> Result<(), Failure> {
    let dir = libvirt_state_dir(&host.swtpm_dir, &domain.uuid);
    let seen = host
        .keystore
        .vm(domain.uuid)?
        .is_some_and(|record| record.vtpm_seen);
    let absent = matches!(State::read(&dir), Ok(State::Absent));
    let has_vtpm = domain::objects(domain)
        .iter()
        .any(|object| object.kind == ObjectKind::Vtpm && matches!(object.state, ObjectState::Sealed(_)));
    if has_vtpm && absent && !seen {
        return Ok(());
    }
    Err(would_lose(&domain.name, "it has run since it was sealed"))
}

fn would_lose(name: &str, why: &str) -> Failure {
    Failure::new(
        Code::WouldLoseKey,
        format!("{name} stays sealed: {why}, which would be lost"),
    )
    .next("copy the data out from inside the guest: turning sealed data plain is not possible yet")
}

fn nvram(domain: &Domain) -> Result<Option<(PathBuf, PathBuf)>, Failure> {
    let Firmware::Uefi(uefi) = &domain.firmware else {
        return Ok(None);
    };
    let Some(nvram) = uefi.nvram.as_ref().filter(|nvram| nvram.encryption.is_some()) else {
        return Ok(None);
    };
    match (nvram.source.path(), &nvram.template) {
        (Some(path), Some(template)) => Ok(Some((path.into(), template.clone()))),
        _ => Err(Failure::new(
            Code::Failed,
            format!("{} names no template for its UEFI variables", domain.name),
        )
        .next(format!("virsh edit {}: add template= to <nvram>", domain.name))),
    }
}

fn plain_image(path: &Path, info: &VolumeInfo) -> Result<(), Failure> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]);
    let output = command.arg(path).arg(info.virtual_size.0.to_string()).output();
    let output = output.map_err(|error| {
        Failure::from_error(Code::Failed, "can't run qemu-img", &error).next("apt install qemu-utils")
    })?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).replace('\n', " ");
    Err(Failure::new(
        Code::Failed,
        format!("qemu-img can't create {}: {message}", path.display()),
    ))
}

/// Makes the new file beside the old one and takes its place at once.
fn replace(path: &Path, make: impl FnOnce(&Path) -> Result<(), Failure>) -> Result<(), Failure> {
    let failed = |error: &std::io::Error| {
        Failure::from_error(Code::Failed, format!("can't replace {}", path.display()), error)
    };
    let directory = path.parent().unwrap_or(Path::new("/"));
    let temporary = tempfile::Builder::new()
        .prefix(".virtseal-")
        .tempdir_in(directory)
        .map_err(|error| failed(&error))?;
    let file = temporary.path().join("image");
    make(&file)?;
    File::open(&file)
        .and_then(|file| file.sync_all())
        .and_then(|()| fs::rename(&file, path))
        .and_then(|()| File::open(directory)?.sync_all())
        .map_err(|error| failed(&error))
}
