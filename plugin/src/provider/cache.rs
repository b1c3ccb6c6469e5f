//! KEKs that a provider has given out, kept for the time when its servers don't answer.
//!
//! Only what was fetched is here, in secret memory, and for no longer than the policy says: counted from the request that
//! fetched it, by a clock that goes on while the host sleeps. It opens what is sealed and wraps nothing. A server that
//! answers is always asked, and what it says of a KEK counts here as well. Gone with a lock, and with the process; what
//! `persisted` holds besides, where the admin chose that, is gone with a lock only.

mod persisted;
mod policy;
mod row;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use super::error::{ErrorClass, ProviderError};
use crate::host::tpm::{PcrList, Tpm, TpmError};
use crate::model::envelope::{KekId, ProviderId};
use crate::model::problem::chain;
use crate::secret::SecretBytes;
use crate::store::{KekCacheRows, StoreError, UnixTime};
use persisted::Persisted;

pub(super) use persisted::{NewPersistence, NotKept};
pub use persisted::{PersistError, Persistence};
pub use policy::{CachePolicy, NotACachePolicy, NothingToCache, PersistTime};

/// The most KEKs of one provider: each takes a page of memory that can't be swapped, of which there is little.
const MOST: usize = 512;

/// A point on the clock that counts from the host's boot, and while it sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct SinceBoot(Duration);

impl SinceBoot {
    /// Nothing where the kernel does not say; then nothing is young enough.
    fn now() -> Option<Self> {
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME).ok()?;
        Some(Self(now.into()))
    }

    /// When that was, by the wall clock.
    fn by_the_clock(self) -> Option<UnixTime> {
        let ago = Self::now()?.0.saturating_sub(self.0).as_secs();
        Some(persisted::now().saturating_sub_unsigned(ago))
    }
}

/// The KEKs of one provider.
#[derive(Debug)]
pub struct KekCache {
    kept: Mutex<Kept>,
    persisted: OnceLock<Arc<Persisted>>,
}

#[derive(Debug)]
struct Kept {
    policy: CachePolicy,
    /// How often everything was purged: what was asked for before does not come in after.
    purges: u64,
    keks: HashMap<KekId, Cached>,
}

#[derive(Debug)]
struct Cached {
    key: Arc<SecretBytes>,
    asked: SinceBoot,
}

/// Taken before a KEK is asked for, and shown when it is put in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ticket {
    purges: u64,
    asked: Option<SinceBoot>,
}

impl KekCache {
    pub(super) fn new(policy: CachePolicy) -> Self {
        Self {
            kept: Mutex::new(Kept {
                policy,
                purges: 0,
                keks: HashMap::new(),
            }),
            persisted: OnceLock::new(),
        }
    }

    /// From now on it has the KEKs of `provider` too that `rows` keep.
    pub(super) fn attach(&self, rows: KekCacheRows, provider: ProviderId, name: &str) {
        // Attached already: nothing is lost.
        let _ = self
            .persisted
            .set(Arc::new(Persisted::open(rows, provider, name)));
    }

    /// How KEKs are kept across a reboot, if they are.
    #[must_use]
    pub fn persistence(&self) -> Option<Persistence> {
        self.persisted.get()?.persistence()
    }

    /// How long it keeps KEKs.
    #[must_use]
    pub fn policy(&self) -> CachePolicy {
        self.kept().policy
    }

    /// How many it keeps now.
    #[must_use]
    pub fn len(&self) -> usize {
        let mut kept = self.kept();
        kept.expire(SinceBoot::now());
        kept.keks.len()
    }

    /// Whether it keeps none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Has `tpm` seal what will keep KEKs across a reboot.
    ///
    /// # Errors
    /// Why it does not; `None` without a keystore. Nothing changes.
    pub(super) fn enroll(
        &self,
        tpm: &Tpm,
        keep: PersistTime,
        pcrs: &PcrList,
    ) -> Result<Option<NewPersistence>, PersistError> {
        let persisted = self.persisted.get();
        persisted
            .map(|persisted| persisted.enroll(tpm, keep, pcrs))
            .transpose()
    }

