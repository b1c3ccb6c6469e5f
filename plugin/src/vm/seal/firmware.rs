//! Which UEFI image a domain boots, and which template its variable store starts from.
//!
//! Where the domain does not say, the host's firmware descriptors do (QEMU's `docs/interop/firmware.json`), and after them the
//! pairs in libvirt's qemu.conf. libvirt takes the first that fits everything the domain asks for, and so does this; where
//! versions of libvirt would take different ones, nothing is chosen: a VM with Secure Boot must not lose it on the way.

mod descriptor;
mod fits;

use std::path::{Path, PathBuf};

use self::descriptor::{DESCRIPTORS, Descriptor, descriptors};
use self::fits::{Rules, Wish};
use crate::domain::{Domain, Firmware, LaunchSecurity, Nvram, Uefi, edit::LoaderPin};
use crate::host::libvirt::qemu_conf::QemuConf;
use crate::model::advice::Advice;
use crate::model::problem::{Problem, chain};

/// What the variable store is made from.
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) template: PathBuf,
    /// Set where libvirt would still be choosing at the start.
    pub(super) loader: Option<LoaderPin>,
}

/// The templates that the host's descriptors and its qemu.conf name; none of a place that can't be read.
pub(super) fn templates() -> Vec<PathBuf> {
    let found = descriptors(&DESCRIPTORS.map(Path::new))
        .unwrap_or_default()
        .into_iter();
    let described = found.filter_map(|found| Some(found.mapping.template?.filename));
    let pairs = QemuConf::read().ok().and_then(|conf| conf.firmware());
    let paired = pairs
        .unwrap_or_default()
        .into_iter()
        .map(|(_, template)| template);
    described.chain(paired).collect()
}

/// From the domain, else from the host's descriptors, else from its qemu.conf.
pub(super) fn choose(uefi: &Uefi, nvram: Option<&Nvram>) -> Result<Chosen, Problem> {
    let named = nvram.and_then(|nvram| nvram.template.clone());
    if let (Some(template), Some(_)) = (&named, &uefi.loader) {
        return Ok(Chosen {
            template: template.clone(),
            loader: None,
        });
    }
    let descriptors = descriptors(&DESCRIPTORS.map(Path::new))?;
    match choose_among(&descriptors, uefi, named.as_deref())? {
        Some(found) => Ok(found),
        None => from_qemu_conf(uefi),
    }
}

/// The loader and the template that are written into the XML of a domain which leaves libvirt the choice.
///
/// # Errors
/// When the domain is no UEFI one, or nothing fits it for certain.
pub(crate) fn firmware_of(domain: &Domain) -> Result<(Option<PathBuf>, PathBuf), Problem> {
    let Firmware::Uefi(uefi) = &domain.firmware else {
        return Err(Problem::failed("it does not boot through UEFI"));
    };
    let chosen = choose(uefi, uefi.nvram.as_ref())?;
    let loader = chosen.loader.map(|pin| pin.path).or(uefi.loader.clone());
    Ok((loader, chosen.template))
}

/// The first one that fits; `None` if none does.
fn choose_among(
    descriptors: &[Descriptor],
    uefi: &Uefi,
    template: Option<&Path>,
) -> Result<Option<Chosen>, Problem> {
    if let Some(LaunchSecurity::Other(kind)) = &uefi.wish.launch_security {
        return Err(uncertain(
            uefi,
            format!(
                "it asks for launch security of type {kind:?}, and which firmware libvirt takes for that is not known here"
            ),
        ));
    }
    let wish = Wish { uefi, template };
    let first = |rules| descriptors.iter().find(|descriptor| wish.fits(descriptor, rules));
    let (old, new) = (first(Rules::Before9_2), first(Rules::Since9_2));
    let found = match (old, new) {
        (Some(old), Some(new)) if old.path == new.path => new,
        (None, None) => return Ok(None),
        (old, new) => {
            let name = |found: Option<&Descriptor>| {
                found.map_or("none".to_owned(), |found| found.path.display().to_string())
            };
            return Err(uncertain(
                uefi,
                format!(
                    "which firmware it gets depends on libvirt: by {} before version 9.2, by {} since",
                    name(old),
                    name(new)
                ),
            ));
        }
    };
    let (Some(loader), Some(vars)) = (&found.mapping.executable, &found.mapping.template) else {
        return Err(uncertain(
            uefi,
            format!(
                "libvirt would take the firmware of {}, which keeps no variables",
                found.path.display()
            ),
        ));
    };
    if uefi.loader.is_none() && loader.format != "raw" {
        return Err(uncertain(
            uefi,
            format!(
                "libvirt would take {}, which is {}",
                loader.filename.display(),
                loader.format
            ),
        ));
    }
    Ok(Some(Chosen {
        template: template.map_or_else(|| vars.filename.clone(), Path::to_owned),
        loader: uefi.loader.is_none().then(|| LoaderPin {
            path: loader.filename.clone(),
            secure: found.has("requires-smm"),
        }),
    }))
}

