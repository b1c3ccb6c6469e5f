//! Why a provider does not do as asked, as an exit code and the next command.

use std::fmt;

use thiserror::Error;

use super::OpenError;
use crate::model::envelope::{EnvelopeError, ProviderId, VmId};
use crate::model::problem::{Code, Problem, chain};
use crate::provider::native::NativeProvider;
use crate::provider::{PinRefusal, ProviderError};

/// No provider has this name or id.
#[derive(Debug, Error)]
#[error("there is no key provider {0:?} on this host")]
pub struct UnknownProvider(pub String);

impl From<UnknownProvider> for Problem {
    fn from(error: UnknownProvider) -> Self {
        Self::new(Code::NotFound, error.to_string()).next("virtseal provider list")
    }
}

/// Why there is no new envelope.
#[derive(Debug, Error)]
pub enum SealError {
    /// There is no provider at all.
    #[error("there is no key provider on this host")]
    NoProvider,
    /// None has the name that was given.
    #[error(transparent)]
    UnknownProvider(#[from] UnknownProvider),
    /// The policy names a provider that is not here.
    #[error("the recipients in virtseald.yaml name {0:?}, and there is no such key provider on this host")]
    UnknownRecipient(String),
    /// The provider does not wrap.
    #[error("provider '{name}'")]
    Refused {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: ProviderError,
    },
    /// The envelope can't be made.
    #[error("can't make an envelope")]
    Envelope(#[from] EnvelopeError),
    /// What was wrapped does not open.
    #[error("what was wrapped does not open again")]
    NotVerified(#[source] OpenError),
    /// What was wrapped opens to something else.
    #[error("provider '{0}' unwraps another key than it was given")]
    AnotherKey(String),
    /// No secret memory.
    #[error("no memory for a key (is RLIMIT_MEMLOCK too low?)")]
    Memory(#[source] std::io::Error),
}

impl SealError {
    /// The exit code and the next command.
    #[must_use]
    pub fn advice(&self) -> (Code, Option<NextCommand>) {
        match self {
            Self::NoProvider => (Code::NotFound, Some(NextCommand::AddNative)),
            Self::UnknownProvider(_) | Self::UnknownRecipient(_) => (Code::NotFound, Some(NextCommand::List)),
            Self::Refused { name, source } => source.advice(name),
            Self::NotVerified(error) => (error.code(), error.next()),
            Self::Envelope(_) | Self::AnotherKey(_) | Self::Memory(_) => (Code::Failed, None),
        }
    }
}

impl From<SealError> for Problem {
    fn from(error: SealError) -> Self {
        let (code, next) = error.advice();
        let failure = match &error {
            // The provider's own words go on from its name.
            SealError::Refused { source, .. } => Self::new(code, format!("{error} {}", chain(source))),
            error => Self::new(code, chain(error)),
        };
        match next {
            Some(next) => failure.next(next.to_string()),
            None => failure,
        }
    }
}

/// What to run, or do, after a refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NextCommand {
    /// `virtseal provider add …`
    AddNative,
    /// `virtseal provider list`
    List,
    /// `virtseal provider unlock NAME`
    Unlock(String),
    /// `virtseal provider unlock NAME --tpm`, with its PIN
    UnlockByPin(String),
    /// `virtseal provider lock NAME`
    Lock(String),
    /// `virtseal provider backup NAME --output FILE`
    Backup(String),
    /// `virtseal provider restore NAME …` or `virtseal provider add KIND NAME --id ID …`
    BringBack(Absent),
    /// Get a KEK back from where its provider keeps it.
    RestoreKek(String),
    /// Get an envelope back as it was.
    RestoreEnvelope(VmId),
    /// `virtseal provider trust NAME`
    Trust(String),
    /// `virtseal provider identity NAME …`
    Identity(String),
    /// Let this host trust who signed the server's certificate, then `virtseal provider unlock NAME`.
    TrustSigner(String),
    /// `virtseal provider unlock NAME …` with another client certificate.
    OtherCertificate(String),
    /// Do without a client certificate, or log in by one.
    LogInByCertificate(String),
    /// What stands for `identity` and `trust` with a transit provider.
    TransitTrust(String),
    /// Get a new PIN from the token's security officer, then `virtseal provider unlock NAME`.
    NewPin(String),
    /// Log in once by another tool, then `virtseal provider unlock NAME`.
    LogInElsewhere(String),
    /// `journalctl -u virtseald`
    Journal,
    /// `virtseal provider show NAME`
    Show(String),
    /// `vault operator unseal`, or OpenBao's, at the server.
    Unseal,
    /// Install a later version.
    Upgrade,
}

impl fmt::Display for NextCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (verb, name) = match self {
            Self::AddNative => return f.write_str("virtseal provider add native main"),
            Self::List => return f.write_str("virtseal provider list"),
            Self::Unseal => {
                return f.write_str("unseal the server (bao operator unseal, vault operator unseal)");
            }
            Self::Upgrade => return f.write_str("upgrade virtseal"),
            Self::Journal => return f.write_str("journalctl -u virtseald"),
            Self::TrustSigner(name) => {
                return write!(
                    f,
                    "put the certificate of who signed the server's into the file of --ca (without one: among the CAs of this \
                     host, update-ca-certificates), then virtseal provider unlock {name}; virtseal provider show {name} names \
                     the server"
                );
            }
            Self::OtherCertificate(name) => {
                return write!(
                    f,
                    "virtseal provider unlock {name} --passphrase-file FILE, with a client certificate and key in it that the \
                     server accepts"
                );
            }
            Self::LogInByCertificate(name) => {
                return write!(
                    f,
                    "let the server ask this host for no client certificate, then virtseal provider show {name}; or log in by \
                     one (virtseal provider add transit --auth cert)"
                );
            }
            Self::TransitTrust(name) => {
                return write!(
                    f,
                    "virtseal provider unlock {name} --passphrase-file FILE for what this host logs in with; the file of --ca for \
                     whom it trusts"
                );
            }
            Self::NewPin(name) => {
                return write!(
                    f,
                    "let the token's security officer set a new PIN (pkcs11-tool --login --login-type so --init-pin), then \
                     virtseal provider unlock {name}"
                );
            }
            Self::LogInElsewhere(name) => {
                return write!(
                    f,
                    "log in once with the right PIN by another tool (pkcs11-tool --login --list-objects), then virtseal \
                     provider unlock {name}"
                );
            }
            Self::UnlockByPin(name) => {
                return write!(
                    f,
                    "virtseal provider unlock {name} --tpm, with its PIN, or without --tpm, with its passphrase"
                );
            }
            Self::BringBack(absent) => return absent.fmt(f),
            Self::Backup(name) => return write!(f, "virtseal provider backup {name} --output FILE"),
            Self::RestoreKek(name) => {
                return write!(
                    f,
                    "restore that key at '{name}' from a backup, if there is one; virtseal provider show {name}"
                );
            }
            Self::RestoreEnvelope(id) => {
                return write!(
                    f,
                    "virtseal vm status {id}, then restore the domain XML (virsh define FILE) and the keystore from a backup"
                );
            }
            Self::Unlock(name) => ("unlock", name),
            Self::Lock(name) => ("lock", name),
            Self::Trust(name) => ("trust", name),
            Self::Identity(name) => ("identity", name),
            Self::Show(name) => ("show", name),
        };
        write!(f, "virtseal provider {verb} {name}")
    }
}

/// A provider that is not on this host, and how it comes back: only native ones have a backup of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Absent {
    /// Its id, which a provider that is added again must have.
    pub id: ProviderId,
    /// Its name, or `NAME`.
    pub name: String,
    /// Its kind, if it was deleted here.
    pub kind: Option<String>,
}

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, name, kind } = self;
        let restore = format!("virtseal provider restore {name} --input FILE");
        match kind.as_deref() {
            Some(NativeProvider::KIND) => f.write_str(&restore),
            Some(kind) => write!(f, "virtseal provider add {kind} {name} --id {id} …"),
            None => write!(
                f,
                "{restore} (native) or virtseal provider add KIND {name} --id {id} … (others)"
            ),
        }
    }
}

