//! The MAC of an envelope: what it covers, byte by byte.
//!
//! HMAC-SHA256 under a key that is derived from the DEK by HKDF-SHA256 without a salt, which a uniformly random key does not
//! need, so whoever can't open the object
//! can't change a field, leave a stanza out, or move one to another envelope. The message, all numbers big-endian:
//!
//! | bytes | field |
//! | --- | --- |
//! | 1 | format, 2 |
//! | 16 | id |
//! | 16 | VM |
//! | 1 | kind: 1 disk, 2 vTPM, 3 NVRAM |
//! | 8 | generation |
//! | 1 | seen: 0 or 1 |
//! | 4 | number of VMs that it is shared with |
//! | 16 each | these VMs |
//! | 4 | number of stanzas |
//! | each stanza | provider (16), then its name, KEK, mechanism and body, each behind its length in bytes (4) |
//!
//! Every part has a fixed length or stands behind it, so no two envelopes have the same message.

use std::fmt;

use base64::{Engine, engine::general_purpose::STANDARD};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::pkey::PKey;
use openssl::sign::Signer;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use super::{Envelope, EnvelopeError};
use crate::crypto::kdf;
use crate::secret::Dek;

/// Of no other use of a DEK: as a LUKS or swtpm passphrase it goes through PBKDF2.
const KEY_LABEL: &[u8] = b"virtseal envelope mac v2";

/// HMAC-SHA256 of an envelope, 32 bytes; base64 in JSON.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mac([u8; Mac::LEN]);

impl Mac {
    pub(crate) const LEN: usize = 32;

    /// That of `envelope`, whatever MAC it has.
    pub(super) fn of(envelope: &Envelope, dek: &Dek) -> Result<Self, EnvelopeError> {
        let key = kdf::hkdf(dek.expose(), &[], KEY_LABEL).map_err(EnvelopeError::Memory)?;
        hmac(key.expose(), &message(envelope)).map_err(EnvelopeError::Hmac)
    }

    /// For tests of what it covers.
    #[cfg(test)]
    pub(super) fn with_flipped(mut self, bit: usize) -> Self {
        self.0[bit / 8] ^= 1 << (bit % 8);
        self
    }

    /// Compares in constant time.
    pub(super) fn is(&self, other: &Self) -> bool {
        openssl::memcmp::eq(&self.0, &other.0)
    }
}

fn hmac(key: &[u8], message: &[u8]) -> Result<Mac, ErrorStack> {
    let key = PKey::hmac(key)?;
    let mut out = [0; Mac::LEN];
    Signer::new(MessageDigest::sha256(), &key)?.sign_oneshot(&mut out, message)?;
    Ok(Mac(out))
}

fn message(envelope: &Envelope) -> Vec<u8> {
    let mut message = vec![Envelope::FORMAT];
    message.extend_from_slice(envelope.id.0.as_bytes());
    message.extend_from_slice(envelope.vm.0.as_bytes());
    message.push(envelope.kind.code());
    message.extend_from_slice(&envelope.generation.to_be_bytes());
    message.push(u8::from(envelope.seen));
    push_len(&mut message, envelope.shared_with.len());
    for vm in &envelope.shared_with {
        message.extend_from_slice(vm.0.as_bytes());
    }
    push_len(&mut message, envelope.stanzas.len());
    for stanza in &envelope.stanzas {
        message.extend_from_slice(stanza.provider.0.as_bytes());
        let texts = [&stanza.provider_name, &stanza.kek.0, &stanza.mechanism];
        for part in texts.map(String::as_bytes).into_iter().chain([&stanza.body[..]]) {
            push_len(&mut message, part.len());
            message.extend_from_slice(part);
        }
    }
    message
}

/// Nothing here is longer than [`Envelope::MAX_JSON`].
fn push_len(message: &mut Vec<u8>, len: usize) {
    message.extend_from_slice(&(len as u32).to_be_bytes());
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mac({})", STANDARD.encode(self.0))
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(self.0))
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = STANDARD
            .decode(String::deserialize(deserializer)?)
            .map_err(D::Error::custom)?;
        let found = bytes.len();
        bytes
            .try_into()
            .map(Self)
            .map_err(|_| D::Error::custom(format!("a MAC has {} bytes, not {found}", Self::LEN)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// HKDF-SHA256 worked out with another implementation, so that neither label nor length ever changes.
    #[test]
    fn the_derivation_never_changes() {
        let bytes: Vec<u8> = (0..32).collect();
        let key = kdf::hkdf(&bytes, &[], KEY_LABEL).unwrap();
        assert_eq!(
            hex::encode(key.expose()),
            "a4bf7750a862b448884eae6014d79aa18d19c04bea244e554036d1b1d83ef68f"
        );
    }
}
