//! The text that holds a root key: what is sealed in the keystore and in backups.
//!
//! JSON, so that a person with nothing but `age` and an editor can read it. The check value is the first 8 bytes
//! of SHA-256 over a label, the provider's UUID, the generation (4 bytes, big-endian) and the key: a mistyped or
//! half-copied backup is noticed before anything is wrapped with it.

use std::io;

use openssl::error::ErrorStack;
use openssl::hash::{Hasher, MessageDigest};
use serde::Deserialize;
use thiserror::Error;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::envelope::ProviderId;
use crate::secret::{SecretBytes, Transient};

const FORMAT: &str = "virtseal-native-root";
const VERSION: u32 = 1;
const ROOT_LEN: usize = 32;

/// A root key and whose it is.
#[derive(Debug)]
pub(super) struct RootKey {
    pub(super) provider: ProviderId,
    pub(super) generation: u32,
    pub(super) key: SecretBytes,
}

/// Why a text is not a root key.
#[derive(Debug, Error)]
pub enum DocumentError {
    /// Not this JSON.
    #[error("it is not a virtseal backup, or a damaged one")]
    Json(#[source] serde_json::Error),
    /// Other JSON.
    #[error("it is not a virtseal backup")]
    Format,
    /// Made by a later virtseal.
    #[error("it has format {found}, this virtseal reads {VERSION}: upgrade virtseal")]
    Version {
        /// The format found.
        found: u32,
    },
    /// Not 64 hex digits.
    #[error("its root key is not 64 hex digits")]
    Key,
    /// The check value is another key's.
    #[error("its check value does not fit its root key: a digit is wrong")]
    Check,
    /// OpenSSL can't hash.
    #[error("SHA-256 failed")]
    Digest(#[source] ErrorStack),
    /// No secret memory.
    #[error("no memory for a key (is RLIMIT_MEMLOCK too low?)")]
    Memory(#[source] io::Error),
}

#[derive(Deserialize)]
struct Fields<'a> {
    format: &'a str,
    version: u32,
    provider: ProviderId,
    generation: u32,
    // Borrowed: the digits stay where they are.
    root_key: &'a str,
    check: String,
}

impl RootKey {
    pub(super) fn random(provider: ProviderId) -> io::Result<Self> {
        Ok(Self {
            provider,
            generation: 1,
            key: SecretBytes::random(ROOT_LEN)?,
        })
    }

    /// The text. `name` is the provider's name on this host, for the reader only.
    pub(super) fn to_text(&self, name: &str) -> Result<Transient, DocumentError> {
        let name = serde_json::to_string(name).map_err(DocumentError::Json)?;
        let created = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
        let head = format!(
            "{{\n  \"format\": \"{FORMAT}\",\n  \"version\": {VERSION},\n  \"provider\": \"{}\",\n  \"name\": {name},\n  \
             \"generation\": {},\n  \"created\": \"{created}\",\n  \"root_key\": \"",
            self.provider, self.generation
        );
        let tail = format!(
            "\",\n  \"check\": \"{}\",\n  \"note\": \"Whoever reads root_key can open every disk that provider {} ever \
             sealed. Keep it secret and keep it safe. To use it: virtseal provider restore\"\n}}\n",
            self.check()?,
            self.provider
        );
        let mut text = Transient::new(Vec::with_capacity(head.len() + 2 * ROOT_LEN + tail.len()));
        text.extend_from_slice(head.as_bytes());
        for byte in self.key.expose() {
            const DIGITS: &[u8; 16] = b"0123456789abcdef";
            text.push(DIGITS[usize::from(byte >> 4)]);
            text.push(DIGITS[usize::from(byte & 15)]);
        }
        text.extend_from_slice(tail.as_bytes());
        Ok(text)
    }

    pub(super) fn from_text(text: &[u8]) -> Result<Self, DocumentError> {
        let fields: Fields = serde_json::from_slice(text).map_err(|error| unread(text, error))?;
        if fields.format != FORMAT {
            return Err(DocumentError::Format);
        }
        if fields.version != VERSION {
            return Err(DocumentError::Version {
                found: fields.version,
            });
        }
        let mut key = SecretBytes::zeroed(ROOT_LEN).map_err(DocumentError::Memory)?;
        hex::decode_to_slice(fields.root_key, key.expose_mut()).map_err(|_| DocumentError::Key)?;
        let root = Self {
            provider: fields.provider,
            generation: fields.generation,
            key,
        };
        if root.check()? == fields.check && root.generation > 0 {
            Ok(root)
        } else {
            Err(DocumentError::Check)
        }
    }

    fn check(&self) -> Result<String, DocumentError> {
        let digest = || {
            let mut hasher = Hasher::new(MessageDigest::sha256())?;
            hasher.update(b"virtseal native root check\0")?;
            hasher.update(self.provider.0.as_bytes())?;
            hasher.update(&self.generation.to_be_bytes())?;
            hasher.update(self.key.expose())?;
            hasher.finish()
        };
        let digest = digest().map_err(DocumentError::Digest)?;
        Ok(hex::encode(&digest[..8]))
    }
}

/// A later version may have other fields: say that rather than which one is missing.
fn unread(text: &[u8], error: serde_json::Error) -> DocumentError {
    #[derive(Deserialize)]
    struct Versioned<'a> {
        format: &'a str,
        version: u32,
    }
    match serde_json::from_slice::<Versioned>(text) {
        Ok(Versioned {
            format: FORMAT,
            version,
        }) if version != VERSION => DocumentError::Version { found: version },
        Ok(Versioned { format, .. }) if format != FORMAT => DocumentError::Format,
        _ => DocumentError::Json(error),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(name: &str) -> (RootKey, String) {
        let root = RootKey::random(ProviderId::random()).unwrap();
        let text = String::from_utf8(root.to_text(name).unwrap().to_vec()).unwrap();
        (root, text)
    }

    proptest! {
        #[test]
        fn round_trip_whatever_the_name(name in ".{0,40}") {
            let (root, text) = text(&name);
            let read = RootKey::from_text(text.as_bytes()).unwrap();
            prop_assert_eq!(read.key.expose(), root.key.expose());
            prop_assert_eq!((read.provider, read.generation), (root.provider, root.generation));
            let json: serde_json::Value = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(json["name"].as_str().unwrap(), name);
        }

        #[test]
        fn garbage_is_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(RootKey::from_text(&bytes).is_err());
        }
    }

    #[test]
    fn every_wrong_digit_is_noticed() {
        let (root, text) = text("main");
        let at = text.find("root_key\": \"").unwrap() + "root_key\": \"".len();
        for digit in at..at + 64 {
            let mut bytes = text.clone().into_bytes();
            bytes[digit] = if bytes[digit] == b'0' { b'1' } else { b'0' };
            assert!(matches!(RootKey::from_text(&bytes), Err(DocumentError::Check)));
        }
        let other = text.replace(&root.provider.to_string(), &ProviderId::random().to_string());
        assert!(matches!(
            RootKey::from_text(other.as_bytes()),
            Err(DocumentError::Check)
        ));
        let short = text.replacen("root_key\": \"", "root_key\": \"00", 1);
        assert!(matches!(
            RootKey::from_text(short.as_bytes()),
            Err(DocumentError::Key)
        ));
    }

    #[test]
    fn later_format_is_named() {
        let (_, text) = text("main");
        let later = text.replace("\"version\": 1", "\"version\": 2");
        assert!(matches!(
            RootKey::from_text(later.as_bytes()),
            Err(DocumentError::Version { found: 2 })
        ));
        let later = r#"{"format": "virtseal-native-root", "version": 3}"#;
        assert!(matches!(
            RootKey::from_text(later.as_bytes()),
            Err(DocumentError::Version { found: 3 })
        ));
    }
}
