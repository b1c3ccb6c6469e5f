//! Which storage pools open their directory up.
//!
//! libvirt's users define pools, and libvirt tells of no pool who did: `virsh pool-define-as x dir --target /etc` is active at once. So
//! a pool counts only where nothing but images can be meant, whoever has defined it:
//!
//! 1. It is a directory with a file for each volume (`dir`, `fs`, `netfs`), or the directory `/dev/VG` of a volume group (`logical`).
//! 2. Root alone can change which directory that is, and in it only root and the user and group that run QEMU can write.
//! 3. QEMU can enter it, as it must to open an image: a directory that root keeps to itself is none.
//! 4. It is not the system's. The Filesystem Hierarchy Standard gives the host's top-level directories to the system, but `/srv`, `/mnt`,
//!    `/media` and `/home`; `/var/lib/libvirt` is libvirt's; and a top-level directory that the standard does not know is the admin's.
//!
//! It opens the volumes of the pool, which are in the directory itself, and nothing below that. What else root wants to have as a
//! place of images it names in `image_dirs`.

use std::fs;
use std::path::{Component, Path};
use std::sync::Arc;

use nix::sys::stat::{FileStat, fstat};

use super::walk::{Known, Step, Walk, Walked, is_kind};
use crate::host::libvirt::StoragePool;
use crate::host::libvirt::qemu_conf::QemuConf;

/// What the Filesystem Hierarchy Standard (3.0, sections 3, 4.2 and 6.1) and today's systems have at the top, without what is for data.
const OF_SYSTEM: [&str; 17] = [
    "bin",
    "boot",
    "dev",
    "efi",
    "etc",
    "lib",
    "lib32",
    "lib64",
    "libx32",
    "lost+found",
    "opt",
    "proc",
    "root",
    "run",
    "sbin",
    "sys",
    "usr",
];
/// With what else is there, and in whose place others write.
const OF_ALL: [&str; 2] = ["tmp", "var"];
const LIBVIRT: &str = "/var/lib/libvirt";

/// Who runs QEMU on this host, root left out: the ids that `qemu.conf` names, else those of the accounts that packages make for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct QemuIds {
    users: Vec<u32>,
    groups: Vec<u32>,
}

impl QemuIds {
    #[cfg(test)]
    pub(super) fn of(users: impl Into<Vec<u32>>, groups: impl Into<Vec<u32>>) -> Self {
        Self {
            users: users.into(),
            groups: groups.into(),
        }
    }

    /// Asks no name service: the accounts of services are local, and a directory server may hang.
    pub(super) fn of_this_host() -> Self {
        let conf = QemuConf::read().unwrap_or_default();
        let named = |key: &str, usual: &[&str]| match conf.text(key) {
            Some(name) => vec![name.to_owned()],
            None => usual.iter().copied().map(str::to_owned).collect(),
        };
        let accounts = ["libvirt-qemu", "qemu"];
        Self {
            users: ids("/etc/passwd", &named("user", &accounts)),
            groups: ids("/etc/group", &named("group", &accounts)),
        }
    }
}

/// The ids of those that are there, in a file of lines `name:x:id:…`; a number stands for itself, as libvirt has it.
fn ids(file: &str, names: &[String]) -> Vec<u32> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let id_of = |name: &String| {
        let in_file = text.lines().find_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(name))
                .then(|| fields.nth(1)?.parse().ok())
                .flatten()
        });
        in_file.or_else(|| name.trim_start_matches('+').parse().ok())
    };
    names.iter().filter_map(id_of).filter(|id| *id != 0).collect()
}

/// Whether the pool's directory, reached by `walked` and found as `at`, opens its volumes up.
pub(super) fn opens(pool: &StoragePool, qemu: &QemuIds) -> bool {
    // Into no directory of others, which is none that counts.
    let Ok(walked) = Walk::new(&[], Known::No).to(&pool.path) else {
        return false;
    };
    let Some((above, at, found)) = ending(&walked) else {
        return false;
    };
    let ways = above.iter().map(|step| fstat(&step.fd));
    is_kind(&found, libc::S_IFDIR)
        && is_place_for(&pool.kind, &at)
        && above.iter().all(|step| step.is_roots)
        && writers_are_trusted(&found, qemu)
        && ways
            .chain([Ok(found)])
            .all(|found| found.is_ok_and(|found| can_enter(&found, qemu)))
}

/// The steps above the directory where a walk ended, its path without links, and what it is.
fn ending(walked: &Walked) -> Option<(&[Arc<Step>], std::path::PathBuf, FileStat)> {
    let name = walked.name.as_ref()?;
    Some((&walked.steps, walked.directory().path.join(name), walked.found?))
}

fn is_place_for(kind: &str, at: &Path) -> bool {
    match kind {
        "dir" | "fs" | "netfs" => is_for_data(at),
        "logical" => at.parent() == Some(Path::new("/dev")),
        _ => false,
    }
}

fn is_for_data(at: &Path) -> bool {
    if at.starts_with(LIBVIRT) {
        return true;
    }
    let top = at.components().find_map(|part| match part {
        Component::Normal(name) => name.to_str(),
        _ => None,
    });
    top.is_some_and(|top| !OF_SYSTEM.contains(&top) && !OF_ALL.contains(&top))
}

/// Where there is an access control list, the bits of the group bound what it gives to anybody.
fn writers_are_trusted(found: &FileStat, qemu: &QemuIds) -> bool {
    let of_group = found.st_mode & 0o020 == 0 || qemu.groups.contains(&found.st_gid);
    let of_owner = found.st_uid == 0 || qemu.users.contains(&found.st_uid);
    of_owner && of_group && found.st_mode & 0o002 == 0
}

fn can_enter(found: &FileStat, qemu: &QemuIds) -> bool {
    let mode = found.st_mode;
    mode & 0o001 != 0
        || mode & 0o010 != 0 && qemu.groups.contains(&found.st_gid)
        || mode & 0o100 != 0 && qemu.users.contains(&found.st_uid)
}
