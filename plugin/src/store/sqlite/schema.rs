//! The tables, their versions, and how SQLite is set up.

use std::path::Path;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use super::fault::StoreFault;
use crate::model::deadlines::store::BUSY;
use crate::store::error::StoreError;

/// What leads from each `PRAGMA user_version` to the next, the first one from nothing.
const STEPS: [&str; 13] = [
    TABLES,
    ROTATION,
    TPM,
    PERSISTED,
    PROOFS,
    PLAIN_VMS,
    KEK_NAMES,
    DAMAGED,
    JOBS,
    MASTER_KEYS,
    AUTOSTARTS,
    PIVOTS,
    PIVOTS_OF_OTHERS,
];

/// `PRAGMA user_version` after all steps.
const VERSION: i64 = STEPS.len() as i64;

/// `PRAGMA application_id`: "vseK", so that `file` and we know a keystore from another database.
const APPLICATION_ID: i64 = 0x7673_654b;

const TABLES: &str = "
    CREATE TABLE envelopes (
        id         TEXT PRIMARY KEY,
        vm         TEXT NOT NULL,
        kind       TEXT NOT NULL CHECK (kind IN ('disk', 'vtpm', 'nvram')),
        generation INTEGER NOT NULL CHECK (generation >= 0),
        json       TEXT NOT NULL,
        state      TEXT NOT NULL CHECK (state IN ('pending', 'active')),
        location   TEXT NOT NULL,
        created    INTEGER NOT NULL,
        updated    INTEGER NOT NULL
    );
    CREATE INDEX envelopes_of_vm ON envelopes (vm);
    CREATE TABLE vms (
        uuid      TEXT PRIMARY KEY,
        name      TEXT NOT NULL,
        sealed_at INTEGER NOT NULL,
        vtpm_seen INTEGER NOT NULL CHECK (vtpm_seen IN (0, 1))
    );
    CREATE TABLE providers (
        id         TEXT PRIMARY KEY,
        name       TEXT NOT NULL UNIQUE,
        kind       TEXT NOT NULL,
        is_default INTEGER NOT NULL CHECK (is_default IN (0, 1)),
        created    INTEGER NOT NULL,
        settings   TEXT NOT NULL
    );
    CREATE UNIQUE INDEX one_default_provider ON providers (is_default) WHERE is_default = 1;
    CREATE TABLE native_roots (
        provider     TEXT NOT NULL REFERENCES providers (id) ON DELETE RESTRICT,
        generation   INTEGER NOT NULL CHECK (generation >= 1),
        sealed       BLOB NOT NULL,
        backed_up_at INTEGER,
        PRIMARY KEY (provider, generation)
    );
";

/// `jobs`: the sweeps over envelopes, the running one and those before it; `left_behind` has the envelopes that a job
/// could not change. `stale_copies`: which KEKs a copy of an envelope outside of this file still needs, because it has an
/// earlier generation. `retired_keks`: KEKs that wrapped something of a VM here before a job replaced their stanzas, and that
/// their provider may still have. `header_journal`: image headers that are being rewritten. `deleted_providers`: their names.
const ROTATION: &str = "
    CREATE TABLE jobs (
        id       INTEGER PRIMARY KEY AUTOINCREMENT,
        task     TEXT NOT NULL,
        state    TEXT NOT NULL CHECK (state IN ('running', 'done', 'incomplete', 'aborted')),
        pass     TEXT NOT NULL CHECK (pass IN ('all', 'left')),
        cursor   TEXT NOT NULL,
        total    INTEGER NOT NULL,
        seen     INTEGER NOT NULL,
        changed  INTEGER NOT NULL,
        waiting  TEXT NOT NULL,
        created  INTEGER NOT NULL,
        updated  INTEGER NOT NULL
    );
    CREATE UNIQUE INDEX one_running_job ON jobs (state) WHERE state = 'running';
    CREATE TABLE left_behind (
        job      INTEGER NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        envelope TEXT NOT NULL,
        reason   TEXT NOT NULL,
        again    INTEGER NOT NULL CHECK (again IN (0, 1)),
        PRIMARY KEY (job, envelope)
    );
    CREATE TABLE stale_copies (
        envelope TEXT NOT NULL,
        place    TEXT NOT NULL CHECK (place IN ('xml', 'image')),
        provider TEXT NOT NULL,
        kek      TEXT NOT NULL,
        since    INTEGER NOT NULL,
        reason   TEXT NOT NULL,
        PRIMARY KEY (envelope, place, provider, kek)
    );
    CREATE TABLE retired_keks (
        provider TEXT NOT NULL,
        kek      TEXT NOT NULL,
        vm       TEXT NOT NULL,
        since    INTEGER NOT NULL,
        PRIMARY KEY (provider, kek, vm)
    );
    CREATE TABLE header_journal (
        envelope TEXT PRIMARY KEY,
        path     TEXT NOT NULL,
        patch    BLOB NOT NULL
    );
    CREATE TABLE deleted_providers (
        id      TEXT PRIMARY KEY,
        name    TEXT NOT NULL,
        kind    TEXT NOT NULL,
        deleted INTEGER NOT NULL
    );
