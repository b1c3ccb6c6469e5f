//! Where the jobs of a running VM write the data of its disks: copies, by its XML of now, and a backup, by the backup's own.

use std::fmt;

use roxmltree::Node;

use super::DomainError;
use super::xml::{child, children, parse_document};
use crate::model::advice::Advice;

/// Where a job writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct JobTarget {
    /// The disk, by `<target dev=…>`.
    pub disk: String,
    pub role: Role,
    /// The file, device, name, or address.
    pub to: String,
    /// Whether what is written is encrypted.
    pub sealed: bool,
}

/// What a job writes there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// A copy, as `virsh blockcopy` makes one.
    Copy,
    /// The backup itself.
    Backup,
    /// What the guest overwrites while a backup is being fetched.
    Scratch,
    /// To whoever fetches a backup, over the network.
    Export,
}

impl fmt::Display for JobTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { disk, to, .. } = self;
        match self.role {
            Role::Copy => write!(f, "disk {disk} is being copied to {to}, in plaintext"),
            Role::Backup => write!(f, "disk {disk} is being backed up to {to}, in plaintext"),
            Role::Scratch => write!(
                f,
                "what its guest overwrites on disk {disk} during a backup is kept in {to}, in plaintext"
            ),
            Role::Export => write!(
                f,
                "a backup of disk {disk} is to be fetched from {to}, without TLS"
            ),
        }
    }
}

impl JobTarget {
    /// What to do about it, where it is one of `vm`.
    pub(crate) fn way_out(&self, vm: &str) -> Advice {
        let abort = || Advice::AbortDomainJob(vm.to_owned());
        match self.role {
            Role::Copy => {
                let (vm, disk) = (vm.to_owned(), self.disk.clone());
                Advice::AbortBlockJob { vm, disk }.then("remove the copy")
            }
            Role::Backup => abort()
                .then("remove the file")
                .also("<encryption format='luks' engine='qemu'> in <target> keeps a backup sealed"),
            Role::Scratch => {
                abort().also("<encryption format='luks' engine='qemu'> in <scratch> keeps that file sealed")
            }
            Role::Export => abort().also("tls='yes' in <server>, or a unix socket"),
        }
    }
}

/// Every copy in the making, by the VM's XML of now.
pub(crate) fn copies(live: &str) -> Result<Vec<JobTarget>, DomainError> {
    let document = parse_document(live)?;
    let devices = children(document.root_element(), "devices").flat_map(|devices| children(devices, "disk"));
    Ok(devices.filter_map(copy).collect())
}

/// The copy of a disk, while one is made.
pub(super) fn copy(disk: Node<'_, '_>) -> Option<JobTarget> {
    let mirror = child(disk, "mirror").filter(|_| disk.has_tag_name("disk"))?;
    let source = child(mirror, "source");
    let format = child(mirror, "format").and_then(|format| format.attribute("type"));
    let target = child(disk, "target").and_then(|target| target.attribute("dev"));
    Some(JobTarget {
        disk: target.unwrap_or_default().to_owned(),
        role: Role::Copy,
        to: place(source).unwrap_or("another image").to_owned(),
        sealed: source.is_some_and(|source| is_encrypted(source, format)),
    })
}

/// Where a backup writes, by its `<domainbackup>`.
pub(crate) fn backup(xml: &str) -> Result<Vec<JobTarget>, DomainError> {
    let document = parse_document(xml)?;
    let root = document.root_element();
    let server = child(root, "server");
    let is_open = |server: &Node<'_, '_>| {
        server.attribute("transport") != Some("unix") && server.attribute("tls") != Some("yes")
    };
    let export = server.filter(is_open).map(|server| {
        let of = |name| server.attribute(name).unwrap_or_default();
        format!("{}:{}", of("name"), of("port"))
    });
    let disks = children(root, "disks").flat_map(|disks| children(disks, "disk"));
    let disks = disks.filter(|disk| disk.attribute("backup") != Some("no"));
    let mut found = Vec::new();
    for disk in disks {
        let name = disk.attribute("name").unwrap_or_default();
        let format = child(disk, "driver").and_then(|driver| driver.attribute("type"));
        for (element, role) in [("target", Role::Backup), ("scratch", Role::Scratch)] {
            let Some(file) = child(disk, element) else {
                continue;
            };
            found.push(JobTarget {
                disk: name.to_owned(),
                role,
                to: place(Some(file)).unwrap_or("a file").to_owned(),
                sealed: is_encrypted(file, format),
            });
        }
        found.extend(export.iter().map(|address| JobTarget {
            disk: name.to_owned(),
            role: Role::Export,
            to: address.clone(),
            sealed: false,
        }));
    }
    Ok(found)
}

