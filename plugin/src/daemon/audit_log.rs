//! The audit log between two runs of the daemon: the keystore has how long it was.

use std::path::Path;

use crate::audit::{AuditLog, Position};
use crate::model::deadlines::start::RECORD;
use crate::model::problem::{Problem, chain};
use crate::store::{AuditAnchor, HostStore};

/// Opens the log, which is as long as the keystore says or longer.
pub(super) fn open(host_store: &HostStore, dir: &Path) -> Result<AuditLog, Problem> {
    let (noted, damaged) = match host_store.audit_anchor() {
        Err(error) if error.is_of_row() => (None, Some(chain(&error))),
        noted => (noted?, None),
    };
    let noted = noted.map(|anchor| Position {
        seq: anchor.seq,
        hash: anchor.hash,
    });
    let host_store = host_store.clone();
    let note = move |at: Position| match host_store.set_audit_anchor(anchor(at)) {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!("can't record the length of the audit log: {}", chain(&error));
            false
        }
    };
    let log = AuditLog::open_anchored(&dir.join(AuditLog::FILE), noted, note)
        .map_err(|error| Problem::failed(chain(&error)))?;
    if let Some(damaged) = damaged {
        log.found_problem(format!("whether it was cut off is not known: {damaged}"));
    }
    Ok(log)
}

/// Writes what is left, and notes its end.
pub(super) fn end(log: &AuditLog, host_store: &HostStore) {
    let noted = log.flush(RECORD).map_err(|error| chain(&error));
    let noted = noted.and_then(|()| match log.position() {
        Some(at) => host_store
            .set_audit_anchor(anchor(at))
            .map_err(|error| chain(&error)),
        None => Ok(()),
    });
    if let Err(error) = noted {
        tracing::warn!("can't record the end of the audit log: {error}");
    }
}

fn anchor(at: Position) -> AuditAnchor {
    AuditAnchor {
        seq: at.seq,
        hash: at.hash,
    }
}
