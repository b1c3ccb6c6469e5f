//! The rows of a query, of which some are damaged.

use rusqlite::types::ValueRef;
use rusqlite::{Connection, Params, Row};

use super::fault::StoreFault;
use crate::model::envelope::Envelope;
use crate::store::damage::{DamagedRow, Held, Rows};
use crate::store::error::StoreError;

/// How the rows of a query are called: what they are, and the column with their id.
#[derive(Clone, Copy)]
pub(crate) struct Named(pub(crate) &'static str, pub(crate) &'static str);

/// What `row_of` makes of each row of a query.
pub(crate) fn collect<T>(
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
pub(crate) fn one<T>(
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
        Ok(why) => StoreError::Inconsistent {
            row: format!("of {named}"),
            why,
        }
        .into(),
        Err(fault) => fault,
    })
}

/// Shows `visit` what `row_of` makes of each row, until it has enough.
pub(crate) fn each<T>(
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
        raw: raw(row),
        holds: holds.map(Box::new),
        is_elsewhere: matches!(what, "envelope" | "VM"),
        place: row.get("rowid").unwrap_or(0),
    }
}

fn raw(row: &Row) -> serde_json::Value {
    let names = row.as_ref().column_names().into_iter();
    let of_column = |name: &str| match row.get_ref(name) {
        Ok(ValueRef::Integer(number)) => number.into(),
        Ok(ValueRef::Real(number)) => number.into(),
        Ok(ValueRef::Text(bytes) | ValueRef::Blob(bytes)) => match std::str::from_utf8(bytes) {
            Ok(text) => text.into(),
            Err(_) => serde_json::json!({ "hex": hex::encode(bytes) }),
        },
        Ok(ValueRef::Null) | Err(_) => serde_json::Value::Null,
    };
    names.map(|name| (name.to_owned(), of_column(name))).collect()
}

/// What is in a column, whatever SQLite has stored there.
pub(crate) fn text(row: &Row, column: &str) -> Option<String> {
    match row.get_ref(column).ok()? {
        ValueRef::Null => None,
        ValueRef::Integer(number) => Some(number.to_string()),
        ValueRef::Real(number) => Some(number.to_string()),
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
    }
}
