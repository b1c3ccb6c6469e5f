//! Who this host is to a KMS: a client certificate with its private key, and perhaps a user name and password.
//!
//! On disk it is one file, 0600: a certificate and its key change together or not at all. With a passphrase the key
//! and the password in it are an age file; the provider is then locked until it is given. A key that was made here
//! waits in a file of its own, with its signing request, until the signed certificate comes back; also when another request was
//! made meanwhile, for nobody knows which of them is being signed.

use std::sync::Arc;

use openssl::ec::{EcGroup, EcKey};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{HasPublic, Id, PKey, Private, Public};
use openssl::rsa::Rsa;
use openssl::x509::extension::ExtendedKeyUsage;
use openssl::x509::{X509, X509Name, X509NameBuilder, X509NameRef, X509ReqBuilder};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;
use zeroize::Zeroize;

use crate::crypto::age_file::{self, AgeError, Form};
use crate::provider::toolbox::identity::{ClientIdentity, NoIdentity, private_key};
use crate::secret::{SecretBytes, Transient};
use crate::store::Change;

/// The most bytes of a PEM file that is read.
pub(crate) const MAX_PEM: usize = 64 * 1024;

/// The most requests that wait for their certificates: beyond, the key of the oldest goes.
const MAX_WAITING: usize = 16;

/// An identity, ready for use.
pub(super) struct Identity {
    pub(super) client: ClientIdentity,
    pub(super) login: Option<Arc<Login>>,
}

/// For servers that ask for more than a certificate.
#[derive(Debug)]
pub(super) struct Login {
    pub(super) user: String,
    pub(super) password: SecretBytes,
}

/// What `provider identity` brings.
pub(crate) struct NewIdentity {
    /// PEM: the client's certificate, then those that signed it; may hold the key too.
    pub certificate: SecretBytes,
    /// PEM, if it is not in `certificate` and not waiting here.
    pub key: Option<SecretBytes>,
    /// A user name and its password.
    pub login: Option<(String, SecretBytes)>,
    /// Encrypts the private key on disk.
    pub passphrase: Option<SecretBytes>,
    /// The bound credential that is this passphrase, where nobody but the TPM has it.
    pub by_tpm: Option<Uuid>,
    /// Also while it is locked: nothing opens the one that it replaces any more.
    pub even_locked: bool,
}

/// An identity as it is on disk.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StoredIdentity {
    certificates: String,
    user: Option<String>,
    secret: StoredSecret,
    /// As in [`NewIdentity`]: with which of those on disk it belongs changes with it, in one file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) by_tpm: Option<Uuid>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum StoredSecret {
    Plain(SecretPart),
    /// An armored age file that holds the JSON of a [`SecretPart`].
    #[serde(rename = "sealed")]
    Encrypted(String),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SecretPart {
    key: String,
    password: Option<String>,
}

impl Drop for SecretPart {
    fn drop(&mut self) {
        self.key.zeroize();
        self.password.zeroize();
    }
}

impl Identity {
    /// Puts together what an admin brought; `waiting` are keys that are here already, of a request or of the
    /// identity that is being renewed.
    pub(super) fn assemble(
        new: &NewIdentity,
        waiting: impl IntoIterator<Item = PKey<Private>>,
    ) -> Result<Self, IdentityError> {
        let given = match &new.key {
            Some(pem) => Some(private_key(pem.expose())?),
            None => private_key(new.certificate.expose()).ok(),
        };
        let client = match given {
            Some(key) => ClientIdentity::of(new.certificate.expose(), [key])?,
            None => match ClientIdentity::of(new.certificate.expose(), waiting) {
                Err(NoIdentity::AnotherKey) => return Err(IdentityError::NoKey),
                client => client?,
            },
        };
        let login = match &new.login {
            Some((user, password)) => Some(Arc::new(Login {
                user: user.clone(),
                password: SecretBytes::copy_of(password.expose()).map_err(IdentityError::Memory)?,
            })),
            None => None,
        };
        Ok(Self { client, login })
    }

