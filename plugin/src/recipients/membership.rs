//! How providers come to a host, and how they go.

use std::sync::Arc;

use super::{Provider, Recipients};
use crate::model::envelope::ProviderId;
use crate::model::problem::Problem;
use crate::provider::kind::Kind;
use crate::provider::{Addition, ChangeError, KeyProvider, ProviderError, ProviderName};
use crate::secret::SecretBytes;
use crate::store::{EnvelopeStore, IfNeeded, ProviderRecord, ProviderTable, StoreError};

impl Recipients {
    /// Makes a provider of `kind` by the JSON of its settings, and by a passphrase or PIN where it wants one.
    pub(crate) fn add(
        &self,
        kind: &Kind,
        name: &ProviderName,
        settings: &str,
        credential: Option<&SecretBytes>,
    ) -> Result<(), Problem> {
        let others = self.providers().iter().map(Provider::shared).collect();
        let made = kind.add(&Addition {
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
    pub(crate) fn add_by<T: KeyProvider, E>(
        &self,
        make: impl FnOnce(&ProviderTable) -> Result<T, E>,
    ) -> Result<Arc<T>, E> {
        let made = Arc::new(make(&self.table)?);
        self.roster.enter(Provider::new(Arc::<T>::clone(&made)));
        Ok(made)
    }

    /// Takes a provider that can't be used in anew, with other settings, once they are recorded. It is locked then.
    ///
    /// # Errors
    /// [`ChangeError::Refused`] where these are of no use either.
    pub(crate) fn reopen(
        &self,
        record: ProviderRecord,
        noted: &dyn Fn() -> Result<(), StoreError>,
    ) -> Result<(), ChangeError> {
        let opened = Provider::from_record(&self.table, record)?;
        if opened.row().is_none() {
            let why = opened.provider().refuses();
            return Err(why.unwrap_or(ProviderError::Locked).into());
        }
        noted()?;
        self.roster.enter(opened);
        Ok(())
    }

    /// Removes a provider from the keystore, which keeps its name, and from the disk.
    ///
    /// # Errors
    /// The keystore's; then it stays.
    pub(crate) fn delete(&self, id: ProviderId, if_needed: IfNeeded) -> Result<(), StoreError> {
        self.keystore.delete_provider(id, if_needed)?;
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
