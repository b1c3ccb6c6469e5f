//! Rows of jobs: sweeps over the envelopes that survive the daemon.
//!
//! The envelopes of a batch, where the job is, and what it left behind change in one transaction. So each envelope is
//! visited once, whenever the daemon dies.

use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};

use super::copies::{self, CopyPlace};
use super::envelopes::{self, EnvelopeRecord};
use super::rows::{self, DamagedRow, Named, Rows};
use super::{Keystore, KeystoreError, UnixTime, error::StoreFault, now, parse_id};
use crate::model::envelope::{Envelope, EnvelopeId, Stanza, Verified};

/// Names a job on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct JobId(pub i64);

/// How far a job has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobState {
    /// At work, or waiting until it can be.
    Running,
    /// Through, nothing left behind.
    Done,
    /// Through, with envelopes left behind.
    Incomplete,
    /// Ended by an admin; what it changed until then stays.
    Aborted,
}

impl JobState {
    /// The word in the keystore and in messages.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Incomplete => "incomplete",
            Self::Aborted => "aborted",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Running, Self::Done, Self::Incomplete, Self::Aborted]
            .into_iter()
            .find(|state| state.as_str() == text)
    }
}

/// Which envelopes a job goes through now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// All of them, in the order in which they came here: one that is made meanwhile comes last.
    All,
    /// Those that it left behind and that may open by now.
    Left,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobRecord {
    /// Its number.
    pub id: JobId,
    /// What it does, as JSON.
    pub task: String,
    /// How far it is.
    pub state: JobState,
    /// Which envelopes it goes through.
    pub pass: Pass,
    /// The row of the last envelope of the pass that it has seen; none yet, if empty.
    pub cursor: String,
    /// How many envelopes there were when it began.
    pub total: u64,
    /// How many of them it has seen.
    pub seen: u64,
    /// How many of them it has changed.
    pub changed: u64,
    /// How many of them it could not change.
    pub left: u64,
    /// What it waits for; empty while it works.
    pub waiting: String,
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
    /// [`KeystoreError::JobRunning`]: one runs at a time.
    pub fn insert_job(&self, task: &str) -> Result<JobRecord, KeystoreError> {
        self.insert_job_without(task, &[])
    }

    /// Starts a job that leaves these behind from the beginning.
    ///
    /// # Errors
    /// As [`Keystore::insert_job`].
    pub fn insert_job_without(&self, task: &str, left: &[LeftBehind]) -> Result<JobRecord, KeystoreError> {
        self.write(|transaction| {
            if let Some(running) = select(transaction, "state = 'running'", [])?.whole()?.pop() {
                return Err(KeystoreError::JobRunning(running.id.0).into());
            }
            let total: i64 = transaction.query_row("SELECT count(*) FROM envelopes", [], |row| row.get(0))?;
            transaction.execute(
                "INSERT INTO jobs (task, state, pass, cursor, total, seen, changed, waiting, created, updated)
                 VALUES (?1, 'running', 'all', '', ?2, 0, 0, '', ?3, ?3)",
                params![task, total, now()],
            )?;
            let id = JobId(transaction.last_insert_rowid());
            for left in left {
                note(transaction, id, left.envelope, Some(left.clone()))?;
            }
            find(transaction, id)
        })
    }

    /// The job that runs, if one does.
    pub fn running_job(&self) -> Result<Option<JobRecord>, KeystoreError> {
        self.read(|connection| Ok(select(connection, "state = 'running'", [])?.whole()?.pop()))
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
        self.read(|connection| match job.pass {
            Pass::All => envelopes::select(
                connection,
                "WHERE rowid > CAST(?1 AS INTEGER)
                 AND id NOT IN (SELECT envelope FROM left_behind WHERE job = ?3 AND again = 0)
                 ORDER BY rowid LIMIT ?2",
                params![job.cursor, most, job.id.0],
            ),
            Pass::Left => envelopes::select(
                connection,
                "WHERE rowid > CAST(?1 AS INTEGER)
                 AND id IN (SELECT envelope FROM left_behind WHERE job = ?3 AND again = 1)
                 ORDER BY rowid LIMIT ?2",
                params![job.cursor, most, job.id.0],
            ),
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
                 ON envelopes.rowid > CAST(jobs.cursor AS INTEGER)
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

/// The job that runs has a look at an envelope that came, or changed, where it will not pass any more: it may need a KEK that
/// the job takes out of use.
pub(super) fn add_to_running_job(connection: &Connection, envelope: EnvelopeId) -> Result<(), StoreFault> {
    connection
        .prepare_cached(
            "INSERT OR REPLACE INTO left_behind (job, envelope, reason, again)
             SELECT jobs.id, envelopes.id, ?2, 1 FROM jobs JOIN envelopes ON envelopes.id = ?1
             WHERE jobs.state = 'running'
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
        "SELECT id, task, state, pass, cursor, total, seen, changed, waiting, created, updated,
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
    let state = text("state");
    let state = JobState::parse(&state).ok_or_else(|| KeystoreError::Inconsistent {
        row: format!("of job {id}"),
        why: format!("its state is {state:?}"),
    })?;
    Ok(JobRecord {
        id: JobId(id),
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
