//! What the daemon writes into the audit log.

use super::Daemon;
use crate::domain::Domain;
use crate::failure::Failure;

impl Daemon {
    /// A start that was allowed or refused. On disk before the hook hears of it.
    pub(super) fn audit_start(&self, domain: &Domain, decided: &Result<usize, Failure>) {
        let _ = (domain, decided);
    }

    pub(super) fn audit_provider<T>(&self, op: &'static str, name: &str, outcome: &Result<T, Failure>) {
        let _ = (op, name, outcome);
    }

    pub(super) fn audit_command<T>(&self, op: &'static str, object: &str, outcome: &Result<T, Failure>) {
        let _ = (op, object, outcome);
    }
}
