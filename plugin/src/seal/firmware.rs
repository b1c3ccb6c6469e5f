//! Which UEFI image a domain boots, and which template its variable store starts from.
//!
//! Where the domain does not say, the host's firmware descriptors do: JSON files as QEMU's
//! `docs/interop/firmware.json` specifies them, read in libvirt's order.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::domain::{Nvram, Uefi, edit::LoaderPin};
use crate::failure::{Code, Failure};

/// What the variable store is made from.
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) template: PathBuf,
    /// Set where libvirt would still be choosing at the start.
    pub(super) loader: Option<LoaderPin>,
}

const DESCRIPTORS: [&str; 2] = ["/usr/share/qemu/firmware", "/etc/qemu/firmware"];

/// The templates that the host's descriptors name.
pub(super) fn templates() -> Vec<PathBuf> {
    let found = descriptors(&DESCRIPTORS.map(Path::new)).into_iter();
    found
        .filter_map(|found| Some(found.mapping.template?.filename))
        .collect()
}

/// From the domain, else from the host's descriptors.
pub(super) fn choose(uefi: &Uefi, nvram: Option<&Nvram>) -> Result<Chosen, Failure> {
    let named = nvram.and_then(|nvram| nvram.template.clone());
    if let (Some(template), Some(_)) = (&named, &uefi.loader) {
        return Ok(Chosen {
            template: template.clone(),
            loader: None,
        });
    }
    let found = descriptors(&DESCRIPTORS.map(Path::new))
        .into_iter()
        .filter(Descriptor::is_uefi_on_flash)
        .find(|descriptor| match &uefi.loader {
            Some(loader) => descriptor
                .mapping
                .executable
                .as_ref()
                .is_some_and(|file| file.filename == *loader),
            None => {
                descriptor.serves_x86_64()
                    && descriptor.is_secure() == uefi.secure
                    && !descriptor.is_enrolled()
            }
        });
    let files = found.and_then(|found| {
        Some((
            found.mapping.executable?.filename,
            found.mapping.template?.filename,
        ))
    });
    let Some((loader, template)) = files else {
        return Err(Failure::new(
            Code::Failed,
            "no template for its UEFI variables is known on this host",
        )
        .next("apt install ovmf, or name one: <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'/>"));
    };
    Ok(Chosen {
        template: named.unwrap_or(template),
        loader: uefi.loader.is_none().then_some(LoaderPin {
            path: loader,
            secure: uefi.secure,
        }),
    })
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Descriptor {
    interface_types: Vec<String>,
    mapping: Mapping,
    #[serde(default)]
    targets: Vec<Target>,
    #[serde(default)]
    features: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Mapping {
    device: String,
    executable: Option<FirmwareFile>,
    #[serde(rename = "nvram-template")]
    template: Option<FirmwareFile>,
}

#[derive(Debug, Deserialize)]
struct FirmwareFile {
    filename: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Target {
    architecture: String,
}

impl Descriptor {
    fn is_uefi_on_flash(&self) -> bool {
        self.mapping.device == "flash" && self.interface_types.iter().any(|kind| kind == "uefi")
    }

    fn serves_x86_64(&self) -> bool {
        self.targets.iter().any(|target| target.architecture == "x86_64")
    }

    fn is_secure(&self) -> bool {
        self.has("requires-smm")
    }

    fn is_enrolled(&self) -> bool {
        self.has("enrolled-keys")
    }

    fn has(&self, feature: &str) -> bool {
        self.features.iter().any(|found| found == feature)
    }
}

/// By file name; a later directory replaces a file of the same name, as libvirt has it. One that can't be read is
/// no use to libvirt either.
fn descriptors(dirs: &[&Path]) -> Vec<Descriptor> {
    let mut by_name = BTreeMap::new();
    for entry in dirs
        .iter()
        .filter_map(|dir| fs::read_dir(dir).ok())
        .flatten()
        .flatten()
    {
        by_name.insert(entry.file_name(), entry.path());
    }
    by_name
        .into_values()
        .filter_map(|path| serde_json::from_slice(&fs::read(path).ok()?).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_directory_replaces_by_name_and_rubbish_is_passed_over() {
        let (vendor, admin) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let descriptor = |name: &str| {
            format!(
                r#"{{"interface-types":["uefi"],"mapping":{{"device":"flash","executable":{{"filename":"/{name}"}},
                "nvram-template":{{"filename":"/{name}.vars"}}}},"targets":[{{"architecture":"x86_64"}}]}}"#
            )
        };
        fs::write(vendor.path().join("50-a.json"), descriptor("vendor")).unwrap();
        fs::write(vendor.path().join("60-b.json"), descriptor("other")).unwrap();
        fs::write(vendor.path().join("70-c.json"), "{").unwrap();
        fs::write(admin.path().join("50-a.json"), descriptor("admin")).unwrap();
        let found = descriptors(&[vendor.path(), admin.path(), Path::new("/nonexistent")]);
        let names: Vec<_> = found
            .into_iter()
            .map(|found| found.mapping.executable.unwrap().filename)
            .collect();
        assert_eq!(names, [PathBuf::from("/admin"), PathBuf::from("/other")]);
    }
}
