//! Keys that only this host's TPM gives back: 32 random bytes, bound to the state that the host is in.

use std::sync::Arc;

use crate::crypto::aead::KEY;
use crate::host::tpm::{BindPolicy, BoundToTpm, Tpm, TpmError};
use crate::secret::SecretBytes;

/// A new key, as `tpm` has given it back once, and what to keep to open it again.
///
/// # Errors
/// Why the TPM does not bind it, or does not give it back.
pub(crate) fn bind(tpm: &Tpm, policy: &BindPolicy) -> Result<(SecretBytes, Vec<u8>), TpmError> {
    let key = Arc::new(SecretBytes::random(KEY).map_err(TpmError::Host)?);
    let bound = tpm.bind(&key, policy)?.to_bytes();
    let opened = open(tpm, &bound, policy.pin())?;
    match openssl::memcmp::eq(opened.expose(), key.expose()) {
        true => Ok((opened, bound)),
        false => Err(TpmError::Damaged),
    }
}

/// The key again, with `pin` where it needs one.
pub(crate) fn open(tpm: &Tpm, bound: &[u8], pin: Option<&Arc<SecretBytes>>) -> Result<SecretBytes, TpmError> {
    let key = tpm.open(&BoundToTpm::from_bytes(bound)?, pin)?;
    match key.expose().len() {
        KEY => Ok(key),
        _ => Err(TpmError::Damaged),
    }
}
