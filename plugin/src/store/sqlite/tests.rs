//! Rows that somebody has damaged.

use rusqlite::{Connection, params};

use crate::model::envelope::fixture::{dek, envelope};
use crate::model::envelope::{KekId, ProviderId, VmId};
use crate::model::job::Subject;
use crate::store::sqlite::hook_index::HookIndex;
use crate::store::{
    AuditAnchor, Change, CopyPlace, EnvelopeState, HostStore, LeftBehind, MadeKek, NativeRoot, NewJob, Pass,
    Put, Rows, StoreError, Stores, Verdict,
};

fn sweep(left: &[LeftBehind]) -> NewJob<'_> {
    NewJob {
        subject: &Subject::AllEnvelopes,
        task: "{}",
        total: 0,
        left,
    }
}

/// Another connection to the same file.
fn raw(stores: &Stores) -> Connection {
    Connection::open(stores.host_store.dir().join(HostStore::FILE)).unwrap()
}

/// As somebody with an editor for SQLite would, whatever the tables demand.
fn edit(stores: &Stores, sql: &str) {
    let raw = raw(stores);
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
        let stores = Stores::open(dir.path()).unwrap();
        let (one, two, other) = (
            envelope(VmId::random()),
            envelope(VmId::random()),
            envelope(VmId::random()),
        );
        for envelope in [&one, &two, &other] {
            stores.keystore.put(envelope, "/images/a").unwrap();
        }
        edit(
            &stores,
            &format!("UPDATE envelopes SET {damage} WHERE id = '{}'", two.id),
        );
        let rows = stores.keystore.envelopes().unwrap();
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
        assert!(damaged.raw["json"] != serde_json::Value::Null, "{damage}");
        let (claims, silent) = stores.keystore.envelopes().unwrap().claims();
        match damage.starts_with("json") {
            true => assert!(
                silent.len() == 1 && silent[0].envelope == Some(two.id),
                "{damage}"
            ),
            false => assert!(claims.contains(&two) && silent.is_empty(), "{damage}"),
        }
        let held = stores.keystore.held_envelope(two.id).unwrap();
        assert!(
            held.is_none_or(|held| held == *two) && stores.keystore.held_envelope(one.id).unwrap().is_none(),
            "{damage}"
        );
        let error = rows.whole().unwrap_err();
        assert!(
            error.is_of_row() && error.to_string().contains(&two.id.to_string()),
            "{error}"
        );
        let mut seen = 0;
        stores.keystore.each_envelope(|_| seen += 1).unwrap();
        assert_eq!(seen, 2, "{damage}");
        assert!(
            stores.keystore.envelope(two.id).unwrap_err().is_of_row(),
            "{damage}"
        );
        assert!(stores.keystore.readable_envelope(two.id).unwrap().is_none());
        assert!(stores.keystore.envelope(one.id).unwrap().is_some());
        // Who may not have it is still told by the index.
        let index = std::fs::read_to_string(dir.path().join(HookIndex::FILE)).unwrap();
        assert!(index.contains(&two.id.0.simple().to_string()), "{damage}");
        drop(stores);
        let stores = Stores::open(dir.path()).unwrap();
        let index = std::fs::read_to_string(dir.path().join(HookIndex::FILE)).unwrap();
        let told = index.contains(&two.id.0.simple().to_string());
        assert!(told, "{damage}");

        // A verified copy takes its place, and the row is kept.
        assert_eq!(
            stores.keystore.put(&two, "/images/b").unwrap(),
            Put::Adopted,
            "{damage}"
        );
        let healed = stores.keystore.envelope(two.id).unwrap().unwrap();
        assert_eq!(
            (healed.envelope, healed.location.as_str()),
            (two.clone().into_envelope(), "/images/b")
        );
        stores.keystore.envelopes().unwrap().whole().unwrap();
        let aside = |connection: &Connection| -> i64 {
            let sql = "SELECT count(*) FROM damaged_envelopes";
            connection.query_row(sql, [], |row| row.get(0)).unwrap()
        };
        assert_eq!(aside(&raw(&stores)), 1, "{damage}");
        // That it holds keys, too, ends with the VM's.
        stores.keystore.shred_vm(two.vm).unwrap();
        let left = aside(&raw(&stores));
        assert!(left == 0 || !tells_vm, "{damage}");
    }
}

