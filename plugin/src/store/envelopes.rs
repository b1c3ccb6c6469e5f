//! Rows of envelopes.

use rusqlite::{Connection, Row, Transaction, params};

use super::copies::{self, CopyPlace};
use super::rows::{self, Named, Rows};
use super::{Change, Keystore, KeystoreError, UnixTime, error::StoreFault, jobs, now};
use crate::model::envelope::{Envelope, EnvelopeError, EnvelopeId, Format1, Precedence, Verified, VmId};
use crate::secret::Dek;

/// Whether an envelope's object is known to open with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EnvelopeState {
    /// Written before its object was; the object may not exist yet.
    Pending,
    /// Its object was opened with it.
    Active,
}

impl EnvelopeState {
    /// The word in the keystore and in messages.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Active => "active",
        }
    }
}

/// An envelope as this host knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnvelopeRecord {
    /// The envelope.
    pub envelope: Envelope,
    /// Whether its object is known to open.
    pub state: EnvelopeState,
    /// The object's path as text; empty where the VM's UUID says it all (a vTPM).
    pub location: String,
    /// When it came here.
    pub created: UnixTime,
    /// When it last changed.
    pub updated: UnixTime,
}

impl EnvelopeRecord {
    /// Its envelope, once a stanza of it has opened to `dek`. A format 1 is upgraded: root alone writes the keystore.
    ///
    /// # Errors
    /// When its MAC is not one by `dek`.
    pub fn verify(&self, dek: &Dek) -> Result<Verified, EnvelopeError> {
        self.envelope.upgrade(dek, Format1::OfKeystore)
    }
}

/// What [`Keystore::put`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// It was unknown here.
    Adopted,
    /// It replaced a lower generation.
    Updated,
    /// It is what the keystore has.
    Unchanged,
    /// The keystore has a higher generation, which stays.
    Stale,
}

/// Also the place of a row, for who goes on from there.
const SELECTED: &str = "rowid, id, vm, kind, generation, json, state, location, created, updated";
const COLUMNS: &str = "id, vm, kind, generation, json, state, location, created, updated";
const NAMED: Named = Named("envelope", "id");

impl Keystore {
    /// Adds a new envelope as pending, before its object is made at `location`.
    ///
    /// # Errors
    /// [`KeystoreError::EnvelopeExists`] when the id is taken.
    pub fn insert_pending(&self, envelope: &Verified, location: &str) -> Result<(), KeystoreError> {
        self.write(|transaction| {
            if find(transaction, envelope.id)?.is_some() {
                return Err(KeystoreError::EnvelopeExists(envelope.id).into());
            }
            insert(transaction, envelope, EnvelopeState::Pending, location)
        })
    }

    /// Marks an envelope active, once its object was opened with it.
    pub fn activate(&self, id: EnvelopeId) -> Result<Change, KeystoreError> {
        self.update(id, "state", EnvelopeState::Active.as_str())
    }

    /// Removes an envelope that is still pending, and nothing else. Only for who has inserted it, and knows that no object
    /// was made with it.
    pub fn withdraw(&self, id: EnvelopeId) -> Result<Change, KeystoreError> {
        self.write(|transaction| {
            let pending = "SELECT id FROM envelopes WHERE id = ?1 AND state = 'pending'";
            for table in ["stale_copies", "left_behind"] {
                let sql = format!("DELETE FROM {table} WHERE envelope IN ({pending})");
                transaction.execute(&sql, [id.to_string()])?;
            }
            let rows = transaction.execute(
                "DELETE FROM envelopes WHERE id = ?1 AND state = 'pending'",
                [id.to_string()],
            )?;
            Ok(Change::of_rows(rows))
        })
    }

    /// Notes that an envelope's object is at another path now.
    pub fn set_location(&self, id: EnvelopeId, location: &str) -> Result<Change, KeystoreError> {
        self.update(id, "location", location)
    }

    fn update(&self, id: EnvelopeId, column: &str, value: &str) -> Result<Change, KeystoreError> {
        self.write(|transaction| {
            if find(transaction, id)?.is_none() {
                return Err(KeystoreError::UnknownEnvelope(id).into());
            }
            let rows = transaction.execute(
                &format!("UPDATE envelopes SET {column} = ?2, updated = ?3 WHERE id = ?1 AND {column} <> ?2"),
                params![id.to_string(), value, now()],
            )?;
            Ok(Change::of_rows(rows))
        })
    }