    /// Its form on disk.
    pub(super) fn stored(&self, passphrase: Option<&SecretBytes>) -> Result<StoredIdentity, IdentityError> {
        let mut certificates = Vec::new();
        for certificate in &self.client.certificates {
            certificates.extend(certificate.to_pem().map_err(NoIdentity::Certificate)?);
        }
        let key = key_to_pem(&self.client.key)?;
        let secret = SecretPart {
            key: String::from_utf8_lossy(&key).into_owned(),
            password: self
                .login
                .as_ref()
                .map(|login| String::from_utf8_lossy(login.password.expose()).into_owned()),
        };
        let secret = match passphrase {
            None => StoredSecret::Plain(secret),
            Some(passphrase) => {
                let text = Transient::new(serde_json::to_vec(&secret).map_err(IdentityError::Json)?);
                let file = age_file::encrypt(&text, passphrase, Form::Armored)?;
                StoredSecret::Encrypted(String::from_utf8_lossy(&file).into_owned())
            }
        };
        Ok(StoredIdentity {
            certificates: String::from_utf8_lossy(&certificates).into_owned(),
            user: self.login.as_ref().map(|login| login.user.clone()),
            secret,
            by_tpm: None,
        })
    }

    /// Asks for another certificate of the same key and subject, in PEM.
    pub(super) fn signing_request(&self) -> Result<String, IdentityError> {
        let subject = self.leaf()?.subject_name();
        let pem = request(&self.client.key, subject).map_err(NoIdentity::Key)?;
        Ok(String::from_utf8_lossy(&pem).into_owned())
    }

    pub(super) fn leaf(&self) -> Result<&X509, NoIdentity> {
        self.client.certificates.first().ok_or(NoIdentity::NoCertificate)
    }
}

impl StoredIdentity {
    pub(super) fn is_encrypted(&self) -> bool {
        matches!(self.secret, StoredSecret::Encrypted(_))
    }

    /// Of its certificate, and so of its key, which may be encrypted.
    pub(super) fn public_key(&self) -> Option<PKey<Public>> {
        let certificates = X509::stack_from_pem(self.certificates.as_bytes()).ok()?;
        certificates.first()?.public_key().ok()
    }

    /// # Errors
    /// [`AgeError::WrongPassphrase`] and its like inside [`IdentityError::Age`].
    pub(super) fn open(&self, passphrase: Option<&SecretBytes>) -> Result<Identity, IdentityError> {
        let decrypted;
        let secret = match (&self.secret, passphrase) {
            (StoredSecret::Plain(secret), _) => secret,
            (StoredSecret::Encrypted(_), None) => return Err(IdentityError::Encrypted),
            (StoredSecret::Encrypted(file), Some(passphrase)) => {
                let text = age_file::decrypt(file.as_bytes(), passphrase)?;
                decrypted = serde_json::from_slice::<SecretPart>(&text).map_err(IdentityError::Json)?;
                &decrypted
            }
        };
        let login = match (&self.user, &secret.password) {
            (Some(user), Some(password)) => Some(Arc::new(Login {
                user: user.clone(),
                password: SecretBytes::copy_of(password.as_bytes()).map_err(IdentityError::Memory)?,
            })),
            _ => None,
        };
        let client = ClientIdentity {
            certificates: X509::stack_from_pem(self.certificates.as_bytes())
                .map_err(NoIdentity::Certificate)?,
            key: private_key(secret.key.as_bytes())?,
        };
        Ok(Identity { client, login })
    }
}

/// A key that was made here, and what asks for its certificate.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SigningRequest {
    key: String,
    /// PEM.
    pub(super) csr: String,
    /// The one made before it, which may be the one that is being signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    before: Option<Box<SigningRequest>>,
}