";

/// `tpm_seals`: the root keys of native providers once more, encrypted under a key that is bound to this host's TPM.
const TPM: &str = "
    CREATE TABLE tpm_seals (
        provider   TEXT PRIMARY KEY REFERENCES providers (id) ON DELETE RESTRICT,
        generation INTEGER NOT NULL CHECK (generation >= 1),
        sealed_key BLOB NOT NULL,
        roots      BLOB NOT NULL,
        enrolled   INTEGER NOT NULL
    );
";

/// `kek_persistence`: providers whose cached KEKs outlive a reboot, with what is bound to the TPM for that;
/// `persisted_keks`: these KEKs, encrypted.
const PERSISTED: &str = "
    CREATE TABLE kek_persistence (
        provider TEXT PRIMARY KEY REFERENCES providers (id) ON DELETE RESTRICT,
        sealed   BLOB NOT NULL,
        salt     BLOB NOT NULL,
        seconds  INTEGER NOT NULL CHECK (seconds > 0),
        enrolled INTEGER NOT NULL
    );
    CREATE TABLE persisted_keks (
        provider TEXT NOT NULL REFERENCES kek_persistence (provider) ON DELETE RESTRICT,
        kek      TEXT NOT NULL,
        fetched  INTEGER NOT NULL,
        expires  INTEGER NOT NULL,
        body     BLOB NOT NULL,
        PRIMARY KEY (provider, kek)
    );
";

/// `audit_anchor`: how long the audit log is known to be, and the SHA-256 of its last record then. `made_keks`: KEKs that were
/// made for a VM before anything was wrapped with them. `saved_states`: VMs that were saved to a file somewhere, with the
/// envelopes that this file has copies of.
const PROOFS: &str = "
    CREATE TABLE audit_anchor (
        one  INTEGER PRIMARY KEY CHECK (one = 1),
        seq  INTEGER NOT NULL CHECK (seq >= 0),
        hash BLOB NOT NULL CHECK (length(hash) = 32)
    );
    CREATE TABLE made_keks (
        provider TEXT NOT NULL,
        kek      TEXT NOT NULL,
        vm       TEXT NOT NULL,
        since    INTEGER NOT NULL,
        PRIMARY KEY (provider, kek)
    );
    CREATE TABLE saved_states (
        vm        TEXT PRIMARY KEY,
        since     INTEGER NOT NULL,
        envelopes TEXT NOT NULL
    );
";

/// `plain_vms`: those of `vms` that are not sealed now, because `vm unseal` has made them plain again.
const PLAIN_VMS: &str = "
    CREATE TABLE plain_vms (
        uuid  TEXT PRIMARY KEY,
        since INTEGER NOT NULL
    );
";

