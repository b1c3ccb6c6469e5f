//! The section `policy:`, for the host and for single VMs.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, de};

use crate::domain::{Domain, Permission, Policy};

macro_rules! permissions {
    ($($key:ident),*) => {
        /// What the host allows, and what it allows to single VMs.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub(crate) struct Policies {
            $($key: Setting,)*
            /// By name or UUID. What is not set there is as for the host.
            vms: BTreeMap<String, OfVm>,
        }

        #[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        struct OfVm {
            $($key: Setting,)*
        }

        impl Policies {
            /// The keys, for the host and below each VM.
            pub(super) const KEYS: &[&str] = &[$(stringify!($key)),*];

            /// What holds for this VM: what is set for its UUID, else for its name, else for the host.
            pub(crate) fn of(&self, domain: &Domain) -> Policy {
                let uuid = domain.uuid.to_string();
                let of_vm = [&uuid, &domain.name].map(|key| self.vms.get(key));
                let setting = |of: fn(&OfVm) -> Setting, of_host: Setting| {
                    let set = of_vm.iter().flatten().find_map(|vm| of(vm).0);
                    set.or(of_host.0).unwrap_or_default()
                };
                Policy { $($key: setting(|vm| vm.$key, self.$key),)* }
            }
        }
    };
}

permissions!(memory_on_disk, mixed_disks, plain_backing, migration_tls);

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
    /// The key that holds those of single VMs.
    pub(super) const VMS: &str = "vms";

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
