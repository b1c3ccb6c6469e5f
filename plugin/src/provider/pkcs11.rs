//! The pkcs11 provider: KEKs that a token (an HSM, a smart card, SoftHSM) made and never gives out.
//!
//! ```text
//!            unlock: C_Login with the PIN, once
//!   Locked ─────────────────────────────────────▶ Ready ◀──────────────┐
//!     ▲                                             │ token gone,      │ token back:
//!     │ lock: C_Logout, PIN forgotten               │ module hangs     │ logged in again
//!     │ token refuses the PIN                       ▼                  │
//!     └─────────────────────────────────────── Unreachable ────────────┘
//! ```
//!
//! Payloads are wrapped and unwrapped inside the token; `body.rs` has the ways. All calls of a module are made by
//! one thread (`module.rs`), so a module that hangs costs callers their deadline and nothing else. This is the only place
//! that touches `cryptoki`.

mod body;
mod change;
mod error;
mod kek;
mod link;
mod login;
mod mechanism;
mod module;
mod object;
mod problem;
mod settings;
mod token;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use thiserror::Error;

use self::error::TokenError;
use self::kek::Owner;
use self::link::Link;
use self::mechanism::Mechanism;
use self::token::Token;
use super::toolbox::current::Current;
use super::toolbox::locks::LocksNoted;
use super::{
    ChangeError, DestroyReceipt, KekScope, KeyProvider, ProviderError, ProviderName, ProviderStatus,
    ScopeSetting, SettingsChange,
};
use crate::api::CredentialKind;
use crate::model::deadlines::pkcs11::{CALL, PROBE};
use crate::model::envelope::{KekId, Payload, ProviderId, Stanza, VmId};
use crate::secret::SecretBytes;
use crate::store::{KekNames, ProviderRecord, ProviderTable, StoreError};

pub(super) use settings::SETTINGS;
pub(crate) use settings::{KeyBits, Pkcs11Settings, SettingsError, TokenChoice};

/// A provider whose KEKs are in a PKCS#11 token.
pub(crate) struct Pkcs11Provider {
    id: ProviderId,
    name: String,
    kek_names: KekNames,
    link: Current<Link>,
    /// Held while settings are changed on disk and then here.
    changing: Mutex<()>,
}

impl Pkcs11Provider {
    pub(crate) const KIND: &'static str = "pkcs11";

    /// Finds the token of `settings`, logs in with `pin`, and records the provider, unlocked. A token that holds KEKs of a
    /// provider already, from this host or another, gives its id: what that one wrapped opens here too. With a KEK
    /// for all VMs, that KEK is made, and tried, now.
    ///
    /// # Errors
    /// When the name is taken, `others` use the token, the token is not there, refuses the PIN, or can't do what is needed.
    pub(crate) fn create(
        table: &ProviderTable,
        name: &ProviderName,
        settings: Pkcs11Settings,
        pin: &SecretBytes,
        others: &[Arc<Self>],
    ) -> Result<Self, Pkcs11Error> {
        Self::create_within(CALL, table, name, settings, pin, others)
    }

    fn create_within(
        deadline: Duration,
        table: &ProviderTable,
        name: &ProviderName,
        mut settings: Pkcs11Settings,
        pin: &SecretBytes,
        others: &[Arc<Self>],
    ) -> Result<Self, Pkcs11Error> {
        table.refuse_taken(name.as_str(), None)?;
        settings.check_module()?;
        settings.host = settings::host_name();
        settings.serial = None;
        let wanted = settings.id.take();
        let link = Link::new(settings.clone(), deadline).map_err(ProviderError::from)?;
        link.find()?;
        if let Some(other) = others.iter().find(|other| other.link.get().is_same_token(&link)) {
            return Err(Pkcs11Error::TokenInUse(other.name.clone()));
        }
        link.unlock(pin, link.locks())?;
        let found = link.call(|token| kek::providers(token))?;
        let id = match (wanted, found.as_slice()) {
            (Some(wanted), _) => wanted,
            (None, []) => ProviderId::random(),
            (None, [one]) => *one,
            (None, many) => return Err(Pkcs11Error::ManyProviders(many.to_vec())),
        };
        settings.serial = link.serial().cloned();
        let provider = Self {
            id,
            name: name.to_string(),
            kek_names: table.kek_names(id),
            link: Current::new(link),
            changing: Mutex::default(),
        };
        provider.try_out(settings.kek_scope)?;
        let stored = serde_json::to_value(&settings).map_err(Pkcs11Error::Json)?;
        table.insert(id, name.as_str(), Self::KIND, &stored)?;
        Ok(provider)
    }

