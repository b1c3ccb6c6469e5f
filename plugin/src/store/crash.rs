//! What a kill in the middle of a write leaves behind.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use super::*;
use crate::host::own_process;
use crate::model::envelope::fixture::{dek, envelope};
use crate::model::envelope::{EnvelopeId, KekId, ProviderId, VmId};

const STATE_DIR: &str = "VIRTSEAL_TEST_STATE_DIR";

/// The child's part: writes for ever, and says what was committed once the call has returned.
fn write_for_ever(dir: &Path) -> ! {
    let stores = Stores::open(dir).unwrap();
    let vm = VmId::random();
    let say = |word: &str, id: EnvelopeId| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "\n{word} {id}").and_then(|()| out.flush()).unwrap();
    };
    loop {
        let envelope = envelope(vm);
        stores
            .keystore
            .insert_pending(&envelope, "/images/disk.qcow2")
            .unwrap();
        say("pending", envelope.id);
        stores.keystore.activate(envelope.id).unwrap();
        say("active", envelope.id);
        let envelope = envelope.mark_seen(&dek()).unwrap();
        stores.keystore.put(&envelope, "").unwrap();
        say("second", envelope.id);
        let provider = ProviderId::random();
        let root = NativeRoot {
            generation: 1,
            encrypted: vec![1; 400],
            backed_up_at: None,
        };
        stores
            .providers()
            .insert_native(provider, &provider.to_string(), &root)
            .unwrap();
        stores.keystore.set_default_provider(provider).unwrap();
        let mut bound = BoundRoots {
            generation: 1,
            bound_key: vec![2; 900],
            roots: vec![3; 600],
            enrolled: 0,
        };
        stores
            .host_store
            .native(provider)
            .put_bound_roots(&bound)
            .unwrap();
        let root = NativeRoot {
            generation: 2,
            ..root
        };
        stores.host_store.native(provider).add_root(&root, None).unwrap();
        bound.generation = 2;
        stores
            .host_store
            .native(provider)
            .put_bound_roots(&bound)
            .unwrap();
        say("bound", EnvelopeId(provider.0));
        persist(&stores, provider);
        say("persisted", EnvelopeId(provider.0));
        stores.host_store.kek_cache(provider).purge(PURGED).unwrap();
        say("purged", EnvelopeId(provider.0));
    }
}

/// The salts of KEKs that are persisted, and were purged.
const SALT: &[u8] = b"before";
const PURGED: &[u8] = b"after";

fn persist(stores: &Stores, provider: ProviderId) {
    let enrollment = KekEnrollment {
        bound: vec![4; 700],
        salt: SALT.to_vec(),
        seconds: 3600,
        enrolled: 0,
    };
    let kek = |nth: u8| CachedKek {
        kek: KekId(nth.to_string()),
        fetched: 0,
        expires: 3600,
        body: vec![5; 60],
    };
    let keks: Vec<_> = (0..3).map(kek).collect();
    stores
        .host_store
        .kek_cache(provider)
        .set(&serde_json::json!({}), Some(&enrollment))
        .unwrap();
    stores.host_store.kek_cache(provider).put(SALT, &keks, 9).unwrap();
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
    let stores = Stores::open(dir).unwrap();
    for line in reported {
        let Some((word, id)) = line.split_once(' ') else {
            continue;
        };
        if word == "bound" {
            let bound = stores
                .host_store
                .native(id.parse().unwrap())
                .bound_roots()
                .unwrap();
            assert!(bound.is_some_and(|bound| bound.generation == 2), "{line}");
        }
        if word == "purged" {
            assert!(
                stores
                    .host_store
                    .kek_cache(id.parse().unwrap())
                    .all()
                    .unwrap()
                    .is_empty(),
                "{line}"
            );
        }
        let (state, generation) = match word {
            "pending" => (None, 1),
            "active" => (Some(EnvelopeState::Active), 1),
            "second" => (Some(EnvelopeState::Active), 2),
            _ => continue,
        };
        let record = stores
            .keystore
            .envelope(id.parse().unwrap())
            .unwrap()
            .unwrap_or_else(|| panic!("{line} was lost"));
        assert!(state.is_none_or(|state| state == record.state), "{line}");
        assert!(
            record.envelope.generation.stored().unwrap() >= generation,
            "{line}"
        );
    }
    let providers = stores.keystore.providers().unwrap().whole().unwrap();
    let defaults = providers.iter().filter(|record| record.is_default).count();
    assert_eq!(defaults, usize::from(!providers.is_empty()));
    for provider in providers {
        let root = stores.host_store.native(provider.id).root().unwrap();
        let root = root.expect("a provider without its root key");
        if let Some(bound) = stores.host_store.native(provider.id).bound_roots().unwrap() {
            assert!(bound.generation <= root.generation);
            assert_eq!((bound.bound_key.len(), bound.roots.len()), (900, 600));
        }
        // All of them or none, and none under the salt that ended them.
        let keks = stores.host_store.kek_cache(provider.id).all().unwrap();
        if let Some(enrollment) = stores.host_store.kek_cache(provider.id).enrollment().unwrap() {
            assert!([0, 3].contains(&keks.len()));
            assert!(keks.is_empty() || enrollment.salt == SALT);
        } else {
            assert!(keks.is_empty());
        }
    }
}
