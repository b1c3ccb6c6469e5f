//! The kinds of providers: each is a folder, a row of [`KINDS`] and one of [`MAKERS`]. Where a kind matters, its row of `KINDS` says why.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use super::cache::NothingToCache;
use super::kmip::KmipProvider;
use super::native::{NativeError, NativeProvider};
use super::pkcs11::Pkcs11Provider;
use super::setting::Settings;
use super::toolbox::locks::{Locks, LocksNoted};
use super::transit::TransitProvider;
use super::{
    Addition, ChangeError, DestroyReceipt, KekScope, KeyProvider, ProviderError, ProviderStatus,
    SettingsChange,
};
use crate::api::CredentialKind;
use crate::model::envelope::{KekId, Payload, ProviderId, Stanza, VmId};
use crate::model::problem::{Problem, chain};
use crate::secret::SecretBytes;
use crate::store::{ProviderRecord, ProviderTable, StoreError};

pub(crate) struct Kind {
    /// In the keystore, and on the command line.
    pub name: &'static str,
    /// Whether a new one wants a passphrase or PIN.
    pub credential: Credential,
    /// What can be read and changed of it.
    pub settings: Settings,
    /// Where its keys are, and who backs them up.
    pub keys: KeysAt,
    /// By what it trusts its servers.
    pub trust: TrustBy,
    /// Why it has no cache, if it has none.
    pub nothing_to_cache: Option<NothingToCache>,
}

/// What virtseald makes of a kind. The command line, which reads [`KINDS`], is smaller and starts sooner without the providers themselves.
struct Maker {
    /// That of its [`Kind`].
    kind: &'static str,
    /// The recorded provider, locked; nothing is waited for.
    open: fn(&ProviderTable, &ProviderRecord) -> Opened,
    /// Makes one, and records it.
    add: fn(&Addition<'_>) -> Result<Arc<dyn KeyProvider>, Problem>,
    /// Removes what a deleted one has left in the state directory beside its rows.
    remove_files: fn(&Path, ProviderId) -> Result<(), Failure>,
}

/// Whether a new provider needs something secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Credential {
    /// A passphrase or PIN.
    Wanted,
    /// It comes with an unlock, if at all.
    Later,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeysAt {
    /// Derived on this host whenever they are needed: there is nothing to destroy, and one backup covers all.
    Host,
    Server,
    Token,
}

/// By what servers are trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TrustBy {
    /// `provider trust` and `provider identity`.
    Command,
    /// A file that its settings name, and what it is unlocked with.
    Settings,
    /// There are no servers.
    Nobody,
}

/// All of them.
pub(crate) static KINDS: &[Kind] = &[
    Kind {
        name: NativeProvider::KIND,
        credential: Credential::Wanted,
        settings: super::native::SETTINGS,
        keys: KeysAt::Host,
        trust: TrustBy::Nobody,
        nothing_to_cache: Some(NothingToCache::Native),
    },
    Kind {
        name: KmipProvider::KIND,
        credential: Credential::Later,
        settings: super::kmip::SETTINGS,
        keys: KeysAt::Server,
        trust: TrustBy::Command,
        nothing_to_cache: None,
    },
    Kind {
        name: Pkcs11Provider::KIND,
        credential: Credential::Wanted,
        settings: super::pkcs11::SETTINGS,
        keys: KeysAt::Token,
        trust: TrustBy::Nobody,
        nothing_to_cache: Some(NothingToCache::Pkcs11),
    },
    Kind {
        name: TransitProvider::KIND,
        credential: Credential::Later,
        settings: super::transit::SETTINGS,
        keys: KeysAt::Server,
        trust: TrustBy::Settings,
        nothing_to_cache: Some(NothingToCache::Transit),
    },
    #[cfg(test)]
    Kind {
        name: super::dummy::DummyProvider::KIND,
        credential: Credential::Later,
        settings: super::native::SETTINGS,
        keys: KeysAt::Server,
        trust: TrustBy::Nobody,
        nothing_to_cache: None,
    },
];

