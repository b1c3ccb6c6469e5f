//! The store of this host, and its files.

use std::path::Path;
use std::sync::Arc;

use super::kek_cache::KekCacheRows;
use super::native::NativeRows;
use crate::model::envelope::ProviderId;
use crate::store::error::StoreError;
use crate::store::sqlite::database::Database;
use crate::store::sqlite::hook_index::HookIndex;

/// What is of this host.
#[derive(Clone, Debug)]
pub struct HostStore(pub(super) Arc<Database>);

impl HostStore {
    /// The file that [`HostStore::snapshot`] has the content of, in the state directory.
    pub const FILE: &'static str = Database::FILE;
    /// The file that whoever has the stores open holds a lock on.
    pub const LOCK: &'static str = Database::LOCK;
    /// The file that the hook reads.
    pub const HOOK_INDEX: &'static str = HookIndex::FILE;

    pub(crate) fn of(database: Arc<Database>) -> Self {
        Self(database)
    }

    /// The state directory, which holds more than the stores.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.0.dir()
    }

    /// Makes sure that the hook's index is what was last written, and as the stores are: without it nothing may be armed,
    /// because who may not have it could not be told.
    ///
    /// # Errors
    /// When it is not, and can't be written.
    pub fn ensure_hook_index(&self) -> Result<(), StoreError> {
        self.0.ensure_hook_index()
    }

    /// The content of [`HostStore::FILE`] as it is at one moment, for a backup.
    pub fn snapshot(&self) -> Result<Vec<u8>, StoreError> {
        self.0.snapshot()
    }

    /// Brings all changes into [`HostStore::FILE`], as the end of virtseald does: a copy of that file alone is whole then, unless
    /// another program reads it.
    pub fn settle(&self) -> Result<(), StoreError> {
        self.0.checkpoint().map(drop)
    }

    /// The root keys of a native provider.
    #[must_use]
    pub fn native(&self, provider: ProviderId) -> NativeRows {
        NativeRows {
            database: Arc::clone(&self.0),
            provider,
        }
    }

    /// The KEKs of a provider that outlive a reboot.
    #[must_use]
    pub fn kek_cache(&self, provider: ProviderId) -> KekCacheRows {
        KekCacheRows {
            database: Arc::clone(&self.0),
            provider,
        }
    }
}