    /// The recorded provider, locked. Asks nothing of the module.
    ///
    /// # Errors
    /// When its settings can't be read, or its module is not what may be loaded.
    pub(crate) fn open(table: &ProviderTable, record: &ProviderRecord) -> Result<Self, Pkcs11Error> {
        Self::open_within(CALL, table, record)
    }

    fn open_within(
        deadline: Duration,
        table: &ProviderTable,
        record: &ProviderRecord,
    ) -> Result<Self, Pkcs11Error> {
        let settings: Pkcs11Settings =
            serde_json::from_value(record.settings.clone()).map_err(Pkcs11Error::Json)?;
        settings.check_module()?;
        Ok(Self {
            id: record.id,
            name: record.name.clone(),
            kek_names: table.kek_names(record.id),
            link: Current::new(Link::new(settings, deadline).map_err(ProviderError::from)?),
            changing: Mutex::default(),
        })
    }

    fn try_out(&self, scope: ScopeSetting) -> Result<(), ProviderError> {
        match scope {
            ScopeSetting::Provider => self.create_kek(&KekScope::Provider).map(drop),
            ScopeSetting::Vm => {
                let bits = self.link.get().settings.key_bits;
                self.link
                    .get()
                    .call(move |token| Ok(Mechanism::choose(&token.offers()?, bits).map(drop)?))
            }
        }
    }

    /// What jobs have taken out of use. One that serves all VMs stays in use while a VM here has something under it: a job may
    /// have taken it from one VM only.
    fn retired(&self, scope: &KekScope) -> Result<HashSet<KekId>, ProviderError> {
        let unreadable = || ProviderError::internal("reading which KEKs are retired");
        let mut retired: HashSet<KekId> = self.kek_names.retired().map_err(unreadable())?;
        if *scope == KekScope::Provider && !retired.is_empty() {
            let used = self.kek_names.keks_of_envelopes(None);
            for kek in used.map_err(unreadable())? {
                retired.remove(&kek);
            }
        }
        Ok(retired)
    }

    /// The KEK in use, unless that is `old`; then a new one takes its place.
    fn kek_in_use(&self, scope: &KekScope, old: Option<KekId>) -> Result<KekId, ProviderError> {
        let (owner, scope) = (self.owner(), self.link.get().settings.kek_scope.scope(scope));
        let retired = self.retired(&scope)?;
        self.link
            .get()
            .call(move |token| kek::in_use_or_new(token, &owner, &scope, &retired, old.as_ref()))
    }

    fn owner(&self) -> Owner {
        Owner {
            provider: self.id,
            host: self.link.get().settings.host.clone(),
            key_bits: self.link.get().settings.key_bits,
        }
    }
}

impl KeyProvider for Pkcs11Provider {
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

    fn probe(&self) {
        // What it comes to is noted for `status`.
        let _ = self.link.get().call(|token| token.check());
    }

    fn probe_within(&self) -> Option<Duration> {
        Some(PROBE)
    }

    fn last_answer(&self) -> Option<SystemTime> {
        self.link.get().last_answer()
    }

    fn create_kek(&self, scope: &KekScope) -> Result<KekId, ProviderError> {
        self.kek_in_use(scope, None)
    }

    fn rotate_kek(&self, scope: &KekScope, old: &KekId) -> Result<KekId, ProviderError> {
        self.kek_in_use(scope, Some(old.clone()))
    }

