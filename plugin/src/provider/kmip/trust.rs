//! How trust comes about: the client's certificate goes one way, the server's the other.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use openssl::x509::X509;
use thiserror::Error;
use uuid::Uuid;

use super::KmipProvider;
use super::cluster::Cluster;
use super::endpoint::Endpoint;
use super::error::KmipError;
use super::identity::{Identity, IdentityError, KeyKind, NewIdentity, SigningRequest, StoredIdentity};
use super::node::Access;
use super::store::{FilesError, ServerTrust};
use super::tls::{self, Connection};
use crate::model::deadlines::kmip::{FIRST_QUESTION, LOOK};
use crate::model::envelope::Stanza;
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::chain;
use crate::provider::toolbox::certificate::CertificateFacts;
use crate::provider::toolbox::identity::NoIdentity;
use crate::provider::toolbox::tls::Tls;
use crate::provider::toolbox::{at_once, lock};
use crate::provider::{KeyProvider, ProviderError};
use crate::store::Change;

/// How many KEKs that do not open are named.
const MAX_SHUT: usize = 8;

/// What one endpoint shows to whoever connects.
#[derive(Clone, Debug)]
pub(crate) struct Presented {
    pub endpoint: String,
    /// The server's own certificate first, or why there is none.
    pub chain: Result<Vec<CertificateFacts>, String>,
}

