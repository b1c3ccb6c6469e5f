//! What a transit provider needs to know: the `settings` of its keystore row. No secret is among them.
//!
//! Every part is checked when it is read, so that what reaches a request can't change its path or its headers.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::api::CredentialKind;
use crate::model::deadlines::provider::TIMEOUTS_MS;
use crate::model::deadlines::transit::TIMEOUT_MS;
use crate::model::envelope::ProviderId;
use crate::provider::ScopeSetting;
use crate::provider::setting::{Description, Form, Key, Settings};

pub(in crate::provider) const SETTINGS: Settings = Settings {
    keys: &[
        Key::tried("address", &["address"], Form::Text),
        Key::tried("mount", &["mount"], Form::Text),
        Key::tried("namespace", &["namespace"], Form::Text),
        Key::tried("auth", &["auth", "method"], Form::Choice),
        Key::tried("role_id", &["auth", "role_id"], Form::Text),
        Key::tried("cert_role", &["auth", "role"], Form::Text),
        Key::tried("auth_mount", &["auth", "mount"], Form::Text),
        Key::tried("ca", &["ca"], Form::Text),
        Key::tried("server_name", &["server_name"], Form::Text),
        Key::tried("timeout_ms", &["timeout_ms"], Form::Number),
        Key::free("kek_scope", &["kek_scope"], Form::Text),
        Key::fixed(
            "key",
            &["key"],
            "what was sealed under it would not open any more",
        ),
        Description::KEY,
    ],
    check: |json| {
        let settings = serde_json::from_value::<TransitSettings>(json)?.validated()?;
        Ok(serde_json::to_value(settings)?)
    },
};

/// Where the server is, how to log in, and which keys to use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TransitSettings {
    /// Of the server, or of what balances the load of its cluster.
    pub address: Address,
    /// Where the transit engine is mounted.
    #[serde(default = "ApiPath::transit")]
    pub mount: ApiPath,
    /// The namespace of engine and login.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<ApiPath>,
    /// How to log in.
    pub auth: Auth,
    /// A key per VM, or one shared key with `derived=true`, from which the server derives one per VM by its UUID as context.
    #[serde(default)]
    pub kek_scope: ScopeSetting,
    /// The shared key's name; `virtseal-` and the provider's id unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<KeyName>,
    /// A PEM file with the certificates to trust in place of the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// The name that the server's certificate has to have, where it is not the address's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_name: Option<HostName>,
    /// What an admin notes of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<Description>,
    /// The provider's id on another host, to be the same one here: both open what the other sealed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<ProviderId>,
    /// The most time for one operation, in milliseconds.
    #[serde(default = "default_timeout_ms")]
    pub timeout_ms: u32,
}

impl TransitSettings {
    /// Reads the JSON of settings.
    pub(crate) fn parse(json: &str) -> Result<Self, SettingsError> {
        serde_json::from_str::<Self>(json)?.validated()
    }

    /// Checks what can't be told from one field alone.
    pub(crate) fn validated(self) -> Result<Self, SettingsError> {
        if let Some(ca) = self.ca.as_ref().filter(|ca| !ca.is_absolute()) {
            return Err(SettingsError::RelativeCa(ca.clone()));
        }
        if !TIMEOUTS_MS.contains(&self.timeout_ms.into()) {
            return Err(SettingsError::Timeout(self.timeout_ms));
        }
        if self.key.is_some() && self.kek_scope == ScopeSetting::Vm {
            return Err(SettingsError::KeyWithoutScope);
        }
        if matches!(self.auth, Auth::Cert { .. }) && !self.address.is_tls() {
            return Err(SettingsError::CertWithoutTls(self.address));
        }
        Ok(self)
    }

    /// The most time for one operation.
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms.into())
    }
}

fn default_timeout_ms() -> u32 {
    TIMEOUT_MS
}

