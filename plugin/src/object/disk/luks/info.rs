//! What a LUKS header says without any key.

use serde::Serialize;
use uuid::Uuid;

/// Its cipher, its keyslots, and where the data is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct LuksInfo {
    /// Always `aes-xts-plain64`.
    pub cipher: &'static str,
    /// Length of the volume key; XTS uses half of it for the data and half for the IVs.
    pub key_bits: u32,
    /// Where the payload begins, in bytes from the header.
    pub payload_offset: u64,
    /// The volume's UUID.
    pub uuid: Uuid,
    /// PBKDF2 rounds of the volume key's digest.
    pub digest_iterations: u32,
    /// All eight, in the order in which they are tried.
    pub keyslots: Vec<KeyslotInfo>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "state", rename_all = "lowercase")]
pub(crate) enum KeyslotInfo {
    /// Some passphrase opens it.
    Active {
        /// PBKDF2 rounds of that passphrase.
        iterations: u32,
    },
    Dead,
}
