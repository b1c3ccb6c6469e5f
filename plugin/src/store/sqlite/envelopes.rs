//! Rows of envelopes.

use rusqlite::{Connection, Row, Transaction, params};

use super::database::{Database, now};
use super::fault::StoreFault;
use super::rows::{self, Named};
use super::{copies, left_behind, providers};
use crate::model::envelope::{Envelope, EnvelopeId, Verified, VmId};
use crate::store::damage::Rows;
use crate::store::error::StoreError;
use crate::store::host_records::CopyPlace;
use crate::store::records::{Change, EnvelopeRecord, EnvelopeState, PageEnd, Put};
use crate::store::shared::Envelopes;

/// How many envelopes a page has.
const PAGE: usize = 500;
/// Also the place of a row, for who goes on from there.
const SELECTED: &str = "rowid, id, vm, kind, generation, json, state, location, created, updated";
const COLUMNS: &str = "id, vm, kind, generation, json, state, location, created, updated";
const NAMED: Named = Named("envelope", "id");

impl Envelopes for Database {
    fn insert_pending(&self, envelope: &Verified, location: &str) -> Result<(), StoreError> {
        self.write(|transaction| {
            if find(transaction, envelope.id)?.is_some() {
                return Err(StoreError::EnvelopeExists(envelope.id).into());
            }
            providers::refuse_deleted(transaction, &envelope.stanzas)?;
            insert(transaction, envelope, EnvelopeState::Pending, location)
        })
    }

    fn activate(&self, id: EnvelopeId) -> Result<Change, StoreError> {
        self.update(id, "state", EnvelopeState::Active.as_str())
    }

    fn withdraw(&self, id: EnvelopeId) -> Result<Change, StoreError> {
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

    fn set_location(&self, id: EnvelopeId, location: &str) -> Result<Change, StoreError> {
        self.update(id, "location", location)
    }

    fn put(&self, envelope: &Verified, location: &str) -> Result<Put, StoreError> {
        self.write(|transaction| take_over(transaction, envelope, EnvelopeState::Active, location))
    }

    fn envelope(&self, id: EnvelopeId) -> Result<Option<EnvelopeRecord>, StoreError> {
        self.read(|connection| find(connection, id))
    }

    fn held_envelope(&self, id: EnvelopeId) -> Result<Option<Envelope>, StoreError> {
        let rows = self.read(|connection| select(connection, "WHERE id = ?1", [id.to_string()]))?;
        let held = rows.damaged.into_iter().find_map(|row| row.holds);
        Ok(held.map(|held| held.envelope))
    }

    fn envelopes_of(&self, vm: VmId) -> Result<Rows<EnvelopeRecord>, StoreError> {
        self.read(|connection| select(connection, "WHERE vm = ?1 ORDER BY created, id", [vm.to_string()]))
    }

    fn envelopes(&self) -> Result<Rows<EnvelopeRecord>, StoreError> {
        self.read(|connection| select(connection, "ORDER BY vm, created, id", []))
    }

    fn envelope_page(
        &self,
        after: Option<&PageEnd>,
    ) -> Result<(Vec<EnvelopeRecord>, Option<PageEnd>), StoreError> {
        let place: i64 = after.map_or(0, |PageEnd(place)| place.parse().unwrap_or(i64::MAX));
        self.read(|connection| {
            let sql =
                format!("SELECT {SELECTED} FROM envelopes WHERE rowid > ?1 ORDER BY rowid LIMIT {PAGE}");
            let (mut page, mut last, mut count) = (Vec::new(), place, 0);
            let row_of = |row: &Row| Ok((row.get::<_, i64>("rowid")?, record_of(row)?));
            rows::each(connection, &sql, [place], NAMED, row_of, |row| {
                count += 1;
                match row {
                    Ok((place, record)) => {
                        last = place;
                        page.push(record);
                    }
                    Err(damaged) => last = damaged.place,
                }
                true
            })?;
            Ok((page, (count == PAGE).then(|| PageEnd(last.to_string()))))
        })
    }

    fn forget_envelope(&self, saved: &EnvelopeRecord) -> Result<Change, StoreError> {
        self.write(|transaction| {
            let id = saved.envelope.id.to_string();
            let known = select(transaction, "WHERE id = ?1", [&id])?;
            if known.whole()?.first() != Some(saved) {
                return Ok(Change::Unchanged);
            }
            for table in ["stale_copies", "left_behind", "header_journal"] {
                transaction.execute(&format!("DELETE FROM {table} WHERE envelope = ?1"), [&id])?;
            }
            transaction.execute("DELETE FROM envelopes WHERE id = ?1", [&id])?;
            Ok(Change::Changed)
        })
    }

    fn bring_back(&self, record: &EnvelopeRecord) -> Result<Put, StoreError> {
        self.write(|transaction| take_over(transaction, &record.envelope, record.state, &record.location))
    }
}

impl Database {
    fn update(&self, id: EnvelopeId, column: &str, value: &str) -> Result<Change, StoreError> {
        self.write(|transaction| {
            if find(transaction, id)?.is_none() {
                return Err(StoreError::UnknownEnvelope(id).into());
            }
            let rows = transaction.execute(
                &format!("UPDATE envelopes SET {column} = ?2, updated = ?3 WHERE id = ?1 AND {column} <> ?2"),
                params![id.to_string(), value, now()],
            )?;
            Ok(Change::of_rows(rows))
        })
    }
}

/// Only for what was verified, or was a row of the keystore before.
pub(crate) fn take_over(
    transaction: &Transaction,
    envelope: &Envelope,
    state: EnvelopeState,
    location: &str,
) -> Result<Put, StoreFault> {
    let known = find(transaction, envelope.id).or_else(|fault| match fault {
        StoreFault::Refused(error) if error.is_of_row() => set_aside(transaction, envelope.id).map(|()| None),
        fault => Err(fault),
    })?;
    let verdict = Put::of(known.as_ref().map(|record| &record.envelope), envelope)?;
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
            left_behind::add_to_running_sweeps(transaction, envelope.id)?;
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

/// SQLite's integers end at 2^63-1, as those of format 2 do.
pub(crate) fn storable_generation(envelope: &Envelope) -> Result<i64, StoreError> {
    let stored = envelope.generation.stored();
    stored.ok_or_else(|| StoreError::GenerationTooHigh {
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
    left_behind::add_to_running_sweeps(connection, envelope.id)
}

fn find(connection: &Connection, id: EnvelopeId) -> Result<Option<EnvelopeRecord>, StoreFault> {
    let found = select(connection, "WHERE id = ?1", [id.to_string()])?;
    Ok(found.whole()?.pop())
}

pub(crate) fn select(
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
    let inconsistent = |why: &str| StoreError::Inconsistent {
        row: format!("of envelope {id}"),
        why: why.to_owned(),
    };
    let known_as: EnvelopeId = id.parse().map_err(|_| inconsistent("its id is not a UUID"))?;
    let envelope =
        Envelope::from_json(&json).map_err(|source| StoreError::DamagedRecord { id: known_as, source })?;
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
