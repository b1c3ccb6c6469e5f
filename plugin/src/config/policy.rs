//! The section `policy:`, for the host and for single VMs.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, de};

use crate::domain::{Domain, Permission, Policy};

/// What the host allows, and what it allows to single VMs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policies {
    memory_on_disk: Setting,
    mixed_disks: Setting,
    plain_backing: Setting,
    migration_tls: Setting,
    /// By name or UUID. What is not set there is as for the host.
    vms: BTreeMap<String, OfVm>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct OfVm {
    memory_on_disk: Setting,
    mixed_disks: Setting,
    plain_backing: Setting,
    migration_tls: Setting,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Setting(Option<Permission>);

impl<'de> Deserialize<'de> for Setting {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Bool(bool),
            Word(String),
        }
        let permission = match Written::deserialize(deserializer)? {
            Written::Bool(true) => Permission::Yes,
            Written::Bool(false) => Permission::No,
            // YAML 1.2 has these as words.
            Written::Word(word) if word == "yes" => Permission::Yes,
            Written::Word(word) if word == "no" => Permission::No,
            Written::Word(other) => return Err(de::Error::custom(format!("'{other}' is not yes or no"))),
        };
        Ok(Self(Some(permission)))
    }
}

impl Policies {
    /// The keys, for the host and below each VM.
    pub(super) const KEYS: [&str; 4] = ["memory_on_disk", "mixed_disks", "plain_backing", "migration_tls"];
    /// The key that holds those of single VMs.
    pub(super) const VMS: &str = "vms";

    /// What holds for this VM: what is set for its UUID, else for its name, else for the host.
    #[must_use]
    pub fn of(&self, domain: &Domain) -> Policy {
        let by_uuid = self.vms.get(&domain.uuid.to_string());
        let by_name = self.vms.get(&domain.name);
        let setting = |of_vm: fn(&OfVm) -> Setting, of_host: Setting| {
            by_uuid
                .and_then(|vm| of_vm(vm).0)
                .or_else(|| by_name.and_then(|vm| of_vm(vm).0))
                .or(of_host.0)
                .unwrap_or_default()
        };
        Policy {
            memory_on_disk: setting(|vm| vm.memory_on_disk, self.memory_on_disk),
            mixed_disks: setting(|vm| vm.mixed_disks, self.mixed_disks),
            plain_backing: setting(|vm| vm.plain_backing, self.plain_backing),
            migration_tls: setting(|vm| vm.migration_tls, self.migration_tls),
        }
    }

    /// The first key in the section that does not exist, if the section is one.
    pub(super) fn unknown_key(section: &serde_yaml::Value) -> Option<String> {
        let section = section.as_mapping()?;
        let unknown = |section: &serde_yaml::Mapping, more: &[&str]| {
            section
                .keys()
                .filter_map(serde_yaml::Value::as_str)
                .find(|key| !Self::KEYS.contains(key) && !more.contains(key))
                .map(str::to_owned)
        };
        unknown(section, &[Self::VMS]).or_else(|| {
            let vms = section.get(Self::VMS)?.as_mapping()?;
            vms.values()
                .filter_map(serde_yaml::Value::as_mapping)
                .find_map(|vm| unknown(vm, &[]))
        })
    }
}
