//! How every provider that wraps on this host wraps: AES-256-GCM under a 32-byte KEK ([`aead`]), with provider, KEK and
//! mechanism as additional data. A stanza's body is that of one payload: 92 bytes.

use crate::crypto::aead::{self, NONCE, Parts, TAG};
use crate::model::envelope::{Payload, ProviderId};
use crate::provider::ProviderError;
use crate::secret::SecretBytes;

/// The mechanism's name in a stanza.
pub(crate) const MECHANISM: &str = "A256GCM";

/// What a wrapped payload is bound to besides its KEK: provider (16 bytes) ‖ length of the KEK's name (4 bytes,
/// big-endian) ‖ name ‖ mechanism.
pub(crate) fn additional_data(provider: ProviderId, kek: &str, mechanism: &str) -> Vec<u8> {
    let length = u32::try_from(kek.len()).expect("a KEK's name is shorter than an envelope may be");
    let mut data = provider.0.as_bytes().to_vec();
    data.extend_from_slice(&length.to_be_bytes());
    data.extend_from_slice(kek.as_bytes());
    data.extend_from_slice(mechanism.as_bytes());
    data
}

/// A body split into its parts.
///
/// # Errors
/// [`ProviderError::Tampered`] when `body` has another length.
pub(crate) fn parts(body: &[u8]) -> Result<Parts<'_>, ProviderError> {
    match Parts::of(body) {
        Ok(parts) if body.len() == NONCE + Payload::LEN + TAG => Ok(parts),
        _ => Err(ProviderError::Tampered),
    }
}

/// Wraps `payload` under `key`, which has [`aead::KEY`] bytes.
pub(crate) fn wrap(
    key: &SecretBytes,
    additional_data: &[u8],
    payload: &Payload,
) -> Result<Vec<u8>, ProviderError> {
    aead::encrypt(key, additional_data, payload.expose())
        .map_err(ProviderError::internal("encrypting a data key"))
}

/// Unwraps what [`wrap`] returned.
///
/// # Errors
/// [`ProviderError::Tampered`] for anything else, another key or other additional data.
pub(crate) fn unwrap(
    key: &SecretBytes,
    additional_data: &[u8],
    body: &[u8],
) -> Result<Payload, ProviderError> {
    let mut plain = SecretBytes::zeroed(Payload::LEN)
        .map_err(ProviderError::internal("getting memory for a data key"))?;
    aead::decrypt(key, additional_data, body, plain.expose_mut()).map_err(|_| ProviderError::Tampered)?;
    Payload::from_unwrapped(plain).map_err(ProviderError::Payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn additional_data_has_no_two_readings() {
        let id = ProviderId::random();
        assert_ne!(additional_data(id, "ab", "c"), additional_data(id, "a", "bc"));
    }

    #[test]
    fn a_body_of_another_length_is_no_payload() {
        let body = [0; NONCE + Payload::LEN + TAG + 1];
        assert!(parts(&body[1..]).is_ok());
        assert!(parts(&body).is_err() && parts(&body[2..]).is_err());
    }
}