fn place<'a>(source: Option<Node<'a, '_>>) -> Option<&'a str> {
    ["file", "dev", "name", "volume"]
        .into_iter()
        .find_map(|name| source?.attribute(name))
}

/// Without an engine libvirt may put plaintext over the LUKS header of a raw target, and says nothing.
fn is_encrypted(source: Node<'_, '_>, format: Option<&str>) -> bool {
    child(source, "encryption")
        .is_some_and(|encryption| encryption.has_attribute("engine") || format == Some("qcow2"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LUKS: &str = "<encryption format='luks' engine='qemu'><secret type='passphrase' uuid='00000000-0000-0000-0000-000000000001'/></encryption>";

    fn plain(targets: &[JobTarget]) -> Vec<String> {
        let plain = targets.iter().filter(|target| !target.sealed);
        plain.map(ToString::to_string).collect()
    }

    #[test]
    fn a_copy_is_sealed_only_where_libvirt_is_sure_to_encrypt() {
        let copy = |format: &str, inside: &str| {
            let xml = format!(
                "<domain><devices><disk type='file'><source file='/d'/><target dev='vda'/><mirror type='file' job='copy'>\
                 <format type='{format}'/><source file='/copy'>{inside}</source></mirror></disk></devices></domain>"
            );
            plain(&copies(&xml).unwrap())
        };
        let bare = "<encryption format='luks'/>";
        for (format, inside) in [("qcow2", LUKS), ("raw", LUKS), ("qcow2", bare)] {
            assert!(copy(format, inside).is_empty(), "{format} {inside}");
        }
        for (format, inside) in [("qcow2", ""), ("raw", ""), ("raw", bare)] {
            let found = copy(format, inside);
            assert!(
                matches!(&found[..], [one] if one.contains("disk vda") && one.contains("/copy")),
                "{format} {inside}"
            );
        }
    }

    #[test]
    fn each_file_of_a_backup_is_looked_at() {
        let of = |xml: &str| plain(&backup(xml).unwrap());
        let push = |inside: &str| {
            format!(
                "<domainbackup mode='push'><disks><disk name='vda' backup='yes' type='file'><driver type='qcow2'/>\
                 <target file='/b'>{inside}</target></disk><disk name='vdb' backup='no'/></disks></domainbackup>"
            )
        };
        assert!(matches!(&of(&push(""))[..], [one] if one.contains("/b")));
        assert!(of(&push(LUKS)).is_empty());
        let pull = |server: &str, inside: &str| {
            format!(
                "<domainbackup mode='pull'>{server}<disks><disk name='vda' backup='yes' type='file'><driver type='qcow2'/>\
                 <scratch file='/s'>{inside}</scratch></disk></disks></domainbackup>"
            )
        };
        let unix = "<server transport='unix' socket='/sock'/>";
        assert!(matches!(&of(&pull(unix, ""))[..], [one] if one.contains("/s")));
        assert!(of(&pull(unix, LUKS)).is_empty());
        let tcp = "<server transport='tcp' name='localhost' port='10809'/>";
        assert!(matches!(&of(&pull(tcp, LUKS))[..], [one] if one.contains("localhost:10809")));
        let tls = "<server transport='tcp' tls='yes' name='localhost' port='10809'/>";
        assert!(of(&pull(tls, LUKS)).is_empty());
    }
}
