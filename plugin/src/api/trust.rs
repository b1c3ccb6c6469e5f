//! How this host and the servers of a provider come to trust each other.

use serde::{Deserialize, Serialize};
use zlink::introspect::{CustomType, Type};

use super::{FindingView, ProviderView};

/// A certificate, as `virtseal provider trust` shows it.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct CertificateView {
    /// Distinguished name.
    pub subject: String,
    /// Distinguished name of who signed it.
    pub issuer: String,
    /// DNS names and IP addresses that it is for.
    pub names: Vec<String>,
    /// SHA-256 of the DER form, in hex with colons.
    pub sha256: String,
    /// When it ends: RFC 3339, UTC.
    #[cfg_attr(test, schemars(extend("format" = "date-time", "pattern" = "Z$")))]
    pub not_after: String,
    /// How many days from now that is; negative once it has expired.
    pub days_left: i64,
}

/// What one server of a provider shows.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub(crate) struct ServerView {
    /// `HOST:PORT`.
    pub endpoint: String,
    /// The server's own certificate first; empty if there is a problem.
    pub chain: Vec<CertificateView>,
    /// Why it shows none.
    pub problem: Option<String>,
}

/// Reply with what all servers of a provider show.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub(crate) struct Servers {
    /// In the order of the provider's endpoints.
    pub servers: Vec<ServerView>,
}

/// What comes with a new identity; the file descriptors are in the order of these fields, the certificate first.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub(crate) struct IdentityParts {
    /// A private key in a file of its own.
    pub key: bool,
    /// The user name, if a password follows.
    pub user: Option<String>,
    /// Whether a passphrase follows that encrypts the private key.
    pub encrypt: bool,
    /// Whether the TPM of this host is to keep one that nobody knows.
    pub by_tpm: bool,
    /// Whether the PIN follows by which the TPM opens what it keeps; not sent where there is none, as an older virtseald does not know it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pin: bool,
}

/// Reply of `provider identity`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub(crate) struct IdentitySet {
    /// The client's certificate.
    pub certificate: CertificateView,
    /// The KEKs that the new identity does not get to open an envelope.
    pub warnings: Vec<FindingView>,
    /// The provider after it has asked its servers.
    pub provider: ProviderView,
}

/// A new private key.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub(crate) struct NewKey {
    /// RSA with 3072 bits instead of NIST P-256.
    pub rsa: bool,
    /// The common name to ask for; the host's name without one.
    pub common_name: Option<String>,
}

/// Reply of `provider csr`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub(crate) struct SigningRequestMade {
    /// PKCS #10, in PEM.
    pub pem: String,
    /// Whether it was made for this call, with a key of its own.
    pub changed: bool,
}
