//! What `virtseal provider identity`, `csr` and `trust` ask for.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::provider::{passphrase_from, wrong_fds};
use crate::api::{
    CertificateView, IdentityParts, IdentitySet, NewKey, ProviderView, Providers, ServerView, Servers,
    SigningRequestMade,
};
use crate::daemon::Daemon;
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem, chain};
use crate::provider::KeyProvider;
use crate::provider::kmip::{
    CertificateFacts, FilesError, Fingerprint, KeyKind, KmipProvider, MAX_PEM, NewIdentity, Presented,
    ServerTrust, TrustError,
};
use crate::recipients::Provider;
use crate::secret::SecretBytes;

impl Daemon {
    /// Shows itself to the servers of `name` by what `fds` holds, as `parts` says.
    pub fn set_provider_identity(
        &self,
        name: &str,
        parts: &IdentityParts,
        fds: Vec<OwnedFd>,
    ) -> Result<IdentitySet, Problem> {
        let provider = self.kmip(name)?;
        let set = new_identity(parts, fds).and_then(|new| {
            provider
                .set_identity(&new)
                .map_err(|error| trust_failure(name, &error))
        });
        crate::host::process::trim();
        self.audit_provider("provider-identity", name, &set);
        let certificate = certificate_view(&set?);
        let id = provider.id();
        let stanzas = self.keystore.envelopes()?.sound.into_iter().flat_map(|record| {
            let stanzas = record.envelope.stanzas.clone();
            stanzas.into_iter().filter(move |stanza| stanza.provider == id)
        });
        Ok(IdentitySet {
            certificate,
            warnings: provider.keys_that_stay_shut(stanzas.collect()),
            provider: self.view_of(name)?,
        })
    }

    /// The signing request of `name`.
    pub fn provider_signing_request(
        &self,
        name: &str,
        new: Option<&NewKey>,
    ) -> Result<SigningRequestMade, Problem> {
        let provider = self.kmip(name)?;
        let new = new.map(|new| {
            let kind = if new.rsa {
                KeyKind::Rsa3072
            } else {
                KeyKind::EcP256
            };
            (kind, new.common_name.as_deref())
        });
        let made = provider
            .signing_request(new)
            .map_err(|error| trust_failure(name, &error));
        self.audit_provider("provider-csr", name, &made);
        Ok(SigningRequestMade { pem: made? })
    }

    /// What the servers of `name` show.
    pub fn provider_servers(&self, name: &str) -> Result<Servers, Problem> {
        let shown = self.kmip(name)?.presented();
        Ok(Servers {
            servers: shown.into_iter().map(server_view).collect(),
        })
    }

    /// Trusts the servers of `name` by their fingerprints or by the CA in `fds`, with a revocation list after it.
    pub fn trust_provider(
        &self,
        name: &str,
        fingerprints: &[String],
        fds: Vec<OwnedFd>,
    ) -> Result<Providers, Problem> {
        let provider = self.kmip(name)?;
        let trusted = server_trust(fingerprints, fds)
            .and_then(|trust| provider.trust(trust).map_err(|error| trust_failure(name, &error)));
        self.audit_provider("provider-trust", name, &trusted);
        trusted?;
        Ok(Providers {
            providers: vec![self.view_of(name)?],
        })
    }

    fn kmip(&self, name: &str) -> Result<Arc<KmipProvider>, Problem> {
        match self.recipients.find(name)? {
            Provider::Kmip(kmip) => Ok(kmip),
            other => {
                let next = match other {
                    Provider::Transit(_) => Advice::TransitTrust(name.to_owned()),
                    _ => Advice::ListProviders,
                };
                let message = format!(
                    "provider '{name}' is of kind {}, which has no identity to show and no servers to trust by this command",
                    other.kind()
                );
                Err(Problem::new(Code::Usage, message).next(next))
            }
        }
    }

