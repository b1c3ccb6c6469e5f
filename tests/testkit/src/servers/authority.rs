//! A certificate authority with EC P-256 keys, which also revokes.
//!
//! That OpenSSL makes no key or certificate would be a fault of the machine: it panics then.

use std::fs;
use std::net::IpAddr;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use openssl::asn1::Asn1Time;
use openssl::bn::{BigNum, MsbOption};
use openssl::ec::{EcGroup, EcKey};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{HasPublic, PKey, PKeyRef, Private};
use openssl::x509::extension::{BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName};
use openssl::x509::{X509, X509Builder, X509Name, X509NameBuilder, X509NameRef, X509Req};

/// A certificate and its key, both PEM.
pub struct Certified {
    /// The certificate.
    pub certificate: Vec<u8>,
    /// Its private key, not encrypted.
    pub key: Vec<u8>,
}

impl Certified {
    /// Its certificate.
    #[must_use]
    pub fn certificate_pem(&self) -> String {
        made(String::from_utf8(self.certificate.clone()).map_err(Into::into))
    }

    /// Its certificate and its private key.
    #[must_use]
    pub fn pem(&self) -> String {
        self.certificate_pem() + &made(String::from_utf8(self.key.clone()).map_err(Into::into))
    }
}

/// The authority.
#[derive(Clone)]
pub struct Authority {
    certificate: X509,
    key: PKey<Private>,
}

impl Authority {
    /// A new one.
    #[expect(clippy::new_without_default, reason = "each is another one")]
    #[must_use]
    pub fn new() -> Self {
        Self::named("virtseal test CA")
    }

    /// A new one that calls itself `cn`.
    #[must_use]
    pub fn named(cn: &str) -> Self {
        made(Self::try_named(cn))
    }

    fn try_named(cn: &str) -> Result<Self> {
        let (key, name) = (new_key()?, named(cn)?);
        let mut builder = builder(&name, &name, &key, 365)?;
        builder.append_extension(BasicConstraints::new().critical().ca().build()?)?;
        builder.append_extension(KeyUsage::new().critical().key_cert_sign().crl_sign().build()?)?;
        builder.sign(&key, MessageDigest::sha256())?;
        Ok(Self {
            certificate: builder.build(),
            key,
        })
    }

    /// Its own certificate.
    #[must_use]
    pub fn pem(&self) -> String {
        text(self.certificate.to_pem())
    }

    /// A client's certificate that ends in `days` days.
    #[must_use]
    pub fn client(&self, cn: &str, days: i64) -> Certified {
        made(self.certify(cn, days, Usage::Client))
    }

    /// A server's certificate for localhost and 127.0.0.1 that ends in `days` days.
    #[must_use]
    pub fn server(&self, days: i64) -> Certified {
        self.server_for(&["localhost", "127.0.0.1"], days)
    }

    /// The same for a server of these names and addresses.
    #[must_use]
    pub fn server_for(&self, names: &[&str], days: i64) -> Certified {
        made(self.certify("kms", days, Usage::Server(names)))
    }

    /// The client's certificate (PEM) that a request (PEM) asks for.
    #[must_use]
    pub fn sign(&self, request: &[u8], days: i64) -> Vec<u8> {
        made(self.try_sign(request, days))
    }

    fn try_sign(&self, request: &[u8], days: i64) -> Result<Vec<u8>> {
        let request = X509Req::from_pem(request)?;
        let key = request.public_key()?;
        ensure!(request.verify(&key)?, "the request is not signed by its key");
        Ok(self
            .issue(request.subject_name(), &key, days, Usage::Client)?
            .to_pem()?)
    }

    /// Its revocation list (PEM), with the certificates `revoked` (PEM) in it.
    #[must_use]
    pub fn revocation_list(&self, revoked: &[&[u8]]) -> String {
        made(self.try_revocation_list(revoked))
    }

