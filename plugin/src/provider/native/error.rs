//! Why a native provider does not do as asked, before anybody is told.

use std::io;

use thiserror::Error;

use super::document::{DocumentError, RootKeys};
use crate::crypto::age_file::AgeError;
use crate::host::tpm::TpmError;
use crate::provider::ProviderError;
use crate::store::StoreError;

/// Why a native provider can't be made, backed up or restored.
#[derive(Debug, Error)]
pub(crate) enum NativeError {
    #[error(transparent)]
    Keystore(#[from] StoreError),
    #[error("is locked")]
    Locked,
    #[error("no memory for a key (is RLIMIT_MEMLOCK too low?)")]
    Memory(#[source] io::Error),
    /// Encrypting a root key by its passphrase failed.
    #[error("can't encrypt the root key")]
    Encrypt(#[source] AgeError),
    #[error("can't open the backup")]
    Backup(#[source] AgeError),
    #[error("the backup is encrypted: give the passphrase that it was made with")]
    BackupIsEncrypted,
    #[error("can't read the root key")]
    Document(#[from] DocumentError),
    /// Another passphrase than the one that encrypts it.
    #[error("does not accept this passphrase")]
    WrongPassphrase,
    #[error("can't open its root keys")]
    Decrypt(#[source] ProviderError),
    /// As many as one encrypted text may hold.
    #[error(
        "has had {} root keys, which is as many as there can be: move its VMs to a new provider",
        RootKeys::MOST
    )]
    TooManyGenerations,
    #[error("is not enrolled with the TPM of this host")]
    NotEnrolled,
    /// It was rotated, and the TPM has not been told.
    #[error("has a newer root key than the TPM opens")]
    TpmStale,
    #[error("is not opened by the TPM")]
    Tpm(#[source] TpmError),
    /// The TPM opens its part, and the rest is not what was written.
    #[error("has a damaged record of what the TPM opens")]
    TpmRecord,
    #[error("can't encrypt the root key")]
    Cipher(#[source] openssl::error::ErrorStack),
    #[error("its root key is missing from the keystore")]
    NoRoot,
}