    /// Takes over an envelope whose object has opened with the DEK that verified it: a copy from a domain's XML or an
    /// image, or a new generation made here. The newest wins; an unknown one becomes active at `location`, and so does one whose
    /// row is damaged: that is kept aside.
    ///
    /// # Errors
    /// [`KeystoreError::Conflict`] for another envelope of the same generation, [`KeystoreError::OtherObject`]
    /// when VM or kind differ from what the keystore has. Neither changes anything.
    pub fn put(&self, envelope: &Verified, location: &str) -> Result<Put, KeystoreError> {
        self.write(|transaction| take_over(transaction, envelope, EnvelopeState::Active, location))
    }

    /// The envelope called `id`.
    ///
    /// # Errors
    /// [`KeystoreError::Inconsistent`] when its row is damaged.
    pub fn envelope(&self, id: EnvelopeId) -> Result<Option<EnvelopeRecord>, KeystoreError> {
        self.read(|connection| find(connection, id))
    }

    /// The envelope called `id`, if there is one that can be read: what is believed in its place takes the place of a damaged
    /// row, see [`Keystore::put`].
    pub fn readable_envelope(&self, id: EnvelopeId) -> Result<Option<EnvelopeRecord>, KeystoreError> {
        match self.envelope(id) {
            Err(error) if error.is_of_row() => Ok(None),
            found => found,
        }
    }

    /// What a damaged row of `id` still has: a copy like any other, until it was verified.
    pub fn held_envelope(&self, id: EnvelopeId) -> Result<Option<Envelope>, KeystoreError> {
        let rows = self.read(|connection| select(connection, "WHERE id = ?1", [id.to_string()]))?;
        let held = rows.damaged.into_iter().find_map(|row| row.holds);
        Ok(held.map(|held| held.envelope))
    }

    /// The envelopes of one VM, oldest first.
    pub fn envelopes_of(&self, vm: VmId) -> Result<Rows<EnvelopeRecord>, KeystoreError> {
        self.read(|connection| select(connection, "WHERE vm = ?1 ORDER BY created, id", [vm.to_string()]))
    }

    /// Shows `visit` every envelope whose row can be read, one at a time: there may be too many for the memory. It must not use
    /// the keystore.
    pub fn each_envelope(&self, mut visit: impl FnMut(EnvelopeRecord)) -> Result<(), KeystoreError> {
        self.read(|connection| {
            let sql = format!("SELECT {SELECTED} FROM envelopes");
            rows::each(connection, &sql, [], NAMED, record_of, |row| {
                row.into_iter().for_each(&mut visit);
                true
            })
        })
    }

    /// All envelopes, by VM.
    pub fn envelopes(&self) -> Result<Rows<EnvelopeRecord>, KeystoreError> {
        self.read(|connection| select(connection, "ORDER BY vm, created, id", []))
    }
}

/// Only for what was verified, or was a row of the keystore before.
pub(super) fn take_over(
    transaction: &Transaction,
    envelope: &Envelope,
    state: EnvelopeState,
    location: &str,
) -> Result<Put, StoreFault> {
    let known = find(transaction, envelope.id).or_else(|fault| match fault {
        StoreFault::Refused(error) if error.is_of_row() => set_aside(transaction, envelope.id).map(|()| None),
        fault => Err(fault),
    })?;
    let verdict = compare(known.as_ref().map(|record| &record.envelope), envelope)?;
    match verdict {
        Put::Adopted => insert(transaction, envelope, state, location)?,
        Put::Updated => {
            // XML and image may still have the earlier one; the next look at them tells.
            if let Some(known) = &known {
                for place in [CopyPlace::Xml, CopyPlace::Image] {
                    copies::note_stale(transaction, &known.envelope, place)?;
                }
            }
            transaction.execute(
                "UPDATE envelopes SET generation = ?2, json = ?3, updated = ?4 WHERE id = ?1",
                params![
                    envelope.id.to_string(),
                    storable_generation(envelope)?,
                    envelope.to_json(),
                    now()
                ],
            )?;
            jobs::add_to_running_sweeps(transaction, envelope.id)?;
        }
        Put::Unchanged | Put::Stale => {}
    }
    Ok(verdict)
}

