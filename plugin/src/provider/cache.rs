//! KEKs that a provider has given out, kept for the time when its servers don't answer.
//!
//! Only what was fetched is here, in secret memory, and for no longer than the policy says: counted from the request that
//! fetched it, by a clock that goes on while the host sleeps. It opens what is sealed and wraps nothing. A server that
//! answers is always asked, and what it says of a KEK counts here as well. Gone with a lock, and with the process; what
//! `persist` holds besides, where the admin chose that, is gone with a lock only.

mod memory;
mod nothing;
pub(crate) mod persist;

use std::slice::from_ref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::error::{ErrorClass, ProviderError};
use crate::host::tpm::{Tpm, TpmError};
use crate::model::cache_policy::CachePolicy;
use crate::model::envelope::{KekId, ProviderId};
use crate::model::problem::chain;
use crate::secret::SecretBytes;
use crate::store::{KekCacheRows, StoreError};
use memory::{Memory, SinceBoot};
use persist::{Disk, Enrollment, NotKept};

pub(super) use memory::Ticket;
pub(crate) use nothing::NothingToCache;

/// The KEKs of one provider.
#[derive(Debug)]
pub(crate) struct KekCache {
    memory: Mutex<Memory>,
    disk: Arc<Disk>,
}

impl KekCache {
    /// Empty, but for what `rows` keep of `provider`.
    pub(super) fn open(policy: CachePolicy, rows: KekCacheRows, provider: ProviderId, name: &str) -> Self {
        Self {
            memory: Mutex::new(Memory::new(policy)),
            disk: Arc::new(Disk::open(rows, provider, name)),
        }
    }

    /// How KEKs are kept across a reboot, if they are.
    pub(crate) fn persistence(&self) -> Option<persist::Report> {
        self.disk.report()
    }

    /// How long it keeps KEKs.
    pub(crate) fn policy(&self) -> CachePolicy {
        self.memory().policy
    }

    pub(crate) fn len(&self) -> usize {
        self.memory().all().count()
    }

    /// Binds what will keep KEKs across a reboot to the TPM. Nothing changes before [`Self::set`].
    pub(super) fn enroll(&self, request: &persist::Request<'_>) -> Result<Enrollment, persist::Error> {
        self.disk.enroll(request)
    }

    /// From now on, also for what it has in memory, once it is recorded with the `settings` of its provider; what was on disk goes.
    pub(super) fn set(
        &self,
        policy: CachePolicy,
        enrollment: Option<Enrollment>,
        settings: &serde_json::Value,
    ) -> Result<(), StoreError> {
        self.disk.replace(enrollment, settings)?;
        let mut memory = self.memory();
        memory.policy = policy;
        self.persist(&mut memory);
        Ok(())
    }

    /// Has `tpm` open what is on disk, where it is asked to and did not yet. What came in before is kept now too.
    pub(super) fn load(&self, tpm: &Tpm) -> Result<(), TpmError> {
        self.disk.load(tpm)?;
        self.persist(&mut self.memory());
        Ok(())
    }

    /// Whether [`KekCache::load`] has something to do.
    pub(super) fn wants_tpm(&self) -> bool {
        self.disk.wants_tpm()
    }

    /// Before a request.
    pub(super) fn ticket(&self) -> Ticket {
        self.memory().ticket()
    }

    /// Keeps what a request has brought, unless all was purged since.
    pub(super) fn put(&self, ticket: Ticket, keks: &[KekId], keys: &[Arc<SecretBytes>]) {
        // Held to the end: a purge comes before it or after it.
        let mut memory = self.memory();
        let asked = memory.put(ticket, keks, keys);
        if let Some(fetched) = asked.and_then(SinceBoot::by_the_clock) {
            self.disk.put(fetched, keks, keys);
        }
    }

    fn persist(&self, memory: &mut Memory) {
        for (kek, key, asked) in memory.all() {
            if let Some(fetched) = asked.by_the_clock() {
                self.disk.put(fetched, from_ref(kek), from_ref(key));
            }
        }
    }

    /// Whether all of `keks` are likely to come from here. Waits for nothing.
    pub(super) fn may_have(&self, keks: &[KekId]) -> bool {
        let in_memory = self.memory().each(keks, SinceBoot::now());
        keks.iter()
            .zip(in_memory)
            .all(|(kek, key)| key.is_some() || self.disk.may_have(kek))
    }

