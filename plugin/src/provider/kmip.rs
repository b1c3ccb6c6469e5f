//! The KMIP provider: KEKs at a key management server, by the OASIS Key Management Interoperability Protocol.
//!
//! ```text
//!   KeyProvider ── keys: creation, wrapping, destruction: which calls, what their answers mean
//!        │
//!    cluster ── health: which server, in which order, when to ask the next
//!        │
//!      node ── version, kept connections ── tls: trust both ways, deadlines
//!        │
//!     message ── call, answer ── ttlv: bytes that nobody trusts
//! ```
//!
//! A KEK is made at the server (Create, Activate) and known by its unique identifier, never by its name. By default
//! it is fetched for each wrap and unwrap, its state checked in the same request, and kept only for the time when no server
//! answers, as the cache policy says; `mode: server` leaves it there and has the server encrypt. `probe` asks every server
//! how it is, so `status` answers from memory.

mod answer;
mod caching;
mod call;
mod change;
mod cluster;
mod creation;
mod destruction;
mod endpoint;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod health;
mod identity;
mod keys;
mod message;
mod node;
mod settings;
mod store;
mod tag;
mod tls;
mod trust;
mod ttlv;
mod version;
mod wrapping;

#[cfg(test)]
pub(super) mod fixture;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Instant, SystemTime};

use thiserror::Error;

use self::cluster::Cluster;
use self::identity::Identity;
use self::keys::Keys;
use self::node::Access;
use self::store::Store;
use super::cache::{KekCache, persist};
use super::toolbox::current::Current;
use super::toolbox::files::Files;
use super::toolbox::kek_name::KekBook;
use super::toolbox::locks::{Locks, LocksNoted};
use super::toolbox::tls::Tls;
use super::toolbox::{lock, printable};
use super::{
    Addition, ChangeError, DestroyReceipt, KekScope, KeyProvider, ProviderError, ProviderName,
    ProviderStatus, SettingsChange,
};
use crate::api::CredentialKind;
use crate::crypto::age_file::AgeError;
use crate::model::envelope::{KekId, Payload, ProviderId, Stanza, VmId};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Code, Problem, chain};
use crate::secret::SecretBytes;
use crate::store::{ProviderRecord, ProviderTable, StoreError};

pub(crate) use super::toolbox::certificate::{CertificateFacts, Fingerprint};
pub(crate) use endpoint::Endpoint;
pub(crate) use identity::MAX_PEM;
pub(crate) use identity::{IdentityError, KeyKind, NewIdentity};
pub(super) use settings::SETTINGS;
pub(crate) use settings::{KmipSettings, Mode, SettingsError};
pub(crate) use store::{FilesError, ServerTrust};
pub(crate) use trust::{Presented, TrustError};
pub(crate) use version::KmipVersion;

/// A provider whose KEKs are at a KMS.
pub(crate) struct KmipProvider {
    id: ProviderId,
    name: String,
    line: Current<Line>,
    store: Store,
    held: RwLock<Held>,
    cache: KekCache,
    book: KekBook,
    /// Held while settings are changed on disk and then here.
    changing: Mutex<()>,
    /// Held while identity, request or trust is changed on disk and then here.
    trusting: Mutex<()>,
    /// One key per scope, also when two callers ask at once.
    creating: Mutex<()>,
}

/// By which settings it works now, and the servers of these.
struct Line {
    settings: KmipSettings,
    cluster: Arc<Cluster>,
}

impl Line {
    fn new(settings: KmipSettings) -> Self {
        Self {
            cluster: Arc::new(Cluster::new(&settings.endpoints, settings.kmip_version)),
            settings,
        }
    }
}

/// What is in memory while unlocked.
#[derive(Default)]
struct Held {
    locked: bool,
    locks: Locks,
    /// Counts the changes of `access`.
    epoch: u64,
    identity: Option<Arc<Identity>>,
    trust: Option<ServerTrust>,
    access: Option<Arc<Access>>,
    /// What is on disk and can't be used.
    fault: Option<String>,
    /// The private key on disk.
    is_encrypted: bool,
    /// An unlock has found that no passphrase opens the identity: another one is the way out.
    is_shut: bool,
}

impl KmipProvider {
    pub(crate) const KIND: &'static str = "kmip";

