//! Rows of jobs, which survive the daemon.
//!
//! The envelopes of a sweep's batch, where the job is, and what it left behind change in one transaction. So each envelope is
//! visited once, whenever the daemon dies.

use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};

use super::database::{Database, now, parse_id};
use super::fault::StoreFault;
use super::left_behind::CAME_MEANWHILE;
use super::rows::{self, Named};
use super::{copies, envelopes, keks, providers};
use crate::model::envelope::{Envelope, EnvelopeId, Verified};
use crate::model::job::{JobId, JobState, Subject, Unit};
use crate::store::damage::{DamagedRow, Rows};
use crate::store::error::StoreError;
use crate::store::host_records::CopyPlace;
use crate::store::job_records::{JobRecord, LeftBehind, NewJob, Pass, Verdict};
use crate::store::records::{EnvelopeRecord, RetiredKek};
use crate::store::shared::Jobs;

impl Jobs for Database {
    fn insert_job(&self, new: &NewJob<'_>) -> Result<JobRecord, StoreError> {
        self.write(|transaction| {
            refuse_excluded(transaction, new.subject)?;
            transaction.execute(
                "INSERT INTO jobs (task, state, pass, cursor, total, seen, changed, waiting, created, updated, vm, path)
                 VALUES (?1, 'running', 'all', '', ?2, 0, 0, '', ?3, ?3, ?4, ?5)",
                params![
                    new.task,
                    units(transaction, new.subject, new.total)?,
                    now(),
                    vm_column(new.subject),
                    new.subject.path().unwrap_or_default()
                ],
            )?;
            let id = JobId(transaction.last_insert_rowid());
            for left in new.left {
                note(transaction, id, left.envelope, Some(left.clone()))?;
            }
            find(transaction, id)
        })
    }

    fn resume_job(&self, job: JobId, left: &[LeftBehind]) -> Result<JobRecord, StoreError> {
        self.write(|transaction| {
            let ended = find(transaction, job)?;
            refuse_excluded(transaction, &ended.subject)?;
            transaction.execute("DELETE FROM left_behind WHERE job = ?1", [job.0])?;
            transaction.execute(
                "UPDATE jobs SET state = 'running', pass = 'all', cursor = '', total = ?2, seen = 0, changed = 0, waiting = '', failure = '',
                 updated = ?3 WHERE id = ?1",
                params![job.0, units(transaction, &ended.subject, ended.total)?, now()],
            )?;
            for left in left {
                note(transaction, job, left.envelope, Some(left.clone()))?;
            }
            find(transaction, job)
        })
    }

    fn running_jobs(&self) -> Result<Vec<JobRecord>, StoreError> {
        self.read(|connection| Ok(select(connection, "state = 'running'", [])?.whole()?))
    }

    fn job(&self, id: JobId) -> Result<Option<JobRecord>, StoreError> {
        self.read(|connection| Ok(select(connection, "id = ?1", [id.0])?.whole()?.pop()))
    }

    fn jobs(&self, most: u32) -> Result<Rows<JobRecord>, StoreError> {
        self.read(|connection| {
            let recent = "id IN (SELECT id FROM jobs ORDER BY id DESC LIMIT ?1)";
            select(connection, recent, [most])
        })
    }

    fn left_behind(&self, job: JobId, most: u32) -> Result<Vec<LeftBehind>, StoreError> {
        self.read(|connection| {
            let sql =
                "SELECT envelope, reason, again FROM left_behind WHERE job = ?1 ORDER BY envelope LIMIT ?2";
            let named = Named("envelope", "envelope");
            // One without an id is an envelope whose record is damaged: the list of these has it.
            Ok(rows::collect(connection, sql, params![job.0, most], named, left_of)?.sound)
        })
    }

    fn next_of_job(&self, job: &JobRecord, most: u32) -> Result<Rows<EnvelopeRecord>, StoreError> {
        let chosen = match job.pass {
            Pass::All => "id NOT IN (SELECT envelope FROM left_behind WHERE job = ?3 AND again = 0)",
            Pass::Left => "id IN (SELECT envelope FROM left_behind WHERE job = ?3 AND again = 1)",
        };
        let sql = format!(
            "WHERE rowid > CAST(?1 AS INTEGER) AND (?4 = '' OR vm = ?4) AND {chosen} ORDER BY rowid LIMIT ?2"
        );
        let scope = vm_column(&job.subject);
        self.read(|connection| {
            envelopes::select(connection, &sql, params![job.cursor, most, job.id.0, scope])
        })
    }