/// Of each kind, one.
static MAKERS: &[Maker] = &[
    Maker {
        kind: NativeProvider::KIND,
        open: |table, record| match NativeProvider::open(table, record) {
            Err(NativeError::Keystore(error)) if !error.is_of_row() => Err(NotOpened::Store(error)),
            opened => as_any(opened),
        },
        add: |new| Ok(Arc::new(NativeProvider::add(new)?)),
        remove_files: |_, _| Ok(()),
    },
    Maker {
        kind: KmipProvider::KIND,
        open: |table, record| as_any(KmipProvider::open(table, record)),
        add: |new| Ok(Arc::new(KmipProvider::add(new)?)),
        remove_files: |dir, id| Ok(KmipProvider::remove_files(dir, id)?),
    },
    Maker {
        kind: Pkcs11Provider::KIND,
        open: |table, record| as_any(Pkcs11Provider::open(table, record)),
        add: |new| Ok(Arc::new(Pkcs11Provider::add(new)?)),
        remove_files: |_, _| Ok(()),
    },
    Maker {
        kind: TransitProvider::KIND,
        open: |table, record| as_any(TransitProvider::open(table, record)),
        add: |new| Ok(Arc::new(TransitProvider::add(new)?)),
        remove_files: |_, _| Ok(()),
    },
    #[cfg(test)]
    Maker {
        kind: super::dummy::DummyProvider::KIND,
        open: |_, record| Ok(Arc::new(super::dummy::DummyProvider::open(record))),
        add: |new| Ok(Arc::new(super::dummy::DummyProvider::add(new)?)),
        remove_files: |_, _| Ok(()),
    },
];

type Opened = Result<Arc<dyn KeyProvider>, NotOpened>;
type Failure = Box<dyn Error + Send + Sync>;

/// Why a recorded provider is not there.
enum NotOpened {
    /// The keystore can't be read.
    Store(StoreError),
    /// This one can't be used.
    Unusable(String),
}

fn as_any<T: KeyProvider, E: Error>(opened: Result<T, E>) -> Opened {
    match opened {
        Ok(provider) => Ok(Arc::new(provider)),
        Err(error) => Err(NotOpened::Unusable(chain(&error))),
    }
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl Kind {
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        KINDS.iter().find(|kind| kind.name == name)
    }

    /// Makes a new one, and records it.
    pub(crate) fn add(&self, new: &Addition<'_>) -> Result<Arc<dyn KeyProvider>, Problem> {
        match Maker::of(self.name) {
            Some(maker) => (maker.add)(new),
            None => Err(Problem::failed(format!(
                "this virtseald makes no provider of the kind {:?}",
                self.name
            ))),
        }
    }

    /// Removes what a deleted provider, whose kind may not be known any more, has left in the state directory.
    pub(crate) fn remove_files(dir: &Path, id: ProviderId) {
        for maker in MAKERS {
            if let Err(error) = (maker.remove_files)(dir, id) {
                tracing::warn!(
                    "provider {id} is deleted, but not all of its files: {}",
                    chain(error.as_ref())
                );
            }
        }
    }
}

impl Maker {
    fn of(kind: &str) -> Option<&'static Self> {
        MAKERS.iter().find(|maker| maker.kind == kind)
    }
}

/// A provider of this host.
#[derive(Clone)]
pub(crate) struct Provider {
    row: Option<&'static Kind>,
    provider: Arc<dyn KeyProvider>,
}

impl Provider {
    /// One of a kind that there is.
    pub(crate) fn new(provider: Arc<dyn KeyProvider>) -> Self {
        Self {
            row: Kind::named(provider.kind()),
            provider,
        }
    }

    /// The recorded one. One that can't be used refuses everything, with the reason.
    ///
    /// # Errors
    /// When the keystore can't be read.
    pub(crate) fn from_record(table: &ProviderTable, record: ProviderRecord) -> Result<Self, StoreError> {
        let opened = match Maker::of(&record.kind) {
            Some(maker) => (maker.open)(table, &record),
            None => Err(NotOpened::Unusable(format!(
                "this virtseal does not know the kind {:?}: upgrade virtseal",
                record.kind
            ))),
        };
        match opened {
            Ok(provider) => Ok(Self::new(provider)),
            Err(NotOpened::Store(error)) => Err(error),
            Err(NotOpened::Unusable(reason)) => Ok(Self {
                row: None,
                provider: Arc::new(UnusableProvider { record, reason }),
            }),
        }
    }

