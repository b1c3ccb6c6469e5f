//! What the methods of the Varlink services do, a file for each group of them.

pub(super) mod cache;
pub(super) mod provider;
pub(super) mod state;
pub(super) mod tpm;
pub(super) mod trust;
