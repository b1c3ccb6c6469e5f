//! For tests: certificate authorities here, PyKMIP servers and a proxy that can misbehave in their own files.

mod fake;
mod proxy;
mod server;

pub(in crate::provider) use fake::{Fake, Fault};
pub(in crate::provider) use proxy::{Manner, Proxy};
pub(in crate::provider) use server::{Kmip, Server, TlsServer, free_port, identity, secret, settings};

use crate::provider::toolbox::revocation;
use openssl::asn1::Asn1Time;
use openssl::bn::{BigNum, MsbOption};
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{HasPublic, PKey, PKeyRef, Private};
use openssl::x509::extension::{BasicConstraints, ExtendedKeyUsage, SubjectAlternativeName};
use openssl::x509::{X509, X509Builder, X509Name, X509NameBuilder, X509NameRef, X509Req};

/// A certificate and its key, both PEM.
pub(in crate::provider) struct Certified {
    pub(in crate::provider) certificate: Vec<u8>,
    pub(in crate::provider) key: Vec<u8>,
}

/// A CA with EC P-256 keys.
pub(in crate::provider) struct Authority {
    pub(in crate::provider) certificate: X509,
    key: PKey<Private>,
}

impl Authority {
    pub(in crate::provider) fn new() -> Self {
        let key = new_key();
        let name = named("virtseal test CA");
        let mut builder = builder(&name, &name, &key, 365);
        builder
            .append_extension(BasicConstraints::new().critical().ca().build().unwrap())
            .unwrap();
        builder.sign(&key, MessageDigest::sha256()).unwrap();
        Self {
            certificate: builder.build(),
            key,
        }
    }

    pub(in crate::provider) fn pem(&self) -> String {
        String::from_utf8(self.certificate.to_pem().unwrap()).unwrap()
    }

    /// A client's certificate that ends in `days` days.
    pub(in crate::provider) fn client(&self, cn: &str, days: i64) -> Certified {
        let key = new_key();
        let certificate = self.issue(&named(cn), &key, days, false);
        certified(&certificate, &key)
    }

    /// A server's certificate for localhost.
    pub(in crate::provider) fn server(&self, days: i64) -> Certified {
        let key = new_key();
        let certificate = self.issue(&named("kms"), &key, days, true);
        certified(&certificate, &key)
    }

    /// Its revocation list (PEM), with the certificate `revoked` (PEM) on it.
    pub(in crate::provider) fn revocation_list(&self, revoked: &[u8]) -> String {
        let revoked = X509::from_pem(revoked).unwrap();
        revocation::list(&self.certificate, &self.key, &[&revoked])
    }

    /// The client's certificate that a PEM request asks for.
    pub(in crate::provider) fn sign(&self, csr: &[u8], days: i64) -> Vec<u8> {
        let request = X509Req::from_pem(csr).unwrap();
        let key = request.public_key().unwrap();
        assert!(request.verify(&key).unwrap());
        self.issue(request.subject_name(), &key, days, false)
            .to_pem()
            .unwrap()
    }

    fn issue<K: HasPublic>(&self, subject: &X509NameRef, key: &PKeyRef<K>, days: i64, server: bool) -> X509 {
        let mut builder = builder(subject, self.certificate.subject_name(), key, days);
        let mut usage = ExtendedKeyUsage::new();
        let usage = if server {
            usage.server_auth()
        } else {
            usage.client_auth()
        };
        builder.append_extension(usage.build().unwrap()).unwrap();
        if server {
            let names = SubjectAlternativeName::new()
                .dns("localhost")
                .ip("127.0.0.1")
                .build(&builder.x509v3_context(Some(&self.certificate), None))
                .unwrap();
            builder.append_extension(names).unwrap();
        }
        builder.sign(&self.key, MessageDigest::sha256()).unwrap();
        builder.build()
    }
}

fn certified(certificate: &X509, key: &PKey<Private>) -> Certified {
    Certified {
        certificate: certificate.to_pem().unwrap(),
        key: key.private_key_to_pem_pkcs8().unwrap(),
    }
}

fn new_key() -> PKey<Private> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
    PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap()
}

fn named(cn: &str) -> X509Name {
    let mut name = X509NameBuilder::new().unwrap();
    name.append_entry_by_nid(Nid::COMMONNAME, cn).unwrap();
    name.build()
}

fn builder<K: HasPublic>(
    subject: &X509NameRef,
    issuer: &X509NameRef,
    key: &PKeyRef<K>,
    days: i64,
) -> X509Builder {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let now = i64::try_from(now.as_secs()).unwrap();
    let mut serial = BigNum::new().unwrap();
    serial.rand(64, MsbOption::MAYBE_ZERO, false).unwrap();
    let mut builder = X509Builder::new().unwrap();
    builder.set_version(2).unwrap();
    builder
        .set_serial_number(&serial.to_asn1_integer().unwrap())
        .unwrap();
    builder.set_subject_name(subject).unwrap();
    builder.set_issuer_name(issuer).unwrap();
    builder.set_pubkey(key).unwrap();
    let from = Asn1Time::from_unix(now - 10 * 86_400).unwrap();
    let until = Asn1Time::from_unix(now + days * 86_400 + 3600 * days.signum()).unwrap();
    builder.set_not_before(&from).unwrap();
    builder.set_not_after(&until).unwrap();
    builder
}
