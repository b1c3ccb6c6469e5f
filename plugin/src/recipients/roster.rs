//! Which providers there are: as the keystore says, and read again when that says otherwise, whoever has changed it.
//!
//! A provider that stays is the same value as before: what is unlocked stays so. One whose row can't be read any more stays as
//! well, since it may open what nothing else does.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::watch::Watches;
use crate::model::envelope::ProviderId;
use crate::model::problem::chain;
use crate::provider::kind::Provider;
use crate::store::{EnvelopeStore, ProviderTable, StoreError};

pub(super) struct Roster {
    keystore: Arc<dyn EnvelopeStore>,
    table: ProviderTable,
    known: RwLock<Known>,
    pub(super) watches: Watches,
}

/// The providers, and which change of them it was that they were read after.
#[derive(Default)]
pub(super) struct Known {
    changes: Option<u64>,
    /// By name.
    pub(super) providers: Vec<Provider>,
    pub(super) default: Option<ProviderId>,
}

impl Roster {
    /// All providers locked, and probed by `watches` from now on.
    pub(super) fn open(
        keystore: Arc<dyn EnvelopeStore>,
        table: ProviderTable,
        watches: Watches,
    ) -> Result<Self, StoreError> {
        let roster = Self {
            keystore,
            table,
            known: RwLock::default(),
            watches,
        };
        roster.follow()?;
        Ok(roster)
    }

    /// Those that there are now. Where the keystore can't be read, those that there were.
    pub(super) fn now(&self) -> RwLockReadGuard<'_, Known> {
        let read = self.read().changes;
        if read != Some(self.keystore.provider_changes())
            && let Err(error) = self.follow()
        {
            tracing::error!("which providers there are can't be read: {}", chain(&error));
        }
        self.read()
    }

    /// Takes `made`, which is recorded, in the place of what others may have opened by its record already.
    pub(super) fn enter(&self, made: Provider) {
        self.watches.add(&made.shared());
        let mut known = self.write();
        known
            .providers
            .retain(|provider| provider.provider().id() != made.provider().id());
        known.providers.push(made);
        known.sort();
    }

    fn follow(&self) -> Result<(), StoreError> {
        let mut known = self.write();
        // Before the rows: a change that comes in between is read once more.
        let changes = self.keystore.provider_changes();
        if known.changes == Some(changes) {
            return Ok(());
        }
        let records = self.keystore.providers()?;
        for damaged in &records.damaged {
            tracing::error!("it opens nothing until that is fixed: {damaged}");
        }
        let default = records.sound.iter().find(|record| record.is_default);
        let default = default.map(|record| record.id);
        let (mut before, mut now) = (known.providers.clone(), Vec::with_capacity(records.sound.len()));
        for record in records.sound {
            let at = before
                .iter()
                .position(|provider| provider.provider().id() == record.id);
            now.push(match at {
                Some(at) => before.swap_remove(at),
                None => {
                    let opened = Provider::from_record(&self.table, record)?;
                    self.watches.add(&opened.shared());
                    opened
                }
            });
        }
        if !records.damaged.is_empty() {
            // The row may be that of any of them, but for those that were deleted.
            let deleted = self.keystore.deleted_providers()?.sound;
            let is_deleted = |provider: &Provider| {
                let id = provider.provider().id();
                deleted.iter().any(|gone| gone.id == id)
            };
            now.extend(before.extract_if(.., |provider| !is_deleted(provider)));
        }
        for gone in &before {
            self.watches.remove(gone.provider().id());
        }
        *known = Known {
            changes: Some(changes),
            providers: now,
            default,
        };
        known.sort();
        Ok(())
    }

    fn read(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Known> {
        self.known.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn sort(&mut self) {
        self.providers
            .sort_by(|a, b| a.provider().name().cmp(b.provider().name()));
    }
}