    /// All of `keks`, or why not. Waits for the TPM, until `until`, where it has not answered yet.
    pub(super) fn recall(&self, keks: &[KekId], until: Instant) -> Result<Vec<Arc<SecretBytes>>, NotKept> {
        let in_memory = self.memory().each(keks, SinceBoot::now());
        let one = |(kek, key): (&KekId, Option<Arc<SecretBytes>>)| match key {
            Some(key) => Ok(key),
            None => self.disk.recall(kek, until).map(Arc::new),
        };
        keks.iter().zip(in_memory).map(one).collect()
    }

    /// Whether it may open what could not be fetched because of `error`: only trouble is a reason, no word of a server about
    /// the key or about this host, and none that can't be understood.
    pub(super) fn may_stand_in(error: &ProviderError) -> bool {
        error.class() == ErrorClass::Trouble
    }

    /// What the server has said counts for what is kept: of a KEK that it refuses, or of this host.
    pub(super) fn heed(&self, error: &ProviderError) {
        let heeded = match error {
            ProviderError::UnknownKek(kek) | ProviderError::KekUnusable { kek, .. } => self.forget(kek),
            ProviderError::RefusesUs(_) => self.purge(),
            _ => Ok(()),
        };
        if let Err(error) = heeded {
            tracing::error!(
                "a key that the server refuses stays on disk for now: {}",
                chain(&error)
            );
        }
    }

    /// First in memory, so that no start gets it any more, then on disk.
    ///
    /// # Errors
    /// When the keystore can't be written. It is out of memory, and not opened any more, all the same.
    pub(super) fn forget(&self, kek: &KekId) -> Result<(), StoreError> {
        {
            let mut memory = self.memory();
            memory.forget(kek);
            self.disk.forget(kek);
        }
        self.settle()
    }

    /// Forgets everything, also what is on its way here.
    pub(super) fn purge(&self) -> Result<(), StoreError> {
        {
            let mut memory = self.memory();
            memory.purge();
            self.disk.revoke();
        }
        self.settle()
    }

    /// The same, and what the TPM has opened.
    pub(super) fn lock(&self) -> Result<(), StoreError> {
        {
            let mut memory = self.memory();
            memory.purge();
            self.disk.revoke();
            self.disk.drop_secret();
        }
        self.settle()
    }

    /// Forgets what is in memory. What is on disk is for the next virtseald.
    pub(super) fn end(&self) {
        let mut memory = self.memory();
        memory.purge();
        self.disk.drop_secret();
    }

    /// Tries again what a lock, or what the server said, did not get off the disk.
    pub(super) fn settle(&self) -> Result<(), StoreError> {
        self.disk.settle()
    }

