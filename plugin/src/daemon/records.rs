//! What the daemon writes into the audit log.
//!
//! A record is on disk before the caller hears of the outcome, unless the disk is full or hangs: then the log keeps
//! the record and tries again, and a start goes on. A host whose log can't be written still has to run its VMs.

use std::path::Path;
use std::time::Duration;

use super::Daemon;
use crate::api::pages::PAGE;
use crate::api::{AuditLines, AuditVerified};
use crate::audit::{self, Actor, AuditError, AuditLog, Event, Outcome, Position};
use crate::domain::Domain;
use crate::model::envelope::VmId;
use crate::model::problem::{Code, Problem, chain};
use crate::store::{AuditAnchor, HostStore};

/// The most time that a record may cost a start.
const PATIENCE: Duration = Duration::from_secs(1);

/// A start that was allowed or refused.
pub(super) fn note_start(daemon: &Daemon, by: Actor, domain: &Domain, decided: &Result<usize, Problem>) {
    let event = Event::new("prepare", outcome(decided)).vm(domain.uuid, &domain.name);
    append(
        daemon,
        by,
        match decided {
            Ok(objects) => event.detail(&format!("{objects} keys armed")),
            Err(failure) => event.detail(&failure.message),
        },
    );
}

/// A start that the hook has refused without asking: who it was is what its XML says.
pub(super) fn note_refused(daemon: &Daemon, by: Actor, vm: Option<&str>, name: &str, reason: &str) {
    tracing::warn!(domain = name, op = "prepare", "refused by the hook: {reason}");
    let event = Event::new("prepare", Outcome::Refused).detail(reason);
    append(
        daemon,
        by,
        match vm.and_then(|vm| vm.parse().ok()) {
            Some(vm) => event.vm(vm, name),
            None => event.object(name),
        },
    );
}

/// Something that was done to a VM while it ran, and that nobody was asked about.
pub(super) fn note_finding(daemon: &Daemon, vm: VmId, name: &str, words: &str) {
    append(
        daemon,
        Actor::Virtseald,
        Event::new("found", Outcome::Ok).vm(vm, name).detail(words),
    );
}

/// A change of a provider.
pub(super) fn note_provider<T>(
    daemon: &Daemon,
    by: Actor,
    op: &str,
    name: &str,
    result: &Result<T, Problem>,
) {
    append(
        daemon,
        by,
        with_reason(Event::new(op, outcome(result)).provider(name), result),
    );
}

/// A change of a VM.
pub(super) fn note_vm<T>(
    daemon: &Daemon,
    by: Actor,
    op: &str,
    vm: VmId,
    name: &str,
    result: &Result<T, Problem>,
) {
    append(
        daemon,
        by,
        with_reason(Event::new(op, outcome(result)).vm(vm, name), result),
    );
}

/// A change of an image, or a job.
pub(super) fn note_command<T>(
    daemon: &Daemon,
    by: Actor,
    op: &str,
    object: &str,
    result: &Result<T, Problem>,
) {
    append(
        daemon,
        by,
        with_reason(Event::new(op, outcome(result)).object(object), result),
    );
}

fn append(daemon: &Daemon, by: Actor, event: Event) {
    let event = event.by(by);
    if let Err(error) = daemon
        .audit
        .record(event)
        .and_then(|()| daemon.audit.flush(PATIENCE))
    {
        tracing::error!("the audit log is behind: {}", chain(&error));
    }
}

/// The last `records` of the audit log, or of its first `before` bytes, as many as fit into a reply.
pub(super) fn show(daemon: &Daemon, records: i64, before: Option<i64>) -> Result<AuditLines, Problem> {
    let count = usize::try_from(records).unwrap_or(0);
    // What is not written yet is shown the next time.
    let _ = daemon.audit.flush(PATIENCE);
    let before = before.map(|before| u64::try_from(before).unwrap_or(0));
    let shown = AuditLog::last(&path(daemon), before, count, PAGE).map_err(|error| unusable(&error))?;
    Ok(AuditLines {
        lines: shown.lines,
        before: shown.before.and_then(|before| i64::try_from(before).ok()),
    })
}

/// Checks the audit log's chain, up to what this daemon has written.
pub(super) fn verify(daemon: &Daemon) -> Result<AuditVerified, Problem> {
    daemon.audit.flush(PATIENCE).map_err(|error| unusable(&error))?;
    let written = daemon.audit.position();
    let verified = audit::verify(&path(daemon), written).map_err(|error| {
        unusable(&error)
            .next("keep a copy of the log, and compare it with one from a backup: virtseald goes on with it")
    })?;
    Ok(AuditVerified {
        records: i64::try_from(verified.records).unwrap_or(i64::MAX),
        head: verified.head,
    })
}

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
            tracing::warn!("the length of the audit log is not noted: {}", chain(&error));
            false
        }
    };
    let log = AuditLog::open_anchored(&dir.join(AuditLog::FILE), noted, note)
        .map_err(|error| Problem::new(Code::Failed, chain(&error)))?;
    if let Some(damaged) = damaged {
        log.found_problem(format!("whether it was cut off can't be told: {damaged}"));
    }
    Ok(log)
}

/// Writes what is left, and notes its end.
pub(super) fn end(daemon: &Daemon) {
    let noted = daemon.audit.flush(PATIENCE).map_err(|error| chain(&error));
    let noted = noted.and_then(|()| match daemon.audit.position() {
        Some(at) => daemon
            .host_store
            .set_audit_anchor(anchor(at))
            .map_err(|error| chain(&error)),
        None => Ok(()),
    });
    if let Err(error) = noted {
        tracing::warn!("the end of the audit log is not noted: {error}");
    }
}

fn path(daemon: &Daemon) -> std::path::PathBuf {
    daemon.config().state_dir.join(AuditLog::FILE)
}

fn anchor(at: Position) -> AuditAnchor {
    AuditAnchor {
        seq: at.seq,
        hash: at.hash,
    }
}

fn unusable(error: &AuditError) -> Problem {
    Problem::new(Code::Failed, chain(error))
}

fn outcome<T>(result: &Result<T, Problem>) -> Outcome {
    match result {
        Ok(_) => Outcome::Ok,
        Err(failure) if failure.code == Code::Failed || failure.code == Code::Unreachable => Outcome::Failed,
        Err(_) => Outcome::Refused,
    }
}

fn with_reason<T>(event: Event, result: &Result<T, Problem>) -> Event {
    match result {
        Ok(_) => event,
        Err(failure) => event.detail(&failure.message),
    }
}
