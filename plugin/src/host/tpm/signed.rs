//! Signatures of what PCR 11 will be, one for each kernel and phase of its boot, as `systemd-measure sign` or `ukify` make them
//! and systemd-stub hands them over (systemd-measure(1), "tpm2-pcr-signature.json").
//!
//! The file is believed in nothing: what counts is that a signature verifies by the key that was enrolled, here and then by the
//! TPM itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use openssl::base64::decode_block;
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Public};
use openssl::rsa::Rsa;
use openssl::sign::Verifier;
use serde::Deserialize;
use thiserror::Error;

use super::digest::PolicyDigest;
use super::pcr_list::{KERNEL, PcrList};

/// The public key that signs what PCR 11 may be.
#[derive(Clone)]
pub(crate) struct SigningKey {
    key: PKey<Public>,
    rsa: Rsa<Public>,
}

impl PartialEq for SigningKey {
    fn eq(&self, other: &Self) -> bool {
        self.to_der() == other.to_der()
    }
}

impl Eq for SigningKey {}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.fingerprint())
    }
}

/// The text is no key that a TPM verifies with.
#[derive(Debug, Error)]
pub(crate) enum NotASigningKey {
    #[error("the public key is not one in PEM (-----BEGIN PUBLIC KEY-----)")]
    Pem(#[source] openssl::error::ErrorStack),
    #[error("the public key is not an RSA key of 2048, 3072 or 4096 bits with the exponent 65537")]
    Kind,
}

impl SigningKey {
    pub(crate) fn from_pem(pem: &[u8]) -> Result<Self, NotASigningKey> {
        Self::of(PKey::public_key_from_pem(pem).map_err(NotASigningKey::Pem)?)
    }

    /// The reverse of [`SigningKey::to_der`].
    pub(super) fn from_der(der: &[u8]) -> Result<Self, NotASigningKey> {
        Self::of(PKey::public_key_from_der(der).map_err(NotASigningKey::Pem)?)
    }

    fn of(key: PKey<Public>) -> Result<Self, NotASigningKey> {
        let rsa = key.rsa().map_err(|_| NotASigningKey::Kind)?;
        let exponent = openssl::bn::BigNum::from_u32(65537).map_err(NotASigningKey::Pem)?;
        let usable = matches!(rsa.size(), 256 | 384 | 512) && *rsa.e() == *exponent;
        usable.then_some(Self { key, rsa }).ok_or(NotASigningKey::Kind)
    }

    /// A key that signs kernels, and its public half.
    #[cfg(test)]
    pub(crate) fn pair() -> (virtseal_testkit::KernelKey, Self) {
        let key = virtseal_testkit::KernelKey::generate().unwrap();
        let public = Self::from_pem(&key.public_pem().unwrap()).unwrap();
        (key, public)
    }

    /// A SubjectPublicKeyInfo.
    pub(super) fn to_der(&self) -> Vec<u8> {
        self.key
            .public_key_to_der()
            .expect("a public key has a form in DER")
    }

    /// SHA-256 of its PKCS #1 form, as hex digits: what systemd calls `pkfp`.
    pub(crate) fn fingerprint(&self) -> String {
        let der = self.rsa.public_key_to_der_pkcs1();
        hex::encode(openssl::sha::sha256(
            &der.expect("an RSA public key has a form in DER"),
        ))
    }

    pub(super) fn modulus(&self) -> Vec<u8> {
        self.rsa.n().to_vec()
    }

    fn verifies(&self, policy: &PolicyDigest, signature: &[u8]) -> bool {
        Verifier::new(MessageDigest::sha256(), &self.key)
            .and_then(|mut verifier| verifier.verify_oneshot(signature, &policy.0))
            .unwrap_or(false)
    }
}

/// One signed policy.
#[derive(Clone, Debug)]
pub(super) struct Signature {
    /// 11, and perhaps others.
    pub(super) pcrs: BTreeSet<u8>,
    /// What was signed: the digest of a PolicyPCR of these.
    pub(super) policy: PolicyDigest,
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    pub(super) bytes: Vec<u8>,
}

/// Why no signature covers this boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unsigned {
    NoFile,
    /// Files that can't be read, and no other one helps.
    Unreadable(String),
    /// The files have signatures, by other keys.
    ByOthers,
    /// There are some by the key, for other kernels.
    OtherBoot,
}