impl KmipProvider {
    /// What the servers show now. Nothing is trusted by this.
    pub(crate) fn presented(&self) -> Vec<Presented> {
        let deadline = Instant::now() + LOOK;
        let look = |endpoint: &Endpoint| {
            let shown = tls::presented(endpoint, deadline).map_err(|error| error.to_string())?;
            let facts = shown.iter().map(|certificate| CertificateFacts::of(certificate));
            facts
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| error.to_string())
        };
        let line = self.line();
        let endpoints = &line.settings.endpoints;
        let shown = endpoints.iter().zip(at_once(endpoints, look));
        let presented = shown.map(|(endpoint, chain)| Presented {
            endpoint: endpoint.to_string(),
            chain: chain.unwrap_or_else(|| Err("the look at it failed".into())),
        });
        presented.collect()
    }

    /// Trusts servers by `trust` from now on.
    ///
    /// # Errors
    /// When a server that answers is not the one that `trust` says; then nothing changes. A server that does not
    /// answer is judged when it does.
    pub(crate) fn trust(&self, trust: ServerTrust) -> Result<Change, TrustError> {
        match &trust {
            ServerTrust::Ca(pem) => {
                let found = X509::stack_from_pem(pem.as_bytes()).map_err(TrustError::Ca)?;
                if found.is_empty() {
                    return Err(TrustError::NoCertificate);
                }
            }
            ServerTrust::Pins(pins) if pins.is_empty() => return Err(TrustError::Empty),
            ServerTrust::Pins(_) => {}
        }
        let _trusting = lock(&self.trusting);
        let look = Instant::now() + LOOK;
        self.try_out(&trust, look)?;
        self.store.put_trust(&trust)?;
        let mut held = self.held_mut();
        let change = match held.trust.as_ref() == Some(&trust) {
            true => Change::Unchanged,
            false => Change::Changed,
        };
        held.trust = Some(trust);
        self.renew_access(&mut held);
        let access = held.access.clone();
        drop(held);
        if let Some(access) = access {
            self.line()
                .cluster
                .probe_until(&access, look.max(Instant::now() + FIRST_QUESTION));
        }
        Ok(change)
    }

    fn try_out(&self, trust: &ServerTrust, deadline: Instant) -> Result<(), TrustError> {
        let tls = &Tls::new(trust.into(), None).map_err(TrustError::Ca)?;
        let line = self.line();
        let endpoints = &line.settings.endpoints;
        let trials = at_once(endpoints, |endpoint| {
            Connection::open(tls, endpoint, None, deadline).map(drop)
        });
        for (endpoint, trial) in endpoints.iter().zip(trials) {
            if let Some(Err(KmipError::NotTrusted(why))) = trial {
                let endpoint = endpoint.to_string();
                return Err(TrustError::Refused { endpoint, why });
            }
        }
        Ok(())
    }

    /// Shows itself to the servers as `new` from now on: once one of them has accepted it, where there is an identity that is
    /// of use so far.
    ///
    /// # Errors
    /// When certificate and key do not fit, when the provider is locked, when a sealed key would be replaced by one that is
    /// not, or when no server accepts it; then the identity in use stays.
    pub(crate) fn set_identity(&self, new: &NewIdentity) -> Result<CertificateFacts, TrustError> {
        let _trusting = lock(&self.trusting);
        let stored = self.unless_damaged(self.store.identity())?;
        let was_sealed =
            |stored: &Option<StoredIdentity>| stored.as_ref().is_some_and(StoredIdentity::is_encrypted);
        // What is damaged does not tell, and no unlock opens it any more.
        if stored.as_ref().is_none_or(was_sealed) && new.passphrase.is_none() {
            return Err(TrustError::WouldUnseal);
        }
        let (current, locked, locks) = {
            let held = self.held();
            let locked = held.locked && !held.is_shut && !new.even_locked;
            (held.identity.clone(), locked, held.locks.noted())
        };
        if locked && stored.is_some() {
            return Err(TrustError::Locked);
        }
        let request = self.unless_damaged(self.store.request())?.flatten();
        let mut waiting = request.map_or(Ok(Vec::new()), |request| request.keys())?;
        waiting.extend(current.as_ref().map(|identity| identity.client.key.clone()));
        let mut identity = Identity::assemble(new, waiting)?;
        if let (None, Some(current)) = (&identity.login, &current) {
            identity.login.clone_from(&current.login);
        }
        if current.is_some() {
            self.try_identity(&identity)?;
        }
        let facts = CertificateFacts::of(identity.leaf()?).map_err(NoIdentity::Certificate)?;
        let mut stored = identity.stored(new.passphrase.as_ref())?;
        stored.by_tpm = new.by_tpm;
        self.store.put_identity(&stored)?;
        if let Err(error) = self.store.remove_answered(&identity.client.key) {
            // The new identity stands, and the next start tries it again.
            tracing::warn!("provider {}: {}", self.name, chain(&error));
        }
        let mut held = self.held_mut();
        if held.locks.are(locks) {
            held.identity = Some(Arc::new(identity));
        }
        held.fault = None;
        held.is_encrypted = new.passphrase.is_some();
        held.is_shut = false;
        self.renew_access(&mut held);
        drop(held);
        self.probe();
        Ok(facts)
    }

    /// The bound credential that encrypts the private key on disk, if nobody but the TPM has it.
    ///
    /// # Errors
    /// When that can't be read.
    pub(crate) fn bound_by(&self) -> Result<Option<Uuid>, FilesError> {
        Ok(self.store.identity()?.and_then(|stored| stored.by_tpm))
    }

    /// `None` for a file that is damaged: what is written in its place now is the way out.
    fn unless_damaged<T>(&self, found: Result<T, FilesError>) -> Result<Option<T>, FilesError> {
        match found {
            Err(error @ FilesError::Damaged { .. }) => {
                tracing::warn!("provider {}: {}", self.name, chain(&error));
                Ok(None)
            }
            found => found.map(Some),
        }
    }

    /// Whether a server lets `new` in, or at least the identity in use neither.
    fn try_identity(&self, new: &Identity) -> Result<(), TrustError> {
        let trust = self.held().trust.clone();
        let Some(trust) = trust else {
            // Nobody was ever asked with the one in use.
            return Ok(());
        };
        let access = Access {
            tls: Tls::new((&trust).into(), Some(&new.client)).map_err(NoIdentity::Key)?,
            login: new.login.clone(),
            epoch: 0,
        };
        let line = self.line();
        let trial = Cluster::new(&line.settings.endpoints, line.settings.kmip_version);
        trial.probe(&access);
        match trial.status() {
            Ok(()) | Err(ProviderError::Trouble(_)) => Ok(()),
            Err(ProviderError::RefusesUs(why)) => {
                self.probe();
                match line.cluster.status() {
                    // There is nothing to lose, and a KMS may take minutes to let a new client in.
                    Err(ProviderError::RefusesUs(_)) => Ok(()),
                    _ => Err(TrustError::NotAccepted(why)),
                }
            }
            Err(ProviderError::Unreachable(why) | ProviderError::NotTrusted(why)) => {
                Err(TrustError::NotAccepted(why))
            }
            Err(error) => Err(TrustError::NotAccepted(error.to_string())),
        }
    }

    /// Opens one of `stanzas` for each KEK, and says which ones do not open.
    pub(crate) fn keys_that_stay_shut(&self, stanzas: Vec<Stanza>) -> Vec<Finding> {
        let mut of_kek = BTreeMap::new();
        for stanza in stanzas {
            of_kek.entry(stanza.kek.0.clone()).or_insert(stanza);
        }
        let all: Vec<_> = of_kek.values().collect();
        if all.is_empty() || self.unwrap_many(&all).is_ok() {
            return Vec::new();
        }
        let mut shut = Vec::new();
        for stanza in all {
            if let Err(error) = self.unwrap_many(&[stanza]) {
                let why = chain(&error);
                let what = format!("KEK {} does not open what it wrapped: {why}", stanza.kek);
                let provider = Subject::Provider(self.name.clone());
                shut.push(Finding::warning(FindingCode::KekRefused, provider, what));
            }
            if shut.len() == MAX_SHUT {
                break;
            }
        }
        shut
    }

    /// A signing request in PEM: the one that waits for its certificate; else one for the key in use, with the subject
    /// of its certificate; else a first one. With `new`, one for a new key, and this common name or, without one, the
    /// host's; a certificate for the one before is taken as well.
    ///
    /// # Errors
    /// When the key in use is sealed, and the provider locked.
    pub(crate) fn signing_request(
        &self,
        new: Option<(KeyKind, Option<&str>)>,
    ) -> Result<(String, Change), TrustError> {
        let _trusting = lock(&self.trusting);
        if new.is_none() {
            if let Some(request) = self.store.request()? {
                return Ok((request.csr.clone(), Change::Unchanged));
            }
            let (current, locked) = {
                let held = self.held();
                (held.identity.clone(), held.locked)
            };
            if locked {
                return Err(TrustError::Locked);
            }
            if let Some(current) = current {
                return Ok((current.signing_request()?, Change::Unchanged));
            }
        }
        let (kind, name) = new.unwrap_or((KeyKind::EcP256, None));
        let name = name.map_or_else(super::host_name, str::to_owned);
        let before = self.unless_damaged(self.store.request())?.flatten();
        let request = SigningRequest::new(kind, &name)?.after(before);
        self.store.put_request(&request)?;
        Ok((request.csr.clone(), Change::Changed))
    }
}

impl From<NoIdentity> for TrustError {
    fn from(error: NoIdentity) -> Self {
        Self::Identity(error.into())
    }
}

/// Why trust did not come about.
#[derive(Debug, Error)]
pub(crate) enum TrustError {
    #[error("can't read the CA's certificates: PEM is expected")]
    Ca(#[source] openssl::error::ErrorStack),
    #[error("there is nothing to trust: a CA's certificate or a fingerprint is needed")]
    Empty,
    #[error("there is no certificate of a CA in the file: PEM is expected")]
    NoCertificate,
    #[error("{endpoint} is not what you trust: {why}")]
    Refused { endpoint: String, why: String },
    #[error("is locked")]
    Locked,
    /// The servers let the one in use in, and not the new one.
    #[error("the KMS has not accepted the new identity, so the one in use stays: {0}")]
    NotAccepted(String),
    /// No silent fall-back to a key in the clear.
    #[error(
        "the private key in use is encrypted by a passphrase, or damaged so that this can't be told, and the new one would not be: \
         add --encrypt"
    )]
    WouldUnseal,
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Store(#[from] FilesError),
}
