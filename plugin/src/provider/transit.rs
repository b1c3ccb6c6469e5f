//! The transit provider: KEKs in the transit engine of HashiCorp Vault or OpenBao, which encrypts and decrypts.
//!
//! ```text
//!   open ──► Locked ──unlock──► Ready ◄──the server is back──► Unreachable, or Locked while it is sealed
//!              ▲                 │ the token ends
//!              └──────lock───────┴──► NotTrusted ──unlock──► Ready
//! ```
//!
//! The credential (a token, a secret id, a client's key) is given when it is unlocked and stays in secret memory until
//! it is locked, so that it can log in again. An unlock that meets a server which is away or sealed keeps the
//! credential and goes on trying: a host that boots before its network does comes up by itself.
//!
//! Payloads travel as base64 inside of TLS; what holds them is wiped (`wire`, `secret`). No associated data: the
//! payload binds itself, and the server can rewrap it only without (docs/adr/0004-transit-without-associated-data.md).

mod destroy;
mod engine;
mod http;
mod keeper;
mod kek;
mod link;
mod login;
mod settings;
mod wire;

use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use self::destroy::destroy;
use self::engine::Wrapped;
use self::http::Fault;
use self::keeper::Keeper;
use self::kek::{KekName, MECHANISM};
use self::link::{Link, guard};
use super::{DestroyReceipt, KekScope, KeyProvider, ProviderError, ProviderName, ProviderStatus};
use crate::envelope::{KekId, Payload, ProviderId, Stanza, VmId};
use crate::keystore::{Keystore, KeystoreError, ProviderRecord};
use crate::secret::SecretBytes;

pub use settings::{Address, ApiPath, Auth, HostName, KeyName, SettingsError, TransitSettings};

/// A provider whose KEKs are in a transit engine.
pub struct TransitProvider {
    link: Arc<Link>,
    keeper: Mutex<Option<Keeper>>,
}

impl TransitProvider {
    /// The kind in the keystore.
    pub const KIND: &'static str = "transit";

    /// Records a new provider, locked.
    ///
    /// # Errors
    /// When the name or the id is taken, or the keystore can't be written.
    pub fn create(
        keystore: &Keystore,
        name: &ProviderName,
        settings: TransitSettings,
    ) -> Result<Self, KeystoreError> {
        let id = settings.id.unwrap_or_else(ProviderId::random);
        let row = serde_json::to_value(&settings).expect("settings hold only strings, numbers and enums");
        keystore.insert_provider(id, name.as_str(), Self::KIND, &row)?;
        Ok(Self::new(id, name.as_str(), settings))
    }

    /// The recorded provider, locked. Waits for nothing.
    ///
    /// # Errors
    /// When its settings make no sense.
    pub fn open(record: &ProviderRecord) -> Result<Self, SettingsError> {
        let settings: TransitSettings = serde_json::from_value(record.settings.clone())?;
        Ok(Self::new(record.id, &record.name, settings.validated()?))
    }

    fn new(id: ProviderId, name: &str, settings: TransitSettings) -> Self {
        let link = Link::new(id, name, settings);
        Self {
            link: Arc::new(link),
            keeper: Mutex::default(),
        }
    }

    /// Where it is and how it logs in.
    #[must_use]
    pub fn settings(&self) -> &TransitSettings {
        &self.link.settings
    }

    /// Looks whether the server answers and takes the token, and renews the token when it is time. What was found is
    /// in [`KeyProvider::status`].
    pub fn probe(&self) {
        self.link.look();
    }

    /// The same payloads under the newest version of their keys, made by the server: no payload leaves it. Which KEK
    /// is the newest [`KeyProvider::create_kek`] tells. The caller verifies them before the old ones go.
    ///
    /// # Errors
    /// As [`KeyProvider::unwrap_many`].
    pub fn rewrap(&self, stanzas: &[&Stanza]) -> Result<Vec<Stanza>, ProviderError> {
        let wrapped = self.wrapped(stanzas)?;
        let rewrapped = self.link.with_engine(|engine| engine.rewrap(&wrapped))?;
        let stanza = |(kek, body): (KekName, Vec<u8>)| self.stanza(kek.id(), body);
        Ok(rewrapped.into_iter().map(stanza).collect())
    }

    /// Makes a new version of the key that `kek` is a version of, and names it. What the old ones wrapped still opens.
    ///
    /// # Errors
    /// When the server does not, or the token may not.
    pub fn rotate(&self, kek: &KekId) -> Result<KekId, ProviderError> {
        let name = self.kek(kek)?;
        let version = self.link.with_engine(|engine| match engine.key(&name.key)? {
            Some(_) => engine.rotate(&name.key),
            None => Err(Fault::unknown(kek)),
        })?;
        Ok(KekName { version, ..name }.id())
    }
}

