//! Who has a volume in their XML, or something that is based on it.

use std::io::ErrorKind;

use crate::domain::{DeclaredFormat, Disk, Domain, SecretRef, Source};
use crate::host::libvirt::KeptXml;
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, VmId};
use crate::model::problem::{Problem, chain};
use crate::object::disk::{FileId, VolumeError};
use crate::store::StoreError;
use crate::vm::host::Host;
use crate::vm::names;

/// A VM that has the image in its XML.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    pub vm: VmId,
    pub name: String,
    pub role: Role,
    pub power: Power,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// It is its disk with this target, opened with the image's key, which is for this VM.
    Disk(String),
    /// It is its disk with this target, by another key or none.
    Alien(String),
    /// This disk of it is based on it.
    Below(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Power {
    Off,
    Running,
    /// Its memory is kept for its next start, which would not know the new size.
    Saved,
}

/// The VMs that have this file, or a disk that is based on it; and the first of those of which nobody can tell, with why.
pub(super) fn users(
    host: &Host<'_>,
    file: FileId,
    envelope: &Envelope,
) -> Result<(Vec<User>, Option<Problem>), Problem> {
    let (mut users, mut unseen): (Vec<User>, _) = (Vec::new(), None);
    // Of a VM that runs, its XML of now comes first.
    for kept in host.kept.iter().filter(|kept| kept.snapshot.is_none()) {
        if users.iter().any(|user| user.vm == kept.vm) {
            continue;
        }
        let role = match role_in(host, kept, file, envelope)? {
            Ok(Some(role)) => role,
            Ok(None) => continue,
            Err(why) => {
                unseen.get_or_insert(why.of(&kept.name));
                continue;
            }
        };
        let found = host.libvirt.domain(&kept.vm.to_string());
        let found = found.map_err(|error| names::unreachable(&error))?;
        let power = match found {
            Some(domain) if domain.active => Power::Running,
            Some(domain) if domain.managed_save => Power::Saved,
            Some(_) | None => Power::Off,
        };
        users.push(User {
            vm: kept.vm,
            name: kept.name.clone(),
            role,
            power,
        });
    }
    Ok((users, unseen))
}

/// What the VM has to do with the file; or why that can't be seen, and nothing that can be.
fn role_in(
    host: &Host<'_>,
    kept: &KeptXml,
    file: FileId,
    envelope: &Envelope,
) -> Result<Result<Option<Role>, Problem>, StoreError> {
    let domain = match Domain::parse(&kept.xml) {
        Ok(domain) => domain,
        Err(error) => {
            return Ok(Err(
                Problem::failed(chain(&error)).next(Advice::EditXml(kept.name.clone()))
            ));
        }
    };
    let mut unseen = None;
    for disk in &domain.disks {
        let target = || disk.target.clone();
        match depth_in(host, kept.vm, disk, file)? {
            Ok(None) => {}
            Ok(Some(0)) => {
                let key = disk.encryption.as_ref().map(|encryption| &encryption.secret);
                let is_opened = key == Some(&SecretRef::Uuid(envelope.id)) && envelope.serves(kept.vm);
                return Ok(Ok(Some(match is_opened {
                    true => Role::Disk(target()),
                    false => Role::Alien(target()),
                })));
            }
            Ok(Some(_)) => return Ok(Ok(Some(Role::Below(target())))),
            Err(why) => {
                unseen.get_or_insert_with(|| why.of(format!("disk {}", disk.target)));
            }
        }
    }
    Ok(unseen.map_or(Ok(None), Err))
}

/// How many images of the disk are above the file, if it is one of them; or why that can't be seen.
fn depth_in(
    host: &Host<'_>,
    vm: VmId,
    disk: &Disk,
    file: FileId,
) -> Result<Result<Option<usize>, Problem>, StoreError> {
    // It is based on nothing, whatever its guest has written there.
    let is_raw = disk.declared_format() == Ok(DeclaredFormat::Raw);
    let path = match &disk.source {
        Source::File(path) | Source::Block(path) => path.clone(),
        Source::Volume { pool, volume } => match host.libvirt.volume_path(pool, volume) {
            Ok(path) => path,
            Err(_) if is_raw => return Ok(Ok(None)),
            Err(error) => return Ok(Err(names::unreachable(&error))),
        },
        Source::Empty | Source::Dir(_) | Source::Elsewhere => return Ok(Ok(None)),
    };
    let top = match host.place_of(vm, &path)? {
        Ok(top) => top,
        Err(error) if is_raw || error.is_missing() => return Ok(Ok(None)),
        Err(error) => return Ok(Err(error.into())),
    };
    match top.metadata() {
        Ok(found) if FileId::from(&found).inode() == file.inode() => return Ok(Ok(Some(0))),
        Ok(_) | Err(_) if is_raw => return Ok(Ok(None)),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Ok(None)),
        Err(error) => return Ok(Err(VolumeError::unreachable(&path, error).into())),
        Ok(_) => {}
    }
    let (layers, end) = host.layers_of(vm, &top)?;
    let depth = layers
        .iter()
        .position(|layer| layer.file_id.inode() == file.inode());
    Ok(match (depth, end) {
        (None, Some(error)) => Err(error.into()),
        (depth, _) => Ok(depth),
    })
}
