//! How a file shows its format.

use std::path::Path;

use super::error::VolumeError;
use super::{luks, qcow2};

/// What the first bytes of a file are those of.
pub(super) enum Sniffed {
    Qcow2,
    Luks1,
    Luks2,
    Raw,
    Foreign(&'static str),
}

impl Sniffed {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Luks1 => "LUKS1",
            Self::Luks2 => "LUKS2",
            Self::Raw => "raw",
            Self::Foreign(name) => name,
        }
    }
}

/// A format by the name that a qcow2 image has for that of its backing file.
pub(super) fn name_of(declared: &str) -> Option<Sniffed> {
    match declared {
        "qcow2" => Some(Sniffed::Qcow2),
        "raw" => Some(Sniffed::Raw),
        "luks" => Some(Sniffed::Luks1),
        _ => None,
    }
}

pub(super) fn sniff(start: &[u8]) -> Option<Sniffed> {
    const FOREIGN: [(usize, &[u8], &str); 8] = [
        (0, b"KDMV", "VMDK"),
        (0, b"COWD", "VMDK"),
        (0, b"# Disk DescriptorFile", "VMDK"),
        (0, b"vhdxfile", "VHDX"),
        (0, b"conectix", "VHD"),
        (0, b"QED\0", "QED"),
        (0, b"WithouFreSpacExt", "Parallels"),
        (64, b"\x7f\x10\xda\xbe", "VDI"),
    ];
    let has = |at: usize, magic: &[u8]| start.get(at..).is_some_and(|rest| rest.starts_with(magic));
    if let Some((_, _, name)) = FOREIGN.iter().find(|(at, magic, _)| has(*at, magic)) {
        return Some(Sniffed::Foreign(name));
    }
    Some(if has(0, qcow2::MAGIC) {
        Sniffed::Qcow2
    } else {
        match luks::Version::of(start) {
            Some(luks::Version::V1) => Sniffed::Luks1,
            Some(luks::Version::V2) => Sniffed::Luks2,
            None => Sniffed::Raw,
        }
    })
}

pub(super) fn foreign(path: &Path, name: &str) -> VolumeError {
    VolumeError::unsupported(
        path,
        format!("it is a {name} image"),
        "convert it to qcow2 or raw with `qemu-img convert` first, as its owner and not as root: an image can name other files",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_show_in_their_first_bytes() {
        let name = |start: &[u8]| sniff(start).unwrap().name();
        assert_eq!(name(b"QFI\xfb\0\0\0\x03"), "qcow2");
        assert_eq!(name(b"LUKS\xba\xbe\0\x01"), "LUKS1");
        assert_eq!(name(b"LUKS\xba\xbe\0\x02"), "LUKS2");
        assert_eq!(name(b"KDMV and the rest"), "VMDK");
        assert_eq!(name(b""), "raw");
    }
}
