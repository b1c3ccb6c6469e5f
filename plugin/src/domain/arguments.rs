//! The arguments that `<qemu:commandline>` hands to QEMU past libvirt, and what each may open.

use roxmltree::Node;

pub(super) const QEMU_NAMESPACE: &str = "http://libvirt.org/schemas/domain/qemu/1.0";

/// An argument with what belongs to it, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Argument {
    /// Adds a disk or a directory.
    Storage(String),
    /// Adds memory that is a file.
    Memory(String),
    Other(String),
}

/// Options of QEMU that add a disk or a directory, or read more options from a file.
const STORAGE: [&str; 18] = [
    "drive",
    "blockdev",
    "hda",
    "hdb",
    "hdc",
    "hdd",
    "fda",
    "fdb",
    "cdrom",
    "sd",
    "mtdblock",
    "pflash",
    "snapshot",
    "fsdev",
    "virtfs",
    "readconfig",
    "loadvm",
    "set",
];
/// Devices that have storage behind them, as a prefix of their names. A controller has none.
const STORAGE_DEVICES: [&str; 20] = [
    "virtio-blk",
    "vhost-user-blk",
    "scsi-",
    "ide-hd",
    "ide-cd",
    "ide-drive",
    "ide-cf",
    "nvme",
    "usb-storage",
    "usb-bot",
    "usb-uas",
    "usb-mtp",
    "floppy",
    "isa-fdc",
    "sd-card",
    "emmc",
    "virtio-9p",
    "vhost-user-fs",
    "xen-disk",
    "vfio-user",
];
const MEMORY_DEVICES: [&str; 3] = ["nvdimm", "virtio-pmem", "ivshmem"];

/// The arguments of `<qemu:commandline>`, each option with what belongs to it.
pub(super) fn read(root: Node<'_, '_>) -> Vec<Argument> {
    let lines = root
        .children()
        .filter(|node| node.has_tag_name((QEMU_NAMESPACE, "commandline")));
    let values: Vec<_> = lines
        .flat_map(|line| line.children())
        .filter(|node| node.has_tag_name((QEMU_NAMESPACE, "arg")))
        .filter_map(|node| node.attribute("value"))
        .collect();
    let mut found = Vec::new();
    let mut at = 0;
    while at < values.len() {
        let option = values[at];
        let value = values.get(at + 1).filter(|next| !next.starts_with('-'));
        at += 1 + usize::from(value.is_some());
        found.push(argument(option, value.copied()));
    }
    found
}

fn argument(option: &str, value: Option<&str>) -> Argument {
    let name = option.trim_start_matches('-');
    let value = value.unwrap_or_default();
    let shown = format!("{option} {value}").trim_end().to_owned();
    // `driver=x,…`, `x,…` and `{"driver": "x", …}`
    let is_one_of = |names: &[&str]| {
        value
            .split(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '-' | '_' | '.'))
            .any(|word| names.iter().any(|name| word.starts_with(name)))
    };
    let has_key = |key: &str| value.contains(&format!("{key}=")) || value.contains(&format!("\"{key}\""));
    match name {
        // What does not begin with a dash is a disk image to QEMU.
        _ if !option.starts_with('-') => Argument::Storage(shown),
        name if STORAGE.contains(&name) => Argument::Storage(shown),
        "device" if is_one_of(&MEMORY_DEVICES) || has_key("memdev") => Argument::Memory(shown),
        "device" if is_one_of(&STORAGE_DEVICES) || has_key("drive") => Argument::Storage(shown),
        "mem-path" => Argument::Memory(shown),
        "object" if is_one_of(&["memory-backend-file"]) || has_key("mem-path") => Argument::Memory(shown),
        _ => Argument::Other(shown),
    }
}
