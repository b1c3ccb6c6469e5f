//! The digest of a policy, as the TPM computes it step by step (TPM 2.0 Library, Part 3, "Enhanced Authorization Commands").

use std::collections::BTreeMap;
use std::fmt;

use openssl::sha::Sha256;

/// A policy's digest, SHA-256.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct PolicyDigest(pub(super) [u8; 32]);

impl fmt::Debug for PolicyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// TPM_CC_PolicyAuthorize, TPM_CC_PolicyAuthValue, TPM_CC_PolicyPCR (Part 2, "TPM_CC").
const AUTHORIZE: u32 = 0x16a;
const AUTH_VALUE: u32 = 0x16b;
const PCR: u32 = 0x17f;
/// TPM_ALG_SHA256.
const SHA256: u16 = 0x000b;

impl PolicyDigest {
    /// Of a policy that asks for nothing yet.
    pub(super) const EMPTY: Self = Self([0; 32]);

    fn then(self, command: u32, parts: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        hash.update(&self.0);
        hash.update(&command.to_be_bytes());
        parts.iter().for_each(|part| hash.update(part));
        Self(hash.finish())
    }

    /// PolicyPCR: a TPML_PCR_SELECTION of one bank, and the digest over the values.
    pub(super) fn pcrs(self, values: &BTreeMap<u8, Vec<u8>>) -> Self {
        let mut selected = [0_u8; 3];
        values
            .keys()
            .for_each(|pcr| selected[usize::from(pcr / 8)] |= 1 << (pcr % 8));
        let mut hash = Sha256::new();
        values.values().for_each(|value| hash.update(value));
        let one_bank = 1_u32.to_be_bytes();
        let size = [selected.len() as u8];
        self.then(
            PCR,
            &[&one_bank, &SHA256.to_be_bytes(), &size, &selected, &hash.finish()],
        )
    }

    /// PolicyAuthorize, which forgets what came before it: the key of this name answers for that. Without a policyRef.
    pub(super) fn authorized_by(key_name: &[u8]) -> Self {
        let named = Self::EMPTY.then(AUTHORIZE, &[key_name]);
        Self(openssl::sha::sha256(&named.0))
    }

    /// PolicyAuthValue.
    pub(super) fn auth_value(self) -> Self {
        self.then(AUTH_VALUE, &[])
    }
}