    /// What every kind can do.
    pub(crate) fn provider(&self) -> &dyn KeyProvider {
        self.provider.as_ref()
    }

    /// The same, to keep.
    pub(crate) fn shared(&self) -> Arc<dyn KeyProvider> {
        Arc::clone(&self.provider)
    }

    /// As what it is; `None` if it is of another kind, or can't be used.
    pub(crate) fn of_kind<T: KeyProvider>(&self) -> Option<Arc<T>> {
        super::of_kind(self.shared())
    }

    pub(crate) fn kind(&self) -> &str {
        self.provider.kind()
    }

    /// What is so of its kind; none if it can't be used.
    pub(crate) fn row(&self) -> Option<&'static Kind> {
        self.row
    }

    /// Whether there is anything to destroy of a KEK.
    pub(crate) fn keeps_keks(&self) -> bool {
        self.row.is_none_or(|row| row.keys != KeysAt::Host)
    }

    pub(crate) fn cache(&self) -> Option<&super::cache::KekCache> {
        self.provider.cache()
    }
}

/// A recorded provider that can't be used; it refuses everything with the reason.
struct UnusableProvider {
    record: ProviderRecord,
    reason: String,
}

impl UnusableProvider {
    fn refusal<T>(&self) -> Result<T, ProviderError> {
        Err(ProviderError::Unusable(self.reason.clone()))
    }
}

impl KeyProvider for UnusableProvider {
    fn kind(&self) -> &str {
        &self.record.kind
    }

    fn id(&self) -> ProviderId {
        self.record.id
    }

    fn name(&self) -> &str {
        &self.record.name
    }

    fn status(&self) -> ProviderStatus {
        ProviderStatus::Degraded(self.reason.clone())
    }

    fn refuses(&self) -> Option<ProviderError> {
        Some(ProviderError::Unusable(self.reason.clone()))
    }

    fn create_kek(&self, _: &KekScope) -> Result<KekId, ProviderError> {
        self.refusal()
    }

    fn rotate_kek(&self, _: &KekScope, _: &KekId) -> Result<KekId, ProviderError> {
        self.refusal()
    }

    fn wrap(&self, _: &KekId, _: &Payload) -> Result<Stanza, ProviderError> {
        self.refusal()
    }

    fn unwrap_many(&self, _: &[&Stanza]) -> Result<Vec<Payload>, ProviderError> {
        self.refusal()
    }

    fn destroy_kek(&self, _: &KekId, _: VmId) -> Result<DestroyReceipt, ProviderError> {
        self.refusal()
    }

    fn lock(&self) {}

    fn change(&self, _: &SettingsChange<'_>) -> Result<(), ChangeError> {
        self.refusal().map_err(ChangeError::Refused)
    }

    /// Nobody types anything for what is refused whatever it is.
    fn asks_for(&self) -> Option<CredentialKind> {
        None
    }

    fn locks(&self) -> LocksNoted {
        Locks::default().noted()
    }

    fn unlock_since(&self, _: LocksNoted, _: &SecretBytes) -> Result<(), ProviderError> {
        self.refusal()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{OrNewer, ProviderKind};

    #[test]
    fn every_kind_can_be_made_and_nothing_else() {
        let kinds: Vec<_> = KINDS.iter().map(|kind| kind.name).collect();
        let made: Vec<_> = MAKERS.iter().map(|maker| maker.kind).collect();
        assert_eq!(kinds, made);
    }

    #[test]
    fn every_kind_has_its_word_on_the_wire() {
        let real = KINDS
            .iter()
            .filter(|kind| kind.name != super::super::dummy::DummyProvider::KIND);
        let unknown: Vec<_> = real
            .map(|kind| OrNewer::<ProviderKind>::named(kind.name))
            .filter(|word| word.known().is_none())
            .collect();
        assert!(unknown.is_empty(), "{unknown:?}");
    }
}
