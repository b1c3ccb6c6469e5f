//! What is kept: what a fleet would share behind [`EnvelopeStore`], what is of this host in [`HostStore`].
//!
//! ```text
//!   EnvelopeStore (shared.rs)   envelopes, VMs, providers, KEKs made and retired, jobs     sqlite/, memory.rs (tests)
//!   HostStore (local.rs)        root keys, what the TPM opens, cached KEKs, names of KEKs, stale copies, saved states,
//!                               header journal, length of the audit log, the hook's index  SQLite only
//! ```
//!
//! Today both are one SQLite file, so what spans them is one transaction (ADR 25). Providers and caches get handles on their own
//! rows, [`NativeRows`], [`KekCacheRows`] and [`KekNames`], and never a store.

#[cfg(test)]
mod contract;
#[cfg(test)]
mod crash;
mod damage;
mod error;
mod host_records;
mod job_records;
mod local;
#[cfg(test)]
mod memory;
mod records;
mod shared;
mod sqlite;

use std::path::Path;
use std::sync::Arc;

use sqlite::database::Database;

pub(crate) use damage::{DamagedRow, Held, Rows};
pub(crate) use error::StoreError;
pub(crate) use host_records::{
    AuditAnchor, Autostart, BoundRoots, CachedKek, CopyNews, CopyPlace, KekEnrollment, KekNameRecord,
    NativeRoot, NeededKek, Pivot, PivotBy, SavedState, StaleCopy, TpmRenewal,
};
#[cfg(test)]
pub(crate) use job_records::Pass;
pub(crate) use job_records::{JobRecord, LeftBehind, NewJob, Verdict};
pub(crate) use local::{HostStore, KekCacheRows, KekNames, NativeRows, ProviderTable};
pub(crate) use records::{
    Change, DeletedProvider, EnvelopeRecord, EnvelopeState, IfNeeded, MadeKek, Mark, ProviderRecord, Put,
    RetiredKek, Traces, UnixTime, VmRecord,
};
pub(crate) use shared::EnvelopeStore;
pub(crate) use sqlite::database::now;

/// Both stores of a state directory.
#[derive(Clone, Debug)]
pub(crate) struct Stores {
    /// What a fleet would share.
    pub keystore: Arc<dyn EnvelopeStore>,
    pub host_store: HostStore,
}

impl Stores {
    /// The stores in `dir`, making it (0700) and its files (0600) where they are missing. One process at a time has them open.
    ///
    /// # Errors
    /// [`StoreError::InUse`] when another process has them open, [`StoreError::Damaged`] and
    /// [`StoreError::TooNew`] when they can't be used; in all cases they stay as they were.
    pub(crate) fn open(dir: &Path) -> Result<Self, StoreError> {
        let database = Arc::new(Database::open(dir)?);
        Ok(Self {
            host_store: HostStore::of(Arc::clone(&database)),
            keystore: database,
        })
    }

    /// The rows of key providers.
    pub(crate) fn providers(&self) -> ProviderTable {
        ProviderTable::new(Arc::clone(&self.keystore), self.host_store.clone())
    }
}