/// How to log in. The secret that belongs to it is given when the provider is unlocked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum Auth {
    /// The secret is a token.
    Token {},
    /// The secret is the secret id of an AppRole.
    AppRole {
        role_id: String,
        /// Where the method is mounted.
        #[serde(default = "ApiPath::approle")]
        mount: ApiPath,
    },
    /// The secret is a PEM file with a client's private key and certificate.
    Cert {
        /// The certificate role; any that fits unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        role: Option<String>,
        /// Where the method is mounted.
        #[serde(default = "ApiPath::cert")]
        mount: ApiPath,
    },
}

impl Auth {
    /// What the secret is.
    pub(super) fn credential(&self) -> CredentialKind {
        match self {
            Self::Token {} => CredentialKind::Token,
            Self::AppRole { .. } => CredentialKind::SecretId,
            Self::Cert { .. } => CredentialKind::ClientKey,
        }
    }
}

/// `https://HOST[:PORT]`; plain `http` only to this host itself, for keys would cross the network in the clear.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Address(String);

impl Address {
    /// The address, without a slash at its end.
    #[cfg(test)]
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is `https`.
    pub(crate) fn is_tls(&self) -> bool {
        self.0.starts_with("https://")
    }
}

impl TryFrom<String> for Address {
    type Error = SettingsError;