impl ProviderError {
    /// The exit code for this refusal of the provider called `name`, and what helps.
    #[must_use]
    pub fn advice(&self, name: &str) -> (Code, Option<NextCommand>) {
        let name = name.to_owned();
        match self {
            Self::LockedByPin => (Code::Locked, Some(NextCommand::UnlockByPin(name))),
            Self::Locked | Self::LockedBecause(_) => (Code::Locked, Some(NextCommand::Unlock(name))),
            Self::WrongPin(PinRefusal::UnlockedByAnother) => (Code::Failed, Some(NextCommand::Lock(name))),
            Self::WrongPin(PinRefusal::Blocked | PinRefusal::NoneIsSet) => {
                (Code::Locked, Some(NextCommand::NewPin(name)))
            }
            Self::WrongPin(PinRefusal::NotTheLastTry) => {
                (Code::Locked, Some(NextCommand::LogInElsewhere(name)))
            }
            Self::WrongCredential | Self::WrongPin(_) => (Code::Locked, Some(NextCommand::Unlock(name))),
            Self::NotBackedUp => (Code::WouldLoseKey, Some(NextCommand::Backup(name))),
            Self::Unreachable(_) | Self::Trouble(_) => (Code::Unreachable, Some(NextCommand::Show(name))),
            Self::NotTrusted(_) => (Code::NotTrusted, Some(NextCommand::Trust(name))),
            Self::NotSignedByOurs(_) => (Code::NotTrusted, Some(NextCommand::TrustSigner(name))),
            Self::CertificateRefused(_) => (Code::NotTrusted, Some(NextCommand::OtherCertificate(name))),
            Self::CertificateWanted(_) => (Code::NotTrusted, Some(NextCommand::LogInByCertificate(name))),
            Self::CredentialRefused(_) => (Code::NotTrusted, Some(NextCommand::Unlock(name))),
            Self::ServerSealed => (Code::Locked, Some(NextCommand::Unseal)),
            Self::RefusesUs(_) | Self::TurnedAway(_) => (Code::NotTrusted, Some(NextCommand::Identity(name))),
            Self::Unusable(_) | Self::Refused(_) | Self::BesideTheQuestion(_) => {
                (Code::Failed, Some(NextCommand::Show(name)))
            }
            Self::UnknownMechanism(_) => (Code::Failed, Some(NextCommand::Upgrade)),
            Self::UnknownKek(_) => (Code::Failed, Some(NextCommand::RestoreKek(name))),
            Self::KekUnusable { .. } => (Code::Failed, Some(NextCommand::Show(name))),
            Self::Internal { .. } => (Code::Failed, Some(NextCommand::Journal)),
            // About an envelope: what helps is told where that is known.
            Self::Tampered | Self::Payload(_) => (Code::Failed, None),
        }
    }
}