    /// Records a new provider. It trusts nobody yet and nobody trusts it.
    pub(crate) fn create(
        table: &ProviderTable,
        name: &ProviderName,
        settings: KmipSettings,
    ) -> Result<Self, KmipProviderError> {
        let settings = settings.validated()?;
        let json = serde_json::to_value(&settings).map_err(SettingsError::Json)?;
        let id = settings.id.unwrap_or_else(ProviderId::random);
        let record = table.insert(id, name.as_str(), Self::KIND, &json)?;
        Self::open(table, &record)
    }

    /// The same by the JSON of settings.
    pub(super) fn add(new: &Addition<'_>) -> Result<Self, Problem> {
        let settings = serde_json::from_str(new.settings)
            .map_err(|error| Problem::from_error(Code::Usage, "the settings can't be used", &error))?;
        Self::create(new.table, new.name, settings).map_err(|error| {
            let code = match &error {
                KmipProviderError::Keystore(error) => Problem::from(error).code,
                _ => Code::Usage,
            };
            Problem::from_error(code, format!("provider '{}' is not added", new.name), &error)
        })
    }

    /// The recorded provider: locked if its private key is encrypted, else ready to ask its servers. Waits for nothing.
    pub(crate) fn open(table: &ProviderTable, record: &ProviderRecord) -> Result<Self, KmipProviderError> {
        let settings: KmipSettings =
            serde_json::from_value(record.settings.clone()).map_err(SettingsError::Json)?;
        let settings = settings.validated()?;
        let provider = Self {
            id: record.id,
            name: record.name.clone(),
            store: Store::new(table.dir(), record.id),
            held: RwLock::default(),
            cache: KekCache::open(
                settings.cache(),
                table.kek_cache(record.id),
                record.id,
                &record.name,
            ),
            book: KekBook::new(table.kek_names(record.id)),
            changing: Mutex::default(),
            trusting: Mutex::default(),
            line: Current::new(Line::new(settings)),
            creating: Mutex::default(),
        };
        provider.store.settle();
        provider.load();
        Ok(provider)
    }

    fn forget_access(&self) {
        let mut held = self.held_mut();
        held.locked = true;
        held.locks.count();
        held.identity = None;
        self.renew_access(&mut held);
    }

    /// Removes the private key and the trust of a provider from the disk, once its record is gone. Of other kinds there are none.
    pub(crate) fn remove_files(state_dir: &Path, id: ProviderId) -> Result<(), FilesError> {
        Files::of(state_dir, id).remove()
    }

    /// Takes over what is on disk, as far as no passphrase is needed.
    fn load(&self) {
        let (trust, stored) = (self.store.trust(), self.store.identity());
        let mut held = self.held_mut();
        let mut faults = Vec::new();
        match trust {
            Ok(trust) => held.trust = trust,
            Err(error) => faults.push(chain(&error)),
        }
        match stored {
            Ok(Some(stored)) if stored.is_encrypted() => {
                held.locked = true;
                held.is_encrypted = true;
            }
            Ok(Some(stored)) => match stored.open(None) {
                Ok(identity) => held.identity = Some(Arc::new(identity)),
                Err(error) => faults.push(chain(&error)),
            },
            Ok(None) => {}
            Err(error) => faults.push(chain(&error)),
        }
        held.fault = (!faults.is_empty()).then(|| faults.join("; "));
        self.renew_access(&mut held);
    }

    /// Makes what calls connect with, from what is held now.
    fn renew_access(&self, held: &mut Held) {
        held.epoch += 1;
        held.access = None;
        if let (false, Some(trust)) = (held.locked, &held.trust) {
            let client = held.identity.as_ref().map(|identity| &identity.client);
            match Tls::new(trust.into(), client) {
                Ok(tls) => {
                    let login = held.identity.as_ref().and_then(|identity| identity.login.clone());
                    let epoch = held.epoch;
                    held.access = Some(Arc::new(Access { tls, login, epoch }));
                }
                Err(error) => held.fault = Some(format!("TLS can't be set up: {error}")),
            }
        }
        self.line().cluster.close(held.epoch);
    }

    /// What a call connects with.
    fn access(&self) -> Result<Arc<Access>, ProviderError> {
        let held = self.held();
        if held.locked {
            return Err(ProviderError::Locked);
        }
        match (&held.access, &held.fault) {
            (Some(access), _) => Ok(Arc::clone(access)),
            (None, Some(fault)) => Err(ProviderError::Unusable(fault.clone())),
            (None, None) => Err(ProviderError::NotTrusted(NO_TRUST.into())),
        }
    }

    fn line(&self) -> Arc<Line> {
        self.line.get()
    }

