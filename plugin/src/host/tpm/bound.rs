//! What was bound, as it is stored.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::TpmError;
use super::pcr_list::{KERNEL, PcrList};
use super::policy::BindPolicy;
use super::signed::{NotASigningKey, SigningKey};
use crate::secret::SecretBytes;

/// What was bound, with everything but the TPM that it takes to open it. Not secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BoundToTpm {
    pub(super) version: u32,
    pub(super) parent: Parent,
    /// The name (TPM 2.0 Library, Part 1, "Names") of the storage key: it tells one TPM from another.
    #[serde(with = "hex::serde")]
    pub(super) parent_name: Vec<u8>,
    /// What the PCRs were that must stay so, to be able to say which of them differ.
    pub(super) pcrs: BTreeMap<u8, String>,
    /// From version 2: the public key (a SubjectPublicKeyInfo) that signs what PCR 11 may be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) signed_by: Option<Hex>,
    /// From version 2: the salt of its PIN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) pin_salt: Option<Hex>,
    /// A marshalled TPMT_PUBLIC.
    #[serde(with = "hex::serde")]
    pub(super) public: Vec<u8>,
    /// The buffer of a TPM2B_PRIVATE.
    #[serde(with = "hex::serde")]
    pub(super) private: Vec<u8>,
}

/// Hex digits, for what may be absent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Hex(#[serde(with = "hex::serde")] pub(super) Vec<u8>);

/// The storage key that it is sealed under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Parent {
    /// The persistent one at 0x81000001 (TCG TPM v2.0 Provisioning Guidance), which operating systems make.
    Persistent,
    /// One that is made anew for each call, always the same: from the template below under the owner's seed.
    FromSeed,
}

impl BoundToTpm {
    /// The latest form, and the one of a policy of PCRs alone, which earlier releases open too.
    pub(super) const VERSION: u32 = 2;
    pub(super) const FIRST_VERSION: u32 = 1;
    /// More than any TPM writes.
    const MAX_BYTES: usize = 16 * 1024;

    /// As it is stored: JSON.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a struct of numbers and texts has a JSON form")
    }

    /// Reads what [`BoundToTpm::to_bytes`] wrote.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, TpmError> {
        if bytes.len() > Self::MAX_BYTES {
            return Err(TpmError::Damaged);
        }
        let bound: Self = serde_json::from_slice(bytes).map_err(|_| TpmError::Damaged)?;
        let of_pcrs_alone = bound.signed_by.is_none() && bound.pin_salt.is_none();
        let fits = match bound.version {
            Self::FIRST_VERSION => of_pcrs_alone,
            Self::VERSION => bound.signing_key().is_ok(),
            _ => false,
        };
        let pcrs_exist = bound.pcrs.keys().all(|pcr| *pcr < PcrList::COUNT);
        let is_whole = fits && pcrs_exist && !bound.pcrs().0.is_empty();
        is_whole.then_some(bound).ok_or(TpmError::Damaged)
    }

    /// The PCRs that its policy looks at.
    pub(crate) fn pcrs(&self) -> PcrList {
        let signed = self.signed_by.as_ref().map(|_| KERNEL);
        PcrList(self.exact().0.into_iter().chain(signed).collect())
    }

    /// The PCRs that must be what they were.
    pub(super) fn exact(&self) -> PcrList {
        PcrList(self.pcrs.keys().copied().collect())
    }

    /// Those of its PCRs that nothing was measured into when it was sealed: they tell no boot from another.
    pub(crate) fn unmeasured(&self) -> Option<PcrList> {
        let zero = "0".repeat(64);
        let zeros = self.pcrs.iter().filter(|(_, value)| **value == zero);
        PcrList::of(zeros.map(|(pcr, _)| *pcr))
    }

    /// Who signs what PCR 11 may be, if it is among them by way of that.
    pub(crate) fn signed_by(&self) -> Option<SigningKey> {
        self.signing_key().ok().flatten()
    }

    pub(super) fn signing_key(&self) -> Result<Option<SigningKey>, NotASigningKey> {
        let der = self.signed_by.as_ref();
        der.map(|der| SigningKey::from_der(&der.0)).transpose()
    }

    /// Whether somebody must type a PIN.
    pub(crate) fn needs_pin(&self) -> bool {
        self.pin_salt.is_some()
    }

    /// The same policy, for something else to be bound; with `pin` where it needs one.
    pub(crate) fn policy(&self, pin: Option<&Arc<SecretBytes>>) -> BindPolicy {
        let pin = pin.filter(|_| self.needs_pin()).cloned();
        BindPolicy::of_record(self.pcrs(), self.signed_by()).with_pin(pin)
    }
}