/// `kek_names`: what KEKs were to be called at their servers, noted before each was asked for, and which KEK that became.
/// An empty scope is all VMs of the provider.
const KEK_NAMES: &str = "
    CREATE TABLE kek_names (
        provider TEXT NOT NULL,
        name     TEXT NOT NULL,
        scope    TEXT NOT NULL,
        kek      TEXT,
        since    INTEGER NOT NULL,
        PRIMARY KEY (provider, name)
    );
    CREATE INDEX kek_names_of_scope ON kek_names (provider, scope);
";

/// `damaged_envelopes`: rows of `envelopes` that could not be read, as they were when a verified copy took their place.
const DAMAGED: &str = "
    CREATE TABLE damaged_envelopes (id, vm, kind, generation, json, state, location, since INTEGER NOT NULL);
";

/// `jobs` has jobs about one VM (`vm`; empty: all) or one image of it (`path`), several at once. `failure`: why one was given up,
/// which `state` calls incomplete. Its rows stay where they are, since one of them may be damaged.
const JOBS: &str = "
    ALTER TABLE jobs ADD COLUMN vm TEXT NOT NULL DEFAULT '';
    ALTER TABLE jobs ADD COLUMN path TEXT NOT NULL DEFAULT '';
    ALTER TABLE jobs ADD COLUMN failure TEXT NOT NULL DEFAULT '';
    DROP INDEX one_running_job;
    CREATE UNIQUE INDEX one_running_job_of_a_subject ON jobs (vm, path) WHERE state = 'running';
    UPDATE OR IGNORE jobs SET vm = coalesce(json_extract(task, '$.vm'), '') WHERE state = 'running' AND json_valid(task);
";

/// `master_keys_on_disk`: VMs that were started with QEMU's master key on a disk, and why it could not be kept off it.
const MASTER_KEYS: &str = "
    CREATE TABLE master_keys_on_disk (
        vm  TEXT PRIMARY KEY,
        why TEXT NOT NULL
    );
";

/// `autostarts`: VMs that virtseald starts with this host, and the boot in which nothing more is to be done for each.
const AUTOSTARTS: &str = "
    CREATE TABLE autostarts (
        vm      TEXT PRIMARY KEY,
        settled TEXT NOT NULL
    );
";

/// `pivots`: disks of running VMs that QEMU was asked to let go over from an overlay to the sealed image below, until it is seen that it
/// has: which of both is newer is not known meanwhile.
const PIVOTS: &str = "
    CREATE TABLE pivots (
        vm      TEXT NOT NULL,
        base    TEXT NOT NULL,
        overlay TEXT NOT NULL,
        asked   INTEGER NOT NULL,
        PRIMARY KEY (vm, base, overlay)
    );
";

/// `pivots` has those too that virtseald has not asked for: the VM was seen to run on the sealed image alone.
const PIVOTS_OF_OTHERS: &str = "
    ALTER TABLE pivots ADD COLUMN of_others INTEGER NOT NULL DEFAULT 0;
";

/// Opens `path`, checks it whole and brings its tables up to date.
pub(crate) fn open(path: &Path) -> Result<Connection, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    Connection::open_with_flags(path, flags)
        .map_err(StoreFault::from)
        .and_then(|mut connection| prepare(&mut connection, path).map(|()| connection))
        .map_err(|fault| fault.at(path))
}

/// Writes nothing before every page was checked: not even what waits in the write-ahead log, as closing would.
fn prepare(connection: &mut Connection, path: &Path) -> Result<(), StoreFault> {
    connection.busy_timeout(BUSY)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    check_owner(connection, path)?;
    check_pages(connection, path)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
    set_up(connection)?;
    migrate(connection)
}

