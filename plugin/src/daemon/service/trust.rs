//! What `virtseal provider identity`, `csr` and `trust` ask for.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::descriptors::{passphrase_from, pin_from, wrong_fds};
use super::provider_view::view_of;
use super::{tpm_credential, tpm_identity};
use crate::api::{
    CertificateView, FindingView, IdentityParts, IdentitySet, NewKey, ProvidersChanged, ServerView, Servers,
    SigningRequestMade,
};
use crate::audit::Actor;
use crate::daemon::{Daemon, records};
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem, chain};
use crate::provider::KeyProvider;
use crate::provider::kind::TrustBy;
use crate::provider::kmip::{
    CertificateFacts, FilesError, Fingerprint, KeyKind, KmipProvider, MAX_PEM, NewIdentity, Presented,
    ServerTrust, TrustError,
};
use crate::secret::SecretBytes;
use crate::store::Change;

pub(crate) fn set_identity(
    daemon: &Daemon,
    by: Actor,
    name: &str,
    parts: &IdentityParts,
    fds: Vec<OwnedFd>,
) -> Result<IdentitySet, Problem> {
    let provider = kmip(daemon, name)?;
    let known = daemon.recipients.find(name)?;
    let set = new_identity(parts, fds).and_then(|(mut new, pin)| {
        let set = |new: &NewIdentity| {
            let set = provider.set_identity(new);
            set.map_err(|error| trust_failure(name, &error))
        };
        match parts.by_tpm {
            true => tpm_identity::made_for(daemon, &known, pin, |made| {
                new.passphrase = Some(made.passphrase);
                new.by_tpm = made.id;
                new.even_locked = made.is_lost;
                set(&new)
            }),
            false => {
                // Nobody can unlock it first.
                new.even_locked = tpm_identity::is_shut(daemon, &known);
                let set = set(&new)?;
                tpm_credential::forget(daemon, &known);
                Ok(set)
            }
        }
    });
    crate::host::process::trim();
    records::note_provider(daemon, by, "provider-identity", name, &set);
    let certificate = certificate_view(&set?);
    let id = provider.id();
    let stanzas = daemon.keystore.envelopes()?.sound.into_iter().flat_map(|record| {
        let stanzas = record.envelope.stanzas.clone();
        stanzas.into_iter().filter(move |stanza| stanza.provider == id)
    });
    Ok(IdentitySet {
        certificate,
        warnings: FindingView::all(&provider.keys_that_stay_shut(stanzas.collect())),
        provider: view_of(daemon, name)?,
    })
}

pub(crate) fn signing_request(
    daemon: &Daemon,
    by: Actor,
    name: &str,
    new: Option<&NewKey>,
) -> Result<SigningRequestMade, Problem> {
    let provider = kmip(daemon, name)?;
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
    records::note_provider(daemon, by, "provider-csr", name, &made);
    let (pem, change) = made?;
    Ok(SigningRequestMade {
        pem,
        changed: change == Change::Changed,
    })
}

pub(crate) fn servers(daemon: &Daemon, name: &str) -> Result<Servers, Problem> {
    let shown = kmip(daemon, name)?.presented();
    Ok(Servers {
        servers: shown.into_iter().map(server_view).collect(),
    })
}

/// Trusts the servers of `name` by their fingerprints or by the CA in `fds`, with a revocation list after it.
pub(crate) fn trust(
    daemon: &Daemon,
    by: Actor,
    name: &str,
    fingerprints: &[String],
    fds: Vec<OwnedFd>,
) -> Result<ProvidersChanged, Problem> {
    let provider = kmip(daemon, name)?;
    let trusted = server_trust(fingerprints, fds)
        .and_then(|trust| provider.trust(trust).map_err(|error| trust_failure(name, &error)));
    records::note_provider(daemon, by, "provider-trust", name, &trusted);
    Ok(ProvidersChanged {
        changed: trusted? == Change::Changed,
        providers: vec![view_of(daemon, name)?],
    })
}

fn kmip(daemon: &Daemon, name: &str) -> Result<Arc<KmipProvider>, Problem> {
    let provider = daemon.recipients.find(name)?;
    provider.of_kind().ok_or_else(|| {
        let next = match provider.row().map(|kind| kind.trust) {
            Some(TrustBy::Settings) => Advice::TransitTrust(name.to_owned()),
            _ => Advice::ListProviders,
        };
        let message = format!(
            "provider '{name}' is of kind {}, which has no identity to show and no servers to trust by this command",
            provider.kind()
        );
        Problem::usage(message).next(next)
    })
}

/// With the PIN for the TPM.
fn new_identity(
    parts: &IdentityParts,
    fds: Vec<OwnedFd>,
) -> Result<(NewIdentity, Option<Arc<SecretBytes>>), Problem> {
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
    let passphrase = match parts.encrypt {
        true => Some(passphrase_from(next()?)?),
        false => None,
    };
    let pin = match parts.pin {
        true => Some(pin_from(next()?)?),
        false => None,
    };
    let new = NewIdentity {
        certificate,
        key,
        login,
        passphrase,
        by_tpm: None,
        even_locked: false,
    };
    Ok((new, pin))
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
        .map_err(|error| Problem::usage(chain(&error)))
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