/// Makes room for the envelope of a row that can't be read.
fn set_aside(transaction: &Transaction, id: EnvelopeId) -> Result<(), StoreFault> {
    let id = id.to_string();
    transaction.execute(
        "INSERT INTO damaged_envelopes (id, vm, kind, generation, json, state, location, since)
         SELECT id, vm, kind, generation, json, state, location, ?2 FROM envelopes WHERE id = ?1",
        params![id, now()],
    )?;
    transaction.execute("DELETE FROM envelopes WHERE id = ?1", [&id])?;
    Ok(())
}

/// What becomes of `offered` beside what the keystore knows under its id.
fn compare(known: Option<&Envelope>, offered: &Envelope) -> Result<Put, KeystoreError> {
    let Some(known) = known else {
        return Ok(Put::Adopted);
    };
    if (known.vm, known.kind) != (offered.vm, offered.kind) {
        return Err(KeystoreError::OtherObject {
            id: known.id,
            known: format!("{} of VM {}", known.kind, known.vm),
            offered: format!("{} of VM {}", offered.kind, offered.vm),
        });
    }
    match offered.supersedes(known) {
        Precedence::Older => Ok(Put::Stale),
        Precedence::Newer => Ok(Put::Updated),
        Precedence::Same => Ok(Put::Unchanged),
        Precedence::Conflict => Err(KeystoreError::Conflict {
            id: known.id,
            generation: known.generation,
        }),
    }
}

/// SQLite's integers end at 2^63-1, as those of format 2 do.
pub(super) fn storable_generation(envelope: &Envelope) -> Result<i64, KeystoreError> {
    let stored = envelope.generation.stored();
    stored.ok_or_else(|| KeystoreError::GenerationTooHigh {
        id: envelope.id,
        generation: envelope.generation,
    })
}

fn insert(
    connection: &Connection,
    envelope: &Envelope,
    state: EnvelopeState,
    location: &str,
) -> Result<(), StoreFault> {
    connection.execute(
        &format!("INSERT INTO envelopes ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?8)"),
        params![
            envelope.id.to_string(),
            envelope.vm.to_string(),
            envelope.kind.as_str(),
            storable_generation(envelope)?,
            envelope.to_json(),
            state.as_str(),
            location,
            now()
        ],
    )?;
    jobs::add_to_running_sweeps(connection, envelope.id)
}

fn find(connection: &Connection, id: EnvelopeId) -> Result<Option<EnvelopeRecord>, StoreFault> {
    let found = select(connection, "WHERE id = ?1", [id.to_string()])?;
    Ok(found.whole()?.pop())
}

pub(super) fn select(
    connection: &Connection,
    condition: &str,
    values: impl rusqlite::Params,
) -> Result<Rows<EnvelopeRecord>, StoreFault> {
    let sql = format!("SELECT {SELECTED} FROM envelopes {condition}");
    rows::collect(connection, &sql, values, NAMED, record_of)
}