#[test]
fn a_job_passes_a_damaged_envelope_and_says_so() {
    for damage in [DAMAGES[0], "id = 'nothing'", "id = x'ff'"] {
        let dir = tempfile::tempdir().unwrap();
        let stores = Stores::open(dir.path()).unwrap();
        let all = [0; 5].map(|_| envelope(VmId::random()));
        for envelope in &all {
            stores.keystore.put(envelope, "").unwrap();
        }
        edit(
            &stores,
            &format!("UPDATE envelopes SET {damage} WHERE id = '{}'", all[2].id),
        );
        let mut job = stores.keystore.insert_job(&sweep(&[])).unwrap();
        let mut seen = 0;
        while job.pass == Pass::All {
            let batch = stores.keystore.next_of_job(&job, 2).unwrap();
            let mut verdicts: Vec<_> = batch.damaged.into_iter().map(Verdict::Damaged).collect();
            seen += batch.sound.len();
            verdicts.extend(
                batch
                    .sound
                    .iter()
                    .map(|record| Verdict::Unchanged(record.envelope.id)),
            );
            job = match verdicts.is_empty() {
                true => stores.keystore.end_pass(job.id).unwrap(),
                false => stores.keystore.commit_batch(job.id, &verdicts).unwrap(),
            };
        }
        assert_eq!((seen, job.left), (4, 1), "{damage}");
        assert_eq!(job.state.as_str(), "incomplete");
        stores.keystore.left_behind(job.id, 10).unwrap();
        stores.keystore.jobs(10).unwrap().whole().unwrap();
    }
}

