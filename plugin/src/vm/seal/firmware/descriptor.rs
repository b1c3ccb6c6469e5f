//! The host's firmware descriptors (QEMU's `docs/interop/firmware.json`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::model::problem::{Problem, chain};

pub(super) const DESCRIPTORS: [&str; 2] = ["/usr/share/qemu/firmware", "/etc/qemu/firmware"];

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Descriptor {
    #[serde(skip)]
    pub(super) path: PathBuf,
    pub(super) interface_types: Vec<String>,
    pub(super) mapping: Mapping,
    #[serde(default)]
    pub(super) targets: Vec<Target>,
    #[serde(default)]
    pub(super) features: Vec<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Mapping {
    pub(super) device: String,
    pub(super) mode: Option<String>,
    pub(super) executable: Option<FirmwareFile>,
    #[serde(rename = "nvram-template")]
    pub(super) template: Option<FirmwareFile>,
}

#[derive(Debug, Deserialize)]
pub(super) struct FirmwareFile {
    pub(super) filename: PathBuf,
    #[serde(default)]
    pub(super) format: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Target {
    pub(super) architecture: String,
    #[serde(default)]
    pub(super) machines: Vec<String>,
}

impl Descriptor {
    pub(super) fn has(&self, feature: &str) -> bool {
        self.features.iter().any(|found| found == feature)
    }
}

/// By file name; a later directory replaces a file of the same name, and an empty file or a link to /dev/null masks it.
/// libvirt starts nothing by itself while it can't read one of them, and neither does this choose.
pub(super) fn descriptors(dirs: &[&Path]) -> Result<Vec<Descriptor>, Problem> {
    let mut by_name = BTreeMap::new();
    for entry in dirs
        .iter()
        .filter_map(|dir| fs::read_dir(dir).ok())
        .flatten()
        .flatten()
    {
        let is_hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        if !is_hidden && !entry.path().is_dir() {
            by_name.insert(entry.file_name(), entry.path());
        }
    }
    let mut found = Vec::new();
    for path in by_name.into_values() {
        let unreadable = |why: String| {
            Problem::failed(format!(
                "the firmware descriptor {} can't be read ({why}), so that libvirt's choice is not known",
                path.display()
            ))
            .next(format!(
                "mend it, or put an empty file of that name into {}",
                DESCRIPTORS[1]
            ))
        };
        let is_mask = fs::metadata(&path).is_ok_and(|found| found.len() == 0);
        if is_mask {
            continue;
        }
        let text = fs::read(&path).map_err(|error| unreadable(chain(&error)))?;
        let descriptor: Descriptor =
            serde_json::from_slice(&text).map_err(|error| unreadable(chain(&error)))?;
        found.push(Descriptor { path, ..descriptor });
    }
    Ok(found)
}
