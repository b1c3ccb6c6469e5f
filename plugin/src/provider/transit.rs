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
//! payload binds itself (docs/adr/0004-transit-without-associated-data.md).

mod change;
mod destroy;
mod engine;
mod http;
mod kek;
mod link;
mod login;
mod settings;
mod wire;

use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use self::destroy::destroy;
use self::engine::Wrapped;
use self::http::Fault;
use self::kek::{KekName, MECHANISM, Serving};
use self::link::Link;
use super::toolbox::current::Current;
use super::toolbox::kek_name::{self, KekBook, KekGeneration};
use super::toolbox::lock;
use super::toolbox::locks::LocksNoted;
use super::{
    Addition, ChangeError, DestroyReceipt, KekScope, KeyProvider, ProviderError, ProviderName,
    ProviderStatus, ScopeSetting, SettingsChange,
};
use crate::api::CredentialKind;
use crate::model::advice::Advice;
use crate::model::envelope::{KekId, Payload, ProviderId, Stanza, VmId};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Code, Problem};
use crate::secret::SecretBytes;
use crate::store::{KekNames, ProviderRecord, ProviderTable, StoreError};

pub(super) use settings::SETTINGS;
pub(crate) use settings::{Address, ApiPath, Auth, HostName, KeyName, SettingsError, TransitSettings};

/// A provider whose KEKs are in a transit engine.
pub(crate) struct TransitProvider {
    id: ProviderId,
    name: String,
    link: Current<Link>,
    kek_names: KekNames,
    /// Held while settings are changed on disk and then here.
    changing: Mutex<()>,
    /// Held while the shared key is made: of several who miss it at once, one makes it.
    making_shared: Mutex<()>,
}

impl TransitProvider {
    pub(crate) const KIND: &'static str = "transit";

    /// Records a new provider, locked.
    pub(crate) fn create(
        table: &ProviderTable,
        name: &ProviderName,
        settings: TransitSettings,
    ) -> Result<Self, StoreError> {
        let id = settings.id.unwrap_or_else(ProviderId::random);
        let row = serde_json::to_value(&settings).expect("settings hold only strings, numbers and enums");
        table.insert(id, name.as_str(), Self::KIND, &row)?;
        Ok(Self::new(table, id, name.as_str(), settings))
    }

    /// The same by the JSON of settings.
    pub(super) fn add(new: &Addition<'_>) -> Result<Self, Problem> {
        let settings = TransitSettings::parse(new.settings).map_err(|error| {
            Problem::from_error(Code::Usage, format!("can't add provider '{}'", new.name), &error)
                .next(Advice::AddProviderHelp(Some(Self::KIND)))
        })?;
        Ok(Self::create(new.table, new.name, settings)?)
    }

    /// The recorded provider, locked. Waits for nothing.
    pub(crate) fn open(table: &ProviderTable, record: &ProviderRecord) -> Result<Self, SettingsError> {
        let settings: TransitSettings = serde_json::from_value(record.settings.clone())?;
        Ok(Self::new(table, record.id, &record.name, settings.validated()?))
    }

    fn new(table: &ProviderTable, id: ProviderId, name: &str, settings: TransitSettings) -> Self {
        Self {
            id,
            name: name.to_owned(),
            link: Current::new(Link::new(id, settings)),
            changing: Mutex::default(),
            kek_names: table.kek_names(id),
            making_shared: Mutex::default(),
        }
    }

    /// Makes a new version of the key that `kek` is a version of, and names it. What the old ones wrapped still opens.
    pub(crate) fn rotate(&self, kek: &KekId) -> Result<KekId, ProviderError> {
        let name = self.kek(kek)?;
        let version = self
            .link
            .get()
            .with_engine(|engine| match engine.key(&name.key)? {
                Some(_) => engine.rotate(&name.key),
                None => Err(Fault::unknown(kek)),
            })?;
        Ok(KekName { version, ..name }.id())
    }
}