    fn wrap(&self, kek: &KekId, payload: &Payload) -> Result<Stanza, ProviderError> {
        let (owner, id) = (self.owner(), kek.clone());
        let payload = SecretBytes::copy_of(payload.expose()).map_err(TokenError::Memory)?;
        let (mechanism, body) = self.link.get().call(move |token| {
            kek::with(token, &owner, &id, |wrapping| {
                Ok((wrapping.kek.mechanism, wrapping.wrap(payload.expose())?))
            })
        })?;
        Ok(Stanza {
            provider: self.id,
            provider_name: self.name.clone(),
            kek: kek.clone(),
            mechanism: mechanism.as_str().to_owned(),
            body,
        })
    }

    /// One turn at the module's queue for all of them.
    fn unwrap_many(&self, stanzas: &[&Stanza]) -> Result<Vec<Payload>, ProviderError> {
        let owner = self.owner();
        let stanzas: Vec<Stanza> = stanzas.iter().map(|stanza| (*stanza).clone()).collect();
        self.link.get().call(move |token| {
            let unwrap = |stanza| unwrap_one(token, &owner, stanza);
            stanzas.iter().map(unwrap).collect()
        })
    }

    fn destroy_kek(&self, kek: &KekId, vm: VmId) -> Result<DestroyReceipt, ProviderError> {
        let (owner, id) = (self.owner(), kek.clone());
        let Some(objects) = self
            .link
            .get()
            .call(move |token| kek::destroy(token, &owner, vm, &id))?
        else {
            let why = format!("the label of CKA_ID {kek} does not name this VM");
            return Ok(DestroyReceipt::shared(kek, &why));
        };
        Ok(DestroyReceipt {
            kek: kek.clone(),
            destroyed: true,
            observed: format!(
                "{objects} object(s) with CKA_ID {kek} were destroyed, and the token finds them no more; a backup or \
                 a clone of the token may still hold them"
            ),
        })
    }

    fn lock(&self) {
        self.link.with(Link::lock);
    }

    fn change(&self, change: &SettingsChange<'_>) -> Result<(), ChangeError> {
        self.change_settings(change)
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        let token = self.link.get().described();
        token.map(|said| ("token", said)).into_iter().collect()
    }

    fn asks_for(&self) -> Option<CredentialKind> {
        Some(CredentialKind::Pin)
    }

    /// Presents a PIN once, and none that the token has refused before.
    fn unlock_since(&self, locks: LocksNoted, credential: &SecretBytes) -> Result<(), ProviderError> {
        self.link.get().unlock(credential, locks)
    }

    fn locks(&self) -> LocksNoted {
        self.link.get().locks()
    }
}

fn unwrap_one(token: &mut Token, owner: &Owner, stanza: &Stanza) -> Result<Payload, TokenError> {
    if stanza.provider != owner.provider {
        return Err(ProviderError::Tampered.into());
    }
    let unknown = || ProviderError::UnknownMechanism(stanza.mechanism.clone());
    let mechanism = Mechanism::parse(&stanza.mechanism).ok_or_else(unknown)?;
    kek::with(token, owner, &stanza.kek, |wrapping| {
        if wrapping.kek.mechanism != mechanism {
            return Err(ProviderError::Tampered.into());
        }
        let opened = wrapping.unwrap(&stanza.body)?;
        Ok(Payload::from_unwrapped(opened).map_err(ProviderError::Payload)?)
    })
}

/// Why a pkcs11 provider can't be added or opened.
#[derive(Debug, Error)]
pub(crate) enum Pkcs11Error {
    #[error(transparent)]
    Keystore(#[from] StoreError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error("its settings are not understood")]
    Json(#[source] serde_json::Error),
    /// One login serves a whole process, so two providers would unlock each other.
    #[error("the token is that of provider '{0}' already")]
    TokenInUse(String),
    /// Which one to be is for the admin to say.
    #[error("the token holds KEKs of several providers ({})", list(.0))]
    ManyProviders(Vec<ProviderId>),
    #[error(transparent)]
    Provider(#[from] ProviderError),
}

fn list(ids: &[ProviderId]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod service_tests;
#[cfg(test)]
pub(in crate::provider) mod stand;
#[cfg(test)]
pub(super) mod tests;
