//! What is of this host, and stays on it.

mod autostarts;
mod copies;
mod host;
mod kek_cache;
mod kek_names;
mod native;
mod notes;
mod pivots;
mod provider_table;

pub(crate) use host::HostStore;
pub(crate) use kek_cache::KekCacheRows;
pub(crate) use kek_names::KekNames;
pub(crate) use native::NativeRows;
pub(crate) use provider_table::ProviderTable;