/// The pairs that qemu.conf lists, of which libvirt takes the first with this loader.
fn from_qemu_conf(uefi: &Uefi) -> Result<Chosen, Problem> {
    let unreadable = |error: std::io::Error| {
        Problem::failed(format!("libvirt's qemu.conf can't be read: {}", chain(&error)))
    };
    let pairs = QemuConf::read()
        .map_err(unreadable)?
        .firmware()
        .unwrap_or_default();
    let found = pairs
        .into_iter()
        .find(|(loader, _)| Some(loader) == uefi.loader.as_ref());
    found
        .map(|(_, template)| Chosen {
            template,
            loader: None,
        })
        .ok_or_else(|| {
            uncertain(
                uefi,
                "no firmware descriptor of this host fits it, and no pair in libvirt's qemu.conf".into(),
            )
        })
}

fn uncertain(uefi: &Uefi, why: String) -> Problem {
    let arch = uefi.wish.arch.as_deref().unwrap_or(std::env::consts::ARCH);
    let package = match arch {
        "x86_64" => "the package ovmf or edk2-ovmf",
        "aarch64" => "the package qemu-efi-aarch64 or edk2-aarch64",
        "armv7l" => "the package qemu-efi-arm or edk2-arm",
        "riscv64" => "the package qemu-efi-riscv64 or edk2-riscv64",
        "loongarch64" => "the package qemu-efi-loongarch64 or edk2-loongarch64",
        _ => "the UEFI firmware for its architecture",
    };
    let missing = match &uefi.loader {
        Some(_) => "<nvram template='…'/> in its <os>",
        None => "both in its <os>: <loader readonly='yes' type='pflash'>…</loader> and <nvram template='…'/>",
    };
    Problem::failed(why).next(
        Advice::from(format!("name {missing} in the XML of the VM"))
            .or_else(format!("install {package}, if that is missing ({arch})")),
    )
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::fits::glob;
    use super::*;
    use crate::domain::FirmwareWish;

    /// As Debian has them: enrolled keys first.
    const SET: [(&str, &str, &str, &[&str], &str); 4] = [
        (
            "40-enrolled",
            "/CODE.ms",
            "/VARS.ms",
            &[
                "acpi-s3",
                "amd-sev",
                "enrolled-keys",
                "requires-smm",
                "secure-boot",
            ],
            "pc-q35-*",
        ),
        (
            "50-secure",
            "/CODE.secboot",
            "/VARS",
            &["acpi-s3", "amd-sev", "requires-smm", "secure-boot"],
            "pc-q35-*",
        ),
        ("60-plain", "/CODE", "/VARS", &["acpi-s3", "amd-sev"], "pc-*"),
        ("70-arm", "/ARM", "/ARM.vars", &[], "virt-*"),
    ];

    fn descriptor(loader: &str, vars: &str, features: &[&str], machines: &str) -> String {
        let arch = if machines.starts_with("virt") {
            "aarch64"
        } else {
            "x86_64"
        };
        serde_json::json!({
            "interface-types": ["uefi"],
            "mapping": {
                "device": "flash",
                "executable": {"filename": loader, "format": "raw"},
                "nvram-template": {"filename": vars, "format": "raw"},
            },
            "targets": [{"architecture": arch, "machines": [machines]}],
            "features": features,
        })
        .to_string()
    }

    fn set() -> Vec<Descriptor> {
        let directory = tempfile::tempdir().unwrap();
        for (name, loader, vars, features, machines) in SET {
            let text = descriptor(loader, vars, features, machines);
            fs::write(directory.path().join(format!("{name}.json")), text).unwrap();
        }
        descriptors(&[directory.path()]).unwrap()
    }

    fn chosen(os: &str, more: &str) -> Result<Option<(PathBuf, PathBuf, bool)>, String> {
        let machine = if os.contains("<type") {
            ""
        } else {
            "<type arch='x86_64' machine='pc-q35-7.2'>hvm</type>"
        };
        let xml = format!(
            "<domain type='kvm'><name>a</name><uuid>{}</uuid><os firmware='efi'>{machine}{os}</os>{more}</domain>",
            uuid::Uuid::new_v4()
        );
        let Firmware::Uefi(uefi) = Domain::parse(&xml).unwrap().firmware else {
            panic!("{xml}");
        };
        let template = uefi.nvram.as_ref().and_then(|nvram| nvram.template.clone());
        let found =
            choose_among(&set(), &uefi, template.as_deref()).map_err(|failure| failure.to_string())?;
        Ok(found.map(|found| {
            let (loader, secure) = found.loader.map_or_else(
                || (uefi.loader.clone().unwrap(), false),
                |pin| (pin.path, pin.secure),
            );
            (loader, found.template, secure)
        }))
    }

    fn is(os: &str, more: &str, expected: (&str, &str, bool)) {
        let (loader, template, secure) = expected;
        assert_eq!(
            chosen(os, more),
            Ok(Some((loader.into(), template.into(), secure))),
            "{os} {more}"
        );
    }

    const ENROLLED: (&str, &str, bool) = ("/CODE.ms", "/VARS.ms", true);
    const SECURE: (&str, &str, bool) = ("/CODE.secboot", "/VARS", true);
    const PLAIN: (&str, &str, bool) = ("/CODE", "/VARS", false);

    #[test]
    fn the_first_that_fits_everything_is_taken() {
        let feature = |name: &str, enabled: &str| {
            format!("<firmware><feature enabled='{enabled}' name='{name}'/></firmware>")
        };
        is("", "", ENROLLED);
        is("<loader secure='yes'/>", "", ENROLLED);
        is(&feature("enrolled-keys", "yes"), "", ENROLLED);
        is(&feature("enrolled-keys", "no"), "", SECURE);
        is(&feature("secure-boot", "yes"), "", ENROLLED);
        is(&feature("secure-boot", "no"), "", PLAIN);
        is(
            "<type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type>",
            "",
            PLAIN,
        );
        is(
            "<type arch='aarch64' machine='virt-7.2'>hvm</type>",
            "",
            ("/ARM", "/ARM.vars", false),
        );
        is("", "<pm><suspend-to-mem enabled='yes'/></pm>", ENROLLED);
        is(
            "",
            "<launchSecurity type='sev'><policy>0x0003</policy></launchSecurity>",
            ENROLLED,
        );
        // A loader that is named.
        is(
            "<loader type='pflash'>/CODE.secboot</loader>",
            "",
            ("/CODE.secboot", "/VARS", false),
        );
    }

    #[test]
    fn what_fits_nothing_or_is_not_certain_is_not_chosen() {
        for (os, more) in [
            ("<type arch='riscv64' machine='virt'>hvm</type>", ""),
            (
                "<type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type><loader secure='yes'/>",
                "",
            ),
            ("", "<pm><suspend-to-disk enabled='yes'/></pm>"),
            (
                "",
                "<launchSecurity type='sev'><policy>0x0007</policy></launchSecurity>",
            ),
            ("<loader type='pflash'>/own</loader>", ""),
        ] {
            assert_eq!(chosen(os, more), Ok(None), "{os} {more}");
        }
        for (os, more, word) in [
            // Secure Boot would be gone where libvirt 9.0 refuses.
            ("", "<features><smm state='off'/></features>", "60-plain"),
            ("<loader secure='no'/>", "", "60-plain"),
            ("<nvram template='/VARS'/>", "", "50-secure"),
            ("", "<launchSecurity type='tdx'/>", "tdx"),
        ] {
            let refused = chosen(os, more).unwrap_err();
            assert!(refused.contains(word) && refused.contains("<loader"), "{refused}");
        }
    }

    #[test]
    fn advice_fits_the_architecture() {
        let wish = |arch: &str| Uefi {
            wish: FirmwareWish {
                arch: Some(arch.into()),
                ..FirmwareWish::default()
            },
            loader: None,
            stateless: false,
            nvram: None,
        };
        for (arch, package) in [
            ("x86_64", "ovmf"),
            ("aarch64", "qemu-efi-aarch64"),
            ("s390x", "s390x"),
        ] {
            let next = uncertain(&wish(arch), "nothing fits".into())
                .advice
                .unwrap()
                .to_string();
            assert!(next.contains(package), "{next}");
            assert_eq!(next.contains("ovmf"), arch == "x86_64", "{next}");
        }
    }

    #[test]
    fn a_later_directory_replaces_or_masks_by_name_and_rubbish_stops_the_choice() {
        let (vendor, admin) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let text = |name: &str| descriptor(name, "/vars", &[], "pc-*");
        fs::write(vendor.path().join("50-a.json"), text("/vendor")).unwrap();
        fs::write(vendor.path().join("60-b.json"), text("/other")).unwrap();
        fs::write(vendor.path().join("70-c.json"), text("/masked")).unwrap();
        fs::write(vendor.path().join("80-d.json"), text("/linked")).unwrap();
        fs::write(vendor.path().join(".hidden.json"), "{").unwrap();
        fs::write(admin.path().join("50-a.json"), text("/admin")).unwrap();
        fs::write(admin.path().join("70-c.json"), "").unwrap();
        std::os::unix::fs::symlink("/dev/null", admin.path().join("80-d.json")).unwrap();
        let dirs = [vendor.path(), admin.path(), Path::new("/nonexistent")];
        let names: Vec<_> = descriptors(&dirs)
            .unwrap()
            .into_iter()
            .map(|found| found.mapping.executable.unwrap().filename)
            .collect();
        assert_eq!(names, [PathBuf::from("/admin"), PathBuf::from("/other")]);
        fs::write(admin.path().join("90-e.json"), "{").unwrap();
        assert!(descriptors(&dirs).unwrap_err().to_string().contains("90-e.json"));
    }

    #[test]
    fn patterns_are_those_of_glib() {
        for (pattern, text) in [
            ("pc-q35-*", "pc-q35-7.2"),
            ("*", ""),
            ("v?rt", "virt"),
            ("a*b*c", "axxbyyc"),
        ] {
            assert!(glob(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [
            ("pc-q35-*", "pc-i440fx-7.2"),
            ("virt", "virt-7.2"),
            ("?", ""),
            ("a*b", "ac"),
        ] {
            assert!(!glob(pattern, text), "{pattern} {text}");
        }
    }
}