    fn commit_batch(&self, job: JobId, verdicts: &[Verdict]) -> Result<JobRecord, StoreError> {
        self.write(|transaction| {
            let before = find(transaction, job)?;
            if before.state != JobState::Running {
                return Ok(before);
            }
            let (mut changed, mut cursor) = (0, before.cursor.parse().unwrap_or(0));
            for verdict in verdicts {
                let (id, outcome) = match verdict {
                    Verdict::Unchanged(id) => (*id, None),
                    Verdict::Left(left) => (left.envelope, Some(left.clone())),
                    Verdict::Replace(old, new) => (old.id, replace(transaction, old, new)?),
                    Verdict::Damaged(row) => {
                        note_damaged(transaction, job, row)?;
                        cursor = cursor.max(row.place);
                        continue;
                    }
                };
                if matches!(verdict, Verdict::Replace(..)) && outcome.is_none() {
                    changed += 1;
                }
                note(transaction, job, id, outcome)?;
                cursor = cursor.max(row_of(transaction, id)?);
            }
            let seen = match before.pass {
                Pass::All => verdicts.len(),
                Pass::Left => 0,
            };
            transaction.execute(
                "UPDATE jobs SET cursor = ?2, seen = seen + ?3, total = max(total, seen + ?3), changed = changed + ?4, waiting = '', updated = ?5
                 WHERE id = ?1",
                params![job.0, cursor.to_string(), seen as i64, changed, now()],
            )?;
            find(transaction, job)
        })
    }

    fn end_pass(&self, job: JobId) -> Result<JobRecord, StoreError> {
        self.write(|transaction| {
            let count = |condition: &str| -> Result<i64, rusqlite::Error> {
                let sql = format!("SELECT count(*) FROM left_behind WHERE job = ?1{condition}");
                transaction.query_row(&sql, [job.0], |row| row.get(0))
            };
            // Came after the last look: nobody else would see it.
            transaction.execute(
                "INSERT OR IGNORE INTO left_behind (job, envelope, reason, again)
                 SELECT jobs.id, envelopes.id, ?2, 1 FROM jobs JOIN envelopes
                 ON envelopes.rowid > CAST(jobs.cursor AS INTEGER) AND (jobs.vm = '' OR jobs.vm = envelopes.vm)
                 WHERE jobs.id = ?1 AND jobs.state = 'running' AND jobs.pass = 'all'",
                params![job.0, CAME_MEANWHILE],
            )?;
            // An envelope that is gone has nothing left to be done.
            transaction.execute(
                "DELETE FROM left_behind WHERE job = ?1 AND envelope NOT IN (SELECT id FROM envelopes)",
                [job.0],
            )?;
            let state = match (count(" AND again = 1")?, count("")?) {
                (0, 0) => JobState::Done,
                (0, _) => JobState::Incomplete,
                _ => JobState::Running,
            };
            transaction.execute(
                "UPDATE jobs SET state = ?2, pass = 'left', cursor = '', waiting = '', updated = ?3
                 WHERE id = ?1 AND state = 'running'",
                params![job.0, state.as_str(), now()],
            )?;
            find(transaction, job)
        })
    }

    fn job_waits(&self, job: JobId, waiting: &str) -> Result<(), StoreError> {
        self.write(|transaction| {
            transaction.execute(
                "UPDATE jobs SET waiting = ?2, updated = ?3 WHERE id = ?1 AND state = 'running' AND waiting <> ?2",
                params![job.0, waiting, now()],
            )?;
            Ok(())
        })
    }

