//! The KMIP provider: KEKs at a key management server, by the OASIS Key Management Interoperability Protocol.
//!
//! ```text
//!   KeyProvider ── keys.rs: which calls, what their answers mean
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
mod cluster;
mod endpoint;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod health;
mod identity;
mod keys;
mod message;
mod node;
mod store;
mod tag;
mod tls;
mod trust;
mod ttlv;
mod version;

#[cfg(test)]
pub(super) mod fixture;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use self::cluster::{Cluster, ClusterStatus};
use self::identity::Identity;
use self::keys::Keys;
use self::node::Access;
use self::store::Store;
use super::cache::{CachePolicy, KekCache, NothingToCache, PersistError};
use super::toolbox::kek_name::KekBook;
use super::toolbox::locks::Locks;
use super::toolbox::printable;
use super::toolbox::tls::Tls;
use super::{
    Addition, DestroyReceipt, KekScope, KeyProvider, ProviderError, ProviderName, ProviderStatus,
    ScopeSetting,
};
use crate::crypto::age_file::AgeError;
use crate::model::envelope::{KekId, Payload, ProviderId, Stanza, VmId};
use crate::model::problem::{Code, Problem, chain};
use crate::secret::SecretBytes;
use crate::store::{ProviderRecord, ProviderTable, StoreError};

pub use super::toolbox::certificate::{CertificateFacts, Fingerprint, NotAFingerprint};
pub use caching::Persist;
pub use endpoint::{Endpoint, NotAnEndpoint};
pub(crate) use identity::MAX_PEM;
pub use identity::{IdentityError, KeyKind, NewIdentity};
pub use store::{FilesError, ServerTrust};
pub use trust::{Presented, TrustError};
pub use version::{KmipVersion, NotAVersion};

/// Where a KEK does its work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Fetched and used on this host.
    #[default]
    Local,
    /// At the server, which encrypts and decrypts; the KEK never leaves it.
    Server,
}

/// The settings of a KMIP provider, as the keystore has them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KmipSettings {
    /// The servers of one cluster, in the order in which they are asked; never empty.
    pub endpoints: Vec<Endpoint>,
    /// Where KEKs do their work.
    #[serde(default)]
    pub mode: Mode,
    /// Whom one KEK serves.
    #[serde(default)]
    pub kek_scope: ScopeSetting,
    /// Instead of the best version that both sides speak.
    #[serde(default)]
    pub kmip_version: Option<KmipVersion>,
    /// The most time for one call, in milliseconds, with all its retries and failovers.
    #[serde(default = "default_timeout")]
    pub timeout_ms: u64,
    /// How long KEKs are kept for when no server answers; without a word, as [`CachePolicy::default`] in mode local.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CachePolicy>,
    /// The provider's id on another host, to be the same one here: both open what the other sealed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<ProviderId>,
}

/// A little less than the recipients's own deadline, whose message knows nothing of nodes.
fn default_timeout() -> u64 {
    4_500
}

impl KmipSettings {
    const MAX_ENDPOINTS: usize = 16;

    fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    /// # Errors
    /// For no endpoint, too many, or a timeout that makes no sense.
    fn validated(self) -> Result<Self, KmipProviderError> {
        if !(1..=Self::MAX_ENDPOINTS).contains(&self.endpoints.len()) {
            return Err(KmipProviderError::Endpoints);
        }
        if !(100..=60_000).contains(&self.timeout_ms) {
            return Err(KmipProviderError::Timeout);
        }
        self.check_cache(self.cache.unwrap_or(CachePolicy::None))?;
        Ok(self)
    }

    fn check_cache(&self, policy: CachePolicy) -> Result<(), KmipProviderError> {
        match (self.mode, policy) {
            (Mode::Server, CachePolicy::For(_) | CachePolicy::UntilLock) => {
                Err(NothingToCache::ModeServer.into())
            }
            _ => Ok(()),
        }
    }

    fn cache(&self) -> CachePolicy {
        match self.mode {
            Mode::Local => self.cache.unwrap_or_default(),
            Mode::Server => CachePolicy::None,
        }
    }
}

