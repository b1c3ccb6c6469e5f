//! What a sealed object asks for before the TPM gives it out (TPM 2.0 Library, Part 3, "Enhanced Authorization Commands").
//!
//! ```text
//!   PolicyAuthorize   with a signing key: what PCR 11 is now was signed by it, beforehand, for each kernel
//!   PolicyPCR         the other PCRs are what they were
//!   PolicyAuthValue   with a PIN: the caller knows it
//! ```
//!
//! The digests are computed here; that the TPM computes the same is seen when it opens what was sealed.

use std::sync::Arc;

use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::pkcs5::pbkdf2_hmac;
use thiserror::Error;

use super::pcr_list::{KERNEL, PcrList};
use super::signed::SigningKey;
use crate::secret::SecretBytes;

/// What the TPM is to ask for.
#[derive(Clone, Debug)]
pub(crate) struct BindPolicy {
    pcrs: PcrList,
    signed_by: Option<SigningKey>,
    pin: Option<Arc<SecretBytes>>,
}

/// Such a policy would lock its owner out, or is none.
#[derive(Debug, Error)]
pub(crate) enum PolicyError {
    #[error(
        "PCR 11 changes with each update of the kernel, which would lock the provider each time: it can be used with the \
         public key that signs what it will be"
    )]
    Unsigned,
    #[error("the public key signs what PCR 11 may be, and PCR 11 is not among {0}")]
    NothingToSign(PcrList),
}

impl BindPolicy {
    /// `pcrs`, of which 11 is whatever `signed_by` has signed.
    ///
    /// # Errors
    /// [`PolicyError`] when there is one without the other.
    pub(crate) fn new(pcrs: PcrList, signed_by: Option<SigningKey>) -> Result<Self, PolicyError> {
        match (pcrs.has_kernel(), signed_by.is_some()) {
            (true, false) => Err(PolicyError::Unsigned),
            (false, true) => Err(PolicyError::NothingToSign(pcrs)),
            _ => Ok(Self::of_record(pcrs, signed_by)),
        }
    }

    /// All of `pcrs` are what they are now: also 11, for what was sealed so before.
    pub(crate) fn exactly(pcrs: PcrList) -> Self {
        Self::of_record(pcrs, None)
    }

    pub(super) fn of_record(pcrs: PcrList, signed_by: Option<SigningKey>) -> Self {
        Self {
            pcrs,
            signed_by,
            pin: None,
        }
    }

    /// And somebody types `pin`.
    #[must_use]
    pub(crate) fn with_pin(self, pin: Option<Arc<SecretBytes>>) -> Self {
        Self { pin, ..self }
    }

    /// Who signs what PCR 11 may be.
    pub(crate) fn signed_by(&self) -> Option<&SigningKey> {
        self.signed_by.as_ref()
    }

    pub(crate) fn pin(&self) -> Option<&Arc<SecretBytes>> {
        self.pin.as_ref()
    }

    /// The PCRs that must stay what they are.
    pub(super) fn exact(&self) -> PcrList {
        let signed = self.signed_by.iter().map(|_| KERNEL).collect();
        PcrList(&self.pcrs.0 - &signed)
    }
}

/// A PIN as the TPM gets it: PBKDF2-HMAC-SHA256 of it with a salt of its own. The TPM allows few tries, so this is for the
/// day when somebody reads a chip out.
pub(super) struct PinSalt(pub(super) Vec<u8>);

impl PinSalt {
    const LEN: usize = 32;
    const ROUNDS: usize = 10_000;

    pub(super) fn random() -> Result<Self, ErrorStack> {
        let mut salt = vec![0; Self::LEN];
        openssl::rand::rand_bytes(&mut salt)?;
        Ok(Self(salt))
    }

    pub(super) fn auth_value(&self, pin: &SecretBytes) -> Result<SecretBytes, PinError> {
        let mut value = SecretBytes::zeroed(32).map_err(PinError::Memory)?;
        let hash = MessageDigest::sha256();
        pbkdf2_hmac(pin.expose(), &self.0, Self::ROUNDS, hash, value.expose_mut())
            .map_err(PinError::Derive)?;
        // A TPM drops zero bytes at the end (Part 1, "Authorization Size Convention"), the library may not.
        if let Some(last @ 0) = value.expose_mut().last_mut() {
            *last = 0xff;
        }
        Ok(value)
    }
}

#[derive(Debug, Error)]
pub(super) enum PinError {
    #[error("no memory for a key")]
    Memory(#[source] std::io::Error),
    #[error("PBKDF2 failed")]
    Derive(#[source] ErrorStack),
}
