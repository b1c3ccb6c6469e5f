//! Rows about the copies of envelopes that travel: which ones are behind, which KEKs they still need, and which image headers
//! are being rewritten.

use rusqlite::{OptionalExtension, Row, params};

use super::host::HostStore;
use crate::model::envelope::{Envelope, EnvelopeId, KekId};
use crate::store::damage::Rows;
use crate::store::error::StoreError;
use crate::store::host_records::{CopyNews, CopyPlace, NeededKek, StaleCopy};
use crate::store::sqlite::copies::note_stale;
use crate::store::sqlite::database::parse_id;
use crate::store::sqlite::rows::{Named, collect, each};

impl HostStore {
    /// Up to `most` stale copies in `place`, of envelopes behind `after`, by envelope. Rows that can't be read are left out: what
    /// needs to know them asks for [`HostStore::needed_keks`].
    pub(crate) fn stale_copies(
        &self,
        place: CopyPlace,
        after: Option<EnvelopeId>,
        most: u32,
    ) -> Result<Vec<StaleCopy>, StoreError> {
        let after = after.map_or_else(String::new, |envelope| envelope.to_string());
        self.0.read(|connection| {
            // In the order of the primary key, so that a page costs the same wherever it is.
            let sql = "SELECT envelope, max(rowid), max(reason) FROM stale_copies
                 WHERE place = ?1 AND envelope > ?2
                 GROUP BY envelope ORDER BY envelope";
            let row_of = |row: &Row| {
                Ok(StaleCopy {
                    envelope: parse_id("envelope", &row.get::<_, String>(0)?)?,
                    noted: row.get(1)?,
                    reason: row.get(2)?,
                })
            };
            let mut found = Vec::new();
            let named = Named("a copy of envelope", "envelope");
            each(
                connection,
                sql,
                params![place.as_str(), after],
                named,
                row_of,
                |row| {
                    found.extend(row);
                    found.len() < most as usize
                },
            )?;
            Ok(found)
        })
    }

    /// How many copies are stale.
    pub(crate) fn count_stale_copies(&self) -> Result<u64, StoreError> {
        self.0.read(|connection| {
            let count: i64 = connection.query_row(
                "SELECT count(*) FROM (SELECT DISTINCT envelope, place FROM stale_copies)",
                [],
                |row| row.get(0),
            )?;
            Ok(u64::try_from(count).unwrap_or(0))
        })
    }

    /// The KEKs that stale copies need.
    pub(crate) fn needed_keks(&self) -> Result<Rows<NeededKek>, StoreError> {
        self.0.read(|connection| {
            let sql = "SELECT envelope, place, provider, kek FROM stale_copies ORDER BY envelope, place";
            let named = Named("a copy of envelope", "envelope");
            collect(connection, sql, [], named, |row| {
                Ok(NeededKek {
                    envelope: parse_id("envelope", &row.get::<_, String>(0)?)?,
                    place: match row.get::<_, String>(1)?.as_str() {
                        "xml" => CopyPlace::Xml,
                        _ => CopyPlace::Image,
                    },
                    provider: parse_id("key provider", &row.get::<_, String>(2)?)?,
                    kek: KekId(row.get(3)?),
                })
            })
        })
    }

    /// Notes that a copy was found which is not what the keystore has, and needs the KEKs of its own stanzas.
    pub(crate) fn copy_is_behind(&self, copy: &Envelope, place: CopyPlace) -> Result<(), StoreError> {
        self.0.write(|transaction| note_stale(transaction, copy, place))
    }

    /// Notes what became of copies in `place`, in one transaction.
    pub(crate) fn note_copies(
        &self,
        place: CopyPlace,
        news: &[(StaleCopy, CopyNews)],
    ) -> Result<(), StoreError> {
        if news.is_empty() {
            return Ok(());
        }
        self.0.write(|transaction| {
            for (copy, news) in news {
                let (envelope, place) = (copy.envelope.to_string(), place.as_str());
                match news {
                    CopyNews::Follows => transaction
                        .prepare_cached(
                            "DELETE FROM stale_copies WHERE envelope = ?1 AND place = ?2 AND rowid <= ?3",
                        )?
                        .execute(params![envelope, place, copy.noted])?,
                    CopyNews::Stays(reason) => transaction
                        .prepare_cached(
                            "UPDATE stale_copies SET reason = ?3 WHERE envelope = ?1 AND place = ?2 AND reason <> ?3",
                        )?
                        .execute(params![envelope, place, reason])?,
                };
            }
            Ok(())
        })
    }

    /// Keeps what an image header is about to become, until it has.
    pub(crate) fn journal_header(
        &self,
        envelope: EnvelopeId,
        path: &str,
        patch: &[u8],
    ) -> Result<(), StoreError> {
        self.0.write(|transaction| {
            transaction.execute(
                "INSERT OR REPLACE INTO header_journal (envelope, path, patch) VALUES (?1, ?2, ?3)",
                params![envelope.to_string(), path, patch],
            )?;
            Ok(())
        })
    }

    /// The header is what it was to become, or no longer what the journal is about.
    pub(crate) fn forget_header(&self, envelope: EnvelopeId) -> Result<(), StoreError> {
        self.0.write(|transaction| {
            transaction.execute(
                "DELETE FROM header_journal WHERE envelope = ?1",
                [envelope.to_string()],
            )?;
            Ok(())
        })
    }

    /// The envelopes whose image headers a killed daemon was rewriting.
    pub(crate) fn journaled_headers(&self) -> Result<Rows<EnvelopeId>, StoreError> {
        self.0.read(|connection| {
            let sql = "SELECT envelope FROM header_journal";
            let named = Named("an image header of envelope", "envelope");
            collect(connection, sql, [], named, |row| {
                Ok(parse_id("envelope", &row.get::<_, String>(0)?)?)
            })
        })
    }

    /// What the header of this envelope's image was to become, and the image's path.
    pub(crate) fn journaled_header(
        &self,
        envelope: EnvelopeId,
    ) -> Result<Option<(String, Vec<u8>)>, StoreError> {
        self.0.read(|connection| {
            let found = connection
                .prepare_cached("SELECT path, patch FROM header_journal WHERE envelope = ?1")?
                .query_row([envelope.to_string()], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()?;
            Ok(found)
        })
    }
}
