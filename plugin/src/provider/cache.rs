//! KEKs that a provider has given out, kept for the time when its servers don't answer.
//!
//! Only what was fetched is here, in secret memory, and for no longer than the policy says: counted from the request that
//! fetched it, by a clock that goes on while the host sleeps. It opens what is sealed and wraps nothing. A server that
//! answers is always asked, and what it says of a KEK counts here as well. Gone with a lock, and with the process.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::ProviderError;
use crate::envelope::KekId;
use crate::secret::SecretBytes;

/// The most KEKs of one provider: each takes a page of memory that can't be swapped, of which there is little.
const MOST: usize = 512;

/// How long KEKs are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum CachePolicy {
    /// Not at all.
    None,
    /// For this long after each was last fetched.
    For(Duration),
    /// Until the provider is locked, or virtseald ends.
    UntilLock,
}

impl CachePolicy {
    const SHORTEST: Duration = Duration::from_secs(1);
    const LONGEST: Duration = Duration::from_secs(366 * 86_400);

    fn keeps(self, age: Duration) -> bool {
        match self {
            Self::None => false,
            Self::For(time) => age < time,
            Self::UntilLock => true,
        }
    }
}

impl Default for CachePolicy {
    fn default() -> Self {
        Self::For(Duration::from_secs(24 * 3600))
    }
}

impl fmt::Display for CachePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = match self {
            Self::None => return f.write_str("none"),
            Self::UntilLock => return f.write_str("until-lock"),
            Self::For(time) => time.as_secs(),
        };
        match seconds {
            hours if hours % 3600 == 0 => write!(f, "{}h", hours / 3600),
            minutes if minutes % 60 == 0 => write!(f, "{}m", minutes / 60),
            seconds => write!(f, "{seconds}s"),
        }
    }
}

/// The text is no [`CachePolicy`].
#[derive(Debug, Error)]
#[error("{0:?} is no cache policy: none, until-lock, or a time from 1s to 366d such as 30m, 4h or 7d")]
pub struct NotACachePolicy(String);

impl FromStr for CachePolicy {
    type Err = NotACachePolicy;

    fn from_str(text: &str) -> Result<Self, NotACachePolicy> {
        let wrong = || NotACachePolicy(text.to_owned());
        match text {
            "none" => return Ok(Self::None),
            "until-lock" => return Ok(Self::UntilLock),
            _ => {}
        }
        let (number, unit) = text
            .char_indices()
            .last()
            .and_then(|(at, unit)| Some((text[..at].parse::<u64>().ok()?, unit)))
            .ok_or_else(wrong)?;
        let seconds = match unit {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            _ => return Err(wrong()),
        };
        let time = Duration::from_secs(number.saturating_mul(seconds));
        (Self::SHORTEST..=Self::LONGEST)
            .contains(&time)
            .then_some(Self::For(time))
            .ok_or_else(wrong)
    }
}

impl TryFrom<String> for CachePolicy {
    type Error = NotACachePolicy;

    fn try_from(text: String) -> Result<Self, NotACachePolicy> {
        text.parse()
    }
}

impl From<CachePolicy> for String {
    fn from(policy: CachePolicy) -> Self {
        policy.to_string()
    }
}

/// Why there is nothing that a cache could keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NothingToCache {
    /// Derived from the root key, which is in memory while unlocked.
    #[error(
        "a native provider needs no server, so there is nothing to cache: it opens its VMs while it is unlocked"
    )]
    Native,
    /// Encrypts at the server.
    #[error("the keys of a transit provider never leave its server, so there is nothing to cache")]
    Transit,
    /// Encrypts in the token.
    #[error("the keys of a pkcs11 provider never leave its token, so there is nothing to cache")]
    Pkcs11,
    /// Encrypts at the server.
    #[error(
        "with mode server the keys of a kmip provider never leave its server, so there is nothing to cache: that takes \
         mode local"
    )]
    ModeServer,
}

impl NothingToCache {
    /// Of a kind of provider; `None` if it can have a cache, or is not known.
    #[must_use]
    pub fn of_kind(kind: &str) -> Option<Self> {
        match kind {
            "native" => Some(Self::Native),
            "transit" => Some(Self::Transit),
            "pkcs11" => Some(Self::Pkcs11),
            _ => None,
        }
    }
}