impl KeyProvider for TransitProvider {
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
        self.link.get().status()
    }

    fn refuses(&self) -> Option<ProviderError> {
        self.link.get().refuses()
    }

    /// Looks whether the server answers and takes the token, unless a call has just shown how it is, and renews the token when
    /// it is time.
    fn probe(&self) {
        let link = self.link.get();
        if link.is_unlocked() && (link.is_due() || !link.is_fresh()) {
            link.look();
        }
    }

    fn probe_within(&self) -> Option<Duration> {
        self.link.get().next_look()
    }

    fn last_answer(&self) -> Option<SystemTime> {
        self.link.get().last_answer()
    }

    fn warnings(&self) -> Vec<Finding> {
        let what = "its server is sealed, and opens nothing until somebody unseals it there";
        let sealed = self.link.get().is_sealed();
        let sealed = sealed.then(|| (FindingCode::ServerSealed, what.to_owned()));
        let found = self.link.get().warning().into_iter().chain(sealed);
        found
            .map(|(code, what)| Finding::warning(code, Subject::Provider(self.name.clone()), what))
            .collect()
    }

    fn create_kek(&self, scope: &KekScope) -> Result<KekId, ProviderError> {
        match kek::serving(&self.link.get().settings, self.id, scope) {
            Serving::Own(stem) => self.own_kek(scope, &stem),
            Serving::Shared(key, context) => self.shared_kek(key, context),
        }
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
        let body = self
            .link
            .get()
            .with_engine(|engine| engine.encrypt(&name, payload))?;
        Ok(self.stanza(kek.clone(), body))
    }

    fn unwrap_many(&self, stanzas: &[&Stanza]) -> Result<Vec<Payload>, ProviderError> {
        let wrapped = self.wrapped(stanzas)?;
        self.link.get().with_engine(|engine| engine.decrypt(&wrapped))
    }

    /// Deletes a VM's own key with all its versions, and looks whether it is gone. A derived KEK, and an old version,
    /// can't be destroyed alone, as the receipt says.
    fn destroy_kek(&self, kek: &KekId, vm: VmId) -> Result<DestroyReceipt, ProviderError> {
        let name = self.kek(kek)?;
        self.link.get().with_engine(|engine| destroy(engine, &name, vm))
    }

    fn lock(&self) {
        self.link.with(Link::lock);
    }

    fn change(&self, change: &SettingsChange<'_>) -> Result<(), ChangeError> {
        self.change_settings(change)
    }

    fn asks_for(&self) -> Option<CredentialKind> {
        Some(self.link.get().settings.auth.credential())
    }

    /// Logs in. What is wrong with the credential leaves everything as it was; a server that is away or sealed is an
    /// error too, but the credential of a locked provider is kept then, and tried again.
    fn unlock_since(&self, locks: LocksNoted, credential: &SecretBytes) -> Result<(), ProviderError> {
        Ok(self.link.get().unlock(credential, locks)?)
    }

    fn locks(&self) -> LocksNoted {
        self.link.get().locks()
    }
}

/// Keys are made under names that no key had before: one that was deleted by accident must not come back as another key,
/// which would keep its restore from its place.
impl TransitProvider {
    /// The newest version of the newest key of `scope`, or of a new one where there is none any more.
    fn own_kek(&self, scope: &KekScope, stem: &KeyName) -> Result<KekId, ProviderError> {
        let book = KekBook::new(self.kek_names.clone());
        let known = book.known(scope, stem.as_str())?;
        let mut names: Vec<KeyName> = known
            .keks
            .iter()
            .filter_map(|kek| Some(KekName::parse(kek)?.key))
            .chain(
                known
                    .unanswered
                    .iter()
                    .filter_map(|name| KeyName::try_from(name.clone()).ok()),
            )
            .collect();
        if known.is_empty() {
            // From another host, or from before names were used once.
            names.push(stem.clone());
        }
        let generation = |name: &KeyName| kek_name::generation(stem.as_str(), name.as_str());
        names.retain(|name| generation(name).is_some());
        names.sort_by_key(|name| std::cmp::Reverse(generation(name)));
        names.dedup();
        for name in &names {
            let newest = self
                .link
                .get()
                .with_engine(|engine| engine.newest(name, ScopeSetting::Vm))?;
            if let Some(version) = newest {
                let kek = self.in_use(&book, name, None, version)?;
                book.made(name.as_str(), &kek)?;
                return Ok(kek);
            }
        }
        let highest = names.iter().filter_map(generation).chain(known.asked).max();
        let next = match highest {
            // Nobody has seen a key under the bare stem, and none will be made there.
            None => KekGeneration::UNCOUNTED.next()?,
            Some(highest) => highest.next()?,
        };
        let name = book.plan(scope, stem.as_str(), next)?;
        let key =
            KeyName::try_from(name.clone()).map_err(ProviderError::internal("making a name for a KEK"))?;
        let version = self
            .link
            .get()
            .with_engine(|engine| engine.make_key(&key, ScopeSetting::Vm))?;
        let kek = KekName {
            key,
            context: None,
            version,
        }
        .id();
        book.made(&name, &kek)?;
        Ok(kek)
    }