impl Drop for SigningRequest {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

/// The kind of a key that is made here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeyKind {
    /// NIST P-256.
    EcP256,
    /// 3072 bits, for appliances that know nothing else.
    Rsa3072,
}

impl SigningRequest {
    /// A new key, and a request for a TLS client certificate with the common name `cn`.
    pub(super) fn new(kind: KeyKind, cn: &str) -> Result<Self, NoIdentity> {
        let key = match kind {
            KeyKind::EcP256 => EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)
                .and_then(|group| EcKey::generate(&group))
                .and_then(PKey::from_ec_key),
            KeyKind::Rsa3072 => Rsa::generate(3072).and_then(PKey::from_rsa),
        };
        let key = key.map_err(NoIdentity::Key)?;
        let csr = common_name(cn)
            .and_then(|name| request(&key, &name))
            .map_err(NoIdentity::Key)?;
        Ok(Self {
            key: String::from_utf8_lossy(&key_to_pem(&key)?).into_owned(),
            csr: String::from_utf8_lossy(&csr).into_owned(),
            before: None,
        })
    }

    /// `before`, and what came before that, goes on waiting.
    pub(super) fn after(mut self, before: Option<Self>) -> Self {
        self.before = before.map(Box::new);
        let mut last = Some(&mut self);
        for _ in 1..MAX_WAITING {
            last = last.and_then(|request| request.before.as_deref_mut());
        }
        if let Some(last) = last {
            last.before = None;
        }
        self
    }

    /// The keys of all that wait, the newest first.
    pub(super) fn keys(&self) -> Result<Vec<PKey<Private>>, NoIdentity> {
        let all = std::iter::successors(Some(self), |request| request.before.as_deref());
        all.map(SigningRequest::key).collect()
    }

    pub(super) fn is_for<T: HasPublic>(&self, key: &PKey<T>) -> bool {
        self.key().is_ok_and(|own| own.public_eq(key))
    }

    /// Drops the one for `key` and what came before that.
    pub(super) fn forget_from<T: HasPublic>(&mut self, key: &PKey<T>) -> Change {
        let mut at = self;
        while let Some(before) = &at.before {
            if before.is_for(key) {
                at.before = None;
                return Change::Changed;
            }
            let Some(next) = at.before.as_deref_mut() else {
                break;
            };
            at = next;
        }
        Change::Unchanged
    }

    fn key(&self) -> Result<PKey<Private>, NoIdentity> {
        private_key(self.key.as_bytes())
    }
}

fn common_name(cn: &str) -> Result<X509Name, ErrorStack> {
    let mut name = X509NameBuilder::new()?;
    name.append_entry_by_nid(Nid::COMMONNAME, cn)?;
    Ok(name.build())
}

fn request(key: &PKey<Private>, subject: &X509NameRef) -> Result<Vec<u8>, ErrorStack> {
    let mut request = X509ReqBuilder::new()?;
    request.set_version(0)?;
    request.set_subject_name(subject)?;
    request.set_pubkey(key)?;
    let mut extensions = openssl::stack::Stack::new()?;
    extensions.push(ExtendedKeyUsage::new().client_auth().build()?)?;
    request.add_extensions(&extensions)?;
    // These sign without a digest (RFC 8410, section 3).
    let digest = match key.id() {
        Id::ED25519 | Id::ED448 => MessageDigest::null(),
        _ => MessageDigest::sha256(),
    };
    request.sign(key, digest)?;
    request.build().to_pem()
}

fn key_to_pem(key: &PKey<Private>) -> Result<Transient, NoIdentity> {
    key.private_key_to_pem_pkcs8()
        .map(Transient::new)
        .map_err(NoIdentity::Key)
}

