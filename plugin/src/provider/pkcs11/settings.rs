//! What a PKCS#11 provider remembers of its token: the `settings` of its keystore row. Never a PIN.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::model::envelope::ProviderId;
use crate::provider::ScopeSetting;
use crate::provider::setting::{Description, Form, Key, Settings};

pub(in crate::provider) const SETTINGS: Settings = Settings {
    keys: &[
        Key::tried("module", &["module"], Form::Text),
        Key::tried("token_label", &["token", "label"], Form::Choice),
        Key::tried("token_serial", &["token", "serial"], Form::Choice),
        Key::tried("slot", &["token", "slot"], Form::NumberChoice),
        Key::fixed(
            "serial",
            &["serial"],
            "it is the token that was added, and no other one gets to see the PIN",
        ),
        Key::free("key_bits", &["key_bits"], Form::Number),
        Key::free("kek_scope", &["kek_scope"], Form::Text),
        Key::fixed(
            "init_args",
            &["init_args"],
            "a module is initialized once; delete the provider and add it again, its keys stay in the token",
        ),
        Description::KEY,
    ],
    check: |json| {
        Ok(serde_json::to_value(serde_json::from_value::<Pkcs11Settings>(
            json,
        )?)?)
    },
};

/// Which module, which token, which keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pkcs11Settings {
    /// The module, a shared library; absolute.
    pub module: PathBuf,
    /// How its token is found.
    pub token: TokenChoice,
    /// The size of new KEKs.
    #[serde(default)]
    pub key_bits: KeyBits,
    /// Whom a new KEK serves.
    #[serde(default = "one_for_all")]
    pub kek_scope: ScopeSetting,
    /// The string that a module such as NSS wants for `C_Initialize`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_args: Option<String>,
    /// The serial number of the token that was added: no other one gets to see the PIN. None where the token tells none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// The host that added it, for the labels of KEKs.
    #[serde(default)]
    pub host: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<Description>,
    /// In a request to add a provider: the one that the token's KEKs were made for, where the token does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<ProviderId>,
}

/// How a token is found among those of its module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum TokenChoice {
    Label(String),
    /// By its serial number.
    Serial(String),
    /// By the number of its slot; needs nothing of the token itself.
    Slot(u64),
}

impl fmt::Display for TokenChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Label(label) => write!(f, "token labelled '{label}'"),
            Self::Serial(serial) => write!(f, "token with serial number '{serial}'"),
            Self::Slot(slot) => write!(f, "token in slot {slot}"),
        }
    }
}

/// The size of an AES key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub(crate) enum KeyBits {
    Aes128 = 128,
    Aes192 = 192,
    #[default]
    Aes256 = 256,
}

impl KeyBits {
    pub(super) fn bytes(self) -> usize {
        self as usize / 8
    }
}

impl From<KeyBits> for u32 {
    fn from(bits: KeyBits) -> Self {
        bits as Self
    }
}

impl TryFrom<u32> for KeyBits {
    type Error = SettingsError;

    fn try_from(bits: u32) -> Result<Self, SettingsError> {
        match bits {
            128 => Ok(Self::Aes128),
            192 => Ok(Self::Aes192),
            256 => Ok(Self::Aes256),
            _ => Err(SettingsError::KeyBits(bits)),
        }
    }
}

/// Tokens hold few objects.
fn one_for_all() -> ScopeSetting {
    ScopeSetting::Provider
}

impl Pkcs11Settings {
    /// Whether the module may be loaded: what it does, it does as root.
    ///
    /// # Errors
    /// When it is no absolute path of a file that only root (or whoever runs this) can change.
    pub(super) fn check_module(&self) -> Result<(), SettingsError> {
        let path = &self.module;
        if !path.is_absolute() {
            return Err(SettingsError::Relative(path.clone()));
        }
        let found = fs::metadata(path).map_err(|source| SettingsError::NoModule {
            path: path.clone(),
            source,
        })?;
        let ours = found.uid() == 0 || found.uid() == nix::unistd::geteuid().as_raw();
        if !found.is_file() || !ours || found.mode() & 0o022 != 0 {
            return Err(SettingsError::ModuleOfOthers(path.clone()));
        }
        match &self.init_args {
            Some(args) if args.contains('\0') => Err(SettingsError::InitArgs),
            _ => Ok(()),
        }
    }
}

/// The name of this host, for the labels of KEKs.
pub(super) fn host_name() -> String {
    let name = fs::read_to_string(Path::new("/proc/sys/kernel/hostname")).unwrap_or_default();
    let plain = |c: &char| c.is_ascii_alphanumeric() || *c == '-' || *c == '.';
    name.trim().chars().filter(plain).take(64).collect()
}

/// Why settings can't be used.
#[derive(Debug, Error)]
pub(crate) enum SettingsError {
    #[error("AES has keys of 128, 192 and 256 bits, not of {0}")]
    KeyBits(u32),
    /// A path that depends on where the daemon was started.
    #[error("the path of the module must be absolute, not '{}'", .0.display())]
    Relative(PathBuf),
    #[error("can't load the module {}", path.display())]
    NoModule {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// Whoever can change it would get the PIN and every key.
    #[error("others than root can change the module {}", .0.display())]
    ModuleOfOthers(PathBuf),
    #[error("the arguments of C_Initialize hold a NUL")]
    InitArgs,
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn settings(module: &Path) -> Pkcs11Settings {
        let json = serde_json::json!({"module": module, "token": {"label": "kek"}});
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn defaults_are_one_aes_256_key_for_all_vms() {
        let settings = settings(Path::new("/m.so"));
        assert_eq!(settings.key_bits, KeyBits::Aes256);
        assert_eq!(settings.kek_scope, ScopeSetting::Provider);
    }

    #[test]
    fn settings_survive_the_keystore_and_unknown_ones_are_refused() {
        for token in [
            serde_json::json!({"slot": 7}),
            serde_json::json!({"serial": "0af"}),
        ] {
            let json =
                serde_json::json!({"module": "/m.so", "token": token, "key_bits": 128, "kek_scope": "vm"});
            let settings: Pkcs11Settings = serde_json::from_value(json).unwrap();
            let stored = serde_json::to_value(&settings).unwrap();
            assert_eq!(
                serde_json::from_value::<Pkcs11Settings>(stored).unwrap(),
                settings
            );
        }
        for bad in [
            r#"{"module": "/m.so", "token": {"label": "a"}, "pin": "1234"}"#,
            r#"{"module": "/m.so", "token": {"label": "a"}, "key_bits": 512}"#,
            r#"{"module": "/m.so", "token": {"slot": -1}}"#,
            r#"{"module": "/m.so"}"#,
        ] {
            assert!(serde_json::from_str::<Pkcs11Settings>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn module_must_be_ours_alone() {
        let dir = tempfile::tempdir().unwrap();
        let module = dir.path().join("m.so");
        assert!(matches!(
            settings(Path::new("m.so")).check_module(),
            Err(SettingsError::Relative(_))
        ));
        assert!(matches!(
            settings(&module).check_module(),
            Err(SettingsError::NoModule { .. })
        ));
        fs::write(&module, "").unwrap();
        fs::set_permissions(&module, fs::Permissions::from_mode(0o644)).unwrap();
        settings(&module).check_module().unwrap();
        fs::set_permissions(&module, fs::Permissions::from_mode(0o664)).unwrap();
        assert!(matches!(
            settings(&module).check_module(),
            Err(SettingsError::ModuleOfOthers(_))
        ));
    }
}