    /// The newest version of the shared key. It is made once, before anything is wrapped under it, and never again.
    fn shared_kek(&self, key: KeyName, context: uuid::Uuid) -> Result<KekId, ProviderError> {
        let book = KekBook::new(self.kek_names.clone());
        let newest = || {
            self.link
                .get()
                .with_engine(|engine| engine.newest(&key, ScopeSetting::Provider))
        };
        let version = match newest()? {
            Some(version) => version,
            None => {
                let _making = lock(&self.making_shared);
                // Another call may have made it since.
                match newest()? {
                    Some(version) => version,
                    None => self.make_shared(&book, &key)?,
                }
            }
        };
        let kek = self.in_use(&book, &key, Some(context), version)?;
        book.made(key.as_str(), &kek)?;
        Ok(kek)
    }

    /// Makes the shared key, unless it can have been there before.
    fn make_shared(&self, book: &KekBook, key: &KeyName) -> Result<u32, ProviderError> {
        let known = book.known(&KekScope::Provider, key.as_str())?;
        // Another host has one where the provider came here with its id.
        if self.link.get().settings.id.is_some() || known.made.is_some() || !known.keks.is_empty() {
            return Err(ProviderError::Refused(format!(
                "its shared key {key} is not at the server any more: restore it there from a backup of the server or of \
                 the key; virtseal does not make another one under that name, which would keep it from its place"
            )));
        }
        if !known.unanswered.iter().any(|name| name == key.as_str()) {
            book.plan_exactly(&KekScope::Provider, key.as_str())?;
        }
        self.link
            .get()
            .with_engine(|engine| engine.make_key(key, ScopeSetting::Provider))
    }

    /// The KEK of the key's newest version; a newer version where a job has retired that one, as after a restore at the server.
    fn in_use(
        &self,
        book: &KekBook,
        key: &KeyName,
        context: Option<uuid::Uuid>,
        mut version: u32,
    ) -> Result<KekId, ProviderError> {
        const MAX_RETIRED: usize = 16;
        for _ in 0..MAX_RETIRED {
            let kek = KekName {
                key: key.clone(),
                context,
                version,
            }
            .id();
            if !book.without_retired(vec![kek.clone()])?.is_empty() {
                return Ok(kek);
            }
            version = self.link.get().with_engine(|engine| engine.rotate(key))?;
        }
        Err(ProviderError::Refused(format!(
            "all of the newest versions of key {key} are retired here: rotate it at the server"
        )))
    }

    fn kek(&self, id: &KekId) -> Result<KekName, ProviderError> {
        kek_of(&self.link.get(), id)
    }

    fn stanza(&self, kek: KekId, body: Vec<u8>) -> Stanza {
        Stanza {
            provider: self.id,
            provider_name: self.name.clone(),
            kek,
            mechanism: MECHANISM.to_owned(),
            body,
        }
    }

    /// What can be told of stanzas without the server.
    fn wrapped<'a>(&self, stanzas: &[&'a Stanza]) -> Result<Vec<Wrapped<'a>>, ProviderError> {
        self.wrapped_for(&self.link.get(), stanzas)
    }

    fn wrapped_for<'a>(
        &self,
        link: &Link,
        stanzas: &[&'a Stanza],
    ) -> Result<Vec<Wrapped<'a>>, ProviderError> {
        let one = |stanza: &&'a Stanza| {
            if stanza.provider != self.id {
                return Err(ProviderError::Tampered);
            }
            if stanza.mechanism != MECHANISM {
                return Err(ProviderError::UnknownMechanism(stanza.mechanism.clone()));
            }
            let kek = kek_of(link, &stanza.kek)?;
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

fn kek_of(link: &Link, id: &KekId) -> Result<KekName, ProviderError> {
    KekName::parse(id)
        .filter(|name| kek::is_ours(&link.settings, &name.key))
        .ok_or_else(|| ProviderError::UnknownKek(id.clone()))
}

#[cfg(test)]
pub(super) mod bao;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(super) mod tls_tests;
