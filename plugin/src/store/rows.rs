//! Rows of which some are damaged: one that can't be read hides no other.
//!
//! Whoever reads many rows gets a [`Rows`] and says what damage means to him: [`Rows::sound`] for what goes on without, and
//! [`Rows::whole`] for a guard, which must know all of them.

use std::fmt;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, Params, Row};

use super::error::StoreFault;
use super::{EnvelopeRecord, KeystoreError};
use crate::model::envelope::{Envelope, EnvelopeId, VmId};

/// The rows that can be read, and what is known of the others.
#[derive(Debug)]
pub struct Rows<T> {
    /// Those that can be read.
    pub sound: Vec<T>,
    /// Those that can't.
    pub damaged: Vec<DamagedRow>,
}

impl<T> Rows<T> {
    /// Whether there is none, not even a damaged one.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sound.is_empty() && self.damaged.is_empty()
    }

    /// All of them.
    ///
    /// # Errors
    /// [`KeystoreError::Inconsistent`], which names the first one that can't be read.
    pub fn whole(self) -> Result<Vec<T>, KeystoreError> {
        match self.damaged.into_iter().next() {
            None => Ok(self.sound),
            Some(row) => Err(row.into()),
        }
    }
}

impl Rows<EnvelopeRecord> {
    /// The envelopes of all rows, those of damaged ones as they still hold them: for a guard to which what may be true is enough.
    ///
    /// # Errors
    /// [`KeystoreError::Inconsistent`], which names the first row that holds none.
    pub fn claims(self) -> Result<Vec<Envelope>, KeystoreError> {
        let mut claims: Vec<_> = self.sound.into_iter().map(|record| record.envelope).collect();
        for row in self.damaged {
            match row.holds {
                Some(held) => claims.push(held.envelope),
                None => return Err(row.into()),
            }
        }
        Ok(claims)
    }
}

/// A row that can't be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedRow {
    /// Which one, as in `of envelope ID`.
    pub row: String,
    /// What is wrong with it.
    pub why: String,
    /// The VM that it is about, as far as it tells.
    pub vm: Option<VmId>,
    /// The envelope that it is of, as far as it tells.
    pub envelope: Option<EnvelopeId>,
    /// The envelope that is in it all the same.
    pub holds: Option<Box<Held>>,
    /// Whether what it says is elsewhere too: the envelopes of a VM travel, and what else is noted of it is seen at its start.
    pub is_elsewhere: bool,
    /// Its place in the order of its table.
    pub(super) place: i64,
}

/// What a damaged row of an envelope still has: to be believed once it was verified, as a copy from anywhere else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The envelope.
    pub envelope: Envelope,
    /// The path of its object; empty where it has none.
    pub location: String,
}

impl fmt::Display for DamagedRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the keystore's record {} is damaged: {}", self.row, self.why)
    }
}

impl From<DamagedRow> for KeystoreError {
    fn from(DamagedRow { row, why, .. }: DamagedRow) -> Self {
        Self::Inconsistent { row, why }
    }
}

/// How the rows of a query are called: what they are, and the column with their id.
#[derive(Clone, Copy)]
pub(super) struct Named(pub(super) &'static str, pub(super) &'static str);

/// What `row_of` makes of each row of a query.
pub(super) fn collect<T>(
    connection: &Connection,
    sql: &str,
    values: impl Params,
    named: Named,
    row_of: impl Fn(&Row) -> Result<T, StoreFault>,
) -> Result<Rows<T>, StoreFault> {
    let mut rows = Rows {
        sound: Vec::new(),
        damaged: Vec::new(),
    };
    each(connection, sql, values, named, row_of, |row| {
        match row {
            Ok(sound) => rows.sound.push(sound),
            Err(damaged) => rows.damaged.push(damaged),
        }
        true
    })?;
    Ok(rows)
}