    fn try_revocation_list(&self, revoked: &[&[u8]]) -> Result<String> {
        let dir = tempfile::tempdir()?;
        let path = |file: &str| dir.path().join(file);
        fs::write(path("ca.pem"), self.pem())?;
        fs::write(path("ca.key"), self.key.private_key_to_pem_pkcs8()?)?;
        let mut index = String::new();
        for certificate in revoked {
            let serial = X509::from_pem(certificate)?
                .serial_number()
                .to_bn()?
                .to_hex_str()?
                .to_string();
            index.push_str(&format!(
                "R\t491231235959Z\t200101000000Z\t{serial}\tunknown\t/CN=x\n"
            ));
        }
        fs::write(path("index.txt"), index)?;
        let configuration = "[ca]\ndefault_ca=it\n[it]\ndatabase=index.txt\ndefault_md=sha256\n";
        fs::write(path("ca.cnf"), configuration)?;
        let output = Command::new("openssl")
            .args(["ca", "-config", "ca.cnf", "-gencrl", "-crldays", "30"])
            .args(["-keyfile", "ca.key", "-cert", "ca.pem"])
            .current_dir(dir.path())
            .output()
            .context("openssl did not start: install openssl")?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "openssl ca -gencrl: {complaint}");
        Ok(String::from_utf8(output.stdout)?)
    }

    fn certify(&self, cn: &str, days: i64, usage: Usage<'_>) -> Result<Certified> {
        let key = new_key()?;
        let certificate = self.issue(&*named(cn)?, &key, days, usage)?;
        Ok(Certified {
            certificate: certificate.to_pem()?,
            key: key.private_key_to_pem_pkcs8()?,
        })
    }

    fn issue<K: HasPublic>(
        &self,
        subject: &X509NameRef,
        key: &PKeyRef<K>,
        days: i64,
        usage: Usage<'_>,
    ) -> Result<X509> {
        let mut builder = builder(subject, self.certificate.subject_name(), key, days)?;
        let mut extension = ExtendedKeyUsage::new();
        match usage {
            Usage::Client => builder.append_extension(extension.client_auth().build()?)?,
            Usage::Server(names) => {
                builder.append_extension(extension.server_auth().build()?)?;
                let mut alternatives = SubjectAlternativeName::new();
                for name in names {
                    match name.parse::<IpAddr>() {
                        Ok(_) => alternatives.ip(name),
                        Err(_) => alternatives.dns(name),
                    };
                }
                let alternatives =
                    alternatives.build(&builder.x509v3_context(Some(&self.certificate), None))?;
                builder.append_extension(alternatives)?;
            }
        }
        builder.sign(&self.key, MessageDigest::sha256())?;
        Ok(builder.build())
    }
}

#[derive(Clone, Copy)]
enum Usage<'a> {
    Client,
    /// With these names and addresses.
    Server(&'a [&'a str]),
}

fn made<T>(made: Result<T>) -> T {
    made.expect("OpenSSL makes keys and certificates")
}

fn text(pem: Result<Vec<u8>, ErrorStack>) -> String {
    made(
        pem.map_err(Into::into)
            .and_then(|pem| Ok(String::from_utf8(pem)?)),
    )
}

fn new_key() -> Result<PKey<Private>> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    Ok(PKey::from_ec_key(EcKey::generate(&group)?)?)
}

fn named(cn: &str) -> Result<X509Name> {
    let mut name = X509NameBuilder::new()?;
    name.append_entry_by_nid(Nid::COMMONNAME, cn)?;
    Ok(name.build())
}

fn builder<K: HasPublic>(
    subject: &X509NameRef,
    issuer: &X509NameRef,
    key: &PKeyRef<K>,
    days: i64,
) -> Result<X509Builder> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let now = i64::try_from(now.as_secs())?;
    let mut serial = BigNum::new()?;
    serial.rand(64, MsbOption::ONE, false)?;
    let mut builder = X509Builder::new()?;
    builder.set_version(2)?;
    builder.set_serial_number(&*serial.to_asn1_integer()?)?;
    builder.set_subject_name(subject)?;
    builder.set_issuer_name(issuer)?;
    builder.set_pubkey(key)?;
    builder.set_not_before(&*Asn1Time::from_unix(now - 10 * 86_400)?)?;
    builder.set_not_after(&*Asn1Time::from_unix(now + days * 86_400 + 3600 * days.signum())?)?;
    Ok(builder)
}
