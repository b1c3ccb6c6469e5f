//! What a kill in the middle of a write leaves behind.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use super::*;
use crate::host::own_process;
use crate::model::envelope::{Binding, EnvelopeId, KekId, ObjectKind, ProviderId, Stanza, Verified, VmId};
use crate::secret::Dek;

const STATE_DIR: &str = "VIRTSEAL_TEST_STATE_DIR";

/// The child's part: writes for ever, and says what was committed once the call has returned.
fn write_for_ever(dir: &Path) -> ! {
    let keystore = Keystore::open(dir).unwrap();
    let vm = VmId::random();
    let say = |word: &str, id: EnvelopeId| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "\n{word} {id}").and_then(|()| out.flush()).unwrap();
    };
    loop {
        let (envelope, dek) = new_envelope(vm);
        keystore.insert_pending(&envelope, "/images/disk.qcow2").unwrap();
        say("pending", envelope.id);
        keystore.activate(envelope.id).unwrap();
        say("active", envelope.id);
        let envelope = envelope.mark_seen(&dek).unwrap();
        keystore.put(&envelope, "").unwrap();
        say("second", envelope.id);
        let provider = ProviderId::random();
        let root = NativeRoot {
            generation: 1,
            sealed: vec![1; 400],
            backed_up_at: None,
        };
        keystore
            .insert_native_root(provider, &provider.to_string(), &root)
            .unwrap();
        keystore.set_default_provider(provider).unwrap();
        let mut seal = TpmSeal {
            generation: 1,
            sealed_key: vec![2; 900],
            roots: vec![3; 600],
            enrolled: 0,
        };
        keystore.put_tpm_seal(provider, &seal).unwrap();
        let root = NativeRoot {
            generation: 2,
            ..root
        };
        keystore.insert_native_generation(provider, &root).unwrap();
        seal.generation = 2;
        keystore.put_tpm_seal(provider, &seal).unwrap();
        say("sealed", EnvelopeId(provider.0));
        persist(&keystore, provider);
        say("persisted", EnvelopeId(provider.0));
        keystore.purge_persisted_keks(provider, PURGED).unwrap();
        say("purged", EnvelopeId(provider.0));
    }
}

/// The salts of KEKs that are persisted, and were purged.
const SALT: &[u8] = b"before";
const PURGED: &[u8] = b"after";

fn persist(keystore: &Keystore, provider: ProviderId) {
    let persistence = KekPersistence {
        sealed: vec![4; 700],
        salt: SALT.to_vec(),
        seconds: 3600,
        enrolled: 0,
    };
    let kek = |nth: u8| PersistedKek {
        kek: KekId(nth.to_string()),
        fetched: 0,
        expires: 3600,
        body: vec![5; 60],
    };
    let keks: Vec<_> = (0..3).map(kek).collect();
    keystore
        .set_kek_cache(provider, &serde_json::json!({}), Some(&persistence))
        .unwrap();
    keystore.put_persisted_keks(provider, SALT, &keks, 9).unwrap();
}

#[test]
fn killed_writer_loses_nothing_it_has_reported() {
    if let Some(dir) = std::env::var_os(STATE_DIR) {
        write_for_ever(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let mut reported = Vec::new();
    for round in 0..12_u64 {
        let mut child = spawn_writer(dir.path());
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = lines
            .by_ref()
            .map(Result::unwrap)
            .find(|line| line.starts_with("pending "));
        std::thread::sleep(Duration::from_millis(round * 7 % 40));
        child.kill().unwrap();
        child.wait().unwrap();
        reported.extend(first);
        reported.extend(lines.map_while(Result::ok));
        check(dir.path(), &reported);
    }
    assert!(reported.len() > 12, "{reported:?}");
}

fn spawn_writer(dir: &Path) -> Child {
    own_process::command()
        .env(STATE_DIR, dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn check(dir: &Path, reported: &[String]) {
    let keystore = Keystore::open(dir).unwrap();
    for line in reported {
        let Some((word, id)) = line.split_once(' ') else {
            continue;
        };
        if word == "sealed" {
            let seal = keystore.tpm_seal(id.parse().unwrap()).unwrap();
            assert!(seal.is_some_and(|seal| seal.generation == 2), "{line}");
        }
        if word == "purged" {
            assert!(
                keystore.persisted_keks(id.parse().unwrap()).unwrap().is_empty(),
                "{line}"
            );
        }
        let (state, generation) = match word {
            "pending" => (None, 1),
            "active" => (Some(EnvelopeState::Active), 1),
            "second" => (Some(EnvelopeState::Active), 2),
            _ => continue,
        };
        let record = keystore
            .envelope(id.parse().unwrap())
            .unwrap()
            .unwrap_or_else(|| panic!("{line} was lost"));
        assert!(state.is_none_or(|state| state == record.state), "{line}");
        assert!(
            record.envelope.generation.stored().unwrap() >= generation,
            "{line}"
        );
    }
    let providers = keystore.providers().unwrap().whole().unwrap();
    let defaults = providers.iter().filter(|record| record.is_default).count();
    assert_eq!(defaults, usize::from(!providers.is_empty()));
    for provider in providers {
        let root = keystore.native_root(provider.id).unwrap();
        let root = root.expect("a provider without its root key");
        if let Some(seal) = keystore.tpm_seal(provider.id).unwrap() {
            assert!(seal.generation <= root.generation);
            assert_eq!((seal.sealed_key.len(), seal.roots.len()), (900, 600));
        }
        // All of them or none, and none under the salt that ended them.
        let keks = keystore.persisted_keks(provider.id).unwrap();
        if let Some(persistence) = keystore.kek_persistence(provider.id).unwrap() {
            assert!([0, 3].contains(&keks.len()));
            assert!(keks.is_empty() || persistence.salt == SALT);
        } else {
            assert!(keks.is_empty());
        }
    }
}

fn new_envelope(vm: VmId) -> (Verified, Dek) {
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
    let dek = Dek::random().unwrap();
    (Verified::new(&binding, vec![stanza], &dek).unwrap(), dek)
}