/// What `row_of` makes of the one row of a query, if there is one. A damaged one is called `named`.
pub(super) fn one<T>(
    connection: &Connection,
    sql: &str,
    values: impl Params,
    named: &str,
    row_of: impl FnOnce(&Row) -> Result<T, StoreFault>,
) -> Result<Option<T>, StoreFault> {
    let mut statement = connection.prepare_cached(sql)?;
    let mut rows = statement.query(values)?;
    let Some(row) = rows.next()? else {
        return Ok(None);
    };
    row_of(row).map(Some).map_err(|fault| match fault.of_row() {
        Ok(why) => KeystoreError::Inconsistent {
            row: format!("of {named}"),
            why,
        }
        .into(),
        Err(fault) => fault,
    })
}

/// Shows `visit` what `row_of` makes of each row, until it has enough.
pub(super) fn each<T>(
    connection: &Connection,
    sql: &str,
    values: impl Params,
    Named(what, id): Named,
    row_of: impl Fn(&Row) -> Result<T, StoreFault>,
    mut visit: impl FnMut(Result<T, DamagedRow>) -> bool,
) -> Result<(), StoreFault> {
    let mut statement = connection.prepare_cached(sql)?;
    let mut rows = statement.query(values)?;
    while let Some(row) = rows.next()? {
        let found = match row_of(row) {
            Ok(found) => Ok(found),
            Err(fault) => Err(damaged(row, what, id, fault.of_row()?)),
        };
        if !visit(found) {
            break;
        }
    }
    Ok(())
}

fn damaged(row: &Row, what: &str, id: &str, why: String) -> DamagedRow {
    let of_columns = |names: &[&str]| names.iter().find_map(|name| text(row, name)?.parse().ok());
    let envelope = match what {
        "envelope" => text(row, "id").and_then(|id| id.parse().ok()),
        _ => None,
    };
    let holds = text(row, "json").and_then(|json| Envelope::from_json(&json).ok());
    let holds = holds.filter(|held| envelope.is_none_or(|id| id == held.id));
    let holds = holds.map(|envelope| Held {
        envelope,
        location: text(row, "location").unwrap_or_default(),
    });
    DamagedRow {
        row: format!(
            "of {what} {}",
            text(row, id).unwrap_or_else(|| "without an id".to_owned())
        ),
        why,
        vm: of_columns(&["vm", "uuid"]).or_else(|| holds.as_ref().map(|held| held.envelope.vm)),
        envelope: envelope.or_else(|| holds.as_ref().map(|held| held.envelope.id)),
        holds: holds.map(Box::new),
        is_elsewhere: matches!(what, "envelope" | "VM"),
        place: row.get("rowid").unwrap_or(0),
    }
}

