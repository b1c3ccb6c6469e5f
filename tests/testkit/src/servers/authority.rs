//! A certificate authority with EC P-256 keys, which also revokes.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use openssl::asn1::Asn1Time;
use openssl::bn::{BigNum, MsbOption};
use openssl::ec::{EcGroup, EcKey};
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

/// The authority.
pub struct Authority {
    certificate: X509,
    key: PKey<Private>,
}

impl Authority {
    /// A new one.
    ///
    /// # Errors
    /// OpenSSL's.
    pub fn new() -> Result<Self> {
        let (key, name) = (new_key()?, named("virtseal test CA")?);
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
    ///
    /// # Errors
    /// OpenSSL's.
    pub fn pem(&self) -> Result<Vec<u8>> {
        Ok(self.certificate.to_pem()?)
    }

    /// A client's certificate that ends in `days` days.
    ///
    /// # Errors
    /// OpenSSL's.
    pub fn client(&self, cn: &str, days: i64) -> Result<Certified> {
        self.issue(cn, days, false)
    }

    /// A server's certificate for localhost and 127.0.0.1 that ends in `days` days.
    ///
    /// # Errors
    /// OpenSSL's.
    pub fn server(&self, days: i64) -> Result<Certified> {
        self.issue("kms", days, true)
    }

    /// The client's certificate (PEM) that a request (PEM) asks for.
    ///
    /// # Errors
    /// It is no request, or not signed by its key.
    pub fn sign(&self, request: &[u8], days: i64) -> Result<Vec<u8>> {
        let request = X509Req::from_pem(request)?;
        let key = request.public_key()?;
        ensure!(request.verify(&key)?, "the request is not signed by its key");
        let mut builder = builder(
            request.subject_name(),
            self.certificate.subject_name(),
            &key,
            days,
        )?;
        builder.append_extension(ExtendedKeyUsage::new().client_auth().build()?)?;
        builder.sign(&self.key, MessageDigest::sha256())?;
        Ok(builder.build().to_pem()?)
    }

    /// Its revocation list (PEM), with the certificates `revoked` (PEM) in it.
    ///
    /// # Errors
    /// `openssl` is missing or refuses.
    pub fn revocation_list(&self, revoked: &[&[u8]]) -> Result<Vec<u8>> {
        let dir = tempfile::tempdir()?;
        let path = |file: &str| dir.path().join(file);
        fs::write(path("ca.pem"), self.pem()?)?;
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
        Ok(output.stdout)
    }

    fn issue(&self, cn: &str, days: i64, server: bool) -> Result<Certified> {
        let key = new_key()?;
        let mut builder = builder(&*named(cn)?, self.certificate.subject_name(), &key, days)?;
        let mut usage = ExtendedKeyUsage::new();
        let usage = if server {
            usage.server_auth()
        } else {
            usage.client_auth()
        };
        builder.append_extension(usage.build()?)?;
        if server {
            let names = SubjectAlternativeName::new()
                .dns("localhost")
                .ip("127.0.0.1")
                .build(&builder.x509v3_context(Some(&self.certificate), None))?;
            builder.append_extension(names)?;
        }
        builder.sign(&self.key, MessageDigest::sha256())?;
        Ok(Certified {
            certificate: builder.build().to_pem()?,
            key: key.private_key_to_pem_pkcs8()?,
        })
    }
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
    builder.set_not_after(&*Asn1Time::from_unix(now + days * 86_400)?)?;
    Ok(builder)
}
