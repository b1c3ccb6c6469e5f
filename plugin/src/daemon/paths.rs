//! Where root acts and reads at paths that domain XML names, on this host and now.

use std::path::Path;
use std::time::Duration;

use super::Daemon;
use crate::domain::{self, Domain};
use crate::host::permitted::{PathError, PathRule, PermittedPath};
use crate::host::storage;
use crate::model::deadlines::image::ANSWERS;
use crate::model::problem::Problem;
use crate::store::EnvelopeRecord;

/// Without pools: asks nobody.
pub(super) fn rule_of_settings(daemon: &Daemon) -> PathRule {
    daemon.config().path_rule()
}

/// As [`Daemon::path_rule`], for a start: the settings and the keystore permit most images, and libvirt is asked for its pools only about
/// another, for so long and on the background connection.
pub(super) fn rule_of_start(
    daemon: &Daemon,
    domain: &Domain,
    own: &[EnvelopeRecord],
    patience: Duration,
) -> Result<PathRule, Problem> {
    let rule = rule_of_settings(daemon);
    let known: Vec<_> = own.iter().map(|record| record.location.as_str()).collect();
    if !has_sealed_outside(domain, &rule, &known) {
        return Ok(rule);
    }
    Ok(daemon.storage_pools.added_to(rule, &daemon.background, patience))
}

/// Whether a sealed object is neither where the rule permits nor where the keystore has one.
fn has_sealed_outside(domain: &Domain, rule: &PathRule, known: &[&str]) -> bool {
    let objects = domain::objects(domain).into_iter();
    let sealed = objects.filter(|object| object.envelope().is_some());
    sealed.filter_map(|object| object.path).any(|path| {
        // What does not answer is refused when it is to be opened.
        let Ok(_asked) = storage::ask(&path, ANSWERS) else {
            return false;
        };
        let place = rule.permit_known(&path, known.iter());
        matches!(place, Err(PathError::Outside { .. }))
    })
}

/// The place of an object that the keystore has, as long as no link of others leads elsewhere.
pub(super) fn known_place(daemon: &Daemon, path: &Path) -> Result<PermittedPath, PathError> {
    rule_of_settings(daemon).permit_known(path, std::iter::once(path))
}