    fn end_waiting(&self, job: JobId) -> Result<JobRecord, StoreError> {
        self.write(|transaction| {
            let before = find(transaction, job)?;
            if before.state != JobState::Running || before.waiting.is_empty() {
                return Ok(before);
            }
            transaction.execute(
                "INSERT OR IGNORE INTO left_behind (job, envelope, reason, again)
                 SELECT jobs.id, envelopes.id, jobs.waiting, 1 FROM jobs JOIN envelopes
                 ON envelopes.rowid > CAST(jobs.cursor AS INTEGER) AND (jobs.vm = '' OR jobs.vm = envelopes.vm)
                 WHERE jobs.id = ?1 AND jobs.pass = 'all'",
                [job.0],
            )?;
            transaction.execute(
                "UPDATE jobs SET state = 'incomplete', waiting = '', updated = ?2 WHERE id = ?1",
                params![job.0, now()],
            )?;
            find(transaction, job)
        })
    }

    fn end_job(&self, job: JobId, failure: Option<&str>) -> Result<JobRecord, StoreError> {
        self.write(|transaction| {
            let sql = match failure {
                None => {
                    "UPDATE jobs SET state = 'done', seen = total, waiting = '', updated = ?2
                     WHERE id = ?1 AND state IN ('running', 'aborted') AND ?3 = ''"
                }
                Some(_) => {
                    "UPDATE jobs SET state = 'incomplete', failure = ?3, waiting = '', updated = ?2
                     WHERE id = ?1 AND state = 'running'"
                }
            };
            transaction.execute(sql, params![job.0, now(), failure.unwrap_or_default()])?;
            find(transaction, job)
        })
    }

    fn abort_job(&self, job: JobId) -> Result<JobRecord, StoreError> {
        self.write(|transaction| {
            transaction.execute(
                "UPDATE jobs SET state = 'aborted', waiting = '', updated = ?2 WHERE id = ?1 AND state = 'running'",
                params![job.0, now()],
            )?;
            find(transaction, job)
        })
    }
}

/// Whether none runs that excludes a job about `subject`.
fn refuse_excluded(connection: &Connection, subject: &Subject) -> Result<(), StoreFault> {
    let running = select(connection, "state = 'running'", [])?.whole()?;
    match running.iter().find(|running| running.subject.excludes(subject)) {
        Some(running) => Err(StoreError::JobRunning(running.id.0).into()),
        None => Ok(()),
    }
}

/// How many there are to be done: of a sweep as many as there are envelopes.
fn units(connection: &Connection, subject: &Subject, given: u64) -> Result<i64, StoreFault> {
    if subject.unit() != Unit::Envelopes {
        return Ok(i64::try_from(given).unwrap_or(i64::MAX));
    }
    let sql = "SELECT count(*) FROM envelopes WHERE ?1 = '' OR vm = ?1";
    Ok(connection.query_row(sql, [vm_column(subject)], |row| row.get(0))?)
}

/// Empty for all VMs.
fn vm_column(subject: &Subject) -> String {
    subject.vm().map(|vm| vm.to_string()).unwrap_or_default()
}

/// Where an envelope is in the order in which they came; 0 for one that is gone.
fn row_of(transaction: &Transaction, id: EnvelopeId) -> Result<i64, StoreFault> {
    let row = transaction
        .prepare_cached("SELECT rowid FROM envelopes WHERE id = ?1")?
        .query_row([id.to_string()], |row| row.get(0))
        .optional()?;
    Ok(row.unwrap_or(0))
}

/// Puts `new` in the place of `old`, if that is still there.
fn replace(
    transaction: &Transaction,
    old: &Envelope,
    new: &Verified,
) -> Result<Option<LeftBehind>, StoreFault> {
    let again = |reason: String| {
        Ok(Some(LeftBehind {
            envelope: old.id,
            reason,
            again: true,
        }))
    };
    let made = new.stanzas.iter().filter(|stanza| !old.stanzas.contains(stanza));
    match providers::refuse_deleted(transaction, made) {
        Err(StoreFault::Refused(deleted @ StoreError::ProviderDeleted(_))) => {
            return again(deleted.to_string());
        }
        checked => checked?,
    }
    let rows = transaction
        .prepare_cached(
            "UPDATE envelopes SET generation = ?2, json = ?3, updated = ?4 WHERE id = ?1 AND json = ?5",
        )?
        .execute(params![
            old.id.to_string(),
            envelopes::storable_generation(new)?,
            new.to_json(),
            now(),
            old.to_json()
        ])?;
    if rows == 0 {
        return again("it changed meanwhile".to_owned());
    }
    for place in [CopyPlace::Xml, CopyPlace::Image] {
        copies::note_stale(transaction, old, place)?;
    }
    keks::retire(transaction, &RetiredKek::between(old, new))?;
    Ok(None)
}

