//! Where root acts and reads at paths that domain XML names, on this host and now.

use std::path::Path;
use std::time::Duration;

use super::Daemon;
use crate::domain::{self, Domain, ObjectState};
use crate::host::permitted::{PathError, PathRule, PermittedPath};
use crate::model::envelope::VmId;
use crate::model::problem::Problem;
use crate::store::EnvelopeStore;

/// How long whoever is no start waits for libvirt's pools.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the settings permit, and the storage pools that are active. Asks libvirt on the background connection, for a while; as
/// long as that does not say, pools permit nothing. A pool that somebody is starting or refreshing keeps libvirt from telling of
/// any, for as long as its storage takes.
pub(super) fn rule(daemon: &Daemon) -> PathRule {
    with_pools(daemon, rule_of_settings(daemon), PATIENCE)
}

fn with_pools(daemon: &Daemon, rule: PathRule, patience: Duration) -> PathRule {
    match daemon.storage_pools.ask(&daemon.background, patience) {
        Some(pools) => rule.with_pools(pools),
        None => {
            tracing::warn!("storage pools permit nothing now: libvirt does not tell them");
            rule
        }
    }
}

/// Without pools: asks nobody.
pub(super) fn rule_of_settings(daemon: &Daemon) -> PathRule {
    PathRule::of(&daemon.config())
}

/// As [`rule`], for a start: the settings and the keystore permit most images, and libvirt is asked for its pools only about
/// another, for so long and on the background connection.
pub(super) fn rule_of_start(
    daemon: &Daemon,
    domain: &Domain,
    patience: Duration,
) -> Result<PathRule, Problem> {
    let rule = rule_of_settings(daemon);
    let known = locations_of(daemon.keystore.as_ref(), domain.uuid)?;
    if !has_sealed_outside(domain, &rule, &known) {
        return Ok(rule);
    }
    Ok(with_pools(daemon, rule, patience))
}

/// Whether a sealed object is neither where the rule permits nor where the keystore has one.
fn has_sealed_outside(domain: &Domain, rule: &PathRule, known: &[String]) -> bool {
    let mut sealed = domain::objects(domain)
        .into_iter()
        .filter_map(|object| match object.state {
            ObjectState::Sealed(_) => object.path,
            ObjectState::Plain | ObjectState::Unsupported(_) => None,
        });
    sealed.any(|path| {
        let place = rule.permit_known(&path, known.iter());
        matches!(place, Err(PathError::Outside { .. }))
    })
}

/// Where the keystore has the objects of a VM.
pub(super) fn locations_of(keystore: &dyn EnvelopeStore, vm: VmId) -> Result<Vec<String>, Problem> {
    let records = keystore.envelopes_of(vm)?.sound.into_iter();
    Ok(records.map(|record| record.location).collect())
}

/// The place of an object that the keystore has, as long as no link of others leads elsewhere.
pub(super) fn known_place(daemon: &Daemon, path: &Path) -> Result<PermittedPath, PathError> {
    rule_of_settings(daemon).permit_known(path, std::iter::once(path))
}
