//! The store of this host, and its files.

use std::path::Path;
use std::sync::Arc;

use super::kek_cache::KekCacheRows;
use super::native::NativeRows;
use crate::model::envelope::ProviderId;
use crate::store::error::StoreError;
use crate::store::sqlite::database::Database;
use crate::store::sqlite::hook_index::HookIndex;

#[derive(Clone, Debug)]
pub(crate) struct HostStore(pub(super) Arc<Database>);

impl HostStore {
    /// The file that [`HostStore::snapshot`] has the content of, in the state directory.
    pub(crate) const FILE: &'static str = Database::FILE;
    /// The file that whoever has the stores open holds a lock on.
    pub(crate) const LOCK: &'static str = Database::LOCK;
    /// The file that the hook reads, in the state directory: made anew whenever the stores are opened, or change.
    pub(crate) const HOOK_INDEX: &'static str = HookIndex::FILE;
    /// What that is called while it is written.
    pub(crate) const NEW_HOOK_INDEX: &'static str = HookIndex::NEW;

    pub(crate) fn of(database: Arc<Database>) -> Self {
        Self(database)
    }

    /// The state directory, which holds more than the stores.
    pub(crate) fn dir(&self) -> &Path {
        self.0.dir()
    }

    /// Makes sure that the hook's index is what was last written, and as the stores are: without it nothing may be armed,
    /// because who may not have it could not be told.
    ///
    /// # Errors
    /// When it is not, and can't be written.
    pub(crate) fn ensure_hook_index(&self) -> Result<(), StoreError> {
        self.0.ensure_hook_index()
    }

    /// The content of [`HostStore::FILE`] as it is at one moment, for a backup.
    pub(crate) fn snapshot(&self) -> Result<Vec<u8>, StoreError> {
        self.0.snapshot()
    }

    /// Brings all changes into [`HostStore::FILE`], as the end of virtseald does: a copy of that file alone is whole then, unless
    /// another program reads it.
    pub(crate) fn settle(&self) -> Result<(), StoreError> {
        self.0.checkpoint().map(drop)
    }

    /// The root keys of a native provider.
    pub(crate) fn native(&self, provider: ProviderId) -> NativeRows {
        NativeRows {
            database: Arc::clone(&self.0),
            provider,
        }
    }

    /// The KEKs of a provider that outlive a reboot.
    pub(crate) fn kek_cache(&self, provider: ProviderId) -> KekCacheRows {
        KekCacheRows {
            database: Arc::clone(&self.0),
            provider,
        }
    }
}
