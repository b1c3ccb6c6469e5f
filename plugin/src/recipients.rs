//! The key providers of this host, and what envelopes need of them.
//!
//! Built from the keystore when the daemon starts, every provider locked. A provider of a kind that this version
//! does not know stays in the list, with the reason why it can't be used: it may be the only one that opens a
//! disk. No lock is held while a provider works, and none gets more time than the deadline for one call.

mod error;
mod made_keks;
mod membership;
mod opening;
mod outlook;
mod rewrapping;
mod roster;
mod watch;

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use crate::model::deadlines::provider::PROBE;
use crate::model::envelope::{Binding, Envelope, KekId, Payload, ProviderId, Verified, VmId};
use crate::model::nearest::name_hint;
use crate::provider::toolbox::deadline;
use crate::provider::{DestroyReceipt, ProviderError};
use crate::secret::Dek;
use crate::store::{Change, EnvelopeStore, ProviderTable, StoreError, Stores};
use roster::Roster;
use watch::{Pace, Watches};

pub(crate) use crate::provider::kind::Provider;
pub(crate) use error::{SealError, UnknownProvider};
#[cfg(test)]
use opening::{Attempt, Refusal};
pub(crate) use opening::{OpenError, bring_back};
pub(crate) use outlook::Outlook;
pub(crate) use rewrapping::{Rewrap, RewrapTarget, Rewrapped};
pub(crate) use watch::Report;

/// All providers of this host.
pub(crate) struct Recipients {
    keystore: Arc<dyn EnvelopeStore>,
    table: ProviderTable,
    roster: Roster,
    /// For one call of a provider.
    deadline: RwLock<Duration>,
    /// Whose stanzas a new envelope gets; the default provider's alone, if empty.
    recipients: RwLock<Vec<String>>,
}

impl Recipients {
    /// The providers that `stores` record, all locked, and each probed in the background from now on.
    pub(crate) fn open(stores: &Stores, deadline: Duration) -> Result<Self, StoreError> {
        let (keystore, table) = (Arc::clone(&stores.keystore), stores.providers());
        membership::finish_deletions(keystore.as_ref(), &table)?;
        let watches = Watches::new(Pace {
            interval: PROBE,
            patience: deadline,
        });
        Ok(Self {
            roster: Roster::open(Arc::clone(&keystore), table.clone(), watches)?,
            keystore,
            table,
            deadline: RwLock::new(deadline),
            recipients: RwLock::default(),
        })
    }

    /// How often each provider is probed from now on; more often while it does not answer.
    pub(crate) fn set_probe_interval(&self, interval: Duration) {
        self.roster.watches.set_pace(|pace| pace.interval = interval);
    }

    /// How `provider` is, and since when. Waits for nothing.
    pub(crate) fn report(&self, provider: &Provider) -> Report {
        self.roster.watches.report(provider.provider())
    }

    /// The most time that a provider gets for one call from now on.
    pub(crate) fn set_deadline(&self, deadline: Duration) {
        *self.deadline.write().unwrap_or_else(PoisonError::into_inner) = deadline;
        self.roster.watches.set_pace(|pace| pace.patience = deadline);
    }

    /// Gives each new envelope a stanza of each of these providers (names or ids), or of the default one if there are none.
    pub(crate) fn set_recipients(&self, recipients: Vec<String>) {
        *self.recipients.write().unwrap_or_else(PoisonError::into_inner) = recipients;
    }

    /// The providers that new envelopes are for.
    pub(crate) fn policy(&self) -> Result<Vec<Provider>, SealError> {
        let names = self
            .recipients
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if names.is_empty() {
            return Ok(vec![self.default_provider().ok_or(SealError::NoProvider)?]);
        }
        let mut policy: Vec<Provider> = Vec::with_capacity(names.len());
        for name in &names {
            let found = self
                .find(name)
                .map_err(|_| SealError::UnknownRecipient(name.clone()))?;
            if policy
                .iter()
                .all(|known| known.provider().id() != found.provider().id())
            {
                policy.push(found);
            }
        }
        Ok(policy)
    }

