//! The rows of key providers, for who adds one or opens what is there.

use std::path::Path;
use std::sync::Arc;

use super::host::HostStore;
use super::kek_cache::KekCacheRows;
use super::kek_names::KekNames;
use super::native::{NativeRows, insert_root};
use crate::model::envelope::ProviderId;
use crate::store::error::StoreError;
use crate::store::host_records::NativeRoot;
use crate::store::records::ProviderRecord;
use crate::store::shared::EnvelopeStore;
use crate::store::sqlite::providers;

/// Who is there, and the handles that each of them gets. A provider keeps its handles, and not this.
#[derive(Clone, Debug)]
pub(crate) struct ProviderTable {
    shared: Arc<dyn EnvelopeStore>,
    host: HostStore,
}

impl ProviderTable {
    pub(crate) fn new(shared: Arc<dyn EnvelopeStore>, host: HostStore) -> Self {
        Self { shared, host }
    }

    /// The state directory, where a provider has files of its own.
    pub(crate) fn dir(&self) -> &Path {
        self.host.dir()
    }

    /// Refuses a name that is taken, and an id that is there already: before anybody does long work for one. What
    /// [`ProviderTable::insert`] says counts.
    pub(crate) fn refuse_taken(&self, name: &str, id: Option<ProviderId>) -> Result<(), StoreError> {
        for known in self.shared.providers()?.sound {
            if known.name == name {
                return Err(StoreError::ProviderNameTaken(known.name));
            }
            if Some(known.id) == id {
                return Err(StoreError::ProviderExists {
                    id: known.id,
                    name: known.name,
                });
            }
        }
        Ok(())
    }

    /// Adds a provider of any kind but native. The first one becomes the default.
    pub(crate) fn insert(
        &self,
        id: ProviderId,
        name: &str,
        kind: &str,
        settings: &serde_json::Value,
    ) -> Result<ProviderRecord, StoreError> {
        self.shared.insert_provider(id, name, kind, settings)
    }

    /// Adds a native provider together with its sealed root key, in one transaction.
    pub(crate) fn insert_native(
        &self,
        id: ProviderId,
        name: &str,
        root: &NativeRoot,
    ) -> Result<ProviderRecord, StoreError> {
        self.host.0.write(|transaction| {
            let record = providers::insert(transaction, id, name, "native", &serde_json::json!({}))?;
            insert_root(transaction, id, root)?;
            Ok(record)
        })
    }

    /// The root keys of a native provider.
    pub(crate) fn native(&self, provider: ProviderId) -> NativeRows {
        self.host.native(provider)
    }

    /// The KEKs of a provider that outlive a reboot.
    pub(crate) fn kek_cache(&self, provider: ProviderId) -> KekCacheRows {
        self.host.kek_cache(provider)
    }

    /// What the KEKs of a provider are called, and which of them are in use.
    pub(crate) fn kek_names(&self, provider: ProviderId) -> KekNames {
        KekNames {
            database: Arc::clone(&self.host.0),
            shared: Arc::clone(&self.shared),
            provider,
        }
    }
}
