//! Rows of KEKs: those that were made, and those that jobs have taken out of use.

use std::collections::HashSet;

use rusqlite::{Transaction, params};

use super::database::{Database, now, parse_id};
use super::fault::StoreFault;
use super::rows::{self, Named, collect};
use crate::model::envelope::{KekId, ProviderId};
use crate::store::damage::Rows;
use crate::store::error::StoreError;
use crate::store::records::{MadeKek, RetiredKek};
use crate::store::shared::Keks;

impl Keks for Database {
    fn note_made_kek(&self, made: &MadeKek) -> Result<(), StoreError> {
        let (provider, KekId(kek)) = (made.provider.to_string(), &made.kek);
        let is_known = self.read(|connection| {
            let sql = "SELECT 1 FROM made_keks WHERE provider = ?1 AND kek = ?2";
            Ok(connection.prepare_cached(sql)?.exists(params![provider, kek])?)
        })?;
        if is_known {
            return Ok(());
        }
        self.write(|transaction| {
            transaction.execute(
                "INSERT OR IGNORE INTO made_keks (provider, kek, vm, since) VALUES (?1, ?2, ?3, ?4)",
                params![provider, kek, made.vm.to_string(), now()],
            )?;
            Ok(())
        })
    }

    fn forget_made_kek(&self, provider: ProviderId, kek: &KekId) -> Result<(), StoreError> {
        self.write(|transaction| {
            transaction.execute(
                "DELETE FROM made_keks WHERE provider = ?1 AND kek = ?2",
                params![provider.to_string(), kek.0],
            )?;
            Ok(())
        })
    }

    fn made_keks(&self) -> Result<Rows<MadeKek>, StoreError> {
        self.read(|connection| {
            let sql = "SELECT vm, provider, kek FROM made_keks ORDER BY since DESC, rowid DESC";
            collect(connection, sql, [], Named("a KEK that was made,", "kek"), |row| {
                Ok(MadeKek {
                    vm: parse_id("VM", &row.get::<_, String>(0)?)?,
                    provider: parse_id("key provider", &row.get::<_, String>(1)?)?,
                    kek: KekId(row.get(2)?),
                })
            })
        })
    }

    fn retired_keks(&self) -> Result<Rows<RetiredKek>, StoreError> {
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

    fn retired_of(&self, provider: ProviderId) -> Result<HashSet<KekId>, StoreError> {
        self.read(|connection| {
            let sql = "SELECT provider, kek FROM retired_keks";
            let rows = collect(connection, sql, [], Named("retired KEK", "kek"), |row| {
                let of = rows::text(row, "provider").and_then(|id| id.parse::<ProviderId>().ok());
                let kek = rows::text(row, "kek").map(KekId);
                Ok(kek.filter(|_| of.is_none_or(|of| of == provider)))
            })?;
            Ok(rows.sound.into_iter().flatten().collect())
        })
    }
}

/// Those that are known to be retired stay so since when they are.
pub(crate) fn retire(transaction: &Transaction, retired: &[RetiredKek]) -> Result<(), StoreFault> {
    let mut insert = transaction.prepare_cached(
        "INSERT OR IGNORE INTO retired_keks (provider, kek, vm, since) VALUES (?1, ?2, ?3, ?4)",
    )?;
    for RetiredKek { vm, provider, kek } in retired {
        insert.execute(params![provider.to_string(), kek.0, vm.to_string(), now()])?;
    }
    Ok(())
}