    fn deadline(&self) -> Duration {
        *self.deadline.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them, by name.
    pub(crate) fn providers(&self) -> Vec<Provider> {
        self.roster.now().providers.clone()
    }

    pub(crate) fn by_id(&self, id: ProviderId) -> Option<Provider> {
        self.providers()
            .into_iter()
            .find(|known| known.provider().id() == id)
    }

    /// The one with this name or, in text, this id.
    pub(crate) fn find(&self, name_or_id: &str) -> Result<Provider, UnknownProvider> {
        let id = name_or_id.parse::<ProviderId>().ok();
        let all = self.providers();
        let is_meant =
            |known: &&Provider| known.provider().name() == name_or_id || Some(known.provider().id()) == id;
        all.iter().find(is_meant).cloned().ok_or_else(|| UnknownProvider {
            name: name_or_id.to_owned(),
            hint: name_hint(name_or_id, all.iter().map(|known| known.provider().name())),
        })
    }

    /// The one that wraps new envelopes unless told otherwise; none only while there are no providers.
    pub(crate) fn default_provider(&self) -> Option<Provider> {
        let id = self.roster.now().default?;
        self.by_id(id)
    }

    /// Makes `provider` the default.
    pub(crate) fn set_default(&self, provider: &Provider) -> Result<Change, StoreError> {
        self.keystore.set_default_provider(provider.provider().id())
    }

    /// Locks all providers, as the end of virtseald does: what is on disk for the next one stays.
    pub(crate) fn lock_all(&self) {
        for provider in self.providers() {
            provider.provider().end();
        }
    }

    /// The DEK of one envelope.
    pub(crate) fn open_envelope(&self, envelope: &Envelope) -> Result<Dek, OpenError> {
        let mut deks = self.open_all(&[envelope])?;
        Ok(deks.pop().expect("one envelope yields one DEK"))
    }

    /// The DEK of an envelope, from those providers alone that are ready; nobody else is asked.
    pub(crate) fn open_usable(&self, envelope: &Envelope) -> Option<Dek> {
        let usable: Vec<_> = self
            .providers()
            .into_iter()
            .filter(|known| known.provider().status().is_usable())
            .collect();
        let mut opened = opening::open_all(&usable, &[envelope], self.deadline()).ok()?;
        opened.pop()
    }

    /// The DEKs of all `envelopes`, in their order, with one call per provider unless a stanza does not open.
    ///
    /// # Errors
    /// For the first envelope that none of its providers opens, why each of them did not. Then there is no DEK
    /// at all.
    pub(crate) fn open_all(&self, envelopes: &[&Envelope]) -> Result<Vec<Dek>, OpenError> {
        opening::open_all(&self.providers(), envelopes, self.deadline()).map_err(|error| {
            let deleted = self.keystore.deleted_providers().map(|rows| rows.sound);
            error.with_deleted(&deleted.unwrap_or_default())
        })
    }

    /// A new DEK and its envelope, wrapped by `provider` (a name or an id) or, without one, by all recipients of the
    /// policy, after each stanza was unwrapped again. Nothing is stored.
    ///
    /// # Errors
    /// When there is no such provider, or one of them does not wrap: then there is no envelope at all.
    pub(crate) fn seal_new(
        &self,
        provider: Option<&str>,
        binding: &Binding,
    ) -> Result<(Verified, Dek), SealError> {
        let providers = match provider {
            Some(name) => vec![self.find(name)?],
            None => self.policy()?,
        };
        let dek = Dek::random().map_err(SealError::Memory)?;
        let mut stanzas = Vec::with_capacity(providers.len());
        for provider in &providers {
            let payload = Payload::bind(&dek, binding)?;
            let (asked, binding, keystore) = (provider.clone(), *binding, Arc::clone(&self.keystore));
            let wrapped = deadline::within(self.deadline(), move || {
                made_keks::wrap(keystore.as_ref(), &asked, &binding, &payload)
            });
            stanzas.push(wrapped.map_err(|source| SealError::Refused {
                name: provider.provider().name().to_owned(),
                kind: provider.row(),
                source,
            })?);
        }
        let envelope = Verified::new(binding, stanzas, &dek)?;
        for (provider, stanza) in providers.iter().zip(&envelope.stanzas) {
            let mut alone = envelope.clone().into_envelope();
            alone.stanzas = vec![stanza.clone()];
            let opened = self.open_envelope(&alone).map_err(SealError::NotVerified)?;
            if !openssl::memcmp::eq(opened.expose(), dek.expose()) {
                return Err(SealError::AnotherKey(provider.provider().name().to_owned()));
            }
        }
        Ok((envelope, dek))
    }

    /// The name of a provider, here or as it was when it was deleted here; else its UUID.
    pub(crate) fn name_of(&self, id: ProviderId) -> String {
        if let Some(provider) = self.by_id(id) {
            return provider.provider().name().to_owned();
        }
        let deleted = self.keystore.deleted_providers().map(|rows| rows.sound);
        let found = deleted.into_iter().flatten().find(|deleted| deleted.id == id);
        found.map_or_else(|| id.to_string(), |deleted| deleted.name)
    }

    /// Destroys a KEK that serves `vm` alone, within the deadline.
    pub(crate) fn destroy_kek(
        &self,
        provider: ProviderId,
        kek: &KekId,
        vm: VmId,
    ) -> Result<DestroyReceipt, ProviderError> {
        let known = self
            .by_id(provider)
            .ok_or_else(|| ProviderError::Unusable("it is not on this host".to_owned()))?;
        let kek = kek.clone();
        deadline::within(self.deadline(), move || known.provider().destroy_kek(&kek, vm))
    }
}

#[cfg(test)]
mod tests;
