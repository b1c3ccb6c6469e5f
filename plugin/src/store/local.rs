//! What is of this host, and stays on it.

mod copies;
mod host;
mod kek_cache;
mod kek_names;
mod native;
mod notes;
mod provider_table;

pub use host::HostStore;
pub use kek_cache::KekCacheRows;
pub use kek_names::KekNames;
pub use native::NativeRows;
pub use provider_table::ProviderTable;