fn note(
    transaction: &Transaction,
    job: JobId,
    envelope: EnvelopeId,
    left: Option<LeftBehind>,
) -> Result<(), StoreFault> {
    match left {
        None => transaction
            .prepare_cached("DELETE FROM left_behind WHERE job = ?1 AND envelope = ?2")?
            .execute(params![job.0, envelope.to_string()])?,
        Some(left) => transaction
            .prepare_cached(
                "INSERT OR REPLACE INTO left_behind (job, envelope, reason, again) VALUES (?1, ?2, ?3, ?4)",
            )?
            .execute(params![job.0, envelope.to_string(), left.reason, left.again])?,
    };
    Ok(())
}

/// By what its row has for an id, whatever that is.
fn note_damaged(transaction: &Transaction, job: JobId, row: &DamagedRow) -> Result<(), StoreFault> {
    transaction
        .prepare_cached(
            "INSERT OR REPLACE INTO left_behind (job, envelope, reason, again)
             SELECT ?1, id, ?2, 0 FROM envelopes WHERE rowid = ?3 AND id IS NOT NULL",
        )?
        .execute(params![
            job.0,
            format!("its record is damaged: {}", row.why),
            row.place
        ])?;
    Ok(())
}

fn find(connection: &Connection, id: JobId) -> Result<JobRecord, StoreFault> {
    let found = select(connection, "id = ?1", [id.0])?.whole()?.pop();
    found.ok_or_else(|| StoreError::UnknownJob(id.0).into())
}

fn select(
    connection: &Connection,
    condition: &str,
    values: impl rusqlite::Params,
) -> Result<Rows<JobRecord>, StoreFault> {
    let sql = format!(
        "SELECT id, task, state, pass, cursor, total, seen, changed, waiting, created, updated, vm, path, failure,
            (SELECT count(*) FROM left_behind WHERE job = jobs.id) AS left
         FROM jobs WHERE {condition} ORDER BY id"
    );
    rows::collect(connection, &sql, values, Named("job", "id"), job_of)
}

fn job_of(row: &Row) -> Result<JobRecord, StoreFault> {
    // A job whose row is damaged can be seen, and aborted, as long as it tells its number and its state.
    let id: i64 = row.get("id")?;
    let count = |column: &str| row.get::<_, i64>(column).map_or(0, i64::unsigned_abs);
    let text = |column: &str| rows::text(row, column).unwrap_or_default();
    let time = |column: &str| row.get(column).unwrap_or(0);
    let failure = text("failure");
    // It has the column's word of before: a job is incomplete for a reason of its own.
    let state = match (text("state").as_str(), failure.is_empty()) {
        ("running", _) => JobState::Running,
        ("done", _) => JobState::Done,
        ("incomplete", true) => JobState::Incomplete,
        ("incomplete", false) => JobState::Failed,
        ("aborted", _) => JobState::Aborted,
        (state, _) => {
            return Err(StoreError::Inconsistent {
                row: format!("of job {id}"),
                why: format!("its state is {state:?}"),
            }
            .into());
        }
    };
    let subject = match (text("vm").parse(), text("path")) {
        (Ok(vm), path) if path.is_empty() => Subject::EnvelopesOf(vm),
        (Ok(vm), path) => Subject::Image { vm, path },
        // Which excludes most.
        (Err(_), _) => Subject::AllEnvelopes,
    };
    Ok(JobRecord {
        id: JobId(id),
        subject,
        task: text("task"),
        state,
        pass: match text("pass").as_str() {
            "left" => Pass::Left,
            _ => Pass::All,
        },
        cursor: text("cursor"),
        total: count("total"),
        seen: count("seen"),
        changed: count("changed"),
        left: count("left"),
        waiting: text("waiting"),
        failure,
        created: time("created"),
        updated: time("updated"),
    })
}

fn left_of(row: &Row) -> Result<LeftBehind, StoreFault> {
    let text = |column: &str| rows::text(row, column).unwrap_or_default();
    Ok(LeftBehind {
        envelope: parse_id("envelope", &text("envelope"))?,
        reason: text("reason"),
        again: row.get("again").unwrap_or(false),
    })
}
