//! Back to plain, as long as nothing was ever written under seal.

use std::path::PathBuf;

use swtpm_state::{State, libvirt_state_dir};

use super::Host;
use super::plan::{parse, refuse_unless_off};
use crate::api::Outcome;
use crate::domain::{self, Domain, Firmware, ObjectState};
use crate::envelope::ObjectKind;
use crate::failure::{Code, Failure, chain, word};
use crate::libvirt::DefinedDomain;
use crate::volume::{self, Data, Held, VolumeInfo};

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
            warnings: vec![
                // Only a VM with a sealed one that never ran gets here.
                "the TPM stays in the domain, and its state will be plain: virsh edit removes it".into(),
                "the keys stay in the keystore".into(),
            ],
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

/// Replaces the sealed objects by plain ones. May be repeated. The caller keeps what was replaced until it has defined the
/// XML: a start may still be opening it.
pub fn unseal(plan: &UnsealPlan) -> Result<Vec<Held>, Failure> {
    let mut replaced = Vec::new();
    for (_, path, info) in &plan.disks {
        let held = Held::unchanged(path, info.file_id)?;
        volume::empty_over(&held, info.virtual_size)?;
        replaced.push(held);
    }
    if let Some((path, template)) = &plan.nvram {
        let held = Held::open(path)?;
        volume::copy_over(&held, template)?;
        replaced.push(held);
    }
    Ok(replaced)
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
        .next(format!(
            "virsh edit {}: add template= to <nvram>",
            word(&domain.name)
        ))),
    }
}