/// What is in a column, whatever SQLite has stored there.
pub(super) fn text(row: &Row, column: &str) -> Option<String> {
    match row.get_ref(column).ok()? {
        ValueRef::Null => None,
        ValueRef::Integer(number) => Some(number.to_string()),
        ValueRef::Real(number) => Some(number.to_string()),
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use rusqlite::params;

    use super::*;
    use crate::model::envelope::{Binding, KekId, ObjectKind, ProviderId, Stanza, Verified};
    use crate::model::job::Subject;
    use crate::secret::Dek;
    use crate::store::{
        AuditAnchor, CopyPlace, Keystore, LeftBehind, MadeKek, NativeRoot, NewJob, Pass, Put, Verdict,
    };

    fn dek() -> Dek {
        Dek::from_bytes(&[7; 32]).unwrap()
    }

    fn envelope(vm: VmId) -> Verified {
        let binding = Binding {
            envelope: EnvelopeId::random(),
            vm,
            kind: ObjectKind::Disk,
        };
        let stanza = Stanza {
            provider: ProviderId::random(),
            provider_name: "main".to_owned(),
            kek: KekId("v1:provider".to_owned()),
            mechanism: "A256GCM".to_owned(),
            body: vec![7; 92],
        };
        Verified::new(&binding, vec![stanza], &dek()).unwrap()
    }

    /// As somebody with an editor for SQLite would, whatever the tables demand.
    fn edit(keystore: &Keystore, sql: &str) {
        let raw = Connection::open(keystore.path()).unwrap();
        raw.execute_batch("PRAGMA ignore_check_constraints = ON; PRAGMA foreign_keys = OFF")
            .unwrap();
        raw.execute_batch(sql).unwrap();
    }

    const DAMAGES: [&str; 9] = [
        "json = '{'",
        "json = x'ff00ff'",
        "json = x'00'",
        "generation = 7",
        "vm = 'nobody'",
        "vm = x'ff'",
        "kind = 'tape'",
        "state = 'lost'",
        "created = 'yesterday'",
    ];

    #[test]
    fn a_damaged_envelope_hides_no_other_and_guards_know_of_it() {
        for damage in DAMAGES {
            let dir = tempfile::tempdir().unwrap();
            let keystore = Keystore::open(dir.path()).unwrap();
            let (one, two, other) = (
                envelope(VmId::random()),
                envelope(VmId::random()),
                envelope(VmId::random()),
            );
            for envelope in [&one, &two, &other] {
                keystore.put(envelope, "/images/a").unwrap();
            }
            edit(
                &keystore,
                &format!("UPDATE envelopes SET {damage} WHERE id = '{}'", two.id),
            );
            let rows = keystore.envelopes().unwrap();
            let sound: Vec<_> = rows.sound.iter().map(|record| record.envelope.id).collect();
            assert!(
                sound.len() == 2 && sound.contains(&one.id) && sound.contains(&other.id),
                "{damage}"
            );
            let [damaged] = &rows.damaged[..] else {
                panic!("{damage}")
            };
            assert_eq!(damaged.envelope, Some(two.id), "{damage}");
            assert!(damaged.to_string().contains(&two.id.to_string()), "{damaged}");
            // By the column, else by what is in it.
            let tells_vm = !damage.starts_with("vm = 'n") && !damage.starts_with("vm = x");
            assert!(damaged.vm == Some(two.vm) || !tells_vm, "{damage}");
            let claims = keystore.envelopes().unwrap().claims();
            match damage.starts_with("json") {
                true => assert!(
                    claims.unwrap_err().to_string().contains(&two.id.to_string()),
                    "{damage}"
                ),
                false => assert!(claims.unwrap().contains(&two), "{damage}"),
            }
            let held = keystore.held_envelope(two.id).unwrap();
            assert!(
                held.is_none_or(|held| held == *two) && keystore.held_envelope(one.id).unwrap().is_none(),
                "{damage}"
            );
            let error = rows.whole().unwrap_err();
            assert!(
                error.is_of_row() && error.to_string().contains(&two.id.to_string()),
                "{error}"
            );
            let mut seen = 0;
            keystore.each_envelope(|_| seen += 1).unwrap();
            assert_eq!(seen, 2, "{damage}");
            assert!(keystore.envelope(two.id).unwrap_err().is_of_row(), "{damage}");
            assert!(keystore.readable_envelope(two.id).unwrap().is_none());
            assert!(keystore.envelope(one.id).unwrap().is_some());
            // Who may not have it is still told by the index.
            let index = std::fs::read_to_string(dir.path().join(Keystore::HOOK_INDEX)).unwrap();
            assert!(index.contains(&two.id.0.simple().to_string()), "{damage}");
            drop(keystore);
            let keystore = Keystore::open(dir.path()).unwrap();
            let index = std::fs::read_to_string(dir.path().join(Keystore::HOOK_INDEX)).unwrap();
            let told = index.contains(&two.id.0.simple().to_string());
            assert!(told, "{damage}");

            // A verified copy takes its place, and the row is kept.
            assert_eq!(keystore.put(&two, "/images/b").unwrap(), Put::Adopted, "{damage}");
            let healed = keystore.envelope(two.id).unwrap().unwrap();
            assert_eq!(
                (healed.envelope, healed.location.as_str()),
                (two.clone().into_envelope(), "/images/b")
            );
            keystore.envelopes().unwrap().whole().unwrap();
            let aside = |connection: &Connection| -> i64 {
                let sql = "SELECT count(*) FROM damaged_envelopes";
                connection.query_row(sql, [], |row| row.get(0)).unwrap()
            };
            assert_eq!(aside(&keystore.connection()), 1, "{damage}");
            // That it holds keys, too, ends with the VM's.
            keystore.shred_vm(two.vm).unwrap();
            let left = aside(&keystore.connection());
            assert!(left == 0 || !tells_vm, "{damage}");
        }
    }

    fn sweep(left: &[LeftBehind]) -> NewJob<'_> {
        NewJob {
            subject: &Subject::AllEnvelopes,
            task: "{}",
            total: 0,
            left,
        }
    }

    #[test]
    fn a_job_passes_a_damaged_envelope_and_says_so() {
        for damage in [DAMAGES[0], "id = 'nothing'", "id = x'ff'"] {
            let dir = tempfile::tempdir().unwrap();
            let keystore = Keystore::open(dir.path()).unwrap();
            let all = [0; 5].map(|_| envelope(VmId::random()));
            for envelope in &all {
                keystore.put(envelope, "").unwrap();
            }
            edit(
                &keystore,
                &format!("UPDATE envelopes SET {damage} WHERE id = '{}'", all[2].id),
            );
            let mut job = keystore.insert_job(&sweep(&[])).unwrap();
            let mut seen = 0;
            while job.pass == Pass::All {
                let batch = keystore.next_of_job(&job, 2).unwrap();
                let mut verdicts: Vec<_> = batch.damaged.into_iter().map(Verdict::Damaged).collect();
                seen += batch.sound.len();
                verdicts.extend(
                    batch
                        .sound
                        .iter()
                        .map(|record| Verdict::Unchanged(record.envelope.id)),
                );
                job = match verdicts.is_empty() {
                    true => keystore.end_pass(job.id).unwrap(),
                    false => keystore.commit_batch(job.id, &verdicts).unwrap(),
                };
            }
            assert_eq!((seen, job.left), (4, 1), "{damage}");
            assert_eq!(job.state.as_str(), "incomplete");
            keystore.left_behind(job.id, 10).unwrap();
            keystore.jobs(10).unwrap().whole().unwrap();
        }
    }

    #[test]
    fn a_job_leaves_what_is_to_be_decided_and_goes_through_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        let all = [0; 3].map(|_| envelope(VmId::random()));
        for envelope in &all {
            keystore.put(envelope, "").unwrap();
        }
        let left = LeftBehind {
            envelope: all[2].id,
            reason: "two versions".to_owned(),
            again: false,
        };
        let job = keystore.insert_job(&sweep(std::slice::from_ref(&left))).unwrap();
        let batch = keystore.next_of_job(&job, 10).unwrap().whole().unwrap();
        let ids: Vec<_> = batch.iter().map(|record| record.envelope.id).collect();
        assert_eq!(ids, [all[0].id, all[1].id]);
        let verdicts: Vec<_> = ids.into_iter().map(Verdict::Unchanged).collect();
        let job = keystore.commit_batch(job.id, &verdicts).unwrap();
        assert!(
            keystore
                .next_of_job(&job, 10)
                .unwrap()
                .whole()
                .unwrap()
                .is_empty()
        );
        let ended = keystore.end_pass(job.id).unwrap();
        assert_eq!((ended.state.as_str(), ended.left), ("incomplete", 1));
        assert_eq!(keystore.left_behind(job.id, 10).unwrap(), [left]);
    }

    #[test]
    fn a_damaged_row_of_any_table_is_named_and_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        let (vm, provider) = (VmId::random(), ProviderId::random());
        let known = envelope(vm);
        keystore.put(&known, "/images/a").unwrap();
        keystore.remember_vm(vm, "web01").unwrap();
        keystore.remember_vm(VmId::random(), "web02").unwrap();
        let root = NativeRoot {
            generation: 1,
            sealed: b"age".to_vec(),
            backed_up_at: None,
        };
        keystore.insert_native_root(provider, "main", &root).unwrap();
        for place in [CopyPlace::Xml, CopyPlace::Image] {
            keystore.copy_is_behind(&known, place).unwrap();
        }
        for kek in ["a", "b"] {
            keystore
                .note_made_kek(&MadeKek {
                    vm,
                    provider,
                    kek: KekId(kek.into()),
                })
                .unwrap();
        }
        keystore.note_saved(vm, &[]).unwrap();
        keystore.journal_header(known.id, "/images/a", b"patch").unwrap();
        let job = keystore.insert_job(&sweep(&[])).unwrap();
        edit(
            &keystore,
            &format!(
                "UPDATE vms SET sealed_at = 'once' WHERE name = 'web01';
                 INSERT INTO providers VALUES ('nobody', 'broken', 'native', 0, 0, '{{}}');
                 INSERT INTO providers VALUES ('{0}', 'unset', 'kmip', 0, 0, '{{');
                 INSERT INTO deleted_providers VALUES ('{0}', 'old', 'native', 1), ('x', 'older', 'native', 1);
                 INSERT INTO retired_keks VALUES ('{1}', 'k1', '{2}', 1), ('x', 'k2', '{2}', 1), ('{0}', 'k3', 'x', 1);
                 INSERT INTO stale_copies VALUES ('x', 'xml', '{0}', 'k', 1, '');
                 INSERT INTO header_journal VALUES ('x', '/images/b', x'00');
                 UPDATE made_keks SET vm = 'x' WHERE kek = 'a';
                 INSERT INTO saved_states VALUES ('x', 1, '[]'), ('{0}', 1, '[\"{{\"]');
                 INSERT INTO jobs SELECT NULL, task, 'asleep', pass, cursor, total, seen, changed, waiting, created, updated, vm, path, failure FROM jobs;
                 UPDATE jobs SET task = x'ff', total = 'many', cursor = x'00' WHERE state = 'running';
                 INSERT INTO left_behind VALUES (1, 'x', x'ff', 'maybe')",
                ProviderId::random(),
                provider,
                vm
            ),
        );
        fn check<T>(rows: Result<Rows<T>, KeystoreError>, sound: usize, damaged: usize) {
            let rows = rows.unwrap();
            assert_eq!(
                (rows.sound.len(), rows.damaged.len()),
                (sound, damaged),
                "{:?}",
                rows.damaged
            );
            assert!(rows.whole().is_err_and(|error| error.is_of_row()));
        }
        check(keystore.vms(), 1, 1);
        check(keystore.providers(), 1, 2);
        check(keystore.deleted_providers(), 1, 1);
        check(keystore.retired_keks(), 1, 2);
        check(keystore.needed_keks(), 2, 1);
        check(keystore.journaled_headers(), 1, 1);
        check(keystore.made_keks(), 1, 1);
        check(keystore.saved_states(), 1, 2);
        check(keystore.jobs(10), 1, 1);
        assert_eq!(keystore.stale_copies(CopyPlace::Xml, None, 1).unwrap().len(), 1);
        // What was taken out of use stays out of it, whoever that was of.
        let retired = keystore.retired_of(provider).unwrap();
        assert!(
            retired.len() == 2 && retired.contains(&KekId("k2".into())),
            "{retired:?}"
        );
        // Its VM's next start mends what was noted of it, on the safe side.
        assert!(keystore.vm(vm).unwrap_err().is_of_row());
        assert!(keystore.vtpm_was_seen(vm).unwrap());
        keystore.remember_vm(vm, "web01").unwrap();
        assert!(keystore.vm(vm).unwrap().unwrap().vtpm_seen);
        keystore.forget_saved(vm).unwrap();
        // And the job can be ended.
        assert_eq!(keystore.running_jobs().unwrap().len(), 1);
        keystore.left_behind(job.id, 10).unwrap();
        keystore.abort_job(job.id).unwrap();
        assert_eq!(keystore.running_jobs().unwrap(), []);
    }

    #[test]
    fn a_damaged_note_of_the_audit_log_is_one_of_a_row() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        let anchor = AuditAnchor {
            seq: 3,
            hash: [9; 32],
        };
        keystore.set_audit_anchor(anchor).unwrap();
        for damage in ["seq = -1", "hash = x'00'", "hash = 7"] {
            edit(&keystore, &format!("UPDATE audit_anchor SET {damage}"));
            assert!(keystore.audit_anchor().unwrap_err().is_of_row(), "{damage}");
            keystore.set_audit_anchor(anchor).unwrap();
        }
        let none: i64 = keystore
            .connection()
            .query_row(
                "SELECT count(*) FROM audit_anchor WHERE seq = ?1",
                params![3],
                |row| row.get(0),
            )
            .unwrap();
        assert_eq!(none, 1);
    }
}
