//! Who this host is to a server: a client certificate with its private key.

use openssl::error::ErrorStack;
use openssl::pkey::{PKey, Private};
use openssl::x509::X509;
use thiserror::Error;

use super::certificate::CertificateFacts;

/// A private key, and the certificate that it belongs to.
pub(crate) struct ClientIdentity {
    /// The client's own first, then those that signed it; never empty.
    pub(crate) certificates: Vec<X509>,
    pub(crate) key: PKey<Private>,
}

/// Why it is no identity.
#[derive(Debug, Error)]
pub(crate) enum NoIdentity {
    #[error("can't read the certificate: PEM is expected")]
    Certificate(#[source] ErrorStack),
    #[error("there is no certificate in the file: PEM is expected")]
    NoCertificate,
    #[error("can't read the private key: PEM is expected")]
    Key(#[source] ErrorStack),
    /// A key with a passphrase of its own.
    #[error("the private key is encrypted: decrypt it first (openssl pkey -in KEY)")]
    EncryptedKey,
    #[error("the private key does not belong to the certificate")]
    AnotherKey,
    #[error("the certificate expired on {0}")]
    Expired(String),
}

impl ClientIdentity {
    /// Of the certificates in `pem` the one of the first of `keys` that has one, wherever it stands among those above it: some
    /// CAs deliver theirs first.
    ///
    /// # Errors
    /// When there is none, or it has expired.
    pub(crate) fn of(pem: &[u8], keys: impl IntoIterator<Item = PKey<Private>>) -> Result<Self, NoIdentity> {
        let mut certificates = X509::stack_from_pem(pem).map_err(NoIdentity::Certificate)?;
        if certificates.is_empty() {
            return Err(NoIdentity::NoCertificate);
        }
        let of_key = |key: &PKey<Private>| {
            let is_of_key = |certificate: &X509| {
                let public = certificate.public_key();
                public.is_ok_and(|public| public.public_eq(key))
            };
            certificates.iter().position(is_of_key)
        };
        let found = keys.into_iter().find_map(|key| Some((of_key(&key)?, key)));
        let (own, key) = found.ok_or(NoIdentity::AnotherKey)?;
        certificates[..=own].rotate_right(1);
        let facts = CertificateFacts::of(&certificates[0]).map_err(NoIdentity::Certificate)?;
        match facts.has_expired() {
            true => Err(NoIdentity::Expired(facts.not_after)),
            false => Ok(Self { certificates, key }),
        }
    }

    /// What to tell of its certificate as its end draws near.
    pub(crate) fn warning(&self) -> Option<String> {
        let facts = CertificateFacts::of(self.certificates.first()?).ok()?;
        facts.warning("the client")
    }
}

/// The first private key in `pem`.
pub(crate) fn private_key(pem: &[u8]) -> Result<PKey<Private>, NoIdentity> {
    // The callback answers "no passphrase": without it OpenSSL would ask on the terminal.
    PKey::private_key_from_pem_callback(pem, |_| Ok(0)).map_err(|error| {
        if pem.windows(9).any(|text| text == b"ENCRYPTED") {
            NoIdentity::EncryptedKey
        } else {
            NoIdentity::Key(error)
        }
    })
}
