//! The text that holds a provider's root keys: what is encrypted in the keystore and in backups.
//!
//! JSON, so that a person with nothing but `age` and an editor can read it. The check value is the first 8 bytes
//! of SHA-256 over a label, the provider's UUID, the generation (4 bytes, big-endian) and the key: a mistyped or
//! half-copied backup is noticed before anything is wrapped with it.
//!
//! A provider that was rotated has its earlier root keys under `earlier`, in version 2 of the form, so that a
//! virtseal that would leave them out refuses the text instead.

use std::collections::BTreeMap;
use std::io;

use openssl::error::ErrorStack;
use openssl::hash::{Hasher, MessageDigest};
use serde::Deserialize;
use thiserror::Error;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::model::advice::Advice;
use crate::model::envelope::ProviderId;
use crate::secret::{SecretBytes, Transient};

const FORMAT: &str = "virtseal-native-root";
/// The latest form, and the one of a provider that was never rotated.
const VERSION: u32 = 2;
const FIRST_VERSION: u32 = 1;
const ROOT_LEN: usize = 32;

/// All root keys of one provider: the newest wraps, every one unwraps. Never empty.
#[derive(Debug)]
pub(super) struct RootKeys {
    pub(super) provider: ProviderId,
    keys: BTreeMap<u32, SecretBytes>,
}

/// Why a text is not a root key.
#[derive(Debug, Error)]
pub(crate) enum DocumentError {
    #[error("it is not a virtseal backup, or a damaged one")]
    Json(#[source] serde_json::Error),
    #[error("it is not a virtseal backup")]
    Format,
    #[error("it has format {found}, this virtseal reads up to {VERSION}: upgrade virtseal")]
    Version { found: u32 },
    #[error("its root key is not 64 hex digits")]
    Key,
    #[error("its check value does not fit its root key: a digit is wrong")]
    Check,
    #[error("SHA-256 failed")]
    Digest(#[source] ErrorStack),
    #[error("no memory for a key (is RLIMIT_MEMLOCK too low?)")]
    Memory(#[source] io::Error),
}

#[derive(Deserialize)]
struct Fields<'a> {
    format: &'a str,
    version: u32,
    provider: ProviderId,
    #[serde(borrow, flatten)]
    newest: KeyFields<'a>,
    #[serde(borrow, default)]
    earlier: Vec<KeyFields<'a>>,
}

#[derive(Deserialize)]
struct KeyFields<'a> {
    generation: u32,
    // Borrowed: the digits stay where they are.
    root_key: &'a str,
    check: &'a str,
}

impl KeyFields<'_> {
    fn key(&self, provider: ProviderId) -> Result<SecretBytes, DocumentError> {
        let mut key = SecretBytes::zeroed(ROOT_LEN).map_err(DocumentError::Memory)?;
        hex::decode_to_slice(self.root_key, key.expose_mut()).map_err(|_| DocumentError::Key)?;
        if self.generation > 0 && check(provider, self.generation, &key)? == self.check {
            Ok(key)
        } else {
            Err(DocumentError::Check)
        }
    }
}

impl RootKeys {
    /// The most that one text can hold.
    pub(super) const MOST: usize = 256;

    pub(super) fn random(provider: ProviderId) -> io::Result<Self> {
        let first = SecretBytes::random(ROOT_LEN)?;
        Ok(Self {
            provider,
            keys: BTreeMap::from([(1, first)]),
        })
    }

    /// The generation that wraps.
    pub(super) fn newest(&self) -> u32 {
        *self
            .keys
            .keys()
            .next_back()
            .expect("there is always a first root key")
    }

