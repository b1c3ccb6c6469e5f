//! What SQLite tells of changed rows, so that nobody who changes one has to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rusqlite::Connection;
use rusqlite::hooks::Action;

/// Which tables have changed.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// Whether the hook's index may not be as the rows are.
    pub(crate) index_is_due: AtomicBool,
    providers_are_due: AtomicBool,
    providers: AtomicU64,
}

impl Changes {
    /// Of `connection`, from now on.
    pub(crate) fn of(connection: &Connection) -> Arc<Self> {
        let changes = Arc::new(Self::default());
        let told = Arc::clone(&changes);
        connection.update_hook(Some(move |action: Action, _: &str, table: &str, _: i64| {
            match table {
                // An envelope never changes its id or VM.
                "envelopes" if action == Action::SQLITE_UPDATE => {}
                "envelopes" | "vms" | "plain_vms" => told.index_is_due.store(true, Ordering::SeqCst),
                "providers" => told.providers_are_due.store(true, Ordering::SeqCst),
                _ => {}
            }
        }));
        changes
    }

    /// What was changed can be seen now.
    pub(crate) fn after_commit(&self) {
        if self.providers_are_due.swap(false, Ordering::SeqCst) {
            self.providers.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// How often the providers have changed.
    pub(crate) fn of_providers(&self) -> u64 {
        self.providers.load(Ordering::SeqCst)
    }
}