/// Why an identity can't be used.
#[derive(Debug, Error)]
pub(crate) enum IdentityError {
    #[error(transparent)]
    Client(#[from] NoIdentity),
    #[error(
        "no private key fits the certificate: neither the one of the last signing request nor the one in use"
    )]
    NoKey,
    #[error("the private key is encrypted: a passphrase opens it")]
    Encrypted,
    #[error(transparent)]
    Age(#[from] AgeError),
    #[error("the stored identity is damaged")]
    Json(#[source] serde_json::Error),
    #[error("no memory for a key (is RLIMIT_MEMLOCK too low?)")]
    Memory(#[source] std::io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::toolbox::certificate::CertificateFacts;
    use virtseal_testkit::servers::Authority;

    fn secret(bytes: &[u8]) -> SecretBytes {
        SecretBytes::take(&mut bytes.to_vec()).unwrap()
    }

    fn new(certificate: &[u8], key: Option<&[u8]>) -> NewIdentity {
        NewIdentity {
            certificate: secret(certificate),
            key: key.map(secret),
            login: None,
            passphrase: None,
            by_tpm: None,
            even_locked: false,
        }
    }

    #[test]
    fn key_must_be_the_certificates() {
        let authority = Authority::new();
        let (one, other) = (authority.client("a", 90), authority.client("b", 90));
        assert!(Identity::assemble(&new(&one.certificate, Some(&one.key)), []).is_ok());
        let both = [one.key.clone(), one.certificate.clone()].concat();
        assert!(Identity::assemble(&new(&both, None), []).is_ok());
        let error = Identity::assemble(&new(&one.certificate, Some(&other.key)), [])
            .err()
            .unwrap();
        assert!(matches!(error, IdentityError::Client(NoIdentity::AnotherKey)));
        let error = Identity::assemble(&new(&one.certificate, None), [])
            .err()
            .unwrap();
        assert!(matches!(error, IdentityError::NoKey));
        for (certificate, key) in [(&b""[..], &one.key), (b"junk", &one.key), (&one.key, &one.key)] {
            assert!(Identity::assemble(&new(certificate, Some(key)), []).is_err());
        }
    }

    #[test]
    fn expired_certificates_are_refused() {
        let old = Authority::new().client("a", -1);
        let error = Identity::assemble(&new(&old.certificate, Some(&old.key)), [])
            .err()
            .unwrap();
        assert!(matches!(error, IdentityError::Client(NoIdentity::Expired(_))));
    }

    #[test]
    fn signed_request_becomes_an_identity() {
        for kind in [KeyKind::EcP256, KeyKind::Rsa3072] {
            let request = SigningRequest::new(kind, "host1").unwrap();
            let certificate = Authority::new().sign(request.csr.as_bytes(), 90);
            let identity = Identity::assemble(&new(&certificate, None), [request.key().unwrap()]).unwrap();
            let leaf = identity.leaf().unwrap();
            assert_eq!(CertificateFacts::of(leaf).unwrap().subject, "CN=host1");
        }
    }

    #[test]
    fn encrypted_on_disk_and_opened_again() {
        let client = Authority::new().client("a", 90);
        let mut brought = new(&client.certificate, Some(&client.key));
        brought.login = Some(("vm-host".into(), secret(b"tiger")));
        let identity = Identity::assemble(&brought, []).unwrap();
        let stored = identity.stored(Some(&secret(b"pass"))).unwrap();
        let json = serde_json::to_string(&stored).unwrap();
        for needle in ["PRIVATE KEY", "tiger"] {
            assert!(!json.contains(needle));
        }
        let read: StoredIdentity = serde_json::from_str(&json).unwrap();
        assert!(matches!(read.open(None), Err(IdentityError::Encrypted)));
        assert!(matches!(
            read.open(Some(&secret(b"no"))),
            Err(IdentityError::Age(AgeError::WrongPassphrase))
        ));
        let opened = read.open(Some(&secret(b"pass"))).unwrap();
        assert_eq!(opened.login.unwrap().password.expose(), b"tiger");
        assert!(opened.client.key.public_eq(&identity.client.key));
    }
}
