//! Rows of jobs, which survive the daemon.
//!
//! The envelopes of a sweep's batch, where the job is, and what it left behind change in one transaction. So each envelope is
//! visited once, whenever the daemon dies.

use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};

use super::copies::{self, CopyPlace};
use super::envelopes::{self, EnvelopeRecord};
use super::rows::{self, DamagedRow, Named, Rows};
use super::{Keystore, KeystoreError, UnixTime, error::StoreFault, now, parse_id};
use crate::model::envelope::{Envelope, EnvelopeId, Stanza, Verified};
use crate::model::job::{JobId, JobState, Subject, Unit};

/// Which envelopes a job goes through now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// All of them, in the order in which they came here: one that is made meanwhile comes last.
    All,
    /// Those that it left behind and that may open by now.
    Left,
}

/// A job to be kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewJob<'a> {
    /// What it is about.
    pub subject: &'a Subject,
    /// What it does, as JSON: all that it needs to be done again after a restart, and no key.
    pub task: &'a str,
    /// How many units there are to be done; of a sweep, the envelopes are counted here.
    pub total: u64,
    /// Envelopes that it leaves behind from the beginning.
    pub left: &'a [LeftBehind],
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobRecord {
    /// Its number.
    pub id: JobId,
    /// What it is about.
    pub subject: Subject,
    /// What it does, as JSON.
    pub task: String,
    /// How far it is.
    pub state: JobState,
    /// Which envelopes it goes through.
    pub pass: Pass,
    /// The row of the last envelope of the pass that it has seen; none yet, if empty.
    pub cursor: String,
    /// How many units there were when it began.
    pub total: u64,
    /// How many of them are done.
    pub seen: u64,
    /// How many of them it has changed.
    pub changed: u64,
    /// How many of them it could not change.
    pub left: u64,
    /// What it waits for; empty while it works.
    pub waiting: String,
    /// Why it was given up, as JSON; empty if it was not.
    pub failure: String,
    /// When it was started.
    pub created: UnixTime,
    /// When it last changed.
    pub updated: UnixTime,
}

/// An envelope that a job could not change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftBehind {
    /// The envelope.
    pub envelope: EnvelopeId,
    /// Why.
    pub reason: String,
    /// Whether it may work later, as with a locked provider.
    pub again: bool,
}

/// What a batch has come to, envelope by envelope.
#[derive(Debug)]
pub enum Verdict {
    /// It is as the job wants it.
    Unchanged(EnvelopeId),
    /// The second, of the next generation, takes the place of the first.
    Replace(Box<Envelope>, Box<Verified>),
    /// It stays as it was.
    Left(LeftBehind),
    /// Its row can't be read.
    Damaged(DamagedRow),
}

/// Why a job has an envelope still before it that it never had in hand.
const CAME_MEANWHILE: &str = "it came here meanwhile";