    pub(in crate::daemon) fn view_of(&self, name: &str) -> Result<ProviderView, Problem> {
        let id = self.recipients.find(name)?.provider().id().to_string();
        let mut views = self.providers()?.providers.into_iter();
        views
            .find(|view| view.id == id)
            .ok_or_else(|| Problem::new(Code::NotFound, format!("provider '{name}' is gone")))
    }
}

fn new_identity(parts: &IdentityParts, fds: Vec<OwnedFd>) -> Result<NewIdentity, Problem> {
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or_else(wrong_fds);
    let certificate = pem_from(next()?)?;
    let key = match parts.key {
        true => Some(pem_from(next()?)?),
        false => None,
    };
    let login = match &parts.user {
        Some(user) => Some((user.clone(), passphrase_from(next()?)?)),
        None => None,
    };
    let passphrase = match parts.seal {
        true => Some(passphrase_from(next()?)?),
        false => None,
    };
    Ok(NewIdentity {
        certificate,
        key,
        login,
        passphrase,
    })
}

fn pem_from(fd: OwnedFd) -> Result<SecretBytes, Problem> {
    SecretBytes::read_from(File::from(fd), MAX_PEM)
        .map_err(|error| Problem::from_error(Code::Usage, "can't read the PEM file", &error))
}

fn server_trust(fingerprints: &[String], fds: Vec<OwnedFd>) -> Result<ServerTrust, Problem> {
    if !fds.is_empty() {
        let mut pem = String::new();
        for fd in fds {
            pem.push_str(&String::from_utf8_lossy(pem_from(fd)?.expose()));
            pem.push('\n');
        }
        return Ok(ServerTrust::Ca(pem));
    }
    let pins = fingerprints.iter().map(|text| text.parse::<Fingerprint>());
    let pins = pins.collect::<Result<_, _>>();
    pins.map(ServerTrust::Pins)
        .map_err(|error| Problem::new(Code::Usage, chain(&error)))
}

fn server_view(shown: Presented) -> ServerView {
    let (chain, problem) = match shown.chain {
        Ok(chain) => (chain.iter().map(certificate_view).collect(), None),
        Err(problem) => (Vec::new(), Some(problem)),
    };
    ServerView {
        endpoint: shown.endpoint,
        chain,
        problem,
    }
}

fn certificate_view(facts: &CertificateFacts) -> CertificateView {
    CertificateView {
        subject: facts.subject.clone(),
        issuer: facts.issuer.clone(),
        names: facts.names.clone(),
        sha256: facts.fingerprint.to_string(),
        not_after: facts.not_after.clone(),
        days_left: facts.days_left.into(),
    }
}

fn trust_failure(provider: &str, error: &TrustError) -> Problem {
    let name = || provider.to_owned();
    let (code, next) = match error {
        TrustError::Refused { .. } => (
            Code::NotTrusted,
            Advice::from("compare fingerprints with the KMS's admin").then(Advice::TrustProvider(name())),
        ),
        TrustError::Locked => (Code::Locked, Advice::UnlockProvider(name())),
        TrustError::NotAccepted(_) => (
            Code::NotTrusted,
            Advice::from("let the KMS accept it, then the same command again")
                .also(Advice::ShowProvider(name())),
        ),
        TrustError::WouldUnseal => (Code::Usage, Advice::EncryptIdentity(name())),
        TrustError::Identity(_) => (Code::Usage, Advice::RequestCertificate(name())),
        TrustError::Ca(_) | TrustError::NoCertificate => (Code::Usage, Advice::TrustCa(name())),
        TrustError::Empty => (Code::Usage, Advice::TrustProvider(name())),
        TrustError::Store(FilesError::Damaged { .. }) => (
            Code::Failed,
            Advice::RequestNewCertificate(name())
                .then(Advice::SetIdentity(name()).note("with its certificate")),
        ),
        TrustError::Store(_) => {
            return Problem::from_error(Code::Failed, format!("provider '{provider}'"), error);
        }
    };
    Problem::from_error(code, format!("provider '{provider}'"), error).next(next)
}
