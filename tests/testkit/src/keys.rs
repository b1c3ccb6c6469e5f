//! The true keys of a host, worked out without virtseal's own code: from a backup of the root key and the envelopes in
//! the keystore, with the formats that `plugin/src/provider/native` documents.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use openssl::md::Md;
use openssl::pkey::Id;
use openssl::pkey_ctx::PkeyCtx;
use openssl::symm::{Cipher, decrypt_aead, encrypt_aead};
use serde_json::Value;
use uuid::Uuid;

use crate::SealedHost;
use crate::deadline::wait_until;
use crate::process::Process;

const NONCE: usize = 12;
const TAG: usize = 16;
const DEK: usize = 32;

/// The root key of a native provider.
pub struct RootKey {
    provider: Uuid,
    /// 32 bytes.
    pub key: Vec<u8>,
}

/// An envelope as the keystore has it.
#[derive(Clone, Debug)]
pub struct KeptEnvelope {
    /// Its id, which is also that of the libvirt secret.
    pub id: String,
    /// `disk`, `nvram` or `vtpm`.
    pub kind: String,
    /// `pending` or `active`.
    pub state: String,
    /// The object's path; empty for a vTPM.
    pub location: String,
    /// The UUID of its VM.
    pub vm: String,
    json: Value,
}

impl RootKey {
    /// Reads the text that `virtseal provider backup --no-passphrase` writes.
    ///
    /// # Errors
    /// When it is anything else.
    pub fn from_backup(text: &[u8]) -> Result<Self> {
        let fields: Value = serde_json::from_slice(text)?;
        let field = |name: &str| {
            fields[name]
                .as_str()
                .with_context(|| format!("the backup has no {name}"))
        };
        Ok(Self {
            provider: field("provider")?.parse()?,
            key: hex::decode(field("root_key")?)?,
        })
    }

    /// The KEK called `name`: HKDF-SHA256, salted with the provider's UUID.
    ///
    /// # Errors
    /// OpenSSL's.
    pub fn kek(&self, name: &str) -> Result<Vec<u8>> {
        let info = [b"virtseal native kek\0", name.as_bytes()].concat();
        let mut context = PkeyCtx::new_id(Id::HKDF)?;
        context.derive_init()?;
        context.set_hkdf_md(Md::sha256())?;
        context.set_hkdf_salt(self.provider.as_bytes())?;
        context.set_hkdf_key(&self.key)?;
        context.add_hkdf_info(&info)?;
        let mut kek = vec![0; 32];
        context.derive(Some(&mut kek))?;
        Ok(kek)
    }

    /// The KEK that wraps `envelope`.
    ///
    /// # Errors
    /// When the envelope has no stanza.
    pub fn kek_of(&self, envelope: &KeptEnvelope) -> Result<Vec<u8>> {
        self.kek(envelope.text("kek")?)
    }

    /// A new envelope for the vTPM of `vm`, wrapped by the first root key of the provider called `name`: its id and its JSON.
    ///
    /// # Errors
    /// OpenSSL's.
    pub fn new_vtpm_envelope(&self, name: &str, vm: Uuid) -> Result<(Uuid, String)> {
        const VTPM: u8 = 2;
        let (id, kek) = (Uuid::new_v4(), format!("v1:vm:{vm}"));
        let binding = [
            b"virtseal binding\0\x01",
            &id.as_bytes()[..],
            vm.as_bytes(),
            &[VTPM],
        ]
        .concat();
        let mut payload = vec![0; DEK];
        openssl::rand::rand_bytes(&mut payload)?;
        payload.extend_from_slice(&openssl::sha::sha256(&binding));
        let (mut nonce, mut tag) = ([0; NONCE], [0; TAG]);
        openssl::rand::rand_bytes(&mut nonce)?;
        let mut additional = self.provider.as_bytes().to_vec();
        additional.extend_from_slice(&u32::try_from(kek.len())?.to_be_bytes());
        additional.extend_from_slice(kek.as_bytes());
        additional.extend_from_slice(b"A256GCM");
        let key = self.kek(&kek)?;
        let cipher = Cipher::aes_256_gcm();
        let sealed = encrypt_aead(cipher, &key, Some(&nonce), &additional, &payload, &mut tag)?;
        let body = STANDARD.encode([&nonce[..], &sealed, &tag].concat());
        // In the order that virtseal writes.
        let json = format!(
            "{{\"version\":1,\"id\":\"{id}\",\"vm\":\"{vm}\",\"kind\":\"vtpm\",\"generation\":1,\"stanzas\":[{{\"provider\":\"{}\",\
             \"provider_name\":\"{name}\",\"kek\":\"{kek}\",\"mechanism\":\"A256GCM\",\"body\":\"{body}\"}}]}}",
            self.provider
        );
        Ok((id, json))
    }