impl KeyProvider for TransitProvider {
    fn id(&self) -> ProviderId {
        self.link.id
    }

    fn name(&self) -> &str {
        &self.link.name
    }

    fn status(&self) -> ProviderStatus {
        self.link.status()
    }

    /// Unless a call has just shown how it is.
    fn probe(&self) {
        if self.link.is_unlocked() && !self.link.is_fresh() {
            self.link.look();
        }
    }

    fn last_answer(&self) -> Option<SystemTime> {
        self.link.last_answer()
    }

    fn warnings(&self) -> Vec<String> {
        self.link.warning().into_iter().collect()
    }

    fn create_kek(&self, scope: &KekScope) -> Result<KekId, ProviderError> {
        let (key, context) = kek::key_of(&self.link.settings, self.link.id, scope);
        let version = self
            .link
            .with_engine(|engine| engine.ensure_key(&key, context.is_some()))?;
        Ok(KekName {
            key,
            context,
            version,
        }
        .id())
    }

    /// A version of the key counts for all whom it serves.
    fn rotate_kek(&self, scope: &KekScope, old: &KekId) -> Result<KekId, ProviderError> {
        let current = self.create_kek(scope)?;
        if current == *old {
            self.rotate(old)
        } else {
            Ok(current)
        }
    }

    fn wrap(&self, kek: &KekId, payload: &Payload) -> Result<Stanza, ProviderError> {
        let name = self.kek(kek)?;
        let body = self.link.with_engine(|engine| engine.encrypt(&name, payload))?;
        Ok(self.stanza(kek.clone(), body))
    }

    fn unwrap_many(&self, stanzas: &[&Stanza]) -> Result<Vec<Payload>, ProviderError> {
        let wrapped = self.wrapped(stanzas)?;
        self.link.with_engine(|engine| engine.decrypt(&wrapped))
    }

    /// Deletes a VM's own key with all its versions, and looks whether it is gone. A derived KEK, and an old version,
    /// can't be destroyed alone, as the receipt says.
    fn destroy_kek(&self, kek: &KekId, vm: VmId) -> Result<DestroyReceipt, ProviderError> {
        let name = self.kek(kek)?;
        self.link.with_engine(|engine| destroy(engine, &name, vm))
    }

    fn lock(&self) {
        let mut keeper = guard(&self.keeper);
        self.link.lock();
        *keeper = None;
    }

    /// Logs in. What is wrong with the credential leaves everything as it was; a server that is away or sealed is an
    /// error too, but the credential of a locked provider is kept then, and tried again.
    fn unlock(&self, credential: &SecretBytes) -> Result<(), ProviderError> {
        let held = self.link.unlock(credential);
        let mut keeper = guard(&self.keeper);
        if keeper.is_none() && self.link.is_unlocked() {
            *keeper = Keeper::start(Arc::downgrade(&self.link));
        }
        Ok(held?)
    }
}

impl TransitProvider {
    fn kek(&self, id: &KekId) -> Result<KekName, ProviderError> {
        KekName::parse(id)
            .filter(|name| kek::is_ours(&self.link.settings, &name.key))
            .ok_or_else(|| ProviderError::UnknownKek(id.clone()))
    }

    fn stanza(&self, kek: KekId, body: Vec<u8>) -> Stanza {
        Stanza {
            provider: self.link.id,
            provider_name: self.link.name.clone(),
            kek,
            mechanism: MECHANISM.to_owned(),
            body,
        }
    }

    /// What can be told of stanzas without the server.
    fn wrapped<'a>(&self, stanzas: &[&'a Stanza]) -> Result<Vec<Wrapped<'a>>, ProviderError> {
        let one = |stanza: &&'a Stanza| {
            if stanza.provider != self.link.id {
                return Err(ProviderError::Tampered);
            }
            if stanza.mechanism != MECHANISM {
                return Err(ProviderError::UnknownMechanism(stanza.mechanism.clone()));
            }
            let kek = self.kek(&stanza.kek)?;
            if !kek::is_body(&stanza.body) {
                return Err(ProviderError::Tampered);
            }
            Ok(Wrapped {
                kek,
                body: &stanza.body,
            })
        };
        stanzas.iter().map(one).collect()
    }
}

#[cfg(test)]
pub(super) mod bao;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(super) mod tls_tests;
