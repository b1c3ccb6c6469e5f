use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use rusqlite::Connection;
use tempfile::TempDir;
use virtseal_testkit::Swtpm;

use super::super::KekCache;
use super::*;
use crate::crypto::aead::KEY;
use crate::model::cache_policy::{CachePolicy, KeepTime};
use crate::store::Change;
use crate::store::{HostStore, Stores};

const DAY: UnixTime = 86_400;

/// A cache with its stores, as a daemon holds it.
struct Rig {
    dir: TempDir,
    stores: Stores,
    provider: ProviderId,
    cache: KekCache,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let stores = Stores::open(dir.path()).unwrap();
        let provider = ProviderId::random();
        stores
            .keystore
            .insert_provider(provider, "kms", "kmip", &serde_json::json!({}))
            .unwrap();
        let cache = attached(&stores, provider);
        Self {
            dir,
            stores,
            provider,
            cache,
        }
    }

    /// That keeps KEKs for a day.
    fn enrolled(tpm: &Tpm) -> Self {
        let rig = Self::new();
        rig.enroll(tpm);
        rig
    }

    fn enroll(&self, tpm: &Tpm) {
        let new = self.cache.enroll(&request(tpm)).unwrap();
        self.record(Some(new));
    }

    fn record(&self, new: Option<Enrollment>) {
        self.cache
            .set(CachePolicy::UntilLock, new, &serde_json::json!({}))
            .unwrap();
    }

    /// As from a server, and until it is on disk.
    fn fetch(&self, names: &[&str]) {
        for name in names {
            self.cache
                .put(self.cache.ticket(), &[kek(name)], &[Arc::new(key(name))]);
        }
        self.wait();
    }

    /// Until the thread has nothing left to do.
    fn wait(&self) {
        let until = Instant::now() + Duration::from_secs(20);
        while self.disk().state().working {
            assert!(Instant::now() < until, "it writes for ever");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What the end of a daemon and the start of the next one do, without the TPM.
    fn restart(&mut self) {
        self.cache.end();
        self.wait();
        self.cache = attached(&self.stores, self.provider);
    }

    fn disk(&self) -> &Disk {
        &self.cache.disk
    }

    fn opens(&self, name: &str) -> bool {
        let keys = self.cache.recall(&[kek(name)], Instant::now());
        keys.is_ok_and(|keys| keys[0].expose() == key(name).expose())
    }

    fn refusal(&self, name: &str) -> String {
        let refused = self.cache.recall(&[kek(name)], Instant::now()).unwrap_err();
        refused.0.unwrap()
    }

    fn kept(&self) -> usize {
        self.cache.persistence().unwrap().keks
    }

    fn on_disk(&self) -> KekCacheRows {
        self.stores.host_store.kek_cache(self.provider)
    }

    fn rows(&self) -> Vec<CachedKek> {
        self.on_disk().all().unwrap()
    }

    fn salt(&self) -> Vec<u8> {
        self.on_disk().enrollment().unwrap().unwrap().salt
    }

    /// By somebody who can write the stores.
    fn forge(&self, row: CachedKek) {
        let put = self.on_disk().put(&self.salt(), &[row], 99);
        assert_eq!(put.unwrap(), Change::Changed);
    }

    fn after_restart(&mut self, tpm: &Tpm) {
        self.restart();
        self.cache.load(tpm).unwrap();
    }
}

/// For a day.
fn request(tpm: &Tpm) -> Request<'_> {
    Request {
        tpm,
        keep: KeepTime::default(),
        pcrs: PcrList::default(),
    }
}

fn attached(stores: &Stores, provider: ProviderId) -> KekCache {
    let rows = stores.host_store.kek_cache(provider);
    KekCache::open(CachePolicy::UntilLock, rows, provider, "kms")
}

fn key(name: &str) -> SecretBytes {
    SecretBytes::take(&mut [name.as_bytes()[0]; KEY]).unwrap()
}

fn kek(name: &str) -> KekId {
    KekId(name.to_owned())
}

fn holds_the_write_lock(dir: &Path) -> Connection {
    let other = Connection::open(dir.join(HostStore::FILE)).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    other
}

#[test]
fn what_was_fetched_outlives_a_reboot_until_a_lock() {
    let mut stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let mut rig = Rig::enrolled(&tpm);
    rig.fetch(&["a", "b"]);
    assert_eq!(rig.kept(), 2);

    stand.reboot().unwrap();
    rig.restart();
    assert_eq!(rig.cache.len(), 0, "nothing is in memory");
    assert!(rig.cache.may_have(&[kek("a")]) && rig.cache.wants_tpm());
    assert!(rig.refusal("a").contains("waits for the TPM"));
    rig.cache.load(&tpm).unwrap();
    assert!(rig.opens("a") && rig.opens("b") && !rig.opens("c"));
    assert!(
        rig.cache.recall(&[kek("a"), kek("c")], Instant::now()).is_err(),
        "all or nothing"
    );
    assert_eq!(rig.refusal("c"), "its key is not kept on disk");

    rig.cache.lock().unwrap();
    assert!(!rig.opens("a") && rig.rows().is_empty());
    assert!(rig.cache.wants_tpm(), "the secret is out of memory");
    rig.after_restart(&tpm);
    assert!(!rig.opens("a"));
    rig.fetch(&["a"]);
    rig.after_restart(&tpm);
    assert!(rig.opens("a"), "it goes on after the lock");
}