    pub(super) fn key(&self, generation: u32) -> Option<&SecretBytes> {
        self.keys.get(&generation)
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    /// Adds a new root key, which becomes the newest.
    pub(super) fn grow(&mut self) -> io::Result<()> {
        let generation = self.newest() + 1;
        self.keys.insert(generation, SecretBytes::random(ROOT_LEN)?);
        Ok(())
    }

    /// Whether both hold the same keys, in constant time for each.
    pub(super) fn are(&self, other: &Self) -> bool {
        let same = |(generation, key): (&u32, &SecretBytes)| {
            other
                .key(*generation)
                .is_some_and(|found| openssl::memcmp::eq(found.expose(), key.expose()))
        };
        self.provider == other.provider && self.len() == other.len() && self.keys.iter().all(same)
    }

    /// The text. `name` is the provider's name on this host, for the reader only.
    pub(super) fn to_text(&self, name: &str) -> Result<Transient, DocumentError> {
        let name = serde_json::to_string(name).map_err(DocumentError::Json)?;
        let created = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
        let version = if self.len() == 1 { FIRST_VERSION } else { VERSION };
        let head = format!(
            "{{\n  \"format\": \"{FORMAT}\",\n  \"version\": {version},\n  \"provider\": \"{}\",\n  \"name\": {name},\n  \
             \"created\": \"{created}\",\n  ",
            self.provider
        );
        let tail = format!(
            ",\n  \"note\": \"Whoever reads root_key can open every disk that provider {} ever sealed. Keep it secret and \
             keep it safe. To use it: {}\"\n}}\n",
            self.provider,
            Advice::RestoreProvider("NAME".into())
        );
        // Never grows: a buffer that moves leaves a copy behind.
        let capacity = head.len() + tail.len() + 160 * self.len() + 40;
        let mut text = Transient::new(Vec::with_capacity(capacity));
        text.extend_from_slice(head.as_bytes());
        let mut keys = self.keys.iter().rev();
        let newest = keys.next().expect("there is always a first root key");
        self.push_key(&mut text, newest, ",\n  ")?;
        for (place, earlier) in keys.enumerate() {
            text.extend_from_slice(if place == 0 {
                b",\n  \"earlier\": [\n    {"
            } else {
                b",\n    {"
            });
            self.push_key(&mut text, earlier, ", ")?;
            text.push(b'}');
        }
        if self.len() > 1 {
            text.extend_from_slice(b"\n  ]");
        }
        text.extend_from_slice(tail.as_bytes());
        debug_assert!(text.len() <= capacity);
        Ok(text)
    }

    fn push_key(
        &self,
        text: &mut Transient,
        (generation, key): (&u32, &SecretBytes),
        between: &str,
    ) -> Result<(), DocumentError> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let check = check(self.provider, *generation, key)?;
        text.extend_from_slice(format!("\"generation\": {generation}{between}\"root_key\": \"").as_bytes());
        for byte in key.expose() {
            text.push(DIGITS[usize::from(byte >> 4)]);
            text.push(DIGITS[usize::from(byte & 15)]);
        }
        text.extend_from_slice(format!("\"{between}\"check\": \"{check}\"").as_bytes());
        Ok(())
    }

    pub(super) fn from_text(text: &[u8]) -> Result<Self, DocumentError> {
        let fields: Fields = serde_json::from_slice(text).map_err(|error| unread(text, error))?;
        if fields.format != FORMAT {
            return Err(DocumentError::Format);
        }
        if !(FIRST_VERSION..=VERSION).contains(&fields.version) {
            return Err(DocumentError::Version {
                found: fields.version,
            });
        }
        let mut keys = BTreeMap::new();
        for key in std::iter::once(&fields.newest).chain(&fields.earlier) {
            keys.insert(key.generation, key.key(fields.provider)?);
        }
        let root = Self {
            provider: fields.provider,
            keys,
        };
        // One that is there twice, or an earlier one that is not.
        if root.newest() == fields.newest.generation && root.len() == fields.earlier.len() + 1 {
            Ok(root)
        } else {
            Err(DocumentError::Check)
        }
    }
}

