//! Rows that are there to prove something later: how long the audit log was, which KEKs were made, which VMs were saved to a
//! file.

use rusqlite::params;

use super::rows::{self, Named, Rows, collect};
use super::{Keystore, KeystoreError, UnixTime, now, parse_id};
use crate::model::envelope::{Envelope, KekId, ProviderId, VmId};

/// How long the audit log is known to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuditAnchor {
    /// Number of the last record that was on disk.
    pub seq: u64,
    /// SHA-256 of its line.
    pub hash: [u8; 32],
}

/// A KEK that was made for a VM here, whether or not anything was wrapped with it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MadeKek {
    /// Whom it was made for.
    pub vm: VmId,
    /// Its provider.
    pub provider: ProviderId,
    /// The KEK.
    pub kek: KekId,
}

/// A VM that was saved to a file, as `virsh save` does: where that is, nobody has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedState {
    /// The VM.
    pub vm: VmId,
    /// When that was noticed.
    pub since: UnixTime,
    /// The envelopes that the file has copies of.
    pub envelopes: Vec<Envelope>,
}

impl Keystore {
    /// How long the audit log was when this was last noted; `None` before the first time.
    ///
    /// # Errors
    /// [`KeystoreError::Inconsistent`] when the note is damaged.
    pub fn audit_anchor(&self) -> Result<Option<AuditAnchor>, KeystoreError> {
        self.read(|connection| {
            let sql = "SELECT seq, hash FROM audit_anchor";
            rows::one(connection, sql, [], "the length of the audit log", |row| {
                Ok(AuditAnchor {
                    seq: row.get(0)?,
                    hash: row.get(1)?,
                })
            })
        })
    }

    /// Notes how long the audit log is. Only what is on disk there may be noted.
    pub fn set_audit_anchor(&self, anchor: AuditAnchor) -> Result<(), KeystoreError> {
        self.write(|transaction| {
            transaction
                .prepare_cached("INSERT OR REPLACE INTO audit_anchor (one, seq, hash) VALUES (1, ?1, ?2)")?
                .execute(params![anchor.seq, anchor.hash])?;
            Ok(())
        })
    }

    /// Notes that a provider has made a KEK for `vm`, before anything is wrapped with it.
    pub fn note_made_kek(&self, made: &MadeKek) -> Result<(), KeystoreError> {
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

    /// Notes that a KEK is gone for good: its destruction was seen.
    pub fn forget_made_kek(&self, provider: ProviderId, kek: &KekId) -> Result<(), KeystoreError> {
        self.write(|transaction| {
            transaction.execute(
                "DELETE FROM made_keks WHERE provider = ?1 AND kek = ?2",
                params![provider.to_string(), kek.0],
            )?;
            Ok(())
        })
    }

    /// The KEKs that were made here, the newest first.
    pub fn made_keks(&self) -> Result<Rows<MadeKek>, KeystoreError> {
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

    /// Notes that `vm` was saved to a file, unless that is known.
    pub fn note_saved(&self, vm: VmId, envelopes: &[Envelope]) -> Result<(), KeystoreError> {
        let texts = saved_texts(envelopes);
        self.write(|transaction| {
            transaction.execute(
                "INSERT OR IGNORE INTO saved_states (vm, since, envelopes) VALUES (?1, ?2, ?3)",
                params![vm.to_string(), now(), texts],
            )?;
            Ok(())
        })
    }

    /// The VM runs again: whatever file it was saved to is the past.
    pub fn forget_saved(&self, vm: VmId) -> Result<(), KeystoreError> {
        let is_noted = self.read(|connection| {
            let mut noted = connection.prepare_cached("SELECT 1 FROM saved_states WHERE vm = ?1")?;
            Ok(noted.exists([vm.to_string()])?)
        })?;
        if !is_noted {
            return Ok(());
        }
        self.write(|transaction| {
            transaction.execute("DELETE FROM saved_states WHERE vm = ?1", [vm.to_string()])?;
            Ok(())
        })
    }

    /// The VMs that were saved to a file and have not run since.
    pub fn saved_states(&self) -> Result<Rows<SavedState>, KeystoreError> {
        self.read(|connection| {
            let sql = "SELECT vm, since, envelopes FROM saved_states ORDER BY vm";
            let named = Named("the saved state of VM", "vm");
            collect(connection, sql, [], named, |row| {
                let vm: String = row.get(0)?;
                let inconsistent = |_| KeystoreError::Inconsistent {
                    row: format!("of the saved state of VM {vm}"),
                    why: "its envelopes can't be read".to_owned(),
                };
                let texts: Vec<String> =
                    serde_json::from_str(&row.get::<_, String>(2)?).map_err(inconsistent)?;
                let envelopes = texts.iter().map(|text| Envelope::from_json(text));
                Ok(SavedState {
                    vm: parse_id("VM", &vm)?,
                    since: row.get(1)?,
                    envelopes: envelopes.collect::<Result<_, _>>().map_err(|_| {
                        KeystoreError::Inconsistent {
                            row: format!("of the saved state of VM {vm}"),
                            why: "an envelope of it can't be read".to_owned(),
                        }
                    })?,
                })
            })
        })
    }
}

/// As they are in the row of a saved state.
pub(super) fn saved_texts(envelopes: &[Envelope]) -> String {
    let texts: Vec<_> = envelopes.iter().map(Envelope::to_json).collect();
    serde_json::to_string(&texts).expect("texts are JSON")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_anchor_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        assert_eq!(keystore.audit_anchor().unwrap(), None);
        for seq in [3, 7] {
            let anchor = AuditAnchor { seq, hash: [9; 32] };
            keystore.set_audit_anchor(anchor).unwrap();
            assert_eq!(keystore.audit_anchor().unwrap(), Some(anchor));
        }
    }

    #[test]
    fn made_keks_are_known_until_their_end_was_seen() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        let (provider, vm) = (ProviderId::random(), VmId::random());
        let made = ["a", "b"].map(|kek| MadeKek {
            vm,
            provider,
            kek: KekId(kek.to_owned()),
        });
        for made in made.iter().chain(&made) {
            keystore.note_made_kek(made).unwrap();
        }
        assert_eq!(
            keystore.made_keks().unwrap().whole().unwrap(),
            [made[1].clone(), made[0].clone()]
        );
        keystore.forget_made_kek(provider, &made[1].kek).unwrap();
        assert_eq!(keystore.made_keks().unwrap().whole().unwrap(), [made[0].clone()]);
    }

    #[test]
    fn a_saved_vm_is_known_until_it_runs() {
        let dir = tempfile::tempdir().unwrap();
        let keystore = Keystore::open(dir.path()).unwrap();
        let vm = VmId::random();
        keystore.note_saved(vm, &[]).unwrap();
        keystore.note_saved(vm, &[]).unwrap();
        assert_eq!(keystore.saved_states().unwrap().whole().unwrap()[0].vm, vm);
        keystore.forget_saved(VmId::random()).unwrap();
        keystore.forget_saved(vm).unwrap();
        assert_eq!(keystore.saved_states().unwrap().whole().unwrap(), []);
    }
}
