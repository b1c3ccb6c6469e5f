//! How providers come to a host, and how they go.

use std::sync::Arc;

use super::{Provider, Recipients};
use crate::model::envelope::ProviderId;
use crate::model::problem::Problem;
use crate::provider::kind::Kind;
use crate::provider::{Addition, KeyProvider, ProviderName};
use crate::secret::SecretBytes;
use crate::store::{EnvelopeStore, ProviderTable, StoreError};

impl Recipients {
    /// Makes a provider of `kind` by the JSON of its settings, and by a passphrase or PIN where it wants one.
    ///
    /// # Errors
    /// What the kind says.
    pub fn add(
        &self,
        kind: &Kind,
        name: &ProviderName,
        settings: &str,
        credential: Option<&SecretBytes>,
    ) -> Result<(), Problem> {
        let others = self.providers().iter().map(Provider::shared).collect();
        let made = (kind.add)(&Addition {
            table: &self.table,
            name,
            settings,
            credential,
            others,
        })?;
        self.roster.enter(Provider::new(made));
        Ok(())
    }

    /// Takes the provider in that `make` records.
    ///
    /// # Errors
    /// What `make` says.
    pub fn add_by<T: KeyProvider, E>(
        &self,
        make: impl FnOnce(&ProviderTable) -> Result<T, E>,
    ) -> Result<Arc<T>, E> {
        let made = Arc::new(make(&self.table)?);
        self.roster.enter(Provider::new(Arc::<T>::clone(&made)));
        Ok(made)
    }

    /// Removes a provider from the keystore, which keeps its name, and from the disk.
    ///
    /// # Errors
    /// The keystore's; then it stays.
    pub fn delete(&self, id: ProviderId) -> Result<(), StoreError> {
        self.keystore.delete_provider(id)?;
        Kind::remove_files(self.table.dir(), id);
        Ok(())
    }
}

/// What a virtseald that was killed has left of providers that were deleted on request: the keystore names each of them.
pub(super) fn finish_deletions(
    keystore: &dyn EnvelopeStore,
    table: &ProviderTable,
) -> Result<(), StoreError> {
    let there = keystore.providers()?;
    if !there.damaged.is_empty() {
        // It may be the one that the files are of.
        return Ok(());
    }
    for deleted in keystore.deleted_providers()?.sound {
        if there.sound.iter().all(|record| record.id != deleted.id) {
            Kind::remove_files(table.dir(), deleted.id);
        }
    }
    Ok(())
}