    /// From now on, also for what it has in memory, once it is recorded with the `settings` of its provider; what was on disk goes.
    pub(super) fn set(
        &self,
        policy: CachePolicy,
        persistence: Option<NewPersistence>,
        settings: &serde_json::Value,
    ) -> Result<(), StoreError> {
        if let Some(persisted) = self.persisted.get() {
            persisted.replace(persistence, settings)?;
        }
        let mut kept = self.kept();
        kept.policy = policy;
        kept.expire(SinceBoot::now());
        self.persist(&kept);
        Ok(())
    }

    /// Has `tpm` open what is on disk, where it is asked to and did not yet. What came in before is kept now too.
    ///
    /// # Errors
    /// Why it does not.
    pub(super) fn load(&self, tpm: &Tpm) -> Result<(), TpmError> {
        let Some(persisted) = self.persisted.get() else {
            return Ok(());
        };
        persisted.load(tpm)?;
        let mut kept = self.kept();
        kept.expire(SinceBoot::now());
        self.persist(&kept);
        Ok(())
    }

    /// Whether [`KekCache::load`] has something to do.
    pub(super) fn wants_tpm(&self) -> bool {
        self.persisted
            .get()
            .is_some_and(|persisted| persisted.wants_tpm())
    }

    /// Before a request.
    pub(super) fn ticket(&self) -> Ticket {
        Ticket {
            purges: self.kept().purges,
            asked: SinceBoot::now(),
        }
    }

    /// Keeps what a request has brought, unless all was purged since.
    pub(super) fn put(&self, ticket: Ticket, keks: &[KekId], keys: &[Arc<SecretBytes>]) {
        let mut kept = self.kept();
        let Some(asked) = ticket.asked else {
            return;
        };
        if kept.purges != ticket.purges || kept.policy == CachePolicy::None {
            return;
        }
        for (kek, key) in keks.iter().zip(keys) {
            let key = Arc::clone(key);
            kept.keks.insert(kek.clone(), Cached { key, asked });
        }
        while kept.keks.len() > MOST {
            let oldest = kept.keks.iter().min_by_key(|(_, cached)| cached.asked);
            let Some(oldest) = oldest.map(|(kek, _)| kek.clone()) else {
                return;
            };
            kept.keks.remove(&oldest);
        }
        if let (Some(persisted), Some(fetched)) = (self.persisted.get(), asked.by_the_clock()) {
            // With `kept` held: a purge comes before it or after it.
            persisted.put(fetched, keks, keys);
        }
    }

    fn persist(&self, kept: &Kept) {
        let Some(persisted) = self.persisted.get() else {
            return;
        };
        for (kek, cached) in &kept.keks {
            if let Some(fetched) = cached.asked.by_the_clock() {
                persisted.put(
                    fetched,
                    std::slice::from_ref(kek),
                    std::slice::from_ref(&cached.key),
                );
            }
        }
    }

    /// Whether all of `keks` are likely to come from here. Waits for nothing.
    pub(super) fn may_have(&self, keks: &[KekId]) -> bool {
        let persisted = self.persisted.get();
        let in_memory = self.each(keks, SinceBoot::now());
        let on_disk = |kek| persisted.is_some_and(|persisted| persisted.may_have(kek));
        keks.iter()
            .zip(in_memory)
            .all(|(kek, key)| key.is_some() || on_disk(kek))
    }

    /// All of `keks`, or why not. Waits for the TPM, until `until`, where it has not answered yet.
    pub(super) fn recall(&self, keks: &[KekId], until: Instant) -> Result<Vec<Arc<SecretBytes>>, NotKept> {
        let in_memory = self.each(keks, SinceBoot::now());
        let one = |(kek, key): (&KekId, Option<Arc<SecretBytes>>)| match (key, self.persisted.get()) {
            (Some(key), _) => Ok(key),
            (None, Some(persisted)) => persisted.recall(kek, until).map(Arc::new),
            (None, None) => Err(NotKept(None)),
        };
        keks.iter().zip(in_memory).map(one).collect()
    }