impl Keystore {
    /// Starts a job.
    ///
    /// # Errors
    /// [`KeystoreError::JobRunning`]: one that excludes it runs.
    pub fn insert_job(&self, new: &NewJob<'_>) -> Result<JobRecord, KeystoreError> {
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

    /// Starts a job that has ended once more, from its beginning.
    ///
    /// # Errors
    /// As [`Keystore::insert_job`]; [`KeystoreError::UnknownJob`].
    pub fn resume_job(&self, job: JobId, left: &[LeftBehind]) -> Result<JobRecord, KeystoreError> {
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

    /// The jobs that run, the oldest first.
    pub fn running_jobs(&self) -> Result<Vec<JobRecord>, KeystoreError> {
        self.read(|connection| Ok(select(connection, "state = 'running'", [])?.whole()?))
    }

    /// The job with this number.
    pub fn job(&self, id: JobId) -> Result<Option<JobRecord>, KeystoreError> {
        self.read(|connection| Ok(select(connection, "id = ?1", [id.0])?.whole()?.pop()))
    }

    /// The last `most` jobs, oldest first.
    pub fn jobs(&self, most: u32) -> Result<Rows<JobRecord>, KeystoreError> {
        self.read(|connection| {
            let recent = "id IN (SELECT id FROM jobs ORDER BY id DESC LIMIT ?1)";
            select(connection, recent, [most])
        })
    }

    /// The first `most` envelopes that a job left behind.
    pub fn left_behind(&self, job: JobId, most: u32) -> Result<Vec<LeftBehind>, KeystoreError> {
        self.read(|connection| {
            let sql =
                "SELECT envelope, reason, again FROM left_behind WHERE job = ?1 ORDER BY envelope LIMIT ?2";
            let named = Named("envelope", "envelope");
            // One without an id is an envelope whose record is damaged: the list of these has it.
            Ok(rows::collect(connection, sql, params![job.0, most], named, left_of)?.sound)
        })
    }

    /// The next `most` envelopes of a job's pass.
    pub fn next_of_job(&self, job: &JobRecord, most: u32) -> Result<Rows<EnvelopeRecord>, KeystoreError> {
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

    /// Writes down what became of a batch and that the job is behind its last envelope, in one transaction. An envelope
    /// that was changed by someone else meanwhile is left for the next pass. Each copy of a replaced envelope that
    /// travels is stale from here on.
    pub fn commit_batch(&self, job: JobId, verdicts: &[Verdict]) -> Result<JobRecord, KeystoreError> {
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

    /// Ends a pass: with envelopes left that may open later, another one follows once something has changed; else the
    /// job is through.
    pub fn end_pass(&self, job: JobId) -> Result<JobRecord, KeystoreError> {
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

    /// Notes what a job waits for.
    pub fn job_waits(&self, job: JobId, waiting: &str) -> Result<(), KeystoreError> {
        self.write(|transaction| {
            transaction.execute(
                "UPDATE jobs SET waiting = ?2, updated = ?3 WHERE id = ?1 AND state = 'running' AND waiting <> ?2",
                params![job.0, waiting, now()],
            )?;
            Ok(())
        })
    }

    /// Notes how a job that is no sweep has ended: with all units done, or given up for a reason, as JSON. What has been done is
    /// told of one that was aborted at that very moment, too.
    pub fn end_job(&self, job: JobId, failure: Option<&str>) -> Result<JobRecord, KeystoreError> {
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

    /// Ends a job where it is; says how it stands then.
    ///
    /// # Errors
    /// [`KeystoreError::UnknownJob`].
    pub fn abort_job(&self, job: JobId) -> Result<JobRecord, KeystoreError> {
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
        Some(running) => Err(KeystoreError::JobRunning(running.id.0).into()),
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

/// The sweeps that run have a look at an envelope that came, or changed, where they will not pass any more: it may need a KEK
/// that they take out of use.
pub(super) fn add_to_running_sweeps(connection: &Connection, envelope: EnvelopeId) -> Result<(), StoreFault> {
    connection
        .prepare_cached(
            "INSERT OR REPLACE INTO left_behind (job, envelope, reason, again)
             SELECT jobs.id, envelopes.id, ?2, 1 FROM jobs JOIN envelopes ON envelopes.id = ?1
             WHERE jobs.state = 'running' AND jobs.path = '' AND (jobs.vm = '' OR jobs.vm = envelopes.vm)
             AND (jobs.pass = 'left' OR envelopes.rowid <= CAST(jobs.cursor AS INTEGER))",
        )?
        .execute(params![envelope.to_string(), CAME_MEANWHILE])?;
    Ok(())
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
        return Ok(Some(LeftBehind {
            envelope: old.id,
            reason: "it changed meanwhile".to_owned(),
            again: true,
        }));
    }
    for place in [CopyPlace::Xml, CopyPlace::Image] {
        copies::note_stale(transaction, old, place)?;
    }
    retire(transaction, old, new)?;
    Ok(None)
}

/// Remembers the KEKs that `new` has no stanza of any more.
fn retire(transaction: &Transaction, old: &Envelope, new: &Envelope) -> Result<(), StoreFault> {
    let mut insert = transaction.prepare_cached(
        "INSERT OR IGNORE INTO retired_keks (provider, kek, vm, since) VALUES (?1, ?2, ?3, ?4)",
    )?;
    let stays = |gone: &&Stanza| {
        let kek = (gone.provider, &gone.kek);
        new.stanzas
            .iter()
            .any(|stanza| (stanza.provider, &stanza.kek) == kek)
    };
    for gone in old.stanzas.iter().filter(|stanza| !stays(stanza)) {
        insert.execute(params![
            gone.provider.to_string(),
            gone.kek.0,
            old.vm.to_string(),
            now()
        ])?;
    }
    Ok(())
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
    found.ok_or_else(|| KeystoreError::UnknownJob(id.0).into())
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
            return Err(KeystoreError::Inconsistent {
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
