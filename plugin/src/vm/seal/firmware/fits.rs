//! Whether a firmware descriptor fits what a domain asks for, by the rules of libvirt's versions.

use std::path::Path;

use super::descriptor::{Descriptor, FirmwareFile};
use crate::domain::{LaunchSecurity, Uefi};

/// Which libvirt's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rules {
    /// The loader and the template of the XML count for nothing where libvirt chooses, and neither does what would fail later.
    Before9_2,
    /// Everything that the XML says must fit.
    Since9_2,
}

/// What the domain asks for.
pub(super) struct Wish<'a> {
    pub(super) uefi: &'a Uefi,
    pub(super) template: Option<&'a Path>,
}

impl Wish<'_> {
    pub(super) fn fits(&self, firmware: &Descriptor, rules: Rules) -> bool {
        firmware.interface_types.iter().any(|kind| kind == "uefi")
            && self.fits_paths(firmware, rules)
            && self.fits_machine(firmware)
            && self.fits_features(firmware)
            && self.fits_smm(firmware, rules)
            && self.fits_flash(firmware, rules)
    }

    fn fits_paths(&self, firmware: &Descriptor, rules: Rules) -> bool {
        let is = |file: Option<&FirmwareFile>, path: &Path| file.is_some_and(|file| file.filename == path);
        let mapping = &firmware.mapping;
        let loader = self.uefi.loader.as_deref();
        let loader_fits =
            loader.is_none_or(|path| mapping.device == "flash" && is(mapping.executable.as_ref(), path));
        let template_fits = rules == Rules::Before9_2
            || mapping.device != "flash"
            || self
                .template
                .is_none_or(|path| is(mapping.template.as_ref(), path));
        loader_fits && template_fits
    }

    fn fits_machine(&self, firmware: &Descriptor) -> bool {
        let wish = &self.uefi.wish;
        let arch = wish.arch.as_deref().unwrap_or(std::env::consts::ARCH);
        let machine = wish.machine.as_deref().unwrap_or_default();
        firmware.targets.iter().any(|target| {
            target.architecture == arch && target.machines.iter().any(|pattern| glob(pattern, machine))
        })
    }

    fn fits_features(&self, firmware: &Descriptor) -> bool {
        let wish = &self.uefi.wish;
        let as_wished = |wish: Option<bool>, feature| wish.is_none_or(|wish| wish == firmware.has(feature));
        let launch_security = match &wish.launch_security {
            None | Some(LaunchSecurity::Other(_)) => true,
            Some(LaunchSecurity::Sev) => firmware.has("amd-sev"),
            Some(LaunchSecurity::SevEs) => firmware.has("amd-sev") && firmware.has("amd-sev-es"),
        };
        as_wished(wish.secure_boot, "secure-boot")
            && as_wished(wish.enrolled_keys, "enrolled-keys")
            && (!wish.suspend_to_mem || firmware.has("acpi-s3"))
            && (!wish.suspend_to_disk || firmware.has("acpi-s4"))
            && launch_security
    }

    fn fits_smm(&self, firmware: &Descriptor, rules: Rules) -> bool {
        let wish = &self.uefi.wish;
        if !firmware.has("requires-smm") {
            return wish.secure != Some(true);
        }
        rules == Rules::Before9_2 || (wish.smm != Some(false) && wish.secure != Some(false))
    }

    fn fits_flash(&self, firmware: &Descriptor, rules: Rules) -> bool {
        let (mapping, wish) = (&firmware.mapping, &self.uefi.wish);
        if mapping.device != "flash" {
            return true;
        }
        let mode = if self.uefi.stateless { "stateless" } else { "split" };
        if mapping.mode.as_deref().unwrap_or("split") != mode {
            return false;
        }
        let format = mapping.executable.as_ref().map(|file| file.format.as_str());
        rules == Rules::Before9_2
            || (wish.readonly != Some(false)
                && matches!(format, Some("raw" | "qcow2"))
                && wish
                    .loader_format
                    .as_deref()
                    .is_none_or(|wish| Some(wish) == format))
    }
}

/// `*` is any text and `?` any character, as in GLib's patterns.
pub(super) fn glob(pattern: &str, text: &str) -> bool {
    match pattern.chars().next() {
        None => text.is_empty(),
        Some('*') => {
            let rest = &pattern[1..];
            text.char_indices()
                .map(|(at, _)| at)
                .chain([text.len()])
                .any(|at| glob(rest, &text[at..]))
        }
        Some(wanted) => {
            let mut rest = text.chars();
            let fits = rest.next().is_some_and(|found| wanted == '?' || wanted == found);
            fits && glob(&pattern[wanted.len_utf8()..], rest.as_str())
        }
    }
}
