//! Rows about the copies of envelopes that travel: which ones are behind, and which KEKs they still need.

use rusqlite::{OptionalExtension, Row, Transaction, params};

use super::rows::{Named, Rows, collect, each};
use super::{Keystore, KeystoreError, UnixTime, error::StoreFault, now, parse_id};
use crate::model::envelope::{Envelope, EnvelopeId, KekId, ObjectKind, ProviderId, VmId};

/// Where a copy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CopyPlace {
    /// In the domain's metadata.
    Xml,
    /// In the header of the image.
    Image,
}

impl CopyPlace {
    /// The word in the keystore and in messages.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Xml => "xml",
            Self::Image => "image",
        }
    }
}

/// A copy with an earlier generation than the keystore's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaleCopy {
    /// The envelope.
    pub envelope: EnvelopeId,
    /// Its VM.
    pub vm: VmId,
    /// Where the copy is.
    pub place: CopyPlace,
    /// Since when.
    pub since: UnixTime,
    /// Why it could not be brought up to date; empty if nobody has tried.
    pub reason: String,
}

/// A KEK that a stale copy needs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NeededKek {
    /// The envelope whose copy it is.
    pub envelope: EnvelopeId,
    /// Where the copy is.
    pub place: CopyPlace,
    /// The KEK's provider.
    pub provider: ProviderId,
    /// The KEK.
    pub kek: KekId,
}

/// A KEK that a job has taken out of use; its provider may still have it, and a backup may still need it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RetiredKek {
    /// The VM that it wrapped something of.
    pub vm: VmId,
    /// The KEK's provider.
    pub provider: ProviderId,
    /// The KEK.
    pub kek: KekId,
}

/// What became of a copy that was stale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyNews {
    /// It is as this version, or counts more than that: it is stale no more, unless the envelope has changed since.
    Has(Box<Envelope>),
    /// It could not be brought up to date, and why.
    Stays(String),
}

impl Keystore {
    /// The KEKs that jobs have taken out of use.
    pub fn retired_keks(&self) -> Result<Rows<RetiredKek>, KeystoreError> {
        self.read(|connection| {
            let sql = "SELECT vm, provider, kek FROM retired_keks ORDER BY provider, kek, vm";
            collect(connection, sql, [], Named("retired KEK", "kek"), |row| {
                Ok(RetiredKek {
                    vm: parse_id("VM", &row.get::<_, String>(0)?)?,
                    provider: parse_id("key provider", &row.get::<_, String>(1)?)?,
                    kek: KekId(row.get(2)?),
                })
            })
        })
    }

    /// Up to `most` stale copies in `place`, of envelopes behind `after`, by envelope. Rows that can't be read are left out: what
    /// needs to know them asks for [`Keystore::needed_keks`].
    pub fn stale_copies(
        &self,
        place: CopyPlace,
        after: Option<EnvelopeId>,
        most: u32,
    ) -> Result<Vec<StaleCopy>, KeystoreError> {
        let after = after.map_or_else(String::new, |envelope| envelope.to_string());
        self.read(|connection| {
            // In the order of the primary key, so that a page costs the same wherever it is.
            let sql = "SELECT envelope, vm, min(since), max(reason)
                 FROM stale_copies CROSS JOIN envelopes ON id = envelope
                 WHERE place = ?1 AND envelope > ?2
                 GROUP BY envelope ORDER BY envelope";
            let row_of = |row: &Row| {
                Ok(StaleCopy {
                    envelope: parse_id("envelope", &row.get::<_, String>(0)?)?,
                    vm: parse_id("VM", &row.get::<_, String>(1)?)?,
                    place,
                    since: row.get(2)?,
                    reason: row.get(3)?,
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
    pub fn count_stale_copies(&self) -> Result<u64, KeystoreError> {
        self.read(|connection| {
            let count: i64 = connection.query_row(
                "SELECT count(*) FROM (SELECT DISTINCT envelope, place FROM stale_copies)",
                [],
                |row| row.get(0),
            )?;
            Ok(u64::try_from(count).unwrap_or(0))
        })
    }

    /// The KEKs that stale copies need.
    pub fn needed_keks(&self) -> Result<Rows<NeededKek>, KeystoreError> {
        self.read(|connection| {
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
    pub fn copy_is_behind(&self, copy: &Envelope, place: CopyPlace) -> Result<(), KeystoreError> {
        self.write(|transaction| note_stale(transaction, copy, place))
    }

    /// Notes what became of copies in `place`, in one transaction.
    pub fn note_copies(
        &self,
        place: CopyPlace,
        news: &[(EnvelopeId, CopyNews)],
    ) -> Result<(), KeystoreError> {
        if news.is_empty() {
            return Ok(());
        }
        self.write(|transaction| {
            for (envelope, news) in news {
                let (envelope, place) = (envelope.to_string(), place.as_str());
                match news {
                    CopyNews::Has(version) => transaction
                        .prepare_cached(
                            "DELETE FROM stale_copies WHERE envelope = ?1 AND place = ?2
                             AND EXISTS (SELECT 1 FROM envelopes WHERE id = ?1 AND json = ?3)",
                        )?
                        .execute(params![envelope, place, version.to_json()])?,
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
    pub fn journal_header(
        &self,
        envelope: EnvelopeId,
        path: &str,
        patch: &[u8],
    ) -> Result<(), KeystoreError> {
        self.write(|transaction| {
            transaction.execute(
                "INSERT OR REPLACE INTO header_journal (envelope, path, patch) VALUES (?1, ?2, ?3)",
                params![envelope.to_string(), path, patch],
            )?;
            Ok(())
        })
    }

    /// The header is what it was to become, or no longer what the journal is about.
    pub fn forget_header(&self, envelope: EnvelopeId) -> Result<(), KeystoreError> {
        self.write(|transaction| {
            transaction.execute(
                "DELETE FROM header_journal WHERE envelope = ?1",
                [envelope.to_string()],
            )?;
            Ok(())
        })
    }

    /// The envelopes whose image headers a killed daemon was rewriting.
    pub fn journaled_headers(&self) -> Result<Rows<EnvelopeId>, KeystoreError> {
        self.read(|connection| {
            let sql = "SELECT envelope FROM header_journal";
            let named = Named("an image header of envelope", "envelope");
            collect(connection, sql, [], named, |row| {
                Ok(parse_id("envelope", &row.get::<_, String>(0)?)?)
            })
        })
    }

    /// What the header of this envelope's image was to become, and the image's path.
    pub fn journaled_header(&self, envelope: EnvelopeId) -> Result<Option<(String, Vec<u8>)>, KeystoreError> {
        self.read(|connection| {
            let found = connection
                .prepare_cached("SELECT path, patch FROM header_journal WHERE envelope = ?1")?
                .query_row([envelope.to_string()], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()?;
            Ok(found)
        })
    }
}

/// The copy in `place` is as `old`, which the keystore no longer has; nothing for an object that has no such place.
pub(super) fn note_stale(
    transaction: &Transaction,
    old: &Envelope,
    place: CopyPlace,
) -> Result<(), StoreFault> {
    // The image of a variable store is plain LUKS, and a vTPM has none.
    if place == CopyPlace::Image && old.kind != ObjectKind::Disk {
        return Ok(());
    }
    let mut insert = transaction.prepare_cached(
        "INSERT OR IGNORE INTO stale_copies (envelope, place, provider, kek, since, reason)
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