    /// What is in memory.
    fn each(&self, keks: &[KekId], now: Option<SinceBoot>) -> Vec<Option<Arc<SecretBytes>>> {
        let mut kept = self.kept();
        kept.expire(now);
        let one = |kek| kept.keks.get(kek).map(|cached| Arc::clone(&cached.key));
        keks.iter().map(one).collect()
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

    /// # Errors
    /// When the keystore can't be written. It is out of memory, and not opened any more, all the same.
    pub(super) fn forget(&self, kek: &KekId) -> Result<(), StoreError> {
        self.drop_memory(
            |kept| drop(kept.keks.remove(kek)),
            |persisted| persisted.forget(kek),
        )
    }

    /// Forgets everything, also what is on its way here.
    ///
    /// # Errors
    /// As [`KekCache::forget`].
    pub(super) fn purge(&self) -> Result<(), StoreError> {
        self.drop_memory(|kept| kept.keks = HashMap::new(), Persisted::revoke)
    }

    /// The same, and what the TPM has opened.
    ///
    /// # Errors
    /// As [`KekCache::forget`].
    pub(super) fn lock(&self) -> Result<(), StoreError> {
        self.drop_memory(
            |kept| kept.keks = HashMap::new(),
            |persisted| {
                persisted.revoke();
                persisted.drop_secret();
            },
        )
    }

    /// Forgets what is in memory. What is on disk is for the next virtseald.
    pub(super) fn end(&self) {
        let mut kept = self.kept();
        kept.purges += 1;
        kept.keks = HashMap::new();
        if let Some(persisted) = self.persisted.get() {
            persisted.drop_secret();
        }
    }

    /// Tries again what a lock, or what the server said, did not get off the disk.
    ///
    /// # Errors
    /// As [`KekCache::forget`].
    pub(super) fn settle(&self) -> Result<(), StoreError> {
        self.persisted
            .get()
            .map_or(Ok(()), |persisted| persisted.settle())
    }

    /// First in memory, so that no start gets it any more, then on disk. What was asked for before comes in no more.
    fn drop_memory(
        &self,
        from_memory: impl FnOnce(&mut Kept),
        from_disk: impl FnOnce(&Persisted),
    ) -> Result<(), StoreError> {
        let mut kept = self.kept();
        kept.purges += 1;
        from_memory(&mut kept);
        if let Some(persisted) = self.persisted.get() {
            from_disk(persisted);
        }
        drop(kept);
        self.settle()
    }

    /// Forgets what is too old, and tries again what the disk did not take.
    pub(super) fn sweep(&self) {
        let mut kept = self.kept();
        kept.expire(SinceBoot::now());
        if let Some(persisted) = self.persisted.get() {
            if persisted.has_failed() {
                self.persist(&kept);
            }
            persisted.tidy();
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // A panic leaves each entry whole.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn expire(&mut self, now: Option<SinceBoot>) {
        let policy = self.policy;
        let is_young = |now: SinceBoot, cached: &Cached| policy.keeps(now.0.saturating_sub(cached.asked.0));
        self.keks
            .retain(|_, cached| now.is_some_and(|now| is_young(now, cached)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> Arc<SecretBytes> {
        Arc::new(SecretBytes::take(&mut [byte; 32]).unwrap())
    }

    fn kek(name: &str) -> KekId {
        KekId(name.to_owned())
    }

    fn holding(policy: &str, names: &[&str]) -> KekCache {
        let cache = KekCache::new(policy.parse().unwrap());
        for name in names {
            cache.put(cache.ticket(), &[kek(name)], &[key(name.as_bytes()[0])]);
        }
        cache
    }

    impl KekCache {
        fn all_at(&self, keks: &[KekId], now: Option<SinceBoot>) -> Option<Vec<Arc<SecretBytes>>> {
            self.each(keks, now).into_iter().collect()
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
        let cache = KekCache::new(CachePolicy::UntilLock);
        for nth in 0..=MOST {
            let mut ticket = cache.ticket();
            ticket.asked = Some(SinceBoot(Duration::from_secs(nth as u64)));
            cache.put(ticket, &[kek(&nth.to_string())], &[key(0)]);
        }
        assert_eq!(cache.len(), MOST);
        assert!(cache.all(&[kek("0")]).is_none() && cache.all(&[kek("1")]).is_some());
    }

    #[test]
    fn debug_shows_no_key() {
        let shown = format!("{:?}", holding("1h", &["a"]));
        assert!(shown.contains("redacted") && !shown.contains("97, 97"), "{shown}");
    }
}
