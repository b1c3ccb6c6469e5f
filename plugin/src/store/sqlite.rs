//! Both stores in one SQLite file. Nothing outside of `store/` sees a type of SQLite's.

pub(super) mod changes;
pub(super) mod checkpoints;
pub(super) mod copies;
pub(super) mod database;
pub(super) mod envelopes;
pub(super) mod fault;
pub(super) mod hook_index;
pub(super) mod jobs;
pub(super) mod keks;
pub(super) mod left_behind;
pub(super) mod providers;
pub(super) mod rows;
pub(super) mod schema;
pub(super) mod vms;

#[cfg(test)]
mod tests;
