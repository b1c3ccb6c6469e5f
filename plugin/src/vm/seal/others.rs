//! Who else uses a file: other VMs by their XML, and the VM itself under another name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::domain::overlays::{domains_of_snapshot, external_snapshot};
use crate::domain::{Domain, Firmware, names_path};
use crate::host::libvirt::KeptXml;
use crate::host::permitted::PermittedPath;
use crate::host::storage;
use crate::model::advice::Advice;
use crate::model::deadlines::image::SEEN;
use crate::model::envelope::VmId;
use crate::model::problem::Problem;
use crate::object::disk::FileId;

type Inode = (u64, u64);

/// The files that other VMs name.
#[derive(Debug)]
pub(crate) struct OtherUses {
    files: Vec<(String, PathBuf, Option<Inode>)>,
    /// XML that can't be read: looked at as text.
    texts: Vec<(String, String)>,
}

impl OtherUses {
    /// Of all but `vm`.
    pub(crate) fn among(kept: &[KeptXml], vm: VmId) -> Self {
        let (mut named, mut texts) = (Vec::new(), Vec::new());
        for kept in kept.iter().filter(|kept| kept.vm != vm) {
            let of_domain = || Domain::parse(&kept.xml).map(|domain| vec![domain]);
            match of_domain().or_else(|_| domains_of_snapshot(&kept.xml)) {
                Ok(domains) => {
                    let paths = domains.iter().flat_map(files_of);
                    named.extend(paths.map(|(_, path)| (kept.name.clone(), path.to_owned())));
                    let laid_over = external_snapshot(&kept.xml).unwrap_or_default().overlays;
                    named.extend(laid_over.into_iter().map(|path| (kept.name.clone(), path)));
                }
                Err(_) => texts.push((kept.name.clone(), kept.xml.clone())),
            }
        }
        // What does not answer is on other storage than what does.
        let paths = named.iter().map(|(_, path)| path.clone()).collect();
        let inodes: BTreeMap<_, _> = storage::in_time(paths, SEEN, inode).into_iter().collect();
        let with_inode = |(name, path): (String, PathBuf)| {
            let inode = inodes.get(&path).copied().flatten().flatten();
            (name, path, inode)
        };
        let files = named.into_iter().map(with_inode).collect();
        Self { files, texts }
    }

    /// Another VM that has this file in its XML.
    pub(super) fn user_of(&self, place: &PermittedPath) -> Option<&str> {
        let path = place.shown();
        let found = place.metadata().ok().map(|found| FileId::from(&found).inode());
        let is_it = |(_, other, at): &&(String, PathBuf, Option<Inode>)| {
            other == path || (at.is_some() && *at == found)
        };
        let by_file = self.files.iter().find(is_it).map(|(name, ..)| name.as_str());
        by_file.or_else(|| {
            let names_it = |(_, xml): &&(String, String)| names_path(xml, path);
            self.texts.iter().find(names_it).map(|(name, _)| name.as_str())
        })
    }

    /// Refuses to replace a file that another VM uses.
    pub(crate) fn refuse_users_of(&self, place: &PermittedPath, domain: &Domain) -> Result<(), Problem> {
        let Some(other) = self.user_of(place) else {
            return Ok(());
        };
        let edit = |vm: &str| {
            let edit = Advice::EditXml(vm.to_owned()).within("name another file");
            edit.then(Advice::SealVm(domain.name.clone()))
        };
        Err(Problem::denied(format!(
            "{} is a file of VM {other} as well",
            place.shown().display()
        ))
        .next(edit(&domain.name).or_else(edit(other))))
    }
}

/// Refuses a VM that has one file in two places of its XML, unless it reads both only.
pub(super) fn refuse_one_file_twice(domain: &Domain) -> Result<(), Problem> {
    let mut seen: BTreeMap<Inode, (String, bool)> = BTreeMap::new();
    for (label, path) in files_of(domain) {
        let Some(inode) = inode(path) else { continue };
        let is_read_only = domain
            .disks
            .iter()
            .any(|disk| disk.readonly && label == format!("disk {}", disk.target))
            || label.ends_with(BELOW);
        match seen.get(&inode) {
            Some((other, other_is_read_only)) if !(is_read_only && *other_is_read_only) => {
                let edit = Advice::EditXml(domain.name.clone()).within("give each a file of its own");
                return Err(
                    Problem::failed(format!("{} is both {other} and {label}", path.display()))
                        .next(edit.then(Advice::SealVm(domain.name.clone()))),
                );
            }
            _ => {
                seen.insert(inode, (label, is_read_only));
            }
        }
    }
    Ok(())
}

const BELOW: &str = "(backing layer)";

/// Each file or device that the XML names, with its name in messages.
fn files_of(domain: &Domain) -> Vec<(String, &Path)> {
    let mut files = Vec::new();
    for disk in &domain.disks {
        files.extend(
            disk.source
                .path()
                .map(|path| (format!("disk {}", disk.target), path)),
        );
        let below = disk.backing.iter().filter_map(|layer| layer.source.path());
        files.extend(below.map(|path| (format!("disk {} {BELOW}", disk.target), path)));
    }
    if let Firmware::Uefi(uefi) = &domain.firmware {
        let store = uefi.nvram.as_ref().and_then(|nvram| nvram.source.path());
        files.extend(store.map(|path| ("the UEFI variable store".to_owned(), path)));
    }
    files
}

/// Of what is really there, links followed: nothing is opened.
fn inode(path: &Path) -> Option<Inode> {
    let found = std::fs::metadata(path).ok()?;
    (!found.is_dir()).then(|| FileId::from(&found).inode())
}