/// A provider whose KEKs are at a KMS.
pub struct KmipProvider {
    id: ProviderId,
    name: String,
    settings: KmipSettings,
    store: Store,
    cluster: Cluster,
    held: RwLock<Held>,
    cache: KekCache,
    book: KekBook,
    /// Held while the policy of `cache` is changed on disk and then here.
    changing: Mutex<()>,
    /// Held while identity, request or trust is changed on disk and then here.
    trusting: Mutex<()>,
    /// One key per scope, also when two callers ask at once.
    creating: Mutex<()>,
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
    /// An unlock has found that no passphrase opens the identity: another one is the way out.
    is_shut: bool,
}

impl KmipProvider {
    /// The kind in the keystore.
    pub const KIND: &'static str = "kmip";

    /// Records a new provider. It trusts nobody yet and nobody trusts it.
    ///
    /// # Errors
    /// When the name is taken, a setting makes no sense, or the keystore can't be written.
    pub fn create(
        table: &ProviderTable,
        name: &ProviderName,
        settings: KmipSettings,
    ) -> Result<Self, KmipProviderError> {
        let settings = settings.validated()?;
        let json = serde_json::to_value(&settings).map_err(KmipProviderError::Settings)?;
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
                KmipProviderError::Keystore(_) => Code::Failed,
                _ => Code::Usage,
            };
            Problem::from_error(code, format!("provider '{}' is not added", new.name), &error)
        })
    }

    /// The recorded provider: locked if its private key is encrypted, else ready to ask its servers. Waits for nothing.
    ///
    /// # Errors
    /// When the settings can't be read.
    pub fn open(table: &ProviderTable, record: &ProviderRecord) -> Result<Self, KmipProviderError> {
        let settings: KmipSettings =
            serde_json::from_value(record.settings.clone()).map_err(KmipProviderError::Settings)?;
        let settings = settings.validated()?;
        let provider = Self {
            id: record.id,
            name: record.name.clone(),
            store: Store::new(table.dir(), record.id),
            cluster: Cluster::new(&settings.endpoints, settings.kmip_version),
            held: RwLock::default(),
            cache: KekCache::new(settings.cache()),
            book: KekBook::new(table.kek_names(record.id)),
            changing: Mutex::default(),
            trusting: Mutex::default(),
            settings,
            creating: Mutex::default(),
        };
        if provider.settings.mode == Mode::Local {
            let rows = table.kek_cache(record.id);
            provider.cache.attach(rows, record.id, &record.name);
        }
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
        Store::new(state_dir, id).remove()
    }

    /// Its settings, as they were when it was opened.
    #[must_use]
    pub fn settings(&self) -> &KmipSettings {
        &self.settings
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
            Ok(Some(stored)) if stored.is_encrypted() => held.locked = true,
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
        self.cluster.close(held.epoch);
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

    fn keys<'a>(&'a self, access: &'a Arc<Access>) -> Keys<'a> {
        Keys {
            provider: self.id,
            provider_name: &self.name,
            mode: self.settings.mode,
            cluster: &self.cluster,
            cache: &self.cache,
            book: &self.book,
            access,
            deadline: Instant::now() + self.settings.timeout(),
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
            return ProviderStatus::NotTrusted(format!("Not trusted: {NO_TRUST}"));
        }
        match self.cluster.status() {
            ClusterStatus::Unknown => ProviderStatus::Unreachable("not asked yet".into()),
            ClusterStatus::Unreachable(why) => ProviderStatus::Unreachable(why),
            ClusterStatus::NotTrusted(why) => ProviderStatus::NotTrusted(format!("Not trusted: {why}")),
            ClusterStatus::RefusesUs(why) => {
                ProviderStatus::NotTrusted(format!("Connected, not trusted by KMS: {why}"))
            }
            ClusterStatus::Partly(why) => ProviderStatus::Degraded(why),
            ClusterStatus::Good => match self.warnings_of(&held) {
                some if !some.is_empty() => ProviderStatus::Degraded(some.join("; ")),
                _ => ProviderStatus::Ready,
            },
        }
    }

    fn refuses(&self) -> Option<ProviderError> {
        match (self.status(), self.cluster.status()) {
            // Which side does not trust the other decides what helps.
            (ProviderStatus::NotTrusted(why), ClusterStatus::RefusesUs(_)) => {
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
            self.cluster.probe(&access);
        }
    }

    fn last_answer(&self) -> Option<SystemTime> {
        self.cluster.last_answer()
    }

    fn warnings(&self) -> Vec<String> {
        self.warnings_of(&self.held())
    }

    fn create_kek(&self, scope: &KekScope) -> Result<KekId, ProviderError> {
        let access = self.access()?;
        let scope = self.settings.kek_scope.scope(scope);
        let _creating = self.creating.lock().unwrap_or_else(PoisonError::into_inner);
        self.keys(&access).create(&scope)
    }

    fn rotate_kek(&self, scope: &KekScope, old: &KekId) -> Result<KekId, ProviderError> {
        let access = self.access()?;
        let scope = self.settings.kek_scope.scope(scope);
        let _creating = self.creating.lock().unwrap_or_else(PoisonError::into_inner);
        self.keys(&access).rotate(&scope, old)
    }

    fn wrap(&self, kek: &KekId, payload: &Payload) -> Result<Stanza, ProviderError> {
        let access = self.access()?;
        self.keys(&access).wrap(kek, payload)
    }

    fn unwrap_many(&self, stanzas: &[&Stanza]) -> Result<Vec<Payload>, ProviderError> {
        // Before the access is taken: what a lock in between ends must not fill the cache again.
        let ticket = self.cache.ticket();
        let access = self.access()?;
        self.keys(&access).unwrap_many(ticket, stanzas)
    }

    fn destroy_kek(&self, kek: &KekId, vm: VmId) -> Result<DestroyReceipt, ProviderError> {
        let access = self.access()?;
        let destroyed = self.keys(&access).destroy(kek, vm);
        if matches!(destroyed, Err(ProviderError::UnknownKek(_))) {
            self.cache.forget(kek).map_err(keys::stays_on_disk())?;
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
        (self.settings.mode == Mode::Local).then_some(&self.cache)
    }

    /// Takes the private key from disk again. Where it is not encrypted there, any credential does.
    fn unlock(&self, credential: &SecretBytes) -> Result<(), ProviderError> {
        let since = self.held().locks.noted();
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
    fn warnings_of(&self, held: &Held) -> Vec<String> {
        let client = held
            .identity
            .as_ref()
            .and_then(|identity| identity.client.warning());
        let servers = self.cluster.certificates().into_iter();
        let mut warnings: Vec<_> = servers
            .filter_map(|(endpoint, facts)| facts.warning(&format!("{endpoint}'s")))
            .collect();
        warnings.extend(client);
        if self.settings.mode == Mode::Server {
            warnings.extend(self.cannot_encrypt());
        }
        warnings.extend(self.persists_badly());
        warnings
    }

    fn cannot_encrypt(&self) -> Option<String> {
        let mut nodes = self.cluster.nodes().iter();
        nodes.find_map(|node| keys::cannot_encrypt(node))
    }
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
pub enum KmipProviderError {
    /// The keystore refuses.
    #[error(transparent)]
    Keystore(#[from] StoreError),
    /// Not the settings of a KMIP provider.
    #[error("its settings can't be used")]
    Settings(#[source] serde_json::Error),
    /// None, or too many.
    #[error("give 1 to {} endpoints, all of one cluster", KmipSettings::MAX_ENDPOINTS)]
    Endpoints,
    /// No KEK ever comes to this host.
    #[error(transparent)]
    Cache(#[from] NothingToCache),
    /// The cache is off.
    #[error("with the policy none there is nothing to keep across a reboot")]
    PersistNothing,
    /// No key of it may be in memory now.
    #[error("is locked")]
    Locked,
    /// Nothing is kept across a reboot.
    #[error(transparent)]
    Persist(#[from] PersistError),
    /// Out of range.
    #[error("the timeout must be between 0.1 and 60 seconds")]
    Timeout,
}

#[cfg(test)]
pub(super) mod tests;