#[test]
fn what_is_in_memory_is_kept_when_it_is_chosen_and_when_the_tpm_comes() {
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let mut rig = Rig::new();
    rig.fetch(&["a"]);
    assert_eq!(rig.cache.persistence(), None);
    rig.enroll(&tpm);
    rig.wait();
    assert_eq!(rig.kept(), 1);
    rig.restart();
    rig.fetch(&["b"]);
    assert_eq!(rig.kept(), 1, "the TPM has not answered yet");
    rig.cache.load(&tpm).unwrap();
    rig.wait();
    assert_eq!(rig.kept(), 2);
    // Chosen anew: what was kept under the old choice goes, what is in memory stays.
    rig.enroll(&tpm);
    rig.wait();
    assert_eq!(rig.rows().len(), 1);
    rig.record(None);
    assert!(rig.rows().is_empty() && rig.cache.persistence().is_none());
    assert!(rig.opens("b"), "in memory");
}

#[test]
fn time_ends_it_and_so_does_a_clock_that_was_set_back() {
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let mut rig = Rig::enrolled(&tpm);
    rig.fetch(&["a"]);
    rig.after_restart(&tpm);
    let span = rig.disk().state().rows[&kek("a")].span;
    let at = |rig: &Rig, now| rig.disk().recall_at(&kek("a"), Instant::now(), now);
    assert!(at(&rig, span.fetched).is_ok() && at(&rig, span.fetched + DAY - 1).is_ok());
    for (now, why) in [
        (span.fetched + DAY, "its key on disk has expired"),
        (
            span.fetched - 1,
            "its key on disk is from the future: the clock was set back",
        ),
    ] {
        assert_eq!(at(&rig, now).unwrap_err(), NotKept(Some(why.to_owned())));
    }

    // Removed when it has expired, by the daemon's own round.
    let key = RowKey::derive(&rig.secret(), &rig.salt(), rig.provider).unwrap();
    let span = Span {
        fetched: now() - 100,
        expires: now() - 1,
    };
    let body = key.encrypt(&kek("b"), span, &super::tests::key("b")).unwrap();
    let Span { fetched, expires } = span;
    rig.forge(CachedKek {
        kek: kek("b"),
        fetched,
        expires,
        body,
    });
    rig.after_restart(&tpm);
    assert_eq!(
        (rig.kept(), rig.refusal("b").as_str()),
        (1, "its key on disk has expired")
    );
    rig.cache.sweep();
    rig.wait();
    assert_eq!(rig.rows().len(), 1);
    assert!(rig.opens("a"));
}