/// Brings what waits in the write-ahead log into the database, over a connection of its own so that nobody waits for it. Says
/// whether the database alone is whole now.
pub(crate) fn checkpoint(path: &Path) -> Result<bool, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let work = || -> Result<bool, StoreFault> {
        let connection = Connection::open_with_flags(path, flags)?;
        // Opens the log, which a checkpoint alone does not.
        let _: i64 = connection.query_row("SELECT count(*) FROM sqlite_master", [], |row| row.get(0))?;
        let (waiting, done): (i64, i64) =
            connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| {
                Ok((row.get(1)?, row.get(2)?))
            })?;
        Ok(waiting == done)
    };
    work().map_err(|fault| fault.at(path))
}

/// Before anything is written: is this ours, and not from the future?
fn check_owner(connection: &Connection, path: &Path) -> Result<(), StoreFault> {
    let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if found > VERSION {
        return Err(StoreError::TooNew {
            path: path.to_owned(),
            found,
            known: VERSION,
        }
        .into());
    }
    let application: i64 = connection.pragma_query_value(None, "application_id", |row| row.get(0))?;
    let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_master", [], |row| row.get(0))?;
    if tables > 0 && application != APPLICATION_ID {
        return Err(damaged(path, "it is an SQLite database, and not a keystore"));
    }
    Ok(())
}

/// WAL with `synchronous=FULL`: a commit is one append and one fsync, where a rollback journal costs four, and
/// it is as durable. Its price is that the latest commits sit in `keystore.db-wal` until a checkpoint, which
/// [`super::checkpoints`] sees to: soon after each change, so that the database alone is a whole copy.
fn set_up(connection: &Connection) -> Result<(), StoreFault> {
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    connection.pragma_update(None, "secure_delete", true)?;
    Ok(())
}

/// Whether the file is whole. What is in its rows is a matter of who reads them: one that breaks a constraint is no reason to do
/// without all others.
fn check_pages(connection: &Connection, path: &Path) -> Result<(), StoreFault> {
    const OF_ROWS: [&str; 3] = ["NULL value in ", "TEXT value in ", "NUMERIC value in "];
    connection.pragma_update(None, "ignore_check_constraints", true)?;
    let mut statement = connection.prepare("PRAGMA integrity_check(10000)")?;
    let mut verdicts = statement.query([])?;
    let mut worst = None;
    while let Some(row) = verdicts.next()? {
        let verdict: String = row.get(0)?;
        let is_of_row = OF_ROWS.iter().any(|begin| verdict.starts_with(begin));
        if verdict != "ok" && !is_of_row {
            worst.get_or_insert(verdict);
        }
    }
    drop(verdicts);
    drop(statement);
    connection.pragma_update(None, "ignore_check_constraints", false)?;
    worst.map_or(Ok(()), |verdict| Err(damaged(path, &verdict)))
}

fn migrate(connection: &mut Connection) -> Result<(), StoreFault> {
    let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    let version: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let done = usize::try_from(version).unwrap_or(0);
    if done < STEPS.len() {
        for step in &STEPS[done..] {
            transaction.execute_batch(step)?;
        }
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", VERSION)?;
    }
    Ok(transaction.commit()?)
}

