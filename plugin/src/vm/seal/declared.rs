//! What a disk to be sealed is: what the XML declares, and an admin where its first bytes say something else.
//!
//! A disk that passes for empty is replaced, so a guest's header must not make it one: see [`crate::object::disk::inspect_declared`].

use std::path::Path;

use super::Host;
use crate::domain::{DeclaredFormat, Disk, Domain};
use crate::host::permitted::PermittedPath;
use crate::model::advice::Advice;
use crate::model::envelope::ObjectKind;
use crate::model::problem::Problem;
use crate::object::disk::{self, VolumeError, VolumeInfo};

/// Looks at the image of a disk, as what the XML declares it to be.
pub(super) fn inspect(
    host: &Host<'_>,
    domain: &Domain,
    disk: &Disk,
    place: &PermittedPath,
) -> Result<VolumeInfo, Problem> {
    let stated = disk.declared_format().map_err(|other| {
        Problem::failed(format!(
            "the XML declares it {other:?}: only raw and qcow2 disks can be sealed"
        ))
        .next(
            Advice::from("convert it to qcow2 as its owner, not as root")
                .then(Advice::EditXml(domain.name.clone()).within("name that"))
                .then(Advice::SealVm(domain.name.clone())),
        )
    })?;
    let declaration = host.confirmed.declaration(disk, stated)?;
    match disk::inspect_declared(place, declaration) {
        Ok(info) => Ok(info),
        Err(VolumeError::Contradiction {
            path,
            declared,
            found,
        }) => {
            match disk::inspect(place) {
                // The start of a raw disk under LUKS, which is what the XML says.
                Ok(info) if info.format.is_encrypted() && disk.encryption.is_some() => Ok(info),
                // An older XML came back: the keystore knows better, and the image is still to open with its key.
                Ok(info) if is_known(host, domain, &info)? => Ok(info),
                _ => Err(contradiction(domain, disk, &path, declared, found)),
            }
        }
        Err(error) => Err(error.into()),
    }
}

fn is_known(host: &Host<'_>, domain: &Domain, info: &VolumeInfo) -> Result<bool, Problem> {
    let location = info.path.display().to_string();
    let carried = info.envelope.as_ref().map(|envelope| envelope.id);
    Ok(info.format.is_encrypted()
        && host
            .keystore
            .envelopes_of(domain.uuid)?
            .sound
            .iter()
            .any(|record| {
                record.envelope.kind == ObjectKind::Disk
                    && (carried == Some(record.envelope.id)
                        || carried.is_none() && record.location == location)
            }))
}

fn contradiction(
    domain: &Domain,
    disk: &Disk,
    path: &Path,
    declared: DeclaredFormat,
    found: &'static str,
) -> Problem {
    let error = VolumeError::Contradiction {
        path: path.to_owned(),
        declared,
        found,
    };
    let edit = Advice::EditXml(domain.name.clone());
    let again = || Advice::SealVm(domain.name.clone());
    let next = match declared {
        DeclaredFormat::Raw => Advice::from("if the XML is wrong")
            .within(edit)
            .then(again())
            .also(
                Advice::from("if the guest has written that to its raw disk").within(Advice::SealDeclared {
                    vm: domain.name.clone(),
                    disk: disk.target.clone(),
                }),
            ),
        DeclaredFormat::Qcow2 => Advice::from("if the XML is wrong")
            .within(edit.note("<driver type='raw'>"))
            .then(again())
            .also("else restore the image from a backup"),
    };
    let next = Advice::ShowVolume(path.to_owned()).also(next);
    Problem::would_lose_key(error.to_string()).next(next)
}
