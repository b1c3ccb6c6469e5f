//! What the daemon writes into the audit log.
//!
//! A record is on disk before the caller hears of the outcome, unless the disk is full or hangs: then the log keeps
//! the record and tries again, and a start goes on. A host whose log can't be written still has to run its VMs.

use std::cell::Cell;
use std::time::Duration;

use super::Daemon;
use crate::api::{AuditLines, AuditVerified};
use crate::audit::{self, AuditError, AuditLog, Event, Outcome};
use crate::domain::Domain;
use crate::envelope::VmId;
use crate::failure::{Code, Failure, chain};

/// The most time that a record may cost a start.
const PATIENCE: Duration = Duration::from_secs(1);

thread_local! {
    static ACTOR: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Does `work`, which a process of this user asked for, and notes the user in what it records. A thread that `work`
/// starts, and whatever the daemon does on its own, has nobody to name.
pub fn on_behalf_of<T>(uid: u32, work: impl FnOnce() -> T) -> T {
    struct Restore(Option<u32>);
    impl Drop for Restore {
        fn drop(&mut self) {
            ACTOR.set(self.0);
        }
    }
    let _restore = Restore(ACTOR.replace(Some(uid)));
    work()
}

impl Daemon {
    /// A start that was allowed or refused.
    pub(super) fn audit_start(&self, domain: &Domain, decided: &Result<usize, Failure>) {
        let event = Event::new("prepare", outcome(decided)).vm(domain.uuid, &domain.name);
        self.append(match decided {
            Ok(objects) => event.detail(&format!("{objects} keys armed")),
            Err(failure) => event.detail(&failure.message),
        });
    }

    /// A change of a provider.
    pub(super) fn audit_provider<T>(&self, op: &str, name: &str, result: &Result<T, Failure>) {
        self.append(with_reason(
            Event::new(op, outcome(result)).provider(name),
            result,
        ));
    }

    /// A change of a VM.
    pub(super) fn audit_vm<T>(&self, op: &str, vm: VmId, name: &str, result: &Result<T, Failure>) {
        self.append(with_reason(Event::new(op, outcome(result)).vm(vm, name), result));
    }

    /// A change of an image, or a job.
    pub(super) fn audit_command<T>(&self, op: &str, object: &str, result: &Result<T, Failure>) {
        self.append(with_reason(
            Event::new(op, outcome(result)).object(object),
            result,
        ));
    }

    fn append(&self, event: Event) {
        let event = ACTOR.get().into_iter().fold(event, Event::actor);
        if let Err(error) = self.audit.record(event).and_then(|()| self.audit.flush(PATIENCE)) {
            tracing::error!("the audit log is behind: {}", chain(&error));
        }
    }

    /// The last `records` of the audit log.
    pub fn show_audit(&self, records: i64) -> Result<AuditLines, Failure> {
        let path = self.audit_path();
        self.audit.flush(PATIENCE).map_err(|error| unusable(&error))?;
        let text = std::fs::read_to_string(&path).map_err(|error| {
            Failure::from_error(Code::Failed, format!("can't read {}", path.display()), &error)
        })?;
        let lines: Vec<_> = text.lines().collect();
        let first = lines.len().saturating_sub(usize::try_from(records).unwrap_or(0));
        Ok(AuditLines {
            lines: lines[first..].iter().map(|line| (*line).to_owned()).collect(),
        })
    }

    /// Checks the audit log's chain.
    pub fn verify_audit(&self) -> Result<AuditVerified, Failure> {
        self.audit.flush(PATIENCE).map_err(|error| unusable(&error))?;
        let verified = audit::verify(&self.audit_path()).map_err(|error| unusable(&error))?;
        Ok(AuditVerified {
            records: i64::try_from(verified.records).unwrap_or(i64::MAX),
            head: verified.head,
        })
    }

    fn audit_path(&self) -> std::path::PathBuf {
        self.config().state_dir.join(AuditLog::FILE)
    }
}

fn unusable(error: &AuditError) -> Failure {
    Failure::new(Code::Failed, chain(error))
}

fn outcome<T>(result: &Result<T, Failure>) -> Outcome {
    match result {
        Ok(_) => Outcome::Ok,
        Err(failure) if failure.code == Code::Failed || failure.code == Code::Unreachable => Outcome::Failed,
        Err(_) => Outcome::Refused,
    }
}

fn with_reason<T>(event: Event, result: &Result<T, Failure>) -> Event {
    match result {
        Ok(_) => event,
        Err(failure) => event.detail(&failure.message),
    }
}