    /// The DEK in `envelope`.
    ///
    /// # Errors
    /// When the root key does not open it.
    pub fn dek(&self, envelope: &KeptEnvelope) -> Result<Vec<u8>> {
        let (name, mechanism) = (envelope.text("kek")?, envelope.text("mechanism")?);
        let body = STANDARD.decode(envelope.text("body")?)?;
        ensure!(body.len() == NONCE + 64 + TAG, "a stanza of {} bytes", body.len());
        let mut additional = self.provider.as_bytes().to_vec();
        additional.extend_from_slice(&u32::try_from(name.len())?.to_be_bytes());
        additional.extend_from_slice(name.as_bytes());
        additional.extend_from_slice(mechanism.as_bytes());
        let (nonce, rest) = body.split_at(NONCE);
        let (ciphertext, tag) = rest.split_at(rest.len() - TAG);
        let payload = decrypt_aead(
            Cipher::aes_256_gcm(),
            &self.kek(name)?,
            Some(nonce),
            &additional,
            ciphertext,
            tag,
        )
        .with_context(|| format!("envelope {} does not open", envelope.id))?;
        Ok(payload[..DEK].to_vec())
    }
}

impl KeptEnvelope {
    /// A field of its first stanza: `provider`, `kek`, `mechanism`.
    ///
    /// # Errors
    /// There is no such field.
    pub fn stanza(&self, field: &str) -> Result<&str> {
        self.text(field)
    }

    fn text(&self, field: &str) -> Result<&str> {
        self.json["stanzas"][0][field]
            .as_str()
            .with_context(|| format!("envelope {} has no {field}", self.id))
    }
}

/// The sealed root key of `provider` in the keystore of `state_dir`, as the daemon holds it in memory.
///
/// # Errors
/// When it is no keystore, or has no native provider of that name.
pub fn sealed_root(state_dir: &Path, provider: &str) -> Result<Vec<u8>> {
    let copy = Copied::of(state_dir)?;
    let query = "SELECT sealed FROM native_roots JOIN providers ON id = provider WHERE name = ?1";
    Ok(copy.database.query_row(query, [provider], |row| row.get(0))?)
}

/// The newest root key of its native providers, by a copy: the daemon may be writing, and a copy of half a change is an error.
///
/// # Errors
/// When it is no keystore.
pub fn newest_root(state_dir: &Path) -> Result<u32> {
    let copy = Copied::of(state_dir)?;
    let query = "SELECT max(generation) FROM native_roots";
    Ok(copy.database.query_row(query, [], |row| row.get(0))?)
}