impl fmt::Display for Unsigned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoFile => write!(
                f,
                "there is no {FILE} in {}",
                DIRECTORIES.map(|directory| format!("/{directory}")).join(", ")
            ),
            Self::Unreadable(why) => f.write_str(why),
            Self::ByOthers => write!(f, "{FILE} has none by it"),
            Self::OtherBoot => write!(f, "those in {FILE} are for other kernels or phases of a boot"),
        }
    }
}

const FILE: &str = "tpm2-pcr-signature.json";
/// Where systemd looks for it.
const DIRECTORIES: [&str; 4] = [
    "etc/systemd",
    "run/systemd",
    "usr/local/lib/systemd",
    "usr/lib/systemd",
];
/// More than the signatures of a hundred kernels.
const MAX_FILE: u64 = 1 << 20;

/// The bank that we use, of the file's.
#[derive(Deserialize)]
struct File {
    #[serde(default)]
    sha256: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    pcrs: BTreeSet<u8>,
    pol: String,
    sig: String,
}

/// What the host has of signatures.
#[derive(Clone, Debug, Default)]
pub(super) struct Signatures {
    all: Vec<Signature>,
    unreadable: Option<String>,
}

impl Signatures {
    /// All that is below `root`, which is `/` but in tests.
    pub(super) fn read(root: &Path) -> Self {
        let mut found = Self::default();
        for directory in DIRECTORIES {
            let path = root.join(directory).join(FILE);
            match read_file(&path) {
                Ok(signatures) => found.all.extend(signatures),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    found
                        .unreadable
                        .get_or_insert_with(|| format!("{}: {error}", shown(&path, root)));
                }
            }
        }
        found
    }

    /// The PCRs whose values it takes to find the one for this boot.
    pub(super) fn pcrs(&self) -> BTreeSet<u8> {
        self.all.iter().flat_map(|one| &one.pcrs).copied().collect()
    }

    /// The one by `key` for what the PCRs are now.
    pub(super) fn find(
        &self,
        key: &SigningKey,
        values: &BTreeMap<u8, Vec<u8>>,
    ) -> Result<&Signature, Unsigned> {
        let by_key: Vec<_> = self
            .all
            .iter()
            .filter(|one| key.verifies(&one.policy, &one.bytes))
            .collect();
        let is_now = |one: &&&Signature| {
            let of_these = values.iter().filter(|(pcr, _)| one.pcrs.contains(pcr));
            let now: BTreeMap<u8, Vec<u8>> = of_these.map(|(pcr, value)| (*pcr, value.clone())).collect();
            now.len() == one.pcrs.len() && PolicyDigest::EMPTY.pcrs(&now) == one.policy
        };
        if let Some(found) = by_key.iter().find(is_now) {
            return Ok(found);
        }
        Err(match (&self.unreadable, self.all.is_empty(), by_key.is_empty()) {
            (Some(why), ..) => Unsigned::Unreadable(why.clone()),
            (None, true, _) => Unsigned::NoFile,
            (None, false, true) => Unsigned::ByOthers,
            (None, false, false) => Unsigned::OtherBoot,
        })
    }
}

/// A pipe or a device in its place is an error, not a wait.
fn read_file(path: &Path) -> io::Result<Vec<Signature>> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    let mut text = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_FILE {
        return Err(io::Error::other("it has more than 1 MiB"));
    }
    let file: File = serde_json::from_slice(&text).map_err(io::Error::other)?;
    Ok(file.sha256.into_iter().filter_map(Entry::signature).collect())
}

impl Entry {
    /// `None` for one that is of no use here.
    fn signature(self) -> Option<Signature> {
        let policy = <[u8; 32]>::try_from(hex::decode(&self.pol).ok()?).ok()?;
        let usable = self.pcrs.contains(&KERNEL) && self.pcrs.iter().all(|pcr| *pcr < PcrList::COUNT);
        Some(Signature {
            pcrs: usable.then_some(self.pcrs)?,
            policy: PolicyDigest(policy),
            bytes: decode_block(&self.sig).ok()?,
        })
    }
}

fn shown(path: &Path, root: &Path) -> String {
    let below = path.strip_prefix(root).unwrap_or(path);
    PathBuf::from("/").join(below).display().to_string()
}