    fn keys<'a>(&'a self, line: &'a Line, access: &'a Arc<Access>) -> Keys<'a> {
        Keys {
            provider: self.id,
            provider_name: &self.name,
            mode: line.settings.mode,
            cluster: &line.cluster,
            cache: &self.cache,
            book: &self.book,
            access,
            deadline: Instant::now() + line.settings.timeout(),
        }
    }
}

/// Why a provider without any trust in its servers does nothing.
const NO_TRUST: &str = "the server's certificate has not been accepted yet";

impl KeyProvider for KmipProvider {
    fn kind(&self) -> &str {
        Self::KIND
    }

    fn id(&self) -> ProviderId {
        self.id
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn status(&self) -> ProviderStatus {
        let held = self.held();
        if held.locked {
            return ProviderStatus::Locked;
        }
        if let Some(fault) = &held.fault {
            return ProviderStatus::Degraded(fault.clone());
        }
        if held.access.is_none() {
            return ProviderStatus::NotTrusted(NO_TRUST.to_owned());
        }
        match self.line().cluster.status() {
            Err(ProviderError::NotTrusted(why)) => ProviderStatus::NotTrusted(why),
            Err(ProviderError::RefusesUs(why)) => {
                ProviderStatus::NotTrusted(format!("Connected, not trusted by KMS: {why}"))
            }
            Err(ProviderError::Trouble(why)) => ProviderStatus::Degraded(why),
            Err(ProviderError::Unreachable(why)) => ProviderStatus::Unreachable(why),
            Err(error) => ProviderStatus::Unreachable(error.to_string()),
            Ok(()) => match self.warnings_of(&held) {
                some if !some.is_empty() => {
                    let all: Vec<_> = some.iter().map(Finding::to_string).collect();
                    ProviderStatus::Degraded(all.join("; "))
                }
                _ => ProviderStatus::Ready,
            },
        }
    }

    fn refuses(&self) -> Option<ProviderError> {
        match (self.status(), self.line().cluster.status()) {
            // Which side does not trust the other decides what helps.
            (ProviderStatus::NotTrusted(why), Err(ProviderError::RefusesUs(_))) => {
                Some(ProviderError::RefusesUs(why))
            }
            (status, _) => status.refusal(),
        }
    }

    /// Also what keeps quiet connections open.
    fn probe(&self) {
        self.cache.sweep();
        let access = self.held().access.clone();
        if let Some(access) = access {
            self.line().cluster.probe(&access);
        }
    }

    fn last_answer(&self) -> Option<SystemTime> {
        self.line().cluster.last_answer()
    }

    fn warnings(&self) -> Vec<Finding> {
        self.warnings_of(&self.held())
    }

    fn create_kek(&self, scope: &KekScope) -> Result<KekId, ProviderError> {
        let (line, access) = (self.line(), self.access()?);
        let scope = line.settings.kek_scope.scope(scope);
        let _creating = lock(&self.creating);
        self.keys(&line, &access).create(&scope)
    }

    fn rotate_kek(&self, scope: &KekScope, old: &KekId) -> Result<KekId, ProviderError> {
        let (line, access) = (self.line(), self.access()?);
        let scope = line.settings.kek_scope.scope(scope);
        let _creating = lock(&self.creating);
        self.keys(&line, &access).rotate(&scope, old)
    }

    fn wrap(&self, kek: &KekId, payload: &Payload) -> Result<Stanza, ProviderError> {
        let (line, access) = (self.line(), self.access()?);
        self.keys(&line, &access).wrap(kek, payload)
    }

    fn unwrap_many(&self, stanzas: &[&Stanza]) -> Result<Vec<Payload>, ProviderError> {
        // Before the access is taken: what a lock in between ends must not fill the cache again.
        let ticket = self.cache.ticket();
        let (line, access) = (self.line(), self.access()?);
        self.keys(&line, &access).unwrap_many(ticket, stanzas)
    }

    fn destroy_kek(&self, kek: &KekId, vm: VmId) -> Result<DestroyReceipt, ProviderError> {
        let (line, access) = (self.line(), self.access()?);
        let destroyed = self.keys(&line, &access).destroy(kek, vm);
        if matches!(destroyed, Err(ProviderError::UnknownKek(_))) {
            self.cache.forget(kek).map_err(destruction::stays_on_disk())?;
        }
        destroyed
    }

    /// Forgets the private key and all KEKs, those on disk too, and closes all connections.
    fn lock(&self) {
        self.forget_access();
        if let Err(error) = self.cache.lock() {
            tracing::error!(
                provider = self.name,
                "locked, but its keys on disk stay for now: {}",
                chain(&error)
            );
        }
    }

    fn end(&self) {
        self.forget_access();
        self.cache.end();
    }

    /// None in mode server, where KEKs never come here.
    fn cache(&self) -> Option<&KekCache> {
        (self.line().settings.mode == Mode::Local).then_some(&self.cache)
    }

    fn change(&self, change: &SettingsChange<'_>) -> Result<(), ChangeError> {
        self.change_settings(change)
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        self.details_of_trust()
    }

    fn asks_for(&self) -> Option<CredentialKind> {
        self.held().is_encrypted.then_some(CredentialKind::Passphrase)
    }

    fn locks(&self) -> LocksNoted {
        self.held().locks.noted()
    }

    /// Takes the private key from disk again. Where it is not encrypted there, any credential does.
    fn unlock_since(&self, since: LocksNoted, credential: &SecretBytes) -> Result<(), ProviderError> {
        let identity = self.stored_identity(credential)?;
        let trust = self
            .store
            .trust()
            .map_err(|error| ProviderError::Unusable(chain(&error)))?;
        let mut held = self.held_mut();
        if !held.locks.are(since) {
            return Err(ProviderError::Locked);
        }
        held.locked = false;
        held.is_shut = false;
        held.identity = identity.map(Arc::new);
        held.trust = trust;
        held.fault = None;
        self.renew_access(&mut held);
        drop(held);
        self.probe();
        Ok(())
    }
}

impl KmipProvider {
    fn held(&self) -> RwLockReadGuard<'_, Held> {
        self.held.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn held_mut(&self) -> RwLockWriteGuard<'_, Held> {
        self.held.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn stored_identity(&self, credential: &SecretBytes) -> Result<Option<Identity>, ProviderError> {
        let stored = self
            .store
            .identity()
            .map_err(|error| ProviderError::Unusable(chain(&error)))?;
        let Some(stored) = stored else {
            return Ok(None);
        };
        match stored.open(Some(credential)) {
            Ok(identity) => Ok(Some(identity)),
            Err(IdentityError::Age(
                AgeError::WrongPassphrase | AgeError::EmptyPassphrase | AgeError::PassphraseText,
            )) => Err(ProviderError::WrongCredential),
            Err(error) => {
                self.held_mut().is_shut = true;
                Err(ProviderError::IdentityDamaged(chain(&error)))
            }
        }
    }

