//! Where root acts and reads at paths that domain XML names, on this host and now.

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Daemon, LIBVIRT_SHARE, lock};
use crate::domain::{self, Domain, ObjectState};
use crate::host::libvirt::{Libvirt, StoragePool};
use crate::host::permitted::{PathError, PathRule, PermittedPath};
use crate::model::envelope::VmId;
use crate::model::problem::{Problem, chain};

/// How long whoever is no start waits for libvirt's pools.
const PATIENCE: Duration = Duration::from_secs(2);

impl Daemon {
    /// What the settings permit, and the storage pools that are active. Asks libvirt on the background connection, for a while; as
    /// long as that does not say, pools permit nothing. A pool that somebody is starting or refreshing keeps libvirt from telling of
    /// any, for as long as its storage takes.
    pub(super) fn path_rule(&self) -> PathRule {
        self.with_pools(self.rule_of_settings(), PATIENCE)
    }

    fn with_pools(&self, rule: PathRule, patience: Duration) -> PathRule {
        match self.storage_pools.ask(&self.background, patience) {
            Some(pools) => rule.with_pools(pools),
            None => {
                tracing::warn!("storage pools permit nothing now: libvirt does not tell them");
                rule
            }
        }
    }

    /// Without pools: asks nobody.
    pub(super) fn rule_of_settings(&self) -> PathRule {
        PathRule::of(&self.config())
    }

    /// As [`Self::path_rule`], for a start: the settings and the keystore permit most images, and libvirt is asked for its pools only
    /// about another, for a while and on the background connection.
    pub(super) fn rule_of_start(&self, domain: &Domain) -> Result<PathRule, Problem> {
        let rule = self.rule_of_settings();
        let known = self.locations_of(domain.uuid)?;
        let is_outside = |path: &Path| {
            let place = rule.permit_known(path, known.iter());
            matches!(place, Err(PathError::Outside { .. }))
        };
        let mut sealed = domain::objects(domain)
            .into_iter()
            .filter_map(|object| match object.state {
                ObjectState::Sealed(_) => object.path,
                ObjectState::Plain | ObjectState::Unsupported(_) => None,
            });
        if !sealed.any(|path| is_outside(&path)) {
            return Ok(rule);
        }
        let patience = self.config().hook_deadline.mul_f64(LIBVIRT_SHARE);
        Ok(self.with_pools(rule, patience))
    }

    /// Where the keystore has the objects of a VM.
    pub(super) fn locations_of(&self, vm: VmId) -> Result<Vec<String>, Problem> {
        let records = self.keystore.envelopes_of(vm)?.sound.into_iter();
        Ok(records.map(|record| record.location).collect())
    }

    /// The place of an object that the keystore has, as long as no link of others leads elsewhere.
    pub(super) fn known_place(&self, path: &Path) -> Result<PermittedPath, PathError> {
        self.rule_of_settings().permit_known(path, std::iter::once(path))
    }
}

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
    fn ask(self: &Arc<Self>, libvirt: &Arc<Libvirt>, patience: Duration) -> Option<Vec<StoragePool>> {
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

    fn ask_once(self: &Arc<Self>, libvirt: &Arc<Libvirt>, looks: &mut Looks) {
        if looks.is_asking {
            return;
        }
        let (pools, libvirt) = (Arc::clone(self), Arc::clone(libvirt));
        let asking = move || {
            let told = libvirt
                .active_pools()
                .inspect_err(|error| tracing::warn!("storage pools can't be told: {}", chain(error)))
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