fn damaged(path: &Path, why: &str) -> StoreFault {
    StoreError::Damaged {
        path: path.to_owned(),
        source: why.into(),
    }
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keystores as they are out there, by their version: text that no later change of a step reaches. A version that was
    /// released gets its file.
    const RELEASED: [&str; 4] = [
        include_str!("schema/v1.sql"),
        include_str!("schema/v2.sql"),
        include_str!("schema/v3.sql"),
        include_str!("schema/v4.sql"),
    ];

    fn tables(connection: &Connection) -> Vec<String> {
        let sql =
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY name";
        let mut statement = connection.prepare(sql).unwrap();
        let names = statement.query_map([], |row| row.get(0)).unwrap();
        names.map(Result::unwrap).collect()
    }

    /// Everything in a table, a row a line.
    fn rows(connection: &Connection, table: &str) -> Vec<String> {
        let mut statement = connection.prepare(&format!("SELECT * FROM {table}")).unwrap();
        let columns = statement.column_count();
        let row = |row: &rusqlite::Row<'_>| {
            let values = (0..columns).map(|at| row.get::<_, rusqlite::types::Value>(at).unwrap());
            Ok(format!("{:?}", values.collect::<Vec<_>>()))
        };
        let mut rows: Vec<_> = statement
            .query_map([], row)
            .unwrap()
            .map(Result::unwrap)
            .collect();
        rows.sort();
        rows
    }

    fn schema(connection: &Connection) -> Vec<String> {
        let mut statement = connection
            .prepare("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name")
            .unwrap();
        let sql = statement.query_map([], |row| row.get::<_, String>(0)).unwrap();
        let words = |sql: String| sql.split_whitespace().collect::<Vec<_>>().join(" ");
        sql.map(|sql| words(sql.unwrap())).collect()
    }

    #[test]
    fn a_sweep_goes_on_where_a_keystore_of_version_4_has_it() {
        let vm = "6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b8";
        let sweeps = [
            (r#"{"kind":"rekey","to":[],"vm":null}"#, ""),
            (r#"{"kind":"rotate","provider":"x"}"#, ""),
            (&format!(r#"{{"kind":"rekey","to":[],"vm":"{vm}"}}"#), vm),
            ("{", ""),
        ];
        for (task, expected) in sweeps {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("v4.db");
            let old = Connection::open(&path).unwrap();
            old.execute_batch(RELEASED[3]).unwrap();
            old.execute(
                "INSERT INTO jobs VALUES (8, ?1, 'running', 'left', '1', 5, 3, 2, 'locked', 1, 2)",
                [task],
            )
            .unwrap();
            drop(old);
            let now = open(&path).unwrap();
            let sql = "SELECT task, pass, cursor, seen, waiting, vm, path, failure FROM jobs WHERE state = 'running'";
            let found: [String; 8] = now
                .query_row(sql, [], |row| {
                    let mut columns = <[String; 8]>::default();
                    for (at, column) in columns.iter_mut().enumerate() {
                        let value: rusqlite::types::Value = row.get(at)?;
                        *column = match value {
                            rusqlite::types::Value::Text(text) => text,
                            other => format!("{other:?}"),
                        };
                    }
                    Ok(columns)
                })
                .unwrap();
            assert_eq!(
                found.map(|column| column.replace("Integer(3)", "3")),
                [task, "left", "1", "3", "locked", expected, "", ""]
            );
        }
    }

    #[test]
    fn a_keystore_of_each_released_version_keeps_its_rows() {
        let dir = tempfile::tempdir().unwrap();
        let fresh = dir.path().join("fresh.db");
        std::fs::write(&fresh, b"").unwrap();
        let fresh = schema(&open(&fresh).unwrap());
        for (text, version) in RELEASED.into_iter().zip(1..) {
            let path = dir.path().join(format!("v{version}.db"));
            let old = Connection::open(&path).unwrap();
            old.execute_batch(text).unwrap();
            let found: i64 = old
                .pragma_query_value(None, "user_version", |row| row.get(0))
                .unwrap();
            assert_eq!(found, version);
            let kept = tables(&old);
            let before: Vec<_> = kept.iter().map(|table| rows(&old, table)).collect();
            assert!(
                before.iter().all(|rows| !rows.is_empty()),
                "an empty table proves nothing"
            );
            drop(old);

            let now = open(&path).unwrap();
            let version: i64 = now
                .pragma_query_value(None, "user_version", |row| row.get(0))
                .unwrap();
            assert_eq!(version, VERSION);
            assert_eq!(schema(&now), fresh, "unlike a new keystore");
            for (table, before) in kept.iter().zip(before) {
                let after = rows(&now, table);
                assert_eq!(after.len(), before.len(), "{table}");
                for (before, after) in before.iter().zip(&after) {
                    // A later version may have added columns at the end.
                    let old_part = before.trim_end_matches(']');
                    assert!(after.starts_with(old_part), "{table}: {before} became {after}");
                }
            }
        }
    }
}
