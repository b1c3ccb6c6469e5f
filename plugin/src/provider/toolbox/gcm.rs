//! How every provider that wraps on this host wraps: AES-256-GCM (NIST SP 800-38D) under a 32-byte KEK.
//!
//! A stanza's body is nonce (12 bytes) ‖ ciphertext (64) ‖ tag (16), with provider, KEK and mechanism as
//! additional data.

use openssl::cipher::Cipher;
use openssl::cipher_ctx::CipherCtx;
use openssl::error::ErrorStack;

use crate::model::envelope::{Payload, ProviderId};
use crate::provider::ProviderError;
use crate::secret::SecretBytes;

/// The mechanism's name in a stanza.
pub(in crate::provider) const MECHANISM: &str = "A256GCM";

/// Length of a KEK in bytes.
pub(in crate::provider) const KEY: usize = 32;
pub(in crate::provider) const NONCE: usize = 12;
pub(in crate::provider) const TAG: usize = 16;
const BODY: usize = NONCE + Payload::LEN + TAG;

/// What a wrapped payload is bound to besides its KEK: provider (16 bytes) ‖ length of the KEK's name (4 bytes,
/// big-endian) ‖ name ‖ mechanism.
pub(in crate::provider) fn additional_data(provider: ProviderId, kek: &str, mechanism: &str) -> Vec<u8> {
    let length = u32::try_from(kek.len()).expect("a KEK's name is shorter than an envelope may be");
    let mut data = provider.0.as_bytes().to_vec();
    data.extend_from_slice(&length.to_be_bytes());
    data.extend_from_slice(kek.as_bytes());
    data.extend_from_slice(mechanism.as_bytes());
    data
}

/// A body split into its parts.
pub(in crate::provider) struct Parts<'a> {
    pub(in crate::provider) nonce: &'a [u8],
    pub(in crate::provider) ciphertext: &'a [u8],
    pub(in crate::provider) tag: &'a [u8],
}

impl<'a> Parts<'a> {
    /// # Errors
    /// [`ProviderError::Tampered`] when `body` has another length.
    pub(in crate::provider) fn of(body: &'a [u8]) -> Result<Self, ProviderError> {
        if body.len() != BODY {
            return Err(ProviderError::Tampered);
        }
        let (nonce, rest) = body.split_at(NONCE);
        let (ciphertext, tag) = rest.split_at(Payload::LEN);
        Ok(Self {
            nonce,
            ciphertext,
            tag,
        })
    }
}

/// Wraps `payload` under `key`, which has [`KEY`] bytes, with a random nonce.
pub(in crate::provider) fn wrap(
    key: &SecretBytes,
    additional_data: &[u8],
    payload: &Payload,
) -> Result<Vec<u8>, ProviderError> {
    seal(key, additional_data, payload).map_err(ProviderError::internal("encrypting a data key"))
}

fn seal(key: &SecretBytes, additional_data: &[u8], payload: &Payload) -> Result<Vec<u8>, ErrorStack> {
    let mut body = vec![0; BODY];
    let (nonce, rest) = body.split_at_mut(NONCE);
    let (ciphertext, tag) = rest.split_at_mut(Payload::LEN);
    openssl::rand::rand_bytes(nonce)?;
    let mut cipher = CipherCtx::new()?;
    cipher.encrypt_init(Some(Cipher::aes_256_gcm()), Some(key.expose()), Some(nonce))?;
    cipher.cipher_update(additional_data, None)?;
    cipher.cipher_update(payload.expose(), Some(ciphertext))?;
    cipher.cipher_final(&mut [0; 16])?;
    cipher.tag(tag)?;
    Ok(body)
}

/// Unwraps what [`wrap`] returned.
///
/// # Errors
/// [`ProviderError::Tampered`] for anything else, another key or other additional data.
pub(in crate::provider) fn unwrap(
    key: &SecretBytes,
    additional_data: &[u8],
    body: &[u8],
) -> Result<Payload, ProviderError> {
    let parts = Parts::of(body)?;
    let mut plain = SecretBytes::zeroed(Payload::LEN)
        .map_err(ProviderError::internal("getting memory for a data key"))?;
    open(key, additional_data, &parts, &mut plain).map_err(|_| ProviderError::Tampered)?;
    Payload::from_unwrapped(plain).map_err(ProviderError::Payload)
}

fn open(
    key: &SecretBytes,
    additional_data: &[u8],
    parts: &Parts,
    plain: &mut SecretBytes,
) -> Result<(), ErrorStack> {
    let mut cipher = CipherCtx::new()?;
    cipher.decrypt_init(Some(Cipher::aes_256_gcm()), Some(key.expose()), Some(parts.nonce))?;
    cipher.cipher_update(additional_data, None)?;
    cipher.cipher_update(parts.ciphertext, Some(plain.expose_mut()))?;
    cipher.set_tag(parts.tag)?;
    cipher.cipher_final(&mut [0; 16])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::envelope::{Binding, EnvelopeId, ObjectKind, VmId};
    use crate::secret::Dek;

    #[test]
    fn opens_under_its_key_and_data_only() {
        let binding = Binding {
            envelope: EnvelopeId::random(),
            vm: VmId::random(),
            kind: ObjectKind::Disk,
        };
        let payload = Payload::bind(&Dek::random().unwrap(), &binding).unwrap();
        let (key, other) = (
            SecretBytes::random(KEY).unwrap(),
            SecretBytes::random(KEY).unwrap(),
        );
        let body = wrap(&key, b"data", &payload).unwrap();
        assert_eq!(unwrap(&key, b"data", &body).unwrap().expose(), payload.expose());
        assert!(matches!(
            unwrap(&other, b"data", &body),
            Err(ProviderError::Tampered)
        ));
        assert!(matches!(
            unwrap(&key, b"date", &body),
            Err(ProviderError::Tampered)
        ));
        assert!(matches!(
            unwrap(&key, b"data", &body[1..]),
            Err(ProviderError::Tampered)
        ));
    }

    #[test]
    fn additional_data_has_no_two_readings() {
        let id = ProviderId::random();
        assert_ne!(additional_data(id, "ab", "c"), additional_data(id, "a", "bc"));
    }
}