#[test]
fn a_damaged_row_of_any_table_is_named_and_hides_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let stores = Stores::open(dir.path()).unwrap();
    let (vm, provider) = (VmId::random(), ProviderId::random());
    let known = envelope(vm);
    stores.keystore.put(&known, "/images/a").unwrap();
    stores.keystore.remember_vm(vm, "web01").unwrap();
    stores.keystore.remember_vm(VmId::random(), "web02").unwrap();
    let root = NativeRoot {
        generation: 1,
        encrypted: b"age".to_vec(),
        backed_up_at: None,
    };
    stores.providers().insert_native(provider, "main", &root).unwrap();
    for place in [CopyPlace::Xml, CopyPlace::Image] {
        stores.host_store.copy_is_behind(&known, place).unwrap();
    }
    for kek in ["a", "b"] {
        stores
            .keystore
            .note_made_kek(&MadeKek {
                vm,
                provider,
                kek: KekId(kek.into()),
            })
            .unwrap();
    }
    stores.host_store.note_saved(vm, &[]).unwrap();
    stores
        .host_store
        .journal_header(known.id, "/images/a", b"patch")
        .unwrap();
    let job = stores.keystore.insert_job(&sweep(&[])).unwrap();
    edit(
        &stores,
        &format!(
            "UPDATE vms SET sealed_at = 'once' WHERE name = 'web01';
             INSERT INTO providers VALUES ('nobody', 'broken', 'native', 0, 0, '{{}}');
             INSERT INTO providers VALUES ('{0}', 'unset', 'kmip', 0, 0, '{{');
             INSERT INTO deleted_providers VALUES ('{0}', 'old', 'native', 1), ('x', 'older', 'native', 1);
             INSERT INTO retired_keks VALUES ('{1}', 'k1', '{2}', 1), ('x', 'k2', '{2}', 1), ('{0}', 'k3', 'x', 1);
             INSERT INTO stale_copies VALUES ('x', 'xml', '{0}', 'k', 1, '');
             INSERT INTO header_journal VALUES ('x', '/images/b', x'00');
             UPDATE made_keks SET vm = 'x' WHERE kek = 'a';
             INSERT INTO master_keys_on_disk VALUES ('x', 'why');
             INSERT INTO saved_states VALUES ('x', 1, '[]'), ('{0}', 1, '[\"{{\"]');
             INSERT INTO jobs SELECT NULL, task, 'asleep', pass, cursor, total, seen, changed, waiting, created, updated, vm, path, failure FROM jobs;
             UPDATE jobs SET task = x'ff', total = 'many', cursor = x'00' WHERE state = 'running';
             INSERT INTO left_behind VALUES (1, 'x', x'ff', 'maybe')",
            ProviderId::random(),
            provider,
            vm
        ),
    );
    fn check<T>(rows: Result<Rows<T>, StoreError>, sound: usize, damaged: usize) {
        let rows = rows.unwrap();
        assert_eq!(
            (rows.sound.len(), rows.damaged.len()),
            (sound, damaged),
            "{:?}",
            rows.damaged
        );
        assert!(rows.whole().is_err_and(|error| error.is_of_row()));
    }
    check(stores.keystore.vms(), 1, 1);
    check(stores.keystore.providers(), 1, 2);
    check(stores.keystore.deleted_providers(), 1, 1);
    check(stores.keystore.retired_keks(), 1, 2);
    check(stores.host_store.needed_keks(), 2, 1);
    check(stores.host_store.journaled_headers(), 1, 1);
    check(stores.keystore.made_keks(), 1, 1);
    check(stores.host_store.saved_states(), 1, 2);
    check(stores.host_store.master_keys_on_disk(), 0, 1);
    check(stores.keystore.jobs(10), 1, 1);
    assert_eq!(
        stores
            .host_store
            .stale_copies(CopyPlace::Xml, None, 1)
            .unwrap()
            .len(),
        1
    );
    // What was taken out of use stays out of it, whoever that was of.
    let retired = stores.keystore.retired_of(provider).unwrap();
    assert!(
        retired.len() == 2 && retired.contains(&KekId("k2".into())),
        "{retired:?}"
    );
    // Its VM's next start mends what was noted of it, on the safe side.
    assert!(stores.keystore.vm(vm).unwrap_err().is_of_row());
    assert!(stores.keystore.vtpm_was_seen(vm).unwrap());
    stores.keystore.remember_vm(vm, "web01").unwrap();
    assert!(stores.keystore.vm(vm).unwrap().unwrap().vtpm_seen);
    stores.host_store.forget_saved(vm).unwrap();
    // And the job can be ended.
    assert_eq!(stores.keystore.running_jobs().unwrap().len(), 1);
    stores.keystore.left_behind(job.id, 10).unwrap();
    stores.keystore.abort_job(job.id).unwrap();
    assert_eq!(stores.keystore.running_jobs().unwrap(), []);
}