    /// What is about to go wrong though everything works.
    fn warnings_of(&self, held: &Held) -> Vec<Finding> {
        let client = held
            .identity
            .as_ref()
            .and_then(|identity| identity.client.warning());
        let line = self.line();
        let servers = line.cluster.certificates().into_iter();
        let certificates = servers
            .filter_map(|(endpoint, facts)| facts.warning(&format!("{endpoint}'s")))
            .chain(client)
            .map(|what| (FindingCode::CertificateEnds, what));
        let mode = match line.settings.mode {
            Mode::Server => cannot_encrypt(&line.cluster),
            Mode::Local => None,
        };
        let mode = mode.map(|what| (FindingCode::ModeUnsupported, what));
        let persists = self
            .persists_badly()
            .map(|what| (FindingCode::NothingPersisted, what));
        let subject = Subject::Provider(self.name.clone());
        certificates
            .chain(mode)
            .chain(persists)
            .map(|(code, what)| Finding::warning(code, subject.clone(), what))
            .collect()
    }
}

fn cannot_encrypt(cluster: &Cluster) -> Option<String> {
    let mut nodes = cluster.nodes().iter();
    nodes.find_map(|node| wrapping::cannot_encrypt(node))
}

/// What this host calls itself: a hint for people, not an identity.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match printable(&name) {
        empty if empty.is_empty() => "unknown".to_owned(),
        name => name,
    }
}

/// Why a KMIP provider can't be recorded or opened.
#[derive(Debug, Error)]
pub(crate) enum KmipProviderError {
    #[error(transparent)]
    Keystore(#[from] StoreError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error("with the policy none there is nothing to keep across a reboot")]
    PersistNothing,
    /// No key of it may be in memory now.
    #[error("is locked")]
    Locked,
    #[error(transparent)]
    Persist(#[from] persist::Error),
}

#[cfg(test)]
pub(super) mod tests;
