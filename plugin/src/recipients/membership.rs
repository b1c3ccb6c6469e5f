//! How providers come to a host, and how they go.

use std::sync::Arc;

use super::{Provider, Recipients};
use crate::model::envelope::ProviderId;
use crate::model::problem::chain;
use crate::provider::ProviderName;
use crate::provider::kmip::{KmipProvider, KmipProviderError, KmipSettings};
use crate::provider::native::{NativeError, NativeProvider};
use crate::provider::pkcs11::{Pkcs11Error, Pkcs11Provider, Pkcs11Settings};
use crate::provider::transit::{TransitProvider, TransitSettings};
use crate::secret::SecretBytes;
use crate::store::{EnvelopeStore, ProviderTable, StoreError};

impl Recipients {
    /// Makes a native provider; takes seconds, by the nature of its passphrase.
    ///
    /// # Errors
    /// As [`NativeProvider::create`].
    pub fn add_native(
        &self,
        name: &ProviderName,
        passphrase: &SecretBytes,
    ) -> Result<Arc<NativeProvider>, NativeError> {
        let made = Arc::new(NativeProvider::create(&self.table, name, passphrase)?);
        self.roster.enter(Provider::Native(Arc::clone(&made)));
        Ok(made)
    }

    /// Brings a native provider back from `backup`.
    ///
    /// # Errors
    /// As [`NativeProvider::restore`].
    pub fn restore_native(
        &self,
        name: &ProviderName,
        backup: &[u8],
        backup_passphrase: Option<&SecretBytes>,
        passphrase: &SecretBytes,
    ) -> Result<Arc<NativeProvider>, NativeError> {
        let made = Arc::new(NativeProvider::restore(
            &self.table,
            name,
            backup,
            backup_passphrase,
            passphrase,
        )?);
        self.roster.enter(Provider::Native(Arc::clone(&made)));
        Ok(made)
    }

    /// Adds a transit provider, locked.
    ///
    /// # Errors
    /// As [`TransitProvider::create`].
    pub fn add_transit(
        &self,
        name: &ProviderName,
        settings: TransitSettings,
    ) -> Result<Arc<TransitProvider>, StoreError> {
        let made = Arc::new(TransitProvider::create(&self.table, name, settings)?);
        self.roster.enter(Provider::Transit(Arc::clone(&made)));
        Ok(made)
    }

    /// Adds the token of `settings`, and unlocks it with `pin`.
    ///
    /// # Errors
    /// As [`Pkcs11Provider::create`].
    pub fn add_pkcs11(
        &self,
        name: &ProviderName,
        settings: Pkcs11Settings,
        pin: &SecretBytes,
    ) -> Result<Arc<Pkcs11Provider>, Pkcs11Error> {
        let others: Vec<_> = self
            .providers()
            .into_iter()
            .filter_map(|known| match known {
                Provider::Pkcs11(provider) => Some(provider),
                _ => None,
            })
            .collect();
        let made = Arc::new(Pkcs11Provider::create(&self.table, name, settings, pin, &others)?);
        self.roster.enter(Provider::Pkcs11(Arc::clone(&made)));
        Ok(made)
    }

    /// Records a KMIP provider, which has trust to establish before it does anything.
    ///
    /// # Errors
    /// As [`KmipProvider::create`].
    pub fn add_kmip(
        &self,
        name: &ProviderName,
        settings: KmipSettings,
    ) -> Result<Arc<KmipProvider>, KmipProviderError> {
        let made = Arc::new(KmipProvider::create(&self.table, name, settings)?);
        self.roster.enter(Provider::Kmip(Arc::clone(&made)));
        Ok(made)
    }

    /// Removes a provider from the keystore, which keeps its name, and from the disk.
    ///
    /// # Errors
    /// The keystore's; then it stays.
    pub fn delete(&self, id: ProviderId) -> Result<(), StoreError> {
        self.keystore.delete_provider(id)?;
        remove_files(&self.table, id);
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
            remove_files(table, deleted.id);
        }
    }
    Ok(())
}

fn remove_files(table: &ProviderTable, id: ProviderId) {
    if let Err(error) = KmipProvider::remove_files(table.dir(), id) {
        tracing::warn!(
            "provider {id} is deleted, but not all of its files: {}",
            chain(&error)
        );
    }
}
