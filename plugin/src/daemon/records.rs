//! What the daemon writes into the audit log.
//!
//! A record is on disk before the caller hears of the outcome, unless the disk is full or hangs: then the log keeps
//! the record and tries again, and a start goes on. A host whose log can't be written still has to run its VMs.

use super::Daemon;
use crate::api::pages::PAGE;
use crate::api::{AuditLines, AuditVerified};
use crate::audit::{self, Actor, AuditError, AuditLog, Event, Outcome};
use crate::domain::Domain;
use crate::model::deadlines::start::RECORD;
use crate::model::envelope::VmId;
use crate::model::problem::{Code, Problem, chain};

/// A start that was allowed or refused.
pub(super) fn note_start(daemon: &Daemon, by: Actor, domain: &Domain, decided: &Result<usize, Problem>) {
    note(daemon, by, "prepare", decided, |event| {
        let event = event.vm(domain.uuid, &domain.name);
        match decided {
            Ok(objects) => event.detail(&format!("{objects} keys armed")),
            Err(_) => event,
        }
    });
}

/// A start that the hook has refused without asking: who it was is what its XML says.
pub(super) fn note_refused(daemon: &Daemon, by: Actor, vm: Option<&str>, name: &str, reason: &str) {
    tracing::warn!(domain = name, op = "prepare", "refused by the hook: {reason}");
    let event = Event::new("prepare", Outcome::Refused).detail(reason);
    let event = match vm.and_then(|vm| vm.parse().ok()) {
        Some(vm) => event.vm(vm, name),
        None => event.object(name),
    };
    append(daemon, event.by(by));
}

/// Something that was done to a VM while it ran, and that nobody was asked about.
pub(super) fn note_finding(daemon: &Daemon, vm: VmId, name: &str, words: &str) {
    let event = Event::new("found", Outcome::Ok).vm(vm, name).detail(words);
    append(daemon, event.by(Actor::Virtseald));
}

/// A change of a provider.
pub(super) fn note_provider<T>(
    daemon: &Daemon,
    by: Actor,
    op: &str,
    name: &str,
    result: &Result<T, Problem>,
) {
    note(daemon, by, op, result, |event| event.provider(name));
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
    note(daemon, by, op, result, |event| event.vm(vm, name));
}

/// A change of an image, or a job.
pub(super) fn note_command<T>(
    daemon: &Daemon,
    by: Actor,
    op: &str,
    object: &str,
    result: &Result<T, Problem>,
) {
    note(daemon, by, op, result, |event| event.object(object));
}

fn note<T>(
    daemon: &Daemon,
    by: Actor,
    op: &str,
    result: &Result<T, Problem>,
    of: impl FnOnce(Event) -> Event,
) {
    let event = of(Event::new(op, outcome(result))).by(by);
    append(
        daemon,
        match result {
            Ok(_) => event,
            Err(failure) => event.detail(&failure.message),
        },
    );
}

fn append(daemon: &Daemon, event: Event) {
    if let Err(error) = daemon
        .audit
        .record(event)
        .and_then(|()| daemon.audit.flush(RECORD))
    {
        tracing::error!("a record is missing from the audit log: {}", chain(&error));
    }
}

/// The last `records` of the audit log, or of its first `before` bytes, as many as fit into a reply.
pub(super) fn show(daemon: &Daemon, records: i64, before: Option<i64>) -> Result<AuditLines, Problem> {
    let count = usize::try_from(records).unwrap_or(0);
    // What is not written yet is shown the next time.
    let _ = daemon.audit.flush(RECORD);
    let before = before.map(|before| u64::try_from(before).unwrap_or(0));
    let shown = AuditLog::last(&path(daemon), before, count, PAGE).map_err(|error| unusable(&error))?;
    Ok(AuditLines {
        lines: shown.lines,
        before: shown.before.and_then(|before| i64::try_from(before).ok()),
    })
}

/// Checks the audit log's chain, up to what this daemon has written.
pub(super) fn verify(daemon: &Daemon) -> Result<AuditVerified, Problem> {
    daemon.audit.flush(RECORD).map_err(|error| unusable(&error))?;
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

fn path(daemon: &Daemon) -> std::path::PathBuf {
    daemon.config().state_dir.join(AuditLog::FILE)
}

fn unusable(error: &AuditError) -> Problem {
    Problem::failed(chain(error))
}

fn outcome<T>(result: &Result<T, Problem>) -> Outcome {
    match result {
        Ok(_) => Outcome::Ok,
        Err(failure) if failure.code == Code::Failed || failure.code == Code::Unreachable => Outcome::Failed,
        Err(_) => Outcome::Refused,
    }
}
