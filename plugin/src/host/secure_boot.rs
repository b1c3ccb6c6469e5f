//! Whether this host's firmware boots only what is signed: what PCR 7 is worth depends on it.
//!
//! The UEFI variable `SecureBoot` (UEFI Specification, "Globally Defined Variables") as efivarfs shows it: four bytes of
//! attributes, then one that is 1 when Secure Boot is enforced.

use std::fs;
use std::io;
use std::path::Path;

use crate::model::finding::FindingCode;

const FIRMWARE: &str = "sys/firmware/efi";
const VARIABLE: &str = "efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";

/// What the firmware says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SecureBoot {
    /// Only what is signed boots.
    On,
    /// Anything boots.
    Off,
    /// The host was not booted by UEFI.
    NoUefi,
    /// Why it can't be told.
    NotKnown(String),
}

impl SecureBoot {
    /// What it is for the host whose files are below `root`.
    pub(crate) fn of_host(root: &Path) -> Self {
        let firmware = root.join(FIRMWARE);
        if !firmware.is_dir() {
            return Self::NoUefi;
        }
        match fs::read(firmware.join(VARIABLE)).as_deref() {
            Ok([_, _, _, _, 1]) => Self::On,
            Ok([_, _, _, _, 0]) => Self::Off,
            Ok(_) => Self::NotKnown("its UEFI variable is none".to_owned()),
            // Firmware that knows no Secure Boot has no such variable, nor has a host without efivarfs.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Self::NotKnown(format!("there is no /{FIRMWARE}/{VARIABLE}"))
            }
            Err(error) => Self::NotKnown(format!("/{FIRMWARE}/{VARIABLE}: {error}")),
        }
    }

    /// Why a binding to PCR 7 is worth less than it seems, if so.
    pub(crate) fn doubt(&self) -> Option<(FindingCode, String)> {
        let (code, why) = match self {
            Self::On => return None,
            Self::Off => (FindingCode::SecureBootOff, "Secure Boot is off, so PCR 7 is the same whatever boots on this host: switch it on, and repeat this command then".to_owned()),
            Self::NoUefi => (FindingCode::SecureBootOff, "this host was not booted by UEFI, so PCR 7 says nothing of what boots".to_owned()),
            Self::NotKnown(why) => (FindingCode::SecureBootUnknown, format!("whether Secure Boot is on is not known ({why}): without it PCR 7 is the same whatever boots")),
        };
        Some((code, why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(variable: Option<&[u8]>) -> SecureBoot {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(FIRMWARE).join(VARIABLE);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        if let Some(bytes) = variable {
            fs::write(path, bytes).unwrap();
        }
        SecureBoot::of_host(root.path())
    }

    #[test]
    fn the_variable_is_read_and_what_it_is_not_is_said() {
        assert_eq!(host(Some(&[6, 0, 0, 0, 1])), SecureBoot::On);
        assert_eq!(host(Some(&[6, 0, 0, 0, 0])), SecureBoot::Off);
        for odd in [&[6, 0, 0, 0][..], &[6, 0, 0, 0, 2], &[6, 0, 0, 0, 1, 1], &[]] {
            assert!(matches!(host(Some(odd)), SecureBoot::NotKnown(_)), "{odd:?}");
        }
        let SecureBoot::NotKnown(why) = host(None) else {
            panic!("{:?}", host(None))
        };
        assert!(why.contains("/sys/firmware/efi/efivars/SecureBoot-"), "{why}");
        let bios = tempfile::tempdir().unwrap();
        assert_eq!(SecureBoot::of_host(bios.path()), SecureBoot::NoUefi);
    }

    #[test]
    fn only_with_it_on_nothing_is_doubted() {
        assert_eq!(SecureBoot::On.doubt(), None);
        assert!(SecureBoot::Off.doubt().unwrap().1.contains("Secure Boot is off"));
        assert!(
            SecureBoot::NoUefi
                .doubt()
                .unwrap()
                .1
                .contains("not booted by UEFI")
        );
    }
}
