//! What a running sweep has to look at once more.

use rusqlite::{Connection, params};

use super::fault::StoreFault;
use crate::model::envelope::EnvelopeId;

/// Why a job has an envelope still before it that it never had in hand.
pub(crate) const CAME_MEANWHILE: &str = "it came here meanwhile";

/// The sweeps that run have a look at an envelope that came, or changed, where they will not pass any more: it may need a KEK
/// that they take out of use.
pub(crate) fn add_to_running_sweeps(connection: &Connection, envelope: EnvelopeId) -> Result<(), StoreFault> {
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
