//! Asks libvirt for its storage pools, for as long as the caller has patience.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::locks::lock;
use crate::host::libvirt::{Background, StoragePool};
use crate::host::permitted::PathRule;
use crate::model::problem::chain;

/// Asks for the storage pools on a thread of its own, of which there is one: nothing can interrupt a call that hangs.
#[derive(Debug, Default)]
pub(super) struct StoragePools {
    looks: Mutex<Looks>,
    told: Condvar,
}

#[derive(Debug, Default)]
struct Looks {
    is_asking: bool,
    /// How many answers there were.
    count: u64,
    last: Option<Vec<StoragePool>>,
}

impl StoragePools {
    /// What libvirt tells from now on, if it does within `patience`.
    fn ask(self: &Arc<Self>, libvirt: &Arc<Background>, patience: Duration) -> Option<Vec<StoragePool>> {
        let mut looks = lock(&self.looks);
        // An answer that is under way may be older than the question.
        let enough = looks.count + 1 + u64::from(looks.is_asking);
        self.ask_once(libvirt, &mut looks);
        let deadline = Instant::now() + patience;
        loop {
            if looks.count >= enough {
                return looks.last.clone();
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            let waited = self.told.wait_timeout(looks, left);
            looks = waited.unwrap_or_else(PoisonError::into_inner).0;
            self.ask_once(libvirt, &mut looks);
        }
    }

    /// `rule`, with the pools that libvirt tells of within `patience`.
    pub(super) fn added_to(
        self: &Arc<Self>,
        rule: PathRule,
        libvirt: &Arc<Background>,
        patience: Duration,
    ) -> PathRule {
        match self.ask(libvirt, patience) {
            Some(pools) => rule.with_pools(pools),
            None => {
                tracing::warn!("storage pools allow nothing for now: libvirt does not list them");
                rule
            }
        }
    }

    fn ask_once(self: &Arc<Self>, libvirt: &Arc<Background>, looks: &mut Looks) {
        if looks.is_asking {
            return;
        }
        let (pools, libvirt) = (Arc::clone(self), Arc::clone(libvirt));
        let asking = move || {
            let told = libvirt
                .active_pools()
                .inspect_err(|error| tracing::warn!("storage pools can't be listed: {}", chain(error)))
                .ok();
            let mut looks = lock(&pools.looks);
            *looks = Looks {
                is_asking: false,
                count: looks.count + 1,
                last: told,
            };
            pools.told.notify_all();
        };
        looks.is_asking = std::thread::Builder::new()
            .name("pools".into())
            .spawn(asking)
            .is_ok();
    }
}