fn check(provider: ProviderId, generation: u32, key: &SecretBytes) -> Result<String, DocumentError> {
    let digest = || {
        let mut hasher = Hasher::new(MessageDigest::sha256())?;
        hasher.update(b"virtseal native root check\0")?;
        hasher.update(provider.0.as_bytes())?;
        hasher.update(&generation.to_be_bytes())?;
        hasher.update(key.expose())?;
        hasher.finish()
    };
    let digest = digest().map_err(DocumentError::Digest)?;
    Ok(hex::encode(&digest[..8]))
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
        }) if !(FIRST_VERSION..=VERSION).contains(&version) => DocumentError::Version { found: version },
        Ok(Versioned { format, .. }) if format != FORMAT => DocumentError::Format,
        _ => DocumentError::Json(error),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(name: &str) -> (RootKeys, String) {
        let root = RootKeys::random(ProviderId::random()).unwrap();
        let text = String::from_utf8(root.to_text(name).unwrap().to_vec()).unwrap();
        (root, text)
    }

    proptest! {
        #[test]
        fn round_trip_whatever_the_name(name in ".{0,40}") {
            let (root, text) = text(&name);
            let read = RootKeys::from_text(text.as_bytes()).unwrap();
            prop_assert!(read.are(&root));
            let json: serde_json::Value = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(json["name"].as_str().unwrap(), name);
        }

        #[test]
        fn garbage_is_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(RootKeys::from_text(&bytes).is_err());
        }
    }

    #[test]
    fn every_wrong_digit_is_noticed() {
        let (root, text) = text("main");
        let at = text.find("root_key\": \"").unwrap() + "root_key\": \"".len();
        for digit in at..at + 64 {
            let mut bytes = text.clone().into_bytes();
            bytes[digit] = if bytes[digit] == b'0' { b'1' } else { b'0' };
            assert!(matches!(RootKeys::from_text(&bytes), Err(DocumentError::Check)));
        }
        let other = text.replace(&root.provider.to_string(), &ProviderId::random().to_string());
        assert!(matches!(
            RootKeys::from_text(other.as_bytes()),
            Err(DocumentError::Check)
        ));
        let short = text.replacen("root_key\": \"", "root_key\": \"00", 1);
        assert!(matches!(
            RootKeys::from_text(short.as_bytes()),
            Err(DocumentError::Key)
        ));
    }

    #[test]
    fn all_generations_travel_and_an_old_reader_would_refuse_them() {
        let (mut root, _) = text("main");
        root.grow().unwrap();
        root.grow().unwrap();
        let text = String::from_utf8(root.to_text("main").unwrap().to_vec()).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&json["version"], &json["generation"]), (&2.into(), &3.into()));
        let read = RootKeys::from_text(text.as_bytes()).unwrap();
        assert!(read.are(&root));
        assert_eq!((read.newest(), read.len()), (3, 3));
        let twice = text.replacen("\"generation\": 1,", "\"generation\": 2,", 1);
        assert!(matches!(
            RootKeys::from_text(twice.as_bytes()),
            Err(DocumentError::Check)
        ));
    }

    #[test]
    fn many_generations_fit_one_text() {
        let (mut root, _) = text("main");
        while root.len() < RootKeys::MOST {
            root.grow().unwrap();
        }
        let text = root.to_text(&"n".repeat(64)).unwrap();
        assert!(
            text.len() < crate::crypto::age_file::MAX_BYTES * 3 / 4,
            "{}",
            text.len()
        );
        assert!(RootKeys::from_text(&text).unwrap().are(&root));
    }

    #[test]
    fn later_format_is_named() {
        let (_, text) = text("main");
        let later = text.replace("\"version\": 1", "\"version\": 9");
        assert!(matches!(
            RootKeys::from_text(later.as_bytes()),
            Err(DocumentError::Version { found: 9 })
        ));
        let later = r#"{"format": "virtseal-native-root", "version": 3}"#;
        assert!(matches!(
            RootKeys::from_text(later.as_bytes()),
            Err(DocumentError::Version { found: 3 })
        ));
    }
}