impl Rig {
    fn secret(&self) -> Arc<SecretBytes> {
        match &self.disk().state().secret {
            Secret::Held(secret) => Arc::clone(secret),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn forged_rows_open_nothing() {
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let mut rig = Rig::enrolled(&tpm);
    rig.fetch(&["a", "b", "c"]);
    let rows = rig.rows();
    let moved = CachedKek {
        kek: kek("a"),
        ..rows[1].clone()
    };
    let longer = CachedKek {
        expires: rows[1].expires + DAY,
        ..rows[1].clone()
    };
    let cut = CachedKek {
        body: rows[2].body[..59].to_vec(),
        ..rows[2].clone()
    };
    for forged in [moved, longer, cut] {
        rig.forge(forged);
    }
    let (salt, secret) = (rig.salt(), rig.secret());
    for (nth, name) in ["a", "b", "c"].into_iter().enumerate() {
        let row = row(rig.rows()[nth].clone()).1;
        let opened = rig.disk().opened(&secret, &salt, &kek(name), &row);
        assert_eq!(
            opened.unwrap_err(),
            NotKept(Some("its key on disk is damaged".to_owned()))
        );
    }
    rig.restart();
    rig.cache.load(&tpm).unwrap();
    assert_eq!(rig.refusal("a"), "its key is not kept on disk");
    rig.fetch(&["a"]);
    rig.after_restart(&tpm);
    assert!(rig.opens("a"), "a good one took its place");

    rig.cache.purge().unwrap();
    rig.forge(rows[0].clone());
    rig.after_restart(&tpm);
    assert!(!rig.opens("a"), "from before a purge");
    rig.cache.sweep();
    rig.wait();
    assert!(rig.rows().is_empty());
}

#[test]
fn without_its_tpm_it_says_why_and_keeps_nothing() {
    let mut stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let mut rig = Rig::enrolled(&tpm);
    rig.fetch(&["a"]);
    stand.extend(7).unwrap();
    rig.restart();
    assert!(matches!(rig.cache.load(&tpm), Err(TpmError::PcrsDiffer(_))));
    let problem = "PCR 7 differs from when it was enrolled";
    assert_eq!(rig.cache.persistence().unwrap().problem.as_deref(), Some(problem));
    assert_eq!(
        rig.refusal("a"),
        format!("its key on disk can't be opened: {problem}")
    );
    assert!(
        !rig.cache.may_have(&[kek("a")]),
        "a server gets all the time there is"
    );
    rig.fetch(&["b"]);
    assert!(rig.opens("b"), "in memory all the same");
    assert_eq!(rig.rows().len(), 1);

    // As it was then.
    stand.reboot().unwrap();
    rig.after_restart(&tpm);
    assert!(rig.opens("a") && rig.cache.persistence().unwrap().problem.is_none());

    let other = Swtpm::start().unwrap();
    rig.restart();
    assert!(matches!(
        rig.cache.load(&Tpm::of(&other)),
        Err(TpmError::AnotherTpm)
    ));
    stand.off().unwrap();
    assert!(rig.cache.load(&tpm).unwrap_err().may_pass());
    assert!(rig.cache.enroll(&request(&tpm)).is_err());
    rig.cache.lock().unwrap();
    assert!(rig.rows().is_empty(), "a lock needs no TPM");
}

#[test]
fn lock_while_the_tpm_answers_counts() {
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let rig = Rig::new();
    let new = rig.cache.enroll(&request(&tpm)).unwrap();
    rig.cache.lock().unwrap();
    rig.record(Some(new));
    assert!(rig.cache.wants_tpm(), "nothing is in memory after the lock");
    rig.fetch(&["a"]);
    assert_eq!(rig.kept(), 0);
}

#[test]
fn what_the_server_refuses_leaves_the_disk_too() {
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let mut rig = Rig::enrolled(&tpm);
    rig.fetch(&["a", "b"]);
    let asked_before = rig.cache.ticket();
    rig.cache.forget(&kek("a")).unwrap();
    assert_eq!(rig.rows().len(), 1);
    rig.cache.put(asked_before, &[kek("a")], &[Arc::new(key("a"))]);
    rig.wait();
    assert!(!rig.opens("a"), "an answer from before that");
    rig.after_restart(&tpm);
    assert!(!rig.opens("a") && rig.opens("b"));
    let salt = rig.salt();
    rig.cache.purge().unwrap();
    assert!(rig.rows().is_empty() && rig.salt() != salt);
}

#[test]
fn disk_that_refuses_fails_no_put_and_is_asked_again_to_forget() {
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let mut rig = Rig::enrolled(&tpm);
    rig.fetch(&["a"]);
    let other = holds_the_write_lock(rig.dir.path());
    rig.fetch(&["b"]);
    assert!(rig.opens("b"));
    let problem = rig.cache.persistence().unwrap().problem.unwrap();
    assert!(problem.contains("held by another program"), "{problem}");
    drop(other);
    rig.cache.sweep();
    rig.wait();
    assert_eq!(rig.rows().len(), 2, "what it did not take is tried again");
    assert_eq!(rig.cache.persistence().unwrap().problem, None);

    let other = holds_the_write_lock(rig.dir.path());
    assert!(matches!(rig.cache.lock(), Err(StoreError::Busy { .. })));
    assert!(!rig.opens("a"), "nothing is opened all the same");
    let set = rig
        .cache
        .set(CachePolicy::UntilLock, None, &serde_json::json!({}));
    assert!(set.is_err() && rig.disk().state().rows.is_empty());
    assert_eq!(rig.rows().len(), 2);
    drop(other);
    rig.cache.sweep();
    rig.wait();
    assert!(rig.rows().is_empty() && rig.cache.persistence().unwrap().problem.is_none());
    rig.after_restart(&tpm);
    assert!(!rig.opens("a"));
}

#[test]
fn many_at_once_leave_nothing_after_the_last_purge() {
    let stand = Swtpm::start().unwrap();
    let mut rig = Rig::enrolled(&Tpm::of(&stand));
    std::thread::scope(|scope| {
        for worker in 0..4_u8 {
            let cache = &rig.cache;
            scope.spawn(move || {
                for nth in 0..25_u8 {
                    let name = char::from(b'a' + nth % 5).to_string();
                    cache.put(cache.ticket(), &[kek(&name)], &[Arc::new(key(&name))]);
                    match (worker + nth) % 8 {
                        0 => cache.forget(&kek(&name)).unwrap(),
                        1 => cache.purge().unwrap(),
                        2 => cache.sweep(),
                        _ => drop(cache.recall(&[kek(&name)], Instant::now())),
                    }
                }
            });
        }
    });
    rig.cache.forget(&kek("a")).unwrap();
    rig.wait();
    let on_disk: HashSet<_> = rig.rows().into_iter().map(|row| row.kek.0).collect();
    let known: HashSet<_> = rig.disk().state().rows.keys().map(|kek| kek.0.clone()).collect();
    assert_eq!(on_disk, known);
    assert!(!on_disk.contains("a"));
    rig.cache.lock().unwrap();
    rig.wait();
    assert!(rig.rows().is_empty());
    rig.after_restart(&Tpm::of(&stand));
    assert_eq!(rig.kept(), 0);
}