/// The envelopes in the keystore of `state_dir`, whose daemon writes nothing now. A copy is read: nothing there is touched.
///
/// # Errors
/// When it is no keystore.
pub fn kept_envelopes(state_dir: &Path) -> Result<Vec<KeptEnvelope>> {
    let copy = Copied::of(state_dir)?;
    let query = "SELECT id, kind, state, location, vm, json FROM envelopes ORDER BY id";
    let mut statement = copy.database.prepare(query)?;
    let rows = statement.query_map([], |row| {
        let json: String = row.get("json")?;
        Ok(KeptEnvelope {
            id: row.get("id")?,
            kind: row.get("kind")?,
            state: row.get("state")?,
            location: row.get("location")?,
            vm: row.get("vm")?,
            json: serde_json::from_str(&json).unwrap_or_default(),
        })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The UUIDs of the VMs that a keystore takes for sealed.
///
/// # Errors
/// When it is no keystore.
pub fn kept_sealed_vms(state_dir: &Path) -> Result<Vec<String>> {
    let copy = Copied::of(state_dir)?;
    let query = "SELECT uuid FROM vms WHERE uuid NOT IN (SELECT uuid FROM plain_vms) ORDER BY uuid";
    let mut statement = copy.database.prepare(query)?;
    let rows = statement.query_map([], |row| row.get(0))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// How many disks a keystore has of which QEMU was asked to go over to the sealed image, and nobody has seen whether it did.
///
/// # Errors
/// When it is no keystore.
pub fn kept_pivots(state_dir: &Path) -> Result<u32> {
    let copy = Copied::of(state_dir)?;
    let query = "SELECT count(*) FROM pivots";
    Ok(copy.database.query_row(query, [], |row| row.get(0))?)
}

/// A keystore's copy, so that the daemon's own files are not touched.
struct Copied {
    database: rusqlite::Connection,
    directory: tempfile::TempDir,
}

impl Copied {
    fn of(state_dir: &Path) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("keystore.db");
        fs::copy(state_dir.join("keystore.db"), &path)?;
        let log = state_dir.join("keystore.db-wal");
        if log.exists() {
            fs::copy(log, directory.path().join("keystore.db-wal"))?;
        }
        Ok(Self {
            database: rusqlite::Connection::open(&path)?,
            directory,
        })
    }
}

/// Changes the keystore of a host whose daemon is stopped, where nothing that virtseal offers would do it. SQLite can't open
/// it in place: it resolves the way into the host's namespace to a path outside.
///
/// # Errors
/// When it is no keystore, or `change` fails.
pub fn edit_keystore<T>(
    sealed: &SealedHost,
    change: impl FnOnce(&mut rusqlite::Connection) -> Result<T>,
) -> Result<T> {
    let state_dir = sealed.host().path("/var/lib/virtseal");
    let mut copy = Copied::of(&state_dir)?;
    let changed = change(&mut copy.database)?;
    copy.database
        .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
    fs::copy(
        copy.directory.path().join("keystore.db"),
        state_dir.join("keystore.db"),
    )?;
    for log in ["keystore.db-wal", "keystore.db-shm"] {
        if state_dir.join(log).exists() {
            fs::remove_file(state_dir.join(log))?;
        }
    }
    Ok(changed)
}

/// Keeps the keystore's write-ahead log from being used again from its start, so that each change needs room: a log that was
/// emptied has some, however full the disk is. Until it is dropped.
///
/// # Errors
/// python3 does not start, or the keystore can't be opened.
pub fn pin_log(sealed: &SealedHost) -> Result<Process> {
    const PINNED: &str = "/run/log-pinned";
    // A reader of what is not in the database yet; then what the log's file had left is used up.
    const READER: &str = "import os, sqlite3, sys, time
path = sys.argv[1]
open_keystore = lambda: sqlite3.connect(path, isolation_level=None, timeout=20)
writer, reader = open_keystore(), open_keystore()
def write():
    writer.execute('UPDATE providers SET created = created + 1')
    writer.execute('UPDATE providers SET created = created - 1')
write()
reader.execute('BEGIN')
reader.execute('SELECT count(*) FROM providers').fetchall()
length = os.path.getsize(path + '-wal')
while os.path.getsize(path + '-wal') == length:
    write()
writer.close()
open(sys.argv[2], 'w').close()
time.sleep(1000)";
    let host = sealed.host();
    let _ = fs::remove_file(host.path(PINNED));
    let argv = ["python3", "-c", READER, "/var/lib/virtseal/keystore.db", PINNED];
    let reader = host.spawn("log-reader", &argv)?;
    wait_until(Duration::from_secs(20), "the reader of the keystore", || {
        Ok(host.path(PINNED).exists().then_some(()))
    })
    .with_context(|| reader.output())?;
    Ok(reader)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same vector as in `plugin/src/provider/native/kek.rs`, which was worked out with Python.
    #[test]
    fn derivation_is_the_documented_one() {
        let root = RootKey {
            provider: Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff),
            key: vec![0x11; 32],
        };
        let kek = root.kek("v1:vm:00000000-0000-0000-0000-000000000001").unwrap();
        assert_eq!(
            hex::encode(kek),
            "78f70f06406809bcfade5668aaba0459c75a4b91b71b65a438799bbf6f0d1b18"
        );
    }
}
