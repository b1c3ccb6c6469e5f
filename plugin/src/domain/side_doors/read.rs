//! The side doors that domain XML has.

use roxmltree::Node;

use super::SideDoor;
use crate::domain::arguments::{self, Argument};
use crate::domain::xml::{child, children, text};
use crate::domain::{Firmware, Source, jobs};

/// Every one in the domain, in the order of [`SideDoor`]'s cases.
pub(in crate::domain) fn read(root: Node<'_, '_>, firmware: &Firmware) -> Vec<SideDoor> {
    let devices = || children(root, "devices").flat_map(|devices| devices.children());
    let mut found = Vec::new();
    found.extend(has_file_memory(root).then_some(SideDoor::FileMemory));
    found.extend(devices().filter_map(persistent_memory));
    found.extend(arguments::read(root).into_iter().map(argument));
    found.extend(devices().filter_map(directory));
    found.extend(
        devices()
            .filter(|node| node.has_tag_name("pstore"))
            .map(|pstore| SideDoor::Pstore(child(pstore, "path").map(text).unwrap_or_default())),
    );
    for output in devices().filter_map(output) {
        // libvirt shows the first serial port as a console too.
        let path = |door: &SideDoor| match door {
            SideDoor::Output { path, .. } => Some(path.clone()),
            _ => None,
        };
        if !found.iter().any(|door| path(door) == path(&output)) {
            found.push(output);
        }
    }
    found.extend(devices().filter_map(mirror));
    found.extend(dumps(root));
    found.extend(snapshots(firmware).map(SideDoor::InternalSnapshots));
    found
}

fn argument(argument: Argument) -> SideDoor {
    match argument {
        Argument::Storage(shown) => SideDoor::StorageArgument(shown),
        Argument::Memory(shown) => SideDoor::MemoryArgument(shown),
        Argument::Other(shown) => SideDoor::Argument(shown),
    }
}

/// libvirt makes a file of all memory whose access is set, unless it is to be memfd or huge pages.
fn has_file_memory(root: Node<'_, '_>) -> bool {
    let backing = child(root, "memoryBacking");
    let of = |name| backing.and_then(|backing| child(backing, name));
    let source = of("source").and_then(|source| source.attribute("type"));
    if source == Some("memfd") {
        return false;
    }
    // Pages for some nodes leave the others as they are.
    let all_huge = of("hugepages")
        .is_some_and(|huge| children(huge, "page").all(|page| page.attribute("nodeset").is_none()));
    let cells = child(root, "cpu").and_then(|cpu| child(cpu, "numa"));
    let cells = cells.into_iter().flat_map(|numa| children(numa, "cell"));
    let has_access = of("access").is_some()
        || cells.into_iter().any(|cell| cell.has_attribute("memAccess"))
        || memories(root).any(|memory| memory.has_attribute("access"));
    (source == Some("file") || has_access) && !all_huge
}

fn memories<'a, 'i>(root: Node<'a, 'i>) -> impl Iterator<Item = Node<'a, 'i>> {
    children(root, "devices").flat_map(|devices| children(devices, "memory"))
}

fn persistent_memory(node: Node<'_, '_>) -> Option<SideDoor> {
    let model = node
        .attribute("model")
        .filter(|model| node.has_tag_name("memory") && matches!(*model, "nvdimm" | "virtio-pmem"))?;
    let path = child(node, "source").and_then(|source| child(source, "path"));
    Some(SideDoor::PersistentMemory {
        model: model.to_owned(),
        path: path.map(|path| text(path).trim().into()),
    })
}

fn directory(node: Node<'_, '_>) -> Option<SideDoor> {
    if !node.has_tag_name("filesystem") || child(node, "readonly").is_some() {
        return None;
    }
    let driver = child(node, "driver").and_then(|driver| driver.attribute("type"));
    let source = child(node, "source");
    let path = ["dir", "socket", "file", "dev", "name"]
        .into_iter()
        .find_map(|name| source?.attribute(name));
    Some(SideDoor::Directory {
        driver: match driver {
            None | Some("path") => "9p".into(),
            Some(driver) => driver.to_owned(),
        },
        path: path.unwrap_or("of the host").to_owned(),
    })
}

fn output(node: Node<'_, '_>) -> Option<SideDoor> {
    let device = [
        "serial",
        "console",
        "parallel",
        "channel",
        "smartcard",
        "redirdev",
    ]
    .into_iter()
    .find(|name| node.has_tag_name(*name))?;
    let to_file = child(node, "source")
        .filter(|_| matches!(node.attribute("type"), Some("file")))
        .and_then(|source| source.attribute("path"));
    let log = child(node, "log").and_then(|log| log.attribute("file"));
    to_file.or(log).map(|path| SideDoor::Output {
        device: device.to_owned(),
        path: path.to_owned(),
    })
}

/// Of a running VM: libvirt shows a copy in the making beside the disk.
fn mirror(disk: Node<'_, '_>) -> Option<SideDoor> {
    jobs::copy(disk).filter(|copy| !copy.sealed).map(SideDoor::Mirror)
}

fn dumps(root: Node<'_, '_>) -> impl Iterator<Item = SideDoor> {
    let crash = child(root, "on_crash").map(text);
    let crash = crash.filter(|action| action.trim().starts_with("coredump"));
    let mut watchdogs = children(root, "devices").flat_map(|devices| children(devices, "watchdog"));
    let watchdog = watchdogs.any(|watchdog| watchdog.attribute("action") == Some("dump"));
    [
        crash.map(|_| SideDoor::Dump("when the guest crashes")),
        watchdog.then_some(SideDoor::Dump("when its watchdog fires")),
    ]
    .into_iter()
    .flatten()
}

/// libvirt refuses internal snapshots of a running VM whose variable store is a raw file.
fn snapshots(firmware: &Firmware) -> Option<&'static str> {
    match firmware {
        Firmware::Bios | Firmware::Rom(_) => Some("it has no UEFI variable store"),
        Firmware::Uefi(uefi) if uefi.stateless => Some("its UEFI is stateless"),
        Firmware::Uefi(uefi) => {
            let nvram = uefi.nvram.as_ref()?;
            let is_qcow2 = nvram.format.as_deref() == Some("qcow2");
            (is_qcow2 && nvram.source != Source::Empty).then_some("its UEFI variable store is qcow2")
        }
    }
}