    /// Forgets what is too old, and tries again what the disk did not take.
    pub(super) fn sweep(&self) {
        let mut memory = self.memory();
        memory.expire(SinceBoot::now());
        if self.disk.has_failed() {
            self.persist(&mut memory);
        }
        self.disk.tidy();
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        // A panic leaves each entry whole.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::memory::MAX_KEKS;
    use super::*;
    use crate::store::Stores;

    fn key(byte: u8) -> Arc<SecretBytes> {
        Arc::new(SecretBytes::take(&mut [byte; 32]).unwrap())
    }

    fn kek(name: &str) -> KekId {
        KekId(name.to_owned())
    }

    fn empty(policy: CachePolicy) -> KekCache {
        let stores = Stores::open(tempfile::tempdir().unwrap().path()).unwrap();
        let id = ProviderId::random();
        stores
            .keystore
            .insert_provider(id, "kms", "kmip", &serde_json::json!({}))
            .unwrap();
        KekCache::open(policy, stores.host_store.kek_cache(id), id, "kms")
    }

    fn holding(policy: &str, names: &[&str]) -> KekCache {
        let cache = empty(policy.parse().unwrap());
        for name in names {
            cache.put(cache.ticket(), &[kek(name)], &[key(name.as_bytes()[0])]);
        }
        cache
    }

    impl KekCache {
        fn is_empty(&self) -> bool {
            self.len() == 0
        }

        fn all_at(&self, keks: &[KekId], now: Option<SinceBoot>) -> Option<Vec<Arc<SecretBytes>>> {
            self.memory().each(keks, now).into_iter().collect()
        }

        fn all(&self, keks: &[KekId]) -> Option<Vec<Arc<SecretBytes>>> {
            self.recall(keks, Instant::now()).ok()
        }
    }

    fn later(seconds: u64) -> Option<SinceBoot> {
        Some(SinceBoot(
            SinceBoot::now().unwrap().0 + Duration::from_secs(seconds),
        ))
    }

    #[test]
    fn key_is_kept_for_its_time_from_the_last_request_on() {
        let cache = holding("1h", &["a"]);
        assert_eq!(
            cache.all_at(&[kek("a")], later(3500)).unwrap()[0].expose(),
            [b'a'; 32]
        );
        assert!(cache.all_at(&[kek("a")], later(3601)).is_none());
        assert!(cache.is_empty(), "it is out of memory, not only hidden");
        let cache = holding("until-lock", &["a"]);
        assert!(cache.all_at(&[kek("a")], later(400 * 86_400)).is_some());
        assert!(cache.all_at(&[kek("a")], None).is_none(), "without a clock");
        assert!(holding("none", &["a"]).is_empty());
    }

    #[test]
    fn all_or_nothing() {
        let cache = holding("1h", &["a", "b"]);
        let both = cache.all(&[kek("b"), kek("a")]).unwrap();
        assert_eq!((both[0].expose()[0], both[1].expose()[0]), (b'b', b'a'));
        assert!(cache.all(&[kek("a"), kek("c")]).is_none());
    }

    #[test]
    fn purge_also_keeps_out_what_was_on_its_way() {
        let cache = holding("until-lock", &["a"]);
        let ticket = cache.ticket();
        cache.purge().unwrap();
        cache.put(ticket, &[kek("a")], &[key(1)]);
        assert!(cache.is_empty());
        cache.put(cache.ticket(), &[kek("a")], &[key(1)]);
        assert_eq!(cache.len(), 1);
    }

    #[test]
    fn purged_keys_are_wiped_when_nobody_uses_them() {
        let cache = holding("until-lock", &["a"]);
        let used = cache.all(&[kek("a")]).unwrap().remove(0);
        let weak = Arc::downgrade(&used);
        cache.purge().unwrap();
        assert_eq!(weak.strong_count(), 1);
        drop(used);
        assert!(weak.upgrade().is_none());
    }

    #[test]
    fn what_the_server_says_counts() {
        let cache = holding("1h", &["a", "b", "c"]);
        cache.heed(&ProviderError::UnknownKek(kek("a")));
        cache.heed(&ProviderError::KekUnusable {
            kek: kek("b"),
            why: String::new(),
        });
        for error in [
            ProviderError::NotTrusted(String::new()),
            ProviderError::TurnedAway(String::new()),
            ProviderError::BesideTheQuestion(String::new()),
            ProviderError::Refused(String::new()),
            ProviderError::Trouble(String::new()),
        ] {
            cache.heed(&error);
            let trouble = matches!(error, ProviderError::Trouble(_));
            assert_eq!(KekCache::may_stand_in(&error), trouble, "{error:?}");
        }
        assert!(cache.all(&[kek("c")]).is_some() && cache.len() == 1);
        cache.heed(&ProviderError::RefusesUs(String::new()));
        assert!(cache.is_empty());
    }

    #[test]
    fn shorter_policy_counts_at_once() {
        let cache = holding("until-lock", &["a"]);
        cache
            .set(CachePolicy::None, None, &serde_json::json!({}))
            .unwrap();
        assert!(cache.is_empty());
    }

    #[test]
    fn oldest_goes_when_there_are_too_many() {
        let cache = empty(CachePolicy::UntilLock);
        for nth in 0..=MAX_KEKS {
            let mut ticket = cache.ticket();
            ticket.asked = Some(SinceBoot(Duration::from_secs(nth as u64)));
            cache.put(ticket, &[kek(&nth.to_string())], &[key(0)]);
        }
        assert_eq!(cache.len(), MAX_KEKS);
        assert!(cache.all(&[kek("0")]).is_none() && cache.all(&[kek("1")]).is_some());
    }

    #[test]
    fn debug_shows_no_key() {
        let shown = format!("{:?}", holding("1h", &["a"]));
        assert!(shown.contains("redacted") && !shown.contains("97, 97"), "{shown}");
    }
}