/// Reads a row, and refuses one whose columns say something else than its envelope.
fn record_of(row: &Row) -> Result<EnvelopeRecord, StoreFault> {
    let (id, json): (String, String) = (row.get("id")?, row.get("json")?);
    let inconsistent = |why: &str| KeystoreError::Inconsistent {
        row: format!("of envelope {id}"),
        why: why.to_owned(),
    };
    let known_as: EnvelopeId = id.parse().map_err(|_| inconsistent("its id is not a UUID"))?;
    let envelope =
        Envelope::from_json(&json).map_err(|source| KeystoreError::DamagedRecord { id: known_as, source })?;
    let columns: (String, String, i64) = (row.get("vm")?, row.get("kind")?, row.get("generation")?);
    let expected = (
        envelope.vm.to_string(),
        envelope.kind.as_str().to_owned(),
        storable_generation(&envelope)?,
    );
    if envelope.id != known_as || columns != expected {
        return Err(inconsistent("its columns are not those of its envelope").into());
    }
    let state = match row.get::<_, String>("state")?.as_str() {
        "pending" => EnvelopeState::Pending,
        "active" => EnvelopeState::Active,
        other => return Err(inconsistent(&format!("its state is {other:?}")).into()),
    };
    Ok(EnvelopeRecord {
        envelope,
        state,
        location: row.get("location")?,
        created: row.get("created")?,
        updated: row.get("updated")?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::envelope::{Binding, Generation, KekId, ObjectKind, ProviderId, Stanza};

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

    fn changed(of: &Verified, change: impl FnOnce(&mut Envelope)) -> Verified {
        let mut envelope = of.clone().into_envelope();
        change(&mut envelope);
        Verified::of_test(envelope, &dek())
    }

    fn version(of: &Verified, generation: u64, body: u8) -> Verified {
        changed(of, |envelope| {
            envelope.generation = Generation::of_test(generation);
            envelope.stanzas[0].body = vec![body; 92];
        })
    }

    #[test]
    fn records_survive_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, other) = (VmId::random(), VmId::random());
        let (first, second) = (envelope(vm), envelope(other));
        {
            let keystore = Keystore::open(dir.path()).unwrap();
            keystore.insert_pending(&first, "/images/web01.qcow2").unwrap();
            keystore.insert_pending(&second, "").unwrap();
            assert_eq!(keystore.activate(first.id).unwrap(), Change::Changed);
            assert_eq!(keystore.activate(first.id).unwrap(), Change::Unchanged);
            keystore.remember_vm(vm, "web01").unwrap();
            assert_eq!(keystore.set_vtpm_seen(vm).unwrap(), Change::Changed);
        }
        let keystore = Keystore::open(dir.path()).unwrap();
        let record = keystore.envelope(first.id).unwrap().unwrap();
        assert_eq!(record.envelope, *first);
        assert_eq!(record.state, EnvelopeState::Active);
        assert_eq!(record.location, "/images/web01.qcow2");
        assert_eq!(keystore.envelopes_of(vm).unwrap().whole().unwrap(), [record]);
        assert_eq!(keystore.envelopes().unwrap().whole().unwrap().len(), 2);
        let mut seen = Vec::new();
        keystore
            .each_envelope(|record| seen.push(record.envelope))
            .unwrap();
        assert!(seen.len() == 2 && seen.contains(&*first) && seen.contains(&*second));
        assert_eq!(
            keystore.envelope(second.id).unwrap().unwrap().state,
            EnvelopeState::Pending
        );
        let known = keystore.vm(vm).unwrap().unwrap();
        assert_eq!((known.name.as_str(), known.vtpm_seen), ("web01", true));
    }

    #[test]
    fn same_id_twice_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        let envelope = envelope(VmId::random());
        keystore.insert_pending(&envelope, "a").unwrap();
        let again = keystore.insert_pending(&version(&envelope, 5, 5), "b");
        assert!(matches!(again, Err(KeystoreError::EnvelopeExists(_))));
        assert_eq!(keystore.envelope(envelope.id).unwrap().unwrap().location, "a");
        let nobody = EnvelopeId::random();
        assert!(matches!(
            keystore.activate(nobody),
            Err(KeystoreError::UnknownEnvelope(id)) if id == nobody
        ));
    }

    #[test]
    fn only_what_is_pending_is_withdrawn() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        let (failed, made) = (envelope(VmId::random()), envelope(VmId::random()));
        for envelope in [&failed, &made] {
            keystore.insert_pending(envelope, "/images/web01.qcow2").unwrap();
        }
        keystore.activate(made.id).unwrap();
        assert_eq!(keystore.withdraw(made.id).unwrap(), Change::Unchanged);
        assert_eq!(keystore.withdraw(failed.id).unwrap(), Change::Changed);
        assert_eq!(keystore.withdraw(failed.id).unwrap(), Change::Unchanged);
        let left = keystore.envelopes().unwrap().whole().unwrap();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].envelope, *made);
    }

    #[test]
    fn location_follows_a_moved_disk() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        let envelope = envelope(VmId::random());
        keystore.insert_pending(&envelope, "a").unwrap();
        assert_eq!(
            keystore.set_location(envelope.id, "a").unwrap(),
            Change::Unchanged
        );
        assert_eq!(keystore.set_location(envelope.id, "b").unwrap(), Change::Changed);
        assert_eq!(keystore.envelope(envelope.id).unwrap().unwrap().location, "b");
    }

    #[test]
    fn envelope_never_changes_its_vm_or_kind() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        let envelope = envelope(VmId::random());
        keystore.put(&envelope, "a").unwrap();
        let moved = changed(&envelope, |envelope| {
            envelope.generation = Generation::of_test(9);
            envelope.vm = VmId::random();
        });
        assert!(matches!(
            keystore.put(&moved, "a"),
            Err(KeystoreError::OtherObject { .. })
        ));
        let other_kind = changed(&envelope, |envelope| {
            envelope.generation = Generation::of_test(9);
            envelope.kind = ObjectKind::Vtpm;
        });
        assert!(matches!(
            keystore.put(&other_kind, "a"),
            Err(KeystoreError::OtherObject { .. })
        ));
        assert_eq!(
            keystore.envelope(envelope.id).unwrap().unwrap().envelope,
            *envelope
        );
    }

    /// What an earlier virtseal left, also where somebody made it believe in a generation that nothing comes after.
    #[test]
    fn a_row_of_format_1_is_believed_and_upgraded() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        let made = envelope(VmId::random());
        keystore.put(&made, "a").unwrap();
        for generation in [1, i64::MAX] {
            let mut old: serde_json::Value = serde_json::from_str(&made.to_json()).unwrap();
            old["version"] = 1.into();
            old["generation"] = generation.into();
            let fields = old.as_object_mut().unwrap();
            fields.retain(|field, _| !["mac", "seen", "shared_with"].contains(&field.as_str()));
            let sql = "UPDATE envelopes SET json = ?1, generation = ?2";
            keystore
                .connection()
                .execute(sql, params![old.to_string(), generation])
                .unwrap();
            let record = keystore.envelope(made.id).unwrap().unwrap();
            assert_eq!(record.envelope.format(), 1);
            let next = record.verify(&dek()).unwrap();
            assert_eq!(keystore.put(&next, "a").unwrap(), Put::Updated);
            let record = keystore.envelope(made.id).unwrap().unwrap();
            assert_eq!(record.verify(&dek()).unwrap(), next);
            assert!(record.verify(&Dek::random().unwrap()).is_err());
        }
    }

    #[test]
    fn row_edited_by_hand_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        let envelope = envelope(VmId::random());
        keystore.put(&envelope, "").unwrap();
        let sql = "UPDATE envelopes SET generation = 7";
        keystore.connection().execute(sql, []).unwrap();
        assert!(matches!(
            keystore.envelope(envelope.id),
            Err(KeystoreError::Inconsistent { .. })
        ));
        let sql = "UPDATE envelopes SET generation = 1, json = '{}'";
        keystore.connection().execute(sql, []).unwrap();
        assert!(matches!(
            keystore.envelope(envelope.id),
            Err(KeystoreError::Inconsistent { .. })
        ));
    }

    #[derive(Clone, Debug)]
    struct Offer {
        generation: u64,
        body: u8,
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn highest_generation_wins(
            offers in prop::collection::vec(
                (1..5_u64, 0..2_u8).prop_map(|(generation, body)| Offer { generation, body }), 1..8)
        ) {
            let dir = tempfile::tempdir().unwrap();
            let keystore = Keystore::open(dir.path()).unwrap();
            let base = envelope(VmId::random());
            let mut model: Option<Offer> = None;
            for offer in offers {
                let outcome = keystore.put(&version(&base, offer.generation, offer.body), "");
                match &model {
                    None => prop_assert_eq!(outcome.unwrap(), Put::Adopted),
                    Some(known) if offer.generation > known.generation => {
                        prop_assert_eq!(outcome.unwrap(), Put::Updated);
                    }
                    Some(known) if offer.generation < known.generation => {
                        prop_assert_eq!(outcome.unwrap(), Put::Stale);
                    }
                    Some(known) if offer.body == known.body => {
                        prop_assert_eq!(outcome.unwrap(), Put::Unchanged);
                    }
                    Some(known) => {
                        let error = outcome.unwrap_err();
                        prop_assert!(error.to_string().contains(&base.id.to_string()));
                        let conflict = matches!(error, KeystoreError::Conflict { generation, .. }
                            if generation == Generation::of_test(known.generation));
                        prop_assert!(conflict);
                        continue;
                    }
                }
                if model.as_ref().is_none_or(|known| offer.generation > known.generation) {
                    model = Some(offer);
                }
                let known = model.as_ref().unwrap();
                let stored = keystore.envelope(base.id).unwrap().unwrap();
                prop_assert_eq!(stored.envelope, version(&base, known.generation, known.body).into_envelope());
                prop_assert_eq!(stored.state, EnvelopeState::Active);
            }
        }
    }
}
