//! A provider of the recipients, whose kind is known: where only what all kinds can do matters, it is a [`KeyProvider`].

use std::sync::Arc;

use crate::model::envelope::{KekId, Payload, ProviderId, Stanza, VmId};
use crate::model::problem::chain;
use crate::provider::cache::KekCache;
use crate::provider::kmip::KmipProvider;
use crate::provider::native::{NativeError, NativeProvider};
use crate::provider::pkcs11::Pkcs11Provider;
use crate::provider::transit::TransitProvider;
use crate::provider::{DestroyReceipt, KekScope, KeyProvider, ProviderError, ProviderStatus};
use crate::secret::SecretBytes;
use crate::store::{ProviderRecord, ProviderTable, StoreError};

/// A provider of any kind, where the kind matters.
#[derive(Clone)]
pub enum Provider {
    /// A root key on this host.
    Native(Arc<NativeProvider>),
    /// In the transit engine of a Vault or OpenBao.
    Transit(Arc<TransitProvider>),
    /// KEKs in a PKCS#11 token.
    Pkcs11(Arc<Pkcs11Provider>),
    /// Keys at a key management server.
    Kmip(Arc<KmipProvider>),
    /// Recorded, but of no use to this version.
    Unusable(Arc<UnusableProvider>),
}

impl Provider {
    /// What every kind can do.
    #[must_use]
    pub fn provider(&self) -> &dyn KeyProvider {
        match self {
            Self::Native(provider) => provider.as_ref(),
            Self::Transit(provider) => provider.as_ref(),
            Self::Pkcs11(provider) => provider.as_ref(),
            Self::Kmip(provider) => provider.as_ref(),
            Self::Unusable(provider) => provider.as_ref(),
        }
    }

    pub(super) fn shared(&self) -> Arc<dyn KeyProvider> {
        match self {
            Self::Native(provider) => Arc::<NativeProvider>::clone(provider),
            Self::Transit(provider) => Arc::<TransitProvider>::clone(provider),
            Self::Pkcs11(provider) => Arc::<Pkcs11Provider>::clone(provider),
            Self::Kmip(provider) => Arc::<KmipProvider>::clone(provider),
            Self::Unusable(provider) => Arc::<UnusableProvider>::clone(provider),
        }
    }

    /// Its kind, as the keystore has it.
    #[must_use]
    pub fn kind(&self) -> &str {
        match self {
            Self::Native(_) => NativeProvider::KIND,
            Self::Transit(_) => TransitProvider::KIND,
            Self::Pkcs11(_) => Pkcs11Provider::KIND,
            Self::Kmip(_) => KmipProvider::KIND,
            Self::Unusable(provider) => &provider.record.kind,
        }
    }

    /// Whether there is anything to destroy of a KEK: a native one is derived whenever it is needed.
    #[must_use]
    pub fn keeps_keks(&self) -> bool {
        !matches!(self, Self::Native(_))
    }

    /// The KEKs that it keeps for when its servers don't answer; none for a kind, or a mode, whose KEKs stay where they are.
    #[must_use]
    pub fn cache(&self) -> Option<&KekCache> {
        match self {
            Self::Kmip(provider) => provider.cache(),
            Self::Native(_) | Self::Transit(_) | Self::Pkcs11(_) | Self::Unusable(_) => None,
        }
    }

    /// The recorded provider; one that can't be used is [`Provider::Unusable`].
    ///
    /// # Errors
    /// When the keystore can't be read.
    pub(super) fn from_record(table: &ProviderTable, record: ProviderRecord) -> Result<Self, StoreError> {
        let opened = match record.kind.as_str() {
            NativeProvider::KIND => match NativeProvider::open(table, &record) {
                Ok(provider) => Ok(Self::Native(Arc::new(provider))),
                Err(NativeError::Keystore(error)) if !error.is_of_row() => return Err(error),
                Err(error) => Err(chain(&error)),
            },
            TransitProvider::KIND => TransitProvider::open(table, &record)
                .map(|provider| Self::Transit(Arc::new(provider)))
                .map_err(|error| chain(&error)),
            Pkcs11Provider::KIND => Pkcs11Provider::open(table, &record)
                .map(|provider| Self::Pkcs11(Arc::new(provider)))
                .map_err(|error| chain(&error)),
            KmipProvider::KIND => KmipProvider::open(table, &record)
                .map(|provider| Self::Kmip(Arc::new(provider)))
                .map_err(|error| chain(&error)),
            kind => Err(format!(
                "this virtseal does not know the kind {kind:?}: upgrade virtseal"
            )),
        };
        Ok(opened.unwrap_or_else(|reason| Self::Unusable(Arc::new(UnusableProvider { record, reason }))))
    }
}

/// A recorded provider that can't be used; it refuses everything with the reason.
pub struct UnusableProvider {
    record: ProviderRecord,
    reason: String,
}

impl UnusableProvider {
    fn refusal<T>(&self) -> Result<T, ProviderError> {
        Err(ProviderError::Unusable(self.reason.clone()))
    }
}

impl KeyProvider for UnusableProvider {
    fn id(&self) -> ProviderId {
        self.record.id
    }

    fn name(&self) -> &str {
        &self.record.name
    }

    fn status(&self) -> ProviderStatus {
        ProviderStatus::Degraded(self.reason.clone())
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

    fn unlock(&self, _: &SecretBytes) -> Result<(), ProviderError> {
        self.refusal()
    }
}