/// A point on the clock that counts from the host's boot, and while it sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct SinceBoot(Duration);

impl SinceBoot {
    /// Nothing where the kernel does not say; then nothing is young enough.
    fn now() -> Option<Self> {
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME).ok()?;
        Some(Self(now.into()))
    }
}

/// The KEKs of one provider.
#[derive(Debug)]
pub struct KekCache(Mutex<Kept>);

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
        Self(Mutex::new(Kept {
            policy,
            purges: 0,
            keks: HashMap::new(),
        }))
    }

    /// How long it keeps KEKs.
    #[must_use]
    pub fn policy(&self) -> CachePolicy {
        self.kept().policy
    }

    /// How many it keeps now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.sweep();
        self.kept().keks.len()
    }

    /// Whether it keeps none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// From now on, also for what it has.
    pub(super) fn set_policy(&self, policy: CachePolicy) {
        self.kept().policy = policy;
        self.sweep();
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
    }

    /// All of `keks`, or nothing.
    pub(super) fn all(&self, keks: &[KekId]) -> Option<Vec<Arc<SecretBytes>>> {
        self.all_at(keks, SinceBoot::now())
    }

    fn all_at(&self, keks: &[KekId], now: Option<SinceBoot>) -> Option<Vec<Arc<SecretBytes>>> {
        let mut kept = self.kept();
        kept.expire(now);
        let one = |kek| kept.keks.get(kek).map(|cached| Arc::clone(&cached.key));
        keks.iter().map(one).collect()
    }

    /// What the server has said counts for what is kept: of a KEK that it refuses, or of this host.
    pub(super) fn heed(&self, error: &ProviderError) {
        match error {
            ProviderError::UnknownKek(kek) | ProviderError::KekUnusable { kek, .. } => self.forget(kek),
            ProviderError::RefusesUs(_) => self.purge(),
            _ => {}
        }
    }

    pub(super) fn forget(&self, kek: &KekId) {
        self.kept().keks.remove(kek);
    }

    /// Forgets everything, also what is on its way here.
    pub(super) fn purge(&self) {
        let mut kept = self.kept();
        kept.purges += 1;
        kept.keks = HashMap::new();
    }

    /// Forgets what is too old.
    pub(super) fn sweep(&self) {
        self.kept().expire(SinceBoot::now());
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // A panic leaves each entry whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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

    fn later(seconds: u64) -> Option<SinceBoot> {
        Some(SinceBoot(
            SinceBoot::now().unwrap().0 + Duration::from_secs(seconds),
        ))
    }

    #[test]
    fn policies_are_read_and_written() {
        for (text, shown) in [
            ("none", "none"),
            ("until-lock", "until-lock"),
            ("4h", "4h"),
            ("7d", "168h"),
            ("90m", "90m"),
            ("120m", "2h"),
            ("45s", "45s"),
        ] {
            let policy: CachePolicy = text.parse().unwrap();
            assert_eq!(policy.to_string(), shown);
            assert_eq!(shown.parse::<CachePolicy>().unwrap(), policy);
        }
        assert_eq!(CachePolicy::default().to_string(), "24h");
        for bad in [
            "",
            "4",
            "h",
            "0s",
            "-1h",
            "4 h",
            "367d",
            "99999999999999999999h",
            "18446744073709551615d",
            "1.5h",
            "4ö",
            "None",
        ] {
            assert!(bad.parse::<CachePolicy>().is_err(), "{bad}");
        }
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
        cache.purge();
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
        cache.purge();
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
        cache.heed(&ProviderError::NotTrusted(String::new()));
        assert!(cache.all(&[kek("c")]).is_some() && cache.len() == 1);
        cache.heed(&ProviderError::RefusesUs(String::new()));
        assert!(cache.is_empty());
    }

    #[test]
    fn shorter_policy_counts_at_once() {
        let cache = holding("until-lock", &["a"]);
        cache.set_policy(CachePolicy::None);
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
