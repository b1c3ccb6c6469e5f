//! The KEKs of a cache that are in memory.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::model::cache_policy::CachePolicy;
use crate::model::envelope::KekId;
use crate::secret::SecretBytes;
use crate::store::{UnixTime, now};

/// The most KEKs of one provider: each takes a page of memory that can't be swapped, of which there is little.
pub(super) const MAX_KEKS: usize = 512;

/// A point on the clock that counts from the host's boot, and while it sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SinceBoot(pub(super) Duration);

impl SinceBoot {
    /// Nothing where the kernel does not say; then nothing is young enough.
    pub(super) fn now() -> Option<Self> {
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME).ok()?;
        Some(Self(now.into()))
    }

    /// When that was, by the wall clock.
    pub(super) fn by_the_clock(self) -> Option<UnixTime> {
        let ago = Self::now()?.0.saturating_sub(self.0).as_secs();
        Some(now().saturating_sub_unsigned(ago))
    }
}

#[derive(Debug)]
pub(super) struct Memory {
    pub(super) policy: CachePolicy,
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
pub(in crate::provider) struct Ticket {
    purges: u64,
    pub(super) asked: Option<SinceBoot>,
}

impl Memory {
    pub(super) fn new(policy: CachePolicy) -> Self {
        Self {
            policy,
            purges: 0,
            keks: HashMap::new(),
        }
    }

    pub(super) fn ticket(&self) -> Ticket {
        Ticket {
            purges: self.purges,
            asked: SinceBoot::now(),
        }
    }

    /// Keeps what was asked for with `ticket`, and says since when that counts; nothing if all was purged since.
    pub(super) fn put(
        &mut self,
        ticket: Ticket,
        keks: &[KekId],
        keys: &[Arc<SecretBytes>],
    ) -> Option<SinceBoot> {
        let asked = ticket.asked?;
        if self.purges != ticket.purges || self.policy == CachePolicy::None {
            return None;
        }
        for (kek, key) in keks.iter().zip(keys) {
            let key = Arc::clone(key);
            self.keks.insert(kek.clone(), Cached { key, asked });
        }
        while self.keks.len() > MAX_KEKS {
            let oldest = self.keks.iter().min_by_key(|(_, cached)| cached.asked);
            let oldest = oldest.map(|(kek, _)| kek.clone())?;
            self.keks.remove(&oldest);
        }
        Some(asked)
    }

    /// Each that there is, and when it was asked for.
    pub(super) fn all(&mut self) -> impl Iterator<Item = (&KekId, &Arc<SecretBytes>, SinceBoot)> {
        self.expire(SinceBoot::now());
        self.keks
            .iter()
            .map(|(kek, cached)| (kek, &cached.key, cached.asked))
    }

    pub(super) fn each(&mut self, keks: &[KekId], now: Option<SinceBoot>) -> Vec<Option<Arc<SecretBytes>>> {
        self.expire(now);
        let one = |kek| self.keks.get(kek).map(|cached| Arc::clone(&cached.key));
        keks.iter().map(one).collect()
    }

    /// What was asked for before comes in no more.
    pub(super) fn forget(&mut self, kek: &KekId) {
        self.purges += 1;
        self.keks.remove(kek);
    }

    /// The same for all.
    pub(super) fn purge(&mut self) {
        self.purges += 1;
        self.keks = HashMap::new();
    }

    pub(super) fn expire(&mut self, now: Option<SinceBoot>) {
        let policy = self.policy;
        let is_young = |now: SinceBoot, cached: &Cached| policy.keeps(now.0.saturating_sub(cached.asked.0));
        self.keks
            .retain(|_, cached| now.is_some_and(|now| is_young(now, cached)));
    }
}
