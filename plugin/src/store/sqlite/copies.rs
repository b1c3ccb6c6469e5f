//! What a change of envelopes means for the copies that travel: it is noted in the transaction of the change.

use rusqlite::{Transaction, params};

use super::database::now;
use super::fault::StoreFault;
use crate::model::envelope::{Envelope, ObjectKind};
use crate::store::host_records::CopyPlace;

/// The copy in `place` is as `old`, which the keystore no longer has; nothing for an object that has no such place.
pub(crate) fn note_stale(
    transaction: &Transaction,
    old: &Envelope,
    place: CopyPlace,
) -> Result<(), StoreFault> {
    // The image of a variable store is plain LUKS, and a vTPM has none.
    if place == CopyPlace::Image && old.kind != ObjectKind::Disk {
        return Ok(());
    }
    let mut insert = transaction.prepare_cached(
        // With a new number, so that who brings it up to date now sees that it was noted again.
        "INSERT OR REPLACE INTO stale_copies (envelope, place, provider, kek, since, reason)
         SELECT ?1, ?2, ?3, ?4, ?5, '' FROM envelopes WHERE id = ?1",
    )?;
    for stanza in &old.stanzas {
        insert.execute(params![
            old.id.to_string(),
            place.as_str(),
            stanza.provider.to_string(),
            stanza.kek.0,
            now()
        ])?;
    }
    Ok(())
}