#[test]
fn a_damaged_note_of_the_audit_log_is_one_of_a_row() {
    let dir = tempfile::tempdir().unwrap();
    let stores = Stores::open(dir.path()).unwrap();
    let anchor = AuditAnchor {
        seq: 3,
        hash: [9; 32],
    };
    stores.host_store.set_audit_anchor(anchor).unwrap();
    for damage in ["seq = -1", "hash = x'00'", "hash = 7"] {
        edit(&stores, &format!("UPDATE audit_anchor SET {damage}"));
        assert!(
            stores.host_store.audit_anchor().unwrap_err().is_of_row(),
            "{damage}"
        );
        stores.host_store.set_audit_anchor(anchor).unwrap();
    }
    let none: i64 = raw(&stores)
        .query_row(
            "SELECT count(*) FROM audit_anchor WHERE seq = ?1",
            params![3],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(none, 1);
}

/// What an earlier virtseal left, also where somebody made it believe in a generation that nothing comes after.
#[test]
fn a_row_of_format_1_is_believed_and_upgraded() {
    let dir = tempfile::tempdir().unwrap();
    let stores = Stores::open(dir.path()).unwrap();
    let made = envelope(VmId::random());
    stores.keystore.put(&made, "a").unwrap();
    for generation in [1, i64::MAX] {
        let mut old: serde_json::Value = serde_json::from_str(&made.to_json()).unwrap();
        old["version"] = 1.into();
        old["generation"] = generation.into();
        let fields = old.as_object_mut().unwrap();
        fields.retain(|field, _| !["mac", "seen", "shared_with"].contains(&field.as_str()));
        let sql = "UPDATE envelopes SET json = ?1, generation = ?2";
        raw(&stores)
            .execute(sql, params![old.to_string(), generation])
            .unwrap();
        let record = stores.keystore.envelope(made.id).unwrap().unwrap();
        assert_eq!(record.envelope.format(), 1);
        let next = record.verify(&dek()).unwrap();
        assert_eq!(stores.keystore.put(&next, "a").unwrap(), Put::Updated);
        let record = stores.keystore.envelope(made.id).unwrap().unwrap();
        assert_eq!(record.verify(&dek()).unwrap(), next);
        assert!(record.verify(&crate::secret::Dek::random().unwrap()).is_err());
    }
}

#[test]
fn row_edited_by_hand_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let stores = Stores::open(dir.path()).unwrap();
    let envelope = envelope(VmId::random());
    stores.keystore.put(&envelope, "").unwrap();
    let sql = "UPDATE envelopes SET generation = 7";
    raw(&stores).execute(sql, []).unwrap();
    assert!(matches!(
        stores.keystore.envelope(envelope.id),
        Err(StoreError::Inconsistent { .. })
    ));
    let sql = "UPDATE envelopes SET generation = 1, json = '{}'";
    raw(&stores).execute(sql, []).unwrap();
    assert!(matches!(
        stores.keystore.envelope(envelope.id),
        Err(StoreError::Inconsistent { .. })
    ));
}

#[test]
fn records_survive_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, other) = (VmId::random(), VmId::random());
    let (first, second) = (envelope(vm), envelope(other));
    {
        let stores = Stores::open(dir.path()).unwrap();
        stores
            .keystore
            .insert_pending(&first, "/images/web01.qcow2")
            .unwrap();
        stores.keystore.insert_pending(&second, "").unwrap();
        assert_eq!(stores.keystore.activate(first.id).unwrap(), Change::Changed);
        assert_eq!(stores.keystore.activate(first.id).unwrap(), Change::Unchanged);
        stores.keystore.remember_vm(vm, "web01").unwrap();
        assert_eq!(stores.keystore.set_vtpm_seen(vm).unwrap(), Change::Changed);
    }
    let stores = Stores::open(dir.path()).unwrap();
    let record = stores.keystore.envelope(first.id).unwrap().unwrap();
    assert_eq!(record.envelope, *first);
    assert_eq!(record.state, EnvelopeState::Active);
    assert_eq!(record.location, "/images/web01.qcow2");
    assert_eq!(
        stores.keystore.envelopes_of(vm).unwrap().whole().unwrap(),
        [record]
    );
    assert_eq!(stores.keystore.envelopes().unwrap().whole().unwrap().len(), 2);
    let mut seen = Vec::new();
    stores
        .keystore
        .each_envelope(|record| seen.push(record.envelope))
        .unwrap();
    assert!(seen.len() == 2 && seen.contains(&*first) && seen.contains(&*second));
    assert_eq!(
        stores.keystore.envelope(second.id).unwrap().unwrap().state,
        EnvelopeState::Pending
    );
    let known = stores.keystore.vm(vm).unwrap().unwrap();
    assert_eq!((known.name.as_str(), known.vtpm_seen), ("web01", true));
}