    fn try_from(text: String) -> Result<Self, SettingsError> {
        let wrong = || SettingsError::Address(text.clone());
        let uri: ureq::http::Uri = text.parse().map_err(|_| wrong())?;
        let authority = uri.authority().ok_or_else(wrong)?;
        let loopback = || {
            let host = authority
                .host()
                .trim_start_matches('[')
                .trim_end_matches(']')
                .to_owned();
            host == "localhost"
                || host
                    .parse::<std::net::IpAddr>()
                    .is_ok_and(|address| address.is_loopback())
        };
        let bare =
            matches!(uri.path(), "" | "/") && uri.query().is_none() && !authority.as_str().contains('@');
        match uri.scheme_str() {
            Some("https") if bare => {}
            Some("http") if bare && loopback() => {}
            Some("http") if bare => return Err(SettingsError::PlainHttp(text)),
            _ => return Err(wrong()),
        }
        Ok(Self(text.trim_end_matches('/').to_owned()))
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.0
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

macro_rules! checked_text {
    ($(#[$doc:meta])* $name:ident, $what:literal, $fits:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub(crate) struct $name(String);

        impl $name {
            pub(crate) fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl TryFrom<String> for $name {
            type Error = SettingsError;

            fn try_from(text: String) -> Result<Self, SettingsError> {
                let fits: fn(&str) -> bool = $fits;
                if fits(&text) { Ok(Self(text)) } else { Err(SettingsError::Text { what: $what, text }) }
            }
        }
        impl From<$name> for String {
            fn from(text: $name) -> Self {
                text.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

checked_text!(
    /// Where something is in the server's API: words with slashes between them.
    ApiPath, "a mount or namespace", |text| text.len() <= 256 && text.split('/').all(is_word)
);
checked_text!(
    /// A key of the transit engine.
    KeyName, "a key's name", is_word
);
checked_text!(
    /// The name in a server's certificate.
    HostName, "a server's name", |text| is_word(text) && !text.contains('_')
);

impl ApiPath {
    fn transit() -> Self {
        Self("transit".to_owned())
    }

    /// Where the AppRole method usually is.
    pub(crate) fn approle() -> Self {
        Self("approle".to_owned())
    }

    /// Where the certificate method usually is.
    pub(crate) fn cert() -> Self {
        Self("cert".to_owned())
    }
}

fn is_word(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && text.as_bytes()[0].is_ascii_alphanumeric()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

/// Why settings can't be used.
#[derive(Debug, Error)]
pub(crate) enum SettingsError {
    #[error("{0:?} is not the address of a server: give https://HOST:PORT")]
    Address(String),
    #[error("{0:?} would send keys over the network in the clear: use https (http is for 127.0.0.1 only)")]
    PlainHttp(String),
    #[error("{text:?} can't be {what}: use letters, digits, '.', '_' and '-', the first a letter or a digit")]
    Text {
        /// What it was to be.
        what: &'static str,
        /// What it is.
        text: String,
    },
    /// The daemon's working directory is not the user's.
    #[error("{} must be an absolute path", .0.display())]
    RelativeCa(PathBuf),
    #[error("a timeout of {0} ms makes no sense: use 100 to 60000")]
    Timeout(u32),
    /// A shared key's name, and no shared key.
    #[error("a key's name is for a shared key: add --kek-scope provider")]
    KeyWithoutScope,
    #[error("login by certificate needs an https address, not {0}")]
    CertWithoutTls(Address),
    #[error("{option} is for {belongs_to}")]
    Option {
        option: &'static str,
        /// What it is for.
        belongs_to: &'static str,
    },
    #[error("the settings can't be read")]
    Json(#[from] serde_json::Error),
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(value: serde_json::Value) -> Result<TransitSettings, SettingsError> {
        serde_json::from_value::<TransitSettings>(value)?.validated()
    }

    #[test]
    fn little_is_enough_and_nothing_is_lost() {
        let settings =
            parse(json!({"address": "https://kms.example:8200/", "auth": {"method": "token"}})).unwrap();
        assert_eq!(settings.address.as_str(), "https://kms.example:8200");
        assert_eq!(
            (settings.mount.as_str(), settings.kek_scope),
            ("transit", ScopeSetting::Vm)
        );
        assert_eq!(settings.timeout(), Duration::from_secs(4));
        let full = parse(json!({
            "address": "https://[::1]:8200", "mount": "kms/transit", "namespace": "team/a",
            "auth": {"method": "approle", "role_id": "r", "mount": "hosts"}, "kek_scope": "provider", "key": "vms",
            "ca": "/etc/ca.pem", "server_name": "kms.example", "timeout_ms": 900
        }))
        .unwrap();
        assert_eq!(parse(serde_json::to_value(&full).unwrap()).unwrap(), full);
    }

    #[test]
    fn what_would_change_a_request_is_refused() {
        for address in [
            "kms:8200",
            "https://",
            "https://u@kms",
            "https://kms/v1",
            "https://kms?x",
            "ftp://kms",
            "",
        ] {
            assert!(Address::try_from(address.to_owned()).is_err(), "{address}");
        }
        for mount in [
            "", "/transit", "transit/", "a//b", "../sys", "a/..", "a b", "a?b", "a#b", "ä", "a\n",
        ] {
            assert!(ApiPath::try_from(mount.to_owned()).is_err(), "{mount}");
        }
        for key in ["a/b", ".", "", &"x".repeat(129)] {
            assert!(KeyName::try_from(key.to_owned()).is_err(), "{key}");
        }
    }

    #[test]
    fn keys_do_not_cross_a_network_in_the_clear() {
        for address in ["http://127.0.0.1:8200", "http://localhost:8200", "http://[::1]:1"] {
            assert!(Address::try_from(address.to_owned()).is_ok(), "{address}");
        }
        for address in [
            "http://kms.example:8200",
            "http://10.0.0.1:8200",
            "http://127.0.0.1.example",
        ] {
            let error = Address::try_from(address.to_owned()).unwrap_err();
            assert!(matches!(error, SettingsError::PlainHttp(_)), "{address}");
        }
    }

    #[test]
    fn contradictions_and_misspelt_keys_are_named() {
        let with = |field: &str, value: serde_json::Value| {
            let mut settings = json!({"address": "http://127.0.0.1:8200", "auth": {"method": "token"}});
            settings[field] = value;
            crate::model::problem::chain(&parse(settings).unwrap_err())
        };
        assert!(with("tokn", json!("x")).contains("unknown field `tokn`"));
        assert!(with("ca", json!("ca.pem")).contains("absolute"));
        assert!(with("key", json!("vms")).contains("--kek-scope provider"));
        assert!(with("timeout_ms", json!(5)).contains("makes no sense"));
        assert!(with("auth", json!({"method": "cert"})).contains("https"));
        assert!(with("auth", json!({"method": "token", "token": "s.x"})).contains("unknown field `token`"));
    }
}
